"""The transforms of torch.func on `attention` and on models: per-sample gradients, Jacobians, forward mode."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

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


def layout() -> BlockLayout:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 32, 32, generator=generator) < 0.6
    return BlockLayout(torch.randint(4, (1, HEADS, 2, 2), generator=generator, dtype=torch.int32), 32, masks)


def plain(q, k, v, bias):
    """Causal attention in torch's own operations, which every transform knows."""
    k, v = (x.repeat_interleave(HEADS // HEADS_K, 1) for x in (k, v))
    s = (q @ k.mT / DIM**0.5 + bias).masked_fill(torch.ones(LEN_Q, LEN_K).triu(LEN_K - LEN_Q + 1) > 0, -torch.inf)
    return torch.softmax(s, -1) @ v


def causal(q, k, v, bias, backend: str):
    return attention(q, k, v, bias=bias, causal=True, backend=backend)


LENGTHS = torch.tensor([[3, 7], [7, 1], [5, 0]])
IDS_Q, IDS_K = torch.randint(2, (SAMPLES, BATCH, LEN_Q)), torch.randint(-1, 2, (SAMPLES, BATCH, LEN_K))
SLOPES = torch.rand(SAMPLES, BATCH, HEADS, generator=torch.Generator().manual_seed(0))
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
    "slopes of all": ({"alibi_slopes": SLOPES[0], "seqlens_k": LENGTHS}, ("seqlens_k",)),
    "slopes of each sample and row": ({"alibi_slopes": SLOPES, "causal": True}, ("alibi_slopes",)),
    "slopes of each head of all": ({"alibi_slopes": SLOPES[0, 0], "starts_k": LENGTHS}, ("starts_k",)),
}


def differentiable(options: dict) -> list[str]:
    return [name for name in ("bias", "sinks") if name in options]


def loss(q, k, v, options: dict, run) -> torch.Tensor:
    out, lse = run(q, k, v, **options)
    weight = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return (out * weight).sum() + torch.where(lse.isinf(), 0, lse).sin().sum()


def ours(q, k, v, backend: str, **options):
    return attention(q, k, v, **options, return_lse=True, backend=backend)


def oracle(q, k, v, **options):
    names = ("bias", "sinks", "alibi_slopes", "softmax_scale", "softcap")
    given = {name: options.pop(name) for name in names if name in options}
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


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "torch") for name in OPTIONS), *((name, "triton") for name in OPTIONS if " of all" not in name)],
)
def test_per_sample_gradients(name, backend):
    options, mapped = OPTIONS[name]
    inputs = tensors(SAMPLES, BATCH)
    assert_near(per_sample_gradients(inputs, options, mapped, backend), expected_gradients(inputs, options, mapped))


@backends
@pytest.mark.parametrize("mapped", [(), ("seqlens_k",)])
def test_per_sample_gradients_of_block_layouts(backend, mapped):
    inputs = tensors(2, 1, len_q=40, len_k=40)
    lengths = torch.tensor([[40], [33]])
    options = {"layout": layout(), "seqlens_k": lengths if mapped else lengths[1], "causal": True}
    want = expected_gradients(inputs, options, mapped, count=2)
    assert_near(per_sample_gradients(inputs, options, mapped, backend), want)


def test_per_sample_gradients_of_layouts_of_each_row():
    """A grid for each batch row, as selections from queries and keys make them."""
    grids = torch.randint(2, (SAMPLES, BATCH, HEADS, 2, 2), dtype=torch.int32)
    inputs = tensors(SAMPLES, BATCH, len_q=40, len_k=50)

    def value(leaves, grid):
        return loss(*leaves, {"layout": BlockLayout(grid, 32)}, functools.partial(ours, backend="torch"))

    got = vmap(grad(value))(list(inputs), grids)
    for i in range(SAMPLES):
        options = {"layout": BlockLayout(grids[i], 32)}
        want = expected_gradients([x[i : i + 1] for x in inputs], options, (), count=1)
        assert_near([x[i : i + 1] for x in got], want)


@backends
@pytest.mark.parametrize(
    "bias", [None, draw(SAMPLES, 1, HEADS, 5, 5), draw(1, HEADS, 5, 5)], ids=["slopes", "biases", "bias"]
)
def test_per_sample_gradients_of_packed_rows(backend, bias):
    ends = torch.tensor([[0, 2, 6, 8], [0, 3, 3, 8], [0, 4, 8, 8]])
    inputs = tensors(SAMPLES, 1, len_q=8, len_k=8)
    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "causal": True}
    mapped = ("cu_seqlens_q", "cu_seqlens_k")
    if bias is not None:
        options["bias"] = bias
        mapped += ("bias",) if bias.ndim == 5 else ()
    else:
        options["alibi_slopes"] = SLOPES[:, 0]
        mapped += ("alibi_slopes",)
    assert_near(per_sample_gradients(inputs, options, mapped, backend), expected_gradients(inputs, options, mapped))


def test_nested_maps_over_any_dimension():
    q, k, v = tensors(2, 3, 1)
    bias = draw(2, 1, HEADS, LEN_Q, LEN_K)
    arguments = q.movedim(1, -1), k[:, 0], v.movedim(1, 2), bias

    def nested(function):
        inner = vmap(function, in_dims=(-1, None, 1, None))
        return vmap(inner, in_dims=(0, 0, 0, 0), out_dims=1)

    def gradients(function):
        return nested(grad(lambda *x: function(*x).square().sum(), argnums=(0, 1, 2, 3)))

    ours = functools.partial(causal, backend="torch")
    torch.testing.assert_close(nested(ours)(*arguments), nested(plain)(*arguments))
    torch.testing.assert_close(gradients(ours)(*arguments), gradients(plain)(*arguments), atol=1e-5, rtol=1e-5)


@backends
def test_jacobians_and_tangents(backend):
    ours = functools.partial(causal, backend=backend)
    arguments = (*tensors(BATCH), draw(1, HEADS, LEN_Q, LEN_K))
    tangents = tuple(draw(*x.shape, seed=7) for x in arguments)
    transforms = {
        "jvp": lambda f: jvp(f, arguments, tangents),
        "jvp of keys": lambda f: jvp(lambda k: f(arguments[0], k, *arguments[2:]), arguments[1:2], tangents[1:2]),
        "linearize": lambda f: linearize(f, *arguments)[1](*tangents),
        "vjp": lambda f: vjp(f, *arguments)[1](draw(BATCH, HEADS, LEN_Q, DIM_V)),
        "grad of vmap": lambda f: grad(lambda *x: vmap(f, in_dims=(0, 0, 0, None))(*x).sin().sum(), (0, 1, 2, 3))(
            *(x[:, None] for x in arguments[:3]), arguments[3]
        ),
    }
    if backend == "torch":  # a call for each of hundreds of entries
        transforms |= {
            "jacrev": lambda f: jacrev(f, (0, 1, 2, 3))(*arguments),
            "jacfwd": lambda f: jacfwd(f, (0, 1, 2, 3))(*arguments),
        }
    for name, transform in transforms.items():
        want = transform(plain)
        torch.testing.assert_close(transform(ours), want, atol=2e-5, rtol=2e-5, msg=f"{name}: {{}}".format)


@backends
@pytest.mark.parametrize(
    "name", ["causal window", "lengths of all", "masks", "biases", "one bias", "sinks", "slopes of all", "layout"]
)
def test_tangents_of_options(name, backend):
    """Those of the oracle in float64, of `out` and `lse`, along all inputs."""
    options, mapped = OPTIONS.get(name, ({"layout": layout(), "causal": True}, ()))
    options = {key: x[0] if key in mapped else x for key, x in options.items()}
    if name == "masks":
        options["mask"] = options["mask"] | (torch.arange(LEN_K) == 0)  # the oracle's tangents of blind rows are NaN
    names = differentiable(options)
    inputs = (*tensors(BATCH), *(options[n] for n in names))
    tangents = tuple(draw(*x.shape, seed=7) for x in inputs)

    def run(function, *leaves):
        return function(*leaves[:3], **{**options, **dict(zip(names, leaves[3:], strict=True))})

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        got = [forward_ad.unpack_dual(x).tangent for x in run(functools.partial(ours, backend=backend), *duals)]
    doubles = [tuple(x.double() for x in xs) for xs in (inputs, tangents)]
    _, want = jvp(functools.partial(run, oracle), *doubles)
    live = torch.isfinite(want[1])
    assert_near(
        [got[0] * live[..., None], got[1] * live], [want[0].nan_to_num() * live[..., None], want[1].nan_to_num()]
    )
    assert not got[0][~live].any()


@backends
def test_second_derivatives_are_never_zeros(backend):
    """They are refused where they are asked for, and not before."""
    q, k, v = tensors(1)
    others = k, v, torch.zeros(1, 1, 1, LEN_K)

    def energy(q):
        return causal(q, *others, backend).square().sum()

    def tangent(x):
        return jvp(energy, (x,), (torch.ones_like(x),))[1]

    for twice in (
        hessian(energy),
        grad(lambda x: grad(energy)(x).sum()),
        jacrev(jacfwd(energy)),
        jacfwd(jacfwd(energy)),
        jacfwd(grad(energy)),
        grad(tangent),
        lambda x: jvp(grad(energy), (x,), (torch.ones_like(x),)),
        lambda x: jvp(tangent, (x,), (torch.ones_like(x),)),
        lambda x: torch.autograd.grad(grad(energy)(x.requires_grad_()).sum(), x),
        lambda x: torch.autograd.grad(tangent(x.requires_grad_()), x),
    ):
        with pytest.raises(RuntimeError, match="hf_flashbsa: attention has no second derivative.*'eager'"):
            twice(q.clone())
    slope = grad(lambda c: grad(lambda c: energy(q) * c**3)(c))(torch.tensor(2.0))
    torch.testing.assert_close(slope, 12 * energy(q))


@pytest.mark.parametrize("transform", [grad, jacfwd, jacrev])
def test_derivatives_by_slopes_are_never_zeros(transform):
    """They are refused at the level that asks for them, be there others within."""
    q, k, v = tensors(1)

    def energy(slopes, inner):
        return inner(lambda q: attention(q, k, v, alibi_slopes=slopes).sum())(q).sum()

    for inner in (lambda f: f, grad, lambda f: lambda q: jvp(f, (q,), (q,))[1]):
        with pytest.raises(ValueError, match="alibi_slopes: attention has no derivative by them"):
            transform(functools.partial(energy, inner=inner))(torch.ones(HEADS))


def test_batched_gradients_of_ordinary_calls():
    arguments = [x.requires_grad_() for x in (*tensors(BATCH), draw(1, HEADS, LEN_Q, LEN_K))]
    directions = draw(4, BATCH, HEADS, LEN_Q, DIM_V)

    def gradients(function):
        return torch.autograd.grad(function(*arguments), arguments, directions, is_grads_batched=True)

    torch.testing.assert_close(gradients(functools.partial(causal, backend="torch")), gradients(plain))


@backends
def test_random_numbers_of_samples(backend):
    q, k, v = tensors(BATCH)

    def dropped(q, k, v):
        return attention(q, k, v, dropout_p=0.5, backend=backend)

    samples = [x.expand(2, *x.shape) for x in (q, k, v)]
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(dropped)(*samples)
    torch.manual_seed(0)
    want = dropped(q, k, v)
    torch.manual_seed(0)
    same = vmap(dropped, randomness="same")(*samples)
    assert torch.equal(same, torch.stack([want, want]))
    different = vmap(dropped, randomness="different")(*samples)
    assert not torch.equal(different[0], different[1])
    torch.manual_seed(0)
    (jacobian,) = vjp(lambda q: dropped(q, k, v), q)[1](torch.ones_like(want))
    leaf = q.clone().requires_grad_()
    torch.manual_seed(0)
    assert torch.equal(jacobian, torch.autograd.grad(dropped(leaf, k, v).sum(), leaf)[0])


def test_jacobians_drop_what_the_output_dropped():
    """Each row of a Jacobian comes of one forward pass, whatever row of a batch it is computed in."""
    q, k, v = tensors(BATCH)

    def dropped(q):
        torch.manual_seed(0)
        return attention(q, k, v, dropout_p=0.5)

    torch.testing.assert_close(jacrev(dropped)(q), torch.autograd.functional.jacobian(dropped, q))


def test_specs_and_layouts_outlive_transforms():
    """What they keep for later calls is made of ordinary tensors."""
    q, k, v = tensors(1, len_q=40, len_k=40)
    spec = AttentionSpec(causal=True, seqlens_k=torch.tensor([33]), layout=layout())
    grad(lambda q: attention(q, k, v, spec).sum())(q)
    jvp(lambda q: attention(q, k, v, spec), (q,), (q,))
    leaf = q.clone().requires_grad_()
    for backend in ("torch", "triton"):
        out = attention(leaf, k, v, spec, backend=backend)
        torch.testing.assert_close(out.double(), reference_attention(q, k, v, spec)[0], atol=1e-5, rtol=1e-5)
        out.sum().backward()


def test_compiled_transforms():
    inputs = tensors(SAMPLES, BATCH)

    def per_sample(*samples):
        return vmap(grad(lambda *x: attention(*x, causal=True).square().sum(), argnums=(0, 1, 2)))(*samples)

    torch._dynamo.reset()
    compiled = torch.compile(per_sample, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), per_sample(*inputs))
