"""Pixelfly's fixed butterfly."""

from __future__ import annotations

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._builders import at_least, block_indices, layout_by_block


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
