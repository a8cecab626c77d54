"""Launchers of the portable Triton kernels: arguments, grids and configurations."""

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
from hf_flashbsa.kernels.call_plan import CallPlan
from hf_flashbsa.kernels.triton.bwd import dbias_kernel, dkdv_kernel, dq_kernel
from hf_flashbsa.kernels.triton.fwd import forward_kernel
from hf_flashbsa.kernels.triton.split import combine_kernel

_log_once = functools.cache(logging.getLogger(__name__).info)


def _warn_unaligned(loaded: tuple[torch.Tensor, ...], bias: torch.Tensor | None) -> None:
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


def _config(kernel: str, loaded: tuple[torch.Tensor, ...], plan: CallPlan) -> tuning.Config:
    """The configuration for tensors `q, k, v` and whatever else of their kind the kernel loads."""
    q, _, v, *_ = loaded
    aligned = all(map(is_aligned, loaded))
    tensors = plan.tensors
    plain = tensors.bias is None and tensors.mask is None and tensors.segment_ids_q is None
    plain = plain and plan.scalars.softcap is None
    block_dim = max(padded(q.shape[-1]), padded(v.shape[-1]))
    config = tuning.select(kernel, tuning.architecture(q.device), block_dim, q.element_size(), plain, aligned)
    if tensors.block_grid is not None:  # no tile reaches over a block's edge
        size = plan.scalars.block_size
        config = config._replace(block_m=min(config.block_m, size), block_n=min(config.block_n, size))
    return config


def _meta(
    config: tuning.Config, q: torch.Tensor, v: torch.Tensor, plan: CallPlan, lists: torch.Tensor | None = None
) -> dict:
    return {
        "HEAD_DIM": q.shape[-1],
        "HEAD_DIM_V": v.shape[-1],
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded(q.shape[-1]),
        "BLOCK_DV": padded(v.shape[-1]),
        "SPARSE_BLOCK": plan.scalars.block_size or 0,
        "MAX_BLOCKS_POW2": max_blocks_of(lists),
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def _packed(config: tuning.Config, group: int, len_q: int, plan: CallPlan) -> tuple[int, tuning.Config]:
    """How many query heads that share keys have their rows in one tile, and the configuration for such tiles.

    A bias, dropout and block lists go by head and by row of a tile; more rows fill tiles of their own.
    """
    tensors = plan.tensors
    by_head = tensors.bias is not None or plan.scalars.drop_threshold is not None
    if tensors.schedule_q is not None or tensors.block_grid is not None:
        return 1, config
    pack = 1 if by_head or group * len_q > config.block_m else group
    if dict(tuning.overrides()).get("forward") is not None:
        return pack, config
    rows = 1 << (max(16, len_q * pack) - 1).bit_length()
    if rows >= config.block_m:
        return pack, config
    return pack, config._replace(block_m=rows, num_warps=min(config.num_warps, 4))


def launch_forward(launch, q, k, v, out, lse, plan: CallPlan, parts: tuple[torch.Tensor, ...] = ()) -> None:
    """`parts` are float32 scratch memory for `out` and `lse` of each part of the keys, where they are split."""
    tensors, scalars, _ = plan
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    _warn_unaligned((q, k, v), tensors.bias)
    config = _config("forward", (q, k, v), plan)
    pack, config = _packed(config, heads // heads_k, len_q, plan)
    tiles, batch = tiles_of(tensors.schedule_q, len_q * pack, batch, config.block_m)
    to_out, to_lse, sinks, splits, split_keys = out, lse, tensors.sinks, 1, None
    if parts:
        (to_out, to_lse), sinks, splits = parts, None, scalars.num_splits
        split_keys = cdiv(cdiv(len_k, splits), config.block_n) * config.block_n
    launch(
        forward_kernel, (tiles * (heads // pack) * batch, splits),
        tensor_view(q), tensor_view(k), tensor_view(v), tensor_view(to_out), to_lse, sinks, tensors.schedule_q,
        *attn_mods(tensors.block_table_q, plan),
        scalars.query_offset if tensors.query_offset_tensor is None else tensors.query_offset_tensor,
        heads, heads // heads_k, len_q, len_k, tiles, split_keys, batch,
        **_meta(config, q, v, plan, tensors.block_table_q), PACK=pack,
    )  # fmt: skip
    if parts:
        launch(
            combine_kernel, (len_q * heads * batch,),
            tensor_view(out), lse, tensor_view(to_out), to_lse, tensors.sinks, batch, heads, len_q,
            HEAD_DIM_V=v.shape[-1], BLOCK_DV=padded(v.shape[-1]), SPLITS=splits,
            SPLITS_POW2=1 << (splits - 1).bit_length(), num_warps=4,
        )  # fmt: skip


def launch_dq(launch, dout, dq, q, k, v, out, lse, dlse, stats, stats_stride: int, plan: CallPlan) -> None:
    tensors, scalars, _ = plan
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dq", (q, k, v, dout), plan)
    tiles, batch = tiles_of(tensors.schedule_q, len_q, batch, config.block_m)
    launch(
        dq_kernel, (tiles * heads * batch,),
        tensor_view(dout), tensor_view(dq), tensor_view(q), tensor_view(k), tensor_view(v), tensor_view(out), lse,
        dlse, stats, stats_stride, tensors.schedule_q,
        *attn_mods(tensors.block_table_q, plan), scalars.query_offset, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, plan, tensors.block_table_q),
    )  # fmt: skip


def launch_dkdv(launch, dout, dk, dv, q, k, v, stats, stats_stride: int, plan: CallPlan) -> None:
    tensors, scalars, _ = plan
    (_, heads, len_q, _), (batch, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dkdv", (q, k, v, dout), plan)
    tiles, batch = tiles_of(tensors.schedule_k, len_k, batch, config.block_n)
    launch(
        dkdv_kernel, (tiles * heads_k * batch,),
        tensor_view(dout), tensor_view(dk), tensor_view(dv), tensor_view(q), tensor_view(k), tensor_view(v), stats,
        stats_stride, tensors.schedule_k,
        *attn_mods(tensors.block_table_k, plan), scalars.query_offset, heads, heads // heads_k, len_q, len_k, tiles,
        **_meta(config, q, v, plan, tensors.block_table_k),
    )  # fmt: skip


def launch_dbias(launch, dout, dbias, q, k, v, stats, stats_stride: int, plan: CallPlan) -> None:
    tensors, scalars, _ = plan
    (batch, heads, len_q, _), (_, heads_k, len_k, _) = q.shape, k.shape
    config = _config("dbias", (q, k, v, dout), plan)
    tiles_m, tiles_n = cdiv(dbias.shape[2], config.block_m), cdiv(dbias.shape[3], config.block_n)
    sequences = tensors.sequences
    launch(
        dbias_kernel, (tiles_n, tiles_m, dbias.shape[0] * dbias.shape[1]),
        tensor_view(dout), strided_tensor(dbias), tensor_view(q), tensor_view(k), tensor_view(v), stats,
        stats_stride, sequences,
        *attn_mods(tensors.block_table_q, plan), scalars.query_offset,
        batch if sequences is None else sequences.shape[0], heads, heads // heads_k, dbias.shape[0],
        dbias.shape[1], len_q, len_k,
        **_meta(config, q, v, plan, tensors.block_table_q),
    )  # fmt: skip
