"""Switching padding-free execution on and off, declaring stacks, and what is refused."""

from __future__ import annotations

import copy

import pytest
import transformers
from packed_models import labelled, losses, packed, widths
from transformers_models import assert_same, batch_for, tiny

from hf_flashbsa import LayerStack, disable_padding_free, enable_padding_free, padding_free, register_layer_stack
from hf_flashbsa.integration.padding_free import layer_stacks
from hf_flashbsa.integration.padding_free.forward_pass import current_pass


def test_padding_free_is_for_the_length_of_the_block():
    inputs = batch_for("bart", "right")
    model = tiny("bart", "bsa_dense")
    with widths(model) as seen:
        with padding_free(model):
            model(**inputs)
        model(**inputs)
        enable_padding_free(model)
        enable_padding_free(model)
        with padding_free(model):
            pass
        model(**inputs)
        disable_padding_free(model)
        model(**inputs)
    assert [rows for rows, _ in seen] == [1] * 4 + [3] * 4 + [1] * 4 + [3] * 4
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_part_may_be_enabled_before_the_whole():
    inputs = labelled("bart", "right")
    model = tiny("bart", "bsa_dense")
    enable_padding_free(model.model.encoder)
    with widths(model) as seen:
        partly = losses(model, inputs)
        assert [rows for rows, _ in seen] == [1, 1, 3, 3]
        enable_padding_free(model)
        assert_same(losses(model, inputs), partly)
    assert [rows for rows, _ in seen[4:]] == [1] * 4


def test_copies_are_padding_free_too():
    inputs = batch_for("bart", "right")
    model = copy.deepcopy(packed("bart"))
    with widths(model) as seen:
        model(**inputs)
        disable_padding_free(model)
        model(**inputs)
    assert [rows for rows, _ in seen] == [1] * 4 + [3] * 4


def test_errors_leave_no_trace():
    inputs = labelled("bart", "right")
    model = packed("bart")
    with pytest.raises(IndexError):
        model(**inputs | {"input_ids": inputs["input_ids"] + 64})
    layer = model.model.decoder.layers[0]
    handle = layer.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(**inputs)
    handle.remove()
    assert current_pass() is None
    assert_same(losses(model, inputs), losses(tiny("bart", "eager"), inputs))


def test_unknown_models_raise_and_may_be_declared(monkeypatch):
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))
    model = tiny("gpt_oss", "bsa_dense")
    with pytest.raises(
        ValueError, match=r"register_layer_stack\(GptOssModel, hf_flashbsa.LayerStack\(layers='layers'\)\)"
    ):
        enable_padding_free(model)
    register_layer_stack(type(model.model), LayerStack())
    inputs = labelled("gpt_oss", "holes")
    enable_padding_free(model)
    assert_same(losses(model, inputs), losses(tiny("gpt_oss", "eager"), inputs))


def test_undeclared_companions_raise(monkeypatch):
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))
    model = tiny("gpt_oss", "bsa_dense")
    register_layer_stack(type(model.model), LayerStack(per_token=("position_ids",)))
    enable_padding_free(model)
    with pytest.raises(ValueError, match="'position_embeddings'.*LayerStack.per_token"):
        model(**batch_for("gpt_oss", "right"))


def test_subclasses_with_a_forward_of_their_own_are_unknown():
    class Inherits(transformers.LlamaModel):
        pass

    class Overrides(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    config = tiny("llama", "bsa_dense").config
    enable_padding_free(Inherits(config))
    with pytest.raises(ValueError, match="Overrides"):
        enable_padding_free(Overrides(config))


def test_other_implementations_raise():
    inputs = batch_for("bart", "right")
    with pytest.raises(ValueError, match=r"'sdpa'.*load the model with attn_implementation='bsa_dense'"):
        enable_padding_free(tiny("bart", "sdpa"))
    model = packed("bart")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"'eager'.*load the model with attn_implementation='bsa_dense'"):
        model(**inputs)


def test_masks_that_do_not_fit_raise():
    inputs = batch_for("bert", "right")
    inputs["attention_mask"] = inputs["attention_mask"][:, :-1]
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 12\) for tokens \(3, 13\)"):
        packed("bert")(**inputs)


def test_layers_added_later_raise():
    model = packed("bart")
    model.model.encoder.layers.append(copy.deepcopy(tiny("bart", "bsa_dense").model.encoder.layers[0]))
    with pytest.raises(ValueError, match="attention_mask: made for"):
        model(**batch_for("bart", "right"))


def test_removed_layers_are_no_problem():
    inputs = labelled("bart", "right")
    results = []
    for model in (packed("bart"), tiny("bart", "eager")):
        model.model.encoder.layers = model.model.encoder.layers[1:]
        model.model.decoder.layers = model.model.decoder.layers[1:]
        results.append(losses(model, inputs))
    assert_same(*results)
