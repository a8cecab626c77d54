"""The block layouts that are timed, by name, and what each of them costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_flashbsa.masks.block_layout import FULL, PARTIAL, BlockLayout
from hf_flashbsa.masks.patterns import make_layout

#: A window of 512 tokens, half on each side, and 128 global tokens.
REACH, GLOBAL_TOKENS = 256, 128


class TimedPattern(NamedTuple):
    """A pattern with its parameters, and as FlexAttention's users write it, a rule on entries; None where blocks are
    whole."""

    pattern: str
    parameters: dict
    rule: Callable | None = None


TIMED_PATTERNS = {
    "local": TimedPattern("local", {"window": REACH}, lambda b, h, q, k: (q - k).abs() <= REACH),
    "longformer": TimedPattern(
        "longformer",
        {"window": 2 * REACH, "num_global_tokens": GLOBAL_TOKENS},
        lambda b, h, q, k: ((q - k).abs() <= REACH) | (q < GLOBAL_TOKENS) | (k < GLOBAL_TOKENS),
    ),
    "bigbird": TimedPattern("bigbird", {"num_random_blocks": 3}),
    # Eight blocks in every block row but the first and last, whatever the length.
    "eight": TimedPattern("bigbird", {"num_global_blocks": 0, "num_random_blocks": 5, "per_head": False}),
    "butterfly": TimedPattern("butterfly", {}),
}
#: What `--patterns` takes; "dense" is no layout at all.
PATTERNS = ("dense", "random", *TIMED_PATTERNS)


@functools.lru_cache(maxsize=16)
def layout_of(
    pattern: str, chance: float | None, length: int, block_size: int, causal: bool, heads: int
) -> BlockLayout:
    """The layout of a name in `PATTERNS` on the CPU; `chance` is that of "random"."""
    if pattern == "random":
        return random_layout(chance, length, block_size, causal)
    name, parameters, _ = TIMED_PATTERNS[pattern]
    return make_layout(name, length, length, block_size, causal=causal, num_heads=heads, **parameters)


def random_layout(chance: float, length: int, block_size: int, causal: bool) -> BlockLayout:
    """Visits each block with a probability of `chance`, the same ones in all heads, and one at least in each row."""
    blocks = -(-length // block_size)
    drawn = torch.rand(blocks, blocks, generator=torch.Generator().manual_seed(0))
    if causal:
        drawn = drawn.masked_fill(torch.ones(blocks, blocks, dtype=torch.bool).triu(1), 2.0)
    visited = drawn < chance
    visited[torch.arange(blocks), drawn.argmin(1)] = True
    return BlockLayout.from_block_mask(visited, block_size)


def live_scores(layout: BlockLayout, length: int, causal: bool) -> float:
    """Scores that exist in a sequence of `length` queries and keys, exactly, a mean over heads."""
    size = layout.block_size
    blocks = -(-length // size)
    kinds = torch.stack([torch.zeros(size, size, dtype=torch.bool), torch.ones(size, size, dtype=torch.bool)])
    if layout.tile_masks is not None:
        kinds = torch.cat([kinds, layout.tile_masks])
    grid = layout.grid[0, :, :blocks, :blocks].long()
    last = torch.full((blocks,), size - 1)
    last[-1] = (length - 1) % size
    # Entry (i, j) counts what a kind of block shows where a sequence ends behind row i and column j.
    counts = kinds.long().cumsum(1).cumsum(2)
    seen = counts[grid, last[:, None], last]
    if causal:
        counts = kinds.tril().long().cumsum(1).cumsum(2)
        on_diagonal = counts[grid.diagonal(dim1=1, dim2=2), last, last]
        return (seen.tril(-1).sum() + on_diagonal.sum()).item() / len(grid)
    return seen.sum().item() / len(grid)


def flex_block_mask(pattern: str, layout: BlockLayout, length: int, causal: bool):
    """FlexAttention's `BlockMask` of a layout as its users would write it: entries by a rule rather than by a table
    of tiles, and no rule at all where every block is full."""
    from torch.nn.attention.flex_attention import BlockMask, and_masks

    full, partial = layout.grid == FULL, layout.grid >= PARTIAL
    rule = TIMED_PATTERNS[pattern].rule if pattern in TIMED_PATTERNS else None
    rules = [rule] if rule else []
    if causal:
        diagonal = torch.eye(full.shape[-1], dtype=torch.bool, device=full.device)
        full, partial = full & ~diagonal, partial | full & diagonal
        rules.append(lambda b, h, q, k: q >= k)

    def index_lists(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = torch.argsort((~which).to(torch.uint8), dim=-1, stable=True)
        return which.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

    return BlockMask.from_kv_blocks(
        *index_lists(partial),
        *index_lists(full),
        BLOCK_SIZE=layout.block_size,
        mask_mod=and_masks(*rules) if rules else None,
        seq_lengths=(length, length),
    )
