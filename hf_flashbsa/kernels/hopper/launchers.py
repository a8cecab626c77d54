"""Launchers of the Hopper kernels. Tensors and the rest are those of the portable launchers."""

from __future__ import annotations

import functools

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hf_flashbsa.kernels.arguments import cdiv, operand_of, rules_of, score_of, tiles_of, width_of
from hf_flashbsa.kernels.hopper.common import CONSUMERS, ROWS
from hf_flashbsa.kernels.hopper.dkdv import dkdv_kernel
from hf_flashbsa.kernels.hopper.dq import dq_kernel
from hf_flashbsa.kernels.hopper.forward import forward_kernel
from hf_flashbsa.kernels.state import Extras, Params
from hf_flashbsa.kernels.sums import begin_sums_kernel, end_sums_kernel

#: Rows of a tile: as many as a work table has per entry.
TILE = ROWS.value * CONSUMERS.value
#: All threads of a program share the registers of a multiprocessor: 384 with two consumers and a producer, 512 with
#: the warpgroup that adds up the gradient of the queries.
OPTIONS = {"num_warps": 4, "maxnreg": 168}
OPTIONS_OF_SUMS = {"num_warps": 4, "maxnreg": 128}
#: Queries of a program before and after the sums.
SUM_ROWS = 64


#: Up to so many tiles in a sequence, or keys in a window, programs stay and take one tile after the other, which hides
#: how tiles begin and end. Where a tile meets more, that counts little, and the GPU's own order is the better one.
#: Programs that claim their tiles always stay.
RESIDENT_TILES = 64
RESIDENT_WINDOW = 2048


@functools.cache
def _layout(rows: int, dim: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([1, 1, rows, dim], element)


def _descriptor(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """`x` for TMA, in boxes of `rows` rows of a head."""
    dim = x.shape[-1]
    # The strides of dimensions of size 1 may be anything, but TMA wants multiples of 16 bytes.
    strides = [stride if size > 1 else dim for size, stride in zip(x.shape, x.stride(), strict=True)]
    strides[-1] = 1
    return TensorDescriptor(x, list(x.shape), strides, [1, 1, rows, dim], _layout(rows, dim, x.dtype))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _meta(
    options: dict, q: torch.Tensor, lists: torch.Tensor | None, params: Params, resources: dict = OPTIONS
) -> dict:
    return {"HEAD_DIM": q.shape[-1], "LISTED": params.block_size, "WIDTH": width_of(lists), **options, **resources}


def _programs(total: int, tiles: int, claims: torch.Tensor | None, params: Params, device: torch.device) -> int:
    """How many programs share `total` tiles, of which a sequence has `tiles`."""
    short = tiles <= RESIDENT_TILES or (params.window is not None and params.window <= RESIDENT_WINDOW)
    return min(total, _multiprocessors(device)) if short or claims is not None else total


def launch_forward(options: dict, claims, launch, q, k, v, out, lse, extras: Extras, params: Params) -> None:
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(extras.work_q, len_q, batch, TILE)
    total = tiles * heads * batch
    lists = extras.blocks_q
    launch(
        forward_kernel, (_programs(total, tiles, claims, params, q.device),),
        _descriptor(q, ROWS.value), _descriptor(k, options["BLOCK_N"]), _descriptor(v, options["BLOCK_N"]),
        _descriptor(out, ROWS.value), operand_of(out), lse, extras.sinks, extras.work_q, claims,
        *rules_of(lists, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles, total,
        **_meta(options, q, lists, params),
    )  # fmt: skip


def launch_dq(
    options: dict, claims, launch, dout, dq, q, k, v, out, lse, dlse, rowwise, plane: int, extras: Extras,
    params: Params,
) -> None:  # fmt: skip
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(extras.work_q, len_q, batch, TILE)
    total = tiles * heads * batch
    keys, lists = options["BLOCK_N"], extras.blocks_q
    launch(
        dq_kernel, (_programs(total, tiles, claims, params, q.device),),
        _descriptor(dout, ROWS.value), _descriptor(dq, ROWS.value), operand_of(dq), _descriptor(q, ROWS.value),
        _descriptor(k, keys), _descriptor(v, keys), _descriptor(out, keys), lse, dlse, rowwise, plane,
        extras.work_q, claims,
        *rules_of(lists, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles, total,
        **_meta(options, q, lists, params),
    )  # fmt: skip


def launch_dkdv(
    options: dict, claims, launch, dout, dk, dv, q, k, v, rowwise, plane: int, extras: Extras, params: Params,
    sums: torch.Tensor | None = None,
) -> None:  # fmt: skip
    (_, heads, len_q, _), (batch, heads_k, len_k, _) = q.shape, k.shape
    tiles, batch = tiles_of(extras.work_k, len_k, batch, TILE)
    total = tiles * heads_k * batch
    queries, lists = options["BLOCK_M"], extras.blocks_k
    launch(
        dkdv_kernel, (_programs(total, tiles, claims, params, q.device),),
        _descriptor(dout, queries), None if sums is None else _descriptor(sums, queries),
        _descriptor(dk, ROWS.value), operand_of(dk), _descriptor(dv, ROWS.value), operand_of(dv),
        _descriptor(q, queries), _descriptor(k, ROWS.value), _descriptor(v, ROWS.value), rowwise, plane,
        extras.work_k, claims,
        *rules_of(lists, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles, total,
        **_meta(options, q, lists, params, OPTIONS if sums is None else OPTIONS_OF_SUMS),
    )  # fmt: skip


def launch_sums(
    options: dict, claims, launch, dout, dq, dk, dv, q, k, v, out, lse, dlse, rowwise, plane: int, sums: torch.Tensor,
    extras: Extras, params: Params,
) -> None:  # fmt: skip
    """The whole backward pass. `sums` is float32 and contiguous, of the shape of `q`, for the kernels alone."""
    batch, heads, len_q, head_dim = q.shape
    grid, score = (batch * heads, cdiv(len_q, SUM_ROWS)), score_of(extras, params)
    sizes = {"HEAD_DIM": head_dim, "BLOCK_M": SUM_ROWS, "num_warps": 4}
    launch(
        begin_sums_kernel, grid,
        operand_of(dout), operand_of(out), lse, dlse, rowwise, plane, sums, score, heads, len_q, **sizes,
    )  # fmt: skip
    launch_dkdv(options, claims, launch, dout, dk, dv, q, k, v, rowwise, plane, extras, params, sums)
    launch(end_sums_kernel, grid, operand_of(dq), sums, score.scale, heads, len_q, **sizes)
