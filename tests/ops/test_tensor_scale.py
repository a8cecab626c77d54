"""A tensor as `softmax_scale`: learned temperatures."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.ops.reference import reference_attention

HEADS, LEN_Q, LEN_K = 4, 5, 7
SHAPES = {"number": (), "heads": (HEADS, 1, 1), "rows": (2, 1, 1, 1), "queries": (2, HEADS, LEN_Q, 1), "ones": (1,)}
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    shapes = (2, HEADS, LEN_Q, 8), (2, 2, LEN_K, 8), (2, 2, LEN_K, 6)
    return [draw(*shape).to(dtype) for shape in shapes]


def results(function, q, k, v, scale) -> list[torch.Tensor]:
    """`out`, `lse` and the gradients of a function of both for all inputs."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v, scale)]
    out, lse = function(*leaves)
    loss = out.double().square().sum() + lse.double().sin().sum()
    return [x.double() for x in (out, lse, *torch.autograd.grad(loss, leaves))]


def ours(q, k, v, scale, backend: str = "torch"):
    return attention(q, k, v, causal=True, softcap=3.0, softmax_scale=scale, return_lse=True, backend=backend)


def oracle(q, k, v, scale):
    """The scale multiplied into the queries, in float64."""
    return reference_attention(q * scale, k, v, AttentionSpec(causal=True), softcap=3.0, softmax_scale=1.0)


@backends
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_all_gradients(shape, backend):
    q, k, v = inputs()
    scale = draw(*shape, seed=3)  # negative ones too
    got = results(lambda *x: ours(*x, backend=backend), q, k, v, scale)
    want = results(oracle, *(x.double() for x in (q, k, v, scale)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_queries_of_16_bits_are_rounded_once(dtype):
    """Whatever dtype the scale has; its gradient has that dtype."""
    q, k, v = inputs(torch.bfloat16)
    scale = draw(HEADS, 1, 1).to(dtype).requires_grad_()
    out, lse = ours(q, k, v, scale)
    rounded = (q.float() * scale.float()).bfloat16()
    want = attention(rounded, k, v, causal=True, softcap=3.0, softmax_scale=1.0, return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    assert torch.autograd.grad(out.sum(), scale)[0].dtype == dtype


def test_a_tensor_that_holds_a_number_is_that_number():
    q, k, v = inputs()
    torch.testing.assert_close(ours(q, k, v, torch.tensor(0.3)), ours(q, k, v, 0.3))


def test_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    arguments = *inputs(), draw(HEADS, 1, 1)
    for a, b in zip(results(compiled, *arguments), results(ours, *arguments), strict=True):
        torch.testing.assert_close(a, b)


def test_a_scale_of_each_sample():
    def loss(scale, q, k, v):
        return ours(q, k, v, scale)[0].square().sum()

    samples = [x[:, None] for x in inputs()]
    scales = draw(2, HEADS, 1, 1)
    got = vmap(grad(loss))(scales, *samples)
    loop = [grad(loss)(scales[i], *(x[i] for x in samples)) for i in range(2)]
    torch.testing.assert_close(got, torch.stack(loop))


@pytest.mark.parametrize("shape", [(8,), (HEADS, LEN_Q, 8), (1, 2, HEADS, LEN_Q, 1), (3, 1, 1), (7, 1)])
def test_shapes_that_are_no_factor_of_queries_raise(shape):
    with pytest.raises(ValueError, match=r"softmax_scale: .*; give a number, or real numbers that broadcast to \(B"):
        ours(*inputs(), torch.ones(shape))


@pytest.mark.parametrize("shape", [(4, 1, 1), (3, 1, 1, 1), (5, 1)])
def test_a_scale_never_makes_more_queries(shape):
    q = torch.randn(1, 1, 1, 8)
    with pytest.raises(ValueError, match=r"softmax_scale: .*broadcast to \(B, Hq, Sq, 1\) = \(1, 1, 1, 1\)"):
        attention(q, q, q, softmax_scale=torch.ones(shape))


def test_complex_scales_raise():
    with pytest.raises(ValueError, match="softmax_scale: .*complex64; give a number, or real numbers"):
        ours(*inputs(), torch.tensor(1j))


@pytest.mark.parametrize("name", ["dropout_p", "softcap"])
def test_other_numbers_may_not_be_tensors(name):
    with pytest.raises(ValueError, match="softcap, dropout_p: give Python numbers; tensors would lose"):
        attention(*inputs(), **{name: torch.tensor(0.5)})
