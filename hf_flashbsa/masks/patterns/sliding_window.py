"""Sliding windows, with and without gaps."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import at_least, band_kinds, block_indices, check_variants, layout_by_entry
from hf_flashbsa.masks.patterns.longformer import longformer


def local(num_queries: int, num_keys: int, block_size: int = 128, *, window: int, causal: bool = False) -> BlockLayout:
    """A sliding window: query `i` sees keys `|i - j| <= window`, so `window` counts the keys on one side."""
    at_least(0, window=window)
    return longformer(num_queries, num_keys, block_size, window=2 * window, causal=causal)


def dilated(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    window: int,
    dilation: int | Sequence[int],
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """A window with gaps (Longformer; Beltagy, Peters and Cohan, 2020, arXiv 2004.05150, section 3.1).

    Query `i` sees keys `i + n * dilation` with `|n| <= window / 2`. A list of dilations is dealt out to the heads in
    turn.
    """
    dilations = [dilation] if isinstance(dilation, int) else dilation
    at_least(0, window=window)
    at_least(1, dilation=min(dilations, default=0))
    if window % 2:
        raise ValueError(f"window: {window} is odd; give an even number, half of which lies on each side.")
    check_variants("dilation", len(dilations), num_heads)
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    step = torch.tensor(dilations)
    reach = step * (window // 2)

    def visible(v: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q - k).abs() <= reach[v]) & ((q - k) % step[v] == 0)

    band = band_kinds(r, c, block_size, reach[:, None, None])
    phase = ((r - c) * block_size) % step[:, None, None]
    return layout_by_entry(r, c, block_size, visible, band, phase, causal=causal, num_heads=num_heads)
