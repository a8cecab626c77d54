"""Parts of the training loop that know nothing of models: schedule and signals."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.tracking import get_available_trackers

from recipes.xsum.config import Config, ConfigError
from recipes.xsum.errors import Interrupted


def learning_rate_at(step: int, total_steps: int, config: Config) -> float:
    """Learning rate of step 1, 2, ..., `total_steps`: linear warm-up, then the decay of `lr_scheduler`.

    The peak is reached at step `warmup_steps` (or the first), zero would be at step `total_steps + 1`. It is a
    function of the step, so a checkpoint need not hold it and a resumed run may be longer.
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    done = (step - 1 - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.lr_scheduler]
    return config.learning_rate * factor


def check_trackers(config: Config) -> None:
    """Raise `ConfigError` where `report_to` names a tracker that Accelerate does not find."""
    known = [str(name) for name in get_available_trackers()]
    for name in config.report_to:
        if name not in known:
            raise ConfigError(f"report_to: {name!r} is not installed or unknown; installed: {', '.join(known) or '-'}")


class StopSignal:
    """Turns SIGINT and SIGTERM into `received`, which the loop looks at after each step, while entered.

    Inside `at_once()` (an evaluation, which may last and leaves nothing to save) they raise `Interrupted` instead.
    A second SIGINT is Python's usual KeyboardInterrupt. SIGTERM may come twice: launchers send it after SIGINT.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._message: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: object) -> None:
        if self._message is not None:
            raise Interrupted(number, self._message)
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    @contextmanager
    def at_once(self, message: str) -> Iterator[None]:
        self._message = message
        try:
            yield
        finally:
            self._message = None
