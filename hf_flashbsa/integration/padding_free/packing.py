"""The live tokens of a padded batch in one row.

A batch `(B, S)` with `T` live tokens becomes a row `(1, T)`: the documents one behind the other, in the order of the
batch. Queries and keys are packed independently, so that cross-attention keeps its two lengths.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


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
