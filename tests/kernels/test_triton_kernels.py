"""The Triton kernels against the oracle: compiled where there is a GPU, interpreted where there is none."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import logging

import pytest
import torch
import triton
import triton.language as tl
from cases import Case, Problem, expected, make_problem, random_case, run, worst_ratio

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.dropout import drop_threshold, keep_mask
from hf_flashbsa.kernels.triton import launch
from hf_flashbsa.kernels.tuning import Config

pytestmark = pytest.mark.usefixtures("nan_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN = float("nan")
PLAIN = Case(
    seed=0, dtype=torch.float32, batch=1, heads=2, heads_k=2, len_q=65, len_k=65, dim=16, dim_v=16, masking="none",
    causal=False, window_size=(None, None), bias=None, sinks=False, softcap=None, dropout_p=0.0, scale=None,
    strides="bhsd", gain=1.0, blocks=None,
)  # fmt: skip


def _few_programs(case: Case) -> Case:
    """With two rows, and two key heads for four query heads, at most: the interpreter runs programs one by one."""
    heads_k = min(case.heads_k, 2)
    heads = heads_k * min(case.heads // case.heads_k, 2)
    return dataclasses.replace(case, batch=min(case.batch, 2), heads=heads, heads_k=heads_k)


RANDOM = [
    _few_programs(random_case(seed, dtypes=DTYPES, max_len=111, dims=(8, 16, 40, 59, 64, 80)))
    for seed in range(60, 108)
]


def _label(case: Case) -> str:
    """The fields that differ from `PLAIN`."""
    names = [f.name for f in dataclasses.fields(Case) if getattr(case, f.name) != getattr(PLAIN, f.name)]
    return (
        "-".join(f"{name}={getattr(case, name)}" for name in names if name != "seed").replace("torch.", "") or "plain"
    )


def cases(*changes: dict):
    return pytest.mark.parametrize("case", [dataclasses.replace(PLAIN, **change) for change in changes], ids=_label)


def assert_like_oracle(case: Case) -> None:
    """The low-precision rule of `worst_ratio`."""
    ratios = worst_ratio(case, DEVICE, "triton")
    assert max(ratios.values()) <= 1.0, ratios


def assert_equals_oracle(problem: Problem, case: Case) -> None:
    """float32 results of one problem, to float32 precision."""
    torch.testing.assert_close(run(problem, case, "triton"), _oracle(problem, case), atol=2e-5, rtol=1e-5)


def _oracle(problem: Problem, case: Case) -> dict[str, torch.Tensor]:
    return {name: value.float() for name, value in expected(problem, case, torch.float64).items()}


@contextlib.contextmanager
def tiles(block_m: int, block_n: int):
    """Within, every kernel runs with these tiles."""
    with contextlib.ExitStack() as stack:
        for kernel in ("forward", "dkdv", "dq", "dbias"):
            stack.enter_context(tuning.override(kernel, Config(block_m, block_n, 4, 1)))
        yield


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs compute in bfloat16 themselves")
def test_interpreter_computes_in_bfloat16():
    @triton.jit
    def kernel(a, b, out, N: tl.constexpr):
        places = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
        product = tl.dot(tl.load(a + places), tl.load(b + places))
        tl.store(out + places, product.to(tl.bfloat16))

    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    a[0, 0] = NAN
    out = torch.empty_like(a)
    kernel[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, (a.float() @ b.float()).bfloat16(), atol=0, rtol=0, equal_nan=True)


@pytest.mark.skipif(DEVICE == "cuda", reason="GPUs believe what they are promised")
@pytest.mark.parametrize(("first", "run", "kept"), [(16, 16, True), (8, 16, False), (16, 32, False)])
def test_interpreter_holds_kernels_to_their_promises(first, run, kept):
    @triton.jit
    def kernel(FIRST: tl.constexpr, RUN: tl.constexpr):
        places = FIRST + tl.arange(0, 16) + tl.arange(0, 32)[:, None] // 16 * 32
        tl.multiple_of(tl.max_contiguous(places, [1, RUN]), [1, RUN])

    with contextlib.nullcontext() if kept else pytest.raises(Exception, match="was promised"):
        kernel[(1,)](first, run)


@pytest.mark.parametrize("case", RANDOM, ids=lambda c: f"{c.seed}-{_label(c)}")
def test_random(case):
    assert_like_oracle(case)


@cases(
    {"len_q": 63, "len_k": 111, "dim": 100, "dim_v": 100},
    {"len_q": 111, "len_k": 63, "causal": True},
    {"len_q": 63, "len_k": 111, "causal": True, "window_size": (7, None)},
    {"len_q": 1, "len_k": 129, "causal": True},
    {"len_q": 1, "len_k": 1},
    {"dim": 1, "dim_v": 1},
    {"dim": 1, "dim_v": 59},
    {"dim": 59, "dim_v": 1},
    {"dim": 256, "dim_v": 256, "len_q": 17, "len_k": 33},
    {"dim": 8, "dim_v": 200, "len_q": 17, "len_k": 33},
    {"heads": 4, "heads_k": 1},
    {"heads": 6, "heads_k": 2, "batch": 2, "len_q": 17},
    {"scale": 0.0},
    {"scale": 1.0, "gain": 3.0},
    {"softcap": 0.5, "gain": 3.0},
    {"sinks": True},
    {"sinks": True, "causal": True, "len_q": 111, "len_k": 63},
    {"window_size": (0, 0)},
    {"window_size": (None, 5)},
    {"window_size": (3, None), "causal": True},
    {"dtype": torch.float16, "dim": 64, "dim_v": 64, "causal": True},
    {"dtype": torch.bfloat16, "dim": 64, "dim_v": 64, "causal": True},
)
def test_shapes_and_options(case):
    assert_like_oracle(case)


@cases(
    {"batch": 3, "bias": (0, 0)},
    {"batch": 3, "bias": (1, 0), "masking": "seqlens"},
    {"batch": 3, "bias": (0, 1), "heads": 4, "masking": "seqlens", "causal": True},
    {"batch": 2, "bias": (1, 1), "softcap": 5.0, "window_size": (9, 4)},
    {"batch": 2, "bias": (0, 1), "masking": "offset_tensor", "causal": True},
    {"batch": 2, "bias": (0, 0), "masking": "mixed", "dropout_p": 0.17},
    # With rows that no sequence has, whose tiles begin anywhere.
    {"seed": 2, "batch": 3, "bias": (0, 1), "masking": "seqlens", "causal": True, "blocks": 64},
)
def test_bias_and_its_gradient(case):
    assert_like_oracle(case)


@pytest.mark.parametrize("hidden", [float("-inf"), torch.finfo(torch.float32).min], ids=["-inf", "lowest"])
def test_bias_hides_keys_and_whole_rows(hidden):
    problem = make_problem(dataclasses.replace(PLAIN, bias=(0, 0)), DEVICE)
    with torch.no_grad():
        problem.options["bias"][..., 5:40] = hidden
        problem.options["bias"][..., 7, :] = hidden
    assert_equals_oracle(problem, PLAIN)
    assert not run(problem, PLAIN, "triton")["out"][:, :, 7].any()


def _packed(lengths_q: list[int], lengths_k: list[int], pack_q: bool, pack_k: bool, **options) -> Problem:
    """Sequences of these lengths, packed or padded; whatever belongs to none of them is NaN, dead `dout` included."""
    g = torch.Generator().manual_seed(0)
    spec = dict(options)

    def side(name: str, lengths: list[int], packed: bool, heads: int, *dims: int) -> list[torch.Tensor]:
        ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
        if packed:
            spec[f"cu_seqlens_{name}"] = ends.int()
        else:
            spec[f"seqlens_{name}"] = torch.tensor(lengths, device=DEVICE)
        shape = (1, heads, sum(lengths) + 9) if packed else (len(lengths), heads, max(lengths) + 2)
        tensors = [torch.full((*shape, dim), NAN, device=DEVICE) for dim in dims]
        for x, (i, length) in itertools.product(tensors, enumerate(lengths)):
            live = x[0, :, ends[i] : ends[i + 1]] if packed else x[i, :, :length]
            live.copy_(torch.randn(live.shape, generator=g))
        return tensors

    q, dout = side("q", lengths_q, pack_q, 2, 16, 8)
    k, v = side("k", lengths_k, pack_k, 1, 16, 8)
    dlse = torch.randn(q.shape[:3], generator=g).to(DEVICE)
    for x in (q, k, v):
        x.requires_grad_()
    return Problem(q, k, v, dout, dlse, AttentionSpec(**spec), {"bias": None, "sinks": None})


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (4, 3)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("pack_q, pack_k", list(itertools.product([True, False], repeat=2)))
def test_sequences_packed_and_padded(pack_q, pack_k, options):
    problem = _packed([5, 0, 67, 20, 1], [0, 7, 67, 11, 70], pack_q, pack_k, **options)
    assert_equals_oracle(problem, dataclasses.replace(PLAIN, dropout_p=0.17))


@pytest.mark.parametrize("shape", [(1, 1, 67, 70), (1, 2, 40, 50)], ids=["whole", "short"])
@pytest.mark.parametrize("pack_q, pack_k", [(True, True), (False, True)])
def test_bias_of_packed_sequences(pack_q, pack_k, shape):
    """It is read by place in the sequence; what it does not reach is hidden."""
    problem = _packed([5, 0, 67, 20], [0, 7, 67, 70], pack_q, pack_k, causal=True)
    problem.options["bias"] = (
        torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE).requires_grad_()
    )
    assert_equals_oracle(problem, PLAIN)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "padded"])
def test_sequences_that_are_all_empty(pack):
    problem = _packed([0, 0], [0, 0], pack, pack)
    results = run(problem, PLAIN, "triton")
    assert (results.pop("lse") == float("-inf")).all()
    assert not any(value.any() for value in results.values())


@cases(*({"masking": masking, "causal": c, "batch": 2} for masking in
         ("none", "seqlens", "key_padding", "segments", "dense", "offset_tensor", "mixed")
         for c in (False, True)))  # fmt: skip
def test_masks(case):
    assert_equals_oracle(make_problem(case, DEVICE), case)


@cases(*({"len_q": 40, "len_k": 50, "batch": 2, "alibi": alibi, **change} for alibi, change in (
    ("rows", {"causal": True, "heads_k": 1}),
    ("heads", {"window_size": (9, 4), "softcap": 5.0, "masking": "offset_tensor"}),
    ("rows", {"bias": (0, 0), "dropout_p": 0.17, "sinks": True}),
    ("heads", {"bias": (0, 1), "softcap": 5.0, "masking": "cu_seqlens", "causal": True}),
    ("rows", {"masking": "cu_seqlens", "dropout_p": 0.17}),
    ("rows", {"masking": "seqlens", "causal": True}),
    ("rows", {"masking": "starts", "scale": 1.0}),
    ("heads", {"masking": "segments"}),
    ("heads", {"masking": "key_padding", "scale": 0.0}),
    ("rows", {"masking": "dense", "blocks": 32}),
)))  # fmt: skip
def test_alibi(case):
    with tiles(32, 32):
        assert_equals_oracle(make_problem(case, DEVICE), case)


def test_no_keys_and_no_queries():
    q, k = torch.randn(2, 2, 5, 16, device=DEVICE), torch.randn(2, 1, 0, 16, device=DEVICE)
    out, lse = attention(q, k, k, return_lse=True, backend="triton")
    assert not out.any() and (lse == float("-inf")).all()
    assert attention(k, q[:, :1], q[:, :1], backend="triton").shape == (2, 1, 0, 16)


@pytest.mark.parametrize("block", [(16, 16), (32, 128), (128, 32)], ids=str)
@cases(
    {"causal": True, "dropout_p": 0.17, "len_q": 50, "len_k": 70},
    {"masking": "segments", "batch": 2, "heads": 1, "heads_k": 1, "window_size": (20, 9), "bias": (1, 0)},
    {"masking": "segments", "batch": 2, "heads": 1, "heads_k": 1, "dropout_p": 0.17},
    {"masking": "seqlens", "batch": 2, "heads": 1, "heads_k": 1, "dropout_p": 0.17},
)
def test_results_do_not_depend_on_tiles(case, block):
    problem = make_problem(case, DEVICE)
    with tiles(*block):
        assert_equals_oracle(problem, case)


@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("origin", [0, 5])
def test_dropout_drops_what_the_definition_says(origin, block_n):
    """Equal scores and values of the unit matrix show each weight of the forward pass; so does dV for the backward."""
    length, p = 70, 0.17
    q = torch.zeros(1, 2, length, 16, device=DEVICE)
    v = torch.eye(length, device=DEVICE).expand(1, 2, -1, -1).contiguous().requires_grad_()
    # A first sequence without queries moves the second one's keys: they are counted from their own first.
    cu_q, cu_k = (torch.tensor([0, n, length], device=DEVICE) for n in (0, origin))
    torch.manual_seed(3)
    seed = torch.randint(torch.iinfo(torch.int64).max, (1,), device=DEVICE)
    torch.manual_seed(3)
    with tiles(64, block_n):
        out = attention(q, q, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, dropout_p=p, backend="triton")
        (dv,) = torch.autograd.grad(out, v, torch.eye(length, device=DEVICE).expand_as(out).contiguous())
    heads, queries = torch.arange(2, device=DEVICE), torch.arange(length, device=DEVICE)
    keep = keep_mask(seed, drop_threshold(p), heads, queries, (0, length - origin))
    assert torch.equal(out[0, :, :, origin:] != 0, keep)
    assert torch.equal(dv[0].mT[:, :, origin:] != 0, keep)


@cases({"causal": True, "bias": (0, 0), "sinks": True, "batch": 2, "dropout_p": 0.1, "heads_k": 1, "len_k": 33})
def test_repeats_are_bitwise_equal(case):
    problem = make_problem(case, DEVICE)
    first = run(problem, case, "triton")
    for _ in range(2 if DEVICE == "cpu" else 100):
        for name, value in run(problem, case, "triton").items():
            assert torch.equal(value, first[name]), name


@pytest.mark.parametrize("gradient", ["sum", "expanded", "last dim strided"])
def test_strides_of_inputs_and_output_gradient(gradient):
    problem = make_problem(PLAIN, DEVICE)
    with torch.no_grad():
        k, v = (x[:, :1].expand(-1, 2, -1, -1).requires_grad_() for x in (problem.k, problem.v))
        shape = problem.dout.shape
        dout = {
            "sum": torch.ones((), device=DEVICE).expand(shape),
            "expanded": problem.dout[:, :, :1].expand(shape),
            "last dim strided": problem.dout.mT.contiguous().mT,
        }[gradient]
    problem = dataclasses.replace(problem, k=k, v=v, dout=dout)
    want = _oracle(problem, PLAIN)
    out = attention(problem.q, k, v, backend="triton")
    lse = attention(problem.q, k, v, backend="triton", return_lse=True)[1]
    got = torch.autograd.grad([out, lse], [problem.q, k, v], [dout, problem.dlse])
    torch.testing.assert_close(got, tuple(want[name] for name in ("dq", "dk", "dv")), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape, stride",
    [((2, 1, 17, 16), (2**31, 0, 16, 1)), ((1, 2, 17, 16), (0, 2**31, 16, 1)), ((1, 1, 66, 16), (0, 0, 2**25, 1))],
    ids=["batch", "head", "row"],
)
def test_offsets_beyond_32_bits(shape, stride):
    """Inputs spread over more than 2^31 elements, most of which are never touched and so cost no memory."""
    size = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    dense = [torch.randn(shape, dtype=torch.float16, device=DEVICE) for _ in range(4)]
    memory = [torch.UntypedStorage(2 * size, device=DEVICE) for _ in dense]
    distant = [x.new_empty(0).set_(m, 0, shape, stride).copy_(x) for x, m in zip(dense, memory, strict=True)]

    def results(q, k, v, dout):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, backend="triton")
        return out, *torch.autograd.grad(out, leaves, dout)

    for got, want in zip(results(*distant), results(*dense), strict=True):
        assert torch.equal(got, want)


def test_narrow_loads_are_told_of_once(caplog, monkeypatch):
    monkeypatch.setattr(launch, "_log_once", functools.cache(launch._log_once.__wrapped__))

    def messages(dim: int, room: int, queries: int = 9) -> list[str]:
        caplog.clear()
        q, k, v = (torch.randn(1, 1, length, dim, device=DEVICE).half() for length in (queries, 9, 9))
        bias = torch.randn(1, 1, queries, room, device=DEVICE)[..., :9]
        with caplog.at_level(logging.INFO, launch.__name__):
            attention(q, k, v, bias=bias, backend="triton")
        return [r.getMessage().partition(":")[0] for r in caplog.records if r.name == launch.__name__]

    assert messages(16, 12) == messages(24, 12) == messages(16, 9, queries=1) == messages(16, 1) == []
    assert messages(20, 12) == ["rows of queries, keys or values do not begin at multiples of 16 bytes"]
    assert messages(16, 9) == ["rows of a bias are not contiguous or do not begin at multiples of 16 bytes"]
    assert messages(20, 9) == []
