"""Former names of public functions and modules, kept for one release."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable


def renamed(old: str, function: Callable) -> Callable:
    """`function` under its former name, whose first use warns."""
    new = function.__name__

    @functools.cache
    def warn() -> None:
        warnings.warn(f"hf_flashbsa.{old} is now hf_flashbsa.{new}; the old name goes in 0.2.", FutureWarning, 3)

    def call(*args, **kwargs):
        warn()
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = old
    call.__doc__ = f"Deprecated: the former name of `{new}`."
    return call


def warn_of_module(old: str, new: str) -> None:
    """Warns of the import of a module under its former name."""
    warnings.warn(f"{old} is now {new}; the old name goes in 0.2.", FutureWarning, stacklevel=3)
