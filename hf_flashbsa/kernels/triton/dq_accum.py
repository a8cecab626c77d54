"""Pre- and postprocess kernels of the fused backward, which accumulates dQ in global memory (FlashAttention's
dQaccum).

The fused kernel tiles keys, so many programs contribute to the same query: they add in float32 to `dq_accum`, which is
zeroed before and scaled and rounded after.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.triton.row_stats import load_row_stats, store_row_stats


@triton.jit
def _load_rows(x, batch, head, queries, dims, live):
    """`[BLOCK_M, dims]` rows of one head of a TensorView as float32; 0 where not `live`."""
    base = x.ptr + batch.to(tl.int64) * x.stride_b + head.to(tl.int64) * x.stride_h
    offsets = queries.to(tl.int64)[:, None] * x.stride_s + dims[None, :]
    return tl.load(base + offsets, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def _accum_offsets(batch_head, queries, dims, len_q, HEAD_DIM: tl.constexpr):
    """Offsets into `dq_accum`, contiguous `(B, H, S, HEAD_DIM)`."""
    return (tl.cast(batch_head, tl.int64) * len_q + queries)[:, None] * HEAD_DIM + dims[None, :]


@triton.jit(do_not_specialize=["len_q", "stats_stride"])
def bwd_preprocess_kernel(
    dout,
    out,
    lse,
    dlse,
    stats,
    stats_stride,
    dq_accum,
    score_mod,
    heads,
    len_q,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """stats = (lse_log2, sum(out * dout) - dlse), dq_accum = 0.

    `dq_accum` is contiguous float32 `(B, H, S, D)`; `dout` and `out` are TensorViews. Grid: (batch * heads, blocks of
    BLOCK_M queries), at most 65,535 of the latter.
    """
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    live = queries < len_q
    row_stats = load_row_stats(lse, dlse, score_mod, batch_head, queries, live, len_q)
    out_dot_dout = _load_rows(dout, batch, head, queries, dims, live) * _load_rows(
        out, batch, head, queries, dims, live
    )
    store_row_stats(
        row_stats, tl.sum(out_dot_dout, 1), stats, stats_stride, score_mod, batch_head, queries, live, len_q
    )
    offsets = _accum_offsets(batch_head, queries, dims, len_q, HEAD_DIM)
    tl.store(dq_accum + offsets, tl.zeros([BLOCK_M, HEAD_DIM], tl.float32), mask=live[:, None])


@triton.jit(do_not_specialize=["len_q"])
def bwd_postprocess_kernel(dq, dq_accum, scale, heads, len_q, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr):
    """dq = scale * dq_accum, rounded to the dtype of `dq`, a TensorView. Grid as `bwd_preprocess_kernel`."""
    batch_head = tl.program_id(0)
    batch, head = batch_head // heads, batch_head % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, HEAD_DIM)
    live = (queries < len_q)[:, None]
    total = tl.load(dq_accum + _accum_offsets(batch_head, queries, dims, len_q, HEAD_DIM), mask=live, other=0.0)
    base = dq.ptr + batch.to(tl.int64) * dq.stride_b + head.to(tl.int64) * dq.stride_h
    offsets = queries.to(tl.int64)[:, None] * dq.stride_s + dims[None, :]
    tl.store(base + offsets, (total * scale).to(dq.ptr.dtype.element_ty), mask=live)
