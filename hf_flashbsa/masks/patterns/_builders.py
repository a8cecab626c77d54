"""What the patterns share: numbers of blocks, and layouts from a rule on entries or on blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_flashbsa.masks.block_layout import EMPTY, FULL, PARTIAL, BlockLayout, check_block_size, distinct_masks

#: Kinds of blocks that lie inside or outside of a band; others are known by their distance from the diagonal.
INSIDE, OUTSIDE = 1 << 30, (1 << 30) + 1
#: Blocks whose entries are looked at at once, which bounds the memory.
CHUNK = 256


def at_least(lowest: int, **values: int) -> None:
    """Raises ValueError for a value below `lowest`."""
    for name, value in values.items():
        if value < lowest:
            raise ValueError(f"{name}: {value}; give at least {lowest}.")


def check_variants(name: str, variants: int, num_heads: int) -> None:
    """Raises ValueError where there are more variants than heads to show them."""
    if variants > num_heads:
        raise ValueError(f"{name}: {variants} variants for num_heads={num_heads}; give at most one for each head.")


def block_indices(
    num_queries: int, num_keys: int, block_size: int, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of the block rows `(R, 1)` and of the block columns `(C,)`."""
    check_block_size(block_size)
    at_least(1, num_queries=num_queries, num_keys=num_keys)
    if causal and num_queries != num_keys:
        raise ValueError(
            f"causal: {num_queries} queries and {num_keys} keys; causal patterns need as many queries as keys."
        )
    rows, columns = (torch.arange(-(-length // block_size)) for length in (num_queries, num_keys))
    return rows[:, None], columns


def band_kinds(r: torch.Tensor, c: torch.Tensor, block_size: int, reach: int | torch.Tensor) -> torch.Tensor:
    """Which blocks have equal entries `|i - j| <= reach`: `INSIDE`, `OUTSIDE`, or the blocks' distance."""
    distance = ((r - c) * block_size).abs()
    inside = distance + block_size - 1 <= reach
    outside = distance - block_size + 1 > reach
    return torch.where(inside, INSIDE, torch.where(outside, OUTSIDE, r - c))


def token_kinds(flags: torch.Tensor, block_size: int) -> torch.Tensor:
    """Which blocks of a sequence have equal flags: from bool `(..., blocks * block_size)` to `(..., blocks)`."""
    blocks = flags.unflatten(-1, (-1, block_size))
    _, kinds = torch.unique(blocks.flatten(0, -2), dim=0, return_inverse=True)
    return kinds.view(blocks.shape[:-1])


def layout_by_entry(
    r: torch.Tensor,
    c: torch.Tensor,
    block_size: int,
    visible: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    *kinds: torch.Tensor,
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """The layout of a rule on entries, which is looked at once for all blocks that are known to be alike.

    Args:
        r, c: numbers of the block rows `(R, 1)` and columns `(C,)`.
        visible: `(variant, q, k) -> bool`, given integers `(n, 1, 1)`, `(n, block, 1)` and `(n, 1, block)`.
        kinds: non-negative or negative integers that broadcast to `(variants, R, C)`. Blocks that agree in all of them
            have equal entries; each variant is looked at for itself.
        num_heads: heads to deal the variants out to, in turn.
    """
    r, c = r.expand(len(r), len(c)), c.expand(len(r), len(c))
    if causal:
        # Above the diagonal all is open, so that blocks on it are full wherever causality alone would cut them.
        kinds = (*kinds, (r == c).long())
    kinds = torch.broadcast_tensors(*kinds, r)[:-1]
    variants = kinds[0].shape[0] if kinds[0].ndim == 3 else 1
    keys = torch.zeros(variants, *r.shape, dtype=torch.int64)
    for kind in (torch.arange(variants)[:, None, None].expand_as(keys), *kinds):
        _, kind = torch.unique(kind, return_inverse=True)
        keys = keys * (kind.max() + 1) + kind
    live = (c <= r).expand_as(keys) if causal else torch.ones_like(keys, dtype=torch.bool)
    distinct, which = torch.unique(keys[live], return_inverse=True)
    example = torch.empty_like(distinct).scatter_(0, which, torch.arange(len(which)))
    variant, row, column = live.nonzero()[example].T[:, :, None, None]
    within = torch.arange(block_size)

    def look(variant: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        q, k = row * block_size + within[:, None], column * block_size + within
        entries = visible(variant, q, k)
        return entries | (k > q) if causal else entries

    chunks = zip(*(x.split(CHUNK) for x in (variant, row, column)), strict=True)
    entries = torch.cat([look(*chunk) for chunk in chunks])
    some, every = entries.flatten(1).any(1), entries.flatten(1).all(1)
    kind = torch.where(every, FULL, EMPTY)
    partial = some & ~every
    masks = None
    if partial.any():
        masks, number = distinct_masks(entries[partial])
        kind[partial] = number + PARTIAL
    grid = torch.zeros_like(keys, dtype=torch.int32)
    grid[live] = kind[which].to(torch.int32)
    return BlockLayout(deal(grid, num_heads)[None], block_size, masks)


def layout_by_block(visited: torch.Tensor, block_size: int, causal: bool) -> BlockLayout:
    """The layout of a rule on blocks, bool `(R, C)` or `(H, R, C)`."""
    return BlockLayout.from_block_mask(visited.tril() if causal else visited, block_size)


def join_at_diagonal(below: BlockLayout, above: BlockLayout) -> BlockLayout:
    """The layout that shows what `below` shows up to the diagonal, and beyond it what `above` shows.

    Args:
        below, above: of the same block size and as many block rows as columns, on the CPU.
    """
    size = below.block_size
    constant = torch.zeros(2, size, size, dtype=torch.bool)
    constant[FULL] = True

    def kinds(layout: BlockLayout) -> torch.Tensor:
        return constant if layout.tile_masks is None else torch.cat([constant, layout.tile_masks])

    kinds_below, kinds_above = kinds(below), kinds(above)
    grid_below, grid_above = torch.broadcast_tensors(below.grid, above.grid)
    # One list of tile masks: those of `below`, those of `above`, then those of the diagonal.
    moved = torch.where(grid_above >= PARTIAL, grid_above + len(kinds_below) - PARTIAL, grid_above)
    row = torch.arange(grid_below.shape[-1])
    grid = torch.where(row < row[:, None], grid_below, moved)
    pairs = torch.stack([grid_below.diagonal(dim1=-2, dim2=-1), grid_above.diagonal(dim1=-2, dim2=-1)], dim=-1)
    distinct, which = torch.unique(pairs.flatten(0, -2), dim=0, return_inverse=True)
    on_diagonal = kinds_below[distinct[:, 0]].tril() | kinds_above[distinct[:, 1]].triu(1)
    masks = torch.cat([kinds_below[PARTIAL:], kinds_above[PARTIAL:], on_diagonal])
    kind = torch.arange(len(masks) - len(on_diagonal), len(masks), dtype=torch.int32) + PARTIAL
    kind[on_diagonal.flatten(1).all(1)] = FULL
    grid.diagonal(dim1=-2, dim2=-1).copy_(kind[which].view(pairs.shape[:-1]))
    return BlockLayout(grid, size, masks)


def deal(variants: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Deals `(variants, R, C)` out to the heads in turn; one variant stays one grid for all heads."""
    return variants if len(variants) == 1 else variants[torch.arange(num_heads) % len(variants)]


def random_blocks(eligible: torch.Tensor, count: int, seed: int, num_heads: int) -> torch.Tensor:
    """bool `(num_heads, R, C)`: in each block row the `count` eligible blocks that draw the largest numbers."""
    rows, columns = eligible.shape
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.zeros(num_heads, rows, columns, dtype=torch.bool)
    for head in drawn:
        score = torch.rand(rows, columns, generator=generator).masked_fill(~eligible, -1.0)
        head.scatter_(1, score.topk(min(count, columns), dim=1).indices, True)
    return drawn & eligible
