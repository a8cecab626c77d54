"""Masks that are written over between calls in ways that torch does not count: numpy, `.data`, collectives."""

from __future__ import annotations

import pytest
import torch
import transformers
from eager_comparisons import additive, assert_rewritten_masks_match, random_mask
from packed_models import labelled, losses, packed, widths
from torch import nn
from transformers import AttentionInterface
from transformers_models import assert_same, batch_for, run, tiny

from hf_flashbsa import enable_padding_free
from hf_flashbsa.integration.padding_free.forward_pass import current_pass

DENSE = AttentionInterface()["bsa_dense"]


def by_numpy(mask: torch.Tensor, values: torch.Tensor) -> None:
    mask.numpy()[...] = values.numpy()


def by_data(mask: torch.Tensor, values: torch.Tensor) -> None:
    mask.data.copy_(values)


def by_other_memory(mask: torch.Tensor, values: torch.Tensor) -> None:
    mask.data = values.clone()


def in_place(mask: torch.Tensor, values: torch.Tensor) -> None:
    mask.copy_(values)


WRITES = [by_numpy, by_data, by_other_memory, in_place]


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_masks_of_four_dimensions(name, kind, write):
    assert_rewritten_masks_match(name, kind, write)


@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_masks_made_in_inference_mode(kind):
    inputs, model, eager = batch_for("bert", "none"), tiny("bert", "bsa_dense").eval(), tiny("bert", "eager").eval()
    with torch.inference_mode():
        mask = random_mask(kind, 0)
        for seed in range(2):
            mask.copy_(random_mask(kind, seed))
            expected = eager(**inputs, attention_mask=additive(mask)).logits
            torch.testing.assert_close(model(**inputs, attention_mask=mask).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["bool", "float", "keys"])
def test_layers_without_a_model(kind, write):
    """Any layer of any model may be the next to get the buffer."""
    q, k, v = torch.randn(3, 3, 4, 13, 8, generator=torch.Generator().manual_seed(0))
    mask = random_mask(kind, 0)
    for seed in range(3):
        write(mask, random_mask(kind, seed))
        out, _ = DENSE(nn.Module(), q, k, v, mask)
        bias = additive(mask)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama"])
def test_padding_masks_of_padding_free_models(name, write):
    """Other tokens, and another number of them, in each step: no step packs those of the last."""
    inputs, model = labelled(name, "right"), packed(name)
    names = [key for key in inputs if key.endswith("attention_mask")]
    for padding in ("right", "holes", "left"):
        batch = labelled(name, padding)
        for key in names:
            write(inputs[key], batch[key])
        inputs["labels"] = batch["labels"]
        expected = losses(tiny(name, "eager"), {key: value.clone() for key, value in inputs.items()})
        with widths(model) as seen:
            assert_same(losses(model, inputs), expected)
        assert set(seen) == {(1, int(inputs[key].sum())) for key in names}
        assert current_pass() is None


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_that_are_computed_again_have_the_packing_of_their_forward(use_reentrant):
    """Gradient checkpointing, with the next batch's mask in the buffer before the backward pass."""
    inputs = labelled("bart", "right")
    expected = losses(tiny("bart", "eager"), {key: value.clone() for key, value in inputs.items()})
    model = packed("bart")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    loss = model(**inputs).loss
    for key in ("attention_mask", "decoder_attention_mask"):
        by_numpy(inputs[key], torch.ones_like(inputs[key]))
    loss.backward()
    assert_same((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}), expected)


@pytest.mark.parametrize("write", [by_numpy, in_place])
def test_encoder_states_written_over(write):
    """A decoder packs the states that it is given, not those that the encoder's end had packed."""
    inputs, model = labelled("bart", "right"), packed("bart")
    states = model.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    states.last_hidden_state = states.last_hidden_state.detach()
    write(states.last_hidden_state, 2.0 * states.last_hidden_state)
    given = {key: value for key, value in inputs.items() if key != "input_ids"} | {"encoder_outputs": states}
    expected = losses(tiny("bart", "eager"), given)
    assert_same(losses(model, given), expected)


def test_an_interrupted_forward_leaves_nothing_that_counts():
    """Ctrl-C skips all hooks: the pass is still open when the next one begins."""
    inputs, model = labelled("bart", "right"), packed("bart")

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.model.decoder.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**inputs)
    handle.remove()
    by_numpy(inputs["attention_mask"], labelled("bart", "left")["attention_mask"])
    expected = losses(tiny("bart", "eager"), {key: value.clone() for key, value in inputs.items()})
    assert_same(losses(model, inputs), expected)
    assert current_pass() is None


def test_the_biases_of_two_forwards():
    """T5's weights are trained by `.data`, as some optimizers do: the next forward has another bias."""
    inputs, model, eager = batch_for("t5", "right"), tiny("t5", "bsa_dense").double(), tiny("t5", "eager").double()
    for _ in range(2):
        assert_same(run(model, inputs), run(eager, inputs))
        for each in (model, eager):
            for name, parameter in each.named_parameters():
                if "relative_attention_bias" in name:
                    parameter.data.mul_(-1.5)


def test_models_around_stacks_are_left_in_order():
    """A stack alone, its model, a module around both, and two of them one behind the other."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = packed("bert"), packed("bert")

        def forward(self, input_ids, attention_mask):
            first = self.first(input_ids, attention_mask=attention_mask).logits
            return first + self.second(input_ids, attention_mask=attention_mask).logits

    both = Both()
    enable_padding_free(both)
    inputs = batch_for("bert", "holes")
    live = inputs["attention_mask"][..., None]
    expected = tiny("bert", "eager")(**inputs).logits
    torch.testing.assert_close(both(**inputs) * live, 2.0 * expected * live, rtol=1e-4, atol=1e-4)
    assert current_pass() is None
    model = transformers.BertModel._from_config(both.first.config, attn_implementation="bsa_dense")
    enable_padding_free(model)
    model(**inputs)
    assert current_pass() is None
