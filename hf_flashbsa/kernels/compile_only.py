"""Compiles what calls would launch, in threads: most of a compilation runs in C++ and in ptxas, without the GIL."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from unittest import mock

import torch
from triton import AsyncCompileMode, knobs
from triton.runtime import driver

from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.backends import launches_nothing
from hf_flashbsa.kernels.gluon_sm90 import dispatch

#: Called with the number of kernels that are ready, and that of all.
Progress = Callable[[int, int], object]


class Kernels:
    """What a `compile_only` block met, once it has ended: kernels in `total`, and those of them that were `compiled`
    because Triton's cache folder did not hold them."""

    def __init__(self) -> None:
        self.total, self.compiled = 0, 0


class _Builders(ThreadPoolExecutor):
    """Compiles kernels, and loads them onto the device that is current when they are submitted."""

    def submit(self, compile_: Callable) -> Future:
        return super().submit(self._build, compile_, driver.active.get_current_device())

    @staticmethod
    def _build(compile_: Callable, device: int):
        driver.active.set_current_device(device)  # of this thread
        kernel = compile_()
        kernel._init_handles()  # its launcher, which Triton 3.6 lets a C compiler make, and its code on the device
        return kernel


@contextlib.contextmanager
def compile_only(device: torch.device, workers: int, progress: Progress) -> Iterator[Kernels]:
    """Within, attention calls of this thread launch nothing and give zeros, and their kernels are compiled by as many
    threads as `workers`. The end of the block waits for them. Triton finds them again by keys that it computes from
    the very arguments of a launch, so that a later launch with such arguments compiles nothing.

    Raises:
        Exception: what Triton raised for the first kernel that could not be compiled.
    """
    if tuning.is_hopper(device):
        dispatch.unavailable_reason(device)  # with an unknown Triton it tries kernels, and must launch them
    found, hits, listener = Kernels(), [], knobs.compilation.listener

    def count(*, cache_hit: bool, **of_kernel) -> None:
        hits.append(cache_hit)
        if listener is not None:
            listener(cache_hit=cache_hit, **of_kernel)

    with (
        mock.patch.object(knobs.compilation, "listener", count),
        _Builders(workers, "compile") as builders,
        AsyncCompileMode(builders, ignore_errors=True) as mode,  # raising, it would stay active
    ):
        with launches_nothing():
            yield found
        found.total = len(mode.raw_futures)
        progress(0, found.total)
        for done, _ in enumerate(as_completed(mode.raw_futures), 1):
            progress(done, found.total)
    for future in mode.raw_futures:
        future.result()
    found.compiled = hits.count(False)
