"""Time of device work, free of what the host does, of the host, free of the device, and of both; and memory."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: Written between repeats so that no input is left in a cache; several times the L2 of current GPUs.
FLUSH_BYTES = 1 << 28
#: Upper bound of GPU clocks, cycles per second.
CLOCK = 2.2e9
#: Seconds of repeats after which long-running work is timed fewer times, `FEWEST` at least.
LONGEST, FEWEST = 3.0, 5


class Timing(NamedTuple):
    """Milliseconds: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def _timing(times: list[float]) -> Timing:
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), fifths[0], fifths[3])


def measure(fn: Callable[[], Any], device: torch.device, repeats: int = 20, warmup: int = 3) -> Timing:
    """Times `fn`, with all that it launches.

    On CUDA: events around each repeat, and the L2 cache flushed before it. The stream is kept busy while the host
    queues a repeat, so that its launches lie back to back on the device however long the host takes for them.
    Elsewhere: wall time.

    Args:
        fn: the work; it must not wait for the device.
        repeats: at least 2; fewer are made of work that takes longer than `LONGEST` in all.
    """
    for _ in range(warmup):
        fn()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            fn()
            times.append(1e3 * (time.perf_counter() - begin))
        return _timing(times)
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    fn()
    cycles = int(1.5 * (time.perf_counter() - begin) * CLOCK)
    torch.cuda.synchronize(device)
    repeats = min(repeats, max(FEWEST, int(LONGEST / (time.perf_counter() - begin))))
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    starts, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(repeats)] for _ in range(2))
    for start, end in zip(starts, ends, strict=True):
        flush.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize(device)
    return _timing([start.elapsed_time(end) for start, end in zip(starts, ends, strict=True)])


def measure_host(fn: Callable[[], Any], device: torch.device, repeats: int = 20, calls: int = 20) -> Timing:
    """Wall time per call that the host spends on queueing `fn`, whose work must be smaller than that."""
    return _measure_calls(fn, device, repeats, calls, to_the_end=False)


def measure_wall(fn: Callable[[], Any], device: torch.device, repeats: int = 20, calls: int = 20) -> Timing:
    """Wall time per call of `fn`, called over and over: the host's cost or the device's, whichever is larger."""
    return _measure_calls(fn, device, repeats, calls, to_the_end=True)


def _measure_calls(
    fn: Callable[[], Any], device: torch.device, repeats: int, calls: int, *, to_the_end: bool
) -> Timing:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    times = []
    for _ in range(repeats + 3):
        wait()
        begin = time.perf_counter()
        for _ in range(calls):
            fn()
        if to_the_end:
            wait()
        times.append(1e3 * (time.perf_counter() - begin) / calls)
    return _timing(times[3:])


def peak_bytes(fn: Callable[[], Any], device: torch.device) -> int | None:
    """Most bytes that `fn` holds at once beyond what was allocated before, its result included; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()  # what `fn` frees besides would hide what it holds
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    fn()
    return torch.cuda.max_memory_allocated(device) - before
