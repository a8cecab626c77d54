"""The report's figures. Colours are Okabe and Ito's, which stay apart for colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import EngFormatter, MaxNLocator

from recipes.xsum.files import new_file
from recipes.xsum.runs import Run

GIB = 2**30
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":")  # runs that should agree lie on each other: both must show
ROUGE_LABELS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum"}
STYLE = {
    "figure.dpi": 150,
    "figure.figsize": (7.5, 4.2),
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def smooth(values: Sequence[float], share: float = 0.02) -> np.ndarray:
    """Exponential moving average over about `share` of the values, without a bias to the first one."""
    weight = 1 / max(1.0, share * len(values))
    total, mass, out = 0.0, 0.0, []
    for value in values:
        total, mass = (1 - weight) * total + weight * value, (1 - weight) * mass + weight
        out.append(total / mass)
    return np.array(out)


def _line_style(index: int) -> dict:
    width = 2.4 - 0.3 * min(index, 4)
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)], "linewidth": width}


def _loss(axes: plt.Axes, runs: Sequence[Run], x_label: str, x_of: Callable[[dict], float]) -> bool:
    losses = []
    for index, run in enumerate(runs):
        if not run.train:
            continue
        x, loss = [x_of(record) for record in run.train], [record["loss"] for record in run.train]
        style = _line_style(index)
        axes.plot(x, loss, color=style["color"], alpha=0.2, linewidth=0.8)
        axes.plot(x, smooth(loss), label=run.name, **style)
        losses.extend(loss)
    if not losses:
        return False
    axes.set(xlabel=x_label, ylabel="training loss (nats per token)")
    if axes.get_xlim()[1] >= 1000:
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.legend()
    return True


def _by_step(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    return _loss(axes, runs, "optimiser step", lambda record: record["step"])


def _by_token(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    return _loss(axes, runs, "tokens", lambda record: record["source_tokens"] + record["target_tokens"])


def _by_time(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    longest = max((run.train[-1]["seconds"] for run in runs if run.train), default=0.0)
    unit, name = (60, "minutes") if longest > 180 else (1, "seconds")
    return _loss(axes, runs, f"wall clock ({name})", lambda record: record["seconds"] / unit)


def _difference(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    drawn = False
    base = runs[0]
    reference = {record["step"]: record["loss"] for record in base.train}
    for index, run in enumerate(runs):
        if run is base or not run.same_data_order(base):
            continue
        pairs = [(r["step"], r["loss"] - reference[r["step"]]) for r in run.train if r["step"] in reference]
        steps, values = zip(*pairs, strict=True)
        style = _line_style(index)
        axes.plot(steps, values, color=style["color"], alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(values), label=f"{run.name} minus {base.name}", **style)
        drawn = True
    if drawn:
        axes.axhline(0, color="#555555", linewidth=0.8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="optimiser step", ylabel="difference of training loss")
        axes.legend()
    return drawn


def _rouge(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    scored = [(index, run) for index, run in enumerate(runs) if run.rouge]
    for place, (index, run) in enumerate(scored):
        offset = (place - (len(scored) - 1) / 2) * min(0.14, 0.8 / len(scored))
        for scores, filled in ((run.rouge, True), (run.rouge.get("untrained"), False)):
            if not scores:
                continue
            values = np.array([[scores[name][part] for name in ROUGE_LABELS] for part in ("score", "low", "high")])
            axes.errorbar(
                np.arange(len(ROUGE_LABELS)) + offset,
                values[0],
                yerr=[values[0] - values[1], values[2] - values[0]],
                fmt="osD^v"[place % 5],
                color=COLOURS[index % len(COLOURS)],
                markerfacecolor=None if filled else "white",
                capsize=3,
                markersize=5,
                clip_on=False,
                label=run.name if filled else None,
            )
    if scored:
        axes.set_xticks(range(len(ROUGE_LABELS)), ROUGE_LABELS.values())
        axes.set(ylabel="F-measure (0 to 100)")
        axes.set_xlim(-0.5, len(ROUGE_LABELS) - 0.5)
        axes.set_ylim(bottom=0)
        axes.grid(axis="x", visible=False)
        axes.figure.legend(loc="outside right upper")
    return bool(scored)


def _bars(axes: plt.Axes, runs: Sequence[Run], values: Sequence[float | None], label: str, form: str) -> bool:
    shown = [(index, run, value) for index, (run, value) in enumerate(zip(runs, values, strict=True)) if value]
    if not shown:
        return False
    bars = axes.barh(
        range(len(shown)),
        [value for _, _, value in shown],
        height=0.6,
        color=[COLOURS[index % len(COLOURS)] for index, _, _ in shown],
    )
    axes.bar_label(bars, fmt=form, padding=4)
    axes.set_yticks(range(len(shown)), [run.name for _, run, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.set(xlabel=label)
    axes.grid(axis="y", visible=False)
    axes.figure.set_size_inches(7.5, 1.1 + 0.45 * len(shown))
    return True


def part_names(ledgers: Iterable[dict]) -> list[str]:
    """The parts that any of the ledgers has, in their order."""
    names = []
    for ledger in ledgers:
        previous = 0
        for name in ledger["parts"]:
            if name not in names:
                names.insert(previous, name)
            previous = names.index(name) + 1
    return names


def _parts(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    shown = [run for run in runs if run.ledger]
    if not shown:
        return False
    left = np.zeros(len(shown))
    names = part_names(run.ledger for run in shown)
    for name, colour in zip(names, plt.get_cmap("tab20").colors, strict=False):
        sizes = np.array([run.ledger["parts"].get(name, 0) / GIB for run in shown])
        axes.barh(range(len(shown)), sizes, left=left, height=0.6, color=colour, label=name)
        left += sizes
    axes.set_yticks(range(len(shown)), [run.name for run in shown])
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set(xlabel="memory at the peak of a step (GiB)")
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower center", ncols=4)
    axes.figure.set_size_inches(7.5, 2.3 + 0.45 * len(shown))
    return True


def _throughput(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    return _bars(axes, runs, [run.rate("tokens") for run in runs], "tokens per second", "{:,.0f}")


def _memory(axes: plt.Axes, runs: Sequence[Run]) -> bool:
    peaks = [run.train[-1]["peak_memory_gib"] if run.train else None for run in runs]
    return _bars(axes, runs, peaks, "peak memory (GiB)", "{:.2f}")


FIGURES = (
    (_by_step, "loss_by_step.png", "Training loss by step", "Faint: as logged, strong: moving average."),
    (_by_token, "loss_by_token.png", "Training loss by token", "Tokens of source and target, without padding."),
    (_by_time, "loss_by_time.png", "Training loss by wall clock", "Training alone, no evaluation, no checkpoints."),
    (
        _difference,
        "loss_difference.png",
        "Difference of training loss",
        "The first run's loss at the same step taken off; faint: as logged, strong: moving average.",
    ),
    (
        _rouge,
        "rouge.png",
        "ROUGE on held-out documents",
        "With 95 % bootstrap intervals; hollow: the untrained model.",
    ),
    (_throughput, "throughput.png", "Throughput of training", "Tokens of source and target, without padding."),
    (
        _memory,
        "memory.png",
        "Peak memory of training",
        "What torch's CUDA allocator gave out; on the CPU, the whole process.",
    ),
    (_parts, "memory_parts.png", "Where the memory goes", "One micro-batch's forward and backward pass, as measured."),
)


def draw_plots(runs: Sequence[Run], out: Path) -> list[tuple[str, str, str]]:
    """Write every figure that the runs have data for; returns `(file name, title, caption)` in the report's order."""
    made = []
    with plt.rc_context(STYLE):
        for draw, name, title, caption in FIGURES:
            figure, axes = plt.subplots()
            axes.set_title(title, loc="left")
            if draw(axes, runs):
                with new_file(out / name) as partial:
                    figure.savefig(partial, format="png")
                made.append((name, title, caption))
            plt.close(figure)
    return made
