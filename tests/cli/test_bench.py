"""The benchmark: what it computes, not how fast anything is."""

import contextlib
import gc
import json
import multiprocessing

import pytest
import torch

from hf_flashbsa import __main__
from hf_flashbsa.bench import jobs, presets, report
from hf_flashbsa.bench.cases import MASKS, Case, make_inputs, reference_error
from hf_flashbsa.bench.jobs import Job, measure_job
from hf_flashbsa.bench.layouts import PATTERNS, flex_block_mask
from hf_flashbsa.bench.measure import measure, measure_host, measure_wall, peak_bytes
from hf_flashbsa.bench.presets import PRESETS, Comparison
from hf_flashbsa.bench.providers import PROVIDERS, Unsupported, _flash_package, enabled
from hf_flashbsa.bench.workers import JobError, run_jobs
from hf_flashbsa.cli import bench
from hf_flashbsa.masks.block_layout import BlockLayout

CPU = torch.device("cpu")


@pytest.fixture
def jobs_run_here(monkeypatch):
    """The command's worker processes take seconds to start: most tests of what it does with results have none."""

    def run_here(work, jobs, *, seconds, **_):
        return ((job, work(job)) for job in jobs if seconds > 0)

    monkeypatch.setattr(bench, "run_jobs", run_here)


def small(mask: str, **fields) -> Case:
    sizes = {"batch": 3, "heads": 4, "heads_k": 4, "length": 40, "head_dim": 16, "dtype": "float32", "window": 9}
    return Case(mask, **sizes | fields)


@pytest.mark.parametrize("mask", MASKS)
def test_live_scores_are_those_of_the_mask(mask):
    case = small(mask, length=700)
    inputs = make_inputs(case, CPU)
    queries, keys = inputs.q.shape[2], inputs.k.shape[2]
    visible = torch.ones(1, 1, queries, keys, dtype=torch.bool) if inputs.mask is None else inputs.mask
    if mask == "padded":
        visible = visible & inputs.live[:, None, :, None]
    rows = 1 if case.is_packed else case.batch
    count = visible.expand(rows, 1, queries, keys).sum().item()
    # The custom of counting causal attention as half a square leaves out half of the diagonal.
    diagonal = queries * rows / 2 if mask in ("causal", "packed-causal", "packed-ids") else 0
    assert case.live_scores == count - diagonal
    assert case.flops("both") == case.flops("forward") + case.flops("backward")


def with_layout(mask: str, pattern: str, **fields) -> Case:
    return small(mask, pattern=pattern, chance=0.3 if pattern == "random" else None, block_size=32, **fields)


@pytest.mark.parametrize("mask", ["full", "causal", "padded", "packed", "packed-causal"])
@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_live_scores_of_layouts_are_counted_exactly(mask, pattern):
    case = with_layout(mask, pattern, batch=2, length=550)
    inputs = make_inputs(case, CPU)
    visible = inputs.mask & inputs.live[:, None, :, None] if mask == "padded" else inputs.mask
    rows, heads = 1 if case.is_packed else case.batch, visible.shape[1]
    assert case.live_scores == visible.expand(rows, -1, -1, -1).sum().item() / heads
    assert case.live_scores > 0.0


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("pattern", PATTERNS[1:])
def test_flex_gets_the_same_entries_and_full_blocks(pattern, causal):
    case = with_layout("causal" if causal else "full", pattern, length=704)
    inputs = make_inputs(case, CPU)
    block_mask = flex_block_mask(pattern, case.layout, case.length, causal)
    shown = BlockLayout.from_flex(block_mask)
    assert torch.equal(shown.to_mask(704, 704), inputs.mask)
    # Blocks that are full are listed as such, so that no rule is looked at within them.
    exact = BlockLayout.from_mask(inputs.mask, 32)
    assert torch.equal(block_mask.full_kv_num_blocks, exact.lists("q").full)
    assert torch.equal(block_mask.kv_num_blocks, exact.lists("q").total - exact.lists("q").full)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_random_layouts_have_their_density_and_no_empty_row(causal):
    mask = "causal" if causal else "full"
    sizes = {"length": 8192, "pattern": "random", "block_size": 32}
    for chance in (0.5, 0.1):
        case = small(mask, chance=chance, **sizes)
        assert case.fields()["density"] == pytest.approx(chance, rel=0.05)
        assert torch.equal(case.layout.grid, small(mask, chance=chance, batch=1, **sizes).layout.grid)
    rare = small(mask, chance=1e-6, **sizes).layout.lists("q")
    assert (rare.total == 1).all()


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"mask": "window", "pattern": "local", "block_size": 32}, "take another"),
        ({"mask": "packed", "pattern": "local", "block_size": 32, "bias": True}, "without"),
        ({"mask": "packed-cross", "bias": True}, "without"),
        ({"mask": "full", "pattern": "local"}, "give both"),
        ({"mask": "full", "pattern": "random", "block_size": 32}, "give one"),
        ({"mask": "full", "chance": 0.5}, "none for others"),
    ],
)
def test_cases_that_cannot_be_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        small(**fields)


def test_cross_attention_has_few_queries_for_each_document():
    case = small("packed-cross", length=300)
    inputs = make_inputs(case, CPU)
    assert inputs.q.shape[2] == 28 * len(case.documents) and inputs.k.shape[2] == 3 * 300
    assert inputs.document_q[0].bincount().tolist() == case.queries
    assert inputs.document_k[0].bincount().tolist() == case.documents


def test_documents_have_the_lengths_of_news():
    packed = Case("packed", 256, 1, 1, 1024, 16)
    assert sum(packed.documents) == 256 * 1024
    assert max(packed.documents) == 1024
    assert 380 < sum(packed.documents) / len(packed.documents) < 460
    assert len(Case("padded", 16, 1, 1, 1024, 16).documents) == 16


LAYOUT = {"length": 300, "pattern": "random", "chance": 0.3, "block_size": 32}
PROBLEMS = [
    pytest.param(mask, options, id=f"{mask}-{name}")
    for mask in MASKS
    for name, options in (("plain", {}), ("gqa", {"heads_k": 2}), ("bias", {"bias": True}), ("layout", LAYOUT))
    if not (mask == "packed-cross" and name == "bias")
    and not (mask in ("window", "packed-ids", "packed-cross") and name == "layout")
] + [pytest.param("full", LAYOUT | {"pattern": "bigbird", "chance": None, "heads_k": 2}, id="layout of each head")]


@pytest.mark.parametrize("mask, options", PROBLEMS)
def test_providers_compute_the_same(mask, options):
    inputs = make_inputs(small(mask, **options), CPU)
    for name in ("hf_flashbsa", "sdpa", "math", "eager"):
        with enabled(name):
            out = PROVIDERS[name](inputs)()
            gradients = torch.autograd.grad(out, inputs.leaves, inputs.dout)
        assert reference_error(inputs, out, None) < 1e-5, name
        assert reference_error(inputs, out, gradients) < 1e-5, name
    assert reference_error(inputs, out.roll(1, 2), None) > 0.1
    assert reference_error(inputs, out, (gradients[0], gradients[1].roll(1, 2), gradients[2])) > 0.1


def test_padding_is_unpadded_for_ragged_kernels(monkeypatch):
    """flash-attn's form: `(T, H, D)` without padding, which comes back padded."""
    inputs = make_inputs(small("padded", length=600), CPU)

    class Package:
        @staticmethod
        def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
            assert (max_seqlen_q, max_seqlen_k) == (max(inputs.case.documents),) * 2
            bounds = list(zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True))
            parts = [tuple(x[a:b].transpose(0, 1) for x in (q, k, v)) for a, b in bounds]
            return torch.cat([torch.nn.functional.scaled_dot_product_attention(*p).transpose(0, 1) for p in parts])

    monkeypatch.setattr("importlib.import_module", lambda name: Package)
    out = _flash_package(inputs, module="flash_attn")()
    gradients = torch.autograd.grad(out, inputs.leaves, inputs.dout)
    assert reference_error(inputs, out, None) < 1e-5
    assert reference_error(inputs, out, gradients) < 1e-5


def test_providers_without_layouts_are_given_the_dense_problem(monkeypatch):
    seen = []

    def provider(inputs):
        seen.append(inputs.case)
        return lambda: torch.nn.functional.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)

    monkeypatch.setitem(PROVIDERS, "fa2", provider)
    monkeypatch.setattr(jobs, "enabled", lambda name: contextlib.nullcontext())
    case = small("full", **LAYOUT)
    job = Job("fa2", case, "both")
    measured = measure_job(job, CPU, repeats=2)
    assert seen == [case.dense] and measured["relative_error"] < 1e-5
    assert measured["tflops"] == pytest.approx(case.dense.flops("both") / measured["ms"] / 1e9, abs=1e-3)
    assert job.fields()["dense"] and job.fields()["pattern"] == "random"
    assert "dense" not in Job("hf_flashbsa", case, "both").fields()
    assert "dense" not in Job("fa2", case.dense, "both").fields()


def test_unsupported_says_why():
    inputs = make_inputs(small("causal", dropout_p=0.1), CPU)
    with pytest.raises(Unsupported, match="no_such_package"):
        _flash_package(inputs, module="no_such_package")
    with pytest.raises(Unsupported, match="dropout"):
        PROVIDERS["flex"](inputs)
    with pytest.raises(Unsupported, match="layout"):
        PROVIDERS["flex"](make_inputs(small("padded", **LAYOUT), CPU))
    with enabled("cudnn"), pytest.raises(Unsupported):
        PROVIDERS["cudnn"](inputs)


def test_bench_writes_rows_table_and_plot(tmp_path, capsys):
    rows, image = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    command = (
        "bench --device cpu --passes forward both --masks causal packed --head-dims 16 --lengths 32 --tokens 64 "
        f"--hidden 32 --dtype float32 --repeats 2 --providers sdpa hf_flashbsa fa4 --out {rows} --plot {image} "
        "--commit abc"
    )
    assert __main__.main(command.split()) == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == 2 * 2 * 3
    for row in written:
        assert row["commit"] == "abc" and row["torch"] == torch.__version__
        if row["provider"] == "fa4":
            assert row["ms"] is None and "flash_attn" in row["unsupported"]
        else:
            assert row["p20"] <= row["ms"] <= row["p80"]
            assert row["relative_error"] < 1e-5
    assert image.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "1.00x" in printed and "fa4: flash_attn" in printed
    assert __main__.main(["bench", "--show", str(rows), "--device", "cpu"]) == 0
    assert "1.00x" in capsys.readouterr().out


def test_bench_times_layouts(tmp_path, capsys, jobs_run_here):
    rows = tmp_path / "rows.jsonl"
    command = (
        "bench --device cpu --passes forward --masks causal --head-dims 16 --lengths 256 --tokens 256 --hidden 32 "
        "--patterns dense random longformer --densities 0.5 0.2 --block-size 64 --dtype float32 --repeats 2 "
        f"--providers sdpa hf_flashbsa --out {rows}"
    )
    assert __main__.main(command.split()) == 0
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    layouts = [(row["pattern"], row["chance"], row["block_size"]) for row in written[::2]]
    assert layouts == [(None, None, None), ("random", 0.5, 64), ("random", 0.2, 64), ("longformer", None, 64)]
    assert all(row["relative_error"] < 1e-5 for row in written)
    assert [row["density"] is None for row in written] == [True] * 2 + [False] * 6
    assert "causal random 0.2" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="take another"):
        __main__.main([*command.split(), "--masks", "window"])


def test_preset_times_its_jobs_and_compares_them(tmp_path, monkeypatch, capsys, jobs_run_here):
    case = small("full", dtype="float32")
    ours, other = (Job(name, case, "forward", "wall") for name in ("hf_flashbsa", "sdpa"))
    preset = [
        Comparison("speed", "ms", other, ours),
        Comparison("itself", "ms", ours, ours),
        Comparison("memory", "peak_bytes", ours, other),
    ]
    monkeypatch.setitem(PRESETS, "hopper", lambda: iter(preset))
    path = tmp_path / "rows.jsonl"
    assert __main__.main(f"bench --device cpu --preset hopper --repeats 2 --out {path}".split()) == 0
    assert len(path.read_text().splitlines()) == 2, "a job that several comparisons name is timed once"
    printed = capsys.readouterr().out
    lines = {words[0]: words for words in (line.split() for line in printed.splitlines()) if words}
    ms = {row["provider"]: row["ms"] for row in report.read([path])}
    assert lines["speed"] == ["speed", f"{ms['sdpa'] / ms['hf_flashbsa']:.3f}"]
    assert lines["itself"] == ["itself", "1.000"]
    assert lines["memory"][1:3] == ["not", "measured"]
    assert __main__.main(f"bench --device cpu --preset hopper --show {path}".split()) == 0
    assert "itself" in capsys.readouterr().out
    assert __main__.main(f"bench --device cpu --preset hopper --seconds 0 --out {path}".split()) == 0
    assert "2 of 2 measurements were left out" in capsys.readouterr().out


def test_bench_resumes_where_it_was_stopped(tmp_path, capsys, jobs_run_here):
    path = tmp_path / "rows.jsonl"
    command = (
        "bench --device cpu --passes forward --masks full causal --head-dims 16 --lengths 32 --tokens 64 --hidden 32 "
        f"--dtype float32 --repeats 2 --providers sdpa --out {path} --resume --commit"
    ).split()
    assert __main__.main([*command, "abc"]) == 0
    first = path.read_text().splitlines()
    failed = json.loads(first[1]) | {"ms": None, "tflops": None, "error": "out of memory"}
    path.write_text("\n".join([first[0], json.dumps(failed)]) + "\n")
    capsys.readouterr()
    assert __main__.main([*command, "abc"]) == 0, "what failed is measured once more"
    assert [json.loads(line)["mask"] for line in path.read_text().splitlines()] == ["full", "causal", "causal"]
    printed = capsys.readouterr().out
    assert f"1 of 2 measurements are in {path} already" in printed
    assert " full " in printed and " causal " in printed, "the table has both"
    assert __main__.main([*command, "abc"]) == 0 and len(path.read_text().splitlines()) == 3
    assert __main__.main([*command, "other"]) == 0 and len(path.read_text().splitlines()) == 5
    with pytest.raises(SystemExit, match="commit it"):
        __main__.main([*command, "abc-dirty"])


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_jobs_that_can_be_told_apart(name):
    named = presets.jobs(PRESETS[name]())
    assert len({presets._key(job.fields()) for job in named}) == len(named)
    texts = [comparison.text for comparison in PRESETS[name]()]
    assert len(set(texts)) == len(texts)
    assert all(job.provider in PROVIDERS for job in named)


def test_newest_row_counts(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = {name: 0 for name in report.PROBLEM} | {"provider": "fa2", "mask": "full", "ms": 2.0, "tflops": 1.0}
    report.append(path, row)
    report.append(path, row | {"ms": 1.0})
    report.append(path, row | {"provider": "flex"})
    assert [(r["provider"], r["ms"]) for r in report.read([path])] == [("fa2", 1.0), ("flex", 2.0)]


def test_measured_percentiles_are_ordered():
    x = torch.randn(64, 64)
    for clock in (measure, measure_host, measure_wall):
        timing = clock(lambda: x @ x, CPU, repeats=5)
        assert 0.0 < timing.p20 <= timing.median <= timing.p80


@pytest.fixture
def forked_workers(monkeypatch):
    """Workers of "spawn" take seconds to import the package."""
    forked = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: forked)


def test_jobs_survive_crashes_errors_and_hangs(forked_workers):
    hang = "__import__('time').sleep(600)"
    crash = "__import__('os')._exit(3)"
    results = dict(run_jobs(eval, ["40 + 2", "1 / 0", crash, hang], workers=1, job_seconds=2.0))
    assert results["40 + 2"] == 42
    assert "exit code 3" in results[crash].message
    assert "ZeroDivisionError" in results["1 / 0"].message and "Traceback" in results["1 / 0"].traceback
    assert "no answer" in results[hang].message
    assert all(isinstance(results[job], JobError) for job in (hang, crash, "1 / 0"))


def test_jobs_stop_when_time_is_up(forked_workers):
    assert list(run_jobs(eval, ["1"], workers=1, seconds=0.0)) == []


def test_garbage_does_not_hide_what_is_held(monkeypatch):
    held = {"now": 0, "peak": 0}

    class Buffer:
        """Counts as device memory until the collector finds it."""

        def __init__(self, size: int):
            self.itself, self.size = self, size
            held["now"] += size
            held["peak"] = max(held.values())

        def __del__(self):
            held["now"] -= self.size

    def work() -> None:
        gc.collect()
        Buffer(50)

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held["peak"])
    Buffer(100)
    assert peak_bytes(work, torch.device("cuda")) == 50


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_is_what_is_held_at_once():
    device = torch.device("cuda")
    kept = torch.zeros(1 << 20, device=device)
    assert peak_bytes(lambda: (kept + 1) + 1, device) == 2 * 4 * (1 << 20)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pattern", ["random", "longformer"])
def test_flex_computes_the_same_layout_on_a_gpu(pattern):
    chance = 0.3 if pattern == "random" else None
    case = Case("full", 1, 2, 2, 1024, 64, pattern=pattern, chance=chance, block_size=128)
    for provider in ("flex", "hf_flashbsa"):
        measured = measure_job(Job(provider, case, "both"), torch.device("cuda"), repeats=2)
        assert measured["relative_error"] < 0.02, measured
