"""Padding-free models against padded ones with eager attention: every family, every kind of padding and input."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
import transformers
from packed_models import KNOWN, labelled, live_rows, losses, packed, widths
from transformers_models import SIZE, assert_same, batch_for, strengthen, tiny

from hf_flashbsa import LayerStack, enable_padding_free, register_layer_stack
from hf_flashbsa.integration.padding_free import hooks, layer_stacks, live_tokens
from hf_flashbsa.integration.padding_free.packing import Packing

RAGGED = ("right", "left", "holes")


@pytest.mark.parametrize("padding", RAGGED)
@pytest.mark.parametrize("name", KNOWN)
def test_loss_and_gradients(name, padding):
    inputs = labelled(name, padding)
    model = packed(name)
    with widths(model) as seen:
        ours = losses(model, inputs)
    assert set(seen) == live_rows(inputs)
    assert_same(ours, losses(tiny(name, "eager"), inputs))


def test_every_declared_class_is_tested():
    models = [tiny(name, "bsa_dense") for name in KNOWN]
    tested = {type(m).__name__ for model in models for m in model.modules() if layer_stacks.declared_stack(m)}
    assert tested == set(layer_stacks.declared_classes())


def documents_shifted(monkeypatch):
    of_mask = Packing.of_mask.__func__

    def shifted(cls, *args):
        rows = of_mask(cls, *args)
        rows.cu_seqlens[1:-1] -= 1
        return rows

    monkeypatch.setattr(Packing, "of_mask", classmethod(shifted))


def holes_unnoticed(monkeypatch):
    monkeypatch.setattr(live_tokens, "_holes", lambda live: torch.tensor(0))


def companions_of_the_row(monkeypatch):
    monkeypatch.setattr(hooks._Plan, "pack_per_token", lambda plan, x, rows: x.repeat(1, 3, 1)[:, : rows.total])


def bias_forgotten(monkeypatch):
    def no_bias(block, call, packing):
        call.set("position_bias", torch.zeros(1, 1, packing.length, packing.length))
        call.set("encoder_decoder_position_bias", torch.zeros(1, 1, 1, 1))

    declared = layer_stacks._STACKS["transformers.models.t5.modeling_t5.T5Stack"]
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))
    register_layer_stack(
        transformers.models.t5.modeling_t5.T5Stack, LayerStack(**{**vars(declared), "prepare": no_bias})
    )


FAULTS = [
    (documents_shifted, "bart", "right"),
    (holes_unnoticed, "mistral", "holes"),
    (companions_of_the_row, "llama", "right"),
    (bias_forgotten, "t5", "right"),
]


@pytest.mark.parametrize(("fault", "name", "padding"), FAULTS, ids=[fault.__name__ for fault, _, _ in FAULTS])
def test_planted_faults_are_noticed(fault, name, padding, monkeypatch):
    inputs = labelled(name, padding)
    expected = losses(tiny(name, "eager"), inputs)
    fault(monkeypatch)
    gradients = losses(packed(name), inputs)
    missing = {n: torch.zeros_like(g) for n, g in expected[1].items()}
    with pytest.raises(AssertionError, match="relative error"):
        assert_same((gradients[0], missing | gradients[1]), expected)


# Which tokens are live


@pytest.mark.parametrize("side", ["attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padding_of_one_side_packs_both(name, side):
    inputs = labelled(name, "right")
    inputs.pop(side)
    if side == "decoder_attention_mask":
        inputs["labels"][inputs["labels"] == -100] = 5  # or they would tell where the targets end
    expected = losses(tiny(name, "eager"), inputs)
    model = packed(name)
    with widths(model) as seen:
        assert_same(losses(model, inputs), expected)
    (live,) = live_rows(inputs)
    # Full targets become one row because the source is one. The encoder knows of no row, and stays as it is.
    assert seen == ([live] * 2 + [(1, 21)] * 2 if side == "decoder_attention_mask" else [(3, 13)] * 2 + [live] * 2)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_labels_tell_where_targets_end(name):
    inputs = labelled(name, "right")
    live = int(inputs.pop("decoder_attention_mask").sum())
    inputs["labels"][1, 1] = -100  # ignored, and yet seen by the tokens behind it
    inputs.pop("decoder_input_ids")
    expected = losses(tiny(name, "eager"), inputs)
    model = packed(name)
    with widths(model) as seen:
        assert_same(losses(model, inputs), expected)
    assert seen[2:] == [(1, live)] * 2


@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama"])
def test_batches_without_padding_are_left_alone(name, mask, monkeypatch):
    inputs = labelled(name, "none")
    if mask == "ones":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    monkeypatch.setattr(Packing, "pack", None)
    monkeypatch.setattr(Packing, "unpack", None)
    model = packed(name)
    assert_same(losses(model, inputs), losses(tiny(name, "eager"), inputs))


def test_a_mask_that_changes_in_place_is_read_again():
    inputs = batch_for("bert", "right")
    model = packed("bert")
    with widths(model) as seen:
        model(**inputs)
        inputs["attention_mask"][0, 6:] = 0
        model(**inputs)
    assert seen[-1] == (1, int(inputs["attention_mask"].sum())) != seen[0]


def test_masks_made_in_inference_mode():
    with torch.inference_mode():
        inputs = batch_for("bert", "right")
        model = packed("bert").eval()
        with widths(model) as seen:
            model(**inputs)
            inputs["attention_mask"][0, 6:] = 0
            model(**inputs)
    assert seen[-1] == (1, int(inputs["attention_mask"].sum())) != seen[0]


# What else a model takes


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "modernbert"])
@pytest.mark.parametrize("padding", ["left", "holes"])
def test_positions_of_the_caller(name, padding):
    inputs = labelled(name, padding)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    assert_same(losses(packed(name), inputs), losses(tiny(name, "eager"), inputs))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("padding", ["right", "holes"])
def test_positions_that_restart_within_padded_rows_divide_nothing(name, padding):
    inputs = labelled(name, padding)
    inputs["position_ids"] = (torch.arange(13) % 5).expand(3, -1)
    assert_same(losses(packed(name), inputs), losses(tiny(name, "eager"), inputs))


def test_embeddings_of_the_caller():
    inputs = labelled("bart", "left")
    results = []
    for model in (packed("bart"), tiny("bart", "eager")):
        embed = model.get_input_embeddings()
        given = {f"{side}inputs_embeds": embed(inputs[f"{side}input_ids"]) for side in ("", "decoder_")}
        results.append(losses(model, {k: v for k, v in inputs.items() if not k.endswith("input_ids")} | given))
    assert_same(*results)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_encoder_outputs_of_the_caller(name):
    inputs = labelled(name, "right")
    results = []
    for model in (packed(name), tiny(name, "eager")):
        source = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        states = model.get_encoder()(**source).last_hidden_state
        outputs = transformers.modeling_outputs.BaseModelOutput(last_hidden_state=2 * states)
        given = {k: v for k, v in inputs.items() if k != "input_ids"}
        results.append(losses(model, given | {"encoder_outputs": outputs}))
    assert_same(*results)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_a_decoder_may_see_less_than_its_encoder(name):
    """What the encoder's end restored is packed anew where the decoder's mask of it is another."""
    inputs = labelled(name, "right")
    results = []
    for model in (packed(name), tiny(name, "eager")):
        outputs = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        less = inputs["attention_mask"].clone()
        less[:, :2] = 0
        given = {k: v for k, v in inputs.items() if k != "input_ids"}
        results.append(losses(model, given | {"encoder_outputs": outputs, "attention_mask": less}))
    assert_same(*results)


def test_cross_attention_of_bert():
    config = transformers.BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, copy.deepcopy(config))
    config.pad_token_id, config.decoder_start_token_id = 0, 2
    inputs = labelled("bart", "right")
    inputs.pop("decoder_input_ids")  # made of the labels
    results = []
    for attention in ("bsa_dense", "eager"):
        model = transformers.EncoderDecoderModel._from_config(copy.deepcopy(config), attn_implementation=attention)
        strengthen(model)
        model.train()
        if attention == "bsa_dense":
            enable_padding_free(model)
        with widths(model) as seen:
            results.append(losses(model, inputs))
        assert (set(seen) == live_rows(inputs)) == (attention == "bsa_dense")
    assert_same(*results)


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "modernbert", "llama"])
def test_hidden_states_are_restored_with_zeros_at_padding(name, return_dict):
    inputs = batch_for(name, "left")
    outputs = [
        model(**inputs, output_hidden_states=True, use_cache=False, return_dict=return_dict)
        if name != "modernbert"
        else model(**inputs, output_hidden_states=True, return_dict=return_dict)
        for model in (packed(name), tiny(name, "eager"))
    ]
    groups = 0
    for ours, eager in zip(*(o.values() if return_dict else o for o in outputs), strict=True):
        if not isinstance(ours, tuple):
            continue
        groups += 1
        assert len(ours) == len(eager) == 3
        mask = inputs["attention_mask"] if ours[0].shape[1] == 13 else inputs["decoder_attention_mask"]
        for ours_, eager_ in zip(ours, eager, strict=True):
            torch.testing.assert_close(ours_, eager_ * mask[..., None], rtol=1e-4, atol=1e-4)
    assert groups == (2 if "decoder_input_ids" in inputs else 1)


def test_poolers_see_restored_states():
    results = []
    inputs = batch_for("bert", "right") | {"labels": torch.tensor([0, 1, 1])}
    config = transformers.BertConfig(**SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    for attention in ("bsa_dense", "eager"):
        model = transformers.BertForSequenceClassification._from_config(config, attn_implementation=attention)
        strengthen(model)
        if attention == "bsa_dense":
            enable_padding_free(model)
        results.append(losses(model, inputs))
    assert_same(*results)


def test_a_kept_mask_keeps_no_activations():
    inputs = labelled("bart", "right")
    model = packed("bart")
    kept = []
    layer = model.model.encoder.layers[-1]
    handle = layer.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    losses(model, inputs)
    handle.remove()
    gc.collect()
    assert len(kept) == 1 and kept[0]() is None
