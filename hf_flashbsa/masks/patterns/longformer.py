"""Longformer."""

from __future__ import annotations

import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import at_least, band_kinds, block_indices, layout_by_entry, token_kinds


def longformer(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    window: int,
    num_global_tokens: int = 0,
    causal: bool = False,
) -> BlockLayout:
    """A window and global tokens (Longformer; Beltagy, Peters and Cohan, 2020, arXiv 2004.05150).

    Query `i` sees keys `|i - j| <= window / 2`: like the paper's, `window` counts both sides. The first
    `num_global_tokens` queries see every key, and every query sees as many first keys.
    """
    at_least(0, window=window, num_global_tokens=num_global_tokens)
    if window % 2:
        raise ValueError(f"window: {window} is odd; give an even number, half of which lies on each side.")
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    reach = window // 2
    kinds = token_kinds(torch.arange(max(len(r), len(c)) * block_size) < num_global_tokens, block_size)

    def visible(v: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q - k).abs() <= reach) | (k < num_global_tokens) | (q < num_global_tokens)

    kinds = (band_kinds(r, c, block_size, reach), kinds[: len(r), None], kinds[: len(c)])
    return layout_by_entry(r, c, block_size, visible, *kinds, causal=causal)
