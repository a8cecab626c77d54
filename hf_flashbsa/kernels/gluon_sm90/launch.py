"""Launch functions of the Gluon kernels: TMA descriptors, grids and options. They take what the portable ones do."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.arguments import attn_mods, cdiv, max_blocks_of, score_mod_of, tensor_view, tiles_of
from hf_flashbsa.kernels.call_plan import CallPlan
from hf_flashbsa.kernels.gluon_sm90.bwd_dkdv import dkdv_kernel
from hf_flashbsa.kernels.gluon_sm90.bwd_dq import dq_kernel
from hf_flashbsa.kernels.gluon_sm90.fwd import forward_kernel
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M
from hf_flashbsa.kernels.tables import SCHEDULE_TILE
from hf_flashbsa.kernels.triton.dq_accum import bwd_postprocess_kernel, bwd_preprocess_kernel

#: Registers per thread, so that 384 threads (two consumer warpgroups and one of producer and scheduler) fill an SM's
#: register file, or 512 with the dQ warpgroup.
RESOURCES = {"num_warps": 4, "maxnreg": 168}
FUSED_RESOURCES = {"num_warps": 4, "maxnreg": 128}
#: Queries per program of the pre- and postprocess kernels.
PREPROCESS_M = 64
#: Up to this many tiles per sequence, or keys per window, the grid is persistent, which overlaps the prologue and
#: epilogue of tiles. Longer tiles gain little from that, and the hardware's block order balances better. With a tile
#: counter the grid is always persistent.
PERSISTENT_MAX_TILES = 64
PERSISTENT_MAX_WINDOW = 2048


@functools.cache
def _layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], element)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """TMA descriptor of `x` with boxes of `rows` rows of a head."""
    dim = x.shape[-1]
    # Strides of dimensions of size 1 are arbitrary, but TMA requires multiples of 16 bytes.
    strides = [stride if size > 1 else dim for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, dim], _layout(rows, dim, x.dtype))


def _meta(
    options: dict, q: torch.Tensor, lists: torch.Tensor | None, plan: CallPlan, resources: dict = RESOURCES
) -> dict:
    return {
        "HEAD_DIM": q.shape[-1],
        "SPARSE_BLOCK": plan.scalars.block_size or 0,
        "MAX_BLOCKS_POW2": max_blocks_of(lists),
        **options,
        **resources,
    }


def _grid_size(
    total_tiles: int, tiles: int, tile_counter: torch.Tensor | None, plan: CallPlan, device: torch.device
) -> int:
    """Number of programs for `total_tiles` tiles, `tiles` of them per head (and batch row)."""
    short = tiles <= PERSISTENT_MAX_TILES or (
        plan.scalars.window is not None and plan.scalars.window <= PERSISTENT_MAX_WINDOW
    )
    return min(total_tiles, tuning.multiprocessors(device)) if short or tile_counter is not None else total_tiles


def launch_forward(options: dict, tile_counter, launch, q, k, v, out, lse, plan: CallPlan) -> None:
    tensors, scalars, _ = plan
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(tensors.schedule_q, len_q, batch, SCHEDULE_TILE)
    total_tiles = tiles * heads * batch
    lists = tensors.block_table_q
    launch(
        forward_kernel, (_grid_size(total_tiles, tiles, tile_counter, plan, q.device),),
        _descriptor(q, CONSUMER_M.value), _descriptor(k, options["BLOCK_N"]), _descriptor(v, options["BLOCK_N"]),
        _descriptor(out, CONSUMER_M.value), tensor_view(out), lse, tensors.sinks, tensors.schedule_q, tile_counter,
        *attn_mods(lists, plan), scalars.query_offset, heads, heads // heads_k, len_q, len_k, tiles, total_tiles,
        **_meta(options, q, lists, plan),
    )  # fmt: skip


def launch_dq(
    options: dict, tile_counter, launch, dout, dq, q, k, v, out, lse, dlse, stats, stats_stride: int, plan: CallPlan,
) -> None:  # fmt: skip
    tensors, scalars, _ = plan
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(tensors.schedule_q, len_q, batch, SCHEDULE_TILE)
    total_tiles = tiles * heads * batch
    keys, lists = options["BLOCK_N"], tensors.block_table_q
    launch(
        dq_kernel, (_grid_size(total_tiles, tiles, tile_counter, plan, q.device),),
        _descriptor(dout, CONSUMER_M.value), _descriptor(dq, CONSUMER_M.value), tensor_view(dq),
        _descriptor(q, CONSUMER_M.value), _descriptor(k, keys), _descriptor(v, keys), _descriptor(out, keys), lse,
        dlse, stats, stats_stride, tensors.schedule_q, tile_counter, *attn_mods(lists, plan), scalars.query_offset,
        heads, heads // heads_k, len_q, len_k, tiles, total_tiles, **_meta(options, q, lists, plan),
    )  # fmt: skip


def launch_dkdv(
    options: dict, tile_counter, launch, dout, dk, dv, q, k, v, stats, stats_stride: int, plan: CallPlan,
    dq_accum: torch.Tensor | None = None,
) -> None:  # fmt: skip
    tensors, scalars, _ = plan
    (_, heads, len_q, _), (batch, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(tensors.schedule_k, len_k, batch, SCHEDULE_TILE)
    total_tiles = tiles * heads_k * batch
    queries, lists = options["BLOCK_M"], tensors.block_table_k
    launch(
        dkdv_kernel, (_grid_size(total_tiles, tiles, tile_counter, plan, q.device),), _descriptor(dout, queries),
        None if dq_accum is None else _descriptor(dq_accum, queries), _descriptor(dk, CONSUMER_M.value),
        tensor_view(dk), _descriptor(dv, CONSUMER_M.value), tensor_view(dv), _descriptor(q, queries),
        _descriptor(k, CONSUMER_M.value), _descriptor(v, CONSUMER_M.value), stats, stats_stride, tensors.schedule_k,
        tile_counter, *attn_mods(lists, plan), scalars.query_offset, heads, heads // heads_k, len_q, len_k, tiles,
        total_tiles, **_meta(options, q, lists, plan, RESOURCES if dq_accum is None else FUSED_RESOURCES),
    )  # fmt: skip


def launch_fused_backward(
    options: dict, tile_counter, launch, dout, dq, dk, dv, q, k, v, out, lse, dlse, stats, stats_stride: int,
    dq_accum: torch.Tensor, plan: CallPlan,
) -> None:  # fmt: skip
    """The whole backward pass. `dq_accum` is contiguous float32 scratch of the shape of `q`."""
    batch, heads, len_q, head_dim = q.shape
    grid, score = (batch * heads, cdiv(len_q, PREPROCESS_M)), score_mod_of(plan)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_M": PREPROCESS_M, "num_warps": 4}
    launch(
        bwd_preprocess_kernel, grid,
        tensor_view(dout), tensor_view(out), lse, dlse, stats, stats_stride, dq_accum, score, heads, len_q, **sizes,
    )  # fmt: skip
    launch_dkdv(options, tile_counter, launch, dout, dk, dv, q, k, v, stats, stats_stride, plan, dq_accum)
    launch(bwd_postprocess_kernel, grid, tensor_view(dq), dq_accum, score.scale, heads, len_q, **sizes)
