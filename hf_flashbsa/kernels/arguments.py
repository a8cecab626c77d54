"""Packs the arguments of a call into the structs that kernels take (structs.py)."""

from __future__ import annotations

import functools

import torch

from hf_flashbsa.kernels.call_plan import CallPlan
from hf_flashbsa.kernels.dropout import keep_scale
from hf_flashbsa.kernels.structs import AttnMods, BlockTable, MaskBounds, ScoreMod, StridedTensor, TensorView
from hf_flashbsa.kernels.tables import SCHEDULE_TILE, BlockListColumn

#: Stands in for a scale of 0, whose product with a hidden score's -inf would be NaN.
TINY_SCALE = 1e-30


def tensor_view(x: torch.Tensor) -> TensorView:
    strides = x.stride()[:3]
    return TensorView(x, *strides, _align_hint(x, strides))


def strided_tensor(x: torch.Tensor | None) -> StridedTensor:
    if x is None:
        return StridedTensor(None, None, None, None, None, None)
    stride_b = 0 if x.shape[0] == 1 else x.stride(0)
    stride_h = 0 if x.shape[1] == 1 else x.stride(1)
    align_hint = _align_hint(x, (stride_b, stride_h, x.stride(2))) if x.stride(3) == 1 else None
    return StridedTensor(x, stride_b, stride_h, x.stride(2), x.stride(3), align_hint)


def is_aligned(x: torch.Tensor) -> bool:
    """Whether every row of a `(batch, heads, length, dim)` tensor begins at a multiple of 16 bytes."""
    return _is_aligned(x, x.stride()[:3])


def _is_aligned(x: torch.Tensor, strides: tuple[int, ...]) -> bool:
    return x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in strides)


def _align_hint(x: torch.Tensor, strides: tuple[int, ...]) -> int | None:
    """`align_hint` of a TensorView or StridedTensor. Of an int argument Triton only knows whether 16 divides it."""
    return 1 if _is_aligned(x, strides) and any(stride % 16 for stride in strides) else None


def mask_bounds(plan: CallPlan) -> MaskBounds:
    ids_q, ids_k = plan.tensors.segment_ids_q, plan.tensors.segment_ids_k
    return MaskBounds(
        window_left=plan.scalars.window_left,
        window_right=plan.scalars.window_right,
        segment_ids_q=ids_q,
        segment_ids_k=ids_k,
        ids_stride_q=None if ids_q is None else ids_q.stride(0),
        ids_stride_k=None if ids_k is None else ids_k.stride(0),
        ids_length_q=None if ids_q is None else ids_q.shape[1],
        ids_length_k=None if ids_k is None else ids_k.shape[1],
    )


def block_table(lists: torch.Tensor | None, plan: CallPlan) -> BlockTable | None:
    if lists is None:
        return None
    grid = plan.tensors.block_grid
    return BlockTable(
        lists,
        0 if lists.shape[0] == 1 else lists.stride(0),
        0 if lists.shape[1] == 1 else lists.stride(1),
        lists.stride(2),
        grid,
        0 if grid.shape[0] == 1 else grid.stride(0),
        0 if grid.shape[1] == 1 else grid.stride(1),
        grid.stride(2),
        plan.tensors.block_masks,
    )


def max_blocks_of(lists: torch.Tensor | None) -> int:
    """The power of 2 that holds the longest block list (`Tiles.max_blocks`)."""
    return 0 if lists is None else 1 << (lists.shape[-1] - BlockListColumn.FIRST - 1).bit_length()


def _as_int32(bits: int) -> int:
    """32 bits as a signed number: Triton takes larger ones for 64 bits wide."""
    return bits - (bits >> 31 << 32)


def score_mod_of(plan: CallPlan) -> ScoreMod:
    dropout, slopes = plan.scalars.drop_threshold is not None, plan.tensors.alibi_slopes
    return ScoreMod(
        scale=plan.scalars.softmax_scale or TINY_SCALE,
        softcap=plan.scalars.softcap,
        bias_hidden=None if plan.tensors.bias is None else torch.finfo(plan.tensors.bias.dtype).min,
        bias_len_q=None if plan.tensors.bias is None else plan.tensors.bias.shape[2],
        bias_len_k=None if plan.tensors.bias is None else plan.tensors.bias.shape[3],
        seed=plan.tensors.seed if dropout else None,
        drop_threshold=_as_int32(plan.scalars.drop_threshold << 16) if dropout else None,
        keep_scale=keep_scale(plan.scalars.drop_threshold) if dropout else None,
        alibi_slopes=slopes,
        alibi_stride_b=None if slopes is None else 0 if slopes.shape[0] == 1 else slopes.stride(0),
    )


def attn_mods(lists: torch.Tensor | None, plan: CallPlan) -> AttnMods:
    """AttnMods of a kernel that visits the blocks in `lists`."""
    return AttnMods(
        bounds=mask_bounds(plan),
        dense_mask=strided_tensor(plan.tensors.mask),
        blocks=block_table(lists, plan),
        score_mod=score_mod_of(plan),
        bias=strided_tensor(plan.tensors.bias),
    )


# Triton's own cdiv and next_power_of_2 also serve as compile-time functions, and cost microseconds a call here.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def padded(dim: int) -> int:
    # ptxas 12.8, in Triton 3.6, compiles some kernels whose products are 16 columns wide to wrong code for Hopper.
    return max(32, 1 << (dim - 1).bit_length())


def tiles_of(schedule: torch.Tensor | None, length: int, batch: int, block: int) -> tuple[int, int]:
    """Tiles per head, and the batch factor of the grid (1 with a tile schedule, which spans the batch)."""
    if schedule is None:
        return cdiv(length, block), batch
    return schedule.shape[0] * (SCHEDULE_TILE // block), 1
