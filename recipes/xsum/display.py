"""What a run shows while it works: a progress bar in a terminal, one line per logged step anywhere else."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import datasets
import transformers
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def quiet_libraries() -> None:
    """Leave the screen to the display: no progress bars beside it, no warning with each checkpoint."""
    transformers.utils.logging.disable_progress_bar()
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # A tied weight is saved once, as it should be; Accelerate warns of it each time.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    threading.excepthook = _thread_error


def _thread_error(details: threading.ExceptHookArgs) -> None:
    """TensorBoard's writing thread hands its errors to the thread that logs, so they need not be shown twice."""
    if not (issubclass(details.exc_type, OSError) and type(details.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(details)


class _Numbers(ProgressColumn):
    """Loss and speed of the training task; other tasks have none."""

    def render(self, task: Task) -> Text:
        return Text(task.fields.get("numbers", ""))


class Display:
    """Progress of training with loss, tokens per second and remaining time; silent unless `enabled`.

    `progress` is rich's, for further tasks below the training bar.
    """

    def __init__(self, total_steps: int, *, enabled: bool) -> None:
        self.total_steps = total_steps
        self.console = Console(quiet=not enabled, soft_wrap=True, highlight=False)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _Numbers(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._task = self.progress.add_task("Training", total=total_steps)
        self._previous = {"step": 0, "seconds": 0.0, "source_tokens": 0, "target_tokens": 0}

    def start(self, counters: dict[str, Any]) -> None:
        """Begin at the counters of a new or resumed run."""
        self._previous = counters
        self.progress.start()
        self.step(counters["step"])

    def stop(self) -> None:
        self.progress.stop()

    def step(self, step: int) -> None:
        self.progress.update(self._task, completed=step)

    def log(self, record: dict[str, Any]) -> None:
        """Show a training line of metrics.jsonl."""
        steps, seconds, *tokens = (
            record[key] - self._previous[key] for key in ("step", "seconds", "source_tokens", "target_tokens")
        )
        self._previous = record
        numbers = f"loss {record['loss']:.3f}  {sum(tokens) / seconds:,.0f} tokens/s"
        self.progress.update(self._task, numbers=numbers)
        if self.progress.disable:
            left = timedelta(seconds=round((self.total_steps - record["step"]) * seconds / steps))
            self.say(f"step {record['step']}/{self.total_steps}  {numbers}  {left} left")

    @contextmanager
    def counting(self, description: str) -> Iterator[Callable[[int, int], None]]:
        """A bar of its own for work beside training; yields what is called with how much is done, and of how much."""
        task = self.progress.add_task(description, total=None)
        try:
            yield lambda done, total: self.progress.update(task, completed=done, total=total)
        finally:
            self.progress.remove_task(task)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
