"""Loads of 16 bytes at once where rows begin at multiples of that, whether Triton sees it by itself or not.

`python tests/kernels/test_wide_loads.py < tests/kernels/compiled.json` does the compiling, in a process of its own:
here Triton may be the interpreter.
"""

from __future__ import annotations

import functools
import json
from collections import defaultdict
from unittest import mock

import pytest
import torch
from aot import compile_only, recorded_verdicts, run_compiling

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.arguments import strided_tensor, tensor_view

LENGTH = 250
ARCHITECTURES = (80, 90)


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def call(head_dim: int = 64, room: int = 0, packed: bool = False) -> None:
    """Calls `attention` and its backward pass, with a bias if its rows are to have `room`."""
    q, k, v, dout = (zeros(1, LENGTH, 4, head_dim).transpose(1, 2) for _ in range(4))
    ends = torch.tensor([0, 100, LENGTH], dtype=torch.int32) if packed else None
    bias = zeros(1, 4, LENGTH, room)[..., :LENGTH] if room else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    spec = AttentionSpec(cu_seqlens_q=ends, cu_seqlens_k=ends)
    attention(*leaves, spec, bias=bias, backend="triton").backward(dout)


CALLS = {
    "rows of 40": functools.partial(call, 40),
    "bias in rows of 256": functools.partial(call, room=256),
    "bias in rows of 264": functools.partial(call, room=264),
    "bias in rows of 251": functools.partial(call, room=251),
    "bias of packed documents": functools.partial(call, room=256, packed=True),
}


def main() -> None:
    """Prints a JSON line for each kernel of each call: architecture, call, and what the compiler did."""
    verdicts = recorded_verdicts()
    for arch in ARCHITECTURES:
        for name, run in CALLS.items():
            with (
                mock.patch.object(tuning, "architecture", lambda device, arch=arch: f"sm_{arch}"),
                compile_only(arch, verdicts=verdicts) as compiled,
            ):
                run()
            for kernel in compiled:
                print(json.dumps({"arch": arch, "call": name, **kernel._asdict()}))


def test_all_that_can_be_wide_is():
    narrow = defaultdict(dict)
    for row in run_compiling(__file__):
        narrow[row["arch"], row["name"]][row["call"]] = row["narrow"]
    kernels = ("forward_kernel", "dq_kernel", "dkdv_kernel")
    for counts in (narrow[arch, kernel] for arch in ARCHITECTURES for kernel in kernels):
        assert counts["rows of 40"] == 0
        # Blocks at the edges load a bias element by element, under masks that know no step.
        edges = counts["bias in rows of 256"]
        assert counts["bias in rows of 264"] == counts["bias of packed documents"] == edges
        assert counts["bias in rows of 251"] > edges


@pytest.mark.parametrize(
    ("room", "wide"), [(64, None), (80, None), (72, 1), (65, None)], ids=["seen", "16s", "8s", "nothing to see"]
)
def test_what_triton_is_told(room, wide):
    """Of what begins at multiples of 16 bytes, only what is no multiple of 16 elements."""
    assert tensor_view(zeros(1, 2, 8, room)[..., :40]).align_hint == wide
    assert strided_tensor(zeros(1, 2, 8, room)[..., :40]).align_hint == wide


def test_nothing_is_promised_of_addresses_and_columns_that_do_not_allow_it():
    room = zeros(1, 2, 8, 72)
    assert tensor_view(room[..., 1:41]).align_hint is None and strided_tensor(room[..., 1:41]).align_hint is None
    assert strided_tensor(room[..., ::2]).align_hint is None


if __name__ == "__main__":
    main()
