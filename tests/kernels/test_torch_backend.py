"""The torch back end: into which pieces it divides calls, and that these and the fused kernel change no result."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from cases import make_problem, random_case
from transformers_models import batch_for, tiny

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels.torch import backend, fused, pieces
from hf_flashbsa.kernels.torch.pieces import pieces_of
from hf_flashbsa.ops import lowering
from hf_flashbsa.ops.reference import reference_attention


@pytest.fixture
def divided(monkeypatch):
    """For each call that was divided: queries, and how many pieces they became."""
    calls = []

    def noted(q, *args, **kwargs):
        result = pieces_of(q, *args, **kwargs)
        calls.append((q.shape[2], len(result)))
        return result

    monkeypatch.setattr(backend, "pieces_of", noted)
    return calls


@pytest.fixture
def fused_calls(monkeypatch):
    calls = []
    for name in ("forward", "backward"):
        original = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *args, f=original, n=name: calls.append(n) or f(*args))
    return calls


def tensors(batch: int = 4, heads: int = 4, heads_k: int = 4, len_q: int = 12, len_k: int = 12, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, heads, len_q, 8), (batch, heads_k, len_k, 8), (batch, heads_k, len_k, 8)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def gradients(out: torch.Tensor, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * dout).sum(), inputs)


LENGTHS = torch.tensor([12, 5, 7, 2])
CU = torch.tensor([0, 3, 3, 9, 12])
IDS = torch.tensor([[0] * 5 + [1] * 7, [-1] * 3 + [0] * 9, [0] * 12, [-1] * 12])
MASKS = {
    "none": {},
    "causal": {"causal": True},
    "fewer keys, causal": {"causal": True, "len_k": 7},
    "more keys, causal": {"causal": True, "len_k": 19},
    "window": {"window_size": (2, 1)},
    "ragged": {"seqlens_q": torch.tensor([12, 3, 7, 0]), "seqlens_k": torch.tensor([12, 5, 0, 2])},
    "ragged, causal": {"seqlens_q": torch.tensor([9, 3, 7, 5]), "seqlens_k": LENGTHS, "causal": True},
    "left padding": {"starts_q": torch.tensor([0, 3, 12, 7]), "starts_k": torch.tensor([0, 3, 12, 7]), "causal": True},
    "padding mask": {"mask": (IDS >= 0)[:, None, None]},
    "padding mask, causal": {"mask": (IDS >= 0)[:, None, None], "causal": True},
    "documents": {"segment_ids_q": IDS, "segment_ids_k": IDS, "causal": True},
    "packed": {"batch": 1, "cu_seqlens_q": CU, "cu_seqlens_k": CU},
    "packed, window": {"batch": 1, "cu_seqlens_q": CU, "cu_seqlens_k": CU, "window_size": (3, 0)},
    "a mask": {"mask": torch.rand(4, 1, 12, 12, generator=torch.Generator().manual_seed(2)) < 0.4},
}  # fmt: skip
WITH_IDS = ("padding mask", "padding mask, causal", "documents")


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize(("heads_k", "extra"), [(4, ""), (2, "sinks"), (4, "bias"), (2, "softcap")])
@pytest.mark.parametrize("name", [*MASKS, *(f"{name}, by tiles" for name in WITH_IDS)])
def test_float64_results_are_those_of_the_oracle(name, heads_k, extra, monkeypatch, fused_calls):
    """Queries that see nothing among them: 0, and gradients 0."""
    if name not in MASKS:
        name = name.removesuffix(", by tiles")
        monkeypatch.setattr(lowering, "MANY_SCORES", 0)
    options = dict(MASKS[name])
    sizes = {key: options.pop(key) for key in ("batch", "len_k") if key in options}
    inputs = tensors(heads_k=heads_k, **sizes)
    extras = {
        "sinks": {"sinks": torch.randn(4, dtype=torch.float64)},
        "bias": {"bias": torch.randn(1, 4, 12, inputs[1].shape[2], dtype=torch.float64)},
        "softcap": {"softcap": 2.0},
    }.get(extra, {})
    out, lse = attention(*inputs, **options, **extras, return_lse=True)
    want, want_lse = reference_attention(*inputs, AttentionSpec(**options), **extras, dtype=torch.float64)
    torch.testing.assert_close((out, lse), (want, want_lse))
    torch.testing.assert_close(gradients(out, inputs), gradients(want, inputs))
    assert set(fused_calls) == (set() if extra == "softcap" else {"forward", "backward"})


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("seed", range(25))
def test_random_float64(seed):
    """Loss of the output alone, whose backward pass the fused kernel computes where it can."""
    case = random_case(seed, dtypes=(torch.float64,), max_len=129, dims=(8, 16))
    problem = make_problem(dataclasses.replace(case, dim_v=case.dim, dropout_p=0.0, gain=1.0), "cpu")
    inputs = [problem.q, problem.k, problem.v]
    got = attention(*inputs, problem.spec, **problem.options)
    want, _ = reference_attention(*inputs, problem.spec, **problem.options, dtype=torch.float64)
    torch.testing.assert_close((got, *gradients(got, inputs)), (want, *gradients(want, inputs)), atol=1e-9, rtol=1e-9)


def test_one_query_of_grouped_heads():
    """Decoding: heads that share keys are rows of one, also where the mask differs by head."""
    q, k, v = tensors(heads_k=2, len_q=1)
    mask = torch.rand(4, 4, 1, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[0, 1] = False
    for options in ({}, {"mask": mask}, {"seqlens_k": torch.tensor([12, 1, 0, 5])}):
        got = attention(q, k, v, **options, return_lse=True)
        torch.testing.assert_close(got, reference_attention(q, k, v, AttentionSpec(**options), dtype=torch.float64))


@pytest.mark.parametrize(
    ("lengths", "heads", "most"),
    [
        ([5, 17, 30, 8, 22, 1, 0, 13, 9, 27, 31, 2, 19, 24, 6, 11], 4, 1),
        ([64] * 8 + [63] * 8, 8, 1),
        ([300, 8, 299, 5, 298, 4, 301, 9], 2, 2),
        ([600, 400, 200], 2, 3),
    ],
    ids=["short", "equal", "two kinds", "long and ragged"],
)
def test_rows_of_a_ragged_batch_are_few_pieces(lengths, heads, most, divided):
    q, k, v = tensors(len(lengths), heads, heads, max(lengths), max(lengths), torch.float32)
    attention(q, k, v, causal=True, seqlens_q=torch.tensor(lengths), seqlens_k=torch.tensor(lengths))
    assert divided == [(max(lengths), most)]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    total = sum(lengths)
    q, k, v = tensors(1, heads, heads, total, total, torch.float32)
    attention(q, k, v, causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)
    assert divided[1:] == [(total, most)]


def test_a_window_costs_no_scores_far_from_it():
    q, k, v = tensors(1, 1, 1, 1024, 1024)
    plan = lowering.lower(AttentionSpec(True, (31, None)), q, k, v, (None, None, 0.0, True, "torch", False, False))
    scores = [piece.q.length * piece.k.length for piece in pieces_of(q, k, plan, with_scores=False)]
    assert sum(scores) <= 1024 * (pieces.MIN_QUERIES + 31)


def test_a_decoding_step_visits_no_row_by_itself(divided, monkeypatch):
    """Neither for padded documents nor for the tokens so far; no tile schedule is made for them."""
    model = tiny("bart", "bsa_dense").eval()
    inputs = {name: x for name, x in batch_for("bart", "right").items() if name in ("input_ids", "attention_mask")}
    assert (inputs["attention_mask"] == 0).any()
    monkeypatch.setattr(lowering, "schedule_of", lambda *args: pytest.fail("a tile schedule"))
    model.generate(**inputs, num_beams=2, max_new_tokens=4, min_new_tokens=4)
    steps = [count for queries, count in divided if queries == 1]
    assert len(steps) >= 2 * 3 and set(steps) == {1}


def test_layers_share_pieces_and_the_backward_pass_too(divided):
    q, k, v = tensors()
    spec = AttentionSpec(seqlens_k=torch.tensor([3, 6, 12, 1]))
    for _ in range(2):
        attention(q, k, v, spec).sum().backward()
    assert len(divided) == 1


def test_dead_rows_may_hold_anything():
    """Caches grow in uninitialised memory."""
    q, k, v = (x.detach() for x in tensors(dtype=torch.float32))
    lengths = torch.tensor([12, 5, 0, 1])
    want = attention(q, k, v, seqlens_k=lengths)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:], v[row, :, length:] = math.nan, math.inf
    assert torch.equal(attention(q, k, v, seqlens_k=lengths), want)


def test_rows_do_not_depend_on_others():
    q, k, v = (x.detach() for x in tensors(batch=6, dtype=torch.float32))
    lengths = torch.tensor([12, 5, 7, 1, 9, 11])
    together = attention(q, k, v, causal=True, seqlens_q=lengths, seqlens_k=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = attention(*(x[row : row + 1, :, :length] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(together[row : row + 1, :, :length], alone)
    assert torch.equal(together, attention(q, k, v, causal=True, seqlens_q=lengths, seqlens_k=lengths))


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["fused", "by scores"])
def test_autocast_does_not_round_products(softcap):
    inputs = tensors(dtype=torch.float32)
    want = attention(*inputs, softcap=softcap)
    with torch.autocast("cpu", torch.bfloat16):
        got = attention(*inputs, softcap=softcap)
        assert all(map(torch.equal, (got, *gradients(got, inputs)), (want, *gradients(want, inputs))))
