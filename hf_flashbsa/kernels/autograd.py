"""Registration with torch.library, and autograd.

The forward and backward ops are opaque to torch.compile and take plain tensors and numbers. Eager calls go
through a thin `torch.autograd.Function`, because the autograd formula that torch.library itself generates costs
several times as much on the host; the op carries the same formula for those who call it directly. The Function
itself calls an op only where torch's dispatcher has something to do (`_is_plain`).
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch.overrides import has_torch_function_variadic

from hf_flashbsa.kernels.dropout import drop_threshold
from hf_flashbsa.kernels.state import NO_EXTRAS, Extras, Params, carried
from hf_flashbsa.spec import TILE, AttentionSpec, Shape

_EXTRAS = ", ".join(f"Tensor? {name}" for name in Extras._fields)
_PARAMS = (
    "float scale, float softcap, int window_left, int window_right, SymInt diagonal, int drop_threshold, "
    "int block_size, bool deterministic, str backend"
)
_COUNT = len(Extras._fields) + len(Params._fields)

_library = torch.library.Library("hf_flashbsa", "DEF")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_PARAMS}) -> (Tensor out, Tensor lse)")
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_EXTRAS}, {_PARAMS}, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)


@functools.cache
def _backend(name: str):
    """The module of a back end; Triton is imported only when its back end first runs."""
    return importlib.import_module(f"hf_flashbsa.kernels.{name}_backend")


def _split(rest: tuple) -> tuple[Extras, Params]:
    cut = len(Extras._fields)
    return Extras(*rest[:cut]), Params(*rest[cut:_COUNT])


def _empty_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised `out` and `lse`. `out` lies in memory as `(B, Sq, Hq, Dv)`, the order models want it in."""
    batch, heads, length, _ = q.shape
    dim = v.shape[-1]
    out = q.new_empty_strided((batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty_strided((batch, heads, length), (heads * length, length, 1), dtype=lse_dtype)
    return out, lse


def _empty_gradients(q, k, v, extras: Extras, need_dbias: bool) -> tuple[torch.Tensor | None, ...]:
    """Uninitialised `dq, dk, dv, dbias, dsinks`; None where there is nothing to return."""
    dbias = dsinks = None
    if need_dbias:
        dbias = torch.empty(extras.bias.shape, dtype=extras.bias.dtype, device=q.device)
    if extras.sinks is not None:
        dsinks = torch.empty_like(extras.sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def _forward(q, k, v, extras: Extras, params: Params) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty_outputs(q, v)
    _backend(params.backend).forward(q, k, v, out, lse, extras, params)
    return out, lse


def _backward(dout, dlse, q, k, v, out, lse, extras: Extras, params: Params, need_dbias: bool):
    gradients = _empty_gradients(q, k, v, extras, need_dbias)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    _backend(params.backend).backward(dout, dlse, q, k, v, out, lse, gradients, extras, params)
    return gradients


def _forward_op(q, k, v, *rest):
    return _forward(q, k, v, *_split(rest))


def _backward_op(dout, dlse, q, k, v, out, lse, *rest):
    return _all_tensors(_backward(dout, dlse, q, k, v, out, lse, *_split(rest), rest[-1]), lse)


def _forward_fake(q, k, v, *rest):
    return _empty_outputs(q, v)


def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    return _all_tensors(_empty_gradients(q, k, v, _split(rest)[0], rest[-1]), lse)


def _all_tensors(gradients: tuple[torch.Tensor | None, ...], lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Empty tensors for None, which an op cannot return."""
    return tuple(lse.new_empty(0) if x is None else x for x in gradients)


_library.impl("attention_forward", _forward_op, "CompositeExplicitAutograd")
_library.impl("attention_backward", _backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("hf_flashbsa::attention_forward", _forward_fake, lib=_library)
torch.library.register_fake("hf_flashbsa::attention_backward", _backward_fake, lib=_library)


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on these would do no more than call its implementation: no mode or transform is active, and the
    tensors are neither subclasses nor lazily negated, on the meta device or the like."""
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    if has_torch_function_variadic(*tensors):
        return False
    plain = _plain_keys(tensors[0].device)
    for x in tensors:
        if x is not None and torch._C._dispatch_keys(x).raw_repr() not in plain:
            return False
    return True


@functools.cache
def _plain_keys(device: torch.device) -> frozenset[int]:
    """The dispatch keys of ordinary tensors and of those made in inference mode."""
    if device.type not in ("cpu", "cuda"):
        return frozenset()
    keys = set()
    for inference in (False, True):
        with torch.inference_mode(inference):
            keys.add(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr())
    return frozenset(keys)


def _forward_eager(q, k, v, extras: Extras, params: Params, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward pass, not recorded. Below its autograd layer, which is slow in Python, where it is called as op."""
    if plain:
        return _forward(q, k, v, extras, params)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.hf_flashbsa.attention_forward.default(q, k, v, *extras, *params)


def _gradients(ctx, dout, dlse, need_dbias: bool) -> tuple[torch.Tensor | None, ...]:
    """`dq, dk, dv, dbias, dsinks`, from what `_keep` kept. The last two are None or empty where not needed."""
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("hf_flashbsa: attention has no second derivative; use attn_implementation='eager'.")
    q, k, v, out, lse, *extras = ctx.saved_tensors
    extras = Extras(*extras) if extras else NO_EXTRAS
    if dout is None:
        dout = torch.zeros_like(out)
    if ctx.plain and _is_plain(dout, dlse):
        return _backward(dout, dlse, q, k, v, out, lse, extras, ctx.params, need_dbias)
    return torch.ops.hf_flashbsa.attention_backward.default(
        dout, dlse, q, k, v, out, lse, *extras, *ctx.params, need_dbias
    )


def _keep(ctx, q, k, v, out, lse, extras: Extras, params: Params, plain: bool) -> None:
    ctx.save_for_backward(q, k, v, out, lse, *carried(extras))
    ctx.params, ctx.plain = params, plain
    ctx.set_materialize_grads(False)


def _keep_of_op(ctx, inputs, output) -> None:
    q, k, v, *rest = inputs
    _keep(ctx, q, k, v, *output, *_split(rest), plain=False)


def _gradients_of_op(ctx, dout, dlse) -> tuple[torch.Tensor | None, ...]:
    need_bias, _, need_sinks = ctx.needs_input_grad[3:6]
    dq, dk, dv, dbias, dsinks = _gradients(ctx, dout, dlse, need_bias)
    rest = dbias if need_bias else None, None, dsinks if need_sinks else None
    return dq, dk, dv, *rest, *(None,) * (_COUNT - 3)


torch.library.register_autograd(
    "hf_flashbsa::attention_forward", _gradients_of_op, setup_context=_keep_of_op, lib=_library
)


class _Attention(torch.autograd.Function):
    """The same for eager calls. With a `setup_context` of its own, torch would bind the arguments anew each time."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, extras, params, plain):
        out, lse = _forward_eager(q, k, v, extras, params, plain)
        _keep(ctx, q, k, v, out, lse, extras, params, plain)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        need_bias, need_sinks = ctx.needs_input_grad[3:5]
        dq, dk, dv, dbias, dsinks = _gradients(ctx, dout, dlse, need_bias)
        return dq, dk, dv, dbias if need_bias else None, dsinks if need_sinks else None, None, None, None


#: `_Attention.apply` for plain tensors: without the part in Python, which looks for functorch's.
_apply_plain = super(torch.autograd.Function, _Attention).apply


def resolve(
    spec: AttentionSpec,
    shape: Shape,
    heads: int,
    device: torch.device,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    deterministic: bool,
    backend: str,
    has_bias: bool,
    needs_grad: bool,
) -> tuple[Extras, Params]:
    """What the ops take of a valid spec and of numbers. `Extras` without the caller's own tensors."""
    # The torch back end computes a whole sequence at once.
    tile = TILE if backend == "triton" else max(shape.len_q, shape.len_k, 1)
    mask = spec.mask
    if mask is not None:
        mask = mask.expand(shape.batch_q, heads, shape.len_q, shape.len_k)
    left, right = spec.window
    layout = spec.layout
    segment_ids_q, segment_ids_k = spec.segment_ids(shape)
    extras = Extras(
        mask=mask,
        segment_ids_q=segment_ids_q,
        segment_ids_k=segment_ids_k,
        # A bias is read, and keys are dropped, by places that count from the first row of a sequence in steps.
        work_q=spec.work("q", shape, device, tile, divided=not has_bias),
        work_k=spec.work("k", shape, device, tile, divided=not (has_bias or dropout_p > 0.0)) if needs_grad else None,
        grid=None if layout is None else layout.grid,
        mask_words=None if layout is None else layout.mask_words(),
        blocks_q=None if layout is None else layout.table("q"),
        blocks_k=None if layout is None or not needs_grad else layout.table("k"),
    )
    params = Params(
        scale=scale,
        softcap=float(softcap or 0.0),
        window_left=-1 if left is None else int(left),
        window_right=-1 if right is None else int(right),
        diagonal=int(spec.diagonal(shape)),
        drop_threshold=drop_threshold(dropout_p),
        block_size=0 if layout is None else layout.block_size,
        deterministic=deterministic,
        backend=backend,
    )
    return NO_EXTRAS if all(x is None for x in extras) else extras, params


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extras: Extras, params: Params, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention` of what is valid and resolved. Returns `out` and `lse`."""
    # Dynamo refuses to trace a Function that gets one tensor twice; it pays no host cost for the op's own formula.
    if torch.compiler.is_compiling():
        return torch.ops.hf_flashbsa.attention_forward.default(q, k, v, *extras, *params)
    plain = _is_plain(q, k, v, extras.bias, extras.sinks)
    if needs_grad:
        apply = _apply_plain if plain else _Attention.apply
        return apply(q, k, v, extras.bias, extras.sinks, extras, params, plain)
    return _forward_eager(q, k, v, extras, params, plain)
