"""Tiny models with block layouts, and an oracle that computes them from dense masks."""

from __future__ import annotations

import re

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
from transformers_models import batch_for, tiny

from hf_flashbsa import BlockSparseConfig, set_block_sparse
from hf_flashbsa.patterns import make_layout
from hf_flashbsa.selection import top_k_blocks

BLOCK = 32
NAMES = ("bart", "t5", "llama", "bert")
SIZES = dict(length=150, target_length=110)
ROLES = {
    "decoder": {"pattern": "dilated", "window": 20, "dilation": [1, 2]},
    "cross": {"pattern": "global_columns", "num_global_tokens": 50},
}
#: Rules that differ by role and head, with entries that do not end on a block's edge.
BY_PLACE = BlockSparseConfig("longformer", BLOCK, window=40, num_global_tokens=10, roles=ROLES)
#: The same with rules for single layers, one of which depends on the number of blocks.
MIXED = BlockSparseConfig(
    "longformer",
    BLOCK,
    window=40,
    num_global_tokens=10,
    roles=ROLES,
    layers={
        "encoder.1": {"pattern": "bigbird", "num_random_blocks": 1, "num_window_blocks": 1},
        "decoder.1": {"pattern": "local", "window": 40},
        "cross.1": "dense",
    },
)
SELECTING = BlockSparseConfig("top_k_blocks", BLOCK, top_k=2, roles={"cross": {"pattern": "top_k_blocks", "top_k": 2}})


def sparse(name: str, config: BlockSparseConfig = MIXED, **changes) -> nn.Module:
    """`tiny` with block layouts."""
    model = tiny(name, "bsa_sparse", **changes)
    set_block_sparse(model, config)
    return model


def oracle(name: str, config: BlockSparseConfig = MIXED, **changes) -> nn.Module:
    """The same model, with eager attention under the masks that the layouts stand for."""
    model = tiny(name, "sparse_oracle", **changes)
    for path, module in model.named_modules():
        if re.search(r"(self_attn|encoder_attn|SelfAttention|EncDecAttention|attention\.self|\.attn)$", path):
            crosses = "encoder_attn" in path or "EncDecAttention" in path
            decodes = "decoder" in path or name == "llama"
            role = "cross" if crosses else "decoder" if decodes else "encoder"
            index = int(re.search(r"(?:layers|layer|block)\.(\d+)\.", path)[1])
            module.oracle_rule = role, config.rule(role, index)
    return model


def inputs_for(name: str, padding: str) -> dict:
    return batch_for(name, padding, **SIZES)


def _shown(module: nn.Module, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """bool `(B, H or 1, Q, K)`: what the layout of a layer shows, counted from each row's first live token."""
    role, rule = module.oracle_rule
    (batch, heads, len_q, _), len_k = query.shape, key.shape[2]
    if rule.is_dense or (role != "cross" and len_q != len_k):
        return torch.ones(1, 1, len_q, len_k, dtype=torch.bool)
    options, causal = dict(rule.parameters), role == "decoder"
    live = torch.ones(batch, len_k, dtype=torch.bool)
    if mask is not None:
        live = (mask == 0)[:, 0].any(1)  # a key that nobody sees is padding
        live = live.expand(batch, -1)
    if rule.selects:
        keep_diagonal, live_q = role != "cross", None if role == "cross" else live
        layout = top_k_blocks(query, key, rule.block_size, causal, keep_diagonal, live_q, live, **options)
        return layout.to_mask(len_q, len_k)
    mask, both = (
        make_layout(rule.pattern, len_q, len_k, rule.block_size, causal=c, num_heads=heads, **options).to_mask(
            len_q, len_k
        )
        for c in (causal, False)
    )
    if causal:
        mask = mask.tril() | both.triu(1)  # what the mask of the call shows of it
    shown = torch.zeros(batch, mask.shape[1], len_q, len_k, dtype=torch.bool)
    for row, first in enumerate(live.int().argmax(-1).tolist()):
        first_q = 0 if role == "cross" else first
        shown[row, :, first_q:, first:] = mask[0, :, : len_q - first_q, : len_k - first]
    return shown


def _oracle_attention(module, query, key, value, attention_mask, scaling=None, position_bias=None, **kwargs):
    group = query.shape[1] // key.shape[1]
    shown = _shown(module, query, key, attention_mask)
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = query @ key.mT * scaling
    if position_bias is not None:
        scores = scores + position_bias
    if attention_mask is not None:
        shown = shown & (attention_mask == 0)
    scores = scores.masked_fill(~shown, -1e30)
    weights = torch.softmax(scores, dim=-1).masked_fill(~shown, 0.0)
    return (weights @ value).transpose(1, 2), None


AttentionInterface.register("sparse_oracle", _oracle_attention)
AttentionMaskInterface.register("sparse_oracle", masking_utils.eager_mask)
