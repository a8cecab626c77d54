"""The Sparse Transformer's strided and fixed attention."""

from __future__ import annotations

import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import (
    INSIDE,
    OUTSIDE,
    at_least,
    band_kinds,
    block_indices,
    check_variants,
    layout_by_entry,
    token_kinds,
)


def openai_strided(
    num_queries: int, num_keys: int, block_size: int = 128, *, stride: int, causal: bool = False
) -> BlockLayout:
    """Strided attention (Sparse Transformer; Child, Gray, Radford and Sutskever, 2019, arXiv 1904.10509).

    Query `i` sees keys `|i - j| <= stride`, and all keys whose distance is a multiple of `stride`. Only strides well
    above `block_size` leave blocks out.
    """
    at_least(1, stride=stride)
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    band, phase = band_kinds(r, c, block_size, stride), ((r - c) * block_size) % stride
    # Beyond the window, blocks differ by where a multiple of the stride crosses them, if one does.
    crossed = (phase < block_size) | (phase > stride - block_size)
    phase = torch.where(band == OUTSIDE, torch.where(crossed, phase, stride), 0)

    def visible(v: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ((q - k).abs() <= stride) | ((q - k) % stride == 0)

    return layout_by_entry(r, c, block_size, visible, band, phase, causal=causal)


def openai_fixed(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    window: int,
    num_summary_tokens: int,
    num_patterns: int = 1,
    causal: bool = False,
    num_heads: int = 1,
) -> BlockLayout:
    """Fixed attention (Sparse Transformer; Child, Gray, Radford and Sutskever, 2019, arXiv 1904.10509).

    The sequence is cut into windows of `window` tokens. A query sees its own window, and of all windows the last
    `num_summary_tokens` tokens. With `num_patterns` > 1, head `h` takes the `h % num_patterns`-th such group from the
    end of the windows instead.
    """
    at_least(1, window=window, num_summary_tokens=num_summary_tokens, num_patterns=num_patterns)
    check_variants("num_patterns", num_patterns, num_heads)
    if num_patterns * num_summary_tokens > window:
        raise ValueError(
            f"num_summary_tokens: {num_patterns} patterns of {num_summary_tokens} tokens exceed a window of {window}."
        )
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    start = window - (torch.arange(num_patterns) + 1) * num_summary_tokens

    def summary(v: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (k % window >= start[v]) & (k % window < start[v] + num_summary_tokens)

    def visible(v: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return (q // window == k // window) | summary(v, k)

    flags = summary(torch.arange(len(start))[:, None], torch.arange(len(c) * block_size))
    columns = token_kinds(flags, block_size)[:, None]
    first_r, last_r = r * block_size // window, ((r + 1) * block_size - 1) // window
    first_c, last_c = c * block_size // window, ((c + 1) * block_size - 1) // window
    apart = (last_r < first_c) | (last_c < first_r)
    same = (first_r == last_r) & (first_c == last_c) & ~apart
    # Blocks on the edge of a window differ by where they stand in it.
    edge = ~(apart | same)
    offset = torch.where(edge, r - c, torch.where(same, INSIDE, OUTSIDE))
    phase = torch.where(edge, r * block_size % window, 0)
    return layout_by_entry(r, c, block_size, visible, offset, phase, columns, causal=causal, num_heads=num_heads)
