"""bsa_sparse where a layer's role or the diagonal does not go without saying: against dense masks of the layouts."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from sparse_models import BLOCK, BY_PLACE
from torch import nn
from transformers_models import additive, assert_same, batch_for, run, tiny
from unusual_models import CALM, LATER_KEYS, NARROW, SHARED_CLASSES, SIZES, WIDE, Model, assert_matches_the_oracle

from hf_flashbsa import BlockSparseConfig, set_block_sparse
from hf_flashbsa.integration.roles import role_of
from hf_flashbsa.masks.patterns._builders import join_at_diagonal
from hf_flashbsa.masks.selection import antidiagonal_blocks, shown_blocks, top_k_blocks
from hf_flashbsa.patterns import PATTERNS, make_layout

EVERY_BLOCK = BlockSparseConfig("top_k_blocks", BLOCK, top_k=99)
RANDOM = BlockSparseConfig("bigbird", BLOCK, num_random_blocks=1, num_window_blocks=1, num_global_blocks=0)


# Roles


def _long_text() -> dict:
    return batch_for("bert", "right", length=150)


@pytest.mark.parametrize("name", SHARED_CLASSES)
def test_one_class_for_self_and_cross_attention(name):
    """As many states of the other stack as queries: lengths do not tell the roles apart."""
    assert_matches_the_oracle(SHARED_CLASSES[name], NARROW)


def test_a_role_is_known_after_loading_switching_and_configuring(tmp_path):
    case = SHARED_CLASSES["blip2"]
    model = case.make("bsa_sparse", NARROW)
    expected = case.run(model)
    model.save_pretrained(tmp_path)
    loaded = case.cls.from_pretrained(tmp_path, attn_implementation="bsa_sparse").train()
    assert_same(case.run(loaded), expected)
    switched = case.cls.from_pretrained(tmp_path).train()
    switched.set_attn_implementation("bsa_sparse")
    assert_same(case.run(switched), expected)
    by_hand = case.cls.from_pretrained(tmp_path).train()
    by_hand.config._attn_implementation = "bsa_sparse"
    with pytest.raises(ValueError, match="serves self- and cross-attention.*hf_flashbsa.set_block_sparse"):
        case.run(by_hand)
    set_block_sparse(by_hand, NARROW)
    assert_same(case.run(by_hand), expected)


def test_roles_that_modules_say():
    def module(cls: type = nn.Module, **attributes) -> nn.Module:
        made = cls()
        for name, value in attributes.items():
            setattr(made, name, value)
        return made

    class SomeCrossAttention(nn.Module):
        pass

    assert role_of(module(is_causal=True, is_cross_attention=True), None) == "cross"  # Idefics
    assert role_of(module(is_causal=True, is_cross_attention=False), None) == "decoder"  # GPT-2
    assert role_of(module(SomeCrossAttention), None) == "cross"  # Mllama
    assert role_of(module(is_causal=True, is_decoder=True), False) == "decoder"  # BART's, called with is_causal=False
    assert role_of(module(is_causal=False, is_decoder=False), None) == "encoder"


def test_a_module_that_says_nothing_has_the_role_that_its_mask_shows():
    config = dict(SIZES, **CALM, vocab_size=64)
    case = Model(t.LayoutLMModel, lambda: t.LayoutLMConfig(**config), _long_text, live="attention_mask")
    assert_matches_the_oracle(case, NARROW)
    module = nn.Module()
    assert (role_of(module, None, True), role_of(module, None, False)) == ("decoder", "encoder")
    with pytest.raises(ValueError, match="does not say whether"):
        role_of(module, None, None)


def test_attention_that_takes_queries_and_keys_apart():
    """SAM's mask decoder: one class for self-attention and both directions of cross-attention."""
    config = t.SamMaskDecoderConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, mlp_dim=32)
    config._attn_implementation = "bsa_sparse"
    decoder = t.models.sam.modeling_sam.SamMaskDecoder(config)
    set_block_sparse(decoder, NARROW)
    image, prompts = torch.randn(1, 32, 8, 8), torch.randn(1, 1, 40, 32)
    decoder(image, torch.randn(1, 32, 8, 8), prompts, torch.randn(1, 32, 8, 8), multimask_output=False)
    roles = {name: role_of(m, None) for name, m in decoder.named_modules() if type(m).__name__ == "SamAttention"}
    assert roles == {
        "transformer.layers.0.self_attn": "encoder",
        "transformer.layers.0.cross_attn_token_to_image": "cross",
        "transformer.layers.0.cross_attn_image_to_token": "cross",
        "transformer.final_attn_token_to_image": "cross",
    }


# Later keys


@pytest.mark.parametrize("rules", [WIDE, NARROW, BY_PLACE, RANDOM], ids=["wide", "narrow", "by place", "random"])
@pytest.mark.parametrize("name", LATER_KEYS)
def test_layouts_of_decoders_show_later_keys_where_the_mask_does(name, rules):
    case = LATER_KEYS[name]
    if rules is WIDE:
        assert_same(case.run(case.make("bsa_sparse", rules)), case.run(case.make("eager")))
    else:
        assert_matches_the_oracle(case, rules)


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "rules", [WIDE, BlockSparseConfig("top_k_blocks", BLOCK, top_k=99)], ids=["wide", "selection"]
)
def test_the_callers_own_bidirectional_mask(rules, kind):
    inputs = batch_for("llama", "none", length=150)
    visible = torch.rand(3, 1, 150, 150, generator=torch.Generator().manual_seed(3)) < 0.4
    visible |= torch.eye(150, dtype=torch.bool)
    model = tiny("llama", "bsa_sparse")
    set_block_sparse(model, rules)
    ours = run(model, inputs, attention_mask=visible if kind == "bool" else additive(visible))
    assert_same(ours, run(tiny("llama", "eager"), inputs, attention_mask=additive(visible)))


def test_plainly_causal_masks_keep_causal_layouts(monkeypatch):
    seen = []
    layout = BlockSparseConfig.layout
    monkeypatch.setattr(BlockSparseConfig, "layout", lambda *a: seen.append(layout(*a)) or seen[-1])
    for padding in ("none", "right", "left"):
        model = tiny("mistral", "bsa_sparse")
        set_block_sparse(model, WIDE)
        run(model, batch_for("mistral", padding, length=150))
    assert len(seen) == 3, "layers of a forward share theirs"
    assert not any(made.grid.triu(1).any() for made in seen)


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_layouts_joined_at_the_diagonal(name):
    options = dict(
        bigbird=dict(num_random_blocks=1), dilated=dict(window=20, dilation=[1, 2]),
        global_columns=dict(num_global_tokens=50), local=dict(window=40),
        longformer=dict(window=40, num_global_tokens=10), openai_strided=dict(stride=48),
        openai_fixed=dict(window=48, num_summary_tokens=8),
    ).get(name, {})  # fmt: skip
    below, above = (
        make_layout(name, 192, 192, BLOCK, causal=causal, num_heads=2, **options) for causal in (True, False)
    )
    joined = join_at_diagonal(below, above).to_mask(192, 192)
    expected = below.to_mask(192, 192).tril() | above.to_mask(192, 192).triu(1)
    assert torch.equal(joined, expected.expand_as(joined))
    config, heads = BlockSparseConfig(name, BLOCK, **options), 2
    shown = config.layout("decoder", 0, 192, 192, heads, "cpu", causal=False).to_mask(192, 192)
    assert torch.equal(shown.expand_as(joined), joined)


@pytest.mark.parametrize("choose", [top_k_blocks, antidiagonal_blocks])
def test_selections_do_not_spend_their_choice_on_hidden_blocks(choose):
    q, k = (torch.randn(2, 2, 160, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    mask = torch.ones(160, 160, dtype=torch.bool).tril()
    mask[64:96, 96:128] = True  # a block above the diagonal
    shown = shown_blocks(mask[None, None], BLOCK)
    expected = torch.ones(5, 5, dtype=torch.bool).tril()
    expected[2, 3] = True
    assert torch.equal(shown[0, 0], expected)
    options = dict(top_k=2) if choose is top_k_blocks else dict(threshold=0.5)
    grid = choose(q, k, BLOCK, False, True, None, None, shown, **options).grid.bool()
    assert not (grid & ~shown).any()
    if choose is top_k_blocks:
        assert (grid.sum(-1) == shown.sum(-1).clamp(max=2)).all()
