"""bsa_dense on a GPU: the Triton back end under whole models, and a host that never waits for the device."""

from __future__ import annotations

import pytest
import torch
from transformers_models import (
    DISPATCHING,
    PADDINGS,
    assert_matches_eager,
    batch_for,
    host_never_waits,
    live_logits,
    run,
    tiny,
)

from hf_flashbsa import backends_used

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DISPATCHING)
def test_logits_and_gradients(name, padding):
    assert_matches_eager(name, batch_for(name, padding, length=150, target_length=70), "cuda")


@pytest.mark.parametrize("padding", PADDINGS[1:])  # without a mask Transformers itself looks for packed positions
@pytest.mark.parametrize("name", ["bart", "t5", "llama", "mistral", "gemma2"])
def test_the_host_never_waits(name, padding):
    model = tiny(name, "bsa_dense").cuda()
    inputs = {key: value.cuda() for key, value in batch_for(name, padding).items()}
    run(model, inputs)  # compiles the kernels
    with host_never_waits():
        live_logits(model, inputs, use_cache=False).sum().backward()
    assert set(backends_used(model).values()) <= {"triton", "gluon_sm90"}
