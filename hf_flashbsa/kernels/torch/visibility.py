"""What a piece sees, as a term added to its scores: the bias, ALiBi's, and -inf where a key is hidden."""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_flashbsa.kernels.call_plan import CallPlan
from hf_flashbsa.kernels.torch.pieces import Piece, Place

#: Largest term, in elements, that is kept for the next layer and the backward pass.
MAX_CACHED = 1 << 18


class Term(NamedTuple):
    """Added to scores `(n, H, m, l)`, to which both tensors broadcast, in 4 dimensions.

    Args:
        values: None for 0.
        blind: bool `(..., m or 1, 1)`, queries that see nothing; None where all see something.
    """

    values: torch.Tensor | None
    blind: torch.Tensor | None


NO_TERM = Term(None, None)


def term_of(piece: Piece, plan: CallPlan, device: torch.device, dtype: torch.dtype) -> Term:
    """The term of a piece."""
    tensors = plan.tensors
    visible = None
    for condition in _conditions(piece, plan, device):
        visible = condition if visible is None else visible & condition
    if tensors.bias is None and tensors.alibi_slopes is None:
        if visible is None:
            return NO_TERM
        values = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    else:
        values = 0.0 if tensors.bias is None else _bias_term(tensors.bias, piece, dtype)
        if tensors.alibi_slopes is not None:
            slopes = tensors.alibi_slopes[piece.q.rows] if tensors.alibi_slopes.shape[0] > 1 else tensors.alibi_slopes
            values = values - slopes.to(dtype)[:, :, None, None] * _keys_ahead(piece, device).abs()
        if visible is not None:
            values = values.masked_fill(~visible, float("-inf"))
    # A window and lengths alone leave each query of a piece a key.
    may_blind = piece.has_ids or tensors.mask is not None or tensors.bias is not None or tensors.block_grid is not None
    blind = (values == float("-inf")).all(-1, keepdim=True) if may_blind else None
    return Term(values, blind if may_blind and blind.any() else None)


def _conditions(piece: Piece, plan: CallPlan, device: torch.device) -> list[torch.Tensor]:
    """bool tensors that broadcast to `(n, H, m, l)`, all of which hold where a key is visible."""
    conditions, tensors = [], plan.tensors
    if any(piece.banded):
        ahead = _keys_ahead(piece, device)
        if piece.banded[0]:
            conditions.append(ahead >= -plan.scalars.window_left)
        if piece.banded[1]:
            conditions.append(ahead <= plan.scalars.window_right)
    if piece.k.live is not None:
        conditions.append(piece.k.live[:, None, None])
    if piece.has_ids:
        ids_k = _ids(tensors.segment_ids_k, piece.k)[:, None, None]
        if tensors.segment_ids_q is None:
            conditions.append(ids_k == 0)
        else:
            conditions.append((ids_k == _ids(tensors.segment_ids_q, piece.q)[:, None, :, None]) & (ids_k >= 0))
    if tensors.mask is not None:
        conditions.append(tensors.mask[piece.q.rows, :, piece.q.extent, piece.k.extent])
    if tensors.block_grid is not None:
        conditions.append(_visited(piece, plan))
    return conditions


def _keys_ahead(piece: Piece, device: torch.device) -> torch.Tensor:
    """int64 `(n or 1, 1, m, l)`: by how many positions each key stands behind (> 0) each query."""
    ahead = torch.arange(piece.k.length, device=device) - torch.arange(piece.q.length, device=device)[:, None]
    first = piece.ahead if isinstance(piece.ahead, int) else piece.ahead[:, None, None, None]
    return (ahead + first).expand(piece.q.rows.shape[0] if isinstance(first, torch.Tensor) else 1, 1, -1, -1)


def _ids(ids: torch.Tensor, place: Place) -> torch.Tensor:
    """`(n, m)`, of `(B, S)`."""
    if place.index is None:
        return ids[place.rows, place.extent]
    return ids.flatten()[place.index].unflatten(0, (-1, place.length))


def _visited(piece: Piece, plan: CallPlan) -> torch.Tensor:
    """bool `(B or 1, H or 1, m, l)`: entries that a layout shows."""
    size = plan.scalars.block_size
    grid = plan.tensors.block_grid
    grid = grid[piece.q.rows] if grid.shape[0] > 1 else grid
    places, inner = [], []
    for start, length in ((piece.query_start, piece.q.length), (piece.key_start, piece.k.length)):
        place = torch.arange(start, start + length, device=grid.device)
        places.append(place // size)
        inner.append(place % size)
    kind = grid[:, :, places[0][:, None], places[1]]
    visible = kind == 1
    if plan.tensors.block_masks is not None:
        words = plan.tensors.block_masks[(kind - 2).clamp(min=0), inner[0][:, None], inner[1] // 32]
        visible |= (kind >= 2) & (words >> (inner[1] % 32) & 1).bool()
    return visible


def bias_part(bias: torch.Tensor, piece: Piece) -> torch.Tensor:
    """A view of a bias, or of what has its shape, for a piece: by place in the sequence, as far as it reaches."""
    rows = piece.q.rows if bias.shape[0] > 1 else slice(None)
    q, k = piece.query_start, piece.key_start
    return bias[rows, :, q : q + piece.q.length, k : k + piece.k.length]


def _bias_term(bias: torch.Tensor, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
    """The bias of a piece, -inf where it hides the key or does not reach."""
    bias = bias_part(bias, piece)
    missing = (0, piece.k.length - bias.shape[3], 0, piece.q.length - bias.shape[2])
    values = bias.to(dtype).masked_fill(bias <= torch.finfo(bias.dtype).min, float("-inf"))
    return torch.nn.functional.pad(values, missing, value=float("-inf")) if any(missing) else values
