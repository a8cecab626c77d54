"""torch's fused CPU kernel for pieces of a call: exact, without scores in memory, and several times as fast.

It is what `torch.nn.functional.scaled_dot_product_attention` runs on a CPU. Called as an op it also returns `lse`,
takes one from outside in its backward pass, and so sinks and calls in several pieces are open to it.
"""

from __future__ import annotations

import torch

from hf_flashbsa.kernels.arguments import TINY_SCALE
from hf_flashbsa.kernels.call_plan import CallPlan
from hf_flashbsa.kernels.torch.pieces import Piece
from hf_flashbsa.kernels.torch.visibility import Term

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def takes(q: torch.Tensor, v: torch.Tensor, plan: CallPlan) -> bool:
    """Whether the kernel computes a call's forward pass, and its backward pass but for gradients of `lse` and bias."""
    scalars = plan.scalars
    return (
        q.device.type == "cpu"
        and q.shape[3] == v.shape[3]
        and scalars.softcap is None
        and scalars.drop_threshold is None
    )


def forward(q, k, v, term: Term, piece: Piece, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` `(n, Hq, m, D)` and `lse` `(n, Hq, m, 1)` of a piece."""
    heads, values, diagonal = q.shape[1], term.values, piece.is_diagonal
    group = heads // k.shape[1]
    if group > 1 and q.shape[2] == 1:
        # One query each of the heads that share keys: as many queries of one head.
        q = q.unflatten(1, (-1, group)).flatten(2, 3)
        if values is not None and values.shape[1] > 1:
            values = values.unflatten(1, (-1, group)).flatten(2, 3)
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    out, lse = _forward(q, k, v, 0.0, diagonal, attn_mask=values, scale=_scale(plan))
    if group > 1 and q.shape[1] < heads:
        out, lse = out.reshape(out.shape[0], heads, 1, -1), lse.reshape(lse.shape[0], heads, 1)
    lse = lse[..., None]
    if term.blind is not None:
        lse = lse.masked_fill(term.blind, float("-inf"))  # the kernel gives 0
    sinks = plan.tensors.sinks
    if sinks is not None:
        total = torch.logaddexp(lse, sinks[:, None, None])
        if term.blind is not None:
            total = total.masked_fill(term.blind, float("-inf"))
        out = out * torch.exp(lse - total).nan_to_num(0.0)  # -inf less -inf where nothing is seen
        lse = total
    return out, lse


def backward(do, q, k, v, lse, out, term: Term, piece: Piece, plan: CallPlan) -> tuple[torch.Tensor, ...]:
    """Gradients of a piece's `q`, `k` and `v`."""
    heads_k = k.shape[1]
    k, v = _per_query_head(k, q), _per_query_head(v, q)
    if term.blind is not None:
        lse = lse.masked_fill(term.blind, 0.0)
    dq, dk, dv = _backward(
        do, q, k, v, out, lse[..., 0], 0.0, piece.is_diagonal, attn_mask=term.values, scale=_scale(plan)
    )
    if k.shape[1] != heads_k:
        dk, dv = (x.unflatten(1, (heads_k, -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _scale(plan: CallPlan) -> float:
    """The kernel hides what is behind the diagonal before it scales, where 0 would give NaN."""
    return plan.scalars.softmax_scale or TINY_SCALE


def _per_query_head(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """`(n, Hkv, l, D)` as `(n, Hq, l, D)`."""
    group = q.shape[1] // k.shape[1]
    return k if group == 1 else k[:, :, None].expand(-1, -1, group, -1, -1).flatten(1, 2)
