"""The oracle itself: against torch's SDPA in float64, and against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from hf_flashbsa import AttentionSpec
from hf_flashbsa.ops.reference import reference_attention

POSITIONS = torch.arange(7), torch.arange(9)


def _inputs(len_q: int = 7, len_k: int = 9, heads: int = 4, heads_k: int = 2, dim: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (2, heads, len_q, dim), (2, heads_k, len_k, dim), (2, heads_k, len_k, 3)
    return [torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _band(left: int, right: int) -> torch.Tensor:
    """`(7, 9)`, query `i` standing at key `i + 2`: bottom-right alignment."""
    ahead = POSITIONS[1] - (POSITIONS[0][:, None] + 2)
    return (ahead >= -left) & (ahead <= right)


MASK = torch.rand(2, 4, 7, 9, generator=torch.Generator().manual_seed(1)) < 0.6
IDS_Q = torch.tensor([[0, 0, 1, 1, 2, 2, -1], [3] * 7])
IDS_K = torch.tensor([[0, 1, 1, 1, 2, 0, -1, -1, 2], [3] * 6 + [4] * 3])
SPECS = {
    "full": ({}, torch.ones(7, 9, dtype=torch.bool)),
    "causal": ({"causal": True}, _band(9, 0)),
    "window": ({"window_size": (3, 1)}, _band(3, 1)),
    "causal window": ({"causal": True, "window_size": (3, None)}, _band(3, 0)),
    "right window only": ({"window_size": (None, 1)}, _band(9, 1)),
    "offset": ({"causal": True, "query_offset": 0}, POSITIONS[1] <= POSITIONS[0][:, None]),
    "offset tensor": ({"causal": True, "query_offset": torch.tensor([1])}, POSITIONS[1] <= POSITIONS[0][:, None] + 1),
    "mask": ({"mask": MASK}, MASK),
    "padding": ({"mask": MASK[:, :1, :1]}, MASK[:, :1, :1]),
    "causal mask of a head": ({"mask": MASK[:1, :, :1], "causal": True}, MASK[:1, :, :1] & _band(9, 0)),
    "segments": (
        {"segment_ids_q": IDS_Q, "segment_ids_k": IDS_K},
        ((IDS_Q[..., None] == IDS_K[:, None]) & (IDS_K >= 0)[:, None])[:, None],
    ),
    "key segments": ({"segment_ids_k": IDS_K}, (IDS_K == 0)[:, None, None]),
    "lengths": (
        {"seqlens_q": torch.tensor([4, 7]), "seqlens_k": torch.tensor([9, 2])},
        ((POSITIONS[0] < torch.tensor([[4], [7]]))[..., None] & (POSITIONS[1] < torch.tensor([[9], [2]]))[:, None])[
            :, None
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("softmax_scale", [None, 0.3])
@pytest.mark.parametrize("name", SPECS)
def test_masks_heads_and_scale(name, softmax_scale):
    options, mask = SPECS[name]
    q, k, v = inputs = _inputs()
    out, lse = reference_attention(q, k, v, AttentionSpec(**options), softmax_scale=softmax_scale)
    mask = mask.expand(2, 4, 7, 9)
    blind = ~mask.any(-1)
    want = sdpa(q, k, v, mask, scale=softmax_scale, enable_gqa=True).masked_fill(blind[..., None], 0.0)
    torch.testing.assert_close(out, want)
    assert torch.equal(lse == -math.inf, blind)
    dout = torch.randn(out.shape, dtype=out.dtype)
    torch.testing.assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(want, inputs, dout))


@pytest.mark.parametrize("rows, heads", [(1, 1), (1, 4), (2, 1), (2, 4)])
def test_bias_broadcast(rows, heads):
    q, k, v = _inputs()
    bias = torch.randn(rows, heads, 7, 9, dtype=torch.float64, requires_grad=True)
    out, _ = reference_attention(q, k, v, bias=bias)
    want = sdpa(q, k, v, bias.expand(2, 4, -1, -1), enable_gqa=True)
    torch.testing.assert_close(out, want)
    dout = torch.randn(out.shape, dtype=out.dtype)
    got, expected = (torch.autograd.grad(x, bias, dout, retain_graph=True)[0] for x in (out, want))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("hidden", [-math.inf, torch.finfo(torch.float64).min])
def test_bias_values_that_hide(hidden):
    q, k, v = _inputs()
    bias = torch.zeros(1, 1, 7, 9, dtype=torch.float64)
    bias[..., 4:] = hidden
    bias[..., 2, :] = hidden
    out, lse = reference_attention(q, k, v, bias=bias)
    want, _ = reference_attention(q, k[:, :, :4], v[:, :, :4])
    assert not out[:, :, 2].any() and (lse[:, :, 2] == -math.inf).all()
    rest = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(out[:, :, rest], want[:, :, rest])


def test_packed_sequences_are_computed_alone():
    q, k, v = _inputs(len_q=7, len_k=9)
    q, k, v = q[:1], k[:1], v[:1]
    cu_q, cu_k = torch.tensor([0, 2, 2, 6]), torch.tensor([0, 4, 5, 8])
    out, lse = reference_attention(q, k, v, AttentionSpec(causal=True, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k))
    for a, b, c, d in ((0, 2, 0, 4), (2, 6, 5, 8)):
        want = reference_attention(q[:, :, a:b], k[:, :, c:d], v[:, :, c:d], AttentionSpec(causal=True))
        torch.testing.assert_close((out[:, :, a:b], lse[:, :, a:b]), want)
    assert not out[:, :, 6:].any() and (lse[:, :, 6:] == -math.inf).all()


def _scores(*scores: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One query with these scores at scale 1, and values 1, 2, ..."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor(scores, dtype=torch.float64)[None, None, :, None]
    return q, k, torch.arange(1.0, len(scores) + 1, dtype=torch.float64)[None, None, :, None]


def test_softmax_by_hand():
    out, lse = reference_attention(*_scores(0.0, math.log(3)), softmax_scale=1.0)
    assert out.item() == pytest.approx(1 / 4 * 1 + 3 / 4 * 2)
    assert lse.item() == pytest.approx(math.log(4))


def test_sink_takes_weight_and_has_no_value():
    sinks = torch.tensor([math.log(4)], dtype=torch.float64)
    out, lse = reference_attention(*_scores(0.0, math.log(3)), sinks=sinks, softmax_scale=1.0)
    assert out.item() == pytest.approx(1 / 8 * 1 + 3 / 8 * 2)
    assert lse.item() == pytest.approx(math.log(8))


def test_sink_alone_is_not_a_key():
    q, k, v = _scores(1.0)
    mask = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    out, lse = reference_attention(q, k, v, AttentionSpec(mask=mask), sinks=torch.ones(1, dtype=torch.float64))
    assert out.item() == 0.0 and lse.item() == -math.inf


def test_softcap_by_hand():
    out, lse = reference_attention(*_scores(0.0, 6.0), softcap=2.0, softmax_scale=0.5)
    capped = 2 * math.tanh(0.5 * 6.0 / 2)
    assert lse.item() == pytest.approx(math.log(1 + math.exp(capped)))
    assert out.item() == pytest.approx((1 + 2 * math.exp(capped)) / (1 + math.exp(capped)))


def test_softcap_comes_before_the_bias():
    bias = torch.tensor([0.0, 3.0], dtype=torch.float64)[None, None, None]
    _, lse = reference_attention(*_scores(0.0, 6.0), softcap=2.0, softmax_scale=0.5, bias=bias)
    assert lse.item() == pytest.approx(math.log(1 + math.exp(2 * math.tanh(0.5 * 6.0 / 2) + 3.0)))


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 2)])
def test_alibi_is_a_bias_that_grows_with_the_distance(shape):
    """From the last query, which stands at the last key."""
    q, k, v = (x.detach() for x in _inputs(len_q=2, len_k=3, heads=2))
    slopes = torch.tensor([0.5, 0.25, 2.0, 4.0])[: math.prod(shape)].view(shape)
    distance = torch.tensor([[1.0, 0.0, 1.0], [2.0, 1.0, 0.0]], dtype=torch.float64)
    bias = -slopes.view(-1, 2, 1, 1) * distance
    torch.testing.assert_close(
        reference_attention(q, k, v, alibi_slopes=slopes, softcap=2.0),
        reference_attention(q, k, v, bias=bias, softcap=2.0),
    )


def test_alibi_of_packed_sequences_and_offsets():
    """Each counts from its own first query and key; an offset moves the queries."""
    q, k, v = (x.detach()[:1] for x in _inputs(len_q=4, len_k=5))
    slopes = torch.rand(4)
    cu_q, cu_k = torch.tensor([0, 1, 4]), torch.tensor([0, 3, 5])
    out, _ = reference_attention(q, k, v, AttentionSpec(cu_seqlens_q=cu_q, cu_seqlens_k=cu_k), alibi_slopes=slopes)
    alone, _ = reference_attention(q[:, :, 1:], k[:, :, 3:], v[:, :, 3:], alibi_slopes=slopes)
    torch.testing.assert_close(out[:, :, 1:], alone)
    distance = (torch.arange(5) - (torch.arange(4)[:, None] - 2)).abs()
    moved, _ = reference_attention(q, k, v, AttentionSpec(query_offset=-2), alibi_slopes=slopes)
    bias = (-slopes.double()[:, None, None] * distance)[None]
    torch.testing.assert_close(moved, reference_attention(q, k, v, AttentionSpec(), bias=bias)[0])


def test_dropout_by_hand():
    keep = torch.tensor([False, True])[None, None, None]
    out, lse = reference_attention(*_scores(0.0, math.log(3)), dropout_p=0.2, keep=keep, softmax_scale=1.0)
    assert out.item() == pytest.approx(3 / 4 * 2 / 0.8)
    assert lse.item() == pytest.approx(math.log(4))


def test_dropout_needs_its_mask():
    with pytest.raises(ValueError, match="keep"):
        reference_attention(*_scores(0.0), dropout_p=0.1)


def test_precision():
    q, k, v = (x.detach().to(torch.bfloat16) for x in _inputs())
    assert reference_attention(q, k, v)[0].dtype == torch.float64
    out, lse = reference_attention(q, k, v, dtype=None)
    assert out.dtype == lse.dtype == torch.bfloat16
