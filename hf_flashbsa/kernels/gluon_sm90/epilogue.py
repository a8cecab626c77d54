"""Epilogue of the forward kernel: normalise O, write lse, hand O to the producer's TMA store."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M
from hf_flashbsa.kernels.triton.score import LN2, LOG2E


@gluon.jit
def store_smem_rows(view, batch, head, begin, end, tile, DIM: gl.constexpr):
    """Copy a consumer's 64 rows from shared memory to rows `[begin, end)` of a TensorView, masked by `end`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    rows = begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    base = view.ptr + batch.to(gl.int64) * view.stride_b + head.to(gl.int64) * view.stride_h
    pointers = base + rows.to(gl.int64)[:, None] * view.stride_s + dims[None, :]
    gl.store(pointers, tile.load(LAYOUT), mask=(rows < end)[:, None])


@gluon.jit
def epilogue(o, state, tile, out_view, lse, sinks, head, work_tile, problem, S: gl.constexpr, tiles: gl.constexpr):
    """O / row_sum and lse = ln 2 * (row_max + log2(row_sum)). O goes to `tile` in shared memory, from where the
    producer TMA-stores it; lse goes to global memory.
    """
    O: gl.constexpr = o.type.layout
    score_mod = problem.mods.score_mod
    row_max = gl.convert_layout(gl.max(state.row_max, 1), gl.SliceLayout(1, S))
    row_sum = gl.convert_layout(gl.sum(state.row_sum, 1), gl.SliceLayout(1, S))
    if sinks is not None:
        # Rows without visible keys keep weight 0.
        sink = gl.where(row_max == float("-inf"), float("-inf"), gl.load(sinks + head) * LOG2E)
        new_max = gl.maximum(row_max, sink)
        new_max = gl.where(new_max == float("-inf"), 0.0, new_max)
        row_scale = gl.exp2(row_max - new_max)
        o = o * gl.convert_layout(row_scale, gl.SliceLayout(1, O))[:, None]
        row_sum = row_sum * row_scale + gl.exp2(sink - new_max)
        row_max = new_max
    inverse = gl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    if score_mod.seed is not None:
        inverse = inverse * score_mod.keep_scale
    o = o * gl.convert_layout(inverse, gl.SliceLayout(1, O))[:, None]
    tile.store(o.to(tile.dtype))
    if problem.schedule is not None:
        if work_tile.begin + CONSUMER_M > work_tile.end:
            # The TMA box extends into the next sequence: store only this one's rows.
            store_smem_rows(out_view, work_tile.batch, head, work_tile.begin, work_tile.end, tile, tiles.d)
    fence_async_shared()
    rows = work_tile.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, S))
    lse_offset = (work_tile.batch.to(gl.int64) * problem.heads + head) * problem.len_q + rows
    gl.store(lse + lse_offset, (row_max + gl.log2(row_sum)) * LN2, mask=rows < work_tile.end)
