"""The arguments of a module's call, as its hooks read and change them."""

from __future__ import annotations

import inspect

from torch import nn


class HookArgs:
    """The arguments of a call of a module, by the names of its class's forward."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict):
        self.names = _parameters(type(module))
        self.args = list(args)
        self.kwargs = dict(kwargs)

    def get(self, name: str):
        """The argument, or None where it is not given."""
        position = self.names.get(name, len(self.args))
        return self.args[position] if position < len(self.args) else self.kwargs.get(name)

    def set(self, name: str, value) -> None:
        position = self.names.get(name, len(self.args))
        if position < len(self.args):
            self.args[position] = value
        else:
            self.kwargs[name] = value

    def items(self) -> list[tuple[str, object]]:
        return [*zip(self.names, self.args, strict=False), *self.kwargs.items()]

    def result(self) -> tuple[tuple, dict]:
        """What a forward pre-hook returns."""
        return tuple(self.args), self.kwargs


_PARAMETERS: dict[type, dict[str, int]] = {}


def _parameters(cls: type) -> dict[str, int]:
    """Position of each named parameter of `cls.forward`, without self."""
    if cls not in _PARAMETERS:
        named = [p for p in inspect.signature(cls.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        _PARAMETERS[cls] = {p.name: i for i, p in enumerate(named[1:])}
    return _PARAMETERS[cls]


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward of the module's class names this parameter."""
    return name in _parameters(type(module))


def inherits_forward(cls: type, base: type) -> bool:
    """Whether a module class runs the forward of this base class."""
    return getattr(cls, "forward") is getattr(base, "forward", None)  # noqa: B009  type checkers see a plain type
