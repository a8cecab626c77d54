"""Pointers and tile loads of strided tensors, with 16-byte loads where rows are aligned."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.structs import HeadView


@triton.jit
def _aligned_stride(x, stride):
    """A stride, rounded down to a multiple of 16 bytes where `align_hint` says that it is one already. Triton infers
    alignment only from multiples of 16 elements: without it, rows of 40 or 72 elements load one element at a time.
    """
    if x.align_hint is None:
        return stride
    else:
        multiple: tl.constexpr = 128 // x.ptr.dtype.element_ty.primitive_bitwidth
        return stride // multiple * multiple


@triton.jit
def head_view(x, batch, head):
    """One head of a TensorView.

    Rows that are not aligned to 16 bytes load element by element. Their tiles must be too small for wgmma: with both
    operands loaded this way, Triton 3.6 has computed wrong wgmma results on Hopper (head dims 40 for q/k and 8 for v).
    """
    base = (
        x.ptr
        + tl.cast(batch, tl.int64) * _aligned_stride(x, x.stride_b)
        + tl.cast(head, tl.int64) * _aligned_stride(x, x.stride_h)
    )
    return HeadView(base, _aligned_stride(x, x.stride_s))


@triton.jit
def tile_pointers(x, begin, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Pointers `[BLOCK, BLOCK_DIM]` to rows of a HeadView from `begin` on. 64-bit wherever a sequence length
    enters.
    """
    offsets = tl.arange(0, BLOCK)[:, None] * x.stride + tl.arange(0, BLOCK_DIM)[None, :]
    return x.base + tl.cast(begin, tl.int64) * x.stride + offsets


@triton.jit
def load_tile(x, begin, lo, hi, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, CHECK: tl.constexpr):
    """`[BLOCK, BLOCK_DIM]` rows of a HeadView from `begin` on; 0 outside `[lo, hi)` (if `CHECK`) and beyond `DIM`."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    dims = tl.arange(0, BLOCK_DIM)
    if CHECK:
        rows = begin + tl.arange(0, BLOCK)
        in_window = ((rows >= lo) & (rows < hi))[:, None]
        if DIM < BLOCK_DIM:
            in_window = in_window & (dims < DIM)[None, :]
        tile = tl.load(pointers, mask=in_window, other=0.0)
    else:
        if DIM < BLOCK_DIM:
            tile = tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_tile(x, begin, end, tile, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Store rows `[begin, end)` of a HeadView."""
    pointers = tile_pointers(x, begin, BLOCK, BLOCK_DIM)
    in_window = (begin + tl.arange(0, BLOCK) < end)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
    tl.store(pointers, tile.to(x.base.dtype.element_ty), mask=in_window)


@triton.jit
def _packed_pointers(x, batch, head, begin, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, PACK: tl.constexpr):
    """Pointers `[BLOCK, BLOCK_DIM]` to rows of a TensorView: row `i` is query `begin + i // PACK` of head
    `head + i % PACK`."""
    rows = tl.arange(0, BLOCK)
    heads = tl.cast(rows % PACK, tl.int64) * _aligned_stride(x, x.stride_h)
    queries = tl.cast(begin + rows // PACK, tl.int64) * _aligned_stride(x, x.stride_s)
    return head_view(x, batch, head).base + (heads + queries)[:, None] + tl.arange(0, BLOCK_DIM)[None, :]


@triton.jit
def load_rows(
    x, batch, head, begin, end, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr, PACK: tl.constexpr
):
    """`[BLOCK, BLOCK_DIM]` rows of queries `[begin, end)` of `PACK` heads of a TensorView from `head` on, else 0."""
    if PACK == 1:
        return load_tile(head_view(x, batch, head), begin, 0, end, DIM, BLOCK, BLOCK_DIM, True)
    else:
        mask = (begin + tl.arange(0, BLOCK) // PACK < end)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
        return tl.load(_packed_pointers(x, batch, head, begin, BLOCK, BLOCK_DIM, PACK), mask=mask, other=0.0)


@triton.jit
def store_rows(
    x, batch, head, begin, end, tile, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr,
    PACK: tl.constexpr,
):  # fmt: skip
    """Store what `load_rows` would load."""
    if PACK == 1:
        store_tile(head_view(x, batch, head), begin, end, tile, DIM, BLOCK, BLOCK_DIM)
    else:
        mask = (begin + tl.arange(0, BLOCK) // PACK < end)[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
        pointers = _packed_pointers(x, batch, head, begin, BLOCK, BLOCK_DIM, PACK)
        tl.store(pointers, tile.to(x.ptr.dtype.element_ty), mask=mask)


@triton.jit
def strided_pointers(x, batch, head, queries, keys):
    """Pointers into a StridedTensor at broadcastable `queries` and `keys`."""
    base = (
        x.ptr
        + tl.cast(batch, tl.int64) * _aligned_stride(x, x.stride_b)
        + tl.cast(head, tl.int64) * _aligned_stride(x, x.stride_h)
    )
    return base + queries * tl.cast(_aligned_stride(x, x.stride_q), tl.int64) + keys * tl.cast(x.stride_k, tl.int64)
