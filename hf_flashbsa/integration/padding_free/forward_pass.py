"""What the parts of one forward pass share, and which part is running.

A pass begins where a hooked module is called outside all others and ends with that call. Nothing in here outlives it:
masks and states of one batch may be written over for the next one, by a collective, numpy or `.data`, without a trace
in the tensor's version counter.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_flashbsa.integration.padding_free.packing import Packing


class ForwardPass:
    """One forward pass of a model, in one thread.

    Attributes:
        packings: id of a padding mask -> the mask, which keeps the id its own, and its `Packing`, None where nothing
            is padded.
        packed_states: padded hidden states that one stack returned -> their `Packing` and packed form, for a stack
            that would pack them again.
    """

    def __init__(self):
        self.packings: dict[int, tuple[torch.Tensor, Packing | None]] = {}
        self.packed_states: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._running: list[tuple[nn.Module, Any]] = []

    @property
    def plan(self) -> Any:
        """That of the innermost running module that has one."""
        return next((plan for _, plan in reversed(self._running) if plan is not None), None)


_CURRENT: ContextVar[ForwardPass | None] = ContextVar("forward_pass", default=None)


def current_pass() -> ForwardPass | None:
    """The pass that runs in this thread, if any."""
    return _CURRENT.get()


def current_plan() -> Any:
    """The plan of the innermost module that entered the pass with one."""
    forward = _CURRENT.get()
    return None if forward is None else forward.plan


def enter(module: nn.Module, plan: Any = None) -> ForwardPass:
    """Begins a module's part of the current pass, or a new pass if there is none.

    A module that is running already was interrupted (Ctrl-C skips hooks): what its pass knew is out of date.
    """
    forward = _CURRENT.get()
    if forward is None or any(module is running for running, _ in forward._running):
        forward = ForwardPass()
        _CURRENT.set(forward)
    forward._running.append((module, plan))
    return forward


def leave(module: nn.Module) -> Any:
    """Ends the module's part of the pass, and the pass with its outermost module. Returns the module's plan.

    Does nothing for a module that did not enter, since one of its pre-hooks raised before.
    """
    forward = _CURRENT.get()
    if forward is None or not any(module is running for running, _ in forward._running):
        return None
    while True:
        running, plan = forward._running.pop()
        if running is module:
            break
    if not forward._running:
        _CURRENT.set(None)
    return plan
