"""Portable backward kernels. They recompute P from lse; none uses atomics, so results are deterministic.

- `dq_kernel`: one program per query tile, loop over keys; computes delta and stores the row statistics first
  (row_stats.py).
- `dkdv_kernel`: one program per key tile, loop over the query heads of its group and over queries; reads the
  statistics.
- `dbias_kernel`: one program per bias tile, loop over the sequences and heads that the bias is broadcast over.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.structs import AttnMods, ScoreTile, Tiles
from hf_flashbsa.kernels.tables import SequenceColumn
from hf_flashbsa.kernels.triton.block_range import (
    block_list_offsets,
    block_start,
    decode_tile_index,
    get_block_range,
    load_work_tile,
    partial_block_position,
)
from hf_flashbsa.kernels.triton.load import head_view, load_tile, store_tile, strided_pointers
from hf_flashbsa.kernels.triton.mask import (
    apply_segment_mask,
    block_pointer,
    needs_segment_mask,
    visible_mask,
    window_mask,
)
from hf_flashbsa.kernels.triton.row_stats import load_row_stats, read_row_stats, store_row_stats
from hf_flashbsa.kernels.triton.score import apply_score_mod, dot, dropout_keep, load_bias, softmax_scale_log2

SEQUENCE_COLUMNS: tl.constexpr = tl.constexpr(len(SequenceColumn))
BATCH_Q: tl.constexpr = tl.constexpr(int(SequenceColumn.BATCH_Q))
BEGIN_Q: tl.constexpr = tl.constexpr(int(SequenceColumn.BEGIN_Q))
END_Q: tl.constexpr = tl.constexpr(int(SequenceColumn.END_Q))
BATCH_K: tl.constexpr = tl.constexpr(int(SequenceColumn.BATCH_K))
BEGIN_K: tl.constexpr = tl.constexpr(int(SequenceColumn.BEGIN_K))
END_K: tl.constexpr = tl.constexpr(int(SequenceColumn.END_K))
SEQUENCE_QUERY_OFFSET: tl.constexpr = tl.constexpr(int(SequenceColumn.QUERY_OFFSET))


@triton.jit
def _dkdv_block(
    dk, dv, k_tile, v_tile, q, dout, stats, stats_stride, m0, work_tile, block_range, mods, head, heads, len_q,
    tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One query block from row `m0`: dv += P^T dO, dk += dS^T Q (unscaled). Scores are transposed, `[n, m]`."""
    queries = m0 + tl.arange(0, tiles.m)
    keys = work_tile.begin + tl.arange(0, tiles.n)
    in_window = None
    if MASKED:
        in_window = window_mask(
            mods.bounds, keys, queries, work_tile.end, block_range.lo, block_range.hi, work_tile.query_offset, True
        )
    batch_head = work_tile.other_batch * heads + head
    # [m, d]
    q_block = load_tile(q, m0, block_range.lo, block_range.hi, tiles.head_dim, tiles.m, tiles.d, MASKED)
    row_stats = read_row_stats(
        stats, stats_stride, mods.score_mod, batch_head, m0, block_range.lo, block_range.hi, len_q, tiles.m, MASKED
    )
    # [n, m]
    score_tile = ScoreTile(
        work_tile.other_batch, work_tile.batch, head, queries[None, :], keys[:, None], m0, work_tile.begin,
        work_tile.query_origin, work_tile.key_origin, work_tile.query_offset,
    )  # fmt: skip
    bias_tile = load_bias(mods, score_tile, in_window)
    s = dot(k_tile, tl.trans(q_block))
    s, slope = apply_score_mod(s, mods, bias_tile, score_tile)
    if MASKED:
        ok = visible_mask(
            mods, work_tile.other_batch, head, queries[None, :], keys[:, None], in_window, work_tile.query_origin,
            work_tile.key_origin, m0, work_tile.begin, tiles,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        s = apply_segment_mask(
            s,
            mods.bounds,
            work_tile.other_batch,
            work_tile.batch,
            needs_segment_mask(work_tile),
            queries[None, :],
            keys[:, None],
        )
    p = tl.math.exp2(s * softmax_scale_log2(mods) - row_stats.lse_log2[None, :])
    # [m, dv]
    do_block = load_tile(dout, m0, block_range.lo, block_range.hi, tiles.head_dim_v, tiles.m, tiles.dv, MASKED)
    dp = dot(v_tile, tl.trans(do_block))
    p_dropped = p
    if mods.score_mod.seed is not None:
        first, offsets = work_tile.begin - work_tile.key_origin, tl.arange(0, tiles.n)[:, None]
        keep = dropout_keep(mods.score_mod, row_stats.pad[None, :], row_stats.factor[None, :], first, offsets)
        p_dropped = tl.where(keep, p * mods.score_mod.keep_scale, 0.0)
        dp = tl.where(keep, dp * mods.score_mod.keep_scale, 0.0)
    dv = dot(p_dropped.to(do_block.dtype), do_block, dv)
    ds = p * (dp - row_stats.delta[None, :]) * slope
    dk = dot(ds.to(q_block.dtype), q_block, dk)
    return dk, dv


@triton.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "stats_stride"])
def dkdv_kernel(
    dout, dk_out, dv_out, q, k, v, stats, stats_stride, schedule, bounds, dense_mask, blocks, score_mod, bias,
    query_offset, heads, group, len_q, len_k, num_tiles, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPARSE_BLOCK: tl.constexpr, MAX_BLOCKS_POW2: tl.constexpr,
):  # fmt: skip
    """Writes `dk` and `dv`. Grid: key tiles * key heads * batch."""
    tiles: tl.constexpr = Tiles(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    batch, head_k, tile = decode_tile_index(schedule, tl.program_id(0), num_tiles, heads // group, BLOCK_N)
    work_tile = load_work_tile(schedule, tile, batch, len_k, len_q, query_offset, bounds, BLOCK_N)
    if work_tile.begin >= work_tile.end:
        return
    block_range = get_block_range(work_tile, mods, head_k * group, block_list_offsets(tiles), tiles, True)
    k_head = head_view(k, work_tile.batch, head_k)
    v_head = head_view(v, work_tile.batch, head_k)
    k_tile = load_tile(k_head, work_tile.begin, 0, work_tile.end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v_head, work_tile.begin, 0, work_tile.end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(head_k * group, head_k * group + group):
        head_range = block_range
        if tiles.sparse_block > 0:
            head_range = get_block_range(work_tile, mods, head, block_list_offsets(tiles), tiles, True)
        q_head = head_view(q, work_tile.other_batch, head)
        dout_head = head_view(dout, work_tile.other_batch, head)
        for index in range(0, head_range.num_partial):
            m0 = block_start(head_range, blocks, partial_block_position(head_range, index, BLOCK_M, tiles), tiles)
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_head, dout_head, stats, stats_stride, m0, work_tile, head_range, mods, head,
                heads, len_q, tiles, True,
            )  # fmt: skip
        for position in range(head_range.full_begin, head_range.full_end, BLOCK_M):
            m0 = block_start(head_range, blocks, position, tiles)
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_head, dout_head, stats, stats_stride, m0, work_tile, head_range, mods, head,
                heads, len_q, tiles, False,
            )  # fmt: skip
    dk_head = head_view(dk_out, work_tile.batch, head_k)
    dv_head = head_view(dv_out, work_tile.batch, head_k)
    store_tile(dk_head, work_tile.begin, work_tile.end, dk * score_mod.scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_head, work_tile.begin, work_tile.end, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit
def _score_gradient(
    q_tile, do_tile, row_stats, k_block, v_block, bias_tile, score_tile, in_window, needs_mask, mods,
    tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dS = P * (dP - delta), `[m, n]`, with respect to the biased score, and the slope of the softcap."""
    s = dot(q_tile, tl.trans(k_block))
    s, slope = apply_score_mod(s, mods, bias_tile, score_tile)
    batch_q, queries, keys = score_tile.batch_q, score_tile.queries, score_tile.keys
    if MASKED:
        ok = visible_mask(
            mods, batch_q, score_tile.head, queries, keys, in_window, score_tile.query_origin, score_tile.key_origin,
            score_tile.first_q, score_tile.first_k, tiles,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        s = apply_segment_mask(s, mods.bounds, batch_q, score_tile.batch_k, needs_mask, queries, keys)
    p = tl.math.exp2(s * softmax_scale_log2(mods) - row_stats.lse_log2[:, None])
    dp = dot(do_tile, tl.trans(v_block))
    if mods.score_mod.seed is not None:
        offsets = tl.arange(0, tiles.n)[None, :]
        keep = dropout_keep(
            mods.score_mod, row_stats.pad[:, None], row_stats.factor[:, None],
            score_tile.first_k - score_tile.key_origin, offsets,
        )  # fmt: skip
        dp = tl.where(keep, dp * mods.score_mod.keep_scale, 0.0)
    return p * (dp - row_stats.delta[:, None]), slope


@triton.jit
def _dq_block(
    dq, q_tile, do_tile, row_stats, k, v, n0, work_tile, block_range, mods, head, tiles: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key block from row `n0`: dq += dS K (unscaled)."""
    queries = work_tile.begin + tl.arange(0, tiles.m)
    keys = n0 + tl.arange(0, tiles.n)
    in_window = None
    if MASKED:
        in_window = window_mask(
            mods.bounds, queries, keys, work_tile.end, block_range.lo, block_range.hi, work_tile.query_offset, False
        )
    k_block = load_tile(k, n0, block_range.lo, block_range.hi, tiles.head_dim, tiles.n, tiles.d, MASKED)
    v_block = load_tile(v, n0, block_range.lo, block_range.hi, tiles.head_dim_v, tiles.n, tiles.dv, MASKED)
    score_tile = ScoreTile(
        work_tile.batch, work_tile.other_batch, head, queries[:, None], keys[None, :], work_tile.begin, n0,
        work_tile.query_origin, work_tile.key_origin, work_tile.query_offset,
    )  # fmt: skip
    bias_tile = load_bias(mods, score_tile, in_window)
    ds, slope = _score_gradient(
        q_tile, do_tile, row_stats, k_block, v_block, bias_tile, score_tile, in_window, needs_segment_mask(work_tile),
        mods, tiles, MASKED,
    )  # fmt: skip
    return dot((ds * slope).to(k_block.dtype), k_block, dq)


@triton.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "stats_stride"])
def dq_kernel(
    dout, dq_out, q, k, v, out, lse, dlse, stats, stats_stride, schedule, bounds, dense_mask, blocks, score_mod, bias,
    query_offset, heads, group, len_q, len_k, num_tiles, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPARSE_BLOCK: tl.constexpr, MAX_BLOCKS_POW2: tl.constexpr,
):  # fmt: skip
    """Writes `dq` and `stats` (row_stats.py). Grid: query tiles * heads * batch."""
    tiles: tl.constexpr = Tiles(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    batch, head, tile = decode_tile_index(schedule, tl.program_id(0), num_tiles, heads, BLOCK_M)
    if schedule is None:
        tile = num_tiles - 1 - tile
    work_tile = load_work_tile(schedule, tile, batch, len_q, len_k, query_offset, bounds, BLOCK_M)
    if work_tile.begin >= work_tile.end:
        return
    block_range = get_block_range(work_tile, mods, head, block_list_offsets(tiles), tiles, False)
    queries = work_tile.begin + tl.arange(0, BLOCK_M)
    batch_head, live = work_tile.batch * heads + head, queries < work_tile.end
    row_stats = load_row_stats(lse, dlse, score_mod, batch_head, queries, live, len_q)
    out_head = head_view(out, work_tile.batch, head)
    dout_head = head_view(dout, work_tile.batch, head)
    out_tile = load_tile(out_head, work_tile.begin, 0, work_tile.end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    do_tile = load_tile(dout_head, work_tile.begin, 0, work_tile.end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    out_dot_dout = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    row_stats = store_row_stats(
        row_stats, out_dot_dout, stats, stats_stride, score_mod, batch_head, queries, live, len_q
    )
    q_tile = load_tile(
        head_view(q, work_tile.batch, head), work_tile.begin, 0, work_tile.end, HEAD_DIM, BLOCK_M, BLOCK_D, True
    )
    k_head = head_view(k, work_tile.other_batch, head // group)
    v_head = head_view(v, work_tile.other_batch, head // group)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, block_range.num_partial):
        n0 = block_start(block_range, blocks, partial_block_position(block_range, index, BLOCK_N, tiles), tiles)
        dq = _dq_block(
            dq, q_tile, do_tile, row_stats, k_head, v_head, n0, work_tile, block_range, mods, head, tiles, True
        )
    for position in range(block_range.full_begin, block_range.full_end, BLOCK_N):
        n0 = block_start(block_range, blocks, position, tiles)
        dq = _dq_block(
            dq, q_tile, do_tile, row_stats, k_head, v_head, n0, work_tile, block_range, mods, head, tiles, False
        )
    dq_head = head_view(dq_out, work_tile.batch, head)
    store_tile(dq_head, work_tile.begin, work_tile.end, dq * score_mod.scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_sequences", "bias_batch", "stats_stride"])
def dbias_kernel(
    dout, dbias, q, k, v, stats, stats_stride, sequences, bounds, dense_mask, blocks, score_mod, bias, query_offset,
    num_sequences, heads, group, bias_batch, bias_heads, len_q, len_k, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, SPARSE_BLOCK: tl.constexpr, MAX_BLOCKS_POW2: tl.constexpr,
):  # fmt: skip
    """Writes `dbias`, a StridedTensor: the sum of dS over `num_sequences` sequences, from a sequence table
    (`tables.SequenceColumn`) or whole batch rows. Grid: key tiles, query tiles, bias batch * bias heads.
    """
    tiles: tl.constexpr = Tiles(
        BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    pos_n = tl.program_id(0) * BLOCK_N
    pos_m = tl.program_id(1) * BLOCK_M
    bias_batch_index = tl.program_id(2) // bias_heads
    bias_head = tl.program_id(2) % bias_heads
    rows_m = pos_m + tl.arange(0, BLOCK_M)
    cols_n = pos_n + tl.arange(0, BLOCK_N)
    in_bias = (rows_m < score_mod.bias_len_q)[:, None] & (cols_n < score_mod.bias_len_k)[None, :]
    # Loaded once: along the dimensions that the loop runs over, the bias is broadcast.
    place = ScoreTile(
        bias_batch_index, bias_batch_index, bias_head, rows_m[:, None], cols_n[None, :], pos_m, pos_n, 0, 0, 0
    )
    bias_tile = load_bias(mods, place, in_bias)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The loop runs over sequences and heads that share this tile of the bias.
    shared_heads = heads // bias_heads
    for index in range(0, (num_sequences // bias_batch) * shared_heads):
        sequence = bias_batch_index + index // shared_heads
        head = bias_head + index % shared_heads
        batch_q, q_begin, q_end = sequence, 0, len_q
        batch_k, k_begin, k_end = sequence, 0, len_k
        offset = query_offset
        if sequences is not None:
            entry = sequences + sequence * SEQUENCE_COLUMNS
            batch_q, q_begin, q_end = tl.load(entry + BATCH_Q), tl.load(entry + BEGIN_Q), tl.load(entry + END_Q)
            batch_k, k_begin, k_end = tl.load(entry + BATCH_K), tl.load(entry + BEGIN_K), tl.load(entry + END_K)
            offset = tl.load(entry + SEQUENCE_QUERY_OFFSET)
        m0, n0 = q_begin + pos_m, k_begin + pos_n
        # Loads under a condition are not pipelined: none at all where every tile is visible.
        is_visible = True
        if sequences is not None:
            is_visible = (m0 < q_end) & (n0 < k_end)
        if bounds.window_right is not None:
            is_visible = is_visible & (n0 <= tl.minimum(m0 + BLOCK_M, q_end) - 1 + offset + bounds.window_right)
        if bounds.window_left is not None:
            is_visible = is_visible & (tl.minimum(n0 + BLOCK_N, k_end) - 1 >= m0 + offset - bounds.window_left)
        if tiles.sparse_block > 0:
            # The grid of a layout may be smaller than the bias.
            is_visible = is_visible & (
                tl.load(block_pointer(blocks, batch_q, head, pos_m, pos_n, tiles), mask=is_visible, other=0) != 0
            )
        if is_visible:
            queries = m0 + tl.arange(0, BLOCK_M)
            keys = n0 + tl.arange(0, BLOCK_N)
            in_window = window_mask(bounds, queries, keys, q_end, k_begin, k_end, offset, False)
            row_stats = read_row_stats(
                stats, stats_stride, score_mod, batch_q * heads + head, m0, 0, q_end, len_q, BLOCK_M, True
            )
            q_tile = load_tile(head_view(q, batch_q, head), m0, 0, q_end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            do_tile = load_tile(head_view(dout, batch_q, head), m0, 0, q_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
            k_block = load_tile(head_view(k, batch_k, head // group), n0, 0, k_end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            v_block = load_tile(
                head_view(v, batch_k, head // group), n0, 0, k_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True
            )
            score_tile = ScoreTile(
                batch_q, batch_k, head, queries[:, None], keys[None, :], m0, n0, q_begin, k_begin, offset
            )
            ds, _ = _score_gradient(
                q_tile, do_tile, row_stats, k_block, v_block, bias_tile, score_tile, in_window, True, mods, tiles, True
            )
            total += ds
    pointers = strided_pointers(dbias, bias_batch_index, bias_head, rows_m[:, None], cols_n[None, :])
    tl.store(pointers, total.to(dbias.ptr.dtype.element_ty), mask=in_bias)
