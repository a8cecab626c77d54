"""Which scores are visible: sliding window, segment ids, dense masks, partial blocks of a layout."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.triton.load import strided_pointers


@triton.jit
def window_bounds(bounds, rows, lo, hi, query_offset, TRANSPOSED: tl.constexpr):
    """Per-row `[lo, hi)` of the columns visible under the sliding window, within the given `[lo, hi)`. Rows are
    queries and columns keys, or the reverse where `TRANSPOSED`.
    """
    if TRANSPOSED:
        offset, before, after = -query_offset, bounds.window_right, bounds.window_left
    else:
        offset, before, after = query_offset, bounds.window_left, bounds.window_right
    if before is not None:
        lo = tl.maximum(lo, rows + offset - before)
    if after is not None:
        hi = tl.minimum(hi, rows + offset + after + 1)
    return lo, hi


@triton.jit
def window_mask(bounds, rows, cols, end, lo, hi, query_offset, TRANSPOSED: tl.constexpr):
    """`[rows, cols]` bool: columns of `[lo, hi)` inside the window of rows before `end`.

    Two comparisons per score, both against per-row bounds: comparisons that all rows share would be hoisted out of the
    loop and held in registers, which are scarce.
    """
    col_lo, col_hi = tl.where(rows < end, lo, hi), tl.where(rows < end, hi, lo)
    col_lo, col_hi = window_bounds(bounds, rows, col_lo, col_hi, query_offset, TRANSPOSED)
    return (cols[None, :] >= col_lo[:, None]) & (cols[None, :] < col_hi[:, None])


@triton.jit
def visible_mask(
    mods, batch_q, head, queries, keys, in_window, query_origin, key_origin, first_q, first_k, tiles: tl.constexpr
):
    """`in_window` further restricted by the dense mask and the partial blocks of a layout. `queries` and `keys` are
    broadcastable, `first_q` and `first_k` their first ones. Segments are applied by `apply_segment_mask`.
    """
    ok = in_window
    if mods.dense_mask.ptr is not None:
        dense = tl.load(strided_pointers(mods.dense_mask, batch_q, head, queries, keys), mask=in_window, other=0)
        ok = ok & (dense != 0)
    blocks = mods.blocks
    if tiles.sparse_block > 0:
        if blocks.mask_words is not None:
            pos_q, pos_k = first_q - query_origin, first_k - key_origin
            kind = tl.load(block_pointer(blocks, batch_q, head, pos_q, pos_k, tiles))
            ok = ok & block_bits(blocks, kind, pos_q, pos_k, queries - first_q, keys - first_k, tiles)
    return ok


@triton.jit
def needs_segment_mask(work_tile):
    """Whether segment ids hide any score of a tile."""
    return (work_tile.full_lo > work_tile.lo) | (work_tile.full_hi < work_tile.hi)


@triton.jit
def apply_segment_mask(s, bounds, batch_q, batch_k, needs_mask, queries, keys):
    """Scores `s` at broadcastable `queries` and `keys`, -inf where segment ids differ or the key is padding (id < 0).
    Unchanged unless `needs_mask`.
    """
    if bounds.segment_ids_k is not None:
        if needs_mask:
            # Mask the id loads by length, not per score, so that ids load once per row and column.
            ids_k = bounds.segment_ids_k + tl.cast(batch_k, tl.int64) * bounds.ids_stride_k
            id_k = tl.load(ids_k + keys, mask=keys < bounds.ids_length_k, other=-1)
            id_q = 0
            if bounds.segment_ids_q is not None:
                ids_q = bounds.segment_ids_q + tl.cast(batch_q, tl.int64) * bounds.ids_stride_q
                id_q = tl.load(ids_q + queries, mask=queries < bounds.ids_length_q, other=-1)
            s = tl.where((id_k == id_q) & (id_k >= 0), s, float("-inf"))
    return s


@triton.jit
def block_bits(blocks, kind, pos_q, pos_k, rows, columns, tiles: tl.constexpr):
    """Visibility bits of one block of a layout, whose grid entry is `kind`, at `rows` and `columns` relative to the
    query and key positions `pos_q` and `pos_k` in their sequences. All lie in this block.
    """
    SIZE: tl.constexpr = tiles.sparse_block
    WORDS: tl.constexpr = SIZE // 32
    # Tiles never cross a block's edge, so a row of the tile needs few 32-bit words.
    masks = blocks.mask_words + tl.cast(tl.maximum(kind - 2, 0), tl.int64) * (SIZE * WORDS)
    words = masks + (pos_k % SIZE) // 32 + (rows + pos_q % SIZE) * WORDS
    word = tl.load(words, mask=kind >= 2, other=-1)
    for i in tl.static_range(1, columns.shape[0] * columns.shape[1] // 32):
        word = tl.where(columns // 32 == i, tl.load(words + i, mask=kind >= 2, other=-1), word)
    shift = columns % 32
    if tiles.n < 32:
        shift += pos_k % 32
    return ((word >> shift) & 1) != 0


@triton.jit
def block_pointer(blocks, batch_q, head, pos_q, pos_k, tiles: tl.constexpr):
    """Pointer to the grid entry of the block that holds query and key positions `pos_q`, `pos_k` of a sequence."""
    SIZE: tl.constexpr = tiles.sparse_block
    grid = (
        blocks.grid
        + tl.cast(batch_q, tl.int64) * blocks.grid_stride_b
        + tl.cast(head, tl.int64) * blocks.grid_stride_h
    )
    return grid + tl.cast(pos_q // SIZE, tl.int64) * blocks.grid_stride_q + pos_k // SIZE
