"""Which attention scores exist, as data.

An `AttentionSpec` says which keys each query may see: causality, a window, ragged lengths, packed documents, segment
ids or an arbitrary mask. It is made once per forward pass and shared by all layers. How a call runs is derived from it
elsewhere (`hf_flashbsa.ops.lowering`).
"""

from __future__ import annotations

import dataclasses

import torch

from hf_flashbsa.masks.block_layout import BlockLayout


def padding_segment_ids(live: torch.Tensor) -> torch.Tensor:
    """Segment ids that say which rows are padding: 0 where `live` (bool or 0/1), -1 where not. int32, same shape.

    This is the one way in which padding is written as segment ids: a negative id sees nothing and is seen by nobody,
    and without `segment_ids_q` every query has id 0.
    """
    return live.to(torch.bool).to(torch.int32) - 1


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec:
    """The mask of an attention call, in the most structured form known. All conditions apply together.

    Make one for each batch. What is derived from its tensors is kept with it, and made anew where torch counts a
    change in place; it does not count what collectives, numpy and `.data` write.

    Args:
        causal: query `i` sees keys up to its own position. Queries are aligned with the *last* keys (bottom
            right) of their sequence unless `query_offset` says otherwise.
        window_size: `(left, right)`, the most keys visible before and after a query's own position, both
            inclusive; `None` is unlimited. `causal` is a right window of 0.
        query_offset: key position of the first query, an int or an integer tensor with one element. Default:
            number of keys minus number of queries, for each sequence.
        seqlens_q, seqlens_k: `(B,)` integers, live rows of each batch row, counted from the start. Dead query
            rows give zeros; dead keys are seen by nobody.
        starts_q, starts_k: `(B,)` integers, the first live row of each batch row, for padding on the left. Layouts and
            biases count from it; dead rows as above.
        cu_seqlens_q, cu_seqlens_k: `(n + 1,)` integers, cumulative lengths of `n` sequences packed in one batch
            row. Queries and keys are packed independently; a side that is not packed has `n` batch rows.
        segment_ids_q, segment_ids_k: `(B or 1, Sq)` and `(B or 1, Sk)` integers; a query sees the keys of equal id.
            Negative ids see nothing and are seen by nobody. Without `segment_ids_q` every query has id 0.
        mask: bool `(B or 1, H or 1, Sq or 1, Sk)`, True where a key is visible. Slower than the forms above,
            except for `(B, 1, 1, Sk)`, which is read as padding of the keys.
        layout: the blocks of scores that are visited at all; all where there is none. Rows and columns count from
            the first query and key of each packed sequence, or of each batch row (`starts_*`).
    """

    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    query_offset: int | torch.Tensor | None = None
    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    segment_ids_q: torch.Tensor | None = None
    segment_ids_k: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    layout: BlockLayout | None = None

    def __post_init__(self) -> None:
        window = self.window_size
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window_size: {window!r}; give (left, right), None for unlimited.")
        for side, value in zip(("left", "right"), window, strict=True):
            if value is not None and (isinstance(value, (float, torch.Tensor)) or value < 0):
                raise ValueError(f"window_size: {side} is {value}; give an integer >= 0, or None for unlimited.")
        if isinstance(self.query_offset, float):
            raise ValueError(f"query_offset: {self.query_offset}; give an integer, or a tensor with one.")
        if self.layout is not None and not isinstance(self.layout, BlockLayout):
            raise ValueError(f"layout: {type(self.layout).__name__}; give a BlockLayout; its from_mask makes one.")
        for side in "qk":
            if self.of_side("seqlens", side) is not None and self.of_side("cu_seqlens", side) is not None:
                raise ValueError(f"seqlens_{side} and cu_seqlens_{side} exclude each other; give one of them.")
            if self.of_side("starts", side) is not None and self.of_side("cu_seqlens", side) is not None:
                raise ValueError(
                    f"starts_{side} and cu_seqlens_{side} exclude each other; packed rows are not padded."
                )
            if (cu := self.of_side("cu_seqlens", side)) is not None and (cu.ndim != 1 or cu.shape[0] < 1):
                raise ValueError(f"cu_seqlens_{side}: shape is {tuple(cu.shape)}; give (sequences + 1,).")
            if (ids := self.of_side("segment_ids", side)) is not None and ids.ndim != 2:
                raise ValueError(f"segment_ids_{side}: shape is {tuple(ids.shape)}; give (B or 1, length).")
        ragged = any(self.of_side(name, side) is not None for name in ("seqlens", "cu_seqlens") for side in "qk")
        if self.segment_ids_q is not None and self.segment_ids_k is None:
            raise ValueError("segment_ids_q needs segment_ids_k; give both.")
        if ragged and self.segment_ids_k is not None:
            raise ValueError(
                "segment_ids_* and seqlens_*/cu_seqlens_* exclude each other; express all in one of them."
            )
        if ragged and self.mask is not None:
            raise ValueError("mask and seqlens_*/cu_seqlens_* exclude each other; express all in the mask.")
        if self.mask is not None:
            if self.mask.dtype != torch.bool:
                raise ValueError(f"mask: dtype is {self.mask.dtype}; give a bool mask, or additive values as `bias`.")
            if self.mask.ndim != 4:
                raise ValueError(f"mask: shape is {tuple(self.mask.shape)}; give (B or 1, H or 1, Sq or 1, Sk).")
            if self.segment_ids_k is None and self.mask.shape[1] == 1 and self.mask.shape[2] == 1:
                object.__setattr__(self, "segment_ids_k", padding_segment_ids(self.mask[:, 0, 0]))
                object.__setattr__(self, "mask", None)

    def of_side(self, name: str, side: str) -> torch.Tensor | None:
        """Field `name` of queries ("q") or keys ("k"): `of_side("seqlens", "q")` is `seqlens_q`."""
        return getattr(self, f"{name}_{side}")

    @property
    def window(self) -> tuple[int | None, int | None]:
        """`window_size` with causality folded in."""
        left, right = self.window_size
        return (left, 0) if self.causal else (left, right)
