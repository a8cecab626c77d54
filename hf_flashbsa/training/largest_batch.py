"""The largest batch whose training step fits a memory budget."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

GIB = 2**30
#: Runs one try and returns its tokens and peak bytes. Raises `torch.OutOfMemoryError` where the step does not fit.
Measure = Callable[[Callable[[], int]], tuple[int, int]]


class LargestBatch(NamedTuple):
    """The largest batch that fits; all zero where not even one example does."""

    batch: int
    tokens: int
    peak_gib: float


def largest_batch(
    try_step: Callable[[int], int],
    budget_gib: float,
    *,
    start: int = 1,
    limit: int = 1 << 16,
    resolution: float = 0.0,
    model: torch.nn.Module | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    measure: Measure | None = None,
) -> LargestBatch:
    """Finds the largest batch whose step stays within a budget, in few tries.

    Memory grows nearly linearly with the batch, so the peaks of the last two tries that fitted tell the next size;
    where they mislead, bisection ends the search. Only steps that ran, and the failure of the next size, count.

    On CUDA the allocator may not take more than the budget from the device during the search, so that the search sees
    what a smaller GPU would: fragmentation counts, and a step that fits only after cached memory has been given back
    fits. Memory that others hold on the device, and the CUDA context, do not count.

    Args:
        try_step: runs one whole training step with that many examples and returns its number of tokens.
        budget_gib: memory for the step and all that the process already holds, GiB.
        start: the first size to try.
        limit: no larger batch is tried.
        resolution: the search ends where the next size that failed is at most this share above the best; 0 finds
            the exact size.
        model: its gradients are set to None after each try, as a step that ran out of memory leaves some behind.
        device: the CUDA device; default the current one.
        progress: show the tries with rich.
        measure: replaces the CUDA allocator as judge, for other devices.

    Returns:
        The batch, its tokens and its peak. The allocator's limit is as before, and its cache is empty.

    Raises:
        ValueError: no CUDA device and no `measure`, a budget beyond the device's memory, or sizes that do not fit.
    """
    if not 1 <= start <= limit:
        raise ValueError(f"start: {start} is not within 1..{limit} (limit).")
    if not budget_gib > 0:
        raise ValueError(f"budget_gib: {budget_gib} is not positive.")
    budget = int(budget_gib * GIB)

    with contextlib.ExitStack() as stack:
        if measure is None:
            measure = stack.enter_context(_limited(torch.device("cuda" if device is None else device), budget))
        report = stack.enter_context(_progress(f"largest batch in {budget_gib:g} GiB", progress))
        before = best = LargestBatch(0, 0, 0.0)
        failed, batch, ahead = limit + 1, start, 0
        while failed - best.batch > max(1, resolution * best.batch):
            width = failed - best.batch
            found = _try(batch, try_step, measure, budget, model)
            if found is None:
                failed = batch
            else:
                before, best = best, found
            report(batch, found is not None, best.batch)
            guess = _extrapolated(before, best, budget_gib)
            step = max(1, int(resolution * best.batch))
            if failed <= limit:
                if guess is None or guess >= failed or failed - best.batch > width // 2:
                    batch = (best.batch + failed) // 2
                else:
                    batch = min(max(guess, best.batch + step), failed - step)
            elif guess is None:
                batch = min(2 * batch, limit)
            else:  # where the best is the guess, the next size should fail; if it fits, go further ahead each time
                ahead = 0 if guess >= best.batch + step else max(2 * ahead, step)
                batch = min(max(guess, best.batch + ahead), limit)
        return best


def _extrapolated(before: LargestBatch, best: LargestBatch, budget_gib: float) -> int | None:
    """The size whose peak would be the budget if memory were linear; None where the peaks do not tell."""
    batches, gib = best.batch - before.batch, best.peak_gib - before.peak_gib
    if batches <= 0 or gib <= 0:
        return None
    return best.batch + int((budget_gib - best.peak_gib) / gib * batches)


def _try(
    batch: int, try_step: Callable[[int], int], measure: Measure, budget: int, model: torch.nn.Module | None
) -> LargestBatch | None:
    """One try; None where it does not fit into a budget of bytes."""
    try:
        tokens, peak = measure(lambda: try_step(batch))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        tokens, peak = 0, budget + 1
    finally:
        if model is not None:
            model.zero_grad(set_to_none=True)
    if peak > budget:
        _empty_cache()  # outside of the except clause, where the traceback no longer holds the step's tensors
        return None
    return LargestBatch(batch, tokens, peak / GIB)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # cuBLAS reports a workspace that does not fit as a RuntimeError of its own.
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)


def _empty_cache() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _limited(device: torch.device, budget: int) -> Iterator[Measure]:
    """Keeps the CUDA allocator within a budget of bytes, and measures with it."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device: {device} has no allocator to ask for a peak; give a CUDA device, or `measure`.")
    if device.index is None:  # the allocator's limits are kept by number
        device = torch.device("cuda", torch.cuda.current_device())
    total = torch.cuda.get_device_properties(device).total_memory
    if budget > total:
        raise ValueError(f"budget_gib: {budget / GIB:.1f} is more than the device has, {total / GIB:.1f} GiB.")
    _empty_cache()
    before = torch.cuda.get_per_process_memory_fraction(device)

    def measure(step: Callable[[], int]) -> tuple[int, int]:
        torch.cuda.reset_peak_memory_stats(device)
        tokens = step()
        torch.cuda.synchronize(device)
        return tokens, torch.cuda.max_memory_allocated(device)

    torch.cuda.set_per_process_memory_fraction(budget / total, device)
    try:
        yield measure
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)
        _empty_cache()


@contextlib.contextmanager
def _progress(title: str, shown: bool) -> Iterator[Callable[[int, bool, int], None]]:
    """Yields `report(batch, fits, best)`."""
    if not shown:
        yield lambda batch, fits, best: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(title, total=None)

        def report(batch: int, fits: bool, best: int) -> None:
            bar.update(task, description=f"{title}: {batch} {'fits' if fits else 'does not fit'}, best {best}")

        yield report
