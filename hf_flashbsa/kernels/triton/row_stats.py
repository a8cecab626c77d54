"""Per-query statistics of the backward pass: lse_log2 and delta = rowsum(out * dout) - dlse (FlashAttention's dPsum).

The dQ kernel, or `bwd_preprocess_kernel` before a fused backward, computes them once per query and stores them for the
kernels that run after it in `stats`: float32 planes `(B, Hq, Sq)`, `stats_stride` elements apart, in the order of the
fields of `SoftmaxStats`; the dropout words bitcast.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hf_flashbsa.kernels.triton.score import LOG2E, dropout_row_words

#: Planes of `stats`.
LSE_LOG2: tl.constexpr = tl.constexpr(0)
DELTA: tl.constexpr = tl.constexpr(1)
DROPOUT_PAD: tl.constexpr = tl.constexpr(2)
DROPOUT_FACTOR: tl.constexpr = tl.constexpr(3)


class SoftmaxStats(NamedTuple):
    """Per query: `lse_log2 = lse * log2(e)`, +inf for a row without visible keys, so that p = exp2(s - lse_log2) is 0;
    `delta = sum(out * dout) - dlse`; and the pad and factor of its dropout hash.
    """

    lse_log2: object
    delta: object
    pad: object
    factor: object


@triton.jit
def load_row_stats(lse, dlse, score_mod, batch_head, queries, live, len_q):
    """Statistics of `queries` of a head, before `sum(out * dout)` is added to delta. Rows that are not `live` count as
    rows without visible keys.

    Separate from `store_row_stats`, so that these loads are in flight while a kernel waits for its tiles.
    """
    offset = tl.cast(batch_head, tl.int64) * len_q + queries
    lse_log2 = tl.load(lse + offset, mask=live, other=float("-inf"))
    lse_log2 = tl.where(lse_log2 == float("-inf"), float("inf"), lse_log2 * LOG2E)
    delta, pad, factor = 0.0, 0, 0
    if dlse is not None:
        delta = -tl.load(dlse + offset, mask=live, other=0.0)
    if score_mod.seed is not None:
        pad, factor = dropout_row_words(score_mod, batch_head, queries)
    return SoftmaxStats(lse_log2, delta, pad, factor)


@triton.jit
def store_row_stats(row_stats, out_dot_dout, stats, stats_stride, score_mod, batch_head, queries, live, len_q):
    """Add `out_dot_dout = sum(out * dout)` to delta, store the statistics of `live` rows, and return them."""
    pointers = stats + tl.cast(batch_head, tl.int64) * len_q + queries
    delta = out_dot_dout + row_stats.delta
    tl.store(pointers, row_stats.lse_log2, mask=live)
    tl.store(pointers + stats_stride, delta, mask=live)
    if score_mod.seed is not None:
        tl.store(pointers + DROPOUT_PAD * stats_stride, row_stats.pad.to(tl.float32, bitcast=True), mask=live)
        tl.store(pointers + DROPOUT_FACTOR * stats_stride, row_stats.factor.to(tl.float32, bitcast=True), mask=live)
    return SoftmaxStats(row_stats.lse_log2, delta, row_stats.pad, row_stats.factor)


@triton.jit
def read_row_stats(
    stats, stats_stride, score_mod, batch_head, begin, lo, hi, len_q, BLOCK: tl.constexpr, CHECK: tl.constexpr
):
    """Stored statistics of `BLOCK` rows from `begin` on; rows outside `[lo, hi)` (if `CHECK`) see no key."""
    # A scalar base pointer leaves 32-bit offsets per thread, which hold many rows where scores are transposed.
    base = stats + tl.cast(batch_head, tl.int64) * len_q + begin
    offsets = tl.arange(0, BLOCK)
    pad, factor = 0, 0
    if CHECK:
        live = (begin + offsets >= lo) & (begin + offsets < hi)
        lse_log2 = tl.load(base + offsets, mask=live, other=float("inf"))
        delta = tl.load(base + stats_stride + offsets, mask=live, other=0.0)
        if score_mod.seed is not None:
            pad = tl.load(base + DROPOUT_PAD * stats_stride + offsets, mask=live, other=0.0).to(
                tl.uint32, bitcast=True
            )
            factor = tl.load(base + DROPOUT_FACTOR * stats_stride + offsets, mask=live, other=0.0).to(
                tl.uint32, bitcast=True
            )
    else:
        lse_log2 = tl.load(base + offsets)
        delta = tl.load(base + stats_stride + offsets)
        if score_mod.seed is not None:
            pad = tl.load(base + DROPOUT_PAD * stats_stride + offsets).to(tl.uint32, bitcast=True)
            factor = tl.load(base + DROPOUT_FACTOR * stats_stride + offsets).to(tl.uint32, bitcast=True)
    return SoftmaxStats(lse_log2, delta, pad, factor)
