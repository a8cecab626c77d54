"""Layouts chosen from the queries and keys of a call.

The choice is a constant to gradients and stays on the device of the queries: nothing here waits for it. Make it once
per layer and give the same layout to forward and backward. Layouts have a grid per batch row and query head and visit
whole blocks; what lies above the diagonal is left to `causal=True` of the attention call.

Common arguments:
    q, k: `(B, Hq, Sq, D)` and `(B, Hkv, Sk, D)`; heads of queries share heads of keys in groups.
    block_size: a power of two >= 32.
    causal: block row `r` visits no block column beyond `r`. Needs as many queries as keys.
    keep_diagonal: every block row visits its own block, if that has live keys. False for cross-attention.
    live_q, live_k: which rows are no padding, bool `(B or 1, S)` or integer lengths `(B,)`. Dead rows have no say,
        blocks without a live row are not visited.
    shown: bool `(B or 1, H or 1, query blocks, key blocks)`, False where a mask hides a whole block, see
        `shown_blocks`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from hf_flashbsa.masks.block_layout import BlockLayout, check_block_size

__all__ = ["SELECTIONS", "antidiagonal_blocks", "top_k_blocks"]

#: Query blocks whose anti-diagonal scores are held at once, which bounds the memory.
CHUNK = 32


@torch.no_grad()
def top_k_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int = 128,
    causal: bool = False,
    keep_diagonal: bool = True,
    live_q: torch.Tensor | None = None,
    live_k: torch.Tensor | None = None,
    shown: torch.Tensor | None = None,
    *,
    top_k: int,
) -> BlockLayout:
    """The `top_k` key blocks whose mean key fits the mean query best, after MoBA (Lu et al., 2025, arXiv 2502.13189).

    MoBA chooses for each query; here the queries of a block choose together, by their mean, so that one list serves
    them all. The own block counts as one of the `top_k`; of equal scores the earlier block wins.

    Returns:
        a layout `(B, Hq, query blocks, key blocks)`.
    """
    if top_k < 1:
        raise ValueError(f"top_k: {top_k}; give at least 1.")
    _check(q, k, block_size, causal)
    queries, any_q = _pool(q, _live(live_q, q), block_size)
    keys, any_k = _pool(k, _live(live_k, k), block_size)
    allowed, forced = _bounds(any_q, any_k, causal, keep_diagonal, shown)
    score = _grouped_scores(queries, keys).masked_fill(forced, math.inf).masked_fill(~allowed, -math.inf)
    best = torch.argsort(score, dim=-1, descending=True, stable=True)[..., :top_k]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True)
    return BlockLayout.from_block_mask(chosen & allowed, block_size)


@torch.no_grad()
def antidiagonal_blocks(
    q: torch.Tensor,
    k: torch.Tensor,
    block_size: int = 128,
    causal: bool = False,
    keep_diagonal: bool = True,
    live_q: torch.Tensor | None = None,
    live_k: torch.Tensor | None = None,
    shown: torch.Tensor | None = None,
    *,
    threshold: float = 0.9,
    stride: int = 16,
) -> BlockLayout:
    """The fewest key blocks that hold `threshold` of the estimated attention, XAttention (Xu et al., 2025,
    arXiv 2503.16428).

    Scores are summed along the anti-diagonal of every `stride` by `stride` tile, divided by `stride * sqrt(D)`, put
    through a softmax over the tiles of a row and summed over blocks. The first block and, with `keep_diagonal`, the
    own one are always visited; then the heaviest follow until the mass reaches `threshold` of the row's.

    Args:
        threshold: 0 < threshold <= 1.
        stride: divides `block_size`; the cost of the estimate falls with it.

    Returns:
        a layout `(B, Hq, query blocks, key blocks)`.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold: {threshold}; give a share of the attention, 0 < threshold <= 1.")
    if stride < 1 or block_size % stride:
        raise ValueError(f"stride: {stride} does not divide the block size {block_size}; give a power of two.")
    _check(q, k, block_size, causal)
    alive_q, alive_k = _live(live_q, q), _live(live_k, k)
    # A tile's queries in reverse order beside its keys in order: their product walks its anti-diagonal.
    tiles_q, tile_any_q = _tiles(q, alive_q, block_size, stride, reverse=True)
    tiles_k, tile_any_k = _tiles(k, alive_k, block_size, stride, reverse=False)
    per_block = block_size // stride
    any_q, any_k = (x.unflatten(-1, (-1, per_block)).any(-1) for x in (tile_any_q, tile_any_k))
    column = torch.arange(tiles_k.shape[2], device=k.device)
    scale = 1.0 / (stride * math.sqrt(q.shape[-1]))
    masses = []
    for first in range(0, tiles_q.shape[2], CHUNK * per_block):
        part = tiles_q[:, :, first : first + CHUNK * per_block]
        row = torch.arange(first, first + part.shape[2], device=k.device)
        hidden = ~tile_any_k[:, None, None] | ((column > row[:, None]) & causal)
        if shown is not None:
            hidden = hidden | ~shown[:, :, row // per_block].repeat_interleave(per_block, -1)
        probs = torch.softmax((_grouped_scores(part, tiles_k) * scale).masked_fill(hidden, -math.inf), dim=-1)
        # A row without live keys is NaN, one without live queries has no say.
        probs = probs.masked_fill(hidden | ~tile_any_q[:, None, row, None], 0.0)
        masses.append(probs.unflatten(-1, (-1, per_block)).sum(-1).unflatten(2, (-1, per_block)).sum(3))
    mass = torch.cat(masses, dim=2)
    allowed, forced = _bounds(any_q, any_k, causal, keep_diagonal, shown)
    forced = forced | (allowed & (torch.arange(mass.shape[-1], device=k.device) == 0))
    order = torch.argsort(mass.masked_fill(forced, math.inf), dim=-1, descending=True, stable=True)
    sorted_mass = mass.gather(-1, order)
    before = sorted_mass.cumsum(-1) - sorted_mass
    needed = before < threshold * mass.sum(-1, keepdim=True)
    chosen = torch.zeros_like(needed).scatter_(-1, order, needed)
    return BlockLayout.from_block_mask((chosen | forced) & allowed, block_size)


def shown_blocks(mask: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which blocks of a bool mask `(B or 1, H or 1, Sq, Sk)` show an entry."""
    rows, columns = (-(-length // block_size) for length in mask.shape[2:])
    missing_q, missing_k = rows * block_size - mask.shape[2], columns * block_size - mask.shape[3]
    blocks = F.pad(mask, (0, missing_k, 0, missing_q)).unflatten(3, (columns, -1)).unflatten(2, (rows, -1))
    return blocks.any(-1).any(3)


def _check(q: torch.Tensor, k: torch.Tensor, block_size: int, causal: bool) -> None:
    check_block_size(block_size)
    if q.ndim != 4 or k.ndim != 4 or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q and k: {tuple(q.shape)} and {tuple(k.shape)}; give (B, Hq, Sq, D) and (B, Hkv, Sk, D), where Hkv "
            "divides Hq."
        )
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal: {q.shape[2]} queries and {k.shape[2]} keys; a causal choice needs as many.")


def _live(live: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """bool `(B, S)`."""
    batch, length = x.shape[0], x.shape[2]
    if live is None:
        return torch.ones(1, 1, dtype=torch.bool, device=x.device).expand(batch, length)
    if live.dtype != torch.bool and not live.is_floating_point() and live.ndim == 1:
        live = torch.arange(length, device=x.device) < live[:, None]
    if live.dtype != torch.bool or live.ndim != 2 or live.shape[0] not in (1, batch) or live.shape[1] != length:
        raise ValueError(
            f"live: {live.dtype} {tuple(live.shape)}; give bool ({batch} or 1, {length}) or int lengths ({batch},)."
        )
    return live.expand(batch, length)


def _whole(x: torch.Tensor, live: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` and `live` up to the end of the last block, dead rows 0."""
    missing = -x.shape[2] % block_size
    x = x.masked_fill(~live[:, None, :, None], 0.0)
    return F.pad(x, (0, 0, 0, missing)), F.pad(live, (0, missing))


def _pool(x: torch.Tensor, live: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of the live rows of each block, fp32 `(B, H, blocks, D)`, and whether there is one, `(B, blocks)`."""
    x, live = _whole(x, live, block_size)
    total = x.unflatten(2, (-1, block_size)).sum(3, dtype=torch.float32)
    count = live.unflatten(1, (-1, block_size)).sum(-1)
    return total / count.clamp(min=1)[:, None, :, None], count > 0


def _tiles(
    x: torch.Tensor, live: torch.Tensor, block_size: int, stride: int, reverse: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`stride` rows side by side, `(B, H, tiles, stride * D)`, and whether one of them is live, `(B, tiles)`."""
    x, live = _whole(x, live, block_size)
    x = x.unflatten(2, (-1, stride))
    return (x.flip(3) if reverse else x).flatten(3), live.unflatten(1, (-1, stride)).any(-1)


def _grouped_scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """fp32 `(B, Hq, rows of q, rows of k)`, a head of keys shared by a group of heads of queries."""
    grouped = q.unflatten(1, (k.shape[1], -1))
    return (grouped @ k[:, :, None].mT).flatten(1, 2).float()


def _bounds(
    any_q: torch.Tensor, any_k: torch.Tensor, causal: bool, keep_diagonal: bool, shown: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bool `(B, 1 or H, R, C)`: blocks that may be visited, and those of them that must be."""
    row = torch.arange(any_q.shape[1], device=any_q.device)[:, None]
    column = torch.arange(any_k.shape[1], device=any_k.device)
    allowed = any_q[:, None, :, None] & any_k[:, None, None]
    if causal:
        allowed = allowed & (column <= row)
    if shown is not None:
        allowed = allowed & shown
    return allowed, allowed & (row == column) & keep_diagonal


#: Selections by name, as configs call them.
SELECTIONS: dict[str, Callable] = {f.__name__: f for f in (top_k_blocks, antidiagonal_blocks)}
