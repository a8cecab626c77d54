"""All blocks, and global keys alone."""

from __future__ import annotations

import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import at_least, block_indices, layout_by_entry, token_kinds


def all_blocks(num_queries: int, num_keys: int, block_size: int = 128) -> BlockLayout:
    """Every block: dense attention, written as a layout."""
    r, c = block_indices(num_queries, num_keys, block_size)
    return BlockLayout.from_block_mask((r >= 0) & (c >= 0), block_size)


def global_columns(num_queries: int, num_keys: int, block_size: int = 128, *, num_global_tokens: int) -> BlockLayout:
    """Every query sees the first `num_global_tokens` keys."""
    at_least(1, num_global_tokens=num_global_tokens)
    r, c = block_indices(num_queries, num_keys, block_size)
    columns = token_kinds(torch.arange(len(c) * block_size) < num_global_tokens, block_size)
    return layout_by_entry(r, c, block_size, lambda v, q, k: (k < num_global_tokens) & (q >= 0), columns)
