"""What padding-free stacks return beside hidden states, and the names by which they are given caches."""

from __future__ import annotations

import inspect
from typing import NamedTuple

import pytest
import torch
import transformers
from eager_comparisons import made
from packed_models import labelled, losses, packed, widths
from torch import nn
from transformers_models import DECODER, assert_same, batch_for, tiny

from hf_flashbsa import LayerStack, enable_padding_free, register_layer_stack
from hf_flashbsa.integration.hook_args import HookArgs
from hf_flashbsa.integration.padding_free import layer_stacks
from hf_flashbsa.integration.padding_free.hooks import _has_cache, _restored
from hf_flashbsa.integration.padding_free.packing import Packing

EXPERTS = dict(DECODER, num_experts_per_tok=2)
QWEN_MOE = dict(EXPERTS, num_experts=4, moe_intermediate_size=16)
#: Mixtures of experts, whose balancing loss masks padding.
MIXTURES = {
    "mixtral": (transformers.MixtralForCausalLM, transformers.MixtralConfig(**EXPERTS, num_local_experts=4)),
    "qwen2_moe": (
        transformers.Qwen2MoeForCausalLM,
        transformers.Qwen2MoeConfig(**QWEN_MOE, shared_expert_intermediate_size=16),
    ),
    "qwen3_moe": (transformers.Qwen3MoeForCausalLM, transformers.Qwen3MoeConfig(**QWEN_MOE, head_dim=8)),
    "gpt_oss": (transformers.GptOssForCausalLM, transformers.GptOssConfig(**EXPERTS, num_local_experts=4, head_dim=8)),
}


@pytest.fixture
def stacks_of_others(monkeypatch):
    """Lets a test declare stacks."""
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))


@pytest.mark.usefixtures("stacks_of_others")
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_balancing_loss_of_a_mixture_of_experts(name, padding):
    """Loss and all gradients with the router's loss, and the router's logits with zeros at padding."""
    inputs = labelled("llama", padding) | {"output_router_logits": True, "use_cache": False}
    results, logits = [], []
    for how in ("bsa_dense", "eager"):
        model = made(*MIXTURES[name], how).train()
        model.router_aux_loss_coef = 0.5  # so that it shows
        if how == "bsa_dense":
            register_layer_stack(type(model.model), LayerStack())
            enable_padding_free(model)
        with widths(model) as seen:
            results.append(losses(model, inputs))
        assert how == "eager" or {rows for rows, _ in seen} == {1}
        logits.append(model(**inputs).router_logits)
    assert_same(*results)
    live = inputs["attention_mask"].flatten()[:, None]
    for ours, eager in zip(*logits, strict=True):
        torch.testing.assert_close(ours, eager * live, rtol=1e-4, atol=1e-4)


class Named(NamedTuple):
    states: torch.Tensor
    rest: object


def test_whatever_has_an_entry_for_each_token_is_restored():
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]]) > 0
    rows = Packing.of_mask(mask, 4, has_holes=False)
    padded = {name: torch.randn(2, 3, *size) * mask.view(2, 3, *(1 for _ in size)) for name, size in SIZES.items()}
    flat = padded["vectors"].flatten(0, 1)
    output = {name: rows.pack(x) for name, x in padded.items()}
    output |= {"nested": Named(output["vectors"], [output["heads"], (flat[mask.flatten()],)]), "loss": torch.ones(())}
    output |= {"counts": torch.ones(4), "weights": torch.ones(5, 4), "none": None, "text": "a"}
    restored = _restored(dict(output), rows, {})
    for name, x in padded.items():
        assert torch.equal(restored[name], x), name
    named = restored["nested"]
    assert isinstance(named, Named) and named.states is restored["vectors"], "one tensor stays one tensor"
    assert torch.equal(named.rest[0], padded["heads"]) and torch.equal(named.rest[1][0], flat)
    assert all(restored[name] is output[name] for name in ("loss", "counts", "weights", "none", "text"))


SIZES = {"ids": (), "vectors": (5,), "heads": (2, 5)}


class Newest(nn.Module):
    def forward(self, input_ids, attention_mask=None, cache=None):
        return input_ids


class Older(nn.Module):
    def forward(self, input_ids, attention_mask=None, past_key_values=None):
        return input_ids


@pytest.mark.parametrize("module", [Newest(), Older()])
def test_caches_are_seen_by_every_name_that_transformers_has_for_them(module):
    cache = transformers.DynamicCache()
    for args, kwargs in (((None, None, cache), {}), ((), {"cache": cache}), ((), {"past_key_values": cache})):
        assert _has_cache(HookArgs(module, args, kwargs))
    assert not _has_cache(HookArgs(module, (None, None, None), {"use_cache": True}))


@pytest.mark.parametrize("training", [True, False])
def test_a_cache_that_is_given_rules_out_packing(training):
    """The next step reads as many keys as the cache has, so that it must hold those at padding."""
    names = inspect.signature(transformers.LlamaForCausalLM.forward).parameters
    word = "cache" if "cache" in names else "past_key_values"
    inputs, results = batch_for("llama", "left"), []
    longer = torch.nn.functional.pad(inputs["attention_mask"], (0, 2), value=1)
    for model in (packed("llama"), tiny("llama", "eager")):
        model.train(training)
        model.config.use_cache = False
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(**inputs, **{word: cache})
            step = model(inputs["input_ids"][:, :2], attention_mask=longer, use_cache=True, **{word: cache})
        assert cache.get_seq_length() == 15
        results.append(step.logits)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
