"""Which tile a program computes and which blocks it visits: tile schedules, windows, block lists."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels import tables
from hf_flashbsa.kernels.structs import BlockRange, WorkTile
from hf_flashbsa.kernels.tables import BlockListColumn, ScheduleColumn

#: Layout of the integer tables (tables.py).
SCHEDULE_TILE: tl.constexpr = tl.constexpr(tables.SCHEDULE_TILE)
SCHEDULE_COLUMNS: tl.constexpr = tl.constexpr(len(ScheduleColumn))
BATCH: tl.constexpr = tl.constexpr(int(ScheduleColumn.BATCH))
BEGIN: tl.constexpr = tl.constexpr(int(ScheduleColumn.BEGIN))
END: tl.constexpr = tl.constexpr(int(ScheduleColumn.END))
OTHER_BATCH: tl.constexpr = tl.constexpr(int(ScheduleColumn.OTHER_BATCH))
LO: tl.constexpr = tl.constexpr(int(ScheduleColumn.LO))
FULL_LO: tl.constexpr = tl.constexpr(int(ScheduleColumn.FULL_LO))
FULL_HI: tl.constexpr = tl.constexpr(int(ScheduleColumn.FULL_HI))
HI: tl.constexpr = tl.constexpr(int(ScheduleColumn.HI))
QUERY_OFFSET: tl.constexpr = tl.constexpr(int(ScheduleColumn.QUERY_OFFSET))
QUERY_ORIGIN: tl.constexpr = tl.constexpr(int(ScheduleColumn.QUERY_ORIGIN))
KEY_ORIGIN: tl.constexpr = tl.constexpr(int(ScheduleColumn.KEY_ORIGIN))
NUM_TILES: tl.constexpr = tl.constexpr(int(ScheduleColumn.NUM_TILES))
NUM_FULL: tl.constexpr = tl.constexpr(int(BlockListColumn.NUM_FULL))
NUM_BLOCKS: tl.constexpr = tl.constexpr(int(BlockListColumn.NUM_BLOCKS))
FIRST_BLOCK: tl.constexpr = tl.constexpr(int(BlockListColumn.FIRST))


@triton.jit
def decode_tile_index(schedule, tile_index, num_tiles, heads, BLOCK: tl.constexpr):
    """Map a linear tile index to (batch, head, tile).

    Tiles of one head are adjacent, so they share K/V in L2. A tile schedule spans the batch and is sorted longest
    first (LPT); its first entry runs for every head before any second one, because one row of a block layout may visit
    as many blocks as many other rows together.
    """
    if schedule is None:
        return tile_index // (num_tiles * heads), (tile_index // num_tiles) % heads, tile_index % num_tiles
    else:
        FIRST: tl.constexpr = SCHEDULE_TILE // BLOCK
        after_first = tile_index - heads * FIRST
        rest = tl.maximum(num_tiles - FIRST, 1)
        head = tl.where(after_first < 0, tile_index // FIRST, after_first // rest)
        return 0, head, tl.where(after_first < 0, tile_index % FIRST, FIRST + after_first % rest)


@triton.jit
def load_work_tile(schedule, tile, batch, len_own, len_other, query_offset, bounds, BLOCK: tl.constexpr):
    """The `tile`-th tile of `BLOCK` rows: from the tile schedule, or of batch row `batch` without one. Then
    `query_offset` may be a pointer to it.
    """
    if schedule is not None:
        PARTS: tl.constexpr = SCHEDULE_TILE // BLOCK
        entry = schedule + (tile // PARTS) * SCHEDULE_COLUMNS
        begin = tl.load(entry + BEGIN) + (tile % PARTS) * BLOCK
        end = tl.minimum(begin + BLOCK, tl.load(entry + END))
        work_tile = WorkTile(
            tl.load(entry + BATCH), begin, end, tl.load(entry + OTHER_BATCH), tl.load(entry + LO),
            tl.load(entry + FULL_LO), tl.load(entry + FULL_HI), tl.load(entry + HI), tl.load(entry + QUERY_OFFSET),
            tl.load(entry + QUERY_ORIGIN), tl.load(entry + KEY_ORIGIN),
        )  # fmt: skip
    else:
        begin = tile * BLOCK
        end = tl.minimum(begin + BLOCK, len_own)
        full_hi = len_other
        if bounds.segment_ids_k is not None:
            full_hi = 0  # segment ids may hide any score
        offset = query_offset
        if query_offset.dtype.is_ptr():
            offset = tl.load(query_offset).to(tl.int32)
        work_tile = WorkTile(batch, begin, end, batch, 0, 0, full_hi, len_other, offset, 0, 0)
    return work_tile


@triton.jit
def block_list_offsets(tiles: tl.constexpr):
    """Offsets into a block list, the argument `list_offsets` of `get_block_range`; 0 without a layout."""
    if tiles.sparse_block == 0:
        return 0
    else:
        return tl.arange(0, tiles.max_blocks)


@triton.jit
def block_list(work_tile, blocks, head, lo, hi, tiles: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointer to the block list of a tile that visits rows `[lo, hi)` of the other side."""
    own_origin = work_tile.key_origin if TRANSPOSED else work_tile.query_origin
    row = (
        blocks.lists + tl.cast(work_tile.batch, tl.int64) * blocks.stride_b + tl.cast(head, tl.int64) * blocks.stride_h
    )
    # A tile that visits nothing may lie outside the grid: use row 0.
    tile_in_grid = tl.where(lo < hi, (work_tile.begin - own_origin) // tiles.sparse_block, 0)
    return row + tl.cast(tile_in_grid, tl.int64) * blocks.stride_row


@triton.jit
def get_block_range(work_tile, mods, head, list_offsets, tiles: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The BlockRange of a tile: key blocks of a query tile or, `TRANSPOSED`, query blocks of a key tile.

    `list_offsets` come from `block_list_offsets`; Gluon kernels pass their own, with a layout.
    """
    blocks = mods.blocks
    # Row i of the tile sees rows i + offset - before .. i + offset + after of the other side.
    if TRANSPOSED:
        BLOCK: tl.constexpr = tiles.m
        OWN: tl.constexpr = tiles.n
        own_origin, other_origin, offset = work_tile.key_origin, work_tile.query_origin, -work_tile.query_offset
        before, after = mods.bounds.window_right, mods.bounds.window_left
    else:
        BLOCK: tl.constexpr = tiles.n
        OWN: tl.constexpr = tiles.m
        own_origin, other_origin, offset = work_tile.query_origin, work_tile.key_origin, work_tile.query_offset
        before, after = mods.bounds.window_left, mods.bounds.window_right
    lo, full_lo, full_hi, hi = work_tile.lo, work_tile.full_lo, work_tile.full_hi, work_tile.hi
    first, last = work_tile.begin + offset, work_tile.end - 1 + offset
    if after is not None:
        hi = tl.minimum(hi, last + after + 1)
        full_hi = tl.minimum(full_hi, first + after + 1)
    if before is not None:
        lo = tl.maximum(lo, first - before)
        full_lo = tl.maximum(full_lo, last - before)
    hi = tl.maximum(hi, lo)
    has_full = mods.dense_mask.ptr is None  # with a dense mask every block is masked
    first_block = lo
    if mods.bias.ptr is not None:
        # Full blocks load the bias unmasked: they must lie within it.
        if TRANSPOSED:
            bias_len_own, bias_len_other = mods.score_mod.bias_len_k, mods.score_mod.bias_len_q
        else:
            bias_len_own, bias_len_other = mods.score_mod.bias_len_q, mods.score_mod.bias_len_k
        has_full = has_full & (work_tile.end - work_tile.begin == OWN) & (work_tile.end - own_origin <= bias_len_own)
        full_hi = tl.minimum(full_hi, other_origin + bias_len_other)
        # An empty tile may begin anywhere, which breaks the alignment that `_hint_contiguous` promises: move it.
        nonempty = lo < hi
        lo, hi = tl.where(nonempty, lo, other_origin), tl.where(nonempty, hi, other_origin)
    if (mods.bias.ptr is not None) or (mods.score_mod.seed is not None):
        # `load_bias` and `dropout_keep` need blocks at multiples of their size, counted in the sequence.
        first_block = tl.where(lo < hi, other_origin + (lo - other_origin) // BLOCK * BLOCK, lo)
    if tiles.sparse_block == 0:
        begin, end = first_block, hi
        full_begin = begin + (tl.maximum(full_lo - begin, 0) + BLOCK - 1) // BLOCK * BLOCK
        full_end = begin + tl.maximum(full_hi - begin, 0) // BLOCK * BLOCK
        indices, partial_begin, partial_end = 0, 0, 0
    else:
        # Lists ascend, so the window cuts off both ends. Counting over the whole list replaces a binary search.
        SIZE: tl.constexpr = tiles.sparse_block
        row = block_list(work_tile, blocks, head, lo, hi, tiles, TRANSPOSED)
        num_full, num_indices = tl.load(row + NUM_FULL), tl.load(row + NUM_BLOCKS)
        indices = row + FIRST_BLOCK
        block = other_origin + tl.load(indices + list_offsets, mask=list_offsets < num_indices, other=0) * SIZE
        is_full, is_partial = list_offsets < num_full, (list_offsets >= num_full) & (list_offsets < num_indices)
        ends_below, starts_below = block + SIZE <= lo, block < hi
        begin = tl.sum((is_full & ends_below).to(tl.int32), 0) * SIZE
        end = tl.sum((is_full & starts_below).to(tl.int32), 0) * SIZE
        full_begin = tl.sum((is_full & (block < full_lo)).to(tl.int32), 0) * SIZE
        full_end = tl.sum((is_full & (block + SIZE <= full_hi)).to(tl.int32), 0) * SIZE
        partial_begin = (num_full + tl.sum((is_partial & ends_below).to(tl.int32), 0)) * SIZE
        partial_end = (num_full + tl.sum((is_partial & starts_below).to(tl.int32), 0)) * SIZE
    has_full = has_full & (full_end > full_begin)
    full_begin = tl.where(has_full, full_begin, begin)
    full_end = tl.where(has_full, full_end, begin)
    left_end = (full_begin - begin) // BLOCK
    right_end = left_end + (end - full_end + BLOCK - 1) // BLOCK
    num_partial = right_end + (partial_end - partial_begin) // BLOCK
    return BlockRange(
        begin, left_end, right_end, num_partial, full_begin, full_end, partial_begin, lo, hi, indices, other_origin
    )


@triton.jit
def block_start(block_range, blocks, position, tiles: tl.constexpr):
    """First row of the block at a position of a BlockRange."""
    if tiles.sparse_block == 0:
        return position
    else:
        SIZE: tl.constexpr = tiles.sparse_block
        return block_range.origin + tl.load(block_range.indices + position // SIZE) * SIZE + position % SIZE


@triton.jit
def first_full_block(block_range, blocks, tiles: tl.constexpr):
    """First row of the first full block, or of any block if there is none.

    Listed blocks are looked up one iteration ahead: Triton pipelines an index load together with the tile loads that
    depend on it, which leaves one stage of prefetch.
    """
    if tiles.sparse_block == 0:
        return 0
    else:
        return block_start(
            block_range,
            blocks,
            tl.where(block_range.full_begin < block_range.full_end, block_range.full_begin, 0),
            tiles,
        )


@triton.jit
def partial_block_position(block_range, index, BLOCK: tl.constexpr, tiles: tl.constexpr):
    """Position of the `index`-th masked block of a BlockRange."""
    position = (
        block_range.begin
        + index * BLOCK
        + tl.where(index >= block_range.left_end, block_range.full_end - block_range.full_begin, 0)
    )
    if tiles.sparse_block > 0:
        position = tl.where(
            index >= block_range.right_end,
            block_range.partial_begin + (index - block_range.right_end) * BLOCK,
            position,
        )
    return position
