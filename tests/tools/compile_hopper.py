"""Compiles the Hopper kernels for each kind of call, on a machine that need not have a GPU.

PYTHONPATH=. python tests/tools/compile_hopper.py HEAD_DIM [KIND ...] < tests/kernels/compiled.json
"""

from __future__ import annotations

import json
import sys

import torch
from aot import compile_only, recorded_verdicts

from hf_flashbsa import BlockLayout, attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.gluon_sm90 import dispatch

KERNELS = ("forward", "dq", "dkdv")
#: Kinds of calls that compile to code of their own. `length` is 4096 where they do not say.
CALLS = {
    "plain": {},
    "short": {"causal": True, "length": 512},
    "window": {"window_size": (1000, 1100), "sinks": True},
    "dropout": {"causal": True, "dropout_p": 0.1},
    "packed": {},
    "padded": {"causal": True},
    "documents": {"causal": True},
    "grouped": {"causal": True},
    "layout": {"length": 512},
    "layout-partial": {"causal": True},
    "layout-packed": {"causal": True, "dropout_p": 0.1},
    "fused": {"causal": True, "deterministic": False},
    "fused-dropout": {"causal": True, "dropout_p": 0.1, "deterministic": False},
    "fused-grouped": {"causal": True, "deterministic": False},
}


def kernels_of(kind: str) -> tuple[str, ...]:
    """What a call of a kind launches."""
    return ("forward", "bwd_preprocess", "dkdv", "bwd_postprocess") if "fused" in kind else KERNELS


def kinds_for(head_dim: int) -> list[str]:
    """Kinds of calls that compile to code of their own at a head dim."""
    return [kind for kind in CALLS if head_dim == 64 or "fused" not in kind]


def call(kind: str, head_dim: int) -> None:
    """Calls `attention` and its backward pass, with `kind` of `CALLS`."""
    heads_k = 2 if "grouped" in kind or kind == "layout-packed" else 4
    options = dict(CALLS[kind])
    length = options.pop("length", 4096)
    q, dout = (torch.zeros(1, length, 4, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    k, v = (torch.zeros(1, length, heads_k, head_dim, dtype=torch.bfloat16).transpose(1, 2) for _ in range(2))
    if "sinks" in options:
        options["sinks"] = torch.zeros(4)
    if "packed" in kind:
        cu_seqlens = torch.tensor([0, 700, length], dtype=torch.int32)
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    if kind == "padded":
        options["segment_ids_k"] = torch.zeros(1, length, dtype=torch.int32)
    if kind == "documents":
        options |= {f"segment_ids_{side}": torch.arange(length, dtype=torch.int32)[None] // 400 for side in "qk"}
    if "layout" in kind:
        masks = None if kind == "layout" else torch.ones(1, 128, 128, dtype=torch.bool)
        grid = torch.ones(1, 1, length // 128, length // 128, dtype=torch.int32)
        options["layout"] = BlockLayout(grid, 128, masks)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    attention(*leaves, backend="triton", **options).backward(dout)


def main(head_dim: int, kinds: list[str]) -> None:
    """Prints a JSON line for each kernel of each kind of call, what the compiler did and the `reached` options that
    configs/gluon_sm90.json had for the call."""
    tuning.architecture = lambda device: "sm_90"
    tuning.is_hopper = lambda device: True
    verdicts, options_of, reached = recorded_verdicts(), dispatch._options, []

    def noted(kernel: str, *arguments) -> dict | None:
        options = options_of(kernel, *arguments)
        reached.append((kernel, options))
        return options

    dispatch._options = noted
    for kind in kinds or kinds_for(head_dim):
        reached.clear()
        with compile_only(90, dispatch.__package__, verdicts) as compiled:
            call(kind, head_dim)
        for result in compiled:
            print(json.dumps({"kind": kind, **result._asdict(), "reached": reached}), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
