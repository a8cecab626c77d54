"""What a call carries besides q, k and v, as the ops pass it on."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Extras(NamedTuple):
    """Optional tensors of a call. Shapes as `attention` documents them; masks and biases expanded to Sq, Sk.

    `work_q` and `work_k` are the tables of `AttentionSpec.work`, `sequences` that of `AttentionSpec.sequence_table`
    (for the gradient of a bias only); `seed` is int64 `(1,)`. Of a `BlockLayout`: its `grid` and `mask_words`, and its
    `table` for each side.
    """

    bias: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    segment_ids_q: torch.Tensor | None = None
    segment_ids_k: torch.Tensor | None = None
    work_q: torch.Tensor | None = None
    work_k: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    grid: torch.Tensor | None = None
    mask_words: torch.Tensor | None = None
    blocks_q: torch.Tensor | None = None
    blocks_k: torch.Tensor | None = None


#: The extras of most calls.
NO_EXTRAS = Extras()


def carried(extras: Extras) -> tuple[torch.Tensor | None, ...]:
    """Arguments that `Extras` makes `extras` of: none for `NO_EXTRAS`, because passing None on costs the host too."""
    return () if extras is NO_EXTRAS else extras


class Params(NamedTuple):
    """Numbers of a call. 0 softcap is none, -1 is a window unlimited on that side, `drop_threshold` is that of
    dropout.py, `block_size` that of a layout, 0 without."""

    scale: float
    softcap: float
    window_left: int
    window_right: int
    diagonal: int
    drop_threshold: int
    block_size: int
    deterministic: bool
    backend: str

    @property
    def window(self) -> int | None:
        """How many keys the window shows beside the diagonal; None where it has no limit on one side."""
        return self.window_left + self.window_right if min(self.window_left, self.window_right) >= 0 else None


def sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Gradient `(..., Hq)` of the sink logits, given `lse` and `delta` `(..., B, Hq, S)`: their weight in each row
    times `-delta`, 0 in rows that see no key."""
    return -(sinks_weight(sinks, lse) * delta).sum((-3, -1))


def sinks_weight(sinks: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Softmax weight `(..., B, Hq, S)` of the sinks `(..., Hq)` in each row, 0 in rows that see no key."""
    return torch.exp(sinks[..., None, :, None] - lse).masked_fill(lse == float("-inf"), 0.0)
