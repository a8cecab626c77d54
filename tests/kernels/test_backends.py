"""What is said to have run is what the dispatch launched."""

from __future__ import annotations

import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers_models import batch_for, tiny

from hf_flashbsa import attention, backends_used
from hf_flashbsa.kernels.backends import take_forward
from hf_flashbsa.kernels.gluon_sm90 import dispatch
from hf_flashbsa.kernels.triton import launch


def tensors() -> list[torch.Tensor]:
    return [torch.randn(1, 1, 4, 16, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forward_pass_is_noted_once(backend):
    take_forward()
    out = attention(*tensors(), backend=backend)
    assert take_forward() == backend and take_forward() is None
    out.sum().backward()
    assert take_forward() is None


def test_kernels_for_hopper_are_told_from_portable_ones(monkeypatch):
    """By whose launcher was taken: here the portable one in the place of Hopper's."""
    monkeypatch.setattr(dispatch, "select_launcher", lambda kernel, *_: getattr(launch, f"launch_{kernel}"))
    attention(*tensors(), backend="triton")
    assert take_forward() == "gluon_sm90"


def test_nothing_runs_for_tensors_without_data():
    take_forward()
    with FakeTensorMode() as mode:
        attention(*(mode.from_tensor(x) for x in tensors()))
    attention(*(x.detach().to("meta") for x in tensors()), backend="torch")
    assert take_forward() is None


def test_each_thread_has_its_own_note():
    attention(*tensors())
    seen = []
    other = threading.Thread(target=lambda: seen.append(take_forward()))
    other.start()
    other.join()
    assert seen == [None] and take_forward() == "torch"


def test_a_model_tells_what_ran_in_each_layer(monkeypatch):
    """Not what would be chosen: the note is that of the launch."""
    model = tiny("llama", "bsa_dense").eval()
    inputs = batch_for("llama", "right")
    model(**inputs)
    layers = backends_used(model)
    assert set(layers.values()) == {"torch"} and len(layers) == model.config.num_hidden_layers
    monkeypatch.setattr("hf_flashbsa.kernels.torch.backend.note_forward", lambda ran: None)
    fresh = tiny("llama", "bsa_dense").eval()
    fresh(**inputs)
    assert backends_used(fresh) == {}
