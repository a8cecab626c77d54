"""Time of device work, free of what the host does, and time of the host, free of the device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

#: Written between repeats so that no input is left in a cache; several times the L2 of current GPUs.
FLUSH_BYTES = 1 << 28
#: Upper bound of GPU clocks, cycles per second.
CLOCK = 2.2e9


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
        repeats: at least 2.
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
    times = []
    for _ in range(repeats + 3):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            fn()
        times.append(1e3 * (time.perf_counter() - begin) / calls)
    return _timing(times[3:])
