"""Device functions shared by all kernels, portable Triton and Gluon alike.

Each dimension of variation has one helper: which tile a program computes (`load_work_tile`), which blocks it visits
(`get_block_range`), which scores are visible (`window_mask`, `visible_mask`, `apply_segment_mask`), how a score is
modified (`load_bias`, `apply_score_mod`), which weights dropout keeps (`dropout_keep`). Arguments that are None at
launch remove their code at compile time.

Scores are `[queries, keys]`, or `[keys, queries]` where `TRANSPOSED`. "Rows" are those of the tile (queries, or keys
if transposed), "other" is the side it visits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels import dropout, tables
from hf_flashbsa.kernels.records import BlockRange, HeadView, WorkTile
from hf_flashbsa.kernels.tables import BlockListColumn, ScheduleColumn

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
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
#: Constants of the dropout mask (dropout.py).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)
KEY_FACTOR: tl.constexpr = tl.constexpr(dropout.KEY_FACTOR)
LAST_FACTOR: tl.constexpr = tl.constexpr(dropout.LAST_FACTOR)
PAIR: tl.constexpr = tl.constexpr(dropout.PAIR)


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
def load_work_tile(schedule, tile, batch, len_own, len_other, query_offset, BLOCK: tl.constexpr):
    """The `tile`-th tile of `BLOCK` rows: from the tile schedule, or of batch row `batch` without one."""
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
        work_tile = WorkTile(batch, begin, end, batch, 0, 0, len_other, len_other, query_offset, 0, 0)
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


@triton.jit
def _aligned_stride(x, stride):
    """A stride, rounded down to a multiple of 16 bytes where `align_hint` says that it is one already. Triton infers
    alignment only from multiples of 16 elements: without it, rows of 40 or 72 elements load one element at a time.
    """
    if x.align_hint is None:
        return stride
    else:
        multiple: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
        return stride // multiple * multiple


@triton.jit
def head_view(x, batch, head):
    """One head of a TensorView.

    Rows that are not aligned to 16 bytes load element by element. Their tiles must be too small for wgmma: with both
    operands loaded this way, Triton 3.6 has computed wrong wgmma results on Hopper (head dims 40 for q/k and 8 for v).
    """
    base = (
        x.ptr
        + tl.cast(batch, tl.int64) * _aligned_stride(x, x.stride_b)
        + tl.cast(head, tl.int64) * _aligned_stride(x, x.stride_h)
    )
    return HeadView(base, _aligned_stride(x, x.stride_s))


@triton.jit
def tile_pointers(x, begin, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Pointers `[BLOCK, BLOCK_DIM]` to rows of a HeadView from `begin` on. 64-bit wherever a sequence length
    enters.
    """
    offsets = tl.arange(0, BLOCK)[:, None] * x.stride + tl.arange(0, BLOCK_DIM)[None, :]
    return x.base + tl.cast(begin, tl.int64) * x.stride + offsets


@triton.jit
def load_tile(x, begin, lo, hi, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr):
    """`[BLOCK, BLOCK_DIM]` rows of a HeadView from `begin` on; 0 outside `[lo, hi)` (if `CHECK`) and beyond `DIM`."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    dims = tl.arange(0, BLOCK_DIM)
    if CHECK:
        rows = begin + tl.arange(0, BLOCK)
        in_window = ((rows >= lo) & (rows < hi))[:, None]
        if DIM < BLOCK_DIM:
            in_window = in_window & (dims < DIM)[None, :]
        tile = tl.load(pointers, mask=in_window, other=0.0)
    else:
        if DIM < BLOCK_DIM:
            tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(x, begin, end, tile, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store rows `[begin, end)` of a HeadView."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    in_window = (begin + tl.arange(0, BLOCK) < end)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    tl.store(pointers, tile.to(x.base.dtype.element_ty), mask=in_window)


@triton.jit
def strided_pointers(x, batch, head, queries, keys):
    """Pointers into a StridedTensor at broadcastable `queries` and `keys`."""
    base = (
        x.ptr
        + tl.cast(batch, tl.int64) * _aligned_stride(x, x.stride_b)
        + tl.cast(head, tl.int64) * _aligned_stride(x, x.stride_h)
    )
    return base + queries * tl.cast(_aligned_stride(x, x.stride_q), tl.int64) + keys * tl.cast(x.stride_k, tl.int64)


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


@triton.jit
def tanh(x):
    """tanh to float32 rounding: a Taylor series near 0, where the exponential form cancels."""
    x2 = x * x
    series = x + x * x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0))))
    quotient = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
    return tl.where(x2 < 0.0625, series, quotient)


@triton.jit
def _hint_contiguous(rows, origin):
    """`[M, 1]` or `[1, N]` rows as positions relative to `origin`, with the hint that they are contiguous and begin at
    a multiple of their number. Hints only stick to values computed here; Triton drops them for function arguments.
    """
    positions = rows - origin
    positions = tl.max_contiguous(positions, [positions.shape[0], positions.shape[1]])
    return tl.multiple_of(positions, [positions.shape[0], positions.shape[1]])


@triton.jit
def load_bias(mods, batch_q, head, queries, keys, in_window, query_origin, key_origin):
    """Bias tile at broadcastable `queries` and `keys`, float32: -inf where it hides the key or does not reach; 0
    without bias.

    `in_window` masks the load; None means a full block, which lies within the bias.
    """
    score_mod, bias = mods.score_mod, mods.bias
    if bias.ptr is None:
        return 0.0
    else:
        # Tiles begin at multiples of their size in the sequence (`get_block_range`), so loads can be vectorised.
        pos_q = _hint_contiguous(queries, query_origin)
        pos_k = _hint_contiguous(keys, key_origin)
        pointers = strided_pointers(bias, batch_q, head, pos_q, pos_k)
        if in_window is None:
            bias_tile = tl.load(pointers)
        else:
            in_bias = in_window & (pos_q < score_mod.bias_len_q) & (pos_k < score_mod.bias_len_k)
            bias_tile = tl.load(pointers, mask=in_bias, other=float("-inf"))
        return tl.where(bias_tile <= score_mod.bias_hidden, float("-inf"), bias_tile.to(tl.float32))


@triton.jit
def apply_score_mod(s, mods, bias_tile):
    """Softcap and bias: returns the logit in units of `softmax_scale_log2`, and d logit / d s, the slope of the
    softcap.

    `bias_tile` comes from `load_bias`.
    """
    score_mod = mods.score_mod
    slope = 1.0
    if score_mod.softcap is not None:
        s = s * score_mod.scale
        t = tanh(s / score_mod.softcap)
        s = score_mod.softcap * t
        slope = 1.0 - t * t
    if mods.bias.ptr is not None:
        if score_mod.softcap is None:
            s = s * score_mod.scale
        s = s + bias_tile
    return s, slope


@triton.jit
def softmax_scale_log2(mods):
    """Factor from `apply_score_mod` to exponents of 2: p = exp2(s * factor - row_max)."""
    if (mods.score_mod.softcap is None) and (mods.bias.ptr is None):
        return mods.score_mod.scale * LOG2E
    else:
        return LOG2E


@triton.jit
def dropout_row_words(score_mod, batch_head, queries):
    """Pad and factor of each query: the two Philox words that key its dropout hash (dropout.py)."""
    zero = (queries * 0).to(tl.uint32)
    row = zero + tl.cast(batch_head, tl.uint32)
    pad, factor, _, _ = tl.philox(
        tl.load(score_mod.seed), queries.to(tl.uint32), row, zero, zero, n_rounds=PHILOX_ROUNDS
    )
    return pad, factor | 1


@triton.jit
def dropout_keep(score_mod, pad, factor, first, offsets):
    """Which weights dropout keeps. `pad` and `factor` are per query and broadcastable; keys are `first + offsets`,
    where `first`, counted in the sequence, is a multiple of 16.
    """
    # From offsets alone, so that the compiler sees which two keys share a draw.
    half = offsets & PAIR
    x = (first + (offsets - half)).to(tl.uint32) * KEY_FACTOR
    x = ((x ^ (x >> 16)) ^ pad) * factor
    x = (x ^ (x >> 15)) * LAST_FACTOR
    x = x << (16 - 2 * half).to(tl.uint32)
    return x >= tl.cast(score_mod.drop_threshold, tl.uint32)


@triton.jit
def dot(a, b, acc=None):
    """Matrix product accumulated in float32; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")
