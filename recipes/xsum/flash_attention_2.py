"""Transformers' FlashAttention-2 with its cross-attention repaired: `attn_implementation: fa2_repaired`.

A baseline for comparisons. Where keys are padded, Transformers' `flash_attention_2` removes queries by the mask of the
keys. That is right for self-attention, whose queries are the keys' tokens, and whose causal mask needs both removed:
FlashAttention aligns it at the last query and the last key of a row. In cross-attention it drops target tokens that
have nothing to do with the source's padding. Here cross-attention keeps all queries and removes keys and values only;
everything else is Transformers' own path, with its cost.
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import _flash_attention_forward
from transformers.utils import is_flash_attn_2_available

#: The registered name. Transformers takes names with "flash" in them for builds of its own to load.
REPAIRED = "fa2_repaired"
MISSING = "{} needs flash-attn: pip install flash-attn --no-build-isolation"


def repaired_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The attention function of Transformers' `AttentionInterface`.

    Args:
        module: the attention layer.
        query, key, value: `(B, H, Q, D)`, `(B, Hkv, K, D)` twice; bfloat16 or float16, or float32 under autocast.
        attention_mask: `(B, K)`, True at tokens; None without padding.
        dropout, scaling, is_causal: as Transformers passes them.
        position_bias: must be None, FlashAttention-2 has no biases.
        kwargs: handed on to Transformers.

    Returns:
        `(B, Q, H, D)`, and None for the weights.

    Raises:
        ImportError: flash-attn is not installed.
        ValueError: the model adds a bias to its scores, as T5 does.
    """
    if not is_flash_attn_2_available():
        raise ImportError(MISSING.format(REPAIRED))
    if position_bias is not None:
        raise ValueError(f"{REPAIRED}: FlashAttention-2 adds no position bias; use bsa_dense or sdpa for this model.")
    causal = module.is_causal if is_causal is None else is_causal
    target_dtype = get_target_dtype(query, module)
    batch, _, queries, _ = query.shape
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    if attention_mask is not None and _is_cross(module, causal, queries, key.shape[1]):
        lengths = attention_mask.sum(-1, dtype=torch.int32)
        live = attention_mask.flatten().nonzero()[:, 0]
        query = query.reshape(1, batch * queries, *query.shape[2:])
        key, value = (x.flatten(0, 1)[live][None] for x in (key, value))
        kwargs |= {
            "cu_seq_lens_q": torch.arange(0, (batch + 1) * queries, queries, dtype=torch.int32, device=query.device),
            "cu_seq_lens_k": torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)),
            "max_length_q": queries,
            "max_length_k": int(lengths.max()),
        }
        attention_mask = None
    out = _flash_attention_forward(
        query,
        key,
        value,
        attention_mask,
        query_length=queries,
        is_causal=causal,
        dropout=dropout,
        softmax_scale=scaling,
        target_dtype=target_dtype,
        attn_implementation="flash_attention_2",
        **kwargs,
    )
    return out.reshape(batch, queries, *out.shape[2:]), None


def _is_cross(module: torch.nn.Module, causal: bool, queries: int, keys: int) -> bool:
    named = getattr(module, "is_decoder", False) or "Cross" in type(module).__name__
    return not causal and (named or queries != keys)


AttentionInterface.register(REPAIRED, repaired_attention)
AttentionMaskInterface.register(REPAIRED, flash_attention_mask)
