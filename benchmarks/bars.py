"""What the kernels are meant to reach: bounds on the ratios of `hf-flashbsa bench --preset`, and which of them hold.

    python benchmarks/bars.py hopper benchmarks/results/nvidia-h200.jsonl  # the exit code is 1 where a bound is missed

A comparison of a preset that no bar names has no bound.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_flashbsa.bench import report  # noqa: E402
from hf_flashbsa.bench.presets import PRESETS, Comparison  # noqa: E402


class Bar(NamedTuple):
    """Bounds of the comparisons whose text a regular expression matches as a whole."""

    text: str
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return " ".join(f"{sign} {x:g}" for sign, x in ((">=", self.low), ("<=", self.high)) if x is not None)

    def holds(self, ratio: float) -> bool:
        return (self.low is None or ratio >= self.low) and (self.high is None or ratio <= self.high)


DENSE = r"(full|causal) B\d+ H\d+"
BARS = {
    "hopper": (
        Bar(rf"{DENSE} N(512|1024|2048) D\d+, forward: speed over cudnn", 1.0),
        Bar(rf"{DENSE} N(4096|8192|16384) D64, forward: speed over cudnn", 1.2),
        Bar(rf"{DENSE} N(4096|8192|16384) D128, forward: speed over cudnn", 1.15),
        Bar(rf"{DENSE} N\d{{4,5}} D\d+, backward: speed over cudnn", 1.0),
        Bar(rf"{DENSE} N\d+ D\d+, backward: speed over fa2", 1.5),
        Bar(r"packed documents, \w+: TFLOP/s over those of full N512", 0.85),
        Bar(r"packed B.*: speed over flash_attn", 1.3),
        Bar(r"packed-cross B.*: speed over flash_attn", 1.0),
        Bar(r"packed-ids B.*: speed over cumulative lengths", 0.95),
        Bar(r"(window|padded) .*: speed over fa2", 1.0),
        Bar(rf"{DENSE} .* dropout 0.1, both: speed over fa2", 1.3),
        Bar(rf"{DENSE} .* bias, both: speed over efficient", 1.5),
        Bar(r"32:8 heads, .*: speed over 32:32", 0.95),
        Bar(r"full B8 H16 N512 D64, both: speed over fa2", 1.0),
        Bar(r"causal N(65536|131072) over N16384: TFLOP/s", 0.95),
        Bar(r"causal N65536 over N16384: peak memory, 4x the tokens", high=1.02 * 4),
        Bar(r"causal N131072 over N16384: peak memory, 8x the tokens", high=1.02 * 8),
    ),
    "sparse": (
        Bar(r"full random .*, forward: speed over flex", 1.3),
        Bar(r"full random .*, backward: speed over flex", 1.25),
        Bar(r"full random (0.5|0.25|0.13) .*: TFLOP/s over dense", 0.9),
        Bar(r"full random 0.06 .*: TFLOP/s over dense", 0.8),
        Bar(r"full longformer .* N(4096|16384) D\d+, both: that over the FLOP ratio", 0.85),
        Bar(r"full longformer .*: peak memory over dense", high=1.02),
        Bar(r"eight blocks a row, .*: time for a block over N16384's", high=1.1),
    ),
}


def bar_of(comparison: Comparison, bars: Iterable[Bar]) -> Bar | None:
    return next((bar for bar in bars if re.fullmatch(bar.text, comparison.text)), None)


def judged(preset: str, rows: list[dict]) -> Iterator[tuple[Comparison, float | None, Bar | None]]:
    """Each comparison of a preset with its ratio, None where it is not measured, and its bar, if it has one."""
    for comparison in PRESETS[preset]():
        yield comparison, comparison.ratio(rows), bar_of(comparison, BARS[preset])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=BARS)
    parser.add_argument("rows", nargs="+", type=Path, help="files that `hf-flashbsa bench` wrote")
    options = parser.parse_args(arguments)
    table = Table("comparison", "measured", "bounds", "holds", box=SIMPLE)
    missed = 0
    for comparison, ratio, bar in judged(options.preset, report.read(options.rows)):
        measured = "not measured" if ratio is None else f"{ratio:.3f}"
        holds = None if ratio is None or bar is None else bar.holds(ratio)
        missed += holds is False
        table.add_row(comparison.text, measured, str(bar or ""), {True: "yes", False: "NO", None: ""}[holds])
    Console(width=None if sys.stdout.isatty() else 180).print(table)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
