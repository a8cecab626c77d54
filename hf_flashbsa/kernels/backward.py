"""The portable backward kernels. All recompute the weights from `lse`; none uses atomics, so results repeat bitwise.

`dq_kernel` walks over keys for a tile of queries, and first makes what the others need of each query (rows.py);
`dkdv_kernel` walks over queries for a tile of keys, for every head that shares it; `dbias_kernel` sums a tile of score
gradients over the dimensions that the bias is broadcast in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.primitives import (
    asks_ids,
    bias_tile,
    block_pointer,
    dot,
    dropout_keep,
    head_of,
    hide_segments,
    list_entries,
    load_tile,
    log2_factor,
    logits,
    matrix_pointers,
    partial_position,
    place_of,
    scheduled,
    span_of,
    store_tile,
    visible,
    within,
    work_item,
)
from hf_flashbsa.kernels.records import Rules, Tiles
from hf_flashbsa.kernels.rows import begin_rows, finish_rows, read_rows


@triton.jit
def _dkdv_block(
    dk, dv, k_tile, v_tile, q, dout, rowwise, plane, m0, item, span, rules, head, heads, len_q,
    tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries from `m0`: adds its part to `dk` (before the scale) and `dv`. Scores are `[n, m]`."""
    queries = m0 + tl.arange(0, tiles.m)
    keys = item.begin + tl.arange(0, tiles.n)
    inside = None
    if MASKED:
        inside = within(rules.mask, keys, queries, item.end, span.lo, span.hi, item.diagonal, True)
    batch_head = item.other_row * heads + head
    # [m, d]
    q_block = load_tile(q, m0, span.lo, span.hi, tiles.head_dim, tiles.m, tiles.d, MASKED)
    rows = read_rows(rowwise, plane, rules.score, batch_head, m0, span.lo, span.hi, len_q, tiles.m, MASKED)
    # [n, m]
    added = bias_tile(
        rules, item.other_row, head, queries[None, :], keys[:, None], inside, item.query_origin, item.key_origin
    )
    s = dot(k_tile, tl.trans(q_block))
    s, slope = logits(s, rules, added)
    if MASKED:
        ok = visible(
            rules, item.other_row, head, queries[None, :], keys[:, None], inside, item.query_origin, item.key_origin,
            m0, item.begin, tiles,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        s = hide_segments(s, rules.mask, item.other_row, item.row, asks_ids(item), queries[None, :], keys[:, None])
    p = tl.math.exp2(s * log2_factor(rules) - rows.lse[None, :])
    # [m, dv]
    do_block = load_tile(dout, m0, span.lo, span.hi, tiles.head_dim_v, tiles.m, tiles.dv, MASKED)
    dp = dot(v_tile, tl.trans(do_block))
    p_kept = p
    if rules.score.seed is not None:
        first, offsets = item.begin - item.key_origin, tl.arange(0, tiles.n)[:, None]
        keep = dropout_keep(rules.score, rows.pad[None, :], rows.factor[None, :], first, offsets)
        p_kept = tl.where(keep, p * rules.score.keep_scale, 0.0)
        dp = tl.where(keep, dp * rules.score.keep_scale, 0.0)
    dv = dot(p_kept.to(do_block.dtype), do_block, dv)
    ds = p * (dp - rows.delta[None, :]) * slope
    dk = dot(ds.to(q_block.dtype), q_block, dk)
    return dk, dv


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "plane"])
def dkdv_kernel(
    dout, dk_out, dv_out, q, k, v, rowwise, plane, work, mask, dense, blocks, score, bias, diagonal, heads, group,
    len_q, len_k, num_tiles, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LISTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes `dk` and `dv`. Grid: tiles of keys * key heads * batch."""
    tiles: tl.constexpr = Tiles(BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    row, head_k, tile = scheduled(work, tl.program_id(0), num_tiles, heads // group, BLOCK_N)
    item = work_item(work, tile, row, len_k, len_q, diagonal, BLOCK_N)
    if item.begin >= item.end:
        return
    span = span_of(item, rules, head_k * group, list_entries(tiles), tiles, True)
    k_head = head_of(k, item.row, head_k)
    v_head = head_of(v, item.row, head_k)
    k_tile = load_tile(k_head, item.begin, 0, item.end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
    v_tile = load_tile(v_head, item.begin, 0, item.end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(head_k * group, head_k * group + group):
        visits = span
        if tiles.listed > 0:
            visits = span_of(item, rules, head, list_entries(tiles), tiles, True)
        q_head = head_of(q, item.other_row, head)
        dout_head = head_of(dout, item.other_row, head)
        for index in range(0, visits.partial):
            m0 = place_of(visits, blocks, partial_position(visits, index, BLOCK_M, tiles), tiles)
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_head, dout_head, rowwise, plane, m0, item, visits, rules, head,
                heads, len_q, tiles, True,
            )  # fmt: skip
        for position in range(visits.full_begin, visits.full_end, BLOCK_M):
            m0 = place_of(visits, blocks, position, tiles)
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_head, dout_head, rowwise, plane, m0, item, visits, rules, head,
                heads, len_q, tiles, False,
            )  # fmt: skip
    dk_head = head_of(dk_out, item.row, head_k)
    dv_head = head_of(dv_out, item.row, head_k)
    store_tile(dk_head, item.begin, item.end, dk * score.scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_head, item.begin, item.end, dv, HEAD_DIM_V, BLOCK_N, BLOCK_DV)


@triton.jit
def _score_gradient(
    q_tile, do_tile, rows, k_block, v_block, added, queries, first_q, n0, query_origin, key_origin, inside, asks,
    row_q, row_k, rules, head, tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`[m, n]` gradients of the biased score for keys from `n0`, and the softcap's slope."""
    keys = n0 + tl.arange(0, tiles.n)
    s = dot(q_tile, tl.trans(k_block))
    s, slope = logits(s, rules, added)
    if MASKED:
        ok = visible(
            rules, row_q, head, queries[:, None], keys[None, :], inside, query_origin, key_origin, first_q, n0, tiles
        )
        s = tl.where(ok, s, float("-inf"))
        s = hide_segments(s, rules.mask, row_q, row_k, asks, queries[:, None], keys[None, :])
    p = tl.math.exp2(s * log2_factor(rules) - rows.lse[:, None])
    dp = dot(do_tile, tl.trans(v_block))
    if rules.score.seed is not None:
        offsets = tl.arange(0, tiles.n)[None, :]
        keep = dropout_keep(rules.score, rows.pad[:, None], rows.factor[:, None], n0 - key_origin, offsets)
        dp = tl.where(keep, dp * rules.score.keep_scale, 0.0)
    return p * (dp - rows.delta[:, None]), slope


@triton.jit
def _dq_block(
    dq, q_tile, do_tile, rows, k, v, n0, item, span, rules, head, tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys from `n0`: adds its part to `dq` (before the scale)."""
    queries = item.begin + tl.arange(0, tiles.m)
    keys = n0 + tl.arange(0, tiles.n)
    inside = None
    if MASKED:
        inside = within(rules.mask, queries, keys, item.end, span.lo, span.hi, item.diagonal, False)
    k_block = load_tile(k, n0, span.lo, span.hi, tiles.head_dim, tiles.n, tiles.d, MASKED)
    v_block = load_tile(v, n0, span.lo, span.hi, tiles.head_dim_v, tiles.n, tiles.dv, MASKED)
    added = bias_tile(
        rules, item.row, head, queries[:, None], keys[None, :], inside, item.query_origin, item.key_origin
    )
    ds, slope = _score_gradient(
        q_tile, do_tile, rows, k_block, v_block, added, queries, item.begin, n0, item.query_origin, item.key_origin,
        inside, asks_ids(item), item.row, item.other_row, rules, head, tiles, MASKED,
    )  # fmt: skip
    return dot((ds * slope).to(k_block.dtype), k_block, dq)


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "plane"])
def dq_kernel(
    dout, dq_out, q, k, v, out, lse, dlse, rowwise, plane, work, mask, dense, blocks, score, bias, diagonal, heads,
    group, len_q, len_k, num_tiles, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LISTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes `dq` and `rowwise`. Grid: tiles of queries * heads * batch."""
    tiles: tl.constexpr = Tiles(BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    row, head, tile = scheduled(work, tl.program_id(0), num_tiles, heads, BLOCK_M)
    if work is None:
        tile = num_tiles - 1 - tile
    item = work_item(work, tile, row, len_q, len_k, diagonal, BLOCK_M)
    if item.begin >= item.end:
        return
    span = span_of(item, rules, head, list_entries(tiles), tiles, False)
    queries = item.begin + tl.arange(0, BLOCK_M)
    batch_head, live = item.row * heads + head, queries < item.end
    rows = begin_rows(lse, dlse, score, batch_head, queries, live, len_q)
    out_head = head_of(out, item.row, head)
    dout_head = head_of(dout, item.row, head)
    out_tile = load_tile(out_head, item.begin, 0, item.end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    do_tile = load_tile(dout_head, item.begin, 0, item.end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
    product = tl.sum(out_tile.to(tl.float32) * do_tile.to(tl.float32), 1)
    rows = finish_rows(rows, product, rowwise, plane, score, batch_head, queries, live, len_q)
    q_tile = load_tile(head_of(q, item.row, head), item.begin, 0, item.end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_head = head_of(k, item.other_row, head // group)
    v_head = head_of(v, item.other_row, head // group)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, span.partial):
        n0 = place_of(span, blocks, partial_position(span, index, BLOCK_N, tiles), tiles)
        dq = _dq_block(dq, q_tile, do_tile, rows, k_head, v_head, n0, item, span, rules, head, tiles, True)
    for position in range(span.full_begin, span.full_end, BLOCK_N):
        n0 = place_of(span, blocks, position, tiles)
        dq = _dq_block(dq, q_tile, do_tile, rows, k_head, v_head, n0, item, span, rules, head, tiles, False)
    dq_head = head_of(dq_out, item.row, head)
    store_tile(dq_head, item.begin, item.end, dq * score.scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "count", "bias_batch", "plane"])
def dbias_kernel(
    dout, dbias, q, k, v, rowwise, plane, sequences, mask, dense, blocks, score, bias, diagonal, count, heads, group,
    bias_batch, bias_heads, len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LISTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes `dbias`, a Matrix, from `count` sequences: those of a table (`AttentionSpec.sequence_table`) or whole
    batch rows. Grid: tiles of keys, tiles of queries, bias batch * bias heads.
    """
    tiles: tl.constexpr = Tiles(BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    place_n = tl.program_id(0) * BLOCK_N
    place_m = tl.program_id(1) * BLOCK_M
    bias_row = tl.program_id(2) // bias_heads
    bias_head = tl.program_id(2) % bias_heads
    places_m = place_m + tl.arange(0, BLOCK_M)
    places_n = place_n + tl.arange(0, BLOCK_N)
    reached = (places_m < score.bias_len_q)[:, None] & (places_n < score.bias_len_k)[None, :]
    # One tile for all: where sequences or heads differ in it, the loop has one of them.
    added = bias_tile(rules, bias_row, bias_head, places_m[:, None], places_n[None, :], reached, 0, 0)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Sequence and head run over the dimensions that the bias has size 1 in.
    shared_heads = heads // bias_heads
    for index in range(0, (count // bias_batch) * shared_heads):
        sequence = bias_row + index // shared_heads
        head = bias_head + index % shared_heads
        row_q, q_begin, q_end, row_k, k_begin, k_end, shift = sequence, 0, len_q, sequence, 0, len_k, diagonal
        if sequences is not None:
            entry = sequences + sequence * 7
            row_q, q_begin, q_end = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
            row_k, k_begin, k_end = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
            shift = tl.load(entry + 6)
        m0, n0 = q_begin + place_m, k_begin + place_n
        # Loads under a condition are not pipelined: there is none where every tile is met.
        met = True
        if sequences is not None:
            met = (m0 < q_end) & (n0 < k_end)
        if mask.window_right is not None:
            met = met & (n0 <= tl.minimum(m0 + BLOCK_M, q_end) - 1 + shift + mask.window_right)
        if mask.window_left is not None:
            met = met & (tl.minimum(n0 + BLOCK_N, k_end) - 1 >= m0 + shift - mask.window_left)
        if tiles.listed > 0:
            # Grids may end before the bias does.
            met = met & (tl.load(block_pointer(blocks, row_q, head, place_m, place_n, tiles), mask=met, other=0) != 0)
        if met:
            queries = m0 + tl.arange(0, BLOCK_M)
            keys = n0 + tl.arange(0, BLOCK_N)
            inside = within(mask, queries, keys, q_end, k_begin, k_end, shift, False)
            rows = read_rows(rowwise, plane, score, row_q * heads + head, m0, 0, q_end, len_q, BLOCK_M, True)
            q_tile = load_tile(head_of(q, row_q, head), m0, 0, q_end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
            do_tile = load_tile(head_of(dout, row_q, head), m0, 0, q_end, HEAD_DIM_V, BLOCK_M, BLOCK_DV, True)
            k_block = load_tile(head_of(k, row_k, head // group), n0, 0, k_end, HEAD_DIM, BLOCK_N, BLOCK_D, True)
            v_block = load_tile(head_of(v, row_k, head // group), n0, 0, k_end, HEAD_DIM_V, BLOCK_N, BLOCK_DV, True)
            ds, _ = _score_gradient(
                q_tile, do_tile, rows, k_block, v_block, added, queries, m0, n0, q_begin, k_begin, inside, True,
                row_q, row_k, rules, head, tiles, True,
            )  # fmt: skip
            total += ds
    pointers = matrix_pointers(dbias, bias_row, bias_head, places_m[:, None], places_n[None, :])
    tl.store(pointers, total.to(dbias.ptr.dtype.element_ty), mask=reached)
