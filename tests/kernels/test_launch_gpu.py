"""Repeated launches on a GPU: the bits of ordinary ones, on any stream, in CUDA graphs, on any device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers_models import host_never_waits
from triton.runtime import JITFunction

from hf_flashbsa import AttentionSpec, BlockLayout, attention
from hf_flashbsa.kernels import launch_cache
from hf_flashbsa.kernels.tile_schedule import Sizes
from hf_flashbsa.ops.lowering import schedule_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTH = 200


def inputs(seed: int, dtype: torch.dtype = torch.bfloat16, offset: int = 0, room: int = 0) -> list[torch.Tensor]:
    """q, k, v and the gradient of the output, whose rows begin `offset` elements into memory, `room` apart."""
    g = torch.Generator("cuda").manual_seed(seed)

    def operand(heads: int) -> torch.Tensor:
        size = torch.Size((2, LENGTH, heads, 64 + room))
        x = torch.randn(offset + size.numel(), device="cuda", generator=g).to(dtype)
        return x[offset:].view(size)[..., :64].transpose(1, 2)

    return [operand(heads) for heads in (4, 2, 2, 4)]


def results(q, k, v, dout, **options) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    leaves += [x for x in options.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    torch.manual_seed(0)
    out = attention(*leaves[:3], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def equal(got: list[torch.Tensor], want: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


OPTIONS = {
    "causal window": lambda: {"causal": True, "window_size": (64, None)},
    "dropout": lambda: {"dropout_p": 0.2},
    "padding": lambda: {"seqlens_k": torch.tensor([150, 31], device="cuda")},
    "mask": lambda: {"mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool, device="cuda").tril()},
    "bias": lambda: {"bias": torch.ones(1, 4, LENGTH, LENGTH, device="cuda", requires_grad=True)},
    "sinks": lambda: {"sinks": torch.ones(4, device="cuda", requires_grad=True), "softcap": 20.0},
    "layout": lambda: {"layout": BlockLayout.from_mask(torch.ones(LENGTH, LENGTH).tril() > 0).to("cuda")},
}
PLACES = {"aligned": {}, "misaligned": {"offset": 1, "room": 1}, "float32": {"dtype": torch.float32}}


@pytest.mark.parametrize(
    "options, place",
    [*((name, "aligned") for name in OPTIONS), *(("causal window", name) for name in PLACES if name != "aligned")],
)
def test_repeated_launches_give_the_same_bits(options, place):
    make, place = OPTIONS[options], PLACES[place]
    with mock.patch.object(launch_cache, "_caches", False):
        want = [results(*inputs(seed, **place), **make()) for seed in (1, 2)]
    results(*inputs(0, **place), **make())
    kept = [inputs(seed, **place) for seed in (1, 2)]
    with mock.patch.object(JITFunction, "run", side_effect=AssertionError("Triton was asked again")):
        got = [results(*tensors, **make()) for tensors in kept]
    assert all(map(equal, got, want))


def test_other_streams_and_cuda_graphs():
    tensors = inputs(1)
    want = results(*tensors, causal=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = results(*tensors, causal=True)
        leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    stream.synchronize()
    assert equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = attention(*leaves, causal=True)
        gradients = torch.autograd.grad(out, leaves, tensors[3])
    graph.replay()
    torch.cuda.synchronize()
    assert equal([out, *gradients], want)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_need_not_be_on_the_current_device():
    tensors = inputs(1)
    want = results(*tensors, causal=True)
    got = results(*(x.to("cuda:1") for x in tensors), causal=True)
    assert torch.cuda.current_device() == 0
    assert equal([x.to("cuda:0") for x in got], want)


def test_the_host_never_waits_for_tables():
    """Nor do they depend on the device that makes them."""
    sizes = Sizes(2, 2, 700, 700)
    ids = torch.arange(700).expand(2, -1) // torch.tensor([[90], [3]])
    live = torch.where(torch.arange(700) < 650, ids, -1)
    for options in ({"segment_ids_q": ids, "segment_ids_k": live}, {"segment_ids_k": live.clamp(max=0)}):
        moved = AttentionSpec(**{name: x.cuda() for name, x in options.items()})
        with host_never_waits():
            tables = [schedule_of(moved, side, sizes, torch.device("cuda")) for side in "qk"]
        want = [schedule_of(AttentionSpec(**options), side, sizes, torch.device("cpu")) for side in "qk"]
        assert equal([x.cpu() for x in tables], want)
