"""The registered ops under torch's own checks, compilation, checkpointing and second derivatives."""

from __future__ import annotations

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels.tables import SCHEDULE_TILE, ScheduleColumn
from hf_flashbsa.kernels.torch import backend as torch_backend
from hf_flashbsa.kernels.triton import backend as triton_backend
from hf_flashbsa.ops.lowering import CallOptions, lower

BIAS = torch.randn(1, 4, 5, 7, requires_grad=True)
SINKS = torch.randn(4, requires_grad=True)
PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1]])[:, None, None] > 0
DENSE = torch.rand(2, 1, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6
OPTIONS = {
    "plain": {},
    "causal window": {"causal": True, "window_size": (3, None), "softmax_scale": 0.3},
    "lengths": {"seqlens_q": torch.tensor([5, 2]), "seqlens_k": torch.tensor([3, 7])},
    "padding": {"mask": PADDING},
    "mask": {"mask": DENSE, "causal": True},
    "bias and lengths": {"bias": BIAS, "seqlens_k": torch.tensor([3, 7])},
    "sinks and softcap": {"sinks": SINKS, "softcap": 5.0},
    "dropout": {"dropout_p": 0.3, "causal": True},
    "alibi": {"alibi_slopes": torch.rand(2, 4), "causal": True},
}
options_sets = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@pytest.fixture(autouse=True)
def forget_compilations():
    torch._dynamo.reset()


def inputs(len_q: int = 5, len_k: int = 7, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, len_q, 8), (2, 2, len_k, 8), (2, 2, len_k, 6)
    return [torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes]


def results(function, tensors: list[torch.Tensor], **options) -> tuple[torch.Tensor, ...]:
    """Output and gradients of `function`, from the same state of torch's generator each time."""
    torch.manual_seed(0)
    needed = [*tensors, *(x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad)]
    for x in needed:
        x.grad = None
    out = function(*tensors, **options)
    out.square().sum().backward()
    return out.detach(), *(x.grad for x in needed)


class Recorder(TorchDispatchMode):
    """Remembers the arguments that this package's ops were called with."""

    def __init__(self):
        super().__init__()
        self.calls: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hf_flashbsa":
            self.calls[func._opname] = args
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "name, backend",
    [*((name, "torch") for name in OPTIONS), *((name, "triton") for name in ("bias and lengths", "dropout"))],
)
def test_opcheck(name, backend):
    with Recorder() as recorder:
        results(attention, inputs(), backend=backend, **OPTIONS[name])
    forward, backward = (recorder.calls[f"flash_attn_{name}"] for name in ("forward", "backward"))
    torch.library.opcheck(torch.ops.hf_flashbsa.flash_attn_forward.default, forward)
    # The backward op has no formula of its own: see test_second_derivatives_are_refused.
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    backward = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward)
    torch.library.opcheck(torch.ops.hf_flashbsa.flash_attn_backward.default, backward, test_utils=checks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@options_sets
def test_compiled_equals_eager(options, dtype):
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    got = results(compiled, inputs(dtype=dtype), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, results(attention, inputs(dtype=dtype), **options), strict=True))


def test_compiled_with_one_tensor_in_several_places():
    def self_attention(x):
        return attention(x, x, x, causal=True)

    compiled = torch.compile(self_attention, fullgraph=True, backend="aot_eager")
    x = inputs()[0]
    torch.testing.assert_close(results(compiled, [x]), results(self_attention, [x]))


@pytest.mark.parametrize("kind", ["plain", "padding", "lengths"])
def test_compiled_once_for_all_sizes(kind):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph

    def function(q, k, v, **tensors):
        return attention(q, k, v, AttentionSpec(causal=True, **tensors))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for len_q, len_k in ((5, 7), (9, 9), (64, 130), (33, 12)):
        tensors = {
            "plain": {},
            "padding": {"mask": torch.arange(len_k) < torch.tensor([[len_k], [len_k - 4]])[:, None, None]},
            "lengths": {"seqlens_k": torch.tensor([len_k, len_k - 4])},
        }[kind]
        got = results(compiled, inputs(len_q, len_k), **tensors)
        torch.testing.assert_close(got, results(function, inputs(len_q, len_k), **tensors))
    # Queries and keys of equal length make a graph of their own.
    assert len(graphs) <= 2


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    def recomputed(q, k, v):
        return checkpoint(lambda *x: attention(*x, dropout_p=0.5), q, k, v, use_reentrant=use_reentrant)

    got, want = results(recomputed, inputs()), results(attention, inputs(), dropout_p=0.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_selective_checkpointing_saves_attention(monkeypatch):
    """By a policy that knows attention by its name, as trainers have it."""
    computed, forward = [], torch_backend.forward
    monkeypatch.setattr(torch_backend, "forward", lambda *arguments: computed.append(1) or forward(*arguments))

    def policy(context, op, *arguments, **options):
        return CheckpointPolicy.MUST_SAVE if "flash_attn" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def block(q, k, v):
        return attention(q, k, v, causal=True, backend="torch").exp()

    def checkpointed(q, k, v):
        contexts = functools.partial(create_selective_checkpoint_contexts, policy)
        return checkpoint(block, q, k, v, use_reentrant=False, context_fn=contexts)

    got = results(checkpointed, inputs())
    assert len(computed) == 1
    assert all(torch.equal(a, b) for a, b in zip(got, results(block, inputs()), strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_second_derivatives_are_refused(backend):
    q, k, v = inputs()
    out = attention(q, k, v, backend=backend)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


@options_sets
def test_a_call_without_optional_tensors_saves_none_of_them(options):
    """They would cost the host, in every call."""
    saved = attention(*inputs(), **options).grad_fn.saved_tensors
    assert (len(saved) == 5) == all(x is None for x in saved[5:])


def test_launches_of_a_call_without_optional_tensors_get_none_of_them(monkeypatch):
    got = []
    monkeypatch.setattr(triton_backend, "launch_cached", lambda kind, inputs, *rest: got.append(len(inputs)))
    tensors = inputs()
    torch.autograd.grad(attention(*tensors, causal=True, backend="triton").sum(), tensors)
    assert got == [3, 7]


def test_ops_trace_without_data():
    """Models on the meta device go through, as they do when their memory is planned."""
    q, k, v = (x.detach().to("meta").requires_grad_() for x in inputs())
    mask = torch.ones(2, 1, 1, 7, dtype=torch.bool, device="meta")
    out, lse = attention(q, k, v, mask=mask, dropout_p=0.1, return_lse=True)
    assert (out.shape, lse.shape, out.device.type) == ((2, 4, 5, 6), (2, 4, 5), "meta")
    assert [g.shape for g in torch.autograd.grad(out.sum(), [q, k, v])] == [q.shape, k.shape, v.shape]


def test_lazily_negated_tensors_are_negated():
    """Eager calls bypass the dispatcher, which resolves such tensors, only where it has nothing to resolve."""
    q, k, v = (x.detach() for x in inputs())
    negated = [torch._neg_view(x) for x in (q, k, v)]
    assert torch.equal(attention(*negated), attention(-q, -k, -v))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn(2, 4, 5, 6)
    got = torch.autograd.grad(attention(*leaves), leaves, torch._neg_view(dout))
    want = torch.autograd.grad(attention(*leaves), leaves, -dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_fake_tensors_stay_fake():
    with FakeTensorMode() as mode:
        q, k, v = (mode.from_tensor(x.detach()).requires_grad_() for x in inputs())
        out = attention(q, k, v, causal=True)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(isinstance(x, FakeTensor) for x in (out, *gradients))
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_outputs_may_be_changed_in_place(mode):
    q, k, v = inputs()
    with mode():
        out = attention(q, k, v)
        want = out.detach() * 2
        assert torch.equal(out.mul_(2), want)


@pytest.mark.parametrize(
    ("dropout_p", "has_bias", "divided"), [(0.0, False, "qk"), (0.1, False, "q"), (0.0, True, "")]
)
def test_tiles_begin_in_steps_where_kernels_count_places(dropout_p, has_bias, divided):
    """Keys are dropped, and a bias is read, in groups that begin at multiples of a tile: not where a document does."""
    ids = torch.arange(300)[None] // 70
    spec = AttentionSpec(segment_ids_q=ids, segment_ids_k=ids)
    options = CallOptions(None, None, dropout_p, True, "triton", has_bias, needs_grad=True)
    tensors = lower(spec, *torch.zeros(3, 1, 2, 300, 8), options).tensors
    begins = {"q": tensors.schedule_q[:, ScheduleColumn.BEGIN], "k": tensors.schedule_k[:, ScheduleColumn.BEGIN]}
    assert {side for side, begin in begins.items() if (begin % SCHEDULE_TILE).any()} == set(divided)
