"""The attention masks of packed rows."""

from __future__ import annotations

import torch

from hf_flashbsa.integration.mask_function import MaskSpec, replace_fields
from hf_flashbsa.integration.padding_free.packing import Packing
from hf_flashbsa.masks.spec import AttentionSpec, padding_segment_ids


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
