"""The tuner: which configurations it tries, finds and writes, not how fast they are."""

import contextlib
import json

import pytest
import torch

from hf_flashbsa import __main__
from hf_flashbsa.bench.measure import Timing
from hf_flashbsa.cli import tune
from hf_flashbsa.cli.tune import KERNELS, VARIANTS, Target
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.tuning import Config

DTYPE = torch.bfloat16


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dim, dtype", [(64, DTYPE), (128, DTYPE), (256, DTYPE), (128, torch.float32)])
def test_candidates_fit(kernel, variant, dim, dtype):
    shared = 232_448
    configs = tune.candidates(Target(kernel, dim, dtype, variant), shared)
    assert len(configs) == len(set(configs)) >= 2
    for config in configs:
        assert 128 % config.block_m == 0 and 128 % config.block_n == 0
        streamed = config.block_m if kernel == "dkdv" else config.block_n
        assert 2 * streamed * config.num_stages * dim * dtype.itemsize <= shared


def _entry(head_dim: int, itemsize: int, config: Config, **more) -> dict:
    return {"head_dim": head_dim, "itemsize": itemsize, **more, **config._asdict()}


#: A configuration file: one entry for each head dim, but for dq, where plain scores at 128 have one of their own.
OLD = {dim: Config(dim // 4, 32, 4, 1) for dim in (64, 128, 256)}
TABLE = {kernel: [_entry(dim, itemsize, OLD[dim]) for itemsize in (2, 4) for dim in OLD] for kernel in KERNELS}
TABLE["dq"].insert(1, _entry(128, 2, Config(128, 128, 8, 3), plain_only=True))


def _everything(table: dict, monkeypatch) -> dict[tuple, Config]:
    """What a configuration file says of each (kernel, head dim, itemsize, plain)."""
    monkeypatch.setattr(tuning, "_table", lambda arch: table)
    tuning._lookup.cache_clear()
    keys = [(k, d, i, p) for k in KERNELS for d in (16, 32, 64, 128, 256) for i in (2, 4) for p in (True, False)]
    found = {(k, d, i, p): tuning.select(k, "sm_90", d, i, p) for k, d, i, p in keys}
    tuning._lookup.cache_clear()
    return found


def test_written_table_selects_what_was_chosen(tmp_path, monkeypatch):
    expected = _everything(TABLE, monkeypatch)
    monkeypatch.setattr(tune, "_table", lambda arch: TABLE)
    small, other = Config(32, 32, 4, 1), Config(64, 128, 8, 2)
    chosen = {
        Target("forward", 64, DTYPE, "plain"): other,
        Target("forward", 32, DTYPE, "rich"): small,
        Target("dq", 128, DTYPE, "plain"): other,
        Target("dq", 128, DTYPE, "rich"): other,
        Target("dbias", 128, DTYPE, "rich"): other,
    }
    path = tmp_path / "sm_90.json"
    tune.write_table(path, tune.merged("sm_90", chosen), {"gpu": "a GPU"})
    written = json.loads(path.read_text())
    assert written["_measured"] == {"gpu": "a GPU"}
    expected["forward", 64, 2, True] = other
    expected["forward", 16, 2, False] = expected["forward", 32, 2, False] = small
    for plain in (True, False):
        expected["dq", 128, 2, plain] = expected["dbias", 128, 2, plain] = other
    assert _everything(written, monkeypatch) == expected
    assert len(written["dq"]) == len(TABLE["dq"]) - 1, "equal entries for plain and rich scores are one"


@pytest.fixture
def fake_tuner(monkeypatch):
    """A tuner whose kernels are a table of times; large tiles compute nonsense."""
    in_use, timed = {}, []

    @contextlib.contextmanager
    def override(kernel, config):
        in_use[kernel] = config
        yield

    def problem(target, setting, options):
        return lambda: (torch.full((4,), 1.0 if in_use[target.kernel].block_m < 128 else float("nan")),)

    def fake_measure(run, device, repeats):
        config = in_use["forward"]
        timed.append(config)
        value = {Config(64, 32, 4, 2): 0.5, Config(64, 64, 4, 2): 0.8}.get(config, 5.0)
        return Timing(value, value, value)

    monkeypatch.setattr(tune.tuning, "override", override)
    monkeypatch.setattr(tune, "problem", problem)
    monkeypatch.setattr(tune, "measure", fake_measure)
    monkeypatch.setattr(tune, "_current", lambda target, arch: Config(64, 64, 4, 2))
    return timed


def test_tuner_finds_the_fastest_right_configuration(fake_tuner, tmp_path, capsys):
    path = tmp_path / "found.json"
    command = f"tune --device cpu --kernels forward --variants plain --head-dims 64 --lengths 64 128 --out {path}"
    assert __main__.main(command.split()) == 0
    (entry, *_) = json.loads(path.read_text())["forward"]
    assert entry["plain_only"] and entry["head_dim"] == 64
    assert (entry["block_m"], entry["block_n"], entry["num_warps"], entry["num_stages"]) == (64, 32, 4, 2)
    printed = capsys.readouterr()
    assert "128x64/4/2 computes something else" in printed.err
    assert "0.625" in printed.out
    assert not any(config.block_m == 128 for config in fake_tuner)
    hopeless = [config for config in fake_tuner if config == Config(64, 128, 4, 2)]
    assert len(hopeless) == 1, "a hopeless candidate is timed once"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuner_on_a_gpu(tmp_path):
    path = tmp_path / "found.json"
    command = (
        "tune --kernels dq --variants rich --head-dims 64 --lengths 128 --tokens 256 --hidden 128 --workers 8 "
        f"--repeats 3 --out {path}"
    )
    assert __main__.main(command.split()) == 0
    assert json.loads(path.read_text())["_measured"]["gpu"] == torch.cuda.get_device_name()
