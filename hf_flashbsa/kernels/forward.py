"""The portable forward kernel: one program per tile of queries and head, online softmax over blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.primitives import (
    COUNTER_KEYS,
    LN2,
    LOG2E,
    ahead_by,
    dot,
    dropout_keep,
    load_rows,
    log2_factor,
    logits,
    partial_begin,
    row_pointers,
    visible,
    visits,
    work_item,
)


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile, k_pointers, v_pointers, k, v, n0, item, v_range, mask, score, head, heads, len_q,
    len_k, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys from `n0`: folds its weights and values into the running softmax."""
    offs_n = tl.arange(0, BLOCK_N)
    queries = item.begin + tl.arange(0, BLOCK_M)
    keys = n0 + offs_n
    lo, hi = v_range.lo, v_range.hi
    inside = (queries < item.end)[:, None] & ((keys >= lo) & (keys < hi))[None, :]
    # [BLOCK_N, BLOCK_D]
    k_block = load_rows(k_pointers + ahead_by(k, n0), keys, lo, hi, tl.arange(0, BLOCK_D), HEAD_DIM, BLOCK_D, MASKED)
    # [BLOCK_M, BLOCK_N]
    s = dot(q_tile, tl.trans(k_block))
    s, _ = logits(s, score, item.row, head, queries[:, None], keys[None, :], inside)
    if MASKED:
        ok = visible(mask, item.row, item.other_row, head, queries[:, None], keys[None, :], inside, item.diagonal)
        s = tl.where(ok, s, float("-inf"))
    factor = log2_factor(score)
    new_max = tl.maximum(row_max, tl.max(s, 1) * factor)
    pivot = new_max
    if MASKED or score.bias.ptr is not None:
        # A row that has met no key yet has maximum -inf; any finite pivot gives it weights of 0 and not NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(s * factor - pivot[:, None])
    shrink = tl.math.exp2(row_max - pivot)
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    if score.seed is not None:
        keep = dropout_keep(score, item.row * heads + head, queries, n0 - item.key_origin, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    v_block = load_rows(
        v_pointers + ahead_by(v, n0), keys, lo, hi, tl.arange(0, BLOCK_DV), HEAD_DIM_V, BLOCK_DV, MASKED
    )
    acc = dot(p.to(v_block.dtype), v_block, acc)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "tiles"])
def forward_kernel(
    q, k, v, out, lse, sinks, work, mask, score, diagonal, heads, group, len_q, len_k, tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Writes `out` and `lse` `(B, Hq, Sq)`. Grid: tiles * heads * batch, tiles of one head side by side."""
    pid = tl.program_id(0)
    head = (pid // tiles) % heads
    # Under causality the last tiles have the most keys: they start first.
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
    q_tile = load_rows(q_pointers, queries, 0, item.end, offs_d, HEAD_DIM, BLOCK_D, True)
    k_pointers = row_pointers(k, item.other_row, head // group, offs_n, offs_d)
    v_pointers = row_pointers(v, item.other_row, head // group, offs_n, offs_dv)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, v_range.partial):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k_pointers, v_pointers, k, v, partial_begin(v_range, index, BLOCK_N), item,
            v_range, mask, score, head, heads, len_q, len_k,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True,
        )  # fmt: skip
    for n0 in range(v_range.full_begin, v_range.full_end, BLOCK_N):
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k_pointers, v_pointers, k, v, n0, item,
            v_range, mask, score, head, heads, len_q, len_k,
            HEAD_DIM, HEAD_DIM_V, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False,
        )  # fmt: skip
    if sinks is not None:
        sink = tl.load(sinks + head) * LOG2E
        # A row that sees no key stays without weights.
        sink = tl.where(row_max == float("-inf"), float("-inf"), sink)
        top = tl.maximum(row_max, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.math.exp2(row_max - top)
        acc = acc * shrink[:, None]
        row_sum = row_sum * shrink + tl.math.exp2(sink - top)
        row_max = top
    inverse = tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    if score.seed is not None:
        inverse = inverse * (256.0 / (256 - score.drop_threshold))
    acc = acc * inverse[:, None]
    live = queries < item.end
    lse_row = lse + (tl.cast(item.row, tl.int64) * heads + head) * len_q + queries
    tl.store(lse_row, (row_max + tl.math.log2(row_sum)) * LN2, mask=live)
    out_pointers = row_pointers(out, item.row, head, offs_m, offs_dv) + ahead_by(out, item.begin)
    inside = live[:, None] & (offs_dv < HEAD_DIM_V)[None, :]
    tl.store(out_pointers, acc.to(out.ptr.dtype.element_ty), mask=inside)
