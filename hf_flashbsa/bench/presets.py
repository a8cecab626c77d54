"""Presets of the benchmark: comparisons of two measurements each.

A comparison names the two jobs that it divides, and the jobs of a preset are those that its comparisons name, so that
what is shown is what was timed. Unless it says otherwise, a case has 16,384 tokens and a hidden size of 2,048.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
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


class Comparison(NamedTuple):
    """The quotient of a field of two jobs' rows."""

    text: str
    field: str
    numerator: Job
    denominator: Job

    def ratio(self, rows: Iterable[dict]) -> float | None:
        """The quotient by the newest rows of its jobs; None where one is not measured."""
        newest = {_key(row): row for row in rows}
        above, below = (newest.get(_key(job.fields()), {}).get(self.field) for job in self[2:])
        return None if above is None or below is None else above / below


def _key(row: dict) -> tuple:
    return report.identity({**row, "gpu": None})


def case_of(mask: str, length: int, head_dim: int, **fields) -> Case:
    """A case of the usual size; `fields` replace some of it."""
    heads = HIDDEN // head_dim
    usual = {"batch": max(1, TOKENS // length), "heads": heads, "heads_k": heads}
    return Case(mask, length=length, head_dim=head_dim, **usual | fields)


def with_layout(case: Case, pattern: str, chance: float | None = None) -> Case:
    return dataclasses.replace(case, pattern=pattern, chance=chance, block_size=128)


def speedup(than: str, case: Case, pass_: str, clock: str = "device") -> Comparison:
    """How many times as fast as another provider the kernels are on a case."""
    text = f"{report.label(case.fields())}, {pass_}: speed over {than}"
    return Comparison(text, "ms", Job(than, case, pass_, clock), Job(OURS, case, pass_, clock))


def hopper() -> Iterator[Comparison]:
    """Dense and ragged attention."""
    for head_dim in (128, 64):
        for mask in ("full", "causal"):
            for length in (*SHORT, *LONG):
                yield speedup("cudnn", case_of(mask, length, head_dim), "forward")
    for head_dim in (128, 64):
        for mask in ("full", "causal"):
            for length in (*SHORT, *LONG):
                for than in ("cudnn", "fa2"):
                    yield speedup(than, case_of(mask, length, head_dim), "backward")
    for length in LONG:
        case = case_of("causal", length, 64)  # there is another kernel for these alone
        text = f"{report.label(case.fields())}, backward in any order: speed over"
        for than in ("cudnn", OURS):
            yield Comparison(f"{text} {than}", "ms", Job(than, case, "backward"), Job(UNORDERED, case, "backward"))
    yield from ragged()
    yield from windowed_and_padded()
    for head_dim in (64, 128):
        for length in (1024, 4096):
            yield speedup("fa2", case_of("full", length, head_dim, dropout_p=0.1), "both")
    for length in (512, 1024):
        yield speedup("efficient", case_of("full", length, 64, bias=True), "both")
    all_heads = case_of("causal", 4096, 128, heads=32, heads_k=32)
    grouped = dataclasses.replace(all_heads, heads_k=8)
    for pass_ in ("forward", "backward"):
        text = f"32:8 heads, causal N4096 D128, {pass_}: speed over 32:32"
        yield Comparison(text, "ms", Job(OURS, all_heads, pass_), Job(OURS, grouped, pass_))
    for than in ("fa2", "flash_attn"):
        yield speedup(than, case_of("full", 512, 64, batch=8, heads=16, heads_k=16), "both", "wall")
    yield from scaling("causal N{} over N16384", lambda length: case_of("causal", length, 128))


def ragged() -> Iterator[Comparison]:
    """About 128 documents of XSum's lengths in one row, with 16 heads."""
    heads = {"heads": 16, "heads_k": 16}
    packed = case_of("packed", 1024, 64, batch=53, **heads)
    dense = case_of("full", 512, 64, batch=128, **heads)
    cross = case_of("packed-cross", 1024, 64, batch=53, **heads)
    for pass_ in ("forward", "backward"):
        text = f"packed documents, {pass_}: TFLOP/s over those of full N512"
        yield Comparison(text, "tflops", Job(OURS, packed, pass_), Job(OURS, dense, pass_))
        yield speedup("flash_attn", packed, pass_)
        yield speedup("flash_attn", cross, pass_)
    for head_dim in (64, 128):
        lengths = case_of("packed-causal", 1024, head_dim, batch=53)
        ids = dataclasses.replace(lengths, mask="packed-ids")
        for pass_ in ("forward", "backward"):
            text = f"{report.label(ids.fields())}, {pass_}: speed over cumulative lengths"
            yield Comparison(text, "ms", Job(OURS, lengths, pass_), Job(OURS, ids, pass_))


def windowed_and_padded() -> Iterator[Comparison]:
    """Sliding windows over long sequences, and batches padded to the longest of XSum's documents."""
    windows = [case_of("window", 16384, head_dim, window=w) for head_dim, w in ((64, 256), (64, 2048), (128, 4096))]
    for case in (*windows, *(case_of("padded", 1024, head_dim) for head_dim in (64, 128))):
        for pass_ in ("forward", "backward"):
            yield speedup("fa2", case, pass_)


def scaling(text: str, case: Callable[[int], Case]) -> Iterator[Comparison]:
    """Speed and memory from 512 to 131,072 tokens in a sequence, over those of 16,384."""
    usual = Job(OURS, case(16384), "both")
    for length in (512, 1024, 4096, 65536, 131072):
        job = Job(OURS, case(length), "both")
        yield Comparison(f"{text.format(length)}: TFLOP/s", "tflops", job, usual)
        if length > 16384:
            label = f"{text.format(length)}: peak memory, {length // 16384}x the tokens"
            yield Comparison(label, "peak_bytes", job, usual)


def sparse() -> Iterator[Comparison]:
    """Attention on block layouts."""
    for head_dim in (64, 128):
        dense = case_of("full", 16384, head_dim)
        for chance in (0.5, 0.25, 0.13, 0.06):
            case = with_layout(dense, "random", chance)
            for pass_ in ("forward", "backward"):
                yield speedup("flex", case, pass_)
                text = f"{report.label(case.fields())}, {pass_}: TFLOP/s over dense"
                yield Comparison(text, "tflops", Job(OURS, case, pass_), Job(OURS, dense, pass_))
    for head_dim in (64, 128):
        for length in (4096, 16384, 512, 1024):
            dense = case_of("full", length, head_dim)
            case = with_layout(dense, "longformer")
            sparse_job, dense_job = Job(OURS, case, "both"), Job(OURS, dense, "both")
            text = f"{report.label(case.fields())}, both"
            yield speedup("fa2", case, "both")
            # Speed-up over the ratio of FLOPs, which is the ratio of FLOPs per second.
            yield Comparison(f"{text}: that over the FLOP ratio", "tflops", sparse_job, Job("fa2", case, "both"))
            yield Comparison(f"{text}: speed over dense", "ms", dense_job, sparse_job)
            if length in LONG:
                yield Comparison(f"{text}: peak memory over dense", "peak_bytes", sparse_job, dense_job)
    yield from linear()


def linear() -> Iterator[Comparison]:
    """Time for each live block at eight blocks in a row, over that of 16,384 tokens."""
    usual = Job(OURS, with_layout(case_of("full", 16384, 64), "eight"), "both")
    for length in (1024, 4096, 65536, 131072):
        job = Job(OURS, with_layout(case_of("full", length, 64), "eight"), "both")
        # The inverse of the ratio of FLOPs per second.
        yield Comparison(f"eight blocks a row, N{length}: time for a block over N16384's", "tflops", usual, job)


PRESETS: dict[str, Callable[[], Iterator[Comparison]]] = {"hopper": hopper, "sparse": sparse}


def jobs(comparisons: Iterable[Comparison]) -> list[Job]:
    """The measurements that comparisons need, each once, in order of first use."""
    return list(dict.fromkeys(job for comparison in comparisons for job in comparison[2:]))


def table(comparisons: Iterable[Comparison], rows: list[dict]) -> Table:
    """One line for each comparison. The newest row of a job counts."""
    result = Table("comparison", "measured", box=SIMPLE)
    for comparison in comparisons:
        ratio = comparison.ratio(rows)
        result.add_row(comparison.text, "not measured" if ratio is None else f"{ratio:.3f}")
    return result
