"""The portable backward kernels. All recompute the weights from `lse`; none uses atomics, so results repeat bitwise.

`delta_kernel` reduces `out * dout`; `dkdv_kernel` walks over queries for a tile of keys, with the heads that share
it; `dq_kernel` walks over keys for a tile of queries; `dbias_kernel` sums a tile of score gradients over the
dimensions that the bias is broadcast in.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.primitives import (
    COUNTER_KEYS,
    LOG2E,
    ahead_by,
    dot,
    dropout_keep,
    load_rows,
    log2_factor,
    logits,
    matrix_pointers,
    partial_begin,
    row_pointers,
    visible,
    visits,
    work_item,
)


@triton.jit(do_not_specialize=["len_q"])
def delta_kernel(
    out, dout, dlse, delta, heads, len_q, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """`delta = sum(out * dout) - dlse`, `(B, Hq, Sq)`. Grid: tiles of queries, batch * heads."""
    row = tl.program_id(1)
    begin = tl.program_id(0) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries = begin + offs_m
    o_pointers = row_pointers(out, row // heads, row % heads, offs_m, offs_dv) + ahead_by(out, begin)
    do_pointers = row_pointers(dout, row // heads, row % heads, offs_m, offs_dv) + ahead_by(dout, begin)
    o = load_rows(o_pointers, queries, 0, len_q, offs_dv, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    do = load_rows(do_pointers, queries, 0, len_q, offs_dv, HEAD_DIM_V, BLOCK_DV, True).to(tl.float32)
    total = tl.sum(o * do, 1)
    place = tl.cast(row, tl.int64) * len_q + queries
    if dlse is not None:
        total -= tl.load(dlse + place, mask=queries < len_q, other=0.0)
    tl.store(delta + place, total, mask=queries < len_q)


@triton.jit
def _load_rowwise(lse, delta, batch, head, heads, len_q, queries, inside):
    """`lse` in log2 units and `delta`. Rows that see nothing, or do not exist, get +inf: all their weights are 0."""
    place = (tl.cast(batch, tl.int64) * heads + head) * len_q + queries
    lse_log2 = tl.load(lse + place, mask=inside, other=float("-inf")) * LOG2E
    lse_log2 = tl.where(lse_log2 == float("-inf"), float("inf"), lse_log2)
    return lse_log2, tl.load(delta + place, mask=inside, other=0.0)


@triton.jit
def _dkdv_block(
    dk, dv, k_tile, v_tile, q_pointers, do_pointers, q, dout, lse, delta, m0, item, v_range, mask, score, head, heads,
    len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of queries from `m0`: adds its part to `dk` (before the scale) and `dv`. Blocks are keys by queries."""
    queries = m0 + tl.arange(0, BLOCK_M)
    keys = item.begin + tl.arange(0, BLOCK_N)
    lo, hi = v_range.lo, v_range.hi
    live = (queries >= lo) & (queries < hi)
    inside = live[None, :] & (keys < item.end)[:, None]
    q_block = load_rows(
        q_pointers + ahead_by(q, m0), queries, lo, hi, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D, MASKED
    )
    lse_log2, delta_row = _load_rowwise(lse, delta, item.other_row, head, heads, len_q, queries, live)
    # [BLOCK_N, BLOCK_M]
    s = dot(k_tile, tl.trans(q_block))
    s, slope = logits(s, score, item.other_row, head, queries[None, :], keys[:, None], inside)
    if MASKED:
        ok = visible(mask, item.other_row, item.row, head, queries[None, :], keys[:, None], inside, item.diagonal)
        s = tl.where(ok, s, float("-inf"))
    p = tl.math.exp2(s * log2_factor(score) - lse_log2[None, :])
    do_block = load_rows(
        do_pointers + ahead_by(dout, m0), queries, lo, hi, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV, MASKED
    )
    dp = dot(v_tile, tl.trans(do_block))
    if score.seed is not None:
        rescale = 256.0 / (256 - score.drop_threshold)
        keep = dropout_keep(
            score, item.other_row * heads + head, queries, item.begin - item.key_origin, BLOCK_M, BLOCK_N
        )
        keep = tl.trans(keep.to(tl.int8)) != 0
        dv = dot(tl.where(keep, p * rescale, 0.0).to(do_block.dtype), do_block, dv)
        dp = tl.where(keep, dp * rescale, 0.0)
    else:
        dv = dot(p.to(do_block.dtype), do_block, dv)
    ds = p * (dp - delta_row[None, :]) * slope
    dk = dot(ds.to(q_block.dtype), q_block, dk)
    return dk, dv


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "tiles"])
def dkdv_kernel(
    dout, dk_out, dv_out, q, k, v, lse, delta, work, mask, score, diagonal, heads, group, len_q, len_k, tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes `dk` and `dv`. Grid: tiles of keys * key heads * batch."""
    pid = tl.program_id(0)
    heads_k = heads // group
    head_k = (pid // tiles) % heads_k
    item = work_item(work, pid % tiles, pid // (tiles * heads_k), len_k, len_q, diagonal, BLOCK_N)
    if item.begin >= item.end:
        return
    v_range = visits(item, -item.diagonal, mask.window_right, mask.window_left, mask.dense.ptr is None, 1, BLOCK_M)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    keys = item.begin + offs_n
    k_pointers = row_pointers(k, item.row, head_k, offs_n, offs_d) + ahead_by(k, item.begin)
    v_pointers = row_pointers(v, item.row, head_k, offs_n, offs_dv) + ahead_by(v, item.begin)
    k_tile = load_rows(k_pointers, keys, 0, item.end, offs_d, HEAD_DIM, BLOCK_D, True)
    v_tile = load_rows(v_pointers, keys, 0, item.end, offs_dv, HEAD_DIM_V, BLOCK_DV, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for head in range(head_k * group, head_k * group + group):
        q_pointers = row_pointers(q, item.other_row, head, offs_m, offs_d)
        do_pointers = row_pointers(dout, item.other_row, head, offs_m, offs_dv)
        for index in range(0, v_range.partial):
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_pointers, do_pointers, q, dout, lse, delta,
                partial_begin(v_range, index, BLOCK_M), item, v_range, mask, score, head, heads, len_q, len_k,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
            )  # fmt: skip
        for m0 in range(v_range.full_begin, v_range.full_end, BLOCK_M):
            dk, dv = _dkdv_block(
                dk, dv, k_tile, v_tile, q_pointers, do_pointers, q, dout, lse, delta,
                m0, item, v_range, mask, score, head, heads, len_q, len_k,
                HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
            )  # fmt: skip
    live = (keys < item.end)[:, None]
    dk_pointers = row_pointers(dk_out, item.row, head_k, offs_n, offs_d) + ahead_by(dk_out, item.begin)
    dv_pointers = row_pointers(dv_out, item.row, head_k, offs_n, offs_dv) + ahead_by(dv_out, item.begin)
    tl.store(dk_pointers, (dk * score.scale).to(dk_out.ptr.dtype.element_ty), mask=live & (offs_d < HEAD_DIM)[None, :])
    tl.store(dv_pointers, dv.to(dv_out.ptr.dtype.element_ty), mask=live & (offs_dv < HEAD_DIM_V)[None, :])


@triton.jit
def _score_gradient(
    q_tile, do_tile, lse_log2, delta_row, k_block, v_block, queries, keys, first_key, inside, row_q, row_k, diagonal,
    mask, score, head, heads, len_q, len_k, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`[BLOCK_M, BLOCK_N]` gradients of the biased score, and the softcap's slope."""
    s = dot(q_tile, tl.trans(k_block))
    s, slope = logits(s, score, row_q, head, queries[:, None], keys[None, :], inside)
    if MASKED:
        ok = visible(mask, row_q, row_k, head, queries[:, None], keys[None, :], inside, diagonal)
        s = tl.where(ok, s, float("-inf"))
    p = tl.math.exp2(s * log2_factor(score) - lse_log2[:, None])
    dp = dot(do_tile, tl.trans(v_block))
    if score.seed is not None:
        keep = dropout_keep(score, row_q * heads + head, queries, first_key, BLOCK_M, BLOCK_N)
        dp = tl.where(keep, dp * (256.0 / (256 - score.drop_threshold)), 0.0)
    return p * (dp - delta_row[:, None]), slope


@triton.jit
def _dq_block(
    dq, q_tile, do_tile, lse_log2, delta_row, k_pointers, v_pointers, k, v, n0, item, v_range, mask, score, head,
    heads, len_q, len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys from `n0`: adds its part to `dq` (before the scale)."""
    queries = item.begin + tl.arange(0, BLOCK_M)
    keys = n0 + tl.arange(0, BLOCK_N)
    lo, hi = v_range.lo, v_range.hi
    inside = (queries < item.end)[:, None] & ((keys >= lo) & (keys < hi))[None, :]
    k_block = load_rows(k_pointers + ahead_by(k, n0), keys, lo, hi, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D, MASKED)
    v_block = load_rows(
        v_pointers + ahead_by(v, n0), keys, lo, hi, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV, MASKED
    )
    ds, slope = _score_gradient(
        q_tile, do_tile, lse_log2, delta_row, k_block, v_block, queries, keys, n0 - item.key_origin, inside,
        item.row, item.other_row, item.diagonal, mask, score, head, heads, len_q, len_k, BLOCK_M, BLOCK_N, MASKED,
    )  # fmt: skip
    return dot((ds * slope).to(k_block.dtype), k_block, dq)


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "tiles"])
def dq_kernel(
    dout, dq_out, q, k, v, lse, delta, work, mask, score, diagonal, heads, group, len_q, len_k, tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes `dq`. Grid: tiles of queries * heads * batch."""
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    item = work_item(work, tiles - 1 - pid % tiles, pid // (tiles * heads), len_q, len_k, diagonal, BLOCK_M)
    if item.begin >= item.end:
        return
    ALIGN: tl.constexpr = 1 if score.seed is None else COUNTER_KEYS
    v_range = visits(item, item.diagonal, mask.window_left, mask.window_right, mask.dense.ptr is None, ALIGN, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries = item.begin + offs_m
    q_pointers = row_pointers(q, item.row, head, offs_m, offs_d) + ahead_by(q, item.begin)
    do_pointers = row_pointers(dout, item.row, head, offs_m, offs_dv) + ahead_by(dout, item.begin)
    q_tile = load_rows(q_pointers, queries, 0, item.end, offs_d, HEAD_DIM, BLOCK_D, True)
    do_tile = load_rows(do_pointers, queries, 0, item.end, offs_dv, HEAD_DIM_V, BLOCK_DV, True)
    live = queries < item.end
    lse_log2, delta_row = _load_rowwise(lse, delta, item.row, head, heads, len_q, queries, live)
    k_pointers = row_pointers(k, item.other_row, head // group, offs_n, offs_d)
    v_pointers = row_pointers(v, item.other_row, head // group, offs_n, offs_dv)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for index in range(0, v_range.partial):
        dq = _dq_block(
            dq, q_tile, do_tile, lse_log2, delta_row, k_pointers, v_pointers, k, v,
            partial_begin(v_range, index, BLOCK_N), item, v_range, mask, score, head, heads, len_q, len_k,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    for n0 in range(v_range.full_begin, v_range.full_end, BLOCK_N):
        dq = _dq_block(
            dq, q_tile, do_tile, lse_log2, delta_row, k_pointers, v_pointers, k, v, n0, item, v_range, mask, score,
            head, heads, len_q, len_k, HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    dq_pointers = row_pointers(dq_out, item.row, head, offs_m, offs_d) + ahead_by(dq_out, item.begin)
    inside = live[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(dq_pointers, (dq * score.scale).to(dq_out.ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "batch", "bias_batch"])
def dbias_kernel(
    dout, dbias, q, k, v, lse, delta, mask, score, diagonal, batch, heads, group, bias_batch, bias_heads, len_q,
    len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes `dbias`, a Matrix. Grid: tiles of keys, tiles of queries, bias batch * bias heads. Lengths are full."""
    n0 = tl.program_id(0) * BLOCK_N
    m0 = tl.program_id(1) * BLOCK_M
    bias_row = tl.program_id(2) // bias_heads
    bias_head = tl.program_id(2) % bias_heads
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    queries, keys = m0 + offs_m, n0 + offs_n
    live = queries < len_q
    inside = live[:, None] & (keys < len_k)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last_key = tl.minimum(n0 + BLOCK_N, len_k) - 1
    met = True
    if mask.window_right is not None:
        met = met & (n0 <= tl.minimum(m0 + BLOCK_M, len_q) - 1 + diagonal + mask.window_right)
    if mask.window_left is not None:
        met = met & (last_key >= m0 + diagonal - mask.window_left)
    rounds = (batch // bias_batch) * (heads // bias_heads)
    for index in range(0, tl.where(met, rounds, 0)):
        # Row and head run over the dimensions in which the bias is broadcast (it has size 1 there).
        row = bias_row + index // (heads // bias_heads)
        head = bias_head + index % (heads // bias_heads)
        q_pointers = row_pointers(q, row, head, offs_m, offs_d) + ahead_by(q, m0)
        do_pointers = row_pointers(dout, row, head, offs_m, offs_dv) + ahead_by(dout, m0)
        k_pointers = row_pointers(k, row, head // group, offs_n, offs_d) + ahead_by(k, n0)
        v_pointers = row_pointers(v, row, head // group, offs_n, offs_dv) + ahead_by(v, n0)
        lse_log2, delta_row = _load_rowwise(lse, delta, row, head, heads, len_q, queries, live)
        ds, _ = _score_gradient(
            load_rows(q_pointers, queries, 0, len_q, offs_d, HEAD_DIM, BLOCK_D, True),
            load_rows(do_pointers, queries, 0, len_q, offs_dv, HEAD_DIM_V, BLOCK_DV, True),
            lse_log2, delta_row,
            load_rows(k_pointers, keys, 0, len_k, offs_d, HEAD_DIM, BLOCK_D, True),
            load_rows(v_pointers, keys, 0, len_k, offs_dv, HEAD_DIM_V, BLOCK_DV, True),
            queries, keys, n0, inside, row, row, diagonal, mask, score, head, heads, len_q, len_k,
            BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        total += ds
    pointers = matrix_pointers(dbias, bias_row, bias_head, queries[:, None], keys[None, :])
    tl.store(pointers, total.to(dbias.ptr.dtype.element_ty), mask=inside)
