"""Block layouts of the literature.

Every pattern is a function `(num_queries, num_keys, block_size=128, *, parameters, causal, num_heads)` that returns a
`BlockLayout` on the CPU. Only the number of blocks matters: a layout serves all lengths that fill as many blocks.

- Query `i` stands at key `i`. Parameters named after tokens are exact to the token, those named after blocks count
  blocks of the layout.
- `causal=True` drops the blocks above the diagonal, but leaves what lies above the diagonal *within* the blocks on it
  open. A causal layout is used together with `causal=True` of the attention call.
- `num_heads` exists where the source lets heads differ; the default of 1 makes one grid for all heads.
- Patterns without `causal` have no diagonal, and suit cross-attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch

from hf_flashbsa.layout import FULL, PARTIAL, BlockLayout, distinct_masks
from hf_flashbsa.pattern_tools import (
    INSIDE,
    OUTSIDE,
    at_least,
    band_kinds,
    block_indices,
    check_parameters,
    check_variants,
    deal,
    layout_by_block,
    layout_by_entry,
    random_blocks,
    token_kinds,
    unknown,
)


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


def local(num_queries: int, num_keys: int, block_size: int = 128, *, window: int, causal: bool = False) -> BlockLayout:
    """A sliding window: query `i` sees keys `|i - j| <= window`, so `window` counts the keys on one side."""
    at_least(0, window=window)
    return longformer(num_queries, num_keys, block_size, window=2 * window, causal=causal)


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


def butterfly(
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    num_cells: int | None = None,
    num_strides: int | None = None,
    num_global_blocks: int = 0,
    causal: bool = False,
) -> BlockLayout:
    """Fixed butterfly (Pixelfly; Dao et al., 2021, arXiv 2112.00029; FlashAttention's block-sparse layout).

    The grid is cut evenly into `num_cells` by `num_cells` cells (a power of two; default: the first that gives every
    block a cell of its own). Cell `(r, c)` is visited where `r == c` or `r XOR c == 2 ** i` for an `i < num_strides`
    (default: all), and so are the first `num_global_blocks` block rows and columns.
    """
    at_least(0, num_global_blocks=num_global_blocks)
    r, c = block_indices(num_queries, num_keys, block_size, causal)
    cells = 1 << (max(len(r), len(c)) - 1).bit_length() if num_cells is None else num_cells
    if cells < 1 or cells & (cells - 1):
        raise ValueError(f"num_cells: {cells}; give a power of two.")
    strides = cells.bit_length() - 1 if num_strides is None else num_strides
    at_least(0, num_strides=strides)
    # With a cell for every block there may be more cells than blocks, and those behind the last block stay unused.
    cell_r, cell_c = (r, c) if num_cells is None else (r * cells // len(r), c * cells // len(c))
    distance = cell_r ^ cell_c
    one_bit = ((distance & (distance - 1)) == 0) & (distance < 1 << strides)
    return layout_by_block(one_bit | (r < num_global_blocks) | (c < num_global_blocks), block_size, causal)


def from_mask_function(
    visible: Callable,
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    batch: int = 1,
    num_heads: int = 1,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The layout of a mask function, evaluated for one block row at a time. Waits for the device.

    Args:
        visible: `(b, h, q, k) -> bool`, as FlexAttention's `mask_mod`: batch row and head are ints, positions are
            integer tensors `(rows, 1)` and `(1, num_keys)`.
        batch, num_heads: how many batch rows and heads to evaluate; 1 where it does not depend on them.
    """
    block_indices(num_queries, num_keys, block_size)
    positions_q, positions_k = (torch.arange(n, device=device) for n in (num_queries, num_keys))
    parts = [
        BlockLayout.from_mask(visible(b, h, q[:, None], positions_k[None]).expand(len(q), num_keys), block_size)
        for b in range(batch)
        for h in range(num_heads)
        for q in positions_q.split(block_size)
    ]
    masks = [part.tile_masks for part in parts if part.tile_masks is not None]
    if masks:
        masks, which = distinct_masks(torch.cat(masks))
        which = which.to(torch.int32) + PARTIAL
    rows, used = [], 0
    for part in parts:
        kinds = torch.tensor([0, FULL], dtype=torch.int32, device=device)
        if part.tile_masks is not None:
            kinds = torch.cat([kinds, which[used : used + len(part.tile_masks)]])
            used += len(part.tile_masks)
        rows.append(kinds[part.grid.long()])
    grid = torch.cat(rows, dim=2)
    return BlockLayout(grid.view(batch, num_heads, -1, grid.shape[-1]), block_size, masks if used else None)


from_mask = BlockLayout.from_mask

#: Patterns by name, as configs call them.
PATTERNS = {
    function.__name__: function
    for function in (
        all_blocks,
        bigbird,
        butterfly,
        deepspeed_fixed,
        deepspeed_variable,
        dilated,
        global_columns,
        local,
        longformer,
        openai_fixed,
        openai_strided,
    )
}


def has_diagonal(pattern: str) -> bool:
    """Whether a pattern relates queries and keys by position, which cross-attention cannot."""
    return "causal" in inspect.signature(PATTERNS[pattern]).parameters


def make_layout(
    pattern: str,
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    causal: bool = False,
    num_heads: int = 1,
    **parameters,
) -> BlockLayout:
    """The layout of a pattern by name; `causal` and `num_heads` reach the patterns that know them.

    Raises:
        ValueError: an unknown pattern or parameter, a missing one, or a value out of its range or of a wrong type.
    """
    if pattern not in PATTERNS:
        raise ValueError(unknown("pattern", pattern, PATTERNS))
    function = PATTERNS[pattern]
    check_parameters(pattern, function, parameters)
    sizes = {"causal": causal, "num_heads": num_heads}
    known = inspect.signature(function).parameters
    sizes = {name: value for name, value in sizes.items() if name in known}
    return function(num_queries, num_keys, block_size, **sizes, **parameters)
