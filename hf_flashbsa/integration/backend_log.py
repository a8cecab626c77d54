"""Which back end ran for which layer."""

from __future__ import annotations

import weakref

import torch

_BACKENDS: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()


def note_backend(module: torch.nn.Module, ran: str | None) -> None:
    """Remembers what computed a layer's call; None where nothing ran, as for tensors without data."""
    if ran is not None and _BACKENDS.get(module) != ran:
        _BACKENDS[module] = ran


def backends_used(model: torch.nn.Module) -> dict[str, str]:
    """What computed each attention layer's last forward pass: module name -> "gluon_sm90", "triton" or "torch".

    "gluon_sm90" are the kernels for Hopper GPUs, "triton" the portable ones. The back ends note it as they launch.
    Only layers of `model` whose attention came to this package are listed: none where the model runs another
    implementation, or computes its attention itself. Calls compiled by `torch.compile` leave no record.
    """
    return {name: _BACKENDS[module] for name, module in model.named_modules() if module in _BACKENDS}
