"""The vocabulary of the Triton kernels.

Each question that a variant of attention asks has one helper here: where a tile's rows live (`work_item`), which
rows of the other side it visits (`span_of`), which scores of a block exist (`visible`), how a score is changed
(`bias_tile`, `logits`), which weights are dropped (`dropout_keep`). Arguments that are None at launch specialise the
code away.

Scores are held in the layout of the loop that uses them: queries by keys, or with `TRANSPOSED`, keys by queries.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels import dropout
from hf_flashbsa.kernels.records import Head, Item, Span

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
#: Rows per entry of a work table, and its columns (`AttentionSpec.work`).
WORK_TILE: tl.constexpr = tl.constexpr(128)
WORK_COLUMNS: tl.constexpr = tl.constexpr(12)
#: Constants of the dropout mask (dropout.py).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)
KEY_FACTOR: tl.constexpr = tl.constexpr(dropout.KEY_FACTOR)
LAST_FACTOR: tl.constexpr = tl.constexpr(dropout.LAST_FACTOR)
PAIR: tl.constexpr = tl.constexpr(dropout.PAIR)


@triton.jit
def scheduled(work, place, num_tiles, heads, BLOCK: tl.constexpr):
    """Batch row, head and tile of a program's place in the order of all: the tiles of a head side by side, whose keys
    and values they share. Entries of a work table span the batch, those with the most work first: the first of each
    head comes before all others, because a block layout may have rows that take as long as many."""
    if work is None:
        return place // (num_tiles * heads), (place // num_tiles) % heads, place % num_tiles
    else:
        FIRST: tl.constexpr = WORK_TILE // BLOCK
        later = place - heads * FIRST
        rest = tl.maximum(num_tiles - FIRST, 1)
        head = tl.where(later < 0, place // FIRST, later // rest)
        return 0, head, tl.where(later < 0, place % FIRST, FIRST + later % rest)


@triton.jit
def work_item(work, tile, batch, len_own, len_other, diagonal, BLOCK: tl.constexpr):
    """The `tile`-th tile of `BLOCK` own rows: from the work table, or of batch row `batch` where there is none."""
    if work is not None:
        PARTS: tl.constexpr = WORK_TILE // BLOCK
        entry = work + (tile // PARTS) * WORK_COLUMNS
        begin = tl.load(entry + 1) + (tile % PARTS) * BLOCK
        end = tl.minimum(begin + BLOCK, tl.load(entry + 2))
        item = Item(
            tl.load(entry), begin, end, tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5),
            tl.load(entry + 6), tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9), tl.load(entry + 10),
        )  # fmt: skip
    else:
        begin = tile * BLOCK
        end = tl.minimum(begin + BLOCK, len_own)
        item = Item(batch, begin, end, batch, 0, 0, len_other, len_other, diagonal, 0, 0)
    return item


@triton.jit
def list_entries(tiles: tl.constexpr):
    """The entries of a list of blocks, for `span_of`."""
    if tiles.listed == 0:
        return 0
    else:
        return tl.arange(0, tiles.width)


@triton.jit
def list_of(item, blocks, head, lo, hi, tiles: tl.constexpr, TRANSPOSED: tl.constexpr):
    """Pointer to what a layout lists for a tile that meets `[lo, hi)` of the other side."""
    own_origin = item.key_origin if TRANSPOSED else item.query_origin
    row = blocks.lists + tl.cast(item.row, tl.int64) * blocks.stride_b + tl.cast(head, tl.int64) * blocks.stride_h
    # Tiles that meet nothing may lie beyond the grid.
    own = tl.where(lo < hi, (item.begin - own_origin) // tiles.listed, 0)
    return row + tl.cast(own, tl.int64) * blocks.stride_row


@triton.jit
def span_of(item, rules, head, entries, tiles: tl.constexpr, TRANSPOSED: tl.constexpr):
    """What a tile of queries visits of the keys; with `TRANSPOSED`, what a tile of keys visits of the queries.

    `entries` are those of `list_entries`.
    """
    blocks = rules.blocks
    # Row i of the tile meets rows i + offset - before .. i + offset + after of the other side.
    if TRANSPOSED:
        BLOCK: tl.constexpr = tiles.m
        OWN: tl.constexpr = tiles.n
        own_origin, other_origin, offset = item.key_origin, item.query_origin, -item.diagonal
        before, after = rules.mask.window_right, rules.mask.window_left
    else:
        BLOCK: tl.constexpr = tiles.n
        OWN: tl.constexpr = tiles.m
        own_origin, other_origin, offset = item.query_origin, item.key_origin, item.diagonal
        before, after = rules.mask.window_left, rules.mask.window_right
    lo, full_lo, full_hi, hi = item.lo, item.full_lo, item.full_hi, item.hi
    first, last = item.begin + offset, item.end - 1 + offset
    if after is not None:
        hi = tl.minimum(hi, last + after + 1)
        full_hi = tl.minimum(full_hi, first + after + 1)
    if before is not None:
        lo = tl.maximum(lo, first - before)
        full_lo = tl.maximum(full_lo, last - before)
    hi = tl.maximum(hi, lo)
    has_full = rules.dense.ptr is None  # a dense mask leaves no block without masking
    first_block = lo
    if rules.bias.ptr is not None:
        # Full blocks are those that the bias reaches as well.
        if TRANSPOSED:
            own_reach, reach = rules.score.bias_len_k, rules.score.bias_len_q
        else:
            own_reach, reach = rules.score.bias_len_q, rules.score.bias_len_k
        has_full = has_full & (item.end - item.begin == OWN) & (item.end - own_origin <= own_reach)
        full_hi = tl.minimum(full_hi, other_origin + reach)
        # A tile that meets nothing may lie anywhere, where what `_places` promises does not hold: it visits nothing.
        meets = lo < hi
        lo, hi = tl.where(meets, lo, other_origin), tl.where(meets, hi, other_origin)
    if (rules.bias.ptr is not None) or (rules.score.seed is not None):
        # Where `bias_tile` and `dropout_keep` expect blocks to begin.
        first_block = tl.where(lo < hi, other_origin + (lo - other_origin) // BLOCK * BLOCK, lo)
    if tiles.listed == 0:
        begin, end = first_block, hi
        full_begin = begin + (tl.maximum(full_lo - begin, 0) + BLOCK - 1) // BLOCK * BLOCK
        full_end = begin + tl.maximum(full_hi - begin, 0) // BLOCK * BLOCK
        index, listed, listed_end = 0, 0, 0
    else:
        # Lists ascend, so bounds cut them; how far, a count over the whole list tells without a search.
        SIZE: tl.constexpr = tiles.listed
        row = list_of(item, blocks, head, lo, hi, tiles, TRANSPOSED)
        full, total = tl.load(row), tl.load(row + 1)
        index = row + 2
        block = other_origin + tl.load(index + entries, mask=entries < total, other=0) * SIZE
        is_full, is_partial = entries < full, (entries >= full) & (entries < total)
        below, reached = block + SIZE <= lo, block < hi
        begin = tl.sum((is_full & below).to(tl.int32), 0) * SIZE
        end = tl.sum((is_full & reached).to(tl.int32), 0) * SIZE
        full_begin = tl.sum((is_full & (block < full_lo)).to(tl.int32), 0) * SIZE
        full_end = tl.sum((is_full & (block + SIZE <= full_hi)).to(tl.int32), 0) * SIZE
        listed = (full + tl.sum((is_partial & below).to(tl.int32), 0)) * SIZE
        listed_end = (full + tl.sum((is_partial & reached).to(tl.int32), 0)) * SIZE
    has_full = has_full & (full_end > full_begin)
    full_begin = tl.where(has_full, full_begin, begin)
    full_end = tl.where(has_full, full_end, begin)
    left = (full_begin - begin) // BLOCK
    right = left + (end - full_end + BLOCK - 1) // BLOCK
    partial = right + (listed_end - listed) // BLOCK
    return Span(begin, left, right, partial, full_begin, full_end, listed, lo, hi, index, other_origin)


@triton.jit
def place_of(span, blocks, position, tiles: tl.constexpr):
    """The row that a position stands for."""
    if tiles.listed == 0:
        return position
    else:
        SIZE: tl.constexpr = tiles.listed
        return span.origin + tl.load(span.index + position // SIZE) * SIZE + position % SIZE


@triton.jit
def first_full(span, blocks, tiles: tl.constexpr):
    """The row of the first full block, if there is one. Listed blocks are looked up one ahead: Triton loads indices
    that it finds in a loop together with tiles, of which it then prefetches but one."""
    if tiles.listed == 0:
        return 0
    else:
        return place_of(span, blocks, tl.where(span.full_begin < span.full_end, span.full_begin, 0), tiles)


@triton.jit
def partial_position(span, index, BLOCK: tl.constexpr, tiles: tl.constexpr):
    """Where the `index`-th partial block begins."""
    position = span.begin + index * BLOCK + tl.where(index >= span.left, span.full_end - span.full_begin, 0)
    if tiles.listed > 0:
        position = tl.where(index >= span.right, span.listed + (index - span.right) * BLOCK, position)
    return position


@triton.jit
def _stride(x, stride):
    """A stride of an Operand or a Matrix. Without the step, Triton would load rows of 40 or 72 elements one by one."""
    if x.wide is None:
        return stride
    else:
        step: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
        return stride // step * step


@triton.jit
def head_of(x, batch, head):
    """One head of an Operand. Where rows do not begin at multiples of 16 bytes, tiles must be too small for wgmma,
    with which Triton 3.6 has computed wrong outputs where keys and values both load one by one: seen with head dims of
    40 and 8, though not with equal ones."""
    base = x.ptr + tl.cast(batch, tl.int64) * _stride(x, x.stride_b) + tl.cast(head, tl.int64) * _stride(x, x.stride_h)
    return Head(base, _stride(x, x.stride_s))


@triton.jit
def tile_pointers(x, begin, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Pointers `[BLOCK, BLOCK_DIM]` of a Head from row `begin` on; 64-bit where a sequence's length enters."""
    offsets = tl.arange(0, BLOCK)[:, None] * x.stride + tl.arange(0, BLOCK_DIM)[None, :]
    return x.base + tl.cast(begin, tl.int64) * x.stride + offsets


@triton.jit
def load_tile(x, begin, lo, hi, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr):
    """Rows from `begin` of a Head, `[BLOCK, BLOCK_DIM]`: 0 outside `[lo, hi)` (where `CHECK`) and beyond `DIM`."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    dims = tl.arange(0, BLOCK_DIM)
    if CHECK:
        rows = begin + tl.arange(0, BLOCK)
        inside = ((rows >= lo) & (rows < hi))[:, None]
        if DIM < BLOCK_DIM:
            inside = inside & (dims < DIM)[None, :]
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        if DIM < BLOCK_DIM:
            tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(x, begin, end, tile, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Writes rows `[begin, end)` of a Head."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    inside = (begin + tl.arange(0, BLOCK) < end)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    tl.store(pointers, tile.to(x.base.dtype.element_ty), mask=inside)


@triton.jit
def matrix_pointers(x, batch, head, queries, keys):
    """Pointers of a Matrix at broadcastable `queries` and `keys`."""
    base = x.ptr + tl.cast(batch, tl.int64) * _stride(x, x.stride_b) + tl.cast(head, tl.int64) * _stride(x, x.stride_h)
    return base + queries * tl.cast(_stride(x, x.stride_q), tl.int64) + keys * tl.cast(x.stride_k, tl.int64)


@triton.jit
def bounds(mask, rows, lo, hi, diagonal, TRANSPOSED: tl.constexpr):
    """Of `rows`, from which of the others on and up to which (exclusive) of `[lo, hi)` the window lets them meet. Rows
    are queries and the others keys; with `TRANSPOSED`, the other way round."""
    if TRANSPOSED:
        offset, before, after = -diagonal, mask.window_right, mask.window_left
    else:
        offset, before, after = diagonal, mask.window_left, mask.window_right
    if before is not None:
        lo = tl.maximum(lo, rows + offset - before)
    if after is not None:
        hi = tl.minimum(hi, rows + offset + after + 1)
    return lo, hi


@triton.jit
def within(mask, rows, others, end, lo, hi, diagonal, TRANSPOSED: tl.constexpr):
    """`[rows, others]`: which `others` of `[lo, hi)` the window lets the rows before `end` meet.

    Two comparisons per score, both of which differ from row to row: those that rows share would all be made ahead of
    time, and held in registers that are short.
    """
    first, behind = tl.where(rows < end, lo, hi), tl.where(rows < end, hi, lo)
    first, behind = bounds(mask, rows, first, behind, diagonal, TRANSPOSED)
    return (others[None, :] >= first[:, None]) & (others[None, :] < behind[:, None])


@triton.jit
def visible(
    rules, row_q, head, queries, keys, inside, query_origin, key_origin, first_q, first_k, tiles: tl.constexpr
):
    """Which scores of a tile exist of those `inside` (`within`), given broadcastable `queries` and `keys`, of which
    `first_*` are the first, but for what `hide_segments` hides.
    """
    ok = inside
    if rules.dense.ptr is not None:
        shows = tl.load(matrix_pointers(rules.dense, row_q, head, queries, keys), mask=inside, other=0)
        ok = ok & (shows != 0)
    blocks = rules.blocks
    if tiles.listed > 0:
        if blocks.masks is not None:
            place_q, place_k = first_q - query_origin, first_k - key_origin
            kind = tl.load(block_pointer(blocks, row_q, head, place_q, place_k, tiles))
            ok = ok & shown(blocks, kind, place_q, place_k, queries - first_q, keys - first_k, tiles)
    return ok


@triton.jit
def asks_ids(item):
    """Whether segments hide anything that a tile meets."""
    return (item.full_lo > item.lo) | (item.full_hi < item.hi)


@triton.jit
def hide_segments(s, mask, row_q, row_k, asks, queries, keys):
    """Scores of broadcastable `queries` and `keys`, -inf where segments keep them apart; as they are unless `asks`."""
    if mask.segment_ids_k is not None:
        if asks:
            # Lengths guard the loads: with a guard for each score, each score would load ids of its own.
            ids_k = mask.segment_ids_k + tl.cast(row_k, tl.int64) * mask.ids_stride_k
            id_k = tl.load(ids_k + keys, mask=keys < mask.ids_length_k, other=-1)
            id_q = 0
            if mask.segment_ids_q is not None:
                ids_q = mask.segment_ids_q + tl.cast(row_q, tl.int64) * mask.ids_stride_q
                id_q = tl.load(ids_q + queries, mask=queries < mask.ids_length_q, other=-1)
            s = tl.where((id_k == id_q) & (id_k >= 0), s, float("-inf"))
    return s


@triton.jit
def shown(blocks, kind, place_q, place_k, rows, columns, tiles: tl.constexpr):
    """The entries of a block that the grid of a layout calls `kind`: those `rows` and `columns` behind a query and a
    key, all in this block, that are counted in their sequence."""
    SIZE: tl.constexpr = tiles.listed
    WORDS: tl.constexpr = SIZE // 32
    # No tile reaches over a block's edge, so that few words of each row hold its entries.
    masks = blocks.masks + tl.cast(tl.maximum(kind - 2, 0), tl.int64) * (SIZE * WORDS)
    words = masks + (place_k % SIZE) // 32 + (rows + place_q % SIZE) * WORDS
    word = tl.load(words, mask=kind >= 2, other=-1)
    for i in tl.static_range(1, columns.shape[0] * columns.shape[1] // 32):
        word = tl.where(columns // 32 == i, tl.load(words + i, mask=kind >= 2, other=-1), word)
    shift = columns % 32
    if tiles.n < 32:
        shift += place_k % 32
    return ((word >> shift) & 1) != 0


@triton.jit
def block_pointer(blocks, row_q, head, place_q, place_k, tiles: tl.constexpr):
    """Where the grid of a layout tells of the block that holds a query and a key, counted in their sequence."""
    SIZE: tl.constexpr = tiles.listed
    grid = (
        blocks.grid + tl.cast(row_q, tl.int64) * blocks.grid_stride_b + tl.cast(head, tl.int64) * blocks.grid_stride_h
    )
    return grid + tl.cast(place_q // SIZE, tl.int64) * blocks.grid_stride_q + place_k // SIZE


@triton.jit
def tanh(x):
    """tanh to float32 rounding, by its series near 0, where the quotient of exponentials cancels."""
    x2 = x * x
    series = x + x * x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0))))
    quotient = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
    return tl.where(x2 < 0.0625, series, quotient)


@triton.jit
def _places(rows, origin):
    """Where `[M, 1]` or `[1, N]` rows lie, counted from `origin`, with the promise that they follow each other from a
    multiple of their number on. Triton keeps promises of what is computed here, not of arguments."""
    places = rows - origin
    places = tl.max_contiguous(places, [places.shape[0], places.shape[1]])
    return tl.multiple_of(places, [places.shape[0], places.shape[1]])


@triton.jit
def bias_tile(rules, row_q, head, queries, keys, inside, query_origin, key_origin):
    """What is added to scores at broadcastable `queries` and `keys`: -inf where the bias hides the key or does not
    reach; 0 where there is no bias.

    `inside` guards places that tensors have; None stands for the whole of a tile, which the bias must reach.
    """
    score, bias = rules.score, rules.bias
    if bias.ptr is None:
        return 0.0
    else:
        # Tiles begin at multiples of their sizes, counted in their sequence (`span_of`), which lets loads be wide.
        place_q = _places(queries, query_origin)
        place_k = _places(keys, key_origin)
        pointers = matrix_pointers(bias, row_q, head, place_q, place_k)
        if inside is None:
            added = tl.load(pointers)
        else:
            reached = inside & (place_q < score.bias_len_q) & (place_k < score.bias_len_k)
            added = tl.load(pointers, mask=reached, other=float("-inf"))
        return tl.where(added <= score.bias_hidden, float("-inf"), added.to(tl.float32))


@triton.jit
def logits(s, rules, added):
    """The score that enters the softmax, divided by `log2_factor` and multiplied with log2(e); and d score / d s.

    `added` is that of `bias_tile`.
    """
    score = rules.score
    slope = 1.0
    if score.softcap is not None:
        s = s * score.scale
        t = tanh(s / score.softcap)
        s = score.softcap * t
        slope = 1.0 - t * t
    if rules.bias.ptr is not None:
        if score.softcap is None:
            s = s * score.scale
        s = s + added
    return s, slope


@triton.jit
def log2_factor(rules):
    """What turns `logits` into exponents of 2."""
    if (rules.score.softcap is None) and (rules.bias.ptr is None):
        return rules.score.scale * LOG2E
    else:
        return LOG2E


@triton.jit
def dropout_words(score, batch_head, queries):
    """Pad and factor of each query's dropout (dropout.py)."""
    zero = (queries * 0).to(tl.uint32)
    row = zero + tl.cast(batch_head, tl.uint32)
    pad, factor, _, _ = tl.philox(tl.load(score.seed), queries.to(tl.uint32), row, zero, zero, n_rounds=PHILOX_ROUNDS)
    return pad, factor | 1


@triton.jit
def dropout_keep(score, pad, factor, first, offsets):
    """Weights that dropout keeps, given broadcastable words of the queries, and of the keys the place of the first, a
    multiple of 16 (`span_of`), and the offsets from there."""
    # From offsets alone, so that the compiler sees which keys share a draw.
    half = offsets & PAIR
    x = (first + (offsets - half)).to(tl.uint32) * KEY_FACTOR
    x = ((x ^ (x >> 16)) ^ pad) * factor
    x = (x ^ (x >> 15)) * LAST_FACTOR
    x = x << (16 - 2 * half).to(tl.uint32)
    return x >= tl.cast(score.drop_threshold, tl.uint32)


@triton.jit
def dot(a, b, acc=None):
    """Matrix product in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")
