"""Whether tensors are ordinary ones, or stand for others inside a compiler, a tracer or a transform."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes


def is_eager() -> bool:
    """Whether tensors hold values that Python may read, and may outlive what runs now: no compiler, tracer, dispatch
    mode or `torch.func` transform is active."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def may_keep() -> bool:
    """Whether what is made of tensors now may serve later calls: within a transform of `torch.func`, results are
    wrapped, and the wrappers die with the transform."""
    return torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """A context in which new tensors are ordinary ones on the CPU, whatever mode, transform, `torch.jit.trace` or
    default device is active around it."""
    trace = torch._C._get_tracing_state()
    with _disable_current_modes(), temporarily_clear_interpreter_stack(), torch.device("cpu"):
        if trace is None:
            yield
            return
        torch._C._set_tracing_state(None)
        try:
            yield
        finally:
            torch._C._set_tracing_state(trace)
