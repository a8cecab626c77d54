"""The transforms of torch.func on whole models, by `functional_call`: per-sample gradients, forward mode."""

from __future__ import annotations

import pytest
import torch
from sparse_models import sparse
from torch.func import functional_call, grad, jvp, vmap
from transformers_models import batch_for, tiny

from hf_flashbsa import padding_free

NAMES = ("llama", "bart", "bsa_sparse")


def make(name: str, implementation: str = "bsa_dense") -> torch.nn.Module:
    model = sparse("llama") if name == "bsa_sparse" else tiny(name, implementation)
    return model.eval()


def case(name: str, implementation: str = "bsa_dense"):
    """A loss of parameters and a row of a padded batch, the parameters, and the batch."""
    model = make(name, implementation)
    inputs = batch_for("llama", "right", length=70) if name == "bsa_sparse" else batch_for(name, "right")
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict, row: dict) -> torch.Tensor:
        row = {n: x[None] for n, x in row.items()}
        mask = row.get("decoder_attention_mask", row["attention_mask"])
        logits = functional_call(model, parameters, args=(), kwargs=dict(row, use_cache=False)).logits
        return (logits.log_softmax(-1)[..., 7] * mask).sum()

    return loss, parameters, inputs


def assert_near(got: dict, want: dict) -> None:
    largest = max(float(x.abs().max()) for x in want.values())
    for name in want:
        torch.testing.assert_close(got[name], want[name], atol=1e-5 * largest, rtol=1e-4, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("name", NAMES)
def test_per_sample_gradients_are_those_of_a_loop(name):
    loss, parameters, inputs = case(name)
    got = vmap(grad(loss), in_dims=(None, 0))(parameters, inputs)
    leaves = {n: p.clone().requires_grad_() for n, p in parameters.items()}
    for i in range(len(inputs["input_ids"])):
        value = loss(leaves, {n: x[i] for n, x in inputs.items()})
        want = dict(zip(leaves, torch.autograd.grad(value, leaves.values()), strict=True))
        assert_near({n: x[i] for n, x in got.items()}, want)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_tangents_are_those_of_eager_attention(name):
    """Forward mode along all parameters at once."""
    tangents = []
    for implementation in ("bsa_dense", "eager"):
        loss, parameters, inputs = case(name, implementation)
        row = {n: x[1] for n, x in inputs.items()}
        generator = torch.Generator().manual_seed(0)
        along = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
        tangents.append(jvp(lambda p, loss=loss, row=row: loss(p, row), (parameters,), (along,)))
    torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-4)
    assert abs(float(tangents[0][1])) > 0.1


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_packed_stacks(name):
    """`grad` and `jvp` through padding_free are those of the padded model."""
    model, inputs = make(name), batch_for(name, "right")
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])

    def loss(parameters: dict) -> torch.Tensor:
        logits = functional_call(model, parameters, args=(), kwargs=dict(inputs, use_cache=False)).logits
        return (logits.log_softmax(-1)[..., 7] * mask).sum()

    def derivatives() -> tuple[dict, torch.Tensor]:
        return grad(loss)(parameters), jvp(loss, (parameters,), (parameters,))[1]

    gradients, tangent = derivatives()
    with padding_free(model):
        packed_gradients, packed_tangent = derivatives()
    assert_near(packed_gradients, gradients)
    torch.testing.assert_close(packed_tangent, tangent, rtol=1e-4, atol=1e-4)
