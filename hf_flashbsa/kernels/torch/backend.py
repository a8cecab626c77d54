"""The CPU back end: torch operations, tiled so that no `(Sq, Sk)` matrix of a long sequence is kept.

Computes in float32 (float64 for float64 inputs), piece by piece (pieces.py), and recomputes the weights in the
backward pass from `lse` as the Triton kernels do. What torch's fused CPU kernel computes is left to it (fused.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from hf_flashbsa.kernels.backends import note_forward
from hf_flashbsa.kernels.call_plan import CallPlan, sinks_gradient, sinks_weight
from hf_flashbsa.kernels.dropout import keep_mask, keep_scale
from hf_flashbsa.kernels.torch import fused
from hf_flashbsa.kernels.torch.parts import Source, Target
from hf_flashbsa.kernels.torch.pieces import Piece, pieces_of
from hf_flashbsa.kernels.torch.visibility import MAX_CACHED, NO_TERM, Term, bias_part, term_of


def _full_precision(q: torch.Tensor) -> contextlib.AbstractContextManager:
    """Products in the precision of their factors, which autocast would round."""
    device = q.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext()


def _compute_dtype(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


class _Pieces:
    """The pieces of a call, each with its term, and tensors to read and write by them."""

    def __init__(self, q: torch.Tensor, k: torch.Tensor, plan: CallPlan, by_fused: bool):
        self._plan, self._device, self._dtype, self._fused = plan, q.device, _compute_dtype(q), by_fused
        self._cache = {} if plan.cache is None else plan.cache
        key = "fused" if by_fused else "scores"
        if key not in self._cache:
            pieces = pieces_of(q, k, plan, with_scores=not by_fused)
            self._cache[key] = pieces, len(pieces) == 1 and pieces[0].is_all_of(q, k)
        self._pieces, self._whole = self._cache[key]

    def __iter__(self) -> Iterator[tuple[Piece, Term]]:
        for i, piece in enumerate(self._pieces):
            term = NO_TERM if self._fused and piece.is_diagonal else self._cache.get((i, self._fused))
            if term is None:
                term = term_of(piece, self._plan, self._device, self._dtype)
                tensors = self._plan.tensors
                own = any(x is not None for x in (tensors.mask, tensors.bias, tensors.alibi_slopes))
                # What callers may write to behind our back is read each time.
                if not own and (term.values is None or term.values.numel() <= MAX_CACHED):
                    self._cache[i, self._fused] = term
            yield piece, term

    def source(self, x: torch.Tensor) -> Source:
        return Source(x, self._dtype, self._whole)

    def target(self, x: torch.Tensor, fill: float = 0.0) -> Target:
        return Target(x, self._dtype, self._whole, fill)


def forward(q, k, v, out, lse, plan: CallPlan) -> None:
    """Fills `out` and `lse`."""
    note_forward("torch")
    with _full_precision(q):
        by_fused = fused.takes(q, v, plan)
        pieces = _Pieces(q, k, plan, by_fused)
        compute = fused.forward if by_fused else _forward
        q, k, v = map(pieces.source, (q, k, v))
        to_out, to_lse = pieces.target(out), pieces.target(lse[..., None], fill=float("-inf"))
        for piece, term in pieces:
            o, total = compute(q.take(piece.q), k.take(piece.k), v.take(piece.k), term, piece, plan)
            to_out.put(piece.q, o)
            to_lse.put(piece.q, total)
        to_out.finish()
        to_lse.finish()


def backward(dout, dlse, q, k, v, out, lse, gradients, plan: CallPlan) -> None:
    """Fills `gradients`: dq, dk, dv, dbias, dsinks; dbias may be None."""
    with _full_precision(q):
        dq, dk, dv, dbias, dsinks = gradients
        by_fused = fused.takes(q, v, plan) and dlse is None and dbias is None
        pieces = _Pieces(q, k, plan, by_fused)
        dtype = _compute_dtype(q)
        delta = None
        if not by_fused or dsinks is not None:
            delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
            delta = delta if dlse is None else delta - dlse
        dbias_sum = None if dbias is None else torch.zeros(dbias.shape, dtype=dtype, device=k.device)
        read = [*map(pieces.source, (dout, q, k, v, lse[..., None], out if by_fused else delta[..., None]))]
        to_dq, to_dk, to_dv = map(pieces.target, (dq, dk, dv))
        for piece, term in pieces:
            places = piece.q, piece.q, piece.k, piece.k, piece.q, piece.q
            do, *parts, last = (x.take(place) for x, place in zip(read, places, strict=True))
            if piece.q.live is not None:  # queries that stand in for none have no gradient
                do, last = (x.masked_fill(~piece.q.live[:, None, :, None], 0.0) for x in (do, last))
            if by_fused:
                dq_, dk_, dv_ = fused.backward(do, *parts, last, term, piece, plan)
            else:
                dq_, dk_, dv_ = _backward(do, *parts, last, term, piece, plan, dbias_sum)
            to_dq.put(piece.q, dq_)
            to_dk.add(piece.k, dk_)
            to_dv.add(piece.k, dv_)
        for target in (to_dq, to_dk, to_dv):
            target.finish()
        if dbias is not None:
            dbias.copy_(dbias_sum)
        if dsinks is not None:
            dsinks.copy_(sinks_gradient(plan.tensors.sinks, lse, delta))


# Pieces with their scores


def _forward(q, k, v, term: Term, piece: Piece, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` `(n, Hq, m, Dv)` and `lse` `(n, Hq, m, 1)` of a piece."""
    s, _ = _scores(q, k, term, plan)
    p, total = _softmax(s, plan.tensors.sinks)
    p = _dropped(p, _dropout_factors(piece, q.shape[1], plan))
    return _products(p, v), total


def _backward(
    do, q, k, v, lse, delta, term: Term, piece: Piece, plan: CallPlan, dbias: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Gradients of a piece's `q`, `k` and `v`; that of its bias is added to `dbias`."""
    heads_k = k.shape[1]
    p, slope = _weights(q, k, lse, term, plan)
    dp = _products(do, v.mT)
    keep = _dropout_factors(piece, q.shape[1], plan)
    dv = _folded(_dropped(p, keep), heads_k).mT @ _folded(do, heads_k)
    ds = _dropped(dp, keep).sub_(delta).mul_(p)
    if dbias is not None:
        part = bias_part(dbias, piece)
        reached = ds[:, :, : part.shape[2], : part.shape[3]]
        part += reached.sum_to_size(part.shape)
    if slope is not None:
        ds.mul_(slope)
    ds.mul_(plan.scalars.softmax_scale)
    return _products(ds, k), _folded(ds, heads_k).mT @ _folded(q, heads_k), dv


def _folded(x: torch.Tensor, heads_k: int) -> torch.Tensor:
    """`(n, Hq, m, D)` as `(n, Hkv, group * m, D)`: the rows of the heads that share keys one behind the other."""
    return x if x.shape[1] == heads_k else x.unflatten(1, (heads_k, -1)).flatten(2, 3)


def _products(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x @ y` `(n, Hq, m, l)` of `(n, Hq, m, D)` and `(n, Hkv, D, l)`."""
    heads, heads_k = x.shape[1], y.shape[1]
    product = _folded(x, heads_k) @ y
    return product if heads == heads_k else product.unflatten(2, (-1, x.shape[2])).flatten(1, 2)


def _scores(q, k, term: Term, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores `(n, Hq, m, l)`, -inf where hidden, and the derivative of the softcap (None without)."""
    s = _products(q * plan.scalars.softmax_scale, k.mT)
    slope = None
    if plan.scalars.softcap is not None:
        t = torch.tanh(s / plan.scalars.softcap)
        s, slope = plan.scalars.softcap * t, 1.0 - t * t
    return s if term.values is None else s.add_(term.values), slope


def _weights(q, k, lse, term: Term, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Softmax weights `(n, Hq, m, l)`, given `lse` `(n, Hq, m, 1)`, and the derivative of the softcap."""
    s, slope = _scores(q, k, term, plan)
    return s.sub_(lse.masked_fill(lse == float("-inf"), 0.0)).exp_(), slope


def _dropout_factors(piece: Piece, heads: int, plan: CallPlan) -> torch.Tensor | None:
    """Dropout factors `(n, Hq, m, l)`: 0 or 1 / keep probability."""
    if plan.scalars.drop_threshold is None:
        return None
    device = plan.tensors.seed.device
    rows = piece.q.rows
    rows = torch.arange(rows.start, rows.stop, device=device) if isinstance(rows, slice) else rows
    batch_head = rows[:, None] * heads + torch.arange(heads, device=device)
    queries = piece.q.positions(device)
    queries = queries if queries.ndim == 1 else queries[:, None]
    keys = piece.key_start, piece.key_start + piece.k.length
    keep = keep_mask(plan.tensors.seed, plan.scalars.drop_threshold, batch_head, queries, keys)
    return keep * keep_scale(plan.scalars.drop_threshold)


def _dropped(p: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    return p if keep is None else p * keep


def _softmax(s: torch.Tensor, sinks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, in place of the scores `(n, Hq, m, l)`, and log-sum-exp `(n, Hq, m, 1)`; 0 and -inf for rows that see
    no key, even with sinks."""
    top = s.amax(-1, keepdim=True)
    blind = top == float("-inf")
    top = top.masked_fill(blind, 0.0)
    p = s.sub_(top).exp_()
    total = p.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - top)
    p.div_(total.masked_fill(blind, 1.0))
    return p, (torch.log(total) + top).masked_fill(blind, float("-inf"))


# Forward mode


def jvp(tangents, q, k, v, lse, out_t, lse_t, plan: CallPlan) -> None:
    """Fills the tangents `out_t` and `lse_t` of the outputs, from those of q, k, v, bias and sinks (None for 0).

    With scores `s` and weights `p = exp(s - lse)`: `lse_t = sum(p * s_t) + p_sink * sinks_t` and
    `out_t = (p * (s_t - lse_t)) @ v + p @ v_t`, weights dropped as in `forward`.
    """
    with _full_precision(q):
        q_t, k_t, v_t, bias_t, sinks_t = tangents
        pieces = _Pieces(q, k, plan, by_fused=False)
        of_sinks = torch.zeros_like(lse)
        if sinks_t is not None:
            of_sinks += sinks_weight(plan.tensors.sinks, lse) * sinks_t[:, None]
        q, k, v, lse, of_sinks = map(pieces.source, (q, k, v, lse[..., None], of_sinks[..., None]))
        q_t, k_t, v_t = (None if x is None else pieces.source(x) for x in (q_t, k_t, v_t))
        to_out, to_lse = pieces.target(out_t), pieces.target(lse_t[..., None])
        for piece, term in pieces:
            q_, k_, v_ = q.take(piece.q), k.take(piece.k), v.take(piece.k)
            p, slope = _weights(q_, k_, lse.take(piece.q), term, plan)
            s_t = torch.zeros_like(p)
            if q_t is not None:
                s_t += _products(q_t.take(piece.q), k_.mT)
            if k_t is not None:
                s_t += _products(q_, k_t.take(piece.k).mT)
            s_t *= plan.scalars.softmax_scale
            if slope is not None:
                s_t *= slope
            if bias_t is not None:
                part = bias_part(bias_t, piece)
                s_t[:, :, : part.shape[2], : part.shape[3]] += part
            total_t = (p * s_t).sum(-1, keepdim=True) + of_sinks.take(piece.q)
            keep = _dropout_factors(piece, q_.shape[1], plan)
            o_t = _products(_dropped(p * (s_t - total_t), keep), v_)
            if v_t is not None:
                o_t = o_t + _products(_dropped(p, keep), v_t.take(piece.k))
            to_out.put(piece.q, o_t)
            to_lse.put(piece.q, total_t)
        to_out.finish()
        to_lse.finish()
