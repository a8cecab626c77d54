"""Result rows: a JSON Lines file that only grows, a table, a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.table import Table

#: What tells one problem from another; with the provider it identifies a measurement, of which the newest counts.
PROBLEM = (
    "gpu", "clock", "pass", "mask", "window", "head_dim", "dtype", "heads", "heads_k", "dropout_p", "bias", "batch",
    "length", "pattern", "chance", "block_size",
)  # fmt: skip

#: Panels side by side in a plot.
MOST_COLUMNS = 4


def append(path: Path, row: dict) -> None:
    """Adds one row to a JSON Lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def rows_of(paths: Iterable[Path]) -> Iterator[dict]:
    """All rows of JSON Lines files."""
    for path in paths:
        yield from map(json.loads, path.read_text().splitlines())


def read(paths: Iterable[Path]) -> list[dict]:
    """Rows of JSON Lines files; a later measurement replaces an earlier one of the same problem and provider."""
    return list({identity(row): row for row in rows_of(paths)}.values())


def identity(row: dict) -> tuple:
    """What measurement a row is of."""
    return (*problem(row), row["provider"])


def problem(row: dict) -> tuple:
    """The values of `PROBLEM`; rows from before there were layouts have none."""
    return tuple(row.get(name) for name in PROBLEM)


def _mask(row: dict) -> str:
    names = (row["mask"], row["window"] if row["mask"] == "window" else None, row.get("pattern"), row.get("chance"))
    return " ".join(str(name) for name in names if name is not None)


def _features(row: dict) -> str:
    """What a problem has beyond its mask and sizes."""
    text = f" group {row['heads'] // row['heads_k']}" if row["heads_k"] != row["heads"] else ""
    if row.get("block_size") not in (None, 128):
        text += f" blocks of {row['block_size']}"
    text += f" dropout {row['dropout_p']}" if row["dropout_p"] else ""
    return text + (" bias" if row["bias"] else "")


def label(row: dict) -> str:
    """A problem in a few words."""
    return f"{_mask(row)} B{row['batch']} H{row['heads']} N{row['length']} D{row['head_dim']}{_features(row)}"


def _panel(row: dict) -> str:
    return f"{_mask(row)}, head dim {row['head_dim']}{_features(row)}"


def table(rows: list[dict], baseline: str) -> Table:
    """One line for each problem, one column for each provider: median ms, TFLOP/s, speed relative to the baseline."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    caption = f"ms, TFLOP/s (host, wall: ms per call), x: speed over {baseline}, dense: without the layout"
    result = Table("pass", "problem", *providers, caption=caption)
    lines: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        lines.setdefault(problem(row), {})[row["provider"]] = row
    for found in lines.values():
        base = found.get(baseline, {}).get("ms")
        first = next(iter(found.values()))
        name = first["pass"] if first["clock"] == "device" else f"{first['pass']}, {first['clock']}"
        result.add_row(name, label(first), *(_cell(found.get(provider), base) for provider in providers))
    return result


def _cell(row: dict | None, base: float | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return "error" if "error" in row else "unsupported"
    text = f"{row['ms']:.3f}"
    if row["tflops"] is not None:
        text += f" {row['tflops']:.0f} TF"
    if base is not None:
        text += f" {base / row['ms']:.2f}x"
    return f"{text} dense" if row.get("dense") else text


def line(row: dict) -> str:
    """A row in a few words."""
    return f"{row['provider']} {row['pass']} {label(row)}: {_cell(row, None)}"


def reasons(rows: list[dict]) -> list[str]:
    """Why providers did not run, each reason once."""
    found = {}
    for row in rows:
        if row["ms"] is None:
            reason = row.get("unsupported") or row["error"]
            found.setdefault((row["provider"], reason), label(row))
    return [f"{provider}: {reason} (first at {label})" for (provider, reason), label in found.items()]


def plot(rows: list[dict], path: Path) -> None:
    """TFLOP/s over length: a panel for each pass and kind of problem of several lengths, a line per provider."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    timed = [row for row in rows if row["tflops"] is not None]
    if not timed:
        raise ValueError("nothing to plot: no provider was timed on the device clock.")
    lengths = {}
    for row in timed:
        lengths.setdefault((row["pass"], _panel(row)), set()).add(row["length"])
    # A problem of one length is no line; such ones are drawn where there is nothing else.
    panels = [panel for panel, found in lengths.items() if len(found) > 1] or list(lengths)
    providers = list(dict.fromkeys(row["provider"] for row in timed))
    columns = min(len(panels), MOST_COLUMNS)
    shape = (-(-len(panels) // columns), columns)
    size = (3.2 * shape[1] + 1, 2.6 * shape[0] + 1)
    figure, axes = pyplot.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    lines = {}
    for axis, (pass_, panel) in itertools.zip_longest(axes.flat, panels, fillvalue=(None, None)):
        if panel is None:
            axis.set_visible(False)
            continue
        here = [row for row in timed if (row["pass"], _panel(row)) == (pass_, panel)]
        axis.set_title(f"{pass_}, {panel}", fontsize=9)
        for index, provider in enumerate(providers):
            points = sorted((row["length"], row["tflops"]) for row in here if row["provider"] == provider)
            if points:
                (lines[provider],) = axis.plot(*zip(*points, strict=True), marker="o", color=f"C{index}")
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["length"] for row in here}))
        axis.xaxis.set_major_formatter(lambda n, place: f"{n // 1024:g}k" if n % 1024 == 0 else f"{n:g}")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s on live scores")
    figure.legend(lines.values(), lines, loc="outside upper center", ncol=len(lines), fontsize=9)
    first = timed[0]
    figure.supxlabel(f"{first['gpu']}, {first['dtype']}, torch {first['torch']}, triton {first['triton']}", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
