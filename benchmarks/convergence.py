"""Does one attention train as others do? Loss curves of runs, and the band that reference implementations span.

    python benchmarks/convergence.py collect runs/* --commit HASH --out benchmarks/results/convergence.jsonl
    python benchmarks/convergence.py compare benchmarks/results/convergence.jsonl --plot convergence.png

`collect` takes the losses out of run folders of recipes/xsum/train.py, one JSON line for a run. `compare` averages
over seeds. Runs that repeat a seed, with other roundings or other dropout, are draws of their own: each draw of a
reference is one curve, and the band at a step is what these curves span there. Low precision makes every curve
wander, so a fair one is not inside at every step either: each reference's draws, held against the band of the
others, say how often chance has it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import yaml

REFERENCES = ("eager", "sdpa")


def collect(folders: list[Path], commit: str, out: Path) -> int:
    """Appends a row for each folder whose run came to its last step; the number of rows."""
    rows = []
    for folder in folders:
        config = yaml.safe_load((folder / "config.yaml").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [round(line["loss"], 4) for line in lines if "loss" in line]
        if len(losses) < config["max_steps"]:
            print(f"{folder}: left out, it stopped at step {len(losses)} of {config['max_steps']}")
            continue
        evaluations = [line["eval_loss"] for line in lines if "eval_loss" in line]
        row = {key: config[key] for key in ("attn_implementation", "seed", "dropout")}
        rows.append({**row, "eval_loss": evaluations[-1] if evaluations else None, "commit": commit, "losses": losses})
    with out.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return len(rows)


def draws_of(rows: list[dict], seeds: list[int]) -> list[np.ndarray]:
    """Curves averaged over `seeds`, one for each time that all of them were run; equal ones count once."""
    by_seed = [[np.array(row["losses"]) for row in rows if row["seed"] == seed] for seed in seeds]
    draws: list[np.ndarray] = []
    for curves in zip(*by_seed, strict=False):
        mean = np.mean(curves, axis=0)
        if not any(np.array_equal(mean, other) for other in draws):
            draws.append(mean)
    return draws


def smoothed(curve: np.ndarray, window: int) -> np.ndarray:
    """Means of `window` steps in a row."""
    return np.convolve(curve, np.ones(window) / window, "valid")


def held_against(curve: np.ndarray, band: list[np.ndarray], window: int) -> tuple[float, float]:
    """Share of the steps at which a curve lies between the lowest and highest of others, and its largest way out."""
    others = np.array([smoothed(other, window) for other in band])
    curve = smoothed(curve, window)
    beyond = np.maximum(np.maximum(others.min(0) - curve, curve - others.max(0)), 0.0)
    return float((beyond == 0.0).mean()), float(beyond.max())


def compare(rows: list[dict], window: int, last: int) -> dict[float, list[dict]]:
    """For each dropout, a row for every implementation and for every draw of the references."""
    tables = {}
    for dropout in sorted({row["dropout"] for row in rows}):
        runs = defaultdict(list)
        for row in rows:
            if row["dropout"] == dropout:
                runs[row["attn_implementation"]].append(row)
        seeds = sorted(set.intersection(*({row["seed"] for row in own} for own in runs.values())))
        draws = {name: draws_of(own, seeds) for name, own in runs.items()}
        band = [(name, curve) for name in REFERENCES for curve in draws[name]]
        table = []
        for name in sorted(draws, key=lambda name: (name not in REFERENCES, name)):
            if name in REFERENCES:
                for index, curve in enumerate(draws[name]):
                    rest = [other for _, other in band if other is not curve]
                    table.append(_row(f"{name}, draw {index + 1}", [curve], runs[name], seeds, rest, window, last))
            else:
                references = [curve for _, curve in band]
                table.append(_row(name, draws[name], runs[name], seeds, references, window, last))
        tables[dropout] = table
    return tables


def _row(name, draws, runs, seeds, band, window, last) -> dict:
    curve = np.mean(draws, axis=0)
    inside, beyond = held_against(curve, band, window)
    evaluations = [row["eval_loss"] for row in runs if row["seed"] in seeds and row["eval_loss"] is not None]
    return {
        "attention": name,
        "seeds": len(seeds),
        "draws": len(draws),
        "end": float(curve[-last:].mean()),
        "eval_loss": float(np.mean(evaluations)) if evaluations else None,
        "inside": inside,
        "beyond": beyond,
        "curve": curve,
    }


def table_text(table: list[dict], window: int, last: int) -> str:
    """Markdown."""
    lines = [
        f"| attention | seeds x draws | last {last} steps | eval loss | inside the band of the others "
        f"({window}-step means) | largest way out |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in table:
        evaluation = "" if row["eval_loss"] is None else f"{row['eval_loss']:.4f}"
        lines.append(
            f"| {row['attention']} | {row['seeds']} x {row['draws']} | {row['end']:.4f} | {evaluation} | "
            f"{row['inside']:.0%} | {row['beyond']:.4f} |"
        )
    return "\n".join(lines)


def plot(tables: dict[float, list[dict]], window: int, path: Path) -> None:
    """Each curve less the mean of the references, a panel for each dropout."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.6 * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), squeeze=False)[:, 0]
    for axes, (dropout, table) in zip(panels, tables.items(), strict=True):
        references = [row for row in table if row["attention"].split(",")[0] in REFERENCES]
        centre = smoothed(np.mean([row["curve"] for row in references], axis=0), window)
        away = np.array([smoothed(row["curve"], window) - centre for row in references])
        steps = np.arange(window, window + len(centre))
        axes.fill_between(steps, away.min(0), away.max(0), color="0.8", label=f"band of {', '.join(REFERENCES)}")
        for row in table:
            if row not in references:
                axes.plot(steps, smoothed(row["curve"], window) - centre, label=row["attention"])
        axes.set(title=f"dropout {dropout:g}", xlabel="step", ylabel=f"loss less the references', {window}-step means")
        axes.legend()
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    collecting = commands.add_parser("collect")
    collecting.add_argument("folders", nargs="+", type=Path)
    collecting.add_argument("--commit", required=True, help="of the code that ran")
    collecting.add_argument("--out", required=True, type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("rows", type=Path)
    comparing.add_argument("--window", type=int, default=50, help="steps that curves are averaged over")
    comparing.add_argument("--last", type=int, default=50, help="steps of the mean at the end")
    comparing.add_argument("--plot", type=Path, help="picture to write")
    options = parser.parse_args(arguments)
    if options.command == "collect":
        print(f"{collect(options.folders, options.commit, options.out)} runs")
        return
    rows = [json.loads(line) for line in options.rows.read_text().splitlines()]
    tables = compare(rows, options.window, options.last)
    for dropout, table in tables.items():
        print(f"\ndropout {dropout:g}\n\n{table_text(table, options.window, options.last)}")
    if options.plot is not None:
        plot(tables, options.window, options.plot)


if __name__ == "__main__":
    main()
