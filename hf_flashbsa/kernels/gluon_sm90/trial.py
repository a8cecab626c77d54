"""A trial of the Gluon kernels, for releases of Triton that they were not tested with.

The result is kept beside Triton's compiled kernels: one process for each release and GPU spends the time.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import torch
import triton
from triton import knobs

from hf_flashbsa.kernels.call_plan import NO_TENSORS, CallPlan, CallScalars
from hf_flashbsa.kernels.torch import backend as oracle

#: Shape of a call that configs/gluon_sm90.json lists for each of `HEAD_DIMS`.
BATCH, HEADS, LENGTH = 1, 2, 4096
HEAD_DIMS = (64, 128)
#: Largest error, relative to the largest value, that bfloat16 explains.
LARGEST_ERROR = 2**-6


def failure(device: torch.device) -> str | None:
    """What went wrong in the trial; None if nothing did."""
    file = Path(knobs.cache.dir) / f"hf_flashbsa_trial_{triton.__version__}_{_name(device)}.json"
    if file.exists():
        return json.loads(file.read_text())["failure"]
    found = next(filter(None, (_run(head_dim, device) for head_dim in HEAD_DIMS)), None)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"failure": found}))
    return found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device).replace(" ", "-").replace("/", "-")


def _run(head_dim: int, device: torch.device) -> str | None:
    """Forward and backward of one causal call, compared with the torch back end."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(BATCH, HEADS, LENGTH, head_dim, generator=generator).to(device, torch.bfloat16) for _ in range(4)
    )
    scalars = CallScalars(
        softmax_scale=head_dim**-0.5,
        softcap=None,
        window_left=None,
        window_right=0,
        query_offset=0,
        drop_threshold=None,
        block_size=None,
        deterministic=True,
        backend="triton",
    )
    plan = CallPlan(NO_TENSORS, scalars)
    try:
        tried = importlib.import_module("hf_flashbsa.kernels.triton.backend")  # which imports the dispatch
        got, want = (_results(backend, q, k, v, dout, plan) for backend in (tried, oracle))
    except Exception as error:  # of Triton's compiler or of its runtime: any means that it cannot be used
        return f"{type(error).__name__}: {error}".splitlines()[0]
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        if not (a.float() - b.float()).abs().max() <= LARGEST_ERROR * b.abs().max():
            return f"wrong {name} in a trial at head dim {head_dim}"
    return None


def _results(backend, q, k, v, dout, plan: CallPlan) -> list[torch.Tensor]:
    out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    backend.forward(q, k, v, out, lse, plan)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    backend.backward(dout, None, q, k, v, out, lse, (*gradients, None, None), plan)
    return [out, *gradients]
