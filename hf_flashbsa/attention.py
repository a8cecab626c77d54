"""The one public operation: validate, choose a back end, hand tensors over."""

from __future__ import annotations

import functools
import logging
import math
import os
from typing import NamedTuple

import torch

from hf_flashbsa.kernels.autograd import attend, resolve
from hf_flashbsa.kernels.state import Extras, Params
from hf_flashbsa.layout import BlockLayout
from hf_flashbsa.spec import AttentionSpec, Shape

logger = logging.getLogger(__name__)

MAX_HEAD_DIM = 256
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("torch", "triton")


class Backend(NamedTuple):
    """A back end and, where it is not the fastest one known, why it was chosen."""

    name: str
    reason: str | None = None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (None, None),
    query_offset: int | torch.Tensor | None = None,
    seqlens_q: torch.Tensor | None = None,
    seqlens_k: torch.Tensor | None = None,
    starts_q: torch.Tensor | None = None,
    starts_k: torch.Tensor | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    segment_ids_q: torch.Tensor | None = None,
    segment_ids_k: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    layout: BlockLayout | None = None,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    softmax_scale: float | torch.Tensor | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention: `dropout(softmax(softcap(scale * q @ k.T) + bias)) @ v` over the visible keys.

    Differentiable once in `q`, `k`, `v`, `bias`, `sinks`, a tensor `softmax_scale` and the returned `lse`, in reverse
    and in forward mode; the transforms of `torch.func` apply. The same inputs give the same bits, forward and, if
    `deterministic`, backward. Memory is linear in the lengths. A query that sees no key gives 0, gradient 0 and `lse`
    -inf.

    Args:
        q: queries `(B, Hq, Sq, D)`, float32, float16 or bfloat16 (float64 on the torch back end); any strides;
            tensors whose last dimension is not contiguous are copied. `1 <= D <= 256`.
        k, v: `(B, Hkv, Sk, D)` and `(B, Hkv, Sk, Dv)`, dtype and device of `q`. `Hq` is a multiple of `Hkv`;
            query head `h` reads key head `h // (Hq // Hkv)`.
        spec: which scores exist; instead of the thirteen keywords from `causal` to `layout`, which build one. A spec
            made once and passed to many calls (the layers of a model) derives its tile tables once.
        causal, window_size, query_offset, seqlens_q, seqlens_k, starts_q, starts_k, cu_seqlens_q, cu_seqlens_k,
        segment_ids_q, segment_ids_k, mask, layout: see `AttentionSpec`. Causality is aligned at the bottom right, as
            in FlashAttention since 2.1.
        bias: `(B or 1, Hq or 1, Sq or 1, Sk)`, any float dtype, added to the scaled scores. Its gradient is
            summed over broadcast dimensions. Values at or below the lowest finite number of its dtype hide the
            key, as Transformers' additive masks mean it. With `cu_seqlens_*` it is `(1, Hq or 1, Lq, Lk)`, addressed
            by place in the sequence, the same for all sequences; places that it does not reach are hidden. With
            `starts_*` it is addressed by place in the sequence too. Kernels read it fast where keys lie side by side
            in memory and rows begin at multiples of 16 bytes.
        sinks: `(Hq,)` one extra logit for each query head that takes part in the softmax and has no value
            (gpt-oss). Part of `lse`.
        softmax_scale: factor >= 0; default `1 / sqrt(D)`. A tensor (a learned temperature) that broadcasts to
            `(B, Hq, Sq, 1)` is multiplied into `q`, with gradient; it may be negative.
        softcap: `s -> softcap * tanh(s / softcap)` on the scaled scores (Gemma 2), > 0.
        dropout_p: probability in [0, 1) to drop a weight, in steps of 2**-16; kept weights are divided by the
            keep probability. The mask is a function of torch's generator
            state, of batch row, head and query row, and of the key's place in its sequence: the same on every
            back end.
        return_lse: also return the log-sum-exp of the scores.
        deterministic: False lets Hopper GPUs add up the gradient of `q` in any order where that is faster: its bits
            vary from run to run, within the same error. It takes 4 bytes of memory for each element of `q`. Default:
            what `use_deterministic` said, at first True. True wherever torch.use_deterministic_algorithms is on.
        backend: "auto", "torch" or "triton". `choose_backend` tells what "auto" means for given tensors.

    Returns:
        `(B, Hq, Sq, Dv)` in the dtype of `q`, laid out in memory as `(B, Sq, Hq, Dv)`; with `return_lse` also
        float32 `(B, Hq, Sq)` in natural log (float64 for float64 inputs).

    Raises:
        ValueError: an argument that does not fit; the message names it and the remedy.
    """
    if isinstance(softmax_scale, torch.Tensor):
        q, softmax_scale = _scaled(q, softmax_scale), 1.0
    if isinstance(dropout_p, torch.Tensor) or isinstance(softcap, torch.Tensor):
        raise ValueError("softcap, dropout_p: give Python numbers; tensors would lose their gradients.")
    masking = (
        causal, window_size, query_offset, seqlens_q, seqlens_k, starts_q, starts_k,
        cu_seqlens_q, cu_seqlens_k, segment_ids_q, segment_ids_k, mask, layout,
    )  # fmt: skip
    if spec is None:
        spec = _spec_of(masking)
    elif masking != _NO_MASKING:
        raise ValueError(
            "spec and masking keywords (causal, window_size, ..., layout) exclude each other; put all in spec."
        )
    q, k, v = _with_unit_stride("q", q), _with_unit_stride("k", k), _with_unit_stride("v", v)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
        or torch._C._are_functorch_transforms_active()  # inner transforms do not see what outer ones require
    )
    has_bias, repeats = bias is not None, _is_deterministic(deterministic)
    options = (softmax_scale, softcap, dropout_p, repeats, backend, has_bias, needs_grad)
    # All that `_resolve` depends on: the calls of a model's layers are alike and are validated once.
    arguments = (
        q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        q.stride(), k.stride(), v.stride(), options,
    )  # fmt: skip
    extras, params = spec.kept("call", arguments, lambda: _resolve(q, k, v, spec, *options))
    if bias is not None:
        bias = _broadcast_bias(bias, q, k, spec)
        if bias.dtype == torch.float64 and q.dtype != torch.float64:
            bias = bias.clamp(min=torch.finfo(torch.float32).min).to(torch.float32)
        sequences = spec.sequence_table(_shape(q, k), q.device) if needs_grad else None
        extras = extras._replace(bias=bias, sequences=sequences)
    if sinks is not None:
        if sinks.shape != (q.shape[1],) or not sinks.is_floating_point() or sinks.device != q.device:
            raise ValueError(
                f"sinks: {tuple(sinks.shape)} {sinks.dtype} on {sinks.device}; "
                f"give ({q.shape[1]},) floats on {q.device}."
            )
        extras = extras._replace(sinks=sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32))
    if dropout_p > 0.0:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=q.device)
        extras = extras._replace(seed=seed)
    out, lse = attend(q, k, v, extras, params, needs_grad)
    return (out, lse) if return_lse else out


_NO_MASKING = (False, (None, None)) + (None,) * 11


def _spec_of(masking: tuple) -> AttentionSpec:
    """The spec of the masking keywords: one without tensors is kept, and with it what calls found out of it."""
    causal, window_size, query_offset = masking[:3]
    if (
        masking[3:] == _NO_MASKING[3:]
        and (query_offset is None or type(query_offset) is int)
        and type(window_size) is tuple
        and len(window_size) == 2
        and not torch.compiler.is_compiling()
        # Sizes may be symbols of something that traces.
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    ):
        return _bounds_spec(causal, *window_size, query_offset)
    return AttentionSpec(*masking)


@functools.lru_cache(64, typed=True)
def _bounds_spec(causal: bool, left: int | None, right: int | None, query_offset: int | None) -> AttentionSpec:
    return AttentionSpec(causal, (left, right), query_offset)


_deterministic = True


def use_deterministic(mode: bool) -> None:
    """Sets the default of `attention(deterministic=...)` for this process, and with it for models."""
    global _deterministic
    _deterministic = bool(mode)


def _is_deterministic(wish: bool | None) -> bool:
    return bool(_deterministic if wish is None else wish) or torch.are_deterministic_algorithms_enabled()


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What `backend="auto"` runs for tensors of this device and dtype, and why."""
    if device.type == "cuda":
        if dtype not in TRITON_DTYPES:
            return Backend("torch", f"Triton kernels take float32, float16 and bfloat16, not {dtype}")
        return Backend("triton")
    return Backend("torch", f"Triton kernels need a CUDA device, not {device.type!r}")


def _resolve_backend(backend: str, q: torch.Tensor) -> str:
    if backend == "auto":
        chosen = choose_backend(q.device, q.dtype)
        if chosen.reason is not None and not torch.compiler.is_compiling():
            _log_choice(chosen)
        return chosen.name
    if backend not in BACKENDS:
        raise ValueError(f"backend: {backend!r} is unknown; give 'auto' or one of {BACKENDS}.")
    if backend == "triton" and q.dtype not in TRITON_DTYPES:
        raise ValueError(
            f"backend: 'triton' takes float32, float16 and bfloat16, not {q.dtype}; cast, or use 'torch'."
        )
    if backend == "triton" and q.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend: 'triton' needs a CUDA device, and q is on the CPU; use 'auto' or 'torch'.")
    return backend


@functools.cache
def _log_choice(backend: Backend) -> None:
    logger.info("attention runs on the %s back end: %s", backend.name, backend.reason)


def _with_unit_stride(name: str, x: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy in which elements of the last dimension lie side by side, as kernels load them."""
    if x.ndim == 0 or x.stride(-1) == 1 or x.shape[-1] == 1:
        return x
    if not torch.compiler.is_compiling():
        _log_copy(name)
    return x.contiguous()


@functools.cache
def _log_copy(name: str) -> None:
    logger.info("attention copies %s, whose last dimension is not contiguous: kernels load it with stride 1", name)


def _scaled(q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`q * scale`, rounded once."""
    if scale.ndim > 4 or (scale.ndim > 0 and scale.shape[-1] != 1):
        raise ValueError(
            f"softmax_scale: {tuple(scale.shape)}; give a number, or a tensor that broadcasts to (B, Hq, Sq, 1)."
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) * scale.to(dtype)).to(q.dtype)


def _shape(q: torch.Tensor, k: torch.Tensor) -> Shape:
    return Shape(q.shape[0], k.shape[0], q.shape[2], k.shape[2])


def _resolve(
    q, k, v, spec, softmax_scale, softcap, dropout_p, deterministic: bool, backend, has_bias: bool, needs_grad: bool
) -> tuple[Extras, Params]:
    """Validates all arguments of `attention` but `bias` and `sinks`, and gives them the back ends' form."""
    backend = _resolve_backend(backend, q)
    _validate(q, k, v, spec)
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else float(softmax_scale)
    if not 0.0 <= scale < math.inf:
        raise ValueError(f"softmax_scale: {scale} is not a finite number >= 0; negate q for a negative scale.")
    if softcap is not None and not 0.0 < softcap < math.inf:
        raise ValueError(f"softcap: {softcap} is not a finite number > 0; leave it out for no cap.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p: {dropout_p} is not in [0, 1).")
    return resolve(
        spec, _shape(q, k), q.shape[1], q.device, scale, softcap, dropout_p, deterministic, backend, has_bias,
        needs_grad,
    )  # fmt: skip


def _validate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: AttentionSpec) -> None:
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            f"q, k, v: shapes are {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; "
            "give (batch, heads, length, head dim) each."
        )
    (_, heads, _, dim), (_, heads_k, _, dim_k), dim_v = q.shape, k.shape, v.shape[-1]
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise ValueError(f"q, k, v: dtypes are {q.dtype}, {k.dtype}, {v.dtype}; give one floating dtype.")
    if not (q.device == k.device == v.device):
        raise ValueError(f"q, k, v: on {q.device}, {k.device}, {v.device}; move them to one device.")
    if dim != dim_k:
        raise ValueError(f"k: head dim {dim_k} differs from q's {dim}.")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v: {tuple(v.shape[:3])} (batch, heads, length) differs from k's {tuple(k.shape[:3])}.")
    for name, size in (("q and k", dim), ("v", dim_v)):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"{name}: head dim {size} is outside 1..{MAX_HEAD_DIM}; use sdpa or eager for this model."
            )
    if heads_k == 0 or heads % heads_k:
        raise ValueError(f"q has {heads} heads and k has {heads_k}; q's must be a multiple of k's.")
    spec.validate(_shape(q, k), heads, q.device)


def _broadcast_bias(bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    packed = spec.cu_seqlens_q is not None or spec.cu_seqlens_k is not None
    full = (1 if packed else q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    fits = bias.ndim == 4 and all(b in (1, s) for b, s in zip(bias.shape[: 2 if packed else 4], full, strict=False))
    if not fits or not bias.is_floating_point():
        want = f"{full[:2]} and the longest sequences' queries and keys" if packed else str(full)
        raise ValueError(f"bias: {tuple(bias.shape)} {bias.dtype}; give floats that broadcast to {want}.")
    if bias.device != q.device:
        raise ValueError(f"bias is on {bias.device}, q on {q.device}; move it there.")
    return bias if packed else bias.expand(-1, -1, full[2], full[3])
