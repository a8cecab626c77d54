"""Models that are captured once and run on other sizes (`torch.export`, `torch.jit.trace`, `torch.compile` with block
layouts), and models without values: on fake tensors and on the meta device."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from sparse_models import MIXED, sparse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim
from transformers_models import assert_same, batch_for, run, tiny

from hf_flashbsa import padding_free, set_block_sparse


class Logits(nn.Module):
    """A model as a function of tensors, with logits of live tokens alone."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        inputs = dict(zip(self.names, tensors, strict=True))
        mask = inputs.get("decoder_attention_mask", inputs["attention_mask"])
        return self.model(**inputs, use_cache=False).logits * mask[..., None]


def assert_runs_on_other_sizes(program, name: str, module: Logits, reference: nn.Module, sizes) -> None:
    """A captured program of `module` gives the live logits of `reference`, and where it was captured with gradients,
    those."""
    reference = Logits(reference, module.names)
    for size in sizes:
        inputs = batch_for(name, "right", **size).values()
        results = []
        for function, of in ((program, module), (reference, reference)):
            of.zero_grad()
            logits = function(*inputs)
            if logits.requires_grad:
                (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
            gradients = {n: p.grad.clone() for n, p in of.named_parameters() if p.grad is not None}
            results.append((logits.detach(), gradients or {"none": torch.ones(1)}))
        if "none" in results[0][1]:
            results[1] = results[1][0], results[0][1]
        assert_same(*results)


def test_an_exported_model_runs_on_other_sizes():
    """T5, which has a bias, and cross-attention, whose lengths are independent."""
    model, reference = (tiny("t5", how, num_layers=1).eval() for how in ("bsa_dense", "eager"))
    batch, length, target = Dim("batch"), Dim("length"), Dim("target")
    inputs = batch_for("t5", "right", batch=3, length=9, target_length=5)
    shapes = tuple({0: batch, 1: target if n.startswith("decoder") else length} for n in inputs)
    module = Logits(model, list(inputs))
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,))
    sizes = dict(batch=3, length=9, target_length=5), dict(batch=5, length=6, target_length=33)
    assert_runs_on_other_sizes(exported.module(), "t5", module, reference, sizes)


def test_an_exported_model_with_layouts_runs_on_other_numbers_of_blocks():
    model, reference = sparse("llama", num_hidden_layers=1).eval(), sparse("llama", num_hidden_layers=1).eval()
    inputs = batch_for("llama", "right", batch=2, length=70)
    shapes = ({0: Dim("batch"), 1: Dim("length")},) * 2
    with torch.no_grad():
        module = Logits(model, list(inputs))
        program = torch.export.export(module, tuple(inputs.values()), dynamic_shapes=(shapes,)).module()
    sizes = dict(batch=2, length=70), dict(batch=3, length=150)
    assert_runs_on_other_sizes(program, "llama", module, reference, sizes)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("name", ["llama", "bart", "bsa_sparse"])
def test_traced_models_run_on_other_sizes(name, grad_mode):
    if name == "bsa_sparse":
        name, model, reference = "llama", sparse("llama").eval(), sparse("llama").eval()
        sizes = dict(batch=3, length=70), dict(batch=3, length=70)  # Llama's own trace fixes its sizes
    else:
        model, reference = (tiny(name, how).eval() for how in ("bsa_dense", "eager"))
        sizes = dict(length=13, target_length=7), dict(batch=4, length=20, target_length=9)
    inputs = batch_for(name, "right", **sizes[0])
    module = Logits(model, list(inputs))
    with torch.set_grad_enabled(grad_mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks of sizes are constants in a trace
        traced = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)
    assert_runs_on_other_sizes(traced, name, module, reference, sizes)


def test_one_compiled_graph_serves_all_lengths_of_a_sparse_model():
    model, eager, graphs = sparse("llama", num_hidden_layers=1), sparse("llama", num_hidden_layers=1), []

    def count(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend=count, dynamic=True, fullgraph=True)
    for length in (40, 150, 64):
        inputs = batch_for("llama", "right", batch=2, length=length)
        assert_same(run(model, inputs), run(eager, inputs))
    assert len(graphs) == 1


@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("name", ["llama", "bart", "t5", "bsa_sparse"])
def test_models_without_values_give_the_same_shapes(name, where):
    """Forward and backward: memory is planned, and shapes are asked for, on such devices."""
    family = "llama" if name == "bsa_sparse" else name
    inputs = batch_for(family, "right")
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext() as mode:
        with torch.device("meta" if where == "meta" else "cpu"):
            model = tiny(family, "bsa_sparse" if name == "bsa_sparse" else "bsa_dense")
        if name == "bsa_sparse":
            set_block_sparse(model, MIXED)
        inputs = {key: mode.from_tensor(x) if mode else x.to("meta") for key, x in inputs.items()}
        logits = model(**inputs, use_cache=False).logits
        logits.sum().backward()
        gradients = [p.grad for p in model.parameters()]
    tokens = inputs.get("decoder_input_ids", inputs["input_ids"])
    assert (logits.shape, logits.dtype) == ((*tokens.shape, 64), torch.float32)
    assert all(g.shape == p.shape for g, p in zip(gradients, model.parameters(), strict=True))
    assert all(isinstance(x, FakeTensor) if where == "fake" else x.is_meta for x in (logits, *gradients))


# What padding_free cannot capture


def test_padding_free_refuses_what_has_no_number_of_live_tokens():
    """And takes the number instead, on devices without values."""
    model, inputs = tiny("llama", "bsa_dense"), batch_for("llama", "right")
    live = int(inputs["attention_mask"].sum())
    ids, mask = inputs.values()

    def logits(ids, mask, **extra):
        return model(ids, mask, use_cache=False, **extra).logits

    with padding_free(model):
        with pytest.raises(ValueError, match="padding_free: torch.jit.trace would fix.*without padding_free"):
            torch.jit.trace(Logits(model, list(inputs)), tuple(inputs.values()), check_trace=False)
        with pytest.raises(ValueError, match="padding_free: .*mapped by vmap.*without padding_free"):
            torch.func.vmap(logits)(ids[:, None], mask[:, None])
        model.to("meta")
        with pytest.raises(ValueError, match="padding_free: .*on the meta device.*num_live_tokens"):
            logits(ids.to("meta"), mask.to("meta"))
        assert logits(ids.to("meta"), mask.to("meta"), num_live_tokens=live).shape == (3, 13, 64)
