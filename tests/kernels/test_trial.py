"""Unknown releases of Triton: Gluon kernels are tried once, and what came of it is kept."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from hf_flashbsa.cli import doctor
from hf_flashbsa.kernels import launch_cache
from hf_flashbsa.kernels.gluon_sm90 import dispatch, trial
from hf_flashbsa.kernels.triton import backend

CPU = torch.device("cpu")


@pytest.fixture
def unknown_triton(monkeypatch, tmp_path):
    """A release that nobody tested, which the interpreter plays, and a GPU that the CPU plays."""
    monkeypatch.setattr(launch_cache.triton, "__version__", "3.99.0")
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(trial, "_name", lambda device: "NVIDIA-H200")
    monkeypatch.setattr(trial, "LENGTH", 32)
    dispatch._unavailable_reason.cache_clear()
    yield
    dispatch._unavailable_reason.cache_clear()


def test_kernels_that_pass_are_used(unknown_triton, tmp_path):
    assert dispatch.unavailable_reason(CPU) is None
    assert [file.name for file in tmp_path.iterdir()] == ["hf_flashbsa_trial_3.99.0_NVIDIA-H200.json"]


def test_the_next_process_knows(unknown_triton, monkeypatch):
    dispatch.unavailable_reason(CPU)
    dispatch._unavailable_reason.cache_clear()
    monkeypatch.setattr(trial, "_run", lambda *arguments: pytest.fail("tried again"))
    assert dispatch.unavailable_reason(CPU) is None


@pytest.mark.parametrize(("place", "name"), [(3, "out"), (7, "dq")])
def test_wrong_results_are_a_reason(unknown_triton, monkeypatch, caplog, place, name):
    """`place` is that of the tensor which a faulty kernel fills."""
    for function, direction in ((backend.forward, "forward"), (backend.backward, "backward")):

        def faulty(*arguments, run=function):
            run(*arguments)
            if len(arguments) > place:
                filled = arguments[place]
                (filled[0] if isinstance(filled, tuple) else filled)[0, 0, -1] += 1.0

        if (place == 3) == (direction == "forward"):
            monkeypatch.setattr(backend, direction, faulty)
    reason = f"they failed a trial with Triton 3.99.0: wrong {name} in a trial at head dim 64"
    assert dispatch.unavailable_reason(CPU) == reason
    assert caplog.messages.count(f"Hopper kernels: {reason}") == 1


def test_what_does_not_compile_is_a_reason(unknown_triton, monkeypatch):
    def fails(*arguments):
        raise RuntimeError("no such builtin\nat line 3")

    monkeypatch.setattr(backend, "forward", fails)
    reason = "they failed a trial with Triton 3.99.0: RuntimeError: no such builtin"
    assert dispatch.unavailable_reason(CPU) == reason
    dispatch._unavailable_reason.cache_clear()
    assert dispatch.unavailable_reason(CPU) == reason


def test_calls_of_the_trial_may_use_the_kernels(unknown_triton, monkeypatch):
    seen = []
    monkeypatch.setattr(trial, "_run", lambda head_dim, device: seen.append(dispatch.unavailable_reason(device)))
    dispatch.unavailable_reason(CPU)
    assert seen == [None] * len(trial.HEAD_DIMS)


def test_the_doctor_tells(unknown_triton, monkeypatch):
    monkeypatch.setattr(doctor.tuning, "is_hopper", lambda device: True)
    monkeypatch.setattr(trial, "_run", lambda *arguments: "wrong dk in a trial at head dim 64")
    assert "wrong dk in a trial" in doctor._why_not_hopper(None, CPU)
