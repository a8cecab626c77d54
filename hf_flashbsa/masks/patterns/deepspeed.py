"""DeepSpeed's fixed and variable sparsity."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import (
    at_least,
    block_indices,
    check_variants,
    deal,
    layout_by_block,
    random_blocks,
)


def deepspeed_fixed(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    num_local_blocks: int = 4,
    num_global_blocks: int = 1,
    num_global_patterns: int = 1,
    horizontal: bool = False,
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """DeepSpeed's "fixed" sparsity (Microsoft, 2020), after Child et al., 2019, arXiv 1904.10509.

    The sequence is cut into windows of `num_local_blocks` blocks, each dense. `num_global_blocks` blocks of each
    window, the last ones for head 0, are seen by all queries; with `num_global_patterns` > 1, head `h` takes the
    `h % num_global_patterns`-th such group from the end. In a short last window they move up to its end. With
    `horizontal` the queries of global blocks also see all keys.
    """
    at_least(
        1,
        num_local_blocks=num_local_blocks,
        num_global_blocks=num_global_blocks,
        num_global_patterns=num_global_patterns,
    )
    check_variants("num_global_patterns", num_global_patterns, num_heads)
    if num_global_patterns * num_global_blocks > num_local_blocks:
        raise ValueError(
            f"num_global_blocks: {num_global_patterns} patterns of {num_global_blocks} blocks exceed a window of "
            f"{num_local_blocks} blocks."
        )
    if horizontal and causal:
        raise ValueError("horizontal: queries of global blocks cannot see all keys with causal=True; give False.")
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    pattern = torch.arange(num_global_patterns)[:, None, None]
    first = num_local_blocks - (1 + pattern) * num_global_blocks

    def is_global(block: torch.Tensor) -> torch.Tensor:
        whole = block.numel() // num_local_blocks * num_local_blocks
        place = block % num_local_blocks
        regular = (block < whole) & (place >= first) & (place < first + num_global_blocks)
        start = (whole + first).clamp(max=block.numel() - num_global_blocks)
        return regular | ((whole < block.numel()) & (block >= start) & (block < start + num_global_blocks))

    visited = (r // num_local_blocks == c // num_local_blocks) | is_global(c)
    if horizontal:
        visited = visited | is_global(r)
    return layout_by_block(deal(visited, num_heads), block_size, causal)


def deepspeed_variable(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    local_window_blocks: Sequence[int] = (4,),
    global_blocks: Sequence[int] = (0,),
    global_block_ends: Sequence[int] | None = None,
    num_random_blocks: int = 0,
    seed: int = 0,
    per_head: bool = True,
    horizontal: bool = False,
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """DeepSpeed's "variable" sparsity (Microsoft, 2020).

    Windows of `local_window_blocks` blocks follow one another, the last width repeating, each dense. All queries see
    the key blocks `global_blocks`, or, with `global_block_ends`, those from each of `global_blocks` up to its end,
    exclusive. With `horizontal` the queries of these blocks also see all keys. Each block row visits
    `num_random_blocks` drawn from all it may see, as in `bigbird`.
    """
    at_least(0, num_random_blocks=num_random_blocks, seed=seed, global_blocks=min(global_blocks, default=0))
    at_least(1, local_window_blocks=min(local_window_blocks, default=0))
    ends = [first + 1 for first in global_blocks] if global_block_ends is None else global_block_ends
    if len(ends) != len(global_blocks) or any(e <= b for b, e in zip(global_blocks, ends, strict=True)):
        raise ValueError(f"global_block_ends: {ends}; give one end beyond each of global_blocks {global_blocks}.")
    if horizontal and causal:
        raise ValueError("horizontal: queries of global blocks cannot see all keys with causal=True; give False.")
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    edges = torch.tensor(local_window_blocks).cumsum(0)

    def window(block: torch.Tensor) -> torch.Tensor:
        behind = (block - edges[-1]).clamp(min=0) // local_window_blocks[-1]
        return torch.searchsorted(edges, block, right=True) + behind

    def is_global(block: torch.Tensor) -> torch.Tensor:
        ranges = zip(global_blocks, ends, strict=True)
        return sum(((block >= b) & (block < e) for b, e in ranges), torch.zeros_like(block, dtype=torch.bool))

    visited = (window(r) == window(c)) | is_global(c)
    if horizontal:
        visited = visited | is_global(r)
    may_see = (c <= r) | torch.tensor(not causal)
    drawn = random_blocks(may_see, num_random_blocks, seed, num_heads if per_head else 1)
    return layout_by_block(visited | drawn, block_size, causal)
