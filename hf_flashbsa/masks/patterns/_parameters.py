"""Parameters of patterns and selections, as configs give them by name."""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Callable, Iterable, Sequence
from typing import Any

#: Arguments of patterns that come from the call rather than from the user's choice.
SIZES = ("num_queries", "num_keys", "block_size", "causal", "num_heads")


def unknown(what: str, name: object, known: Iterable[str]) -> str:
    """The message of an error about a name that does not exist."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    return f"Unknown {what} {name!r}{hint} There are: {', '.join(known) or 'none'}."


def parameters_of(function: Callable) -> dict[str, inspect.Parameter]:
    """What a user may choose of a pattern: its keyword-only arguments, without sizes."""
    parameters = inspect.signature(function).parameters
    return {n: p for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in SIZES}


def check_parameters(name: str, function: Callable, given: dict) -> None:
    """Raises ValueError for parameters that a pattern does not have or lacks, and for values of the wrong type."""
    known, hints = parameters_of(function), typing.get_type_hints(function)
    for key, value in given.items():
        if key not in known:
            raise ValueError(unknown(f"parameter of {name!r}:", key, known))
        if not _is_a(value, hints[key]):
            kind = known[key].annotation
            raise ValueError(f"{name}: {key} is {value!r}; give {kind}.")
    missing = [key for key, p in known.items() if p.default is p.empty and key not in given]
    if missing:
        raise ValueError(f"{name}: needs {', '.join(missing)}.")


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value fits an annotation: bool, int, float, None, a sequence of int, or a union of these."""
    if typing.get_origin(hint) is Sequence:
        return isinstance(value, (list, tuple)) and len(value) > 0 and all(_is_a(x, int) for x in value)
    if arguments := typing.get_args(hint):
        return any(_is_a(value, argument) for argument in arguments)
    if hint in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if hint is float else hint)
