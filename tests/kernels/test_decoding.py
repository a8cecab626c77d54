"""Calls with few queries, as in generation: kernels read the tensors of the mask, and no tile schedule is made."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from cases import Case, make_problem

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels.triton import backend as triton_backend
from hf_flashbsa.kernels.triton.launch import launch_forward
from hf_flashbsa.ops import lowering
from hf_flashbsa.ops.reference import reference_attention

pytestmark = pytest.mark.usefixtures("nan_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKS = ("none", "key_padding", "segments", "dense", "offset_tensor", "mixed")


def decoding_case(seed: int) -> Case:
    """A float32 case of few queries that is a function of its seed."""
    r = random.Random(seed)
    heads_k, dim = r.choice((1, 2)), r.choice((40, 64, 128, 256))
    return Case(
        seed=seed, dtype=torch.float32, batch=r.choice((1, 3)), heads=heads_k * r.choice((1, 4, 8)), heads_k=heads_k,
        len_q=r.choice((1, 1, 2, 3, 4, 16)), len_k=r.choice((1, 2, 17, 64, 65, 129, 300)), dim=dim,
        dim_v=r.choice((dim, dim, 40)), masking=MASKS[seed % len(MASKS)], causal=r.random() < 0.5,
        window_size=r.choice(((None, None), (None, None), (20, None), (3, 2))),
        bias=r.choice((None, None, (1, 1), (0, 1))), sinks=r.random() < 0.3, softcap=r.choice((None, None, 5.0)),
        dropout_p=0.0, scale=r.choice((None, 0.05)), strides=r.choice(("bhsd", "bshd", "sliced", "fused")), gain=1.0,
        blocks=None, alibi=r.choice((None, None, "heads", "rows")),
    )  # fmt: skip


@pytest.fixture
def no_schedules(monkeypatch):
    def made(*args):
        raise AssertionError("a tile schedule was made")

    monkeypatch.setattr(lowering, "tile_schedule", made)


def assert_like_oracle(case: Case) -> None:
    problem = make_problem(case, DEVICE)
    with torch.no_grad():
        tensors = problem.q, problem.k, problem.v, problem.spec
        got = attention(*tensors, **problem.options, return_lse=True, backend="triton")
        want = reference_attention(*tensors, **problem.options)
    torch.testing.assert_close(got, tuple(x.float() for x in want), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", [decoding_case(seed) for seed in range(18)], ids=str)
def test_random_without_a_schedule(case, no_schedules, monkeypatch):
    """With the keys in one part, and in some that are partly empty."""
    assert_like_oracle(case)
    monkeypatch.setattr(lowering, "_num_splits", lambda *args: 2 + case.seed % 4)
    assert_like_oracle(case)


@pytest.mark.parametrize("masking", ["key_padding", "segments", "offset_tensor"])
def test_gradients_keep_their_schedules(masking):
    """They sort unequal tiles of keys; results are those of the forward pass that needs none."""
    case = dataclasses.replace(decoding_case(0), masking=masking, causal=True, len_q=3, len_k=20, heads=1, heads_k=1)
    problem = make_problem(case, DEVICE)
    tensors = problem.q, problem.k, problem.v, problem.spec
    with torch.no_grad():
        want = attention(*tensors, **problem.options, backend="triton")
    out = attention(*tensors, **problem.options, backend="triton")
    torch.testing.assert_close(out, want, atol=2e-6, rtol=1e-6)
    out.backward(problem.dout)
    reference, _ = reference_attention(*tensors, **problem.options)
    for x in (problem.q, problem.k, problem.v):
        got, x.grad = x.grad, None
        (grad,) = torch.autograd.grad(reference, x, problem.dout.double(), retain_graph=True)
        torch.testing.assert_close(got, grad.float(), atol=2e-5, rtol=1e-5)


def test_an_offset_is_read_when_the_kernel_runs():
    """By a launch that knows it as an address, whatever its dtype."""
    q, k, v = (torch.randn(2, 2, n, 16) for n in (1, 40, 40))
    for dtype in (torch.int32, torch.int64):
        offset = torch.tensor(3, dtype=dtype)
        spec = AttentionSpec(causal=True, window_size=(6, None), query_offset=offset)
        for value in (3, 20, 39):
            offset.fill_(value)
            want, _ = reference_attention(q, k, v, AttentionSpec(True, (6, None), value))
            torch.testing.assert_close(attention(q, k, v, spec, backend="triton"), want.float(), atol=2e-6, rtol=1e-5)


def test_forward_mode_has_the_schedule_that_its_rule_reads():
    q, k, v = (torch.randn(1, 2, n, 16) for n in (2, 9, 9))
    spec = AttentionSpec(causal=True, query_offset=torch.tensor([3]))
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(v, torch.ones_like(v))
        out = attention(q, k, dual, spec, backend="triton")
        tangent = torch.autograd.forward_ad.unpack_dual(out).tangent
    torch.testing.assert_close(tangent, torch.ones_like(tangent))


def test_a_compiled_step_splits_its_keys_too(monkeypatch):
    """How often follows from shapes, which a graph takes for constant."""
    monkeypatch.setattr(lowering, "KEYS_OF_A_SPLIT", 32)
    launched = []
    monkeypatch.setattr(triton_backend, "launch_forward", lambda *args: launched.append(args) or launch_forward(*args))
    q, k, v = (torch.randn(1, heads, n, 16, device=DEVICE) for heads, n in ((4, 1), (2, 130), (2, 130)))
    torch._dynamo.reset()
    with torch.no_grad():
        got = torch.compile(attention, fullgraph=True, backend="eager")(q, k, v, causal=True, backend="triton")
        want, _ = reference_attention(q, k, v)
    torch.testing.assert_close(got, want.float(), atol=2e-6, rtol=1e-5)
    ((*_, plan, parts),) = launched
    assert plan.scalars.num_splits == 4 and parts[0].shape == (4, 4, 1, 16)
