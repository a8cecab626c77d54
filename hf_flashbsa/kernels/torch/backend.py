"""The CPU back end: torch operations, tiled so that no `(Sq, Sk)` matrix of a long sequence is kept.

Computes in float32 (float64 for float64 inputs), one sequence at a time where lengths are ragged, a whole batch at
once where they are not, and recomputes the weights in the backward pass from `lse` as the Triton kernels do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from hf_flashbsa.kernels.backends import note_forward
from hf_flashbsa.kernels.call_plan import CallPlan, sinks_gradient, sinks_weight
from hf_flashbsa.kernels.dropout import keep_mask, keep_scale

#: Most scores held at once.
MAX_SCORES = 1 << 25


class Piece(NamedTuple):
    """Query rows and the keys they may see: slices of the batch and length dimensions."""

    rows_q: slice
    q: slice
    rows_k: slice
    k: slice
    query_offset: int
    query_origin: int
    key_origin: int


def _pieces(q: torch.Tensor, k: torch.Tensor, plan: CallPlan) -> Iterator[Piece]:
    (batch, heads, len_q, _), (batch_k, _, len_k, _) = q.shape, k.shape
    if plan.tensors.schedule_q is None:
        whole = [(slice(0, batch), 0, len_q, slice(0, batch_k), 0, len_k, plan.scalars.query_offset, 0, 0)]
    else:
        whole = [
            (slice(row, row + 1), begin, end, slice(other, other + 1), lo, hi, query_offset, *origins)
            for row, begin, end, other, lo, _, _, hi, query_offset, *origins, _ in plan.tensors.schedule_q.tolist()
            if begin < end
        ]
    for rows_q, begin, end, rows_k, lo, hi, query_offset, *origins in whole:
        count = rows_q.stop - rows_q.start
        step = max(1, MAX_SCORES // max(1, count * heads * (hi - lo)))
        for first in range(begin, end, step):
            yield Piece(rows_q, slice(first, min(first + step, end)), rows_k, slice(lo, hi), query_offset, *origins)


def _keys_ahead(piece: Piece, device: torch.device) -> torch.Tensor:
    """int64 `(m, n)`: by how many positions each key stands behind (> 0) each query."""
    keys = torch.arange(piece.k.start, piece.k.stop, device=device)
    return keys - torch.arange(piece.q.start, piece.q.stop, device=device)[:, None] - piece.query_offset


def _visible(piece: Piece, plan: CallPlan, device: torch.device) -> torch.Tensor | None:
    """bool, broadcastable to the piece's scores; None where all are visible."""
    conditions = []
    ahead = _keys_ahead(piece, device)
    if plan.scalars.window_left is not None:
        conditions.append(ahead >= -plan.scalars.window_left)
    if plan.scalars.window_right is not None:
        conditions.append(ahead <= plan.scalars.window_right)
    if plan.tensors.segment_ids_k is not None:
        ids_k = plan.tensors.segment_ids_k[piece.rows_k, None, None, piece.k]
        ids_q = (
            0 if plan.tensors.segment_ids_q is None else plan.tensors.segment_ids_q[piece.rows_q, None, piece.q, None]
        )
        conditions.append((ids_k == ids_q) & (ids_k >= 0))
    if plan.tensors.mask is not None:
        conditions.append(plan.tensors.mask[piece.rows_q, :, piece.q, piece.k])
    if plan.tensors.block_grid is not None:
        conditions.append(_visited(piece, plan))
    visible = None
    for condition in conditions:
        visible = condition if visible is None else visible & condition
    return visible


def _visited(piece: Piece, plan: CallPlan) -> torch.Tensor:
    """bool `(B or 1, H or 1, m, n)`: entries that a layout shows."""
    size = plan.scalars.block_size
    grid = plan.tensors.block_grid[piece.rows_q] if plan.tensors.block_grid.shape[0] > 1 else plan.tensors.block_grid
    places, inner = [], []
    for part, origin in ((piece.q, piece.query_origin), (piece.k, piece.key_origin)):
        place = torch.arange(part.start - origin, part.stop - origin, device=grid.device)
        places.append(place // size)
        inner.append(place % size)
    kind = grid[:, :, places[0][:, None], places[1]]
    visible = kind == 1
    if plan.tensors.block_masks is not None:
        words = plan.tensors.block_masks[(kind - 2).clamp(min=0), inner[0][:, None], inner[1] // 32]
        visible |= (kind >= 2) & (words >> (inner[1] % 32) & 1).bool()
    return visible


def _bias_piece(bias: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of the bias for a piece, by place in the sequence, as far as it reaches."""
    rows = piece.rows_q if bias.shape[0] > 1 else slice(None)
    q, k = (
        slice(part.start - origin, part.stop - origin)
        for part, origin in ((piece.q, piece.query_origin), (piece.k, piece.key_origin))
    )
    return bias[rows, :, q, k]


def _grouped(x: torch.Tensor, heads_k: int) -> torch.Tensor:
    """`(B, Hq, S, D)` as `(B, Hkv, group, S, D)`."""
    return x.unflatten(1, (heads_k, -1))


def _scores(q, k, piece: Piece, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of a piece `(B, Hq, m, n)`, -inf where hidden, and the derivative of the softcap (None without)."""
    s = (_grouped(q * plan.scalars.softmax_scale, k.shape[1]) @ k[:, :, None].mT).flatten(1, 2)
    slope = None
    if plan.scalars.softcap is not None:
        t = torch.tanh(s / plan.scalars.softcap)
        s, slope = plan.scalars.softcap * t, 1.0 - t * t
    if plan.tensors.bias is not None:
        bias = _bias_piece(plan.tensors.bias, piece)
        missing = (0, s.shape[3] - bias.shape[3], 0, s.shape[2] - bias.shape[2])
        bias = torch.nn.functional.pad(bias, missing, value=float("-inf"))
        hidden = bias <= torch.finfo(bias.dtype).min
        s = (s + bias.to(s.dtype)).masked_fill(hidden, float("-inf"))
    slopes = plan.tensors.alibi_slopes
    if slopes is not None:
        slopes = slopes[piece.rows_q] if slopes.shape[0] > 1 else slopes
        s = s - slopes.to(s.dtype)[:, :, None, None] * _keys_ahead(piece, q.device).abs()
    visible = _visible(piece, plan, q.device)
    if visible is not None:
        s = s.masked_fill(~visible, float("-inf"))
    return s, slope


def _dropout_factors(piece: Piece, heads: int, plan: CallPlan) -> torch.Tensor | None:
    """Dropout factors `(B, Hq, m, n)`: 0 or 1 / keep probability."""
    if plan.scalars.drop_threshold is None:
        return None
    device = plan.tensors.seed.device
    batch_head = torch.arange(piece.rows_q.start, piece.rows_q.stop, device=device)[:, None] * heads
    batch_head = batch_head + torch.arange(heads, device=device)
    queries = torch.arange(piece.q.start, piece.q.stop, device=device)
    keys = (piece.k.start - piece.key_origin, piece.k.stop - piece.key_origin)
    keep = keep_mask(plan.tensors.seed, plan.scalars.drop_threshold, batch_head, queries, keys)
    return keep * keep_scale(plan.scalars.drop_threshold)


def _softmax(s: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and log-sum-exp of scores `(B, Hq, m, n)`; 0 and -inf for rows that see no key, even with sinks."""
    top = s.amax(-1, keepdim=True)
    blind = top == float("-inf")
    top = top.masked_fill(blind, 0.0)
    p = torch.exp(s - top)
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - top)
    p = p / total.masked_fill(blind, 1.0)
    return p, (torch.log(total) + top).masked_fill(blind, float("-inf"))[..., 0]


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def forward(q, k, v, out, lse, plan: CallPlan) -> None:
    """Fills `out` and `lse`."""
    note_forward("torch")
    dtype = _compute_dtype(q)
    for piece in _pieces(q, k, plan):
        if piece.k.start == piece.k.stop:
            out[piece.rows_q, :, piece.q] = 0.0
            lse[piece.rows_q, :, piece.q] = float("-inf")
            continue
        q_, k_, v_ = q[piece.rows_q, :, piece.q], k[piece.rows_k, :, piece.k], v[piece.rows_k, :, piece.k]
        q_, k_, v_ = q_.to(dtype), k_.to(dtype), v_.to(dtype)
        s, _ = _scores(q_, k_, piece, plan)
        p, total = _softmax(s, plan.tensors.sinks)
        keep = _dropout_factors(piece, q.shape[1], plan)
        if keep is not None:
            p = p * keep
        o = _grouped(p, k.shape[1]) @ v_[:, :, None]
        out[piece.rows_q, :, piece.q] = o.flatten(1, 2).to(out.dtype)
        lse[piece.rows_q, :, piece.q] = total


def backward(dout, dlse, q, k, v, out, lse, gradients, plan: CallPlan) -> None:
    """Fills `gradients`: dq, dk, dv, dbias, dsinks; dbias may be None."""
    dtype = _compute_dtype(q)
    dq, dk, dv, dbias, dsinks = gradients
    heads_k = k.shape[1]
    dk_sum = torch.zeros(k.shape, dtype=dtype, device=k.device)
    dv_sum = torch.zeros(v.shape, dtype=dtype, device=k.device)
    dbias_sum = None if dbias is None else torch.zeros(dbias.shape, dtype=dtype, device=k.device)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    if dlse is not None:
        delta = delta - dlse
    for piece in _pieces(q, k, plan):
        if piece.k.start == piece.k.stop:
            dq[piece.rows_q, :, piece.q] = 0.0
            continue
        q_, k_, v_ = q[piece.rows_q, :, piece.q], k[piece.rows_k, :, piece.k], v[piece.rows_k, :, piece.k]
        q_, k_, v_ = q_.to(dtype), k_.to(dtype), v_.to(dtype)
        do = dout[piece.rows_q, :, piece.q].to(dtype)
        s, slope = _scores(q_, k_, piece, plan)
        total = lse[piece.rows_q, :, piece.q]
        p = torch.exp(s - total.masked_fill(total == float("-inf"), 0.0)[..., None])
        dp = (_grouped(do, heads_k) @ v_[:, :, None].mT).flatten(1, 2)
        keep = _dropout_factors(piece, q.shape[1], plan)
        p_dropped = p
        if keep is not None:
            p_dropped, dp = p * keep, dp * keep
        dv_sum[piece.rows_k, :, piece.k] += (_grouped(p_dropped, heads_k).mT @ _grouped(do, heads_k)).sum(2)
        ds = p * (dp - delta[piece.rows_q, :, piece.q, None])
        if dbias is not None:
            part = _bias_piece(dbias_sum, piece)
            reached = ds[:, :, : part.shape[2], : part.shape[3]]
            part += reached.sum_to_size(part.shape)
        if slope is not None:
            ds = ds * slope
        ds = ds * plan.scalars.softmax_scale
        dq[piece.rows_q, :, piece.q] = (_grouped(ds, heads_k) @ k_[:, :, None]).flatten(1, 2).to(dq.dtype)
        dk_sum[piece.rows_k, :, piece.k] += (_grouped(ds, heads_k).mT @ _grouped(q_, heads_k)).sum(2)
    dk.copy_(dk_sum)
    dv.copy_(dv_sum)
    if dbias is not None:
        dbias.copy_(dbias_sum)
    if plan.tensors.sinks is not None:
        dsinks.copy_(sinks_gradient(plan.tensors.sinks, lse, delta))


def jvp(tangents, q, k, v, lse, out_t, lse_t, plan: CallPlan) -> None:
    """Fills the tangents `out_t` and `lse_t` of the outputs, from those of q, k, v, bias and sinks (None for 0).

    With scores `s` and weights `p = exp(s - lse)`: `lse_t = sum(p * s_t) + p_sink * sinks_t` and
    `out_t = (p * (s_t - lse_t)) @ v + p @ v_t`, weights dropped as in `forward`.
    """
    dtype = _compute_dtype(q)
    q_t, k_t, v_t, bias_t, sinks_t = (None if x is None else x.to(dtype) for x in tangents)
    out_t.zero_()
    lse_t.zero_()
    if sinks_t is not None:
        lse_t += sinks_weight(plan.tensors.sinks, lse) * sinks_t[:, None]
    for piece in _pieces(q, k, plan):
        if piece.k.start == piece.k.stop:
            continue
        q_, k_, v_ = q[piece.rows_q, :, piece.q], k[piece.rows_k, :, piece.k], v[piece.rows_k, :, piece.k]
        q_, k_, v_ = q_.to(dtype), k_.to(dtype), v_.to(dtype)
        s, slope = _scores(q_, k_, piece, plan)
        total = lse[piece.rows_q, :, piece.q]
        p = torch.exp(s - total.masked_fill(total == float("-inf"), 0.0)[..., None])
        s_t = torch.zeros_like(p)
        if q_t is not None:
            s_t += _products(q_t[piece.rows_q, :, piece.q], k_)
        if k_t is not None:
            s_t += _products(q_, k_t[piece.rows_k, :, piece.k])
        s_t *= plan.scalars.softmax_scale
        if slope is not None:
            s_t *= slope
        if bias_t is not None:
            part = _bias_piece(bias_t, piece)
            s_t[:, :, : part.shape[2], : part.shape[3]] += part
        lse_t[piece.rows_q, :, piece.q] += (p * s_t).sum(-1)
        s_t -= lse_t[piece.rows_q, :, piece.q, None]
        keep = _dropout_factors(piece, q.shape[1], plan)
        if keep is not None:
            p = p * keep
        o_t = _grouped(p * s_t, k.shape[1]) @ v_[:, :, None]
        if v_t is not None:
            o_t = o_t + _grouped(p, k.shape[1]) @ v_t[piece.rows_k, :, piece.k][:, :, None]
        out_t[piece.rows_q, :, piece.q] = o_t.flatten(1, 2).to(out_t.dtype)


def _products(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """`q @ k.T` of grouped heads, `(B, Hq, m, n)`."""
    return (_grouped(q, k.shape[1]) @ k[:, :, None].mT).flatten(1, 2)
