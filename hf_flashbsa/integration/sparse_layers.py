"""Which block layout an attention layer of a Transformers model gets.

The model's `BlockSparseConfig` has rules by role and layer. A rule's layout depends on nothing but the padded lengths,
so that no host waits for a device, and joins the spec that all layers of a forward share, once for each layout.

Layouts count from the first token of each document: the first live token of a row of a padded batch, on whichever side
it is padded, or the first token of a packed document. They are made for the padded length, packed or not; a shorter
document has their top left corner. Run-time selections, and layouts beside the caller's own 4-D mask, count from a
row's first column.

A decoder's layout has no blocks above the diagonal where its mask is known to be causal. Any other mask (image blocks,
prefixes, the caller's own 4-D mask) may show later keys: there the layout continues above the diagonal, as the
pattern's bidirectional form does.

Self-attention of fewer queries than keys stays dense: those keys are cached, and a step of generation is bound by
reading them. So the first forward of a generation follows the layouts, the steps behind it do not. Static caches have
room for tokens to come, so that their first forward is dense as well. Cross-attention follows its rule in every call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from hf_flashbsa.integration.block_sparse_config import BlockSparseConfig, Rule
from hf_flashbsa.integration.mask_function import MaskSpec, bsa_mask, replace_fields
from hf_flashbsa.integration.model_source import computes_own_attention
from hf_flashbsa.integration.padding_free.packed_mask import PackedMask
from hf_flashbsa.integration.roles import role_of, watch_roles
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.modes import is_eager
from hf_flashbsa.masks.selection import shown_blocks
from hf_flashbsa.masks.spec import AttentionSpec
from hf_flashbsa.ops.lowering import remember

_SEVERAL_DOCUMENTS = (
    "position_ids divide rows into documents, but a layout must know where each begins: pass cu_seq_lens_q and "
    "cu_seq_lens_k instead of padding (without padding_free), or a document per row without position_ids."
)


class LayerCall(NamedTuple):
    """What is known of an attention call beside its queries and keys.

    `spec` is what the call runs where it stays dense.
    """

    mask: MaskSpec
    spec: AttentionSpec
    has_cu_seqlens: bool
    bias: torch.Tensor | None
    max_length_q: int | None
    max_length_k: int | None


class SparseLayer(NamedTuple):
    """The place of an attention layer in its model, and its rule."""

    config: BlockSparseConfig
    role: str
    layer_index: int | None
    rule: Rule

    @classmethod
    def of(cls, module: nn.Module, is_causal: bool | None, mask_is_causal: bool | None = None) -> SparseLayer:
        """That of an attention module.

        Args:
            is_causal, mask_is_causal: as in `role_of`.
        """
        model_config = getattr(module, "config", None)
        if model_config is None:
            raise ValueError(
                f"bsa_sparse: {type(module).__name__} holds no config, where its block layout would be; use "
                "attn_implementation='bsa_dense' for this model."
            )
        config = BlockSparseConfig.of(model_config)
        role = role_of(module, is_causal, mask_is_causal)
        index = getattr(module, "layer_idx", None)
        if index is None and any(layer.startswith(role) for layer in config.layers):
            raise ValueError(
                f"bsa_sparse: {type(module).__name__} does not know which layer it is, but the config has rules for "
                f"single {role} layers; number them by hf_flashbsa.set_block_sparse(model, "
                "BlockSparseConfig.of(model.config)) after loading the model."
            )
        return cls(config, role, index, config.rule(role, index))

    def spec(self, module: nn.Module, call: LayerCall, query: torch.Tensor, key: torch.Tensor) -> AttentionSpec:
        """The spec of a call with this layer's layout, or as it was where the call stays dense."""
        crosses = self.role == "cross"
        if not crosses and _has_cached_keys(call, query, key):
            if module.training and torch.is_grad_enabled() and key.requires_grad:
                raise ValueError(
                    f"bsa_sparse: self-attention of {query.shape[2]} queries with {key.shape[2]} keys has no layout; "
                    "train without cached keys (prefix tuning), or with attn_implementation='bsa_dense'."
                )
            return call.spec
        spec = _by_row(call)
        if self.rule.selects:
            return replace_fields(spec, layout=self._selected(call, spec, query, key))
        # A bias that is not one of distances belongs to the columns of a row.
        by_distance = call.bias is None or hasattr(module, "has_relative_attention_bias")
        starts_k = _starts(call.mask, spec, query.shape[0]) if by_distance else None
        starts_q = None if crosses else starts_k
        wanted = self.rule, self.role, *_lengths(call, query, key), query.shape[1]
        made: list[tuple[tuple, AttentionSpec]] = remember(spec, "with layouts", (), list)
        for has, known in made:  # a search, since torch.compile cannot hash sizes
            if has == wanted and known.starts_q is starts_q and known.starts_k is starts_k:
                return known
        layout = self.config.layout(self.role, self.layer_index, *wanted[2:], query.device, spec.causal)
        known = replace_fields(spec, layout=layout, starts_q=starts_q, starts_k=starts_k)
        made.append((wanted, known))
        return known

    def _selected(self, call: LayerCall, spec: AttentionSpec, query: torch.Tensor, key: torch.Tensor) -> BlockLayout:
        if spec.cu_seqlens_q is not None:
            raise ValueError(
                f"bsa_sparse: {self.rule.pattern} selects blocks of padded batches, not of rows packed with "
                "cu_seq_lens_*; pad the batch (padding_free may skip the rest of the padding), or use a pattern."
            )
        live_q, live_k = (None if ids is None else ids >= 0 for ids in (spec.segment_ids_q, spec.segment_ids_k))
        if live_q is None and self.role != "cross":
            live_q = live_k
        shown = _shown_blocks(call, spec, query, self.rule.block_size)
        return self.config.select(self.role, self.layer_index, query, key, live_q, live_k, spec.causal, shown)


def _shown_blocks(call: LayerCall, spec: AttentionSpec, query: torch.Tensor, size: int) -> torch.Tensor | None:
    """Which blocks a mask of the call shows, where a selection must not lose its choice to hidden ones."""
    if spec.mask is not None:
        whole = spec.mask.expand(-1, -1, query.shape[2], -1)
        return call.mask.derived(("shown", size), (spec.mask,), lambda: shown_blocks(whole, size))
    if call.bias is None or spec.causal:
        return None
    visible = call.bias > torch.finfo(call.bias.dtype).min
    return shown_blocks(visible.expand(-1, -1, query.shape[2], -1), size)


def _has_cached_keys(call: LayerCall, query: torch.Tensor, key: torch.Tensor) -> bool:
    offset = call.spec.query_offset
    return query.shape[2] != key.shape[2] or (isinstance(offset, int) and offset != 0)


def _lengths(call: LayerCall, query: torch.Tensor, key: torch.Tensor) -> tuple[int, int]:
    """Queries and keys that a layout must cover, as the host knows them."""
    if isinstance(call.mask, PackedMask):
        return call.mask.rows_q.length, call.mask.rows_k.length
    longest_q, longest_k = (call.max_length_q, call.max_length_k) if call.has_cu_seqlens else (None, None)
    return (
        longest_q if isinstance(longest_q, int) else query.shape[2],
        longest_k if isinstance(longest_k, int) else key.shape[2],
    )


def _by_row(call: LayerCall) -> AttentionSpec:
    """The spec of a call whose documents each have a row, or have their beginnings known.

    Raises where a row holds several documents.
    """
    mask, spec = call.mask, call.spec
    if spec.cu_seqlens_q is not None or spec.cu_seqlens_k is not None:
        return spec
    if call.has_cu_seqlens:
        raise ValueError(
            "bsa_sparse: cu_seq_lens_* do not go together with a padding mask or a position bias; leave out the "
            "attention_mask, or pad the batch instead of packing it."
        )
    if mask.packed and is_eager():  # where something traces, Transformers takes any positions for packed ones
        raise ValueError(f"bsa_sparse: {_SEVERAL_DOCUMENTS}")
    return mask.spec


def _starts(mask: MaskSpec, spec: AttentionSpec, batch: int) -> torch.Tensor | None:
    """int32 `(B,)`: the first live key of each row; None where no key is padding."""
    ids = spec.segment_ids_k
    if ids is None:
        return None
    return mask.derived("starts", (ids,), lambda: (ids >= 0).int().argmax(-1).to(torch.int32).expand(batch))


def bsa_sparse_mask(*args: Any, **kwargs: Any) -> MaskSpec | torch.Tensor | None:
    """The mask function of "bsa_sparse". Arguments as in `bsa_mask`.

    Raises:
        ValueError: the model computes attention of its own, which would stay dense.
    """
    config = kwargs.get("config")
    if config is not None and computes_own_attention(type(config)):
        raise ValueError(
            f"bsa_sparse: the model of {type(config).__name__} computes attention of its own, which cannot follow a "
            "layout; use attn_implementation='eager'."
        )
    return bsa_mask(*args, **kwargs)


def set_block_sparse(model: nn.Module, config: BlockSparseConfig) -> None:
    """Stores block layouts in a Transformers model's config, so that "bsa_sparse" finds and `save_pretrained` keeps
    them.

    Encoder and decoder of some models hold copies of the config; all that the model's modules hold are written.
    Attention modules whose `layer_idx` is None, as in mBART's encoder, get the number of the layer that they are in.
    Rules for single layers need it, so call this again behind `from_pretrained` where there are any:
    `set_block_sparse(model, BlockSparseConfig.of(model.config))`.
    """
    if not isinstance(config, BlockSparseConfig):
        raise ValueError(f"config: {config!r}; give a BlockSparseConfig.")
    for module in model.modules():
        module_config: Any = getattr(module, "config", None)
        if hasattr(module_config, "model_type"):
            module_config.block_sparse = config.to_dict()
        if isinstance(module, nn.ModuleList):
            for index, layer in enumerate(module):
                for part in layer.modules():
                    if getattr(part, "layer_idx", index) is None:
                        part.layer_idx = index
    watch_roles(model)
