"""`attention`: the torch back end against the oracle, dropout, and what is refused."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from cases import random_case, worst_ratio

from hf_flashbsa import AttentionSpec, attention, choose_backend
from hf_flashbsa.kernels import backends
from hf_flashbsa.kernels.torch import pieces
from hf_flashbsa.ops import validation
from hf_flashbsa.ops.api import _bounds_spec, _log_copy
from hf_flashbsa.ops.reference import reference_attention

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IDS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 2, 2]])


@pytest.mark.usefixtures("nan_memory")
@pytest.mark.parametrize("seed", range(150))
def test_random(seed):
    case = random_case(seed, dtypes=DTYPES, max_len=217, dims=(1, 8, 16, 40, 59, 64, 100, 256))
    ratios = worst_ratio(case, "cpu", "torch")
    assert max(ratios.values()) <= 1.0, (str(case), ratios)


def inputs(*, batch=2, heads=4, heads_k=2, len_q=5, len_k=7, dim=4, dim_v=3, dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(0)
    shapes = (batch, heads, len_q, dim), (batch, heads_k, len_k, dim), (batch, heads_k, len_k, dim_v)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softmax_scale": 0.7},
        {"window_size": (2, 1), "softcap": 1.5},
        {"causal": True, "alibi_slopes": torch.tensor([0.3, 0.9])},
        {"seqlens_q": torch.tensor([3, 1]), "seqlens_k": torch.tensor([2, 4])},
        {"mask": torch.rand(2, 2, 3, 4, generator=torch.Generator().manual_seed(1)) < 0.6},
        {"dropout_p": 0.3},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_gradients_in_float64(options):
    """Numerical differentiation, of `lse` too."""
    q, k, v = inputs(heads=2, heads_k=1, len_q=3, len_k=4, dim=2, dim_v=2, dtype=torch.float64, grad=True)
    bias = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def function(q, k, v, bias, sinks):
        torch.manual_seed(0)
        out, lse = attention(q, k, v, bias=bias, sinks=sinks, return_lse=True, **options)
        return out, lse.masked_fill(lse == -math.inf, 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v, bias, sinks))


def test_long_inputs_are_tiled(monkeypatch):
    """The torch back end never holds more scores than it says, and tiles change nothing."""
    q, k, v = inputs(dtype=torch.float64, grad=True)
    bias = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)

    def results():
        torch.manual_seed(0)
        out = attention(q, k, v, causal=True, bias=bias, dropout_p=0.2)
        return out, *torch.autograd.grad(out.sum(), [q, k, v, bias])

    whole = results()
    monkeypatch.setattr(pieces, "MAX_SCORES", 2 * 2 * 4 * 7)
    torch.testing.assert_close(results(), whole)


def test_defaults_and_return_types():
    q, k, v = inputs(dtype=torch.bfloat16)
    out = attention(q, k, v)
    assert out.dtype == torch.bfloat16 and out.shape == (2, 4, 5, 3)
    assert out.transpose(1, 2).is_contiguous(), "models want (B, S, H, D) in memory"
    out, lse = attention(q, k, v, return_lse=True)
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 5)
    want_out, want_lse = reference_attention(q, k, v)
    torch.testing.assert_close(lse, want_lse.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out, want_out.bfloat16(), atol=0.01, rtol=0.01)
    assert attention(*inputs(dtype=torch.float64), return_lse=True)[1].dtype == torch.float64


def test_keywords_and_spec_say_the_same():
    q, k, v = inputs()
    options = {"causal": True, "window_size": (3, None), "seqlens_k": torch.tensor([7, 4])}
    assert torch.equal(attention(q, k, v, **options), attention(q, k, v, AttentionSpec(**options)))


def test_calls_that_share_a_spec():
    """Each is what it is with a spec of its own, whatever came before."""

    def results(spec: AttentionSpec, sizes: dict, options: dict) -> list[torch.Tensor]:
        q, k, v = inputs(**sizes)
        torch.manual_seed(0)
        out = attention(q, k, v, spec, **options)
        return [out.detach(), *(torch.autograd.grad(out.sum(), (q, k, v)) if q.requires_grad else ())]

    def new_spec() -> AttentionSpec:
        return AttentionSpec(causal=True, seqlens_k=torch.tensor([2, 5]))

    sizes = [{}, {"grad": True}, {"len_q": 6}, {"len_k": 9}, {"heads": 2}, {"dim": 6}, {"dtype": torch.bfloat16}]
    options = [{}, {"softmax_scale": 0.3}, {"softcap": 2.0}, {"dropout_p": 0.4}, {"dropout_p": 0.6}]
    calls = [*((x, {}) for x in sizes), *(({}, x) for x in options)]
    shared = new_spec()
    for call in [*calls, *reversed(calls)]:
        got, want = results(shared, *call), results(new_spec(), *call)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), call
    q, k, v = inputs()
    attention(q, k, v, shared)
    with pytest.raises(ValueError, match="seqlens_k: shape"):
        attention(q[:1], k[:1], v[:1], shared)
    with pytest.raises(ValueError, match="v: .*differs from k's"):
        attention(q, k, v[:, :, 1:], shared)


@pytest.mark.parametrize("masking", [{"spec": AttentionSpec(causal=True)}, {"causal": True}], ids=" ".join)
def test_alike_calls_are_validated_and_given_a_back_end_once(masking, monkeypatch):
    called = []

    def count(owner, name: str) -> None:
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: called.append(name) or function(*args))

    count(validation, "check_spec")
    count(backends, "choose_backend")
    _bounds_spec.cache_clear()
    for _ in range(3):
        attention(*inputs(), **masking)
    assert sorted(called) == ["check_spec", "choose_backend"]


def test_keywords_are_refused_after_equal_ones_that_were_not():
    attention(*inputs(), window_size=(3, 1), query_offset=2)
    with pytest.raises(ValueError, match="window_size"):
        attention(*inputs(), window_size=(3.0, 1), query_offset=2)
    with pytest.raises(ValueError, match="query_offset"):
        attention(*inputs(), window_size=(3, 1), query_offset=2.0)


@pytest.mark.parametrize("bias_dtype", [torch.float64, torch.float32, torch.float16])
def test_bias_of_another_dtype(bias_dtype):
    q, k, v = inputs()
    bias = torch.randn(1, 1, 5, 7).to(bias_dtype)
    bias[..., 2] = torch.finfo(bias_dtype).min
    bias.requires_grad_()
    out = attention(q, k, v, bias=bias)
    want, _ = reference_attention(q, k, v, bias=bias)
    torch.testing.assert_close(out.double(), want, atol=1e-5, rtol=1e-5)
    (got,), (expected,) = (torch.autograd.grad(x.sum(), bias) for x in (out, want))
    assert got.dtype == bias_dtype
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_only_what_needs_a_gradient_gets_one():
    q, k, v = inputs()
    assert attention(q, k, v).grad_fn is None
    k.requires_grad_()
    with torch.no_grad():
        assert attention(q, k, v).grad_fn is None
    attention(q, k, v).sum().backward()
    assert q.grad is None and k.grad is not None


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.17, 0.5])
    def test_drops_as_often_as_told(self, p):
        """Equal scores and values of the unit matrix show every weight."""
        torch.manual_seed(0)
        q, v = torch.zeros(4, 4, 256, 8), torch.eye(256).expand(4, 4, -1, -1)
        weights = attention(q, q, v, dropout_p=p) * 256
        assert abs((weights == 0).float().mean().item() - p) <= 0.01
        torch.testing.assert_close(weights[weights > 0], torch.tensor(1 / (1 - p)).expand((weights > 0).sum()))

    def test_repeats_with_the_generator_and_not_without(self):
        q, k, v = inputs(len_q=64, len_k=64)
        torch.manual_seed(1)
        first, second = attention(q, k, v, dropout_p=0.5), attention(q, k, v, dropout_p=0.5)
        torch.manual_seed(1)
        assert torch.equal(attention(q, k, v, dropout_p=0.5), first) and not torch.equal(first, second)

    def test_without_dropout_the_generator_is_left_alone(self):
        torch.manual_seed(1)
        state = torch.get_rng_state()
        attention(*inputs())
        assert torch.equal(torch.get_rng_state(), state)

    def test_heads_rows_and_queries_differ(self):
        torch.manual_seed(0)
        q, k, v = torch.zeros(2, 2, 8, 8), torch.zeros(2, 2, 64, 8), torch.eye(64).expand(2, 2, -1, -1)
        weights = attention(q, k, v, dropout_p=0.5)
        assert len({tuple(row) for row in (weights > 0).flatten(0, 2).tolist()}) == 2 * 2 * 8


class TestChoice:
    @pytest.mark.parametrize(
        "device, dtype, name, reason",
        [
            ("cuda", torch.bfloat16, "triton", None),
            ("cuda", torch.float32, "triton", None),
            ("cuda", torch.float64, "torch", "float64"),
            ("cpu", torch.float32, "torch", "CUDA"),
        ],
    )
    def test_of_a_back_end(self, device, dtype, name, reason):
        chosen = choose_backend(torch.device(device), dtype)
        assert chosen.name == name
        assert chosen.reason is None if reason is None else reason in chosen.reason

    def test_is_logged_once_with_its_reason(self, caplog):
        from hf_flashbsa.kernels.backends import _log_choice

        _log_choice.cache_clear()
        with caplog.at_level(logging.INFO, "hf_flashbsa"):
            attention(*inputs(), AttentionSpec())
            attention(*inputs(), AttentionSpec())
        assert [r.getMessage() for r in caplog.records] == [
            "attention runs on the torch back end: Triton kernels need a CUDA device, not 'cpu'"
        ]


def _call(**changes):
    """`attention` of good inputs, some of them changed by functions."""
    q, k, v = inputs()
    tensors = {"q": q, "k": k, "v": v}
    for name in ("q", "k", "v"):
        if name in changes:
            tensors[name] = changes.pop(name)(tensors[name])
    return attention(**tensors, **changes)


PADDING = torch.ones(2, 1, 1, 6, dtype=torch.bool)
LENGTHS, CU = torch.tensor([5, 2]), torch.tensor([0, 3, 5])
ONE = {name: lambda x: x[:1] for name in "qkv"}
REFUSED = {
    "q of 3 dims": ({"q": lambda x: x[0]}, "q, k, v: shapes .*give .batch, heads, length, head dim"),
    "dtypes differ": ({"v": lambda x: x.half()}, "q, k, v: dtypes .*give one floating dtype"),
    "integers": ({n: lambda x: x.int() for n in "qkv"}, "q, k, v: dtypes .*give one floating dtype"),
    "devices differ": ({"k": lambda x: x.to("meta")}, "q, k, v: on .*move them to one device"),
    "head dims differ": ({"k": lambda x: x[..., :3]}, "k: head dim 3 differs from q's 4"),
    "v's length": ({"v": lambda x: x[:, :, :6]}, "v: .*differs from k's"),
    "head dim 0": ({"q": lambda x: x[..., :0], "k": lambda x: x[..., :0]}, "q and k: head dim 0 .*1..256"),
    "head dim 257": ({n: lambda x: x.repeat(1, 1, 1, 65)[..., :257] for n in "qk"}, "q and k: head dim 257 .*; use"),
    "v's head dim": ({"v": lambda x: x.repeat(1, 1, 1, 86)}, "v: head dim 258 .*1..256; use"),
    "heads": ({"q": lambda x: x[:, :3]}, "q has 3 heads and k has 2; .*multiple"),
    "no heads": ({n: lambda x: x[:, :0] for n in "kv"}, "q has 4 heads and k has 0"),
    "batch sizes": ({n: lambda x: x[:1] for n in "kv"}, "k has 1 batch rows for 2 sequences; give cu_seqlens_k"),
    "dropout 1": ({"dropout_p": 1.0}, "dropout_p: 1.0 is not in"),
    "dropout < 0": ({"dropout_p": -0.1}, "dropout_p: -0.1 is not in"),
    "scale < 0": ({"softmax_scale": -1.0}, "softmax_scale: -1.0 .*negate q"),
    "scale nan": ({"softmax_scale": math.nan}, "softmax_scale: nan"),
    "softcap 0": ({"softcap": 0.0}, "softcap: 0.0 .*leave it out"),
    "back end": ({"backend": "cudnn"}, "backend: 'cudnn' is unknown; give 'auto' or one of"),
    "triton float64": ({"backend": "triton"} | {n: torch.Tensor.double for n in "qkv"}, "'triton' takes .*'torch'"),
    "spec and keyword": ({"spec": AttentionSpec(), "causal": True}, "spec and masking keywords .*put all in spec"),
    "spec and mask": ({"spec": AttentionSpec(), "mask": torch.ones(1, 1, 5, 7) > 0}, "spec and masking keywords"),
    "bias shape": ({"bias": torch.zeros(3, 1, 5, 7)}, "bias: .*broadcast to .2, 4, 5, 7"),
    "bias dims": ({"bias": torch.zeros(5, 7)}, "bias: .*broadcast to"),
    "bias bool": ({"bias": torch.zeros(1, 1, 5, 7) > 0}, "bias: .*give floats"),
    "bias device": ({"bias": torch.zeros(1, 1, 5, 7, device="meta")}, "bias is on meta, q on cpu; move it"),
    "bias of a batch with cu_seqlens": (
        ONE | {"bias": torch.zeros(2, 1, 5, 7), "cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 3, 7])},
        "bias: .2, 1, 5, 7.*broadcast to .1, 4. and the longest sequences",
    ),
    "sinks shape": ({"sinks": torch.zeros(2)}, "sinks: .*give .4,. floats on cpu"),
    "sinks dtype": ({"sinks": torch.zeros(4, dtype=torch.int32)}, "sinks: .*floats"),
    "alibi shape": ({"alibi_slopes": torch.ones(2)}, "alibi_slopes: shape is .2,.; give .4,., or .2, 4. with"),
    "alibi of a batch with cu_seqlens": (
        ONE | {"alibi_slopes": torch.ones(2, 4), "cu_seqlens_q": CU, "cu_seqlens_k": torch.tensor([0, 3, 7])},
        "alibi_slopes: shape is .2, 4.; give .4,.* packed in one row share them",
    ),
    "alibi dtype": ({"alibi_slopes": torch.ones(4).half()}, "alibi_slopes: dtype is torch.float16; give float32"),
    "alibi device": ({"alibi_slopes": torch.ones(4, device="meta")}, "alibi_slopes is on meta, q on cpu; move it"),
    "alibi gradient": (
        {"alibi_slopes": torch.ones(4, requires_grad=True)},
        "alibi_slopes: attention has no derivative by them; give alibi_slopes.detach",
    ),
    "window < 0": ({"window_size": (-1, None)}, "window_size: left is -1; give an integer >= 0, or None"),
    "window float": ({"window_size": (None, 1.5)}, "window_size: right is 1.5; give an integer"),
    "offset float": ({"query_offset": 2.5}, "query_offset: 2.5; give an integer"),
    "window int": ({"window_size": 3}, "window_size: 3; give .left, right."),
    "offset of 2": ({"query_offset": LENGTHS}, "query_offset: .*give an int or one element"),
    "seqlens shape": ({"seqlens_k": torch.tensor([3])}, "seqlens_k: shape is .1,., expected .2,."),
    "seqlens dtype": ({"seqlens_k": LENGTHS.short()}, "seqlens_k: dtype is torch.int16; give int32 or int64"),
    "seqlens device": ({"seqlens_k": LENGTHS.to("meta")}, "seqlens_k is on meta, q on cpu; move it"),
    "seqlens and cu_seqlens": ({"seqlens_k": LENGTHS, "cu_seqlens_k": CU}, "seqlens_k and cu_seqlens_k exclude"),
    "cu_seqlens 2-D": (ONE | {"cu_seqlens_q": CU[None]}, "cu_seqlens_q: shape is .1, 3.; give .sequences . 1,."),
    "cu_seqlens empty": (ONE | {"cu_seqlens_q": CU[:0]}, "cu_seqlens_q: shape is .0,.; give"),
    "cu_seqlens of both": (ONE | {"cu_seqlens_q": CU, "cu_seqlens_k": CU[:2]}, "cu_seqlens_k: .*expected .3,."),
    "cu_seqlens dtype": (ONE | {"cu_seqlens_q": CU.float(), "cu_seqlens_k": CU}, "cu_seqlens_q: dtype is .*float32"),
    "cu_seqlens of a batch": ({"cu_seqlens_q": CU}, "cu_seqlens_q: packed rows need batch size 1, got 2"),
    "cu_seqlens and rows": (ONE | {"cu_seqlens_q": CU}, "k has 1 batch rows for 2 sequences; give cu_seqlens_k"),
    "mask dtype": ({"mask": torch.ones(2, 1, 5, 7)}, "mask: dtype is torch.float32; give a bool mask, or .* `bias`"),
    "mask dims": ({"mask": torch.ones(5, 7) > 0}, "mask: shape is .5, 7.; give .B or 1, H or 1, Sq or 1, Sk."),
    "mask shape": ({"mask": torch.ones(2, 3, 5, 7) > 0}, "mask: shape .* does not broadcast to .2, 4, 5, 7."),
    "mask of one key": ({"mask": torch.ones(2, 1, 5, 1) > 0}, "mask: shape .* does not broadcast"),
    "padding length": ({"mask": PADDING}, "mask or segment_ids_k: shape is .2, 6., expected .2, 7."),
    "mask device": ({"mask": torch.ones(2, 1, 5, 7, device="meta") > 0}, "mask is on meta, q on cpu; move it"),
    "mask and lengths": ({"mask": torch.ones(2, 1, 5, 7) > 0, "seqlens_k": LENGTHS}, "mask and seqlens.* exclude"),
    "segments 1-D": ({"segment_ids_k": torch.zeros(7).long()}, "segment_ids_k: shape is .7,.; give .B or 1, length."),
    "segments of q alone": ({"segment_ids_q": torch.zeros(1, 5).long()}, "segment_ids_q needs segment_ids_k"),
    "segments and lengths": ({"segment_ids_k": torch.zeros(1, 7).long(), "seqlens_k": LENGTHS}, "exclude each other"),
    "segments shape": ({"segment_ids_k": torch.zeros(1, 6).long()}, "segment_ids_k: shape is .1, 6., expected .1, 7."),
    "layout of another kind": ({"layout": torch.ones(1, 1) > 0}, "layout: Tensor; give a BlockLayout"),
    "segments dtype": ({"segment_ids_k": torch.zeros(1, 7)}, "segment_ids_k: dtype is torch.float32; give int32"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """With one error that names the argument and, where it is not plain, the remedy."""
    changes, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        _call(**changes)


STRIDES = {
    "last dimension strided": lambda x: x.mT.contiguous().mT,
    "every other element": lambda x: torch.stack([x, x + 1.0], dim=-1)[..., 0],
    "one element for all": lambda x: x[..., :1].expand_as(x),
    "one head for all": lambda x: x[:, :1].expand_as(x),
    "one row for all": lambda x: x[:1, :, :1].expand_as(x),
}


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("strides", STRIDES)
def test_any_strides(strides, backend):
    """Those of the last dimension cost a copy, others none; gradients go to what was expanded."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(2, h, n, 16, generator=g).requires_grad_() for h, n in ((4, 5), (2, 7), (2, 7))]
    weights = torch.randn(2, 4, 5, 16, generator=g)
    out = attention(*map(STRIDES[strides], leaves), causal=True, backend=backend)
    expected, _ = reference_attention(*map(STRIDES[strides], leaves), AttentionSpec(causal=True))
    torch.testing.assert_close(out.double(), expected.double(), rtol=0, atol=1e-5)
    results = [torch.autograd.grad((x * weights.to(x.dtype)).sum(), leaves) for x in (out, expected)]
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-4)


#: Tensors of masks and scores, for 2 batch rows, 4 heads, 5 queries and 7 keys.
BESIDE = {
    "padding": {"mask": IDS[:, None, None] > 0},
    "segments": {"segment_ids_q": IDS[:, :5], "segment_ids_k": IDS},
    "lengths": {"seqlens_q": torch.tensor([5, 2]), "seqlens_k": torch.tensor([3, 7])},
    "starts": {"starts_k": torch.tensor([0, 3])},
    "mask": {"mask": torch.rand(2, 4, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.6},
    "bias": {"bias": torch.randn(1, 4, 5, 7, generator=torch.Generator().manual_seed(0))},
    "sinks": {"sinks": torch.linspace(-1, 1, 4)},
}


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same values, of which no two lie side by side in memory in the order of the dimensions."""
    last_first = torch.empty([2 * n for n in reversed(x.shape)], dtype=x.dtype)[(slice(None, None, 2),) * x.ndim]
    return last_first.permute(*range(x.ndim)[::-1]).copy_(x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", BESIDE.values(), ids=BESIDE)
def test_any_strides_of_masks_and_scores(options, backend):
    given = {name: spread(x) for name, x in options.items()}
    assert not any(x.is_contiguous() for x in given.values())
    results = []
    for tensors in (given, options):
        leaves = inputs(grad=True)
        leaves += [x.detach().requires_grad_() for x in tensors.values() if x.is_floating_point()]
        own = dict(zip([n for n, x in tensors.items() if x.is_floating_point()], leaves[3:], strict=True))
        out = attention(*leaves[:3], **{**tensors, **own}, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    torch.testing.assert_close(*results)


def test_a_copy_for_its_strides_is_logged_once(caplog):
    _log_copy.cache_clear()
    q = torch.randn(1, 2, 4, 3).mT
    with caplog.at_level(logging.INFO, logger="hf_flashbsa.ops.api"):
        attention(q, q, q)
        attention(q, q, q)
    lines = [line for line in caplog.messages if "not contiguous" in line]
    assert [line.split(",")[0] for line in lines] == [f"attention copies {name}" for name in "qkv"]
