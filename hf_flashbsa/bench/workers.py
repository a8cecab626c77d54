"""Jobs in worker processes that may crash, hang or lose their GPU without taking the others along."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple


class JobError(NamedTuple):
    """What became of a job that returned nothing."""

    message: str
    traceback: str = ""


@dataclasses.dataclass(eq=False)
class _Worker:
    process: multiprocessing.Process
    pipe: Connection
    job: Any = None
    #: When it began on the job; not before its process is up.
    started: float = math.inf

    def give(self, job: Any) -> None:
        self.job, self.started = job, math.inf
        with contextlib.suppress(OSError):  # The process died meanwhile: receiving will tell.
            self.pipe.send(job)


def _serve(work: Callable, pipe: Connection) -> None:
    """Takes jobs until the first that raises: an error may have cost the process its GPU."""
    while True:
        job = pipe.recv()
        pipe.send(None)  # The time that a process takes to start is not the job's.
        try:
            result = work(job)
        except Exception as error:
            pipe.send((JobError(f"{type(error).__name__}: {error}", traceback.format_exc()), False))
            return
        pipe.send((result, True))


def _start(work: Callable) -> _Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(work, there), daemon=True)
    process.start()
    there.close()
    return _Worker(process, here)


def _receive(worker: _Worker) -> tuple[Any, bool] | None:
    """What a worker answers and whether it goes on; None when it begins."""
    try:
        return worker.pipe.recv()
    except (EOFError, OSError):
        worker.process.join()
        return JobError(f"the worker process died with exit code {worker.process.exitcode}"), False


def run_jobs(
    work: Callable[[Any], Any],
    jobs: Sequence,
    *,
    workers: int,
    seconds: float = math.inf,
    job_seconds: float = 180.0,
) -> Iterator[tuple[Any, Any]]:
    """Yields `(job, work(job))` in order of completion; a `JobError` stands for the result of a job that failed.

    Args:
        work: a picklable function of one job.
        jobs: picklable, none of them None.
        workers: processes at a time, started anew ("spawn") and replaced after a failure.
        seconds: stop after this long; jobs under way are given up.
        job_seconds: longest that one job may take before its process is killed.
    """
    deadline = time.monotonic() + seconds
    waiting = list(reversed(jobs))
    pool = [_start(work) for _ in range(min(workers, len(jobs)))]
    try:
        while (waiting or any(worker.job is not None for worker in pool)) and time.monotonic() < deadline:
            for worker in pool:
                if worker.job is None and waiting:
                    worker.give(waiting.pop())
            busy = [worker for worker in pool if worker.job is not None]
            ready = wait([worker.pipe for worker in busy], timeout=0.2)
            for worker in busy:
                answer = None
                if worker.pipe in ready:
                    answer = _receive(worker)
                    worker.started = time.monotonic()
                elif time.monotonic() - worker.started > job_seconds:
                    answer = JobError(f"no answer within {job_seconds:.0f} s"), False
                if answer is None:
                    continue
                result, goes_on = answer
                job, worker.job = worker.job, None
                if not goes_on:
                    worker.process.kill()
                    pool.remove(worker)
                    if waiting:
                        pool.append(_start(work))
                yield job, result
    finally:
        for worker in pool:
            worker.process.kill()
