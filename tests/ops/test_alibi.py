"""ALiBi slopes on every back end: equal to the bias that they stand for, by FlashAttention-2's convention."""

from __future__ import annotations

import pytest
import torch

from hf_flashbsa import AttentionSpec, BlockLayout, attention
from hf_flashbsa.ops.reference import reference_attention

BATCH, HEADS, HEADS_K, LEN_Q, LEN_K, DIM = 2, 2, 1, 19, 37, 16
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
SLOPES = torch.tensor([[1.0, 0.0625], [0.25, 2.0]])


def inputs(batch: int = BATCH, len_q: int = LEN_Q, len_k: int = LEN_K, dtype=torch.float32) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (batch, HEADS, len_q, DIM), (batch, HEADS_K, len_k, DIM), (batch, HEADS_K, len_k, DIM)
    return [torch.randn(shape, generator=g).to(dtype).requires_grad_() for shape in shapes]


def results(leaves: list[torch.Tensor], function=attention, **options) -> list[torch.Tensor]:
    """`out`, `lse` and the gradients of q, k and v."""
    torch.manual_seed(0)
    if function is attention:
        options["return_lse"] = True
    out, lse = function(*leaves, **options)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    live = lse > -torch.inf
    return [out, lse, *torch.autograd.grad((out * weight).sum() + lse[live].sin().sum(), leaves)]


def layout() -> BlockLayout:
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 32, 32, generator=g) < 0.6
    return BlockLayout(torch.tensor([[0, 1], [2, 3], [1, 1]], dtype=torch.int32)[None, None], 32, masks)


IDS = torch.arange(LEN_K) // 15
PACKED = torch.tensor([0, 5, 5, 33])
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (5, 2)},
    "offset": {"causal": True, "query_offset": 3},
    "offset tensor": {"query_offset": torch.tensor([-4])},
    "padded right": {"seqlens_q": torch.tensor([LEN_Q, 7]), "seqlens_k": torch.tensor([30, 3]), "causal": True},
    "padded left": {"starts_q": torch.tensor([4, 0]), "starts_k": torch.tensor([9, 36]), "causal": True},
    "key mask": {"mask": (torch.arange(LEN_K) >= torch.tensor([[7], [0]]))[:, None, None]},
    "documents": {"segment_ids_q": IDS[None, -LEN_Q:], "segment_ids_k": IDS[None], "causal": True},
    "packed": {"cu_seqlens_q": torch.tensor([0, 3, 9, 17]), "cu_seqlens_k": PACKED, "causal": True},
    "packed keys": {"seqlens_q": torch.tensor([4, 0, 19]), "cu_seqlens_k": PACKED},
    "layout": {"layout": layout(), "window_size": (30, 9)},
}  # fmt: skip
OTHERS = {"alone": {}, "with others": {"softcap": 1.5, "sinks": torch.tensor([-1.0, 3.0])}}


@backends
@pytest.mark.parametrize("name", MASKS)
def test_equals_the_definition(name, backend):
    """Slopes of each head, or of each batch row of the queries."""
    masking = MASKS[name]
    q, k, v = inputs(3)
    rows_q = 1 if "cu_seqlens_q" in masking else 3 if "seqlens_q" in masking and name != "padded right" else BATCH
    rows_k = 1 if "cu_seqlens_k" in masking else BATCH
    leaves = [x[:rows].detach().requires_grad_() for x, rows in zip((q, k, v), (rows_q, rows_k, rows_k), strict=True)]
    slopes = SLOPES[[0, 1, 0]][:rows_q] if rows_q > 1 else SLOPES[0]
    got = results(leaves, **masking, alibi_slopes=slopes, backend=backend)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    want = results(doubles, reference_attention, spec=AttentionSpec(**masking), alibi_slopes=slopes)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


@backends
@pytest.mark.parametrize("name", OTHERS)
def test_equals_an_explicit_bias(name, backend):
    leaves, options = inputs(), {"causal": True, "dropout_p": 0.2, "backend": backend, **OTHERS[name]}
    distance = (torch.arange(LEN_K) - (torch.arange(LEN_Q)[:, None] + LEN_K - LEN_Q)).abs()
    bias = -SLOPES[:, :, None, None] * distance
    got = results(leaves, alibi_slopes=SLOPES, **options)
    torch.testing.assert_close(got, results(leaves, bias=bias, **options), atol=2e-6, rtol=1e-5)
    more = torch.linspace(-1, 1, LEN_K).expand(1, 1, LEN_Q, LEN_K)
    got = results(leaves, alibi_slopes=SLOPES, bias=more, **options)
    torch.testing.assert_close(got, results(leaves, bias=bias + more, **options), atol=2e-6, rtol=1e-5)


@backends
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0, "bias": torch.linspace(-1, 1, LEN_K).expand(1, 1, 1, -1)}])
def test_slopes_of_zero_change_no_bit(options, backend):
    leaves = inputs(dtype=torch.bfloat16)
    options = options | {"causal": True, "softmax_scale": 0.3, "dropout_p": 0.2, "backend": backend}
    got = results(leaves, alibi_slopes=torch.zeros(HEADS), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, results(leaves, **options), strict=True))


def test_gradient_of_a_bias_that_heads_and_sequences_share():
    """Beside slopes that differ, with the kernel that adds it up."""
    g = torch.Generator().manual_seed(0)
    bias = torch.randn(1, 1, LEN_Q, LEN_K, generator=g)
    q, k, v = (x[:1] for x in inputs())
    options = {"cu_seqlens_q": torch.tensor([0, 7, 19]), "cu_seqlens_k": torch.tensor([0, 20, 37]), "causal": True}
    for masking, tensors in ((options, (q, k, v)), ({"causal": True}, inputs())):
        ours, doubles = (bias.detach().to(x).requires_grad_() for x in (torch.float32, torch.float64))
        slopes = SLOPES[: len(tensors[0])]
        out = attention(*tensors, **masking, bias=ours, alibi_slopes=slopes, backend="triton")
        want, _ = reference_attention(*tensors, AttentionSpec(**masking), bias=doubles, alibi_slopes=slopes)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        (got,), (expected,) = (torch.autograd.grad((x * weight).sum(), b) for x, b in ((out, ours), (want, doubles)))
        torch.testing.assert_close(got.double(), expected, atol=2e-5, rtol=2e-5)


def test_distances_are_exact_far_from_the_first_row():
    """Queries and keys of a sequence that lies behind others, whose positions float32 would round."""
    far = 2**24 + 1
    spec = AttentionSpec(cu_seqlens_q=torch.tensor([0, 0, 3]), cu_seqlens_k=torch.tensor([0, far, far + 5]))
    q = torch.zeros(1, 1, 3, 1)
    k, v = torch.zeros(1, 1, 1, 1).expand(1, 1, far + 5, 1), torch.zeros(1, 1, far + 5, 1)
    v[0, 0, far:, 0] = torch.arange(5.0)
    out = attention(q, k, v, spec, alibi_slopes=torch.ones(1), backend="triton")
    want, _ = reference_attention(q, k[:, :, far:], v[:, :, far:], alibi_slopes=torch.ones(1))
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)


@backends
def test_strided_slopes(backend):
    leaves = inputs()
    want = results(leaves, alibi_slopes=SLOPES, backend=backend)
    for slopes in (SLOPES.T.contiguous().T, torch.stack([SLOPES, -SLOPES], -1)[..., 0]):
        assert all(
            torch.equal(a, b) for a, b in zip(results(leaves, alibi_slopes=slopes, backend=backend), want, strict=True)
        )
