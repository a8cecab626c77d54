"""Transformers' mask contract, answered with an `AttentionSpec` instead of a `(B, 1, Q, K)` tensor.

Transformers describes a mask by a function of (batch, head, query, key) and an optional 2-D padding mask. The
functions it builds itself are closures of known shape: they are read, not evaluated. Any other is evaluated into
a bool mask. Nothing here reads a tensor's value, so the host never waits for the device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch
from transformers import masking_utils

from hf_flashbsa.integration.mask_tensor import TensorOnDemand, visible_entries
from hf_flashbsa.integration.model_source import computes_own_attention, takes_tensor_masks
from hf_flashbsa.masks.spec import AttentionSpec, padding_segment_ids


class MaskSpec(TensorOnDemand):
    """What a model holds in place of its `(B, 1, Q, K)` mask and hands to each attention layer.

    One object serves all layers of a forward pass. It has the attributes by which Transformers recognises a 4-D
    mask, may be sliced along queries and keys, and comes back unchanged where a model passes it as
    `attention_mask`. A model that computes on it gets the tensor that it stands for, see `TensorOnDemand`.

    Args:
        spec: which scores exist.
        shape: `(B, 1, Q, K)`.
        device: where the queries are.
        packed: whether `spec.segment_ids_*` are there because rows hold documents, and say nothing else.
    """

    dtype = torch.bool
    ndim = 4

    def __init__(
        self, spec: AttentionSpec, shape: tuple[int, int, int, int], device: torch.device, packed: bool = False
    ):
        self.spec = spec
        self.shape = shape
        self.device = torch.device(device)
        self.packed = packed
        self._derived: dict = {}

    def derived(self, purpose: object, sources: tuple, make: Callable[[], object]):
        """`make()`, memoized for the layers of this forward pass as long as `sources` are the same objects.

        This is where a forward pass keeps what depends on the values of tensors, since the mask lives no longer than
        the pass. Version counters of tensors would not do: collectives, numpy and `.data` write without counting.
        """
        known = self._derived.get(purpose)
        if known is None or any(a is not b for a, b in zip(known[0], sources, strict=True)):
            known = self._derived[purpose] = (sources, make())
        return known[1]

    def to(self, *args, **kwargs) -> MaskSpec:
        """A copy on another device, kept; itself where only a dtype is asked for."""
        targets = [*args, kwargs.get("device")]
        device = next((torch.device(t) for t in targets if isinstance(t, (str, int, torch.device))), self.device)
        if device == self.device:
            return self

        def moved() -> MaskSpec:
            spec = _rebuild(self.spec, lambda name, tensor: tensor.to(device))
            return MaskSpec(spec, self.shape, device, self.packed)

        return self.derived(("to", device), (), moved)

    def contiguous(self) -> MaskSpec:
        return self

    def as_tensor(self) -> torch.Tensor:
        return self.derived("tensor", (), lambda: visible_entries(self.spec, self.shape, self.device))

    def __getitem__(self, index) -> MaskSpec | torch.Tensor:
        """A part of the queries and keys, `mask[:, :, q0:q1, k0:k1]`, without making a tensor. Any other index reads
        the tensor."""
        ranges = _ranges(index, self.shape)
        if ranges is None:
            return self.__torch_function__(torch.Tensor.__getitem__, (), (self, index))
        (q0, q1), (k0, k1) = ranges
        cuts = {
            "segment_ids_q": lambda ids: ids[:, q0:q1],
            "segment_ids_k": lambda ids: ids[:, k0:k1],
            "mask": lambda mask: mask[:, :, q0:q1, k0:k1],
        }
        spec = _rebuild(self.spec, lambda name, tensor: cuts[name](tensor) if name in cuts else tensor)
        if spec.query_offset is not None:
            spec = replace_fields(spec, query_offset=spec.query_offset + q0 - k0)
        return MaskSpec(spec, (self.shape[0], 1, q1 - q0, k1 - k0), self.device, self.packed)

    def packed_by(self, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, dense: bool) -> AttentionSpec:
        """The spec with the documents of `cu_seqlens_*` `(n + 1,)` in place of those found in `position_ids`.

        Args:
            dense: whether a bias rules out `cu_seqlens_*` in `attention`, so that they become segment ids.
        """
        spec = self.spec

        def packed() -> AttentionSpec:
            unpadded = self.packed or spec.segment_ids_k is None
            if unpadded and spec.mask is None and not dense:
                return AttentionSpec(
                    causal=spec.causal,
                    window_size=spec.window_size,
                    cu_seqlens_q=cu_seqlens_q,
                    cu_seqlens_k=cu_seqlens_k,
                )
            if not self.packed and spec.segment_ids_q is not None:
                raise ValueError("cu_seq_lens_*: not available with chunked attention; pass position_ids instead.")
            ids_q, ids_k = (
                torch.searchsorted(cu[1:], torch.arange(length, device=cu.device, dtype=cu.dtype), right=True)
                .to(torch.int32)
                .expand(self.shape[0], -1)
                for cu, length in zip((cu_seqlens_q, cu_seqlens_k), self.shape[2:], strict=True)
            )
            if not unpadded:
                ids_k = torch.where(spec.segment_ids_k >= 0, ids_k, -1)
            return replace_fields(spec, segment_ids_q=ids_q, segment_ids_k=ids_k)

        return self.derived(("packed", dense), (cu_seqlens_q, cu_seqlens_k), packed)

    def __repr__(self) -> str:
        return f"MaskSpec({self.spec}, shape={self.shape}, device={self.device})"


def _ranges(index, shape: tuple[int, int, int, int]) -> list[tuple[int, int]] | None:
    """`(begin, end)` of queries and keys that an index takes, or None where it does anything else."""
    index = index if isinstance(index, tuple) else (index,)
    index = index + (slice(None),) * (4 - len(index))
    whole = slice(None)
    if len(index) != 4 or index[:2] != (whole, whole) or not all(isinstance(i, slice) for i in index[2:]):
        return None
    ranges = [i.indices(n) for i, n in zip(index[2:], shape[2:], strict=True)]
    return [(begin, end) for begin, end, step in ranges] if all(step == 1 for _, _, step in ranges) else None


_FIELDS = tuple(field.name for field in dataclasses.fields(AttentionSpec))


def replace_fields(spec: AttentionSpec, **changes) -> AttentionSpec:
    """`dataclasses.replace`, which Dynamo cannot trace for frozen classes."""
    return AttentionSpec(**{name: changes.get(name, getattr(spec, name)) for name in _FIELDS})


def _rebuild(spec: AttentionSpec, change: Callable[[str, torch.Tensor], torch.Tensor]) -> AttentionSpec:
    """The spec with `change(name, tensor)` in place of each tensor."""
    tensors = {name: getattr(spec, name) for name in _FIELDS if isinstance(getattr(spec, name), torch.Tensor)}
    return replace_fields(spec, **{name: change(name, tensor) for name, tensor in tensors.items()})


class Structure(NamedTuple):
    """A mask function in terms of an `AttentionSpec`. Positions are those of the function, offsets included.

    `right` is 0 for a causal function. `documents` are ids `(B, S)`; `chunks` are a size and the number of left
    padding tokens of each row `(B,)`.
    """

    left: int | None = None
    right: int | None = None
    documents: torch.Tensor | None = None
    chunks: tuple[int, torch.Tensor] | None = None


def recognise(mask_function: Callable) -> Structure | None:
    """The structure of a mask function that Transformers built, or None where it must be evaluated.

    Inside `torch.compile` only the plain causal and bidirectional functions are recognised: Dynamo does not show
    what a closure holds.
    """
    if mask_function is masking_utils.causal_mask_function:
        return Structure(right=0)
    if mask_function is masking_utils.bidirectional_mask_function:
        return Structure()
    if torch.compiler.is_compiling() or getattr(mask_function, "__module__", None) != masking_utils.__name__:
        return None
    cells = dict(
        zip(
            mask_function.__code__.co_freevars, (c.cell_contents for c in mask_function.__closure__ or ()), strict=True
        )
    )
    maker = mask_function.__qualname__.partition(".")[0]
    if maker == "sliding_window_overlay":
        # Configs write 0 or -1 for "no window".
        return Structure(left=cells["sliding_window"] - 1) if cells["sliding_window"] > 0 else Structure()
    if maker == "sliding_window_bidirectional_overlay":
        reach = cells["sliding_window"]  # tokens on each side, besides the own one
        return Structure(left=reach, right=reach) if reach >= 0 else Structure()
    if maker == "chunked_overlay":
        return Structure(chunks=(cells["chunk_size"], cells["left_padding"])) if cells["chunk_size"] else Structure()
    if maker == "packed_sequence_mask_function":
        return Structure(documents=cells["packed_sequence_mask"])
    if maker == "remap_positions_for_packed_sequence":
        # Within a document positions run on by one, so that distances are those of the row. Chunks are not distances.
        inner = recognise(cells["mask_function"])
        return None if inner is None or inner.chunks is not None or inner.documents is not None else inner
    if maker == "and_masks":
        return _intersection([recognise(f) for f in cells["mask_functions"]])
    return None


def _intersection(parts: list[Structure | None]) -> Structure | None:
    if None in parts:
        return None
    merged = []
    for name in Structure._fields:
        values = [v for part in parts if (v := getattr(part, name)) is not None]
        if len(values) > 1 and name in ("documents", "chunks"):
            return None
        merged.append(min(values) if name in ("left", "right") and values else next(iter(values), None))
    return Structure(*merged)


def _live_keys(attention_mask: torch.Tensor, kv_length: int, kv_offset: int | torch.Tensor) -> torch.Tensor:
    """bool `(B, kv_length)`: the 2-D mask at the keys of this call. Keys that it does not reach are dead."""
    live = attention_mask.to(torch.bool)
    if isinstance(kv_offset, torch.Tensor):
        live = torch.nn.functional.pad(live, (0, 1))
        keys = torch.arange(kv_length, device=live.device) + kv_offset
        return live[:, keys.clamp(max=live.shape[1] - 1)]
    end = kv_offset + kv_length
    if live.shape[1] < end:
        live = torch.nn.functional.pad(live, (0, end - live.shape[1]))
    return live[:, kv_offset:end]


def _structured_spec(
    structure: Structure,
    live: torch.Tensor | None,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor,
    kv_offset: int | torch.Tensor,
    device: torch.device,
) -> AttentionSpec:
    left, right, documents, chunks = structure
    ids_q = None
    ids_k = None if live is None else padding_segment_ids(live)
    if documents is not None:
        ids_q = documents.to(torch.int32)
    if chunks is not None:
        size, left_padding = chunks
        ids_q, chunk_ids_k = (
            ((torch.arange(length, device=device) + offset - left_padding[:, None]) // size).to(torch.int32)
            for length, offset in ((q_length, q_offset), (kv_length, kv_offset))
        )
    if ids_q is not None:
        own_k = chunk_ids_k if chunks is not None else ids_q
        ids_k = own_k if live is None else torch.where(live, own_k, -1)
    return AttentionSpec(
        causal=right == 0,
        window_size=(left, right or None),
        # A new tensor even for kv_offset 0: a static cache counts up its own in place, before the layers look.
        query_offset=None if left is None and right is None else q_offset - kv_offset,
        segment_ids_q=ids_q,
        segment_ids_k=ids_k,
    )


def bsa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable = masking_utils.causal_mask_function,
    attention_mask: torch.Tensor | MaskSpec | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config=None,
    **kwargs,
) -> MaskSpec | torch.Tensor | None:
    """The mask function of Transformers' `AttentionMaskInterface`. It never returns None.

    Transformers looks for packed documents in `position_ids` where it is given no `attention_mask` and no cache: a
    document begins wherever a position is not its predecessor plus one. They arrive here as a part of `mask_function`.
    Where there is a mask or a cache, positions have no say in which keys are visible, whatever they are.

    Args:
        batch_size, q_length, kv_length: sizes of the attention call.
        q_offset, kv_offset: positions of the first query and key, ints or (static caches) integer tensors.
        mask_function: `(batch, head, query, key) -> bool` on positions.
        attention_mask: bool `(B, keys)`, False at padding; or a `MaskSpec`, which is returned as it is.
        use_vmap: whether `mask_function` must be evaluated under vmap.
        device: device of the queries.
        config: the model's config. Models that do not dispatch attention, or that ask whether their mask is a
            tensor, get their eager mask.
        kwargs: what other mask functions take (`dtype`, permissions to return None).
    """
    if isinstance(attention_mask, MaskSpec):
        return attention_mask
    if config is not None and (computes_own_attention(type(config)) or takes_tensor_masks(type(config))):
        return masking_utils.eager_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
    live = None if attention_mask is None else _live_keys(attention_mask, kv_length, kv_offset)
    structure = recognise(mask_function)
    if structure is not None and (structure.documents is None or structure.chunks is None):
        spec = _structured_spec(structure, live, q_length, kv_length, q_offset, kv_offset, device)
        packed = structure.documents is not None and live is None
    else:
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=mask_function, allow_is_causal_skip=False, use_vmap=use_vmap, device=device,
        )  # fmt: skip
        spec = AttentionSpec(mask=mask, segment_ids_k=None if live is None else padding_segment_ids(live))
        packed = False
    return MaskSpec(spec, (batch_size, 1, q_length, kv_length), device, packed)
