"""The implementations that are timed, behind one form: inputs in, a function that returns the output out.

A provider raises `Unsupported` with the reason where it cannot run a case. Masks and tables are made outside of the
timed function, since the layers of a model share them. Providers are called, and what they return, within `enabled`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_flashbsa import attention
from hf_flashbsa.bench.cases import Inputs
from hf_flashbsa.bench.layouts import flex_block_mask

#: A function without arguments that returns the output `(B, H, S, D)`, differentiable in `Inputs.leaves`.
Runner = Callable[[], torch.Tensor]


class Unsupported(Exception):
    """The implementation cannot run a case; the message says why."""


def _hf_flashbsa(inputs: Inputs, deterministic: bool = True) -> Runner:
    options = {"bias": inputs.bias, "dropout_p": inputs.case.dropout_p, "deterministic": deterministic}
    return lambda: attention(inputs.q, inputs.k, inputs.v, inputs.spec, **options)


#: Providers that are `scaled_dot_product_attention` on one back end.
SDPA_BACKENDS = {
    "fa2": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def enabled(provider: str) -> contextlib.AbstractContextManager:
    """Within, a provider that is a back end of SDPA is the only one that torch may choose. Kept out of host times."""
    backend = SDPA_BACKENDS.get(provider)
    return contextlib.nullcontext() if backend is None else sdpa_kernel(backend)


def _sdpa(inputs: Inputs) -> Runner:
    """`scaled_dot_product_attention`, on the back ends that are enabled."""
    case, bias = inputs.case, inputs.bias
    plain_causal = bias is None and case.mask == "causal" and case.pattern is None
    mask = None if plain_causal else inputs.mask
    options = {
        "is_causal": plain_causal,
        "dropout_p": case.dropout_p,
        "enable_gqa": case.heads != case.heads_k,
    }

    def run() -> torch.Tensor:
        attn_mask = mask
        if bias is not None:
            attn_mask = bias if mask is None else bias.masked_fill(~mask, float("-inf"))
        return F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, attn_mask, **options)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            run()
        except RuntimeError as error:
            if not re.search("No (available kernel|viable backend)", str(error)):
                raise
            reasons = [str(w.message).split(" (Triggered")[0] for w in caught]
            reasons = [r for r in reasons if "runtime disabled" not in r and not r.endswith("not used because:")]
            raise Unsupported(" ".join(dict.fromkeys(reasons)) or str(error)) from None
    return run


def _torch_flash(inputs: Inputs) -> Runner:
    """FlashAttention-2 as torch ships it. Ragged batches go to the op that SDPA calls, unpadded before and padded
    after within the time, as Transformers' `flash_attention_2` does."""
    case = inputs.case
    if case.mask in ("full", "causal") or case.bias:
        return _sdpa(inputs)
    if inputs.q.device.type != "cuda":
        raise Unsupported("ragged and windowed FlashAttention-2 needs a CUDA device")
    left, right = (case.window, 0) if case.mask == "window" else (None, None)

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        cu_seqlens_q, cu_seqlens_k = (inputs.cu_seqlens_q, inputs.cu_seqlens_k) if q.ndim == 3 else (None, None)
        out, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max(case.queries), max(case.documents), case.dropout_p,
            case.is_packed and case.is_causal, False, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out

    return _ragged(inputs, run)


def _ragged(inputs: Inputs, run: Callable[..., torch.Tensor]) -> Runner:
    """Runs a function of `(B, S, H, D)` tensors, or of `(T, H, D)` tensors without padding where documents differ."""
    case = inputs.case

    def rows() -> tuple[torch.Tensor, ...]:
        return tuple(x.transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))

    if case.is_packed:
        return lambda: run(*(x[0] for x in rows())).transpose(0, 1)[None]
    if case.mask != "padded":
        return lambda: run(*rows()).transpose(1, 2)
    places = inputs.live.flatten().nonzero()[:, 0]
    count = inputs.live.numel()

    def padded() -> torch.Tensor:
        out = run(*(x.flatten(0, 1).index_select(0, places) for x in rows()))
        whole = out.new_zeros(count, *out.shape[1:]).index_copy(0, places, out)
        return whole.unflatten(0, (case.batch, case.length)).transpose(1, 2)

    return padded


def _flash_package(inputs: Inputs, module: str) -> Runner:
    """The flash-attn package: FlashAttention-2, or FlashAttention-4 in `flash_attn.cute`."""
    case = inputs.case
    try:
        package = importlib.import_module(module)
    except ImportError as error:
        raise Unsupported(f"{module} cannot be imported: {error}") from None
    if case.bias:
        raise Unsupported("no additive bias")
    newest = module.endswith("cute")
    if newest and case.dropout_p > 0.0:
        raise Unsupported("no dropout")
    options = {"causal": case.is_causal}
    if case.mask == "window":
        options["window_size"] = (case.window, 0)
    if not newest:
        options["dropout_p"] = case.dropout_p

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if q.ndim == 4:
            out = package.flash_attn_func(q, k, v, **options)
        else:
            ragged = {"cu_seqlens_q": inputs.cu_seqlens_q, "cu_seqlens_k": inputs.cu_seqlens_k}
            ragged |= {"max_seqlen_q": max(case.queries), "max_seqlen_k": max(case.documents)}
            out = package.flash_attn_varlen_func(q, k, v, **ragged, **options)
        return out[0] if isinstance(out, tuple) else out

    return _ragged(inputs, run)


@functools.cache
def _compiled_flex() -> tuple[Callable, Callable]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Beyond the default of 8 shapes, torch.compile would fall back to unfused attention in silence.
    torch._dynamo.config.recompile_limit = 1 << 20
    torch._dynamo.config.accumulated_recompile_limit = 1 << 20
    return torch.compile(flex_attention, dynamic=False), create_block_mask


def _flex(inputs: Inputs) -> Runner:
    """FlexAttention, compiled, with its block mask."""
    case, device = inputs.case, inputs.q.device
    if case.dropout_p > 0.0:
        raise Unsupported("no dropout")
    flex_attention, create_block_mask = _compiled_flex()
    len_q, len_k, lengths, window = inputs.q.shape[2], inputs.k.shape[2], inputs.lengths, case.window
    document_q, document_k = inputs.document_q[0], inputs.document_k[0]
    mask_mods = {
        "causal": lambda b, h, q, k: q >= k,
        "window": lambda b, h, q, k: (q >= k) & (q - k <= window),
        "padded": lambda b, h, q, k: k < lengths[b],
        "packed": lambda b, h, q, k: document_q[q] == document_k[k],
        "packed-causal": lambda b, h, q, k: (document_q[q] == document_k[k]) & (q >= k),
        "packed-ids": lambda b, h, q, k: (document_q[q] == document_k[k]) & (q >= k),
        "packed-cross": lambda b, h, q, k: document_q[q] == document_k[k],
    }
    block_mask = None
    if case.pattern is not None:
        if case.mask not in ("full", "causal"):
            raise Unsupported(f"no layout of blocks together with the mask {case.mask!r}")
        block_mask = flex_block_mask(case.pattern, inputs.layout, case.length, case.is_causal)
    elif case.mask != "full":
        batch = case.batch if case.mask == "padded" else None
        block_mask = create_block_mask(mask_mods[case.mask], batch, None, len_q, len_k, device=device)
    bias = inputs.bias
    score_mod = None if bias is None else lambda score, b, h, q, k: score + bias[0, h, q, k]
    options = {"score_mod": score_mod, "block_mask": block_mask, "enable_gqa": case.heads != case.heads_k}
    return lambda: flex_attention(inputs.q, inputs.k, inputs.v, **options)


def _eager(inputs: Inputs) -> Runner:
    """Attention as Transformers' eager functions write it."""
    case = inputs.case
    group = case.heads // case.heads_k

    def run() -> torch.Tensor:
        k, v = (x.repeat_interleave(group, dim=1) if group > 1 else x for x in (inputs.k, inputs.v))
        scores = inputs.q @ k.mT * case.head_dim**-0.5
        if inputs.bias is not None:
            scores = scores + inputs.bias
        if inputs.mask is not None:
            scores = scores.masked_fill(~inputs.mask, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
        return F.dropout(weights, case.dropout_p) @ v

    return run


PROVIDERS: dict[str, Callable[[Inputs], Runner]] = {
    "hf_flashbsa": _hf_flashbsa,
    "hf_flashbsa_unordered": functools.partial(_hf_flashbsa, deterministic=False),
    "fa2": _torch_flash,
    "cudnn": _sdpa,
    "efficient": _sdpa,
    "math": _sdpa,
    "flex": _flex,
    "flash_attn": functools.partial(_flash_package, module="flash_attn"),
    "fa4": functools.partial(_flash_package, module="flash_attn.cute"),
    "sdpa": _sdpa,
    "eager": _eager,
}
#: Those that know no block layouts, and are timed on the dense problem in their place.
DENSE_PROVIDERS = ("fa2", "cudnn", "flash_attn", "fa4")
GPU_PROVIDERS = ("hf_flashbsa", "fa2", "cudnn", "efficient", "math", "flex", "flash_attn", "fa4")
CPU_PROVIDERS = ("hf_flashbsa", "sdpa", "eager")
