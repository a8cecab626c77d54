"""Every shipped launch configuration, compiled for its GPU on a machine that need not have one.

`python tests/kernels/test_aot.py < tests/kernels/compiled.json` does the compiling, in a process of its own: here
Triton may be the interpreter.
"""

from __future__ import annotations

import json
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from aot import SHARED_LIMIT, compile_only, recorded_verdicts, run_compiling

from hf_flashbsa import attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.tuning import Config

KERNELS = ("forward", "dkdv", "dq", "dbias")
ARCHITECTURES = (80, 90)
#: Bytes that a kernel may spill where calls are not plain, aligned and of 16 bits.
SPILLS = 1024


class Problem(NamedTuple):
    """A kind of call that tables make a difference for."""

    head_dim: int
    itemsize: int
    plain: bool
    aligned: bool


def _table(arch: int) -> dict[str, list[dict]]:
    """The entries of each kernel; what else a file says is about its making."""
    return {kernel: tuning._table(f"sm_{arch}")[kernel] for kernel in KERNELS}


def problem_of(arch: int, kernel: str, entry: dict) -> Problem | None:
    """The easiest call that is given this entry; None where other entries come first for all calls."""
    config = Config(*(entry[field] for field in Config._fields))
    for plain, aligned in ((True, True), (False, True), (True, False), (False, False)):
        problem = Problem(entry["head_dim"], entry["itemsize"], plain and kernel != "dbias", aligned)
        if tuning.select(kernel, f"sm_{arch}", *problem) == config:
            return problem
    return None


def run_one(problem: Problem, kernel: str) -> None:
    """Calls `attention` and its backward pass, of whose kernels only one is launched."""
    from hf_flashbsa.kernels.triton import launch

    dtype = torch.bfloat16 if problem.itemsize == 2 else torch.float32
    room = problem.head_dim if problem.aligned else problem.head_dim + 1
    q, k, v, dout = (
        torch.zeros(1, 256, 4, room, dtype=dtype)[..., : problem.head_dim].transpose(1, 2) for _ in range(4)
    )
    rich = {}
    if not problem.plain:
        bias = torch.zeros(1, 4, 256, 256, dtype=dtype).requires_grad_()
        rich = {"bias": bias, "alibi_slopes": torch.zeros(4)}
    others = {f"{name}_kernel": mock.MagicMock() for name in KERNELS if name != kernel}
    with mock.patch.multiple(launch, **others):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, causal=True, backend="triton", dropout_p=0.1, **rich)
        out.backward(dout)


def main() -> None:
    """Prints a JSON line for each entry: architecture, kernel, place in its list, and what the compiler did."""
    verdicts = recorded_verdicts()
    for arch in ARCHITECTURES:
        with mock.patch.object(tuning, "architecture", lambda device, arch=arch: f"sm_{arch}"):
            for kernel, entries in _table(arch).items():
                for place, entry in enumerate(entries):
                    with compile_only(arch, verdicts=verdicts) as compiled:
                        run_one(problem_of(arch, kernel, entry), kernel)
                    (result,) = compiled
                    print(json.dumps({"arch": arch, "kernel": kernel, "place": place, **result._asdict()}), flush=True)


def _fills_wgmma(kernel: str, entry: dict) -> bool:
    """Whether the rows of the first product are as many as wgmma takes: 64 queries, or keys where it is transposed."""
    return entry["block_n" if kernel == "dkdv" else "block_m"] >= 64


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_entry_is_in_use(arch, kernel):
    assert [entry for entry in _table(arch)[kernel] if problem_of(arch, kernel, entry) is None] == []


@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", KERNELS)
def test_narrow_loads_feed_no_wgmma(kernel, head_dim, plain):
    """`triton.load.head_view` says why."""
    config = tuning.select(kernel, "sm_90", head_dim, 2, plain, aligned=False)
    assert not _fills_wgmma(kernel, config._asdict())


def test_every_entry_compiles_well():
    """Within the GPU's shared memory, and without spills of kilobytes, which ptxas makes of tiles that are too large;
    for plain aligned 16-bit calls without any, and on Hopper to wgmma."""
    rows = run_compiling(__file__)
    assert len(rows) == sum(len(entries) for arch in ARCHITECTURES for entries in _table(arch).values())
    wrong = []
    for row in rows:
        arch, kernel = row["arch"], row["kernel"]
        entry = _table(arch)[kernel][row["place"]]
        problem = problem_of(arch, kernel, entry)
        good = problem.plain and problem.aligned and problem.itemsize == 2
        faults = {
            "shared memory": row["shared"] > SHARED_LIMIT[arch],
            "spills": row["spills"] > (0 if good else SPILLS),
            "no wgmma": good and arch == 90 and _fills_wgmma(kernel, entry) and not row["wgmma"] > row["mma"] == 0,
            "operands overwritten": row["overwritten"] > 0,
        }
        if found := [name for name, present in faults.items() if present]:
            wrong.append(f"{', '.join(found)}: {row} of {entry}")
    assert not wrong, "\n".join(wrong)


if __name__ == "__main__":
    main()
