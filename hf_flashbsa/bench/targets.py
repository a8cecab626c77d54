"""What the kernels are meant to reach: ratios of two measurements each, with bounds, in presets of the benchmark.

A target names the two jobs that it compares, and the jobs of a preset are those that its targets name, so that what is
judged is what was timed. Unless it says otherwise, a case has 16,384 tokens and a hidden size of 2,048.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Table

from hf_flashbsa.bench import report
from hf_flashbsa.bench.cases import Case
from hf_flashbsa.bench.jobs import Job

OURS = "hf_flashbsa"
UNORDERED = "hf_flashbsa_unordered"
TOKENS, HIDDEN = 16384, 2048
SHORT, LONG = (512, 1024, 2048), (4096, 8192, 16384)


class Target(NamedTuple):
    """A field of the rows, over one job's row and under another's, and the bounds of that ratio; with neither bound
    it is only shown."""

    text: str
    field: str
    over: Job
    under: Job
    low: float | None = None
    high: float | None = None


def case_of(mask: str, length: int, head_dim: int, **fields) -> Case:
    """A case of the usual size; `fields` replace some of it."""
    heads = HIDDEN // head_dim
    usual = {"batch": max(1, TOKENS // length), "heads": heads, "heads_k": heads}
    return Case(mask, length=length, head_dim=head_dim, **usual | fields)


def with_layout(case: Case, pattern: str, chance: float | None = None) -> Case:
    return dataclasses.replace(case, pattern=pattern, chance=chance, block_size=128)


def faster(than: str, case: Case, pass_: str, low: float | None, clock: str = "device") -> Target:
    """How much faster than another provider the kernels are on a case."""
    text = f"{report.label(case.fields())}, {pass_}: speed over {than}"
    return Target(text, "ms", Job(than, case, pass_, clock), Job(OURS, case, pass_, clock), low)


def hopper() -> Iterator[Target]:
    """Dense and ragged attention."""
    for head_dim, long in ((128, 1.15), (64, 1.2)):
        for mask in ("full", "causal"):
            for length in (*SHORT, *LONG):
                low = long if length in LONG else 1.0
                yield faster("cudnn", case_of(mask, length, head_dim), "forward", low)
    for head_dim in (128, 64):
        for mask in ("full", "causal"):
            for length in (*SHORT, *LONG):
                case = case_of(mask, length, head_dim)
                yield faster("cudnn", case, "backward", 1.0 if length >= 1024 else None)
                yield faster("fa2", case, "backward", 1.5)
    for length in LONG:
        case = case_of("causal", length, 64)  # there is another kernel for these alone
        text = f"{report.label(case.fields())}, backward in any order: speed over"
        for than in ("cudnn", OURS):
            yield Target(f"{text} {than}", "ms", Job(than, case, "backward"), Job(UNORDERED, case, "backward"))
    yield from ragged()
    yield from windowed_and_padded()
    for head_dim in (64, 128):
        for length in (1024, 4096):
            yield faster("fa2", case_of("full", length, head_dim, dropout_p=0.1), "both", 1.3)
    for length in (512, 1024):
        yield faster("efficient", case_of("full", length, 64, bias=True), "both", 1.5)
    all_heads = case_of("causal", 4096, 128, heads=32, heads_k=32)
    grouped = dataclasses.replace(all_heads, heads_k=8)
    for pass_ in ("forward", "backward"):
        text = f"32:8 heads, causal N4096 D128, {pass_}: speed over 32:32"
        yield Target(text, "ms", Job(OURS, all_heads, pass_), Job(OURS, grouped, pass_), 0.95)
    whole = case_of("full", 512, 64, batch=8, heads=16, heads_k=16)
    yield faster("fa2", whole, "both", 1.0, "wall")
    yield faster("flash_attn", whole, "both", None, "wall")
    yield from scaling("causal N{} over N16384", lambda length: case_of("causal", length, 128))


def ragged() -> Iterator[Target]:
    """About 128 documents of XSum's lengths in one row, with 16 heads."""
    heads = {"heads": 16, "heads_k": 16}
    packed = case_of("packed", 1024, 64, batch=53, **heads)
    dense = case_of("full", 512, 64, batch=128, **heads)
    cross = case_of("packed-cross", 1024, 64, batch=53, **heads)
    for pass_ in ("forward", "backward"):
        text = f"packed documents, {pass_}: TFLOP/s over those of full N512"
        yield Target(text, "tflops", Job(OURS, packed, pass_), Job(OURS, dense, pass_), 0.85)
        yield faster("flash_attn", packed, pass_, 1.3)
        yield faster("flash_attn", cross, pass_, 1.0)
    for head_dim in (64, 128):
        lengths = case_of("packed-causal", 1024, head_dim, batch=53)
        ids = dataclasses.replace(lengths, mask="packed-ids")
        for pass_ in ("forward", "backward"):
            text = f"{report.label(ids.fields())}, {pass_}: speed over cumulative lengths"
            yield Target(text, "ms", Job(OURS, lengths, pass_), Job(OURS, ids, pass_), 0.95)


def windowed_and_padded() -> Iterator[Target]:
    """Sliding windows over long sequences, and batches padded to the longest of XSum's documents."""
    windows = [case_of("window", 16384, head_dim, window=w) for head_dim, w in ((64, 256), (64, 2048), (128, 4096))]
    for case in (*windows, *(case_of("padded", 1024, head_dim) for head_dim in (64, 128))):
        for pass_ in ("forward", "backward"):
            yield faster("fa2", case, pass_, 1.0)


def scaling(text: str, case: Callable[[int], Case]) -> Iterator[Target]:
    """Speed and memory from 512 to 131,072 tokens in a sequence, over those of 16,384."""
    usual = Job(OURS, case(16384), "both")
    for length in (512, 1024, 4096, 65536, 131072):
        job = Job(OURS, case(length), "both")
        yield Target(f"{text.format(length)}: TFLOP/s", "tflops", job, usual, 0.95 if length > 16384 else None)
        if length > 16384:
            growth = length / 16384
            bounds = (None, 1.02 * growth)
            yield Target(
                f"{text.format(length)}: peak memory, {growth:.0f}x the tokens", "peak_bytes", job, usual, *bounds
            )


def sparse() -> Iterator[Target]:
    """Attention on block layouts."""
    for head_dim in (64, 128):
        dense = case_of("full", 16384, head_dim)
        for chance in (0.5, 0.25, 0.13, 0.06):
            case = with_layout(dense, "random", chance)
            for pass_, low in (("forward", 1.3), ("backward", 1.25)):
                yield faster("flex", case, pass_, low)
                text = f"{report.label(case.fields())}, {pass_}: TFLOP/s over dense"
                low = 0.9 if chance >= 0.13 else 0.8
                yield Target(text, "tflops", Job(OURS, case, pass_), Job(OURS, dense, pass_), low)
    for head_dim in (64, 128):
        for length in (4096, 16384, 512, 1024):
            dense = case_of("full", length, head_dim)
            case, pays = with_layout(dense, "longformer"), length >= 4096
            sparse_job, dense_job = Job(OURS, case, "both"), Job(OURS, dense, "both")
            text = f"{report.label(case.fields())}, both"
            yield faster("fa2", case, "both", None)
            # Speed-up over the ratio of FLOPs, which is the ratio of FLOPs per second.
            share = Target(f"{text}: that over the FLOP ratio", "tflops", sparse_job, Job("fa2", case, "both"))
            yield share._replace(low=0.85) if pays else share
            yield Target(f"{text}: speed over dense", "ms", dense_job, sparse_job)
            if pays:
                yield Target(f"{text}: peak memory over dense", "peak_bytes", sparse_job, dense_job, None, 1.02)
    yield from linear()


def linear() -> Iterator[Target]:
    """Time for each live block at eight blocks in a row, over that of 16,384 tokens."""
    usual = Job(OURS, with_layout(case_of("full", 16384, 64), "eight"), "both")
    for length in (1024, 4096, 65536, 131072):
        job = Job(OURS, with_layout(case_of("full", length, 64), "eight"), "both")
        # The inverse of the ratio of FLOPs per second.
        yield Target(f"eight blocks a row, N{length}: time for a block over N16384's", "tflops", usual, job, None, 1.1)


PRESETS: dict[str, Callable[[], Iterator[Target]]] = {"hopper": hopper, "sparse": sparse}


def jobs(targets: Iterator[Target]) -> list[Job]:
    """The measurements that targets need, each once, in order of first use."""
    return list(dict.fromkeys(job for target in targets for job in (target.over, target.under)))


def table(targets: Iterator[Target], rows: list[dict]) -> Table:
    """One line for each target: its ratio, its bounds, and whether it holds. The newest row of a job counts."""
    newest = {_key(row): row for row in rows}
    result = Table("target", "measured", "bounds", "holds", box=SIMPLE)
    for target in targets:
        over, under = (newest.get(_key(job.fields()), {}).get(target.field) for job in (target.over, target.under))
        bounds = ((">=", target.low), ("<=", target.high))
        text = " ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        if over is None or under is None:
            result.add_row(target.text, "not measured", text, "")
            continue
        ratio = over / under
        holds = (target.low is None or ratio >= target.low) and (target.high is None or ratio <= target.high)
        result.add_row(target.text, f"{ratio:.3f}", text, ("yes" if holds else "NO") if text else "")
    return result


def _key(row: dict) -> tuple:
    return report.identity({**row, "gpu": None})
