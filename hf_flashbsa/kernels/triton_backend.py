"""Launchers of the portable Triton kernels: operands, grids and configurations."""

from __future__ import annotations

import functools
import logging

import torch

from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.arguments import (
    attn_mods,
    cdiv,
    is_aligned,
    max_blocks_of,
    padded,
    strided_tensor,
    tensor_view,
    tiles_of,
)
from hf_flashbsa.kernels.gluon_sm90 import dispatch
from hf_flashbsa.kernels.launch import replay
from hf_flashbsa.kernels.state import Extras, Params, carried, sinks_gradient
from hf_flashbsa.kernels.triton.bwd import dbias_kernel, dkdv_kernel, dq_kernel
from hf_flashbsa.kernels.triton.fwd import forward_kernel

_log_once = functools.cache(logging.getLogger(__name__).info)


def _tell_of_narrow_loads(loaded: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> None:
    cost = "kernels load them element by element, which can take several times as long"
    if not all(map(is_aligned, loaded)):
        _log_once(
            f"rows of queries, keys or values do not begin at multiples of 16 bytes: {cost}; "
            "16-bit head dims that are multiples of 8 avoid that"
        )
    # A single query reads each place once; a bias that is the same for all keys has no rows.
    reread = bias is not None and bias.shape[2] > 1 and bias.stride(3) > 0
    if reread and not (is_aligned(bias) and bias.stride(3) == 1):
        _log_once(
            f"rows of a bias are not contiguous or do not begin at multiples of 16 bytes: {cost}; "
            "a slice of a contiguous tensor with longer rows avoids that"
        )


def _config(kernel: str, loaded: tuple[torch.Tensor, ...], extras: Extras, params: Params) -> tuning.Config:
    """The configuration for tensors `q, k, v` and whatever else of their kind the kernel loads."""
    q, _, v, *_ = loaded
    aligned = all(map(is_aligned, loaded))
    plain = extras.bias is None and extras.mask is None and extras.segment_ids_q is None and params.softcap == 0.0
    block_dim = max(padded(q.shape[-1]), padded(v.shape[-1]))
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
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DV": padded(v.shape[-1]),
        "SPARSE_BLOCK": params.block_size,
        "MAX_BLOCKS_POW2": max_blocks_of(lists),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _launch_forward(launch, q, k, v, out, lse, extras: Extras, params: Params) -> None:
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    _tell_of_narrow_loads((q, k, v), extras.bias)
    config = _config("forward", (q, k, v), extras, params)
    tiles, batch = tiles_of(extras.work_q, len_q, batch, config.block_m)
    launch(
        forward_kernel, (tiles * heads * batch,),
        tensor_view(q), tensor_view(k), tensor_view(v), tensor_view(out), lse, extras.sinks, extras.work_q,
        *attn_mods(extras.blocks_q, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, params, extras.blocks_q),
    )  # fmt: skip


def _launch_dq(
    launch, dout, dq, q, k, v, out, lse, dlse, stats, stats_stride: int, extras: Extras, params: Params
) -> None:
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dq", (q, k, v, dout), extras, params)
    tiles, batch = tiles_of(extras.work_q, len_q, batch, config.block_m)
    launch(
        dq_kernel, (tiles * heads * batch,), tensor_view(dout), tensor_view(dq), tensor_view(q), tensor_view(k),
        tensor_view(v), tensor_view(out), lse, dlse, stats, stats_stride, extras.work_q,
        *attn_mods(extras.blocks_q, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, params, extras.blocks_q),
    )  # fmt: skip


def _launch_dkdv(launch, dout, dk, dv, q, k, v, stats, stats_stride: int, extras: Extras, params: Params) -> None:
    (_, heads, len_q, _), (batch, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dkdv", (q, k, v, dout), extras, params)
    tiles, batch = tiles_of(extras.work_k, len_k, batch, config.block_n)
    launch(
        dkdv_kernel, (tiles * heads_k * batch,), tensor_view(dout), tensor_view(dk), tensor_view(dv), tensor_view(q),
        tensor_view(k), tensor_view(v), stats, stats_stride, extras.work_k,
        *attn_mods(extras.blocks_k, extras, params), params.diagonal, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, params, extras.blocks_k),
    )  # fmt: skip


def _launch_dbias(launch, dout, dbias, q, k, v, stats, stats_stride: int, extras: Extras, params: Params) -> None:
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dbias", (q, k, v, dout), extras, params)
    tiles_m, tiles_n = cdiv(dbias.shape[2], config.block_m), cdiv(dbias.shape[3], config.block_n)
    sequences = extras.sequences
    launch(
        dbias_kernel, (tiles_n, tiles_m, dbias.shape[0] * dbias.shape[1]), tensor_view(dout), strided_tensor(dbias),
        tensor_view(q), tensor_view(k), tensor_view(v), stats, stats_stride, sequences,
        *attn_mods(extras.blocks_q, extras, params), params.diagonal,
        batch if sequences is None else sequences.shape[0], heads, heads // heads_k, dbias.shape[0], dbias.shape[1],
        len_q, len_k, **_meta(config, q, v, params, extras.blocks_q),
    )  # fmt: skip


def _forward(launch, inputs, outputs, params: Params) -> None:
    (q, k, v), extras = inputs[:3], Extras(*inputs[3:])
    out, lse, tile_counter = outputs
    run = dispatch.select_launcher("forward", q, k, v, (), tile_counter, extras, params) or _launch_forward
    run(launch, q, k, v, out, lse, extras, params)


def _backward(launch, inputs, outputs, params: Params) -> None:
    (dout, dlse, q, k, v, out, lse), extras = inputs[:7], Extras(*inputs[7:])
    stats, dq_accum, dq, dk, dv, dbias, tile_counter_dq, tile_counter_dkdv = outputs
    stats_stride = lse.numel()
    if dq_accum is not None:
        run = dispatch.select_launcher("fused_backward", q, k, v, (dout, out), tile_counter_dkdv, extras, params)
        run(launch, dout, dq, dk, dv, q, k, v, out, lse, dlse, stats, stats_stride, dq_accum, extras, params)
        return
    if q.numel() > 0:  # before the others, which read what it makes of each query
        run = dispatch.select_launcher("dq", q, k, v, (dout, out), tile_counter_dq, extras, params) or _launch_dq
        run(launch, dout, dq, q, k, v, out, lse, dlse, stats, stats_stride, extras, params)
    if k.numel() > 0:
        run = dispatch.select_launcher("dkdv", q, k, v, (dout,), tile_counter_dkdv, extras, params) or _launch_dkdv
        run(launch, dout, dk, dv, q, k, v, stats, stats_stride, extras, params)
    if dbias is not None:
        _launch_dbias(launch, dout, dbias, q, k, v, stats, stats_stride, extras, params)


def forward(q, k, v, out, lse, extras: Extras, params: Params) -> None:
    """Fills `out` and `lse`, as `autograd` makes them for `q` and `v`."""
    if q.numel() > 0:
        tile_counter = dispatch.new_tile_counters(extras, 1, q.device)
        replay(_forward, (q, k, v, *carried(extras)), (out, lse, *tile_counter), params)


def backward(dout, dlse, q, k, v, out, lse, gradients, extras: Extras, params: Params) -> None:
    """Fills `gradients`: dq, dk, dv, dbias, dsinks, as `autograd` makes them for the other arguments, or None."""
    dq, dk, dv, dbias, dsinks = gradients
    stats_stride = lse.numel()
    stats = lse.new_empty_strided((4 if params.drop_threshold > 0 else 2, stats_stride), (stats_stride, 1))
    dlse = None if dlse is None else dlse.contiguous()
    tile_counter = dispatch.new_tile_counters(extras, 2, q.device)
    dq_accum = None
    if not params.deterministic and dispatch.select_launcher(
        "fused_backward", q, k, v, (dout, out), None, extras, params
    ):
        dq_accum = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    filled = (stats, dq_accum, dq, dk, dv, None if dbias is None or dbias.numel() == 0 else dbias, *tile_counter)
    replay(_backward, (dout, dlse, q, k, v, out, lse, *carried(extras)), filled, params)
    if extras.sinks is not None:
        dsinks.copy_(sinks_gradient(extras.sinks, lse, stats[1].view_as(lse)))
