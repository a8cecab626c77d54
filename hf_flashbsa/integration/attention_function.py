"""Transformers' attention contract, translated once into a call of `hf_flashbsa.attention`."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.integrations.flash_attention import get_target_dtype
from transformers.utils import logging

from hf_flashbsa.integration.backend_log import note_backend
from hf_flashbsa.integration.bias_alignment import in_wide_rows
from hf_flashbsa.integration.mask_function import MaskSpec
from hf_flashbsa.integration.padding_free.packed_mask import PackedMask
from hf_flashbsa.integration.sparse_layers import LayerCall, SparseLayer
from hf_flashbsa.kernels.backends import take_forward
from hf_flashbsa.masks.modes import may_keep
from hf_flashbsa.masks.spec import AttentionSpec, padding_segment_ids
from hf_flashbsa.ops.api import attention

logger = logging.get_logger(__name__)

#: Keywords that change the result and are not honoured, with what to do instead.
_UNSUPPORTED = {
    "block_indices": "sparse block indices",
    "sinks": "sinks that differ by query; gpt-oss passes `s_aux`",
    "cache": "a paged cache (continuous batching)",
    "head_mask": "a head mask",
    "layer_head_mask": "a head mask",
}


def bsa_dense_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function "bsa_dense" of Transformers: exact. Arguments as in `_bsa_forward`."""
    return _bsa_forward(None, module, query, key, value, attention_mask, **kwargs)


def bsa_sparse_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | torch.Tensor | None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function "bsa_sparse": a layer visits the blocks that the model's `BlockSparseConfig` gives it.

    Arguments as in `_bsa_forward`. What the mask hides stays hidden; `hf_flashbsa.integration.sparse_layers` says
    where layouts begin, and which calls stay dense.

    Raises:
        ValueError: the model has no `BlockSparseConfig`; the layer's role cannot be told; a layout cannot be applied.
    """
    layer = SparseLayer.of(module, is_causal, _mask_is_causal(attention_mask))
    return _bsa_forward(layer, module, query, key, value, attention_mask, is_causal=is_causal, **kwargs)


def _bsa_forward(
    sparse: SparseLayer | None,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: MaskSpec | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | torch.Tensor | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    indices: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention functions of Transformers' `AttentionInterface`, with gradients for all inputs.

    Args:
        sparse: which layout the layer has; None for all blocks.
        module: the attention layer; its `is_causal`, `is_decoder` and config say which role it has.
        query, key, value: `(B, Hq, Q, D)`, `(B, Hkv, K, D)` and `(B, Hkv, K, Dv)`.
        attention_mask: what `bsa_mask` returned; a bool `(B or 1, H or 1, Q, K)`, True where visible; a float mask of
            that shape, added to the scores; a bool or integer `(B, K)`, 0 at padding (flash attention's form); or
            None: all keys are visible. Any form but the last two overrides `is_causal` and `sliding_window`.
        dropout, scaling, softcap, s_aux: `dropout_p`, `softmax_scale`, `softcap` and `sinks` of `attention`.
        is_causal: without a mask or with a 2-D one, whether queries see no later keys. Default: see `_is_causal`. The
            last query then stands at the last key, whatever the lengths.
        sliding_window: without a mask or with a 2-D one, most keys seen on each side, the current token included;
            None, 0 and negative numbers for no window.
        position_bias: `(B or 1, H, Q, K)` added to the scores (T5). T5's cross-attention passes zeros; they are
            skipped.
        cu_seq_lens_q, cu_seq_lens_k: `(n + 1,)` cumulative lengths of `n` documents in one row. They overrule the
            documents that Transformers' mask found in `position_ids`.
        max_length_q, max_length_k: lengths that none of those documents exceeds, which size its layout.
        indices: int `(B, Q, n)`, the keys that a query may see beside what its mask says (DeepSeek sparse attention);
            negative ones stand for none. They become a bool mask, as they do for eager and sdpa.
        kwargs: names that change no result are ignored, others raise. `position_ids` are ignored as eager and sdpa
            ignore them: positions divide documents in the mask alone (see `bsa_mask`).

    Returns:
        `(B, Q, Hq, Dv)` without a copy, and None for the weights.

    Raises:
        ValueError: a keyword that would change the result and is not supported; masks that do not fit.
    """
    _check_keywords(kwargs)
    if indices is not None:
        attention_mask = _selected_keys(attention_mask, indices, query.shape[2], key.shape[2])
    if position_bias is not None and _is_cross(module, is_causal) and not _learns_bias(module):
        position_bias = None
    query, key, value = _one_dtype(module, query, key, value)
    rows = None
    if _must_unpack(attention_mask, position_bias, sparse):
        rows = attention_mask.rows_q
        query, key, value = attention_mask.unpack(query, key, value)
        attention_mask = attention_mask.padded

    position_bias = _bias_of(position_bias, attention_mask)
    packed = cu_seq_lens_q is not None or cu_seq_lens_k is not None
    if attention_mask is None or attention_mask.ndim == 2:
        is_causal = _is_causal(module, is_causal, attention_mask is not None or packed)
    mask = _as_mask_spec(attention_mask, query, key, is_causal, sliding_window, sparse is not None)
    if packed:
        _check_packing(module, is_causal, query, key, cu_seq_lens_q, cu_seq_lens_k)
        spec = mask.packed_by(cu_seq_lens_q, cu_seq_lens_k, dense=position_bias is not None)
    else:
        spec = mask.spec
    if sparse is not None and not sparse.rule.is_dense:
        call = LayerCall(mask, spec, packed, position_bias, max_length_q, max_length_k)
        spec = sparse.spec(module, call, query, key)

    out = attention(
        query, key, value, spec,
        bias=position_bias, sinks=s_aux, softmax_scale=scaling, softcap=softcap, dropout_p=dropout,
    )  # fmt: skip
    if not torch.compiler.is_compiling():
        note_backend(module, take_forward())
    out = out.transpose(1, 2)
    return (out if rows is None else rows.pack(out)), None


def _check_keywords(keywords: dict) -> None:
    """Raises for keywords that would change the result; warns of attention weights, which nobody gets."""
    for name in keywords:
        if name in _UNSUPPORTED and keywords[name] is not None:
            raise ValueError(
                f"{name}: hf_flashbsa does not support {_UNSUPPORTED[name]}; use attn_implementation='eager'."
            )
    if keywords.get("output_attentions") and not torch.compiler.is_compiling():
        logger.warning_once("hf_flashbsa keeps no attention weights; use attn_implementation='eager' to see them.")


def _must_unpack(mask: MaskSpec | torch.Tensor | None, bias: torch.Tensor | None, sparse: SparseLayer | None) -> bool:
    """Whether a call on packed rows runs on the padded batch: its mask, bias or selected blocks belong to that."""
    return isinstance(mask, PackedMask) and (
        mask.needs_padding
        or (bias is not None and not mask.takes_bias)
        or (sparse is not None and sparse.rule.selects)
    )


def _mask_is_causal(mask: MaskSpec | torch.Tensor | None) -> bool | None:
    """Whether a mask hides all later keys; None where the host does not know."""
    if isinstance(mask, MaskSpec):
        return mask.spec.causal if mask.spec.mask is None else None
    one_row = mask is None or (mask.ndim == 4 and mask.shape[2] == 1)  # all queries see the same keys
    return False if one_row else None


def _is_causal(module: torch.nn.Module, is_causal: bool | None, padded_or_packed: bool) -> bool:
    """Whether queries see no later keys, in a call without a 4-D mask.

    What the call says counts. Else a call without any mask sees all keys, as in eager attention: a causal model gets
    its causality from the mask function, which never returns None here, so that no mask means that the model made none
    (the cross-attention of Mllama and LightGlue, which sdpa takes for causal). 2-D masks and `cu_seq_lens_*` are flash
    attention's contract, where the module's own `is_causal` counts.

    Args:
        padded_or_packed: whether the call has a 2-D mask or `cu_seq_lens_*`.

    Raises:
        ValueError: neither the call nor the module says it, in flash attention's contract.
    """
    if is_causal is not None:
        return is_causal
    own = getattr(module, "is_causal", None)
    if not padded_or_packed:
        if own and not torch.compiler.is_compiling():
            logger.warning_once(
                f"hf_flashbsa: {type(module).__name__} has is_causal = True but was given no attention_mask; it sees "
                "all keys, as with attn_implementation='eager'. If it should not, pass is_causal=True in the call."
            )
        return False
    if own is None:
        raise ValueError(
            f"is_causal: with a 2-D attention_mask or cu_seq_lens_* {type(module).__name__} must say whether it is "
            "causal; set `is_causal` on the module, or pass it in the call."
        )
    return own


def _is_cross(module: torch.nn.Module, is_causal: bool | None) -> bool:
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    return getattr(module, "is_decoder", False) and not causal


def _learns_bias(module: torch.nn.Module) -> bool:
    return getattr(module, "has_relative_attention_bias", True)


def _one_dtype(module: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype that Transformers' flash attention would run in, under autocast or when they differ."""
    query, key, value = tensors
    alike = query.dtype is key.dtype is value.dtype
    if alike and not torch._C._is_any_autocast_enabled():  # most calls, at once
        return tensors
    device = query.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
    autocast = has_autocast and torch.is_autocast_enabled(device)
    if autocast or not alike:
        if not has_autocast:
            target = min((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
        else:
            target = torch.get_autocast_dtype(device) if autocast else get_target_dtype(query, module)
        if target is not None and query.dtype != torch.float64:
            return tuple(t.to(target) for t in tensors)
    return tensors


def _is_4d(mask: MaskSpec | torch.Tensor | None) -> bool:
    return isinstance(mask, torch.Tensor) and mask.ndim == 4


def _is_additive(mask: MaskSpec | torch.Tensor | None) -> bool:
    return _is_4d(mask) and mask.is_floating_point()


def _selected_keys(
    mask: MaskSpec | torch.Tensor | None, indices: torch.Tensor, len_q: int, len_k: int
) -> torch.Tensor:
    """The 4-D mask that hides what `mask` hides and all keys but `indices`, see `_bsa_forward`."""
    if indices.ndim != 3 or indices.shape[1] != len_q or indices.is_floating_point():
        raise ValueError(
            f"indices: expected integers of shape (B, Q, n) with Q = {len_q}, got {indices.dtype} "
            f"of shape {tuple(indices.shape)}."
        )
    places = torch.where(indices < 0, len_k, indices).long()
    selected = torch.zeros(*indices.shape[:2], len_k + 1, dtype=torch.bool, device=indices.device)
    selected = selected.scatter(-1, places, True)[:, None, :, :len_k]
    if mask is None:
        return selected
    if _is_additive(mask):
        return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)
    return selected & (mask.to(torch.bool)[:, None, None] if mask.ndim == 2 else mask)


def _masked_bias(bias: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Their sum, in which what the mask hides stays at the lowest number."""
    total = bias + mask
    return total.masked_fill(mask <= torch.finfo(mask.dtype).min, torch.finfo(total.dtype).min)


def _bias_of(bias: torch.Tensor | None, mask: MaskSpec | torch.Tensor | None) -> torch.Tensor | None:
    """What a call adds to its scores, in rows that kernels read fast: its bias, its additive mask, or their sum.

    Copied once for all layers of a forward pass that share a mask.
    """
    if _is_additive(mask):
        bias = mask if bias is None else _masked_bias(bias, mask)
    if bias is None:
        return None
    if not isinstance(mask, MaskSpec) or torch.compiler.is_compiling():
        return in_wide_rows(bias)
    return mask.derived("bias in wide rows", (bias, torch.is_grad_enabled()), lambda: in_wide_rows(bias))


#: Specs of the bool masks that callers pass themselves. A spec holds an alias of its mask and nothing made of the
#: mask's values, so that it is right whatever is written there, by whom and when; it goes with the caller's tensor.
_SPECS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _spec_of(mask: torch.Tensor, heads: int, len_q: int) -> AttentionSpec:
    """The spec of a bool mask of four dimensions, one for all layers that get it."""
    if torch.compiler.is_compiling() or not may_keep():
        return AttentionSpec(mask=mask)
    known = _SPECS.get(mask)
    if known is None or not known.mask.is_set_to(_by_query(mask, heads, len_q)):  # `mask.data = other` moves it
        known = AttentionSpec(mask=_by_query(mask.detach(), heads, len_q))
        if known.mask is not None:
            _SPECS[mask] = known
    return known


def _by_query(mask: torch.Tensor, heads: int, len_q: int) -> torch.Tensor:
    """A padding mask `(B, 1, 1, K)` for all heads and queries, without a copy; a spec would make segment ids of it."""
    return mask.expand(-1, heads, len_q, -1) if mask.shape[1] == mask.shape[2] == 1 else mask


def _as_mask_spec(
    mask: MaskSpec | torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    is_causal: bool | None,
    sliding_window: int | None,
    is_sparse: bool = False,
) -> MaskSpec:
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    if isinstance(mask, MaskSpec):
        if mask.shape[2:] != shape[2:]:
            raise ValueError(f"attention_mask: made for {mask.shape[2:]} queries and keys, the layer has {shape[2:]}.")
        return mask
    if _is_additive(mask):
        return MaskSpec(AttentionSpec(), shape, query.device)
    if mask is None or mask.ndim == 2:
        reach = None if sliding_window is None or sliding_window <= 0 else sliding_window - 1
        ids = None
        if mask is not None:
            if mask.is_floating_point() or tuple(mask.shape) != (shape[0], shape[3]):
                raise ValueError(
                    f"attention_mask: {tuple(mask.shape)} {mask.dtype}; a 2-D mask must be bool or integer and "
                    f"(batch, keys) = {(shape[0], shape[3])}."
                )
            ids = padding_segment_ids(mask)
        spec = AttentionSpec(causal=is_causal, window_size=(reach, None if is_causal else reach), segment_ids_k=ids)
        return MaskSpec(spec, shape, query.device)
    if mask.ndim != 4 or mask.dtype != torch.bool:
        raise ValueError(f"attention_mask: {tuple(mask.shape)} {mask.dtype}; give 4-D bool or float, or 2-D padding.")
    # Layouts count from the first live key, which segment ids tell.
    spec = AttentionSpec(mask=mask) if is_sparse else _spec_of(mask, query.shape[1], query.shape[2])
    return MaskSpec(spec, shape, query.device)


def _check_packing(
    module: torch.nn.Module,
    is_causal: bool | None,
    query: torch.Tensor,
    key: torch.Tensor,
    cu_seq_lens_q: torch.Tensor | None,
    cu_seq_lens_k: torch.Tensor | None,
) -> None:
    if cu_seq_lens_q is None or cu_seq_lens_k is None:
        raise ValueError("cu_seq_lens_q and cu_seq_lens_k belong together; give both.")
    if query.shape[0] != 1:
        raise ValueError(f"cu_seq_lens_*: packed documents lie in one row, but the batch has {query.shape[0]}.")
    seq2seq = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    if _is_cross(module, is_causal) or (seq2seq and getattr(module, "is_decoder", False)):
        raise ValueError(
            "cu_seq_lens_*: Transformers hands the same lengths to the encoder, the decoder and the cross-attention, "
            "whose documents differ in length; pad encoder-decoder batches instead."
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seq_lens_*: {query.shape[2]} queries meet {key.shape[2]} keys; packing is for self-attention "
            "without cached keys."
        )
