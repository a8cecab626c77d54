"""Which back end ran for which layer."""

from __future__ import annotations

import weakref

import torch

_BACKENDS: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def note_backend(module: torch.nn.Module, backend: str) -> None:
    _BACKENDS[module] = backend


def backends_used(model: torch.nn.Module) -> dict[str, str]:
    """Which back end computed each attention layer's last call: module name -> "torch" or "triton".

    Only layers of `model` whose attention came to this package are listed: none where the model runs another
    implementation, or computes its attention itself. Calls compiled by `torch.compile` leave no record.
    """
    return {name: _BACKENDS[module] for name, module in model.named_modules() if module in _BACKENDS}
