"""The one public operation: lower the mask, hand tensors to a back end."""

from __future__ import annotations

import dataclasses
import functools
import logging

import torch
from torch.autograd import forward_ad

from hf_flashbsa.kernels.call_plan import OWN, CallPlan, CallTensors
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.spec import AttentionSpec
from hf_flashbsa.ops.autograd import attend
from hf_flashbsa.ops.lowering import lower
from hf_flashbsa.ops.validation import check_alibi_slopes, check_bias, check_sinks

logger = logging.getLogger(__name__)


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
    alibi_slopes: torch.Tensor | None = None,
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
            made once and passed to many calls (the layers of a model) is lowered once.
        causal, window_size, ..., mask, layout: see `AttentionSpec`, which has the same names. Causality is aligned at
            the bottom right, as in FlashAttention since 2.1.
        bias: `(B or 1, Hq or 1, Sq or 1, Sk)`, any float dtype, added to the scaled scores. Its gradient is
            summed over broadcast dimensions. Values at or below the lowest finite number of its dtype hide the
            key, as Transformers' additive masks mean it. With `cu_seqlens_*` it is `(1, Hq or 1, Lq, Lk)`, addressed
            by place in the sequence, the same for all sequences; places that it does not reach are hidden. With
            `starts_*` it is addressed by place in the sequence too. Kernels read it fast where keys lie side by side
            in memory and rows begin at multiples of 16 bytes.
        sinks: `(Hq,)` one extra logit for each query head that takes part in the softmax and has no value
            (gpt-oss). Part of `lse`.
        alibi_slopes: float32 `(Hq,)` or `(B, Hq)`, of ALiBi (Press et al., arXiv 2108.12409) in FlashAttention-2's
            convention: `-slope * |i + Sk - Sq - j|` is added to the scaled score of query `i` and key `j`, as a bias
            is, without a bias in memory. Positions are those of windows: counted from the first row of a sequence,
            with `query_offset` in place of `Sk - Sq` where it is given. `B` is that of `q`, so that sequences packed
            in one row share the slopes. They get no gradient: those that require one are refused.
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
            set by `use_deterministic`, initially True. True wherever torch.use_deterministic_algorithms is on.
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
        raise ValueError("spec and masking keywords (causal, ..., layout) exclude each other; put all in spec.")
    if not q.stride()[-1:] == k.stride()[-1:] == v.stride()[-1:] == (1,):
        q, k, v = _with_unit_stride("q", q), _with_unit_stride("k", k), _with_unit_stride("v", v)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sinks is not None and sinks.requires_grad)
        or torch._C._are_functorch_transforms_active()  # inner transforms do not see what outer ones require
    )
    needs_grad = needs_grad or forward_ad._current_level >= 0
    options = (
        softmax_scale, softcap, dropout_p, is_deterministic(deterministic), backend, bias is not None, needs_grad,
    )  # fmt: skip
    plan = lower(spec, q, k, v, options)
    if bias is not None or sinks is not None or alibi_slopes is not None or dropout_p > 0.0:
        plan = _with_own_tensors(plan, q, k, spec, bias, sinks, alibi_slopes)
    out, lse = attend(q, k, v, plan, needs_grad)
    return (out, lse) if return_lse else out


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
    sizes = (*q.shape[:-1], 1)[max(q.ndim - scale.ndim, 0) :]
    fits = scale.ndim <= q.ndim and all(n in (1, size) for n, size in zip(scale.shape, sizes, strict=False))
    if not fits or scale.is_complex():
        raise ValueError(
            f"softmax_scale: {tuple(scale.shape)} {scale.dtype}; give a number, or real numbers that broadcast to "
            f"(B, Hq, Sq, 1) = {(*q.shape[:-1], 1)}."
        )
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (q.to(dtype) * scale.to(dtype)).to(q.dtype)


def _with_own_tensors(
    plan: CallPlan,
    q: torch.Tensor,
    k: torch.Tensor,
    spec: AttentionSpec,
    bias: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> CallPlan:
    """The plan with the tensors that a call brings itself, and a seed where it drops weights."""
    if bias is not None:
        bias = _expanded_bias(bias, q, k, spec)
    if sinks is not None:
        check_sinks(sinks, q)
        sinks = sinks.to(torch.float64 if q.dtype == torch.float64 else torch.float32).contiguous()
    if alibi_slopes is not None:
        check_alibi_slopes(alibi_slopes, q)
        alibi_slopes = (alibi_slopes[None] if alibi_slopes.ndim == 1 else alibi_slopes).contiguous()
    seed = None
    if plan.scalars.drop_threshold is not None:
        seed = torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=q.device)
    return CallPlan(CallTensors(bias, sinks, alibi_slopes, seed, *plan.tensors[OWN:]), plan.scalars, plan.cache)


def _expanded_bias(bias: torch.Tensor, q: torch.Tensor, k: torch.Tensor, spec: AttentionSpec) -> torch.Tensor:
    packed = spec.cu_seqlens_q is not None or spec.cu_seqlens_k is not None
    check_bias(bias, q, k, packed)
    if not packed:
        bias = bias.expand(-1, -1, q.shape[2], k.shape[2])
    if bias.dtype == torch.float64 and q.dtype != torch.float64:
        bias = bias.clamp(min=torch.finfo(torch.float32).min).to(torch.float32)
    return bias


#: The masking keywords of `attention` that are not given, in the order of the fields of `AttentionSpec`.
_NO_MASKING = tuple(field.default for field in dataclasses.fields(AttentionSpec))


def _spec_of(masking: tuple) -> AttentionSpec:
    """The spec of the masking keywords. One without tensors is made once, so that equal calls share its plans."""
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


class use_deterministic:  # noqa: N801  called as torch.set_grad_enabled is
    """Sets the default of `attention(deterministic=...)` for this process, and with it for models.

    `use_deterministic(False)` holds from now on; `with use_deterministic(False):` until the end of the block.
    """

    def __init__(self, mode: bool = True) -> None:
        global _deterministic
        self._before, _deterministic = _deterministic, bool(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        global _deterministic
        _deterministic = self._before


def is_deterministic(asked: bool | None = None) -> bool:
    """What `attention(deterministic=asked)` means now."""
    return bool(_deterministic if asked is None else asked) or torch._C._get_deterministic_algorithms()
