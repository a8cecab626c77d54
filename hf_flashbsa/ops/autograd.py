"""Registration with torch.library, and autograd.

The ops are opaque to torch.compile and take plain tensors and numbers. An ordinary eager call goes straight to a thin
`torch.autograd.Function`, because torch's dispatcher costs several times as much on the host. Whatever has something
to do between the caller and the kernel (`_is_plain`) calls the op: compilers and tracers, dispatch modes, tensor
subclasses, forward-mode AD and the transforms of torch.func. The op has the same Function as its autograd kernel, and
a vmap rule (batching.py).
"""

from __future__ import annotations

import functools
from typing import get_type_hints

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.overrides import has_torch_function_variadic

from hf_flashbsa.kernels.backends import backend_module
from hf_flashbsa.kernels.call_plan import DIFFERENTIABLE, NO_TENSORS, CallPlan, CallScalars, CallTensors, given
from hf_flashbsa.ops import batching

_TENSORS = ", ".join(f"Tensor? {name}" for name in CallTensors._fields)
#: What a schema calls the types of `CallScalars`. An int that is never None may be a symbol of a traced size.
_TYPES = {float: "float", float | None: "float?", int: "SymInt", int | None: "int?", bool: "bool", str: "str"}
_SCALARS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(CallScalars).items())

_SECOND = "hf_flashbsa: attention has no second derivative; use attn_implementation='eager'."

# Selective checkpointing, TRL's for one, saves what ops compute whose name has "flash_attn" in it.
_library = torch.library.Library("hf_flashbsa", "DEF")
_library.define(
    f"flash_attn_forward(Tensor q, Tensor k, Tensor v, {_TENSORS}, {_SCALARS}) -> (Tensor out, Tensor lse)"
)
_library.define(
    "flash_attn_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_TENSORS}, {_SCALARS}, bool need_dbias) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsinks)"
)
_library.define(
    "flash_attn_jvp(Tensor? q_t, Tensor? k_t, Tensor? v_t, Tensor? bias_t, Tensor? sinks_t, Tensor q, Tensor k, "
    f"Tensor v, Tensor lse, {_TENSORS}, {_SCALARS}) -> (Tensor out_t, Tensor lse_t)"
)


def _empty_outputs(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised `out` and `lse`. `out` lies in memory as `(B, Sq, Hq, Dv)`, the order models want it in."""
    batch, heads, length, _ = q.shape
    dim = v.shape[-1]
    out = q.new_empty_strided((batch, heads, length, dim), (length * heads * dim, dim, heads * dim, 1))
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty_strided((batch, heads, length), (heads * length, length, 1), dtype=lse_dtype)
    return out, lse


def _empty_gradients(q, k, v, tensors: CallTensors, need_dbias: bool) -> tuple[torch.Tensor | None, ...]:
    """Uninitialised `dq, dk, dv, dbias, dsinks`; None where there is nothing to return."""
    dbias = dsinks = None
    if need_dbias:
        dbias = torch.empty(tensors.bias.shape, dtype=tensors.bias.dtype, device=q.device)
    if tensors.sinks is not None:
        dsinks = torch.empty_like(tensors.sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), dbias, dsinks


def _forward(q, k, v, plan: CallPlan) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = _empty_outputs(q, v)
    backend_module(plan.scalars.backend).forward(q, k, v, out, lse, plan)
    return out, lse


def _backward(dout, dlse, q, k, v, out, lse, plan: CallPlan, need_dbias: bool):
    gradients = _empty_gradients(q, k, v, plan.tensors, need_dbias)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    backend_module(plan.scalars.backend).backward(dout, dlse, q, k, v, out, lse, gradients, plan)
    return gradients


def _forward_op(q, k, v, *rest):
    return _forward(q, k, v, CallPlan.of_fields(rest))


def _backward_op(dout, dlse, q, k, v, out, lse, *rest):
    return _all_tensors(_backward(dout, dlse, q, k, v, out, lse, CallPlan.of_fields(rest), rest[-1]), lse)


def _jvp_op(q_t, k_t, v_t, bias_t, sinks_t, q, k, v, lse, *rest):
    out_t, lse_t = _empty_outputs(q, v)
    # Forward mode is rare: one implementation, in torch operations, serves all back ends.
    backend_module("torch").jvp((q_t, k_t, v_t, bias_t, sinks_t), q, k, v, lse, out_t, lse_t, CallPlan.of_fields(rest))
    return out_t, lse_t


def _forward_fake(q, k, v, *rest):
    return _empty_outputs(q, v)


def _backward_fake(dout, dlse, q, k, v, out, lse, *rest):
    return _all_tensors(_empty_gradients(q, k, v, CallPlan.of_fields(rest).tensors, rest[-1]), lse)


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
    def forward(ctx, q, k, v, bias, sinks, plan, modes):
        plain = modes is None
        if plain:
            out, lse = _forward(q, k, v, plan)
        else:
            op = torch.ops.hf_flashbsa.flash_attn_forward.default
            out, lse = _below_autograd(op, modes, q, k, v, *plan.tensors, *plan.scalars)
            ctx.save_for_forward(q, k, v, lse, *plan.tensors)
        ctx.save_for_backward(q, k, v, out, lse, *given(plan.tensors))
        ctx.scalars, ctx.cache, ctx.plain, ctx.modes = plan.scalars, plan.cache, plain, modes
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        if ctx.plain and torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            raise RuntimeError(_SECOND)  # create_graph=True
        need_bias, need_sinks = ctx.needs_input_grad[3:5]
        q, k, v, out, lse, *tensors = ctx.saved_tensors
        plan = CallPlan(CallTensors(*tensors) if tensors else NO_TENSORS, ctx.scalars, ctx.cache)
        if dout is None:
            dout = torch.zeros_like(out)
        if ctx.plain and _is_plain(dout, dlse):
            gradients = _backward(dout, dlse, q, k, v, out, lse, plan, need_bias)
        else:
            gradients = torch.ops.hf_flashbsa.flash_attn_backward.default(
                dout, dlse, q, k, v, out, lse, *plan.tensors, *plan.scalars, need_bias
            )
        dq, dk, dv, dbias, dsinks = gradients
        return dq, dk, dv, dbias if need_bias else None, dsinks if need_sinks else None, None, None

    @staticmethod
    def jvp(ctx, q_t, k_t, v_t, bias_t, sinks_t, *_):
        q, k, v, lse, *tensors = ctx.saved_for_forward
        op = torch.ops.hf_flashbsa.flash_attn_jvp.default
        args = q_t, k_t, v_t, bias_t, sinks_t, q, k, v, lse, *tensors, *ctx.scalars
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


def _check_constants(tensors: CallTensors) -> None:
    """Raises ValueError where this level differentiates by a tensor that has no derivative, never silently 0."""
    for name, x in zip(CallTensors._fields, tensors, strict=True):
        if x is not None and x.is_floating_point() and name not in DIFFERENTIABLE:
            has_tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
            if x.requires_grad or has_tangent:
                raise ValueError(f"{name}: attention has no derivative by them; give {name}.detach().")


def _forward_autograd(q, k, v, *rest):
    plan = CallPlan.of_fields(rest)
    _check_constants(plan.tensors)
    return _apply(_Attention, q, k, v, plan.tensors.bias, plan.tensors.sinks, plan, _modes())


def _register(name: str, implementation, fake, autograd) -> None:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    torch.library.register_fake(f"hf_flashbsa::{name}", fake, lib=_library)
    op = getattr(torch.ops.hf_flashbsa, name).default
    torch.library.register_vmap(f"hf_flashbsa::{name}", functools.partial(batching.run_mapped, op), lib=_library)


def _first_derivative(name: str):
    op = getattr(torch.ops.hf_flashbsa, name).default
    return lambda *args: _apply(_FirstDerivative, op, _modes(), *args)


_register("flash_attn_forward", _forward_op, _forward_fake, _forward_autograd)
_register("flash_attn_backward", _backward_op, _backward_fake, _first_derivative("flash_attn_backward"))
_register("flash_attn_jvp", _jvp_op, _jvp_fake, _first_derivative("flash_attn_jvp"))


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: CallPlan, needs_grad: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a call plan. Returns `out` and `lse`."""
    # Dynamo refuses to trace a Function that gets one tensor twice, and pays no host cost for the op.
    if torch.compiler.is_compiling() or not _is_plain(q, k, v, plan.tensors.bias, plan.tensors.sinks):
        return torch.ops.hf_flashbsa.flash_attn_forward.default(q, k, v, *plan.tensors, *plan.scalars)
    if needs_grad:
        return _apply_plain(q, k, v, plan.tensors.bias, plan.tensors.sinks, plan, None)
    return _forward(q, k, v, plan)
