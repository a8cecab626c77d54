"""What the backward kernels need of each query.

A kernel of `dq`, or the one that begins sums (sums.py), holds each query's rows once: it makes these numbers and
leaves them to the kernels that run behind it in `rowwise`, planes `(B, Hq, Sq)` of `plane` float32 each: the fields of
`Rows` in their order, the words as bits.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from hf_flashbsa.kernels.primitives import LOG2E, dropout_words


class Rows(NamedTuple):
    """Of each query: the log-sum-exp in log2 units, +inf where it sees no key, so that all its weights come out as 0;
    `delta = sum(out * dout) - dlse`; and the words of its dropout.
    """

    lse: object
    delta: object
    pad: object
    factor: object


@triton.jit
def begin_rows(lse, dlse, score, batch_head, queries, live, len_q):
    """Rows of `queries` of a head, whose delta still lacks `sum(out * dout)`. Those that are not `live` see no key.

    Apart from `finish_rows`, so that what is loaded here is on its way while a kernel waits for its tiles.
    """
    place = tl.cast(batch_head, tl.int64) * len_q + queries
    row_lse = tl.load(lse + place, mask=live, other=float("-inf"))
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2E)
    delta, pad, factor = 0.0, 0, 0
    if dlse is not None:
        delta = -tl.load(dlse + place, mask=live, other=0.0)
    if score.seed is not None:
        pad, factor = dropout_words(score, batch_head, queries)
    return Rows(row_lse, delta, pad, factor)


@triton.jit
def finish_rows(rows, product, rowwise, plane, score, batch_head, queries, live, len_q):
    """Rows of `begin_rows` once `product`, their `sum(out * dout)`, is known. Writes those that are `live`."""
    place = rowwise + tl.cast(batch_head, tl.int64) * len_q + queries
    delta = product + rows.delta
    tl.store(place, rows.lse, mask=live)
    tl.store(place + plane, delta, mask=live)
    if score.seed is not None:
        tl.store(place + 2 * plane, rows.pad.to(tl.float32, bitcast=True), mask=live)
        tl.store(place + 3 * plane, rows.factor.to(tl.float32, bitcast=True), mask=live)
    return Rows(rows.lse, delta, rows.pad, rows.factor)


@triton.jit
def read_rows(rowwise, plane, score, batch_head, begin, lo, hi, len_q, BLOCK: tl.constexpr, CHECK: tl.constexpr):
    """Rows from `begin`; those outside `[lo, hi)` (where `CHECK`) see no key."""
    # Scalar bases leave 32-bit offsets to the threads, of which each holds many rows where scores are transposed.
    base = rowwise + tl.cast(batch_head, tl.int64) * len_q + begin
    offsets = tl.arange(0, BLOCK)
    pad, factor = 0, 0
    if CHECK:
        live = (begin + offsets >= lo) & (begin + offsets < hi)
        lse = tl.load(base + offsets, mask=live, other=float("inf"))
        delta = tl.load(base + plane + offsets, mask=live, other=0.0)
        if score.seed is not None:
            pad = tl.load(base + 2 * plane + offsets, mask=live, other=0.0).to(tl.uint32, bitcast=True)
            factor = tl.load(base + 3 * plane + offsets, mask=live, other=0.0).to(tl.uint32, bitcast=True)
    else:
        lse = tl.load(base + offsets)
        delta = tl.load(base + plane + offsets)
        if score.seed is not None:
            pad = tl.load(base + 2 * plane + offsets).to(tl.uint32, bitcast=True)
            factor = tl.load(base + 3 * plane + offsets).to(tl.uint32, bitcast=True)
    return Rows(lse, delta, pad, factor)
