"""bsa_dense in models that choose their attention by name, compute on their mask, or hold several config objects."""

from __future__ import annotations

import copy
import importlib
import logging
import re
from pathlib import Path

import pytest
import torch
import transformers as t
from peft import LoraConfig, get_peft_model
from transformers_models import additive, assert_same, mask_of, strengthen
from unusual_models import CALM, COMPUTING, LATER_KEYS, SHARED_CLASSES, SIZES, TABLES, TEXT, VISION

from hf_flashbsa import BlockSparseConfig, backends_used, enable_padding_free, register_layer_stack, set_block_sparse
from hf_flashbsa.integration import loading
from hf_flashbsa.integration.loading import _tables
from hf_flashbsa.integration.padding_free import layer_stacks

ALL = {**TABLES, **COMPUTING, **LATER_KEYS, **SHARED_CLASSES}


@pytest.mark.parametrize("name", ALL)
def test_logits_and_gradients(name):
    ALL[name].assert_matches_eager()


# Attention classes chosen from a table by name


def test_every_table_of_transformers_is_found():
    root = Path(t.__file__).parent
    found = []
    for path in sorted(root.glob("models/*/modeling_*.py")):
        if re.search(r'^\w+ = \{\n\s+"eager": \w+,', path.read_text(), re.MULTILINE):
            module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}")
            models = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, t.PreTrainedModel)]
            assert any(list(_tables(cls)) for cls in models if cls.__module__ == module.__name__), path.stem
            found.append(path.stem)
    assert len(found) >= 10


@pytest.fixture
def warnings_of_loading(monkeypatch):
    """Messages that loading logs; each of them is said anew."""
    messages = []
    monkeypatch.setattr(loading.logger, "warning_once", lambda text: messages.append(text))
    return messages


@pytest.mark.parametrize("name", TABLES)
def test_a_model_with_a_table_keeps_its_own_attention_and_says_so(name, warnings_of_loading):
    case = TABLES[name]
    model, usual = case.make("bsa_dense"), case.cls._from_config(case.config())
    assert [type(m) for m in model.modules()] == [type(m) for m in usual.modules()]
    assert any("keeps its own attention" in text for text in warnings_of_loading)
    with pytest.raises(ValueError, match="bsa_sparse: .* computes attention of its own"):
        case.make("bsa_sparse")


def test_other_names_are_looked_up_as_before():
    case = TABLES["gptj"]
    table = next(_tables(case.cls))
    case.make("bsa_dense")
    with pytest.raises(KeyError, match="no_such_attention"):
        table["no_such_attention"]


def test_a_part_with_a_table_leaves_the_other_parts_to_us():
    config = t.SamConfig(vision_config=TABLES["sam"].config().to_dict())
    config.mask_decoder_config.num_hidden_layers = 1
    model = t.SamModel._from_config(config, attn_implementation="bsa_dense")
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config.mask_decoder_config._attn_implementation == "bsa_dense"


# Masks that models compute on


def test_the_reason_for_a_mask_as_tensor_is_logged_once(caplog):
    logging.Logger.warning_once.cache_clear()
    case = COMPUTING["t5gemma2"]
    model = case.make("bsa_dense")
    with caplog.at_level(logging.WARNING):
        case.run(model)
        case.run(model)
    said = [r.getMessage() for r in caplog.records if "computes on its attention mask (cat)" in r.getMessage()]
    assert len(said) == 1


def test_padding_free_refuses_a_model_that_computes_on_its_mask(monkeypatch):
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))
    register_layer_stack(t.DogeModel, layer_stacks.LayerStack())
    case = COMPUTING["doge"]
    model = case.make("bsa_dense")
    enable_padding_free(model)
    with pytest.raises(NotImplementedError, match="padding_free: this model computes on its attention mask"):
        case.run(model, use_cache=False)


@pytest.mark.parametrize("kind", [None, "float", "bool", "2-D"])
def test_selected_keys_join_any_mask(kind):
    q, k, v = (torch.randn(2, 2, 10, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    indices = torch.tensor([0, 3, 7, -1]).expand(2, 10, 4)
    visible = torch.ones(2, 1, 10, 10, dtype=torch.bool)
    visible[1, :, :, 6:] = False
    mask = {None: None, "float": additive(visible), "bool": visible, "2-D": visible[:, 0, 0].long()}[kind]
    chosen = torch.zeros(10, dtype=torch.bool)
    chosen[[0, 3, 7]] = True
    chosen = chosen & (visible if kind else torch.ones_like(visible))
    arguments = dict(scaling=0.3, is_causal=False)
    ours, _ = t.AttentionInterface()["bsa_dense"](torch.nn.Module(), q, k, v, mask, indices=indices, **arguments)
    expected = torch.softmax((0.3 * q @ k.mT).masked_fill(~chosen, -torch.inf), dim=-1) @ v
    torch.testing.assert_close(ours, expected.transpose(1, 2))


# Config objects beside the one that is switched


BERT = dict(SIZES, **CALM, vocab_size=64)


def encoder_decoder() -> t.EncoderDecoderModel:
    decoder = t.BertLMHeadModel(t.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return t.EncoderDecoderModel(encoder=t.BertModel(t.BertConfig(**BERT)), decoder=decoder)


def vision_encoder_decoder() -> t.VisionEncoderDecoderModel:
    decoder = t.BertLMHeadModel(t.BertConfig(**BERT, is_decoder=True, add_cross_attention=True))
    return t.VisionEncoderDecoderModel(encoder=t.ViTModel(t.ViTConfig(**VISION, **CALM)), decoder=decoder)


def step(model, implementation: str) -> tuple[torch.Tensor, dict]:
    strengthen(model)
    model.train()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.set_attn_implementation(implementation)
    generator = torch.Generator().manual_seed(1)
    inputs = dict(labels=torch.randint(3, 60, (3, 7), generator=generator))
    if isinstance(model, t.VisionEncoderDecoderModel):
        inputs["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    else:
        inputs |= dict(
            input_ids=torch.randint(3, 60, (3, 13), generator=generator), attention_mask=mask_of(3, 13, "right")
        )
    out = model(**inputs)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("make", [encoder_decoder, vision_encoder_decoder])
def test_switching_a_model_of_two_models(make):
    model = make()
    assert_same(step(model, "bsa_dense"), step(make(), "eager"))
    layers = [n for n in backends_used(model) if n.startswith("encoder.")]
    assert len(layers) == 2, "the encoder's layers follow"
    model = make()
    model.set_attn_implementation("bsa_dense")
    result = step(model, "eager")
    assert backends_used(model) == {}, "and they follow back"
    assert_same(result, step(make(), "eager"))


def test_layers_that_hold_a_config_of_another_attention_still_get_their_mask():
    """Nothing tells us of a config that somebody replaces by hand; the mask is right in any attention function."""
    results = []
    for implementation in ("bsa_dense", "eager"):
        model = t.BertModel(t.BertConfig(**BERT)).train()
        strengthen(model)
        model.set_attn_implementation(implementation)
        for name in ("sdpa", "eager"):
            held = copy.deepcopy(model.config)
            held._attn_implementation = name
            for module in model.encoder.layer[("sdpa", "eager").index(name)].modules():
                if hasattr(module, "config"):
                    module.config = held
        ids = torch.randint(3, 60, (3, 13), generator=torch.Generator().manual_seed(1))
        mask = mask_of(3, 13, "right")
        out = model(ids, mask).last_hidden_state * mask[..., None]
        out.square().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(*results)


def test_a_wrapped_model_is_switched():
    results = []
    for implementation in ("bsa_dense", "eager"):
        torch.manual_seed(0)
        base = t.LlamaForCausalLM._from_config(t.LlamaConfig(**TEXT), attn_implementation="sdpa")
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.0))
        strengthen(model)
        model.train().set_attn_implementation(implementation)
        ids = torch.randint(3, 60, (3, 13), generator=torch.Generator().manual_seed(1))
        mask = mask_of(3, 13, "right")
        out = model(input_ids=ids, attention_mask=mask, use_cache=False).logits * mask[..., None]
        out.square().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(*results)


# Layouts that another attention ignores


def test_layouts_that_the_loaded_attention_ignores_are_told(tmp_path, warnings_of_loading):
    model = t.LlamaForCausalLM._from_config(t.LlamaConfig(**TEXT), attn_implementation="bsa_sparse")
    set_block_sparse(model, BlockSparseConfig("local", block_size=32, window=40))
    model.save_pretrained(tmp_path)
    t.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation="bsa_sparse")
    assert warnings_of_loading == []
    for arguments in ({}, {"attn_implementation": "bsa_dense"}):
        loaded = t.LlamaForCausalLM.from_pretrained(tmp_path, **arguments)
        assert "ignores them" in warnings_of_loading[-1]
        assert "attn_implementation='bsa_sparse'" in warnings_of_loading[-1]
        assert loaded.config._attn_implementation in warnings_of_loading[-1]
    said = len(warnings_of_loading)
    t.LlamaForCausalLM.from_pretrained(tmp_path, block_sparse=None)
    assert len(warnings_of_loading) == said
