"""Portable forward kernel: one program per (query tile, head), online softmax over key blocks (FlashAttention-2).

Masked blocks first, then full blocks without masks; the same block function serves both. Where queries are few, a tile
holds the rows of all query heads that share keys (`PACK`), and programs may share the keys of a tile (split.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.structs import AttnMods, ScoreTile, Tiles
from hf_flashbsa.kernels.triton.block_range import (
    block_list_offsets,
    block_start,
    decode_tile_index,
    first_full_block,
    get_block_range,
    load_work_tile,
    partial_block_position,
)
from hf_flashbsa.kernels.triton.load import head_view, load_rows, load_tile, store_rows
from hf_flashbsa.kernels.triton.mask import apply_segment_mask, needs_segment_mask, visible_mask, window_mask
from hf_flashbsa.kernels.triton.score import (
    LN2,
    LOG2E,
    apply_score_mod,
    dot,
    dropout_keep,
    dropout_row_words,
    load_bias,
    softmax_scale_log2,
)
from hf_flashbsa.kernels.triton.split import keys_of_split


@triton.jit
def _forward_block(
    acc, row_max, row_sum, q_tile, k, v, n0, work_tile, block_range, mods, queries, head, pad, factor,
    tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key block from row `n0`: returns the updated `acc`, `row_max` (log2 units) and `row_sum`.

    `head` is that of all rows, or `[m, 1]`.
    """
    keys = n0 + tl.arange(0, tiles.n)
    in_window = None
    if MASKED:
        in_window = window_mask(
            mods.bounds, queries, keys, work_tile.end, block_range.lo, block_range.hi, work_tile.query_offset, False
        )
    # [n, d]
    k_block = load_tile(k, n0, block_range.lo, block_range.hi, tiles.head_dim, tiles.n, tiles.d, MASKED)
    # [m, n]
    score_tile = ScoreTile(
        work_tile.batch, work_tile.other_batch, head, queries[:, None], keys[None, :], work_tile.begin, n0,
        work_tile.query_origin, work_tile.key_origin, work_tile.query_offset,
    )  # fmt: skip
    bias_tile = load_bias(mods, score_tile, in_window)
    s = dot(q_tile, tl.trans(k_block))
    s, _ = apply_score_mod(s, mods, bias_tile, score_tile)
    if MASKED:
        ok = visible_mask(
            mods, work_tile.batch, head, queries[:, None], keys[None, :], in_window, work_tile.query_origin,
            work_tile.key_origin, work_tile.begin, n0, tiles,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        s = apply_segment_mask(
            s,
            mods.bounds,
            work_tile.batch,
            work_tile.other_batch,
            needs_segment_mask(work_tile),
            queries[:, None],
            keys[None, :],
        )
    scale_log2 = softmax_scale_log2(mods)
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    safe_max = new_max
    if MASKED or mods.bias.ptr is not None:
        # Rows without a visible key so far have maximum -inf: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(s * scale_log2 - safe_max[:, None])
    block_sum = tl.sum(p, 1)
    if mods.score_mod.seed is not None:
        offsets = tl.arange(0, tiles.n)[None, :]
        keep = dropout_keep(mods.score_mod, pad[:, None], factor[:, None], n0 - work_tile.key_origin, offsets)
        p = tl.where(keep, p, 0.0)
    row_scale = tl.math.exp2(row_max - safe_max)
    row_sum = row_sum * row_scale + block_sum
    acc = acc * row_scale[:, None]
    # [n, dv]
    v_block = load_tile(v, n0, block_range.lo, block_range.hi, tiles.head_dim_v, tiles.n, tiles.dv, MASKED)
    acc = dot(p.to(v_block.dtype), v_block, acc)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "batches"])
def forward_kernel(
    q, k, v, out, lse, sinks, schedule, bounds, dense_mask, blocks, score_mod, bias, query_offset, heads, group, len_q,
    len_k, num_tiles, split_keys, batches, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, SPARSE_BLOCK: tl.constexpr,
    MAX_BLOCKS_POW2: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Writes `out` and the natural-log `lse` `(B, Hq, Sq)`. Grid: tiles * heads / PACK * batch, tiles of a head
    adjacent; parts of the keys.

    `split_keys` is the number of keys of a part, if there are several: `out` and `lse` have `batches` batch rows of
    each, one behind the other. With `PACK` > 1, that many query heads share keys, and a tile has the rows of all.
    """
    tiles: tl.constexpr = Tiles(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    batch, head, tile = decode_tile_index(schedule, tl.program_id(0), num_tiles, heads // PACK, BLOCK_M)
    head *= PACK
    if schedule is None:
        # Causal: later tiles have more keys, so run them first (LPT), as a tile schedule does.
        tile = num_tiles - 1 - tile
    work_tile = load_work_tile(schedule, tile, batch, len_q, len_k, query_offset, bounds, BLOCK_M)
    if work_tile.begin >= work_tile.end:
        return
    out_batch = work_tile.batch
    if split_keys is not None:
        work_tile = keys_of_split(work_tile, tl.program_id(1), split_keys)
        out_batch += tl.program_id(1) * batches
    rows = tl.arange(0, BLOCK_M)
    queries, row_head, tile_head = work_tile.begin + rows, head, head
    if PACK > 1:
        queries, row_head = work_tile.begin + rows // PACK, head + rows % PACK
        tile_head = row_head[:, None]
    block_range = get_block_range(work_tile, mods, head, block_list_offsets(tiles), tiles, False)
    q_tile = load_rows(q, work_tile.batch, head, work_tile.begin, work_tile.end, HEAD_DIM, BLOCK_M, BLOCK_D, PACK)
    k_head = head_view(k, work_tile.other_batch, head // group)
    v_head = head_view(v, work_tile.other_batch, head // group)
    pad, factor = 0, 0
    if score_mod.seed is not None:
        pad, factor = dropout_row_words(score_mod, work_tile.batch * heads + head, queries)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, block_range.num_partial):
        n0 = block_start(block_range, blocks, partial_block_position(block_range, index, BLOCK_N, tiles), tiles)
        acc, row_max, row_sum = _forward_block(
            acc,
            row_max,
            row_sum,
            q_tile,
            k_head,
            v_head,
            n0,
            work_tile,
            block_range,
            mods,
            queries,
            tile_head,
            pad,
            factor,
            tiles,
            True,
        )
    next_start = first_full_block(block_range, blocks, tiles)
    for position in range(block_range.full_begin, block_range.full_end, BLOCK_N):
        n0 = position
        if SPARSE_BLOCK > 0:
            n0 = next_start
            next_start = block_start(
                block_range, blocks, tl.minimum(position + BLOCK_N, block_range.full_end - 1), tiles
            )
        acc, row_max, row_sum = _forward_block(
            acc,
            row_max,
            row_sum,
            q_tile,
            k_head,
            v_head,
            n0,
            work_tile,
            block_range,
            mods,
            queries,
            tile_head,
            pad,
            factor,
            tiles,
            False,
        )
    if sinks is not None:
        # Rows without visible keys keep weight 0.
        sink = tl.where(row_max == float("-inf"), float("-inf"), tl.load(sinks + row_head) * LOG2E)
        new_max = tl.maximum(row_max, sink)
        new_max = tl.where(new_max == float("-inf"), 0.0, new_max)
        row_scale = tl.math.exp2(row_max - new_max)
        acc = acc * row_scale[:, None]
        row_sum = row_sum * row_scale + tl.math.exp2(sink - new_max)
        row_max = new_max
    inverse = tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    if score_mod.seed is not None:
        inverse = inverse * score_mod.keep_scale
    lse_offset = (tl.cast(out_batch, tl.int64) * heads + row_head) * len_q + queries
    tl.store(lse + lse_offset, (row_max + tl.math.log2(row_sum)) * LN2, mask=queries < work_tile.end)
    store_rows(
        out, out_batch, head, work_tile.begin, work_tile.end, acc * inverse[:, None], HEAD_DIM_V, BLOCK_M, BLOCK_DV,
        PACK,
    )  # fmt: skip
