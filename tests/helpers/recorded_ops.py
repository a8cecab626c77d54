"""A stand-in for CUDA graphs on the CPU: repeats recorded operations on the tensors that they read and wrote."""

from __future__ import annotations

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out


class OpCapturer:
    """`GraphCapturer` of layer_graphs.py. Python runs once, and results stay where they were written first."""

    def __init__(self, device):
        self.device = device

    @staticmethod
    def check(device):
        pass

    @contextlib.contextmanager
    def session(self):
        state = torch.get_rng_state()
        yield
        torch.set_rng_state(state)

    def clear(self):
        pass

    def capture(self, work):
        with _Ops() as ops:
            work()

        @torch.no_grad()
        def replay():
            for func, args, kwargs, out in ops.calls:
                new = func(*args, **kwargs)
                for a, b in zip(tree_leaves(out), tree_leaves(new), strict=True):
                    if isinstance(a, torch.Tensor) and a.data_ptr() != b.data_ptr():
                        a.copy_(b)

        return replay
