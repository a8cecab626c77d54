"""Captured programs run on other sizes (`torch.export`, `torch.jit.trace`), and calls without values give the shapes,
dtypes and devices of outputs and gradients (fake tensors, the meta device)."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from hf_flashbsa import AttentionSpec, BlockLayout, attention
from hf_flashbsa.ops.reference import reference_attention

BATCH, LENGTH = 3, 9
OTHER_SIZES = ((BATCH, LENGTH), (2, 2), (5, 40))
GRID = torch.tensor([[1, 0], [1, 1]], dtype=torch.int32)[None, None]


def lengths_of(batch: int, length: int) -> torch.Tensor:
    return length - torch.arange(batch) % 2


#: Options of a module, and the tensors that it gets for a batch size and a length.
KINDS = {
    "causal": ({"causal": True, "softcap": 5.0}, lambda b, s: {}),
    "lengths": ({"window_size": (5, 1)}, lambda b, s: {"seqlens_k": lengths_of(b, s)}),
    "padding": (
        {"causal": True},
        lambda b, s: {"mask": (torch.arange(s) < lengths_of(b, s)[:, None])[:, None, None]},
    ),
    "starts and layout": ({"layout": BlockLayout(GRID, 32)}, lambda b, s: {"starts_k": torch.arange(b) % 2}),
    "documents": (
        {"causal": True},
        lambda b, s: {name: (torch.arange(s) // 4).expand(b, -1) for name in ("segment_ids_q", "segment_ids_k")},
    ),
    "bias": ({"causal": True}, lambda b, s: {"bias": torch.linspace(-1, 1, 4 * s * s).view(1, 4, s, s)}),
}


class Attention(nn.Module):
    """`attention` with fixed options, a learned scale and learned sinks."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.scale = nn.Parameter(torch.tensor(0.4))
        self.sinks = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, q, k, v, tensors: dict[str, torch.Tensor] | None = None):
        tensors = tensors or {}
        return attention(q, k, v, softmax_scale=self.scale, sinks=self.sinks, **self.options, **tensors)

    def oracle(self, q, k, v, tensors: dict[str, torch.Tensor]):
        """The same in float64."""
        masking = {**self.options, **tensors}
        given = {name: masking.pop(name, None) for name in ("bias", "softcap")}
        return reference_attention(
            q, k, v, AttentionSpec(**masking), sinks=self.sinks, softmax_scale=self.scale.double(), **given
        )[0]


def draw(batch: int, length: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(batch + length)
    shapes = (batch, 4, length, 8), (batch, 2, length, 8), (batch, 2, length, 6)
    return [torch.randn(s, generator=g).requires_grad_() for s in shapes]


def assert_runs_on_other_sizes(program, module: Attention, make) -> None:
    for batch, length in OTHER_SIZES:
        inputs, tensors = draw(batch, length), make(batch, length)
        leaves = [*inputs, *module.parameters()]
        results = []
        for function in (program, module.oracle):
            out = function(*inputs, tensors)
            gradients = torch.autograd.grad(out.square().mean(), leaves) if out.requires_grad else ()
            results.append([x.double() for x in (out, *gradients)])
        for got, want in zip(*results, strict=False):  # no gradients where the program was traced without
            torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
        assert len(results[1]) == 1 + len(leaves)


# Programs for any size


@pytest.mark.parametrize(
    ("kind", "strict", "grad_mode"),
    [("causal", True, True), ("bias", False, True), ("lengths", False, True), ("padding", False, False)],
)
def test_exported_programs_run_on_other_sizes(kind, strict, grad_mode):
    options, make = KINDS[kind]
    module = Attention(**options)
    dims = {BATCH: Dim("batch"), LENGTH: Dim("length")}
    inputs = *draw(BATCH, LENGTH), make(BATCH, LENGTH)
    shapes = torch.utils._pytree.tree_map(lambda x: {i: dims[n] for i, n in enumerate(x.shape) if n in dims}, inputs)
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    assert_runs_on_other_sizes(program.module(), module, make)


@pytest.mark.parametrize("grad_mode", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_traces_run_on_other_sizes(kind, grad_mode):
    options, make = KINDS[kind]
    module = Attention(**options)
    with torch.set_grad_enabled(grad_mode), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # checks of sizes are constants in a trace
        tensors = make(BATCH, LENGTH)
        example = (*draw(BATCH, LENGTH), tensors) if tensors else draw(BATCH, LENGTH)  # no empty dicts
        traced = torch.jit.trace(module, tuple(example), check_trace=False)
    program = traced if tensors else lambda q, k, v, _: traced(q, k, v)
    assert_runs_on_other_sizes(program, module, make)


# Calls without values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("where", ["fake", "meta"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_without_values_give_the_same_shapes(kind, where, dtype):
    options, make = KINDS[kind]
    module, tensors = Attention(**options).to(dtype), make(BATCH, LENGTH)
    leaves = [x.detach().to(dtype) for x in (*draw(BATCH, LENGTH), *module.parameters())]
    mode = FakeTensorMode() if where == "fake" else contextlib.nullcontext()

    def run(place) -> list[torch.Tensor]:
        moved = [place(x).requires_grad_() for x in leaves]
        module.scale, module.sinks = map(nn.Parameter, moved[3:])
        if "layout" in options:
            module.options["layout"] = BlockLayout(place(GRID), 32)
        out = module(*moved[:3], {name: place(x) for name, x in tensors.items()})
        return [out, *torch.autograd.grad(out.sum(), [*moved[:3], *module.parameters()])]

    want = run(torch.clone)
    with mode:
        got = run(mode.from_tensor if where == "fake" else lambda x: x.to("meta"))
    assert all(isinstance(x, FakeTensor) if where == "fake" else x.is_meta for x in got)
    described = [[(x.shape, x.dtype, x.stride()) for x in tensors] for tensors in (got, want)]
    assert described[0] == described[1]
