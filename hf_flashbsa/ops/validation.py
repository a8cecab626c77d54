"""What `hf_flashbsa.attention` refuses. Errors name the argument and the remedy; no tensor's values are read back."""

from __future__ import annotations

import math

import torch

from hf_flashbsa.kernels.tile_schedule import Sequences, Sizes
from hf_flashbsa.masks.block_layout import BlockLayout, TracedLayout
from hf_flashbsa.masks.spec import AttentionSpec

MAX_HEAD_DIM = 256


def sizes_of(q: torch.Tensor, k: torch.Tensor) -> Sizes:
    return Sizes(q.shape[0], k.shape[0], q.shape[2], k.shape[2])


def check_scalars(softmax_scale: float, softcap: float | None, dropout_p: float) -> None:
    if not 0.0 <= softmax_scale < math.inf:
        raise ValueError(f"softmax_scale: {softmax_scale} is not a finite number >= 0; negate q for a negative scale.")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap} is not a finite number > 0; leave it out for no cap.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: {dropout_p} is not in [0, 1).")


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v: shapes are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "give (batch, heads, length, head dim) each."
        )
    (_, heads, _, dim), (_, heads_k, _, dim_k), dim_v = q.shape, k.shape, v.shape[-1]
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v: dtypes are {q.dtype}, {k.dtype}, {v.dtype}; give one floating dtype.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v: on {q.device}, {k.device}, {v.device}; move them to one device.")
    if dim != dim_k:
        raise ValueError(f"k: head dim {dim_k} differs from q's {dim}.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: {tuple(v.shape[:3])} (batch, heads, length) differs from k's {tuple(k.shape[:3])}.")
    for name, size in (("q and k", dim), ("v", dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: head dim {size} is outside 1..{MAX_HEAD_DIM}; use sdpa or eager for this model."
            )
    if heads_k == 0 or heads % heads_k:
        raise ValueError(f"q has {heads} heads and k has {heads_k}; q's must be a multiple of k's.")


def sequence_count(spec: AttentionSpec, sizes: Sizes) -> int:
    """How many sequences a call has: those that are packed, else a batch row each."""
    for cu_seqlens in (spec.cu_seqlens_q, spec.cu_seqlens_k):
        if cu_seqlens is not None:
            return cu_seqlens.shape[0] - 1
    return sizes.batch_q


def check_spec(spec: AttentionSpec, sizes: Sizes, heads: int, device: torch.device) -> None:
    """Raises ValueError where a mask does not fit tensors of these sizes."""
    for side, batch, length in (("q", sizes.batch_q, sizes.len_q), ("k", sizes.batch_k, sizes.len_k)):
        _check_side(spec, side, batch, length, sequence_count(spec, sizes), device)
    offset = spec.query_offset
    if isinstance(offset, torch.Tensor):
        if offset.numel() != 1:
            raise ValueError(f"query_offset: {tuple(offset.shape)} elements; give an int or one element.")
        _expect("query_offset", offset, tuple(offset.shape), device)
    if spec.layout is not None:
        packed_q, packed_k = spec.cu_seqlens_q is not None, spec.cu_seqlens_k is not None
        batch = 1 if packed_q or packed_k else sizes.batch_q
        # Lengths of packed sequences are on the device, see `assert_layout_covers`.
        lengths = 0 if packed_q else sizes.len_q, 0 if packed_k else sizes.len_k
        check_layout(spec.layout, heads, batch, *lengths, device)
    if spec.mask is not None:
        full = (sizes.batch_q, heads, sizes.len_q, sizes.len_k)
        fits = all(m in (1, s) for m, s in zip(spec.mask.shape[:3], full, strict=False))
        if not fits or spec.mask.shape[3] != full[3]:
            raise ValueError(f"mask: shape {tuple(spec.mask.shape)} does not broadcast to {full}.")
        if spec.mask.device != device:
            raise ValueError(f"mask is on {spec.mask.device}, q on {device}; move it there.")


def _check_side(spec: AttentionSpec, side: str, batch: int, length: int, count: int, device: torch.device) -> None:
    if (cu := spec.of_side("cu_seqlens", side)) is not None:
        if batch != 1:
            raise ValueError(f"cu_seqlens_{side}: packed rows need batch size 1, got {batch}.")
        _expect(f"cu_seqlens_{side}", cu, (count + 1,), device)
    elif batch != count:
        raise ValueError(
            f"{side} has {batch} batch rows for {count} sequences; "
            f"give cu_seqlens_{side}, or one batch row for each sequence."
        )
    for name in ("seqlens", "starts"):
        if (rows := spec.of_side(name, side)) is not None:
            _expect(f"{name}_{side}", rows, (count,), device)
    if (ids := spec.of_side("segment_ids", side)) is not None:
        name = f"segment_ids_{side}" if spec.segment_ids_q is not None else "mask or segment_ids_k"
        _expect(name, ids, (batch if ids.shape[0] != 1 else 1, length), device)


def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: shape is {tuple(tensor.shape)}, expected {shape}.")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: dtype is {tensor.dtype}; give int32 or int64.")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, q on {device}; move it there.")


def check_layout(layout: BlockLayout, heads: int, batch: int, len_q: int, len_k: int, device: torch.device) -> None:
    """Raises ValueError where tensors of these sizes cannot be attended to with this layout."""
    layout_batch, layout_heads, rows, columns = layout.grid.shape
    if layout_heads not in (1, heads):
        raise ValueError(f"layout: made for {layout_heads} heads, the queries have {heads}; give 1 or {heads}.")
    if layout_batch not in (1, batch):
        raise ValueError(f"layout: made for batch {layout_batch}, the queries have {batch}; give 1 or {batch}.")
    for name, length, blocks in (("queries", len_q, rows), ("keys", len_k, columns)):
        if not isinstance(layout, TracedLayout) and length > blocks * layout.block_size:
            raise ValueError(
                f"layout: covers {blocks * layout.block_size} {name} ({blocks} blocks of {layout.block_size}), the "
                f"call has {length}; make the layout for the longest sequence."
            )
    if layout.device != device:
        raise ValueError(f"layout: is on {layout.device}, the queries are on {device}; give layout.to(q.device).")


def assert_layout_covers(layout: BlockLayout, sequences: Sequences) -> None:
    """Stops the device where a packed sequence is longer than the layout: the host knows the lengths of rows only."""
    for side, rows, blocks in (("q", sequences.q, layout.grid.shape[2]), ("k", sequences.k, layout.grid.shape[3])):
        if rows.packed:
            covered = blocks * layout.block_size
            message = f"layout: covers {covered} rows of {side}; make it for the longest sequence."
            torch._assert_async((rows.end - rows.begin <= covered).all(), message)


def check_bias(bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, packed: bool) -> None:
    """Raises ValueError where a bias does not broadcast to the scores; packed calls read it by place in a sequence."""
    full = (1 if packed else q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.ndim == 4 and all(b in (1, s) for b, s in zip(bias.shape[: 2 if packed else 4], full, strict=False))
    if not fits or not bias.is_floating_point():
        want = f"{full[:2]} and the longest sequences' queries and keys" if packed else str(full)
        raise ValueError(f"bias: {tuple(bias.shape)} {bias.dtype}; give floats that broadcast to {want}.")
    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, q on {q.device}; move it there.")


def check_alibi_slopes(alibi_slopes: torch.Tensor, q: torch.Tensor) -> None:
    batch, heads = q.shape[:2]
    if alibi_slopes.shape not in ((heads,), (1, heads), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: shape is {tuple(alibi_slopes.shape)}; give ({heads},), or ({batch}, {heads}) with slopes "
            "of each batch row of q. Sequences packed in one row share them."
        )
    if alibi_slopes.dtype != torch.float32:
        raise ValueError(f"alibi_slopes: dtype is {alibi_slopes.dtype}; give float32.")
    if alibi_slopes.device != q.device:
        raise ValueError(f"alibi_slopes is on {alibi_slopes.device}, q on {q.device}; move it there.")
    if alibi_slopes.requires_grad:
        raise ValueError(
            "alibi_slopes: attention has no derivative by them; give alibi_slopes.detach(), or learn an equal bias."
        )


def check_sinks(sinks: torch.Tensor, q: torch.Tensor) -> None:
    if sinks.shape != (q.shape[1],) or not sinks.is_floating_point() or sinks.device != q.device:
        raise ValueError(
            f"sinks: {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}; give ({q.shape[1]},) floats on {q.device}."
        )
