"""The call plan: what a back end is told of a call besides q, k and v.

`hf_flashbsa.ops.lowering` makes it of a mask and options; the registered ops take its fields one by one. None means
absent, in Python, in the schemas of the ops and in the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class CallTensors(NamedTuple):
    """Tensors of a call, on the device of q: `OWN` that each call brings itself, then those derived from its mask.

    Args:
        bias: `(B or 1, Hq or 1, Sq, Sk)`, added to the scaled scores; packed calls read it by place in the sequence.
        sinks: `(Hq,)`.
        alibi_slopes: float32 `(B or 1, Hq)`, contiguous; the batch rows are those of the queries.
        seed: int64 `(1,)`, of dropout.
        mask: bool `(B, Hq, Sq, Sk)`, expanded.
        segment_ids_q, segment_ids_k: integers `(B, Sq)` and `(B, Sk)`.
        schedule_q, schedule_k: tile schedules of queries and of keys, see tile_schedule.py. The latter is there for
            the backward pass only.
        query_offset_tensor: an integer, key position of query row 0 where the device knows it and no schedule says it.
        sequences: `Sequences.table`, for the gradient of a bias and for the torch back end only.
        block_grid: a layout's int32 `(B or 1, H or 1, query blocks, key blocks)`: 0 not visited, 1 full, `i >= 2` the
            partial block whose entries are `block_masks[i - 2]`.
        block_masks: int32 `(U, block_size, block_size // 32)`, key `i` of a row in bit `i % 32` of word `i // 32`.
        block_table_q, block_table_k: the blocks that each block row (column) visits, see block_tables.py. The latter
            is there for the backward pass only.
    """

    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    alibi_slopes: torch.Tensor | None = None
    seed: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    segment_ids_q: torch.Tensor | None = None
    segment_ids_k: torch.Tensor | None = None
    schedule_q: torch.Tensor | None = None
    schedule_k: torch.Tensor | None = None
    query_offset_tensor: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    block_grid: torch.Tensor | None = None
    block_masks: torch.Tensor | None = None
    block_table_q: torch.Tensor | None = None
    block_table_k: torch.Tensor | None = None


#: How many of them a call brings itself: bias, sinks, ALiBi slopes and seed.
OWN = 4
#: Those with a derivative.
DIFFERENTIABLE = ("bias", "sinks")
#: Those with an entry for each batch row of the queries, and of the keys.
ROWS_Q = ("mask", "segment_ids_q")
ROWS_K = ("segment_ids_k",)
#: Those whose batch dimension may be 1, for all rows of the queries.
SHARED_ROWS = ("bias", "alibi_slopes", "block_grid", "block_table_q", "block_table_k")
#: The tensors of most calls. Passing a dozen None on costs the host time, so that calls leave them out; see `given`.
NO_TENSORS = CallTensors()


class CallScalars(NamedTuple):
    """Numbers of a call.

    Args:
        num_splits: parts of the keys that the Triton back end visits side by side and combines, see triton/split.py.
        window_left, window_right: most keys visible before and after a query's own; causality is folded in.
        query_offset: key position of query row 0 where neither a schedule nor a tensor says it.
        drop_threshold: dropout drops a weight whose 16-bit random number lies below it, see dropout.py.
        block_size: tokens of a block of the layout.
    """

    softmax_scale: float
    softcap: float | None
    window_left: int | None
    window_right: int | None
    query_offset: int
    drop_threshold: int | None
    block_size: int | None
    deterministic: bool
    backend: str
    num_splits: int = 1

    @property
    def window(self) -> int | None:
        """Keys in the window besides a query's own; None where it has no limit on one side."""
        if self.window_left is None or self.window_right is None:
            return None
        return self.window_left + self.window_right


class CallPlan(NamedTuple):
    """One attention call, but for q, k and v.

    `cache` is where the torch back end keeps what it makes of the rest on the host; None where calls do not share it.
    """

    tensors: CallTensors
    scalars: CallScalars
    cache: dict | None = None

    @classmethod
    def of_fields(cls, fields: tuple) -> CallPlan:
        """The plan of its fields, tensors first, as the ops take them. Whatever follows is ignored."""
        count = len(CallTensors._fields)
        return cls(CallTensors(*fields[:count]), CallScalars(*fields[count : count + len(CallScalars._fields)]))


def given(tensors: CallTensors) -> tuple[torch.Tensor | None, ...]:
    """`tensors`, or nothing where there are none: `CallTensors(*given(tensors))` gives them back."""
    return () if tensors is NO_TENSORS else tensors


def sinks_gradient(sinks: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """Gradient `(..., Hq)` of the sink logits, given `lse` and `delta` `(..., B, Hq, S)`: their weight in each row
    times `-delta`, 0 in rows that see no key."""
    return -(sinks_weight(sinks, lse) * delta).sum((-3, -1))


def sinks_weight(sinks: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Softmax weight `(..., B, Hq, S)` of the sinks `(..., Hq)` in each row, 0 in rows that see no key."""
    return torch.exp(sinks[..., None, :, None] - lse).masked_fill(lse == float("-inf"), 0.0)
