"""The live tokens of a padded batch in one row, and the attention masks that belong to such rows.

A batch `(B, S)` with `T` live tokens becomes a row `(1, T)`: the documents one behind the other, in the order of the
batch. Queries and keys are packed independently, so that cross-attention keeps its two lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

from hf_flashbsa.integration.mask_function import MaskSpec, replace_fields
from hf_flashbsa.integration.padding_free.forward_pass import ForwardPass
from hf_flashbsa.masks.modes import is_eager
from hf_flashbsa.masks.spec import AttentionSpec, padding_segment_ids


class Packing:
    """Where each live token of a padded batch lies in a packed row.

    Args:
        batch, length: `B` and `S`.
        cu_seqlens: int32 `(B + 1,)`, where each document begins in the row, and its end.
        index: int64 `(T,)`, positions of the live tokens in the flattened batch; None where all tokens are live.
        has_holes: whether dead tokens lie between live ones of a document, so that distances in the row are not
            those in the batch.
    """

    def __init__(self, batch: int, length: int, cu_seqlens: torch.Tensor, index: torch.Tensor | None, has_holes: bool):
        self.batch = batch
        self.length = length
        self.cu_seqlens = cu_seqlens
        self.index = index
        self.has_holes = has_holes

    @classmethod
    def full(cls, batch: int, length: int, device: torch.device) -> Packing:
        """That of a batch without padding: packing only changes its shape."""
        ends = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=device)
        return cls(batch, length, ends, None, has_holes=False)

    @classmethod
    def of_mask(cls, mask: torch.Tensor, total: int, has_holes: bool) -> Packing:
        """That of a bool mask `(B, S)`, True at its `total` live tokens."""
        lengths = mask.sum(-1, dtype=torch.int32)
        ends = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        index = torch.nonzero_static(mask.flatten(), size=total)[:, 0]
        return cls(*mask.shape, ends, index, has_holes)

    @property
    def total(self) -> int:
        return self.batch * self.length if self.index is None else self.index.shape[0]

    def is_packed(self, x: torch.Tensor) -> bool:
        """Whether `x` is `(1, T, ...)`."""
        return tuple(x.shape[:2]) == (1, self.total)

    def is_padded(self, x: torch.Tensor) -> bool:
        """Whether `x` is `(B, S, ...)`."""
        return tuple(x.shape[:2]) == (self.batch, self.length)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """`(B, S, ...)` or `(1, S, ...)` as `(1, T, ...)`."""
        x = x.expand(self.batch, *x.shape[1:]).flatten(0, 1)
        return (x if self.index is None else _gathered(x, self.index))[None]

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """`(1, T, ...)` as `(B, S, ...)`, zero at padding."""
        x = x[0]
        if self.index is not None:
            x = x.new_zeros(self.batch * self.length, *x.shape[1:]).index_copy_(0, self.index, x)
        return x.unflatten(0, (self.batch, self.length))

    def to(self, device: torch.device) -> Packing:
        index = None if self.index is None else self.index.to(device, non_blocking=True)
        ends = self.cu_seqlens.to(device, non_blocking=True)
        return Packing(self.batch, self.length, ends, index, self.has_holes)


def _gathered(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    transformed = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    return x.index_select(0, index) if transformed else _Gather.apply(x, index)


class _Gather(torch.autograd.Function):
    """Rows `x[index]` with distinct indices. The gradient is copied, where that of indexing is added atomically."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.rows = x.shape[0]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (index,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, index, gradient), None


#: Keyword by which the caller of a model tells the numbers of live tokens.
HINT = "num_live_tokens"


def is_padding(mask: object) -> bool:
    """Whether this is a padding mask `(B, S)`."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def measure(forward: ForwardPass, masks: list[torch.Tensor], totals: int | Sequence[int] | None) -> None:
    """Prepares `packing_of` for padding masks that the forward pass has not met yet.

    The host waits once for the device, for the numbers of live tokens. Where `totals` gives them it does not wait:
    the device checks them, and that no dead token lies between live ones.

    Raises:
        ValueError: `totals` are not a number for each mask; the masks hold no values that Python may read.
    """
    if torch._C._get_tracing_state() is not None:
        raise ValueError(
            "padding_free: torch.jit.trace would fix the number of live tokens; trace the model without padding_free."
        )
    if totals is not None:
        totals = tuple(totals) if isinstance(totals, (tuple, list)) else (totals,)
        if len(totals) != len(masks) or not all(isinstance(total, int) for total in totals):
            raise ValueError(f"{HINT}: {totals} for {len(masks)} padding masks; give a Python number for each.")
    new = [i for i, x in enumerate(masks) if id(x) not in forward.packings]
    if not new:
        return
    try:
        packings = _packings([masks[i] for i in new], None if totals is None else [totals[i] for i in new])
    except RuntimeError as error:
        if is_eager() and not masks[0].is_meta:
            raise
        raise ValueError(
            "padding_free: the number of live tokens sizes the packed tensors, and cannot be read from an attention "
            f"mask that is on the meta device, traced or mapped by vmap; pass {HINT}, or, to vmap, run the model "
            "without padding_free."
        ) from error
    for i, packing in zip(new, packings, strict=True):
        forward.packings[id(masks[i])] = (masks[i], packing)


def _packings(masks: list[torch.Tensor], totals: list[int] | None) -> list[Packing | None]:
    live = [x.to(torch.bool) for x in masks]
    counts = [torch.stack([x.sum(), _holes(x)]) for x in live]
    if totals is None:
        counts = torch.cat([count.to(counts[0].device) for count in counts]).view(-1, 2)
        # One wait for the device; what traces gives a symbol for each number read by itself.
        traced = isinstance(counts, FakeTensor)
        known = [(int(total), int(holes)) for total, holes in counts] if traced else counts.tolist()
    else:
        known = [(total, 0) for total in totals]
        for count, (total, _) in zip(counts, known, strict=True):
            torch._assert_async(count[0] == total, f"{HINT} is not the sum of the attention mask")
            torch._assert_async(count[1] == 0, f"{HINT}: the attention mask has dead tokens between live ones")
    return [
        None if total == x.numel() else Packing.of_mask(x, total, holes > 0)
        for x, (total, holes) in zip(live, known, strict=True)
    ]


def packing_of(forward: ForwardPass, mask: object, device: torch.device) -> Packing | None:
    """The `Packing` of a measured padding mask; None where nothing is padded or it is no padding mask."""
    rows = forward.packings[id(mask)][1] if is_padding(mask) else None
    return rows if rows is None or rows.cu_seqlens.device == device else rows.to(device)


def _holes(live: torch.Tensor) -> torch.Tensor:
    """Number of rows whose live tokens form more than one run."""
    runs = (live[:, 1:] & ~live[:, :-1]).sum(-1) + live[:, 0]
    return (runs > 1).sum()


class PackedMask(MaskSpec):
    """The mask of packed queries and keys, `(1, 1, Tq, Tk)`.

    Args:
        spec: which scores of the row exist; None where a row cannot say it.
        padded: the mask of the padded batch. Attention runs on that batch where `spec` is None, and where it has a
            bias that belongs to positions in the batch.
        rows_q, rows_k: how queries and keys are packed.
        takes_bias: whether a bias may be read by place in each document.
    """

    def __init__(
        self,
        spec: AttentionSpec | None,
        padded: MaskSpec,
        rows_q: Packing,
        rows_k: Packing,
        takes_bias: bool = False,
    ):
        shape = (1, 1, rows_q.total, rows_k.total)
        super().__init__(spec or padded.spec, shape, padded.device, packed=padded.packed)
        self.padded = padded
        self.rows_q, self.rows_k = rows_q, rows_k
        self.needs_padding = spec is None
        self.takes_bias = takes_bias

    @classmethod
    def of_self_attention(cls, mask: MaskSpec, rows: Packing, bias_by_distance: bool) -> PackedMask:
        """The packed form of a self-attention mask.

        Args:
            bias_by_distance: whether a bias depends on the distance of query and key alone.
        """
        spec = mask.spec
        moved = isinstance(spec.query_offset, torch.Tensor) or spec.query_offset not in (None, 0)
        plain = spec.mask is None and spec.segment_ids_q is None and not moved
        windowed = spec.window_size != (None, None)
        window = dict(causal=spec.causal, window_size=spec.window_size)
        if not plain or (windowed and rows.has_holes):
            packed = None
        else:
            packed = AttentionSpec(**window, cu_seqlens_q=rows.cu_seqlens, cu_seqlens_k=rows.cu_seqlens)
        # Queries at padding need no computation.
        ids_q = spec.segment_ids_k if spec.segment_ids_q is None else spec.segment_ids_q
        padded = replace_fields(spec, segment_ids_q=ids_q)
        takes_bias = bias_by_distance and not rows.has_holes and packed is not None
        padded = MaskSpec(padded, mask.shape, mask.device)
        return cls(packed, padded, rows, rows, takes_bias)

    @classmethod
    def of_cross_attention(cls, rows_q: Packing, rows_k: Packing, device: torch.device) -> PackedMask:
        """Every query sees all keys of its batch row."""
        ids_q, ids_k = (
            padding_segment_ids(rows.unpack(torch.ones(1, rows.total, dtype=torch.int32, device=device)))
            for rows in (rows_q, rows_k)
        )
        shape = (rows_q.batch, 1, rows_q.length, rows_k.length)
        padded = MaskSpec(AttentionSpec(segment_ids_q=ids_q, segment_ids_k=ids_k), shape, device)
        packed = AttentionSpec(cu_seqlens_q=rows_q.cu_seqlens, cu_seqlens_k=rows_k.cu_seqlens)
        return cls(packed, padded, rows_q, rows_k)

    def unpack(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(1, H, T, D)` each as `(B, H, S, D)`, zero at padding."""
        sides = ((query, self.rows_q), (key, self.rows_k), (value, self.rows_k))
        return tuple(rows.unpack(x.transpose(1, 2)).transpose(1, 2) for x, rows in sides)

    def packed_by(self, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, dense: bool) -> AttentionSpec:
        raise ValueError(
            "cu_seq_lens_*: they count the padding that padding_free removes; give either a mask or cu_seq_lens_*."
        )

    def to(self, *args, **kwargs) -> PackedMask:
        padded = self.padded.to(*args, **kwargs)
        if padded is self.padded:
            return self
        raise ValueError(f"padding_free: a stack's layers are on {self.device} and {padded.device}; use one device.")

    def as_tensor(self) -> torch.Tensor:
        raise NotImplementedError(
            "padding_free: this model computes on its attention mask inside of its layers, which is impossible for "
            "packed rows; run it without padding_free."
        )

    def __getitem__(self, index) -> MaskSpec:
        return self.as_tensor()
