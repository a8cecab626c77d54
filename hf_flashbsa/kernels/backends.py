"""Which back end a call runs on, and which one ran."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch

logger = logging.getLogger("hf_flashbsa")

TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
BACKENDS = ("torch", "triton")


class Backend(NamedTuple):
    """A back end and, where it is not the fastest one known, why it was chosen."""

    name: str
    reason: str | None = None


def choose_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """What `backend="auto"` runs for tensors of this device and dtype, and why."""
    if device.type == "cuda":
        if dtype not in TRITON_DTYPES:
            return Backend("torch", f"Triton kernels take float32, float16 and bfloat16, not {dtype}")
        return Backend("triton")
    return Backend("torch", f"Triton kernels need a CUDA device, not {device.type!r}")


def resolve_backend(backend: str, q: torch.Tensor) -> str:
    """The back end that `attention(..., backend=backend)` runs on.

    Raises:
        ValueError: there is no such back end, or it cannot take `q`.
    """
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


@functools.cache
def backend_module(name: str) -> ModuleType:
    """The module of a back end; Triton is imported only when its back end first runs."""
    return importlib.import_module(f"hf_flashbsa.kernels.{name}.backend")


class _LastForward(threading.local):
    ran: str | None = None


_last_forward = _LastForward()


def note_forward(ran: str) -> None:
    """Called by whoever computed or launched a forward pass: "torch", "triton" or "gluon_sm90"."""
    _last_forward.ran = ran


def take_forward() -> str | None:
    """What computed this thread's last forward pass since the last time that it was asked; None where none ran."""
    ran, _last_forward.ran = _last_forward.ran, None
    return ran


_launching: ContextVar[bool] = ContextVar("launching", default=True)


@contextlib.contextmanager
def launches_nothing() -> Iterator[None]:
    """Within, in this thread, Triton kernels are compiled instead of launched, and give zeros."""
    before = _launching.set(False)
    try:
        yield
    finally:
        _launching.reset(before)


def is_launching() -> bool:
    """Whether Triton kernels run: not within `launches_nothing`."""
    return _launching.get()
