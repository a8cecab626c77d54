"""The transforms of torch.func on `attention` and on models: per-sample gradients, Jacobians, forward mode."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.func import grad, vmap

from hf_flashbsa import AttentionSpec, BlockLayout, attention
from hf_flashbsa.ops.reference import reference_attention

SAMPLES, BATCH, HEADS, HEADS_K, LEN_Q, LEN_K, DIM, DIM_V = 3, 2, 2, 1, 5, 7, 8, 6
backends = pytest.mark.parametrize("backend", ["torch", "triton"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def tensors(*leading: int, len_q: int = LEN_Q, len_k: int = LEN_K) -> tuple[torch.Tensor, ...]:
    return (
        draw(*leading, HEADS, len_q, DIM),
        draw(*leading, HEADS_K, len_k, DIM, seed=1),
        draw(*leading, HEADS_K, len_k, DIM_V, seed=2),
    )


def layout(seed: int = 0) -> BlockLayout:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 32, 32, generator=generator) < 0.6
    return BlockLayout(torch.randint(4, (1, HEADS, 2, 3), generator=generator, dtype=torch.int32), 32, masks)


LENGTHS = torch.tensor([[3, 7], [7, 1], [5, 0]])
IDS_Q, IDS_K = torch.randint(2, (SAMPLES, BATCH, LEN_Q)), torch.randint(-1, 2, (SAMPLES, BATCH, LEN_K))
MASK = torch.rand(SAMPLES, BATCH, 1, LEN_Q, LEN_K, generator=torch.Generator().manual_seed(0)) < 0.6
#: Options of a call, those with a leading dimension of SAMPLES by name.
OPTIONS = {
    "plain": ({}, ()),
    "causal window": ({"causal": True, "window_size": (3, None), "softmax_scale": 0.4, "softcap": 4.0}, ()),
    "padding of each sample": ({"mask": MASK[:, :, :, :1]}, ("mask",)),
    "padding of all": ({"mask": MASK[0, :, :, :1]}, ()),
    "masks": ({"mask": MASK, "causal": True}, ("mask",)),
    "lengths": ({"seqlens_k": LENGTHS}, ("seqlens_k",)),
    "lengths of all": ({"seqlens_k": LENGTHS[0], "seqlens_q": LENGTHS[0].clamp(max=5), "causal": True}, ()),
    "starts": ({"starts_k": LENGTHS, "causal": True}, ("starts_k",)),
    "segments": ({"segment_ids_q": IDS_Q, "segment_ids_k": IDS_K}, ("segment_ids_q", "segment_ids_k")),
    "keys' segments of all": ({"segment_ids_q": IDS_Q, "segment_ids_k": IDS_K[0]}, ("segment_ids_q",)),
    "offsets": ({"causal": True, "query_offset": torch.tensor([0, 1, 3])}, ("query_offset",)),
    "biases": ({"bias": draw(SAMPLES, BATCH, HEADS, LEN_Q, LEN_K)}, ("bias",)),
    "one bias": ({"bias": draw(1, 1, LEN_Q, LEN_K), "seqlens_k": LENGTHS}, ("seqlens_k",)),
    "biases of all rows": ({"bias": draw(SAMPLES, 1, HEADS, 1, LEN_K)}, ("bias",)),
    "bias of each row": ({"bias": draw(BATCH, 1, LEN_Q, LEN_K)}, ()),
    "sinks": ({"sinks": draw(HEADS), "seqlens_k": LENGTHS}, ("seqlens_k",)),
    "sinks of each sample": ({"sinks": draw(SAMPLES, HEADS), "causal": True}, ("sinks",)),
}


def differentiable(options: dict) -> list[str]:
    return [name for name, x in options.items() if isinstance(x, torch.Tensor) and x.is_floating_point()]


def loss(q, k, v, options: dict, run) -> torch.Tensor:
    out, lse = run(q, k, v, **options)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum() + torch.where(lse.isinf(), 0, lse).sin().sum()


def ours(q, k, v, backend: str, **options):
    return attention(q, k, v, **options, return_lse=True, backend=backend)


def oracle(q, k, v, **options):
    given = {name: options.pop(name) for name in ("bias", "sinks", "softmax_scale", "softcap") if name in options}
    return reference_attention(q, k, v, AttentionSpec(**options), **given)


def expected_gradients(inputs, options: dict, mapped: tuple[str, ...], count: int = SAMPLES) -> list[torch.Tensor]:
    """Gradients of `loss` for each sample by the oracle, in float64, one sample after the other."""
    names = differentiable(options)
    samples = []
    for i in range(count):
        own = {name: x[i] if name in mapped else x for name, x in options.items()}
        q, k, v, *rest = [
            x.double().requires_grad_() for x in (*(x[i] for x in inputs), *(own[name] for name in names))
        ]
        own |= dict(zip(names, rest, strict=True))
        value = loss(q, k, v, own, oracle)
        samples.append(torch.autograd.grad(value, [q, k, v, *rest]))
    return [torch.stack(x) for x in zip(*samples, strict=True)]


def per_sample_gradients(inputs, options: dict, mapped: tuple[str, ...], backend: str) -> list[torch.Tensor]:
    names = differentiable(options)
    others = {name: x for name, x in options.items() if name not in names and name in mapped}
    fixed = {name: x for name, x in options.items() if name not in names and name not in mapped}

    def value(leaves: list, others: dict):
        q, k, v, *rest = leaves
        given = {**fixed, **others, **dict(zip(names, rest, strict=True))}
        return loss(q, k, v, given, functools.partial(ours, backend=backend))

    dims = [0, 0, 0, *(0 if name in mapped else None for name in names)]
    return vmap(grad(value), in_dims=(dims, 0))([*inputs, *(options[name] for name in names)], others)


def assert_near(got, want) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


@backends
@pytest.mark.parametrize("name", OPTIONS)
def test_per_sample_gradients(name, backend):
    options, mapped = OPTIONS[name]
    inputs = tensors(SAMPLES, BATCH)
    assert_near(per_sample_gradients(inputs, options, mapped, backend), expected_gradients(inputs, options, mapped))
