"""Registration with torch.library, and autograd.

The ops are opaque to torch.compile and take plain tensors and numbers. An ordinary eager call goes straight to a thin
`torch.autograd.Function`, because torch's dispatcher costs several times as much on the host. Whatever has something
to do between the caller and the kernel (`_is_plain`) calls the op: compilers and tracers, dispatch modes, tensor
subclasses, forward-mode AD and the transforms of torch.func. The op has the same Function as its autograd kernel, and
a vmap rule (batching.py).
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from hf_flashbsa.kernels import batching
from hf_flashbsa.kernels.dropout import drop_threshold
from hf_flashbsa.kernels.state import NO_EXTRAS, Extras, Params, carried
from hf_flashbsa.spec import TILE, AttentionSpec, Shape

_EXTRAS = ", ".join(f"Tensor? {name}" for name in Extras._fields)
_PARAMS = (
    "float scale, float softcap, int window_left, int window_right, SymInt diagonal, int drop_threshold, "
    "int block_size, bool deterministic, str backend"
)
_COUNT = len(Extras._fields) + len(Params._fields)

_SECOND = "hf_flashbsa: attention has no second derivative; use attn_implementation='eager'."

_library = torch.library.Library("hf_flashbsa", "DEF")
_library.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {_EXTRAS}, {_PARAMS}) -> (Tensor out, Tensor lse)")
_library.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_EXTRAS}, {_PARAMS}, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_library.define(
    "attention_jvp(Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor? bias_t, Tensor? sinks_t, Tensor q, Tensor k, "
    f"Tensor v, Tensor lse, {_EXTRAS}, {_PARAMS}) -> (Tensor out_t, Tensor lse_t)"
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


def _jvp_op(q_t, k_t, v_t, bias_t, sinks_t, q, k, v, lse, *rest):
    out_t, lse_t = _empty_outputs(q, v)
    # Forward mode is rare: one implementation, in torch operations, serves all back ends.
    _backend("torch").jvp((q_t, k_t, v_t, bias_t, sinks_t), q, k, v, lse, out_t, lse_t, *_split(rest))
    return out_t, lse_t


def _forward_fake(q, k, v, *rest):
    return _empty_outputs(q, v)


def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    return _all_tensors(_empty_gradients(q, k, v, _split(rest)[0], rest[-1]), lse)


def _jvp_fake(q_t, k_t, v_t, bias_t, sinks_t, q, k, v, lse, *rest):
    return _empty_outputs(q, v)


def _all_tensors(gradients: tuple[torch.Tensor | None, ...], lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Empty tensors for None, which an op cannot return."""
    return tuple(lse.new_empty(0) if x is None else x for x in gradients)


def _is_plain(*tensors: torch.Tensor | None) -> bool:
    """Whether an op on these would do no more than call its implementation: no mode, transform or tracer is active,
    and the tensors are neither subclasses nor lazily negated, on the meta device or the like."""
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
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


class _Attention(torch.autograd.Function):
    """Attention with first derivatives. With a `setup_context`, torch would bind the arguments anew each time."""

    @staticmethod
    def forward(ctx, q, k, v, bias, sinks, extras, params, modes):
        plain = modes is None
        if plain:
            out, lse = _forward(q, k, v, extras, params)
        else:
            op = torch.ops.hf_flashbsa.attention_forward.default
            out, lse = _below_autograd(op, modes, q, k, v, *extras, *params)
            ctx.save_for_forward(q, k, v, lse, *extras)
        ctx.save_for_backward(q, k, v, out, lse, *carried(extras))
        ctx.params, ctx.plain, ctx.modes = params, plain, modes
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if ctx.plain and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            raise RuntimeError(_SECOND)  # create_graph=True
        need_bias, need_sinks = ctx.needs_input_grad[3:5]
        q, k, v, out, lse, *extras = ctx.saved_tensors
        extras = Extras(*extras) if extras else NO_EXTRAS
        if dout is None:
            dout = torch.zeros_like(out)
        if ctx.plain and _is_plain(dout, dlse):
            gradients = _backward(dout, dlse, q, k, v, out, lse, extras, ctx.params, need_bias)
        else:
            gradients = torch.ops.hf_flashbsa.attention_backward.default(
                dout, dlse, q, k, v, out, lse, *extras, *ctx.params, need_bias
            )
        dq, dk, dv, dbias, dsinks = gradients
        return dq, dk, dv, dbias if need_bias else None, dsinks if need_sinks else None, None, None, None

    @staticmethod
    def jvp(ctx, q_t, k_t, v_t, bias_t, sinks_t, *_):
        q, k, v, lse, *extras = ctx.saved_for_forward
        op = torch.ops.hf_flashbsa.attention_jvp.default
        args = q_t, k_t, v_t, bias_t, sinks_t, q, k, v, lse, *extras, *ctx.params
        if torch._C._functorch.peek_interpreter_stack() is None:
            return op(*args)
        return _below_autograd(op, ctx.modes, *args)  # outer transforms have tangents of their own


class _FirstDerivative(torch.autograd.Function):
    """An op that computes a first derivative; its own is refused where somebody asks for it, never silently 0."""

    @staticmethod
    def forward(ctx, op, modes, *args):
        return _below_autograd(op, modes, *args)

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(_SECOND)

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(_SECOND)


#: `_Attention.apply` for plain tensors: without the part in Python, which looks for functorch's.
_apply_plain = super(torch.autograd.Function, _Attention).apply


def _below_autograd(op, modes: tuple[bool, bool], *args):
    """The op without this level's derivatives, in the grad modes of its caller: outer levels have derivatives too."""
    grad_mode, forward_grad_mode = modes
    with (
        torch.set_grad_enabled(grad_mode),
        forward_ad._set_fwd_grad_enabled(forward_grad_mode),
        torch._C._AutoDispatchBelowAutograd(),
    ):
        return op(*args)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()


def _apply(function: type[torch.autograd.Function], *args):
    """`function.apply` as an op's autograd kernel: torch.func's transforms have come down to one level of their own,
    where a Function is recorded as any other operation is, and needs no `setup_context`."""
    with enable_single_level_autograd_function():
        return super(torch.autograd.Function, function).apply(*args)


def _forward_autograd(q, k, v, *rest):
    extras, params = _split(rest)
    return _apply(_Attention, q, k, v, extras.bias, extras.sinks, extras, params, _modes())


def _register(name: str, implementation, fake, autograd) -> None:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"hf_flashbsa::{name}", fake, lib=_library)
    op = getattr(torch.ops.hf_flashbsa, name).default
    torch.library.register_vmap(f"hf_flashbsa::{name}", functools.partial(batching.run_mapped, op), lib=_library)


def _first_derivative(name: str):
    op = getattr(torch.ops.hf_flashbsa, name).default
    return lambda *args: _apply(_FirstDerivative, op, _modes(), *args)


_register("attention_forward", _forward_op, _forward_fake, _forward_autograd)
_register("attention_backward", _backward_op, _backward_fake, _first_derivative("attention_backward"))
_register("attention_jvp", _jvp_op, _jvp_fake, _first_derivative("attention_jvp"))


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
    # Dynamo refuses to trace a Function that gets one tensor twice, and pays no host cost for the op.
    if torch.compiler.is_compiling() or not _is_plain(q, k, v, extras.bias, extras.sinks):
        return torch.ops.hf_flashbsa.attention_forward.default(q, k, v, *extras, *params)
    if needs_grad:
        return _apply_plain(q, k, v, extras.bias, extras.sinks, extras, params, None)
    return _forward(q, k, v, extras, params)
