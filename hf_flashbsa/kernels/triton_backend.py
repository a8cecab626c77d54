"""Launchers of the portable Triton kernels: operands, grids and configurations."""

from __future__ import annotations

import functools

import torch

from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.backward import dbias_kernel, dkdv_kernel, dq_kernel, rowwise_kernel
from hf_flashbsa.kernels.dropout import keep_scale
from hf_flashbsa.kernels.forward import forward_kernel
from hf_flashbsa.kernels.launch import replay
from hf_flashbsa.kernels.primitives import WORK_TILE, Blocks, Mask, Matrix, Operand, Score
from hf_flashbsa.kernels.state import Extras, Params, sinks_gradient

#: Stands in for a scale of 0, whose product with a hidden score's -inf would be NaN.
TINY_SCALE = 1e-30


def _operand(x: torch.Tensor) -> Operand:
    return Operand(x, *x.stride()[:3])


def _matrix(x: torch.Tensor | None) -> Matrix:
    if x is None:
        return Matrix(None, None, None, None, None)
    stride_b = 0 if x.shape[0] == 1 else x.stride(0)
    stride_h = 0 if x.shape[1] == 1 else x.stride(1)
    return Matrix(x, stride_b, stride_h, x.stride(2), x.stride(3))


def _mask(extras: Extras, params: Params) -> Mask:
    ids_q, ids_k = extras.segment_ids_q, extras.segment_ids_k
    return Mask(
        window_left=None if params.window_left < 0 else params.window_left,
        window_right=None if params.window_right < 0 else params.window_right,
        segment_ids_q=ids_q,
        segment_ids_k=ids_k,
        ids_stride_q=None if ids_q is None else ids_q.stride(0),
        ids_stride_k=None if ids_k is None else ids_k.stride(0),
    )


def _blocks(lists: torch.Tensor | None, extras: Extras) -> Blocks | None:
    if lists is None:
        return None
    grid = extras.grid
    return Blocks(
        lists,
        0 if lists.shape[0] == 1 else lists.stride(0),
        0 if lists.shape[1] == 1 else lists.stride(1),
        lists.stride(2),
        grid,
        0 if grid.shape[0] == 1 else grid.stride(0),
        0 if grid.shape[1] == 1 else grid.stride(1),
        grid.stride(2),
        extras.tile_masks,
    )


def _as_int32(bits: int) -> int:
    """32 bits as a signed number: Triton takes larger ones for 64 bits wide."""
    return bits - (bits >> 31 << 32)


def _score(extras: Extras, params: Params) -> Score:
    dropout = params.drop_threshold > 0
    return Score(
        scale=params.scale or TINY_SCALE,
        softcap=params.softcap if params.softcap > 0.0 else None,
        bias_hidden=None if extras.bias is None else torch.finfo(extras.bias.dtype).min,
        bias_len_q=None if extras.bias is None else extras.bias.shape[2],
        bias_len_k=None if extras.bias is None else extras.bias.shape[3],
        seed=extras.seed if dropout else None,
        drop_threshold=_as_int32(params.drop_threshold) if dropout else None,
        keep_scale=keep_scale(params.drop_threshold) if dropout else None,
    )


# Triton's own cdiv and next_power_of_2 also serve as compile-time functions, and cost microseconds a call here.
def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _padded(dim: int) -> int:
    # ptxas 12.8, in Triton 3.6, compiles some kernels whose products are 16 columns wide to wrong code for Hopper.
    return max(32, 1 << (dim - 1).bit_length())


def _is_aligned(*operands: Operand) -> bool:
    """Whether every row begins at a multiple of 16 bytes."""
    for x, stride_b, stride_h, stride_s in operands:
        if (stride_b | stride_h | stride_s) * x.element_size() % 16 or x.data_ptr() % 16:
            return False
    return True


def _config(
    kernel: str, q: torch.Tensor, v: torch.Tensor, aligned: bool, extras: Extras, params: Params
) -> tuning.Config:
    plain = extras.bias is None and extras.mask is None and extras.segment_ids_q is None and params.softcap == 0.0
    block_dim = max(_padded(q.shape[-1]), _padded(v.shape[-1]))
    config = tuning.select(kernel, tuning.architecture(q.device), block_dim, q.element_size(), plain, aligned)
    if extras.grid is not None:  # no tile reaches over a block's edge
        size = params.block_size
        config = config._replace(block_m=min(config.block_m, size), block_n=min(config.block_n, size))
    return config


def _meta(
    config: tuning.Config, q: torch.Tensor, v: torch.Tensor, params: Params, lists: torch.Tensor | None = None
) -> dict:
    return {
        "HEAD_DIM": q.shape[-1],
        "HEAD_DIM_V": v.shape[-1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": _padded(q.shape[-1]),
        "BLOCK_DV": _padded(v.shape[-1]),
        "LISTED": params.block_size,
        "WIDTH": 0 if lists is None else 1 << (lists.shape[-1] - 3).bit_length(),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _tiles(work: torch.Tensor | None, length: int, batch: int, block: int) -> tuple[int, int]:
    """Tiles per head, and the batch factor of the grid (a work table spans the batch)."""
    if work is None:
        return _cdiv(length, block), batch
    return work.shape[0] * (WORK_TILE.value // block), 1


def _launch_forward(launch, inputs, outputs, params: Params) -> None:
    (q, k, v), extras, (out, lse) = inputs[:3], Extras(*inputs[3:]), outputs
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    operands = (_operand(q), _operand(k), _operand(v))
    config = _config("forward", q, v, _is_aligned(*operands), extras, params)
    tiles, batch = _tiles(extras.work_q, len_q, batch, config.block_m)
    launch(
        forward_kernel, (tiles * heads * batch,),
        *operands, _operand(out), lse, extras.sinks, extras.work_q,
        _mask(extras, params), _matrix(extras.mask), _blocks(extras.blocks_q, extras), _score(extras, params),
        _matrix(extras.bias), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, params, extras.blocks_q),
    )  # fmt: skip


def _launch_backward(launch, inputs, outputs, params: Params) -> None:
    (dout, dlse, q, k, v, out, lse), extras = inputs[:7], Extras(*inputs[7:])
    rowwise, dq, dk, dv, dbias = outputs
    (batch, heads, len_q, _), (batch_k, heads_k, len_k, _) = q.shape, k.shape
    mask, score, group = _mask(extras, params), _score(extras, params), heads // heads_k
    plane = lse.numel()
    dense, bias = _matrix(extras.mask), _matrix(extras.bias)
    operands = (_operand(q), _operand(k), _operand(v))
    dout_ = _operand(dout)
    aligned = _is_aligned(*operands, dout_)
    if q.numel() > 0:
        launch(
            rowwise_kernel, (_cdiv(len_q, 64) * batch * heads,),
            _operand(out), dout_, lse, dlse, rowwise, score, heads, len_q, plane,
            HEAD_DIM_V=v.shape[-1], BLOCK_M=64, BLOCK_DV=_padded(v.shape[-1]), num_warps=4,
        )  # fmt: skip
        config = _config("dq", q, v, aligned, extras, params)
        tiles, rows = _tiles(extras.work_q, len_q, batch, config.block_m)
        launch(
            dq_kernel, (tiles * heads * rows,),
            dout_, _operand(dq), *operands, rowwise, plane, extras.work_q, mask, dense,
            _blocks(extras.blocks_q, extras), score, bias, params.diagonal, heads, group, len_q, len_k, tiles,
            **_meta(config, q, v, params, extras.blocks_q),
        )  # fmt: skip
    if k.numel() > 0:
        config = _config("dkdv", q, v, aligned, extras, params)
        tiles, rows = _tiles(extras.work_k, len_k, batch_k, config.block_n)
        launch(
            dkdv_kernel, (tiles * heads_k * rows,),
            dout_, _operand(dk), _operand(dv), *operands, rowwise, plane, extras.work_k, mask, dense,
            _blocks(extras.blocks_k, extras), score, bias, params.diagonal, heads, group, len_q, len_k, tiles,
            **_meta(config, q, v, params, extras.blocks_k),
        )  # fmt: skip
    if dbias is not None:
        config = _config("dbias", q, v, aligned, extras, params)
        tiles_m, tiles_n = _cdiv(dbias.shape[2], config.block_m), _cdiv(dbias.shape[3], config.block_n)
        sequences = extras.sequences
        launch(
            dbias_kernel, (tiles_n, tiles_m, dbias.shape[0] * dbias.shape[1]),
            dout_, _matrix(dbias), *operands, rowwise, plane, sequences, mask, dense,
            _blocks(extras.blocks_q, extras), score, bias, params.diagonal,
            batch if sequences is None else sequences.shape[0], heads, group, dbias.shape[0], dbias.shape[1], len_q,
            len_k, **_meta(config, q, v, params, extras.blocks_q),
        )  # fmt: skip


def forward(q, k, v, out, lse, extras: Extras, params: Params) -> None:
    """Fills `out` and `lse`, as `autograd` makes them for `q` and `v`."""
    if q.numel() > 0:
        replay(_launch_forward, (q, k, v, *extras), (out, lse), params)


def backward(dout, dlse, q, k, v, out, lse, gradients, extras: Extras, params: Params) -> None:
    """Fills `gradients`: dq, dk, dv, dbias, dsinks, as `autograd` makes them for the other arguments."""
    dq, dk, dv, dbias, dsinks = gradients
    rowwise = lse.new_empty((4 if params.drop_threshold > 0 else 2, *lse.shape))
    dlse = None if dlse is None else dlse.contiguous()
    filled = (rowwise, dq, dk, dv, dbias if dbias.numel() > 0 else None)
    replay(_launch_backward, (dout, dlse, q, k, v, out, lse, *extras), filled, params)
    if extras.sinks is not None:
        dsinks.copy_(sinks_gradient(extras.sinks, lse, rowwise[1]))
