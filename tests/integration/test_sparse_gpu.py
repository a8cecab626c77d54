"""bsa_sparse on a GPU: whole models as on the CPU, by Triton, and a host that never waits for the device."""

from __future__ import annotations

import functools

import pytest
import torch
from packed_models import labelled, losses
from sparse_models import MIXED, NAMES, SELECTING, SIZES, inputs_for, sparse
from transformers_models import TOLERANCE, assert_same, errors_of, host_never_waits, live_logits, run

from hf_flashbsa import attention, backends_used, enable_padding_free
from hf_flashbsa.integration import attention_function

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONFIGS = {"patterns": MIXED, "selection": SELECTING}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def on_gpu(inputs: dict) -> dict:
    return {key: value.cuda() for key, value in inputs.items()}


def on_cpu(result: tuple) -> tuple:
    return result[0].cpu(), {name: gradient.cpu() for name, gradient in result[1].items()}


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_gradients(name, rules, padding, monkeypatch):
    """Errors against float64 are at most three times those of the torch back end: T5's, whose scores are not scaled,
    has some of 1.3e-4 of the largest gradient on a GPU."""
    inputs, config = inputs_for(name, padding), CONFIGS[rules]
    expected = run(sparse(name, config).double(), inputs)
    result = on_cpu(run(sparse(name, config).cuda(), on_gpu(inputs)))
    monkeypatch.setattr(attention_function, "attention", functools.partial(attention, backend="torch"))
    native = errors_of(on_cpu(run(sparse(name, config).cuda(), on_gpu(inputs))), expected)
    assert_same(result, expected, max(TOLERANCE, 3 * max(native.values())))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", NAMES)
def test_padding_free(name, padding):
    inputs = labelled(name, padding, **SIZES)
    model = sparse(name).cuda()
    enable_padding_free(model)
    assert_same(on_cpu(losses(model, on_gpu(inputs))), losses(sparse(name), inputs))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_the_host_never_waits(name, rules, padding):
    model = sparse(name, CONFIGS[rules]).cuda()
    inputs = on_gpu(inputs_for(name, padding))
    run(model, inputs)  # compiles the kernels and moves the layouts
    with host_never_waits():
        live_logits(model, inputs, use_cache=False).sum().backward()
    assert set(backends_used(model).values()) <= {"triton", "gluon_sm90"}
