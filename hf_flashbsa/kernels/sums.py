"""What runs before and after a backward kernel that adds up the gradient of the queries in memory.

Such a kernel walks over keys, so that many programs meet the same query. Their parts of its gradient are added in
float32, and no kernel of `dq` is there to make what a query's rows need (rows.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.rows import begin_rows, finish_rows


@triton.jit
def _rows_of(x, batch, head, queries, dims, live):
    """Rows of a head of an Operand, as float32; 0 where they are not `live`."""
    base = x.ptr + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h
    places = queries.to(tl.int64)[:, None] * x.stride_s + dims[None, :]
    return tl.load(base + places, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def _place_in_sums(batch_head, queries, dims, len_q, HEAD_DIM: tl.constexpr):
    return (tl.cast(batch_head, tl.int64) * len_q + queries)[:, None] * HEAD_DIM + dims[None, :]


@triton.jit(do_not_specialize=["len_q", "plane"])
def begin_sums_kernel(
    dout, out, lse, dlse, rowwise, plane, sums, score, heads, len_q, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Writes `rowwise` (rows.py), and zeros to `sums`, float32 `(B, H, S, D)`. `dout` and `out` are Operands.

    Grid: (heads of all batch rows, blocks of BLOCK_M queries); its second dimension has room for 65,535.
    """
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    live = queries < len_q
    rows = begin_rows(lse, dlse, score, batch_head, queries, live, len_q)
    product = _rows_of(dout, batch, head, queries, dims, live) * _rows_of(out, batch, head, queries, dims, live)
    finish_rows(rows, tl.sum(product, 1), rowwise, plane, score, batch_head, queries, live, len_q)
    places = _place_in_sums(batch_head, queries, dims, len_q, HEAD_DIM)
    tl.store(sums + places, tl.zeros([BLOCK_M, HEAD_DIM], tl.float32), mask=live[:, None])


@triton.jit(do_not_specialize=["len_q"])
def end_sums_kernel(dq, sums, scale, heads, len_q, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """Writes `dq`, an Operand, as `scale * sums`. Grid: that of `begin_sums_kernel`."""
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    live = (queries < len_q)[:, None]
    total = tl.load(sums + _place_in_sums(batch_head, queries, dims, len_q, HEAD_DIM), mask=live, other=0.0)
    base = dq.ptr + batch.to(tl.int64) * dq.stride_b + head.to(tl.int64) * dq.stride_h
    places = queries.to(tl.int64)[:, None] * dq.stride_s + dims[None, :]
    tl.store(base + places, (total * scale).to(dq.ptr.dtype.element_ty), mask=live)
