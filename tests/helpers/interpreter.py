"""Makes Triton's CPU interpreter compute in bfloat16 as a GPU does (Triton 3.6 to 3.9; their issue 11584).

The interpreter holds bfloat16 as uint16 and neither multiplies, compares nor rounds those numbers as floats. Products
of matrices and comparisons get float32 operands here, which hold every bfloat16 exactly, and conversions go through
torch, which rounds to nearest even. Arithmetic on bfloat16 elements stays wrong: kernels convert to float32 first, as
they must anyway.

That of Triton 3.9 makes integers of a bool that it spreads over a block, and then rejects them as a mask: they stay
bools here.

It also holds kernels to what they promise of their numbers (`tl.multiple_of`, `tl.max_contiguous`), which the compiler
would believe, and spares the interpreter more than a quarter of its time, which went into looking for the same things
again.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_COMPARISONS = (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal)


def _widened(bits: np.ndarray) -> np.ndarray:
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).float().numpy()


def _narrowed(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).bfloat16().view(torch.uint16).numpy()


def _as_float32(x: TensorHandle) -> TensorHandle:
    return TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _check_promise(x: TensorHandle, name: str, steps: list[int]) -> None:
    """Raises AssertionError unless runs of so many numbers along each dimension, from its first on, follow each other
    ("tt.contiguity"), or begin at multiples of `steps` ("tt.divisibility")."""
    values = x.data.astype(np.int64)
    for dim, step in enumerate(steps):
        if name == "tt.contiguity":
            runs = np.diff(values, axis=dim) == 1
            ends = np.arange(1, values.shape[dim]) % step == 0
            kept = (runs | np.expand_dims(ends, tuple(i for i in range(values.ndim) if i != dim))).all()
        else:
            kept = (values.take(range(0, values.shape[dim], step), axis=dim) % step == 0).all()
        assert kept, f"{name} {steps} of {values} was promised"


@functools.cache
def _builtins(place: object) -> list[str]:
    """Names of the functions that the interpreter replaces in a module or class, which must still have its own."""
    return [name for name, member in inspect.getmembers(place) if tl.core.is_builtin(member)]


def _patch_builtin(place, builder, scope) -> None:
    """The interpreter's own goes through all members, whenever a kernel calls a function: most of them are replaced
    already."""
    for name in _builtins(place):
        member = getattr(place, name)
        if tl.core.is_builtin(member):
            interpreter._patch_attr(place, name, member, builder, scope)


def repair() -> None:
    """Patches the interpreter of this process. Call once, before the first kernel runs."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl
    binary, splat = InterpreterBuilder.binary_op, InterpreterBuilder.create_splat

    def create_dot(self, a, b, acc, *rest):
        return dot(self, _as_float32(a), _as_float32(b), acc, *rest)

    def cast_impl(self, x, dtype):
        if dtype.scalar == tl.bfloat16:
            return TensorHandle(_narrowed(cast(self, _as_float32(x), tl.float32).data), tl.bfloat16)
        return cast(self, _as_float32(x), dtype)

    def binary_op(self, a, b, op):
        if op in _COMPARISONS:
            a, b = _as_float32(a), _as_float32(b)
        return binary(self, a, b, op)

    def create_splat(self, shape, x):
        made = splat(self, shape, x)
        if x.data.dtype == np.bool_:
            made.data = made.data.astype(np.bool_)
        return made

    def set_attr(self, key, value):
        _check_promise(self, key, value)
        self.attr[key] = value

    TensorHandle.set_attr = set_attr
    InterpreterBuilder.binary_op = binary_op
    InterpreterBuilder.create_splat = create_splat
    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    interpreter._patch_builtin = _patch_builtin
    find = interpreter._get_np_dtype
    of_scalar = functools.cache(find)
    interpreter._get_np_dtype = lambda x: find(x) if x.scalar.is_ptr() else of_scalar(x.scalar)
