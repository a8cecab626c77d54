"""The Hopper kernels on a Hopper GPU, where each program has several tiles, against eager attention in float32."""

from __future__ import annotations

import pytest
import torch
from hopper_calls import every_call_on_hopper

from hf_flashbsa import BlockLayout, attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.reference import reference_attention
from hf_flashbsa.spec import AttentionSpec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not tuning.is_hopper(torch.device("cuda")), reason="needs a Hopper GPU"
    ),
]
LENGTH = 1536


@pytest.fixture(params=[1, 3, 132])
def programs(request):
    """How many programs share the tiles of a forward call; every call goes to the Hopper kernels that can."""
    with every_call_on_hopper(request.param):
        yield request.param


def packed(device: str) -> torch.Tensor:
    return torch.tensor([0, 1, 130, 130, 700, LENGTH], dtype=torch.int32, device=device)


SPECS = {
    "full": AttentionSpec,
    "causal": lambda: AttentionSpec(causal=True),
    "window": lambda: AttentionSpec(causal=True, window_size=(300, None)),
    "lengths": lambda: AttentionSpec(seqlens_k=torch.tensor([LENGTH, 77], device="cuda")),
    "layout": lambda: AttentionSpec(
        layout=BlockLayout.from_block_mask(
            torch.rand(12, 12, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) < 0.4, 128
        )
    ),
}


def results(function, tensors, dout, spec) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, spec)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [*SPECS, "packed"])
def test_results_are_those_of_eager_attention(programs, name, head_dim):
    g = torch.Generator("cuda").manual_seed(1)
    batch = 1 if name == "packed" else 2
    q, k, v, dout = (
        torch.randn(batch, LENGTH, heads, head_dim, device="cuda", generator=g).bfloat16().transpose(1, 2)
        for heads in (4, 2, 2, 4)
    )
    cu = packed("cuda")
    spec = AttentionSpec(cu_seqlens_q=cu, cu_seqlens_k=cu, causal=True) if name == "packed" else SPECS[name]()
    got = results(attention, (q, k, v), dout, spec)
    want = results(lambda *x: reference_attention(*x, dtype=torch.float32)[0], (q, k, v), dout, spec)
    native = results(lambda *x: reference_attention(*x, dtype=None)[0], (q, k, v), dout, spec)
    for mine, exact, eager, factor in zip(got, want, native, (2, 3, 3, 3), strict=True):
        assert (mine - exact).abs().max() <= factor * (eager - exact).abs().max() + 1e-5
    assert all(torch.equal(a, b) for a, b in zip(got, results(attention, (q, k, v), dout, spec), strict=True))
