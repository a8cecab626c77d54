"""Kernels compiled before a model's first step: those that its steps launch, without a trace in the model."""

from __future__ import annotations

import copy
import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from aot import run_compiling
from packed_models import labelled, losses
from recorded_ops import OpCapturer
from transformers_models import batch_for, tiny
from triton.runtime import _async_compile

from hf_flashbsa import cuda_graph_counts, enable_padding_free, warm_up
from hf_flashbsa.integration import warm_up as module
from hf_flashbsa.integration.padding_free import graphs
from hf_flashbsa.kernels import backends, launch_cache
from hf_flashbsa.kernels.compile_only import compile_only

CPU = torch.device("cpu")


@pytest.fixture
def by_triton(monkeypatch):
    """Attention on the CPU runs in Triton's interpreter; counts its launches."""
    monkeypatch.setattr(backends, "choose_backend", lambda device, dtype: backends.Backend("triton"))
    launched, call = [], launch_cache.Recorder.__call__

    def count(recorder, kernel, *arguments, **options):
        if backends.is_launching():
            launched.append(kernel)
        return call(recorder, kernel, *arguments, **options)

    monkeypatch.setattr(launch_cache.Recorder, "__call__", count)
    return launched


def compile_(model, batches=None, generate=None, loss=module._loss):
    return module._compile(model, batches, loss, generate, 1, lambda done, total: None)


# Which kernels


#: Without padding-free, lengths that are multiples of 16 have kernels of their own: they load segment ids in words.
PADDED = ("bart", "bart-sparse", "llama", "bart-eval", "llama-eval/compiled")
PADDING_FREE = ("bart-padding-free", "bart-padding-free/portable")
#: Most source and target tokens of batches: odd and even ones, multiples of 16 and others.
LENGTHS = "300,260", "333,277", "511,301", "512,272", "403,320", "640,299"


@pytest.fixture(scope="module")
def results():
    """What `tests/tools/kernel_keys.py` found."""
    tool = "tests/tools/kernel_keys.py"
    found = run_compiling(tool, *PADDED, "--lengths", *LENGTHS[:2])
    found += run_compiling(tool, *PADDING_FREE, "--lengths", *LENGTHS)
    return {result["model"]: result for result in found}


@pytest.mark.parametrize("name", PADDING_FREE)
def test_a_padding_free_run_compiles_few_kernels_whatever_the_lengths(name, results):
    assert 0 < len(results[name]["launched"]) <= 12
    assert results[name]["launched"] == results[name]["warmed"]


@pytest.mark.parametrize("name", PADDED[:-1])
def test_steps_launch_what_was_compiled(name, results):
    """By the keys that Triton computes from the arguments: padded, padding-free, sparse, grouped."""
    result = results[name]
    assert result["launched"] and result["launched"].keys() <= result["warmed"].keys()
    kernels = {"forward_kernel"} if "eval" in name else {"forward_kernel", "dq_kernel", "dkdv_kernel"}
    assert set(result["launched"].values()) == kernels


def test_compiled_kernels_are_found(results):
    result = results["llama-eval/compiled"]
    assert (result["kernels"], result["launched"]) == (1, {}) and result["compiled"] <= 1


@pytest.fixture
def no_gpu(monkeypatch):
    """Something that Triton takes for a GPU's driver; nothing is loaded onto it."""
    compiler = importlib.import_module("hf_flashbsa.kernels.compile_only")
    monkeypatch.setattr(compiler._Builders, "_build", staticmethod(lambda compile_, device: compile_()))
    active = SimpleNamespace(get_current_device=lambda: 0)
    monkeypatch.setattr(compiler, "driver", SimpleNamespace(active=active))


def test_what_cannot_be_compiled_is_an_error(no_gpu):
    def fail():
        raise RuntimeError("no such instruction")

    with pytest.raises(RuntimeError, match="no such instruction"), compile_only(CPU, 1, lambda *_: None):
        _async_compile.active_mode.get().submit("key", fail, lambda kernel: None)
    with compile_only(CPU, 1, lambda *_: None) as kernels:  # and nothing is left of it
        pass
    assert kernels.total == 0


def test_progress_counts_kernels(no_gpu):
    seen = []
    with compile_only(CPU, 2, lambda *counts: seen.append(counts)) as kernels:
        for key in "abc":
            _async_compile.active_mode.get().submit(key, lambda: None, lambda kernel: None)
    assert seen == [(0, 3), (1, 3), (2, 3), (3, 3)] and kernels.total == 3 and kernels.compiled == 0


# The model


@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gemma2", "bert"])
def test_made_up_batches_fit(name, by_triton):
    compile_(tiny(name, "bsa_dense").train())
    assert by_triton == []


def test_nothing_is_launched_and_the_model_stays_as_it_was(by_triton):
    model = tiny("bart", "bsa_dense", attention_dropout=0.5).train()
    enable_padding_free(model)
    model.register_buffer("count", torch.zeros(()))
    model.register_forward_hook(lambda module, args, output: module.count.add_(1) and None)
    model.model.encoder.eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    state = torch.get_rng_state()
    compile_(model, generate={"num_beams": 2})
    assert by_triton == []
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"model.shared.weight"}
    assert torch.equal(model.lm_head.weight.grad, torch.ones_like(model.lm_head.weight))
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)


def test_afterwards_attention_runs(by_triton):
    model, batch = tiny("llama", "bsa_dense").eval(), batch_for("llama", "none")
    with torch.no_grad():
        want = tiny("llama", "eager").eval()(**batch).logits
        compile_(model, [batch])
        assert by_triton == []
        torch.testing.assert_close(model(**batch).logits, want, rtol=1e-4, atol=1e-4)
    assert by_triton


def test_cuda_graphs_hold_nothing_of_it(by_triton, monkeypatch):
    """They would be graphs without attention."""
    monkeypatch.setattr(graphs, "GraphCapturer", OpCapturer)
    monkeypatch.setattr(graphs, "MAX_CAPTURES", 1)  # another size would leave no room
    model, batch = tiny("llama", "bsa_dense").train(), labelled("llama", "right")
    enable_padding_free(model, cuda_graphs=True)
    compile_(model, [batch] * 3)
    compile_(model)
    assert cuda_graph_counts(model) == {"model": {}}
    monkeypatch.undo()
    monkeypatch.setattr(graphs, "GraphCapturer", OpCapturer)
    want = losses(tiny("llama", "eager"), batch)[0]
    for _ in range(2):
        torch.testing.assert_close(losses(model, batch)[0], want, rtol=1e-4, atol=1e-4)
    assert cuda_graph_counts(model) == {"model": {"captured": 1, "replayed": 1}}


def test_a_failing_model_leaves_no_trace(by_triton):
    model = tiny("llama", "bsa_dense").eval()
    with pytest.raises(KeyError, match="nonsense"):
        compile_(model, [{}], loss=lambda model, batch: batch["nonsense"])
    with torch.no_grad():
        model(**batch_for("llama", "none"))
    assert by_triton and _async_compile.active_mode.get() is None


def test_models_that_read_no_tokens_need_batches(by_triton):
    with pytest.raises(ValueError, match="batches: Linear does not read tokens; give batches"):
        compile_(torch.nn.Linear(2, 2))


def test_on_a_cpu_there_is_nothing_to_do(caplog):
    def batches():
        raise AssertionError("nobody needs them")
        yield

    with caplog.at_level(logging.INFO, "hf_flashbsa"):
        done = warm_up(tiny("llama", "bsa_dense"), batches())
    assert done[:2] == (0, 0) and done.seconds < 0.1
    assert "warm_up: nothing to compile for the cpu" in caplog.text
