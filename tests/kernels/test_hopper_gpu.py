"""The Hopper kernels on a Hopper GPU, where each program has several tiles, against eager attention in float32."""

from __future__ import annotations

import functools

import pytest
import torch
from hopper_calls import FUSED_KERNELS, KERNELS, every_call_on_hopper
from hopper_specs import DEVICE, LAUNCHES, LENGTH, SPECS, made, results, tensors_for

from hf_flashbsa import attention
from hf_flashbsa.kernels import tuning
from hf_flashbsa.ops.reference import reference_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not tuning.is_hopper(torch.device(DEVICE)), reason="needs a Hopper GPU"
    ),
]


@pytest.fixture(params=LAUNCHES, ids=lambda param: "{}-{}".format(*param))
def launched(request):
    """Which kernels a test launched. So many programs share the tiles of a forward call, and every call goes to the
    Hopper kernels that can, with each of their options."""
    with every_call_on_hopper(*request.param) as counter:
        yield counter


def judge(tensors, dout, spec, launched, deterministic: bool = True) -> None:
    run = functools.partial(attention, deterministic=deterministic)
    got = results(run, tensors, dout, spec)
    assert set(launched) == {(kernel, True) for kernel in (KERNELS if deterministic else FUSED_KERNELS)}
    want = results(lambda *x: reference_attention(*x, dtype=torch.float32)[0], tensors, dout, spec)
    native = results(lambda *x: reference_attention(*x, dtype=None)[0], tensors, dout, spec)
    for mine, exact, eager, factor in zip(got, want, native, (2, 3, 3, 3), strict=True):
        assert (mine - exact).abs().max() <= factor * (eager - exact).abs().max() + 1e-5
    same = [torch.equal(a, b) for a, b in zip(got, results(run, tensors, dout, spec), strict=True)]
    assert all(same) if deterministic else same[0] and all(same[2:])  # of sums, not the gradient of the queries


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", SPECS)
def test_results_are_those_of_eager_attention(launched, name, head_dim):
    *tensors, dout = tensors_for(name, head_dim)
    judge(tensors, dout, SPECS[name](), launched)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("programs", [3, 132])
def test_results_are_those_of_eager_attention_where_sums_may_vary(programs, name):
    *tensors, dout = tensors_for(name, 64)
    with every_call_on_hopper(programs) as launched:
        judge(tensors, dout, SPECS[name](), launched, deterministic=False)


@pytest.mark.parametrize("growth", [6.5, 28.0])
@pytest.mark.parametrize("name", ["full", "causal", "causal layout"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_outgrow_their_pivots(launched, name, head_dim, growth):
    """In every third row scores grow by more than 8 powers of 2 in each of some blocks, so that pivots rise, or by 40,
    so that weights by the first pivots are infinite."""
    q, k, v, dout = made(2, 2, head_dim)
    place = torch.arange(LENGTH, device=DEVICE)
    q[..., 0] = torch.where(place % 3 == 0, head_dim**0.5, 0.0).bfloat16()
    k[..., 0] = (growth / 128 * torch.where(place < 512, place, 1024 - place).clamp(min=0)).bfloat16()
    judge((q, k, v), dout, SPECS[name](), launched)
