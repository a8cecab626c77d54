"""Whole models against eager attention: positions, missing masks, windows of no size, masks that are rewritten."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import nn
from transformers.models.mllama import configuration_mllama, modeling_mllama
from transformers_models import DECODER, SIZE, assert_same, batch_for, run, strengthen, tiny

LENGTH = 13  # of the rows of `batch_for`
HOW = ("bsa_dense", "eager")
ROPE = {"rope_type": "default", "rope_theta": 1e4}

#: Positions of `LENGTH` tokens, whatever they are there for.
POSITIONS = {
    "documents": torch.cat([torch.arange(6), torch.arange(7)]),
    "zeros": torch.zeros(LENGTH, dtype=torch.int64),
    "pairs": torch.arange(LENGTH) // 2,
    "descending": torch.arange(LENGTH).flip(0),
    "clamped": (torch.arange(LENGTH) - 4).clamp(min=0),
}


def made(cls: type, config, implementation: str) -> nn.Module:
    model = cls._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.eval()


def run_model(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and all gradients of any model, those at padding included."""
    model.zero_grad()
    output = model(**inputs)
    states = output.logits if "logits" in output else output.last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    (states * weights).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def additive(mask: torch.Tensor) -> torch.Tensor:
    """A copy of a mask of four dimensions as eager attention takes it."""
    if mask.is_floating_point():
        return mask.clone()
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def with_positions(name: str, padding: str, positions: str) -> dict:
    return batch_for(name, padding) | {"position_ids": POSITIONS[positions].expand(3, -1)}


def assert_positions_match(name: str, padding: str, positions: str) -> None:
    inputs = with_positions(name, padding, positions)
    assert_same(*(run(tiny(name, how), inputs) for how in HOW))


def _encoder(name: str) -> tuple[type, object]:
    """An encoder that hands `position_ids` to its layers. Windows are so wide that all queries see live keys."""
    if name == "t5gemma":
        module = transformers.T5GemmaModuleConfig(**DECODER, head_dim=8, sliding_window=LENGTH)
        config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
        return transformers.T5GemmaEncoderModel, config
    if name == "eurobert":
        return transformers.EuroBertModel, transformers.EuroBertConfig(**DECODER)
    settings = dict(SIZE, pad_token_id=0, local_attention=2 * LENGTH, global_attn_every_n_layers=2)
    return transformers.ModernBertModel, transformers.ModernBertConfig(**settings)


def assert_encoder_matches(name: str, padding: str, positions: str) -> None:
    """All rows count: queries on padding see the live keys, on whichever side it is."""
    inputs = with_positions("bert", padding, positions)
    assert_same(*(run_model(made(*_encoder(name), how), inputs) for how in HOW))


def assert_cross_attention_matches() -> None:
    """Llama 3.2 Vision, whose cross-attention has no `is_causal` and gets no mask where the caller gives none."""
    settings = DECODER | dict(cross_attention_layers=[1], rope_parameters=ROPE)
    config = configuration_mllama.MllamaTextConfig(**settings)
    inputs = batch_for("llama", "right") | {"use_cache": False}
    inputs["cross_attention_states"] = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(4))
    results = []
    for how in HOW:
        states, gradients = run_model(made(modeling_mllama.MllamaTextModel, config, how), inputs)
        results.append((states * inputs["attention_mask"][..., None], gradients))
    assert "layers.1.cross_attn.q_proj.weight" in results[0][1]
    assert_same(*results)


def assert_window_of_zero_matches() -> None:
    """Qwen2-MoE writes `sliding_window = 0` into its config where windows are off."""
    config = transformers.Qwen2MoeConfig(
        **DECODER, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    assert config.sliding_window == 0
    models = (made(transformers.Qwen2MoeForCausalLM, config, how) for how in HOW)
    assert_same(*(run(model, batch_for("llama", "right")) for model in models))


def random_mask(kind: str, seed: int) -> torch.Tensor:
    """A mask `(3, 1, 13, 13)`, bool or "float", or `(3, 1, 1, 13)` for "keys". No query is left without keys."""
    queries = 1 if kind == "keys" else LENGTH
    seen = torch.rand(3, 1, queries, LENGTH, generator=torch.Generator().manual_seed(seed)) < 0.5
    seen |= torch.eye(LENGTH, dtype=torch.bool)[:queries]
    return additive(seen) if kind == "float" else seen


def assert_rewritten_masks_match(name: str, kind: str, write: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
    """In two models of ours, one behind the other, which share the mask's buffer, and in one again.

    Args:
        write: puts the values of its second tensor in the place of the first one's.
    """
    inputs, mask = batch_for(name, "none"), random_mask(kind, 0)
    models = tiny(name, "bsa_dense"), tiny(name, "bsa_dense")
    for seed, model in enumerate((models[0], models[1], models[0])):
        write(mask, random_mask(kind, seed))
        expected = run(tiny(name, "eager"), inputs, attention_mask=additive(mask))
        assert_same(run(model, inputs, attention_mask=mask), expected)
