"""BigBird."""

from __future__ import annotations

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import at_least, block_indices, layout_by_block, random_blocks


def bigbird(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    num_window_blocks: int = 3,
    num_global_blocks: int = 1,
    num_random_blocks: int = 1,
    seed: int = 0,
    per_head: bool = True,
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """Window, global and random blocks (BigBird; Zaheer et al., 2020, arXiv 2007.14062, its block-wise form).

    Block row `r` visits `num_window_blocks` blocks around the diagonal (an odd number, counted as if `causal` did not
    cut it), the first `num_global_blocks` block columns, and `num_random_blocks` others; the first `num_global_blocks`
    block rows visit every block. The random ones are, of those that are left, the ones with the largest
    `torch.rand(query blocks, key blocks)`, drawn from a generator of this `seed` for one head after the other, or once
    unless `per_head`.
    """
    at_least(0, num_global_blocks=num_global_blocks, num_random_blocks=num_random_blocks, seed=seed)
    if num_window_blocks < 1 or num_window_blocks % 2 == 0:
        raise ValueError(f"num_window_blocks: {num_window_blocks}; give an odd number >= 1.")
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    visited = ((r - c).abs() <= num_window_blocks // 2) | (c < num_global_blocks) | (r < num_global_blocks)
    free = ~visited & ((c <= r) | (not causal))
    drawn = random_blocks(free, num_random_blocks, seed, num_heads if per_head else 1)
    return layout_by_block(visited | drawn, block_size, causal)
