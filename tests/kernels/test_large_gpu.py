"""Sizes beyond 32-bit offsets and beyond any context window, on a GPU, against eager attention in float32."""

from __future__ import annotations

import pytest
import torch

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.ops.reference import reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
#: Queries whose scores the reference holds at once.
CHUNK = 4096


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def drawn(*shape: int, seed: int) -> torch.Tensor:
    """bfloat16 `(batch, length, heads, dim)` as `(batch, heads, length, dim)`."""
    g = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=g).transpose(1, 2)


def in_chunks(q, k, v, dout, dtype: torch.dtype) -> list[torch.Tensor]:
    """`out, dq, dk, dv` of causal eager attention computed in `dtype`, the queries chunk by chunk."""
    k, v = (x.detach().to(dtype).requires_grad_() for x in (k, v))
    outs, dqs, dk, dv = [], [], torch.zeros_like(k), torch.zeros_like(v)
    for begin in range(0, q.shape[2], CHUNK):
        end = begin + CHUNK
        rows = q[:, :, begin:end].detach().to(dtype).requires_grad_()
        seen_k, seen_v = k[:, :, :end], v[:, :, :end]
        out, _ = reference_attention(rows, seen_k, seen_v, AttentionSpec(causal=True), dtype=dtype)
        dq, part_k, part_v = torch.autograd.grad(out, (rows, k, v), dout[:, :, begin:end].to(dtype))
        outs.append(out.detach())
        dqs.append(dq)
        dk += part_k
        dv += part_v
    return [torch.cat(outs, 2), torch.cat(dqs, 2), dk, dv]


def relative_errors(got: list[torch.Tensor], want: list[torch.Tensor]) -> list[float]:
    """In norm: single elements of sums over 131,072 terms have no yardstick in a low precision."""
    return [((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(got, want, strict=True)]


@pytest.mark.parametrize(("head_dim", "deterministic"), [(64, True), (64, False), (128, True)])
def test_a_sequence_of_131072_tokens(head_dim, deterministic):
    q, k, v, dout = (drawn(1, 131072, 1, head_dim, seed=seed) for seed in range(4))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, causal=True, deterministic=deterministic)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    want = in_chunks(q, k, v, dout, torch.float32)
    native = in_chunks(q, k, v, dout, torch.bfloat16)
    bounds = [factor * error for factor, error in zip((2, 3, 3, 3), relative_errors(native, want), strict=True)]
    errors = relative_errors(got, want)
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True)), (errors, bounds)


@pytest.mark.parametrize(
    ("head_dim", "batch", "length", "deterministic"),
    [(64, 8200, 512, True), (64, 2050, 2048, False), (128, 8200, 512, True)],
)
def test_tensors_of_more_than_2_to_the_31_elements(head_dim, batch, length, deterministic):
    heads = 512 // head_dim
    q, k, v, dout = (drawn(batch, length, heads, head_dim, seed=seed) for seed in range(4))
    assert q.numel() > 2**31
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, causal=True, deterministic=deterministic)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dout)]
    for row in (0, batch // 2, batch - 1):
        mine = [x[row : row + 1] for x in got]
        tensors = [x[row : row + 1] for x in (q, k, v, dout)]
        want, native = (in_chunks(*tensors, dtype) for dtype in (torch.float32, torch.bfloat16))
        for a, exact, eager, factor in zip(mine, want, native, (2, 3, 3, 3), strict=True):
            assert (a - exact).abs().max() <= factor * (eager - exact).abs().max() + 1e-5
