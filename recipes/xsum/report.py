"""Compare runs: a table and plots, from nothing but their run directories.

    python recipes/xsum/report.py runs/* [--out report]

Writes OUT/report.md and the figures that it shows. What a run lacks is said in the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from recipes.xsum.errors import run_script
from recipes.xsum.files import write_atomically
from recipes.xsum.plots import GIB, ROUGE_LABELS, draw_plots, part_names
from recipes.xsum.run_lock import RunLock
from recipes.xsum.runs import ReportError, Run, read_run

MEMORY_NOTE = (
    "Tensors alive at the peak of one forward and backward pass of one micro-batch, which the run repeated after its "
    "first step. Activations stand under the part of the model that keeps them for the backward pass; workspace is "
    "what nothing keeps."
)


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write `out`/report.md and its figures; returns the report's path."""
    runs = _unique_names([read_run(path) for path in paths])
    with RunLock(out) as lock:
        lock.acquire()
        report = out / "report.md"
        write_atomically(report, _text(runs, draw_plots(runs, out)))
    return report


def _text(runs: Sequence[Run], plots: Sequence[tuple[str, str, str]]) -> str:
    """The report in Markdown; `plots` is what `draw_plots` returned."""
    parts = [
        "# Runs compared",
        "## Summary",
        _table(runs, SETTING_COLUMNS),
        _table(runs, RESULT_COLUMNS),
        "Loss: nats per target token; the training loss is the mean over the last tenth of the logged lines. "
        "Tokens: source and target without padding. Wall clock, rates and peak memory are of training alone, "
        "without evaluation and checkpoints; rates leave out everything up to the first logged line.",
    ]
    if smoothed := [run.name for run in runs if run.config["label_smoothing"]]:
        parts.append(
            f"The training loss of {', '.join(smoothed)} includes label smoothing, the evaluation loss does not."
        )
    parts += ["## ROUGE", _rouge_table(runs)]
    if any(run.ledger for run in runs):
        parts += ["## Memory", _memory_table(runs), MEMORY_NOTE]
    if notes := [f"- **{run.name}**: {note}" for run in runs for note in run.missing]:
        parts += ["## Missing", "\n".join(notes)]
    if len(runs) > 1:
        parts += ["## Data order", _order_note(runs)]
    parts.append("## Plots")
    parts += [f"### {title}\n\n![{title}]({name})\n\n{caption}" for name, title, caption in plots] or [
        "Nothing was logged to plot."
    ]
    return "\n\n".join(parts) + "\n"


def _unique_names(runs: list[Run]) -> list[Run]:
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise ReportError(f"two run directories are called {name}: the report could not tell them apart")
    return runs


def _backend(run: Run) -> str:
    backends = run.train[-1]["attention"]["backends"] if run.train else {}
    return ", ".join(f"{name} ({layers} layers)" for name, layers in backends.items()) or "not recorded"


def _model(run: Run) -> str:
    given = run.config["model_config"]
    return run.config["model"] or f"{given['model_type']}, from scratch"


def _batch(run: Run) -> str:
    config = run.config
    budget = config.get("token_budget")
    parts = [budget or config["per_device_batch_size"], config["gradient_accumulation_steps"]]
    parts.append((run.env or {}).get("processes", 1))
    whole = f"{parts[0] * parts[1] * parts[2]:,d}" + (" tokens" if budget else "")
    return whole + (f" = {' × '.join(map(str, parts))}" if parts[1:] != [1, 1] else "")


def _options(run: Run) -> str:
    on = [
        name
        for name in (
            "padding_free",
            "cuda_graphs",
            "fused_linear_cross_entropy",
            "gradient_checkpointing",
            "group_by_length",
        )
        if run.config.get(name)
    ]
    return ", ".join(on) or "–"


def _padding(run: Run) -> str:
    """Share of padding among the positions of all batches."""
    if not run.train:
        return "–"
    last = run.train[-1]
    share = 1 - (last["source_tokens"] + last["target_tokens"]) / last["padded_tokens"]
    return f"{share:.0%}" + (" (skipped)" if run.config.get("padding_free") else "")


def _dataset(run: Run) -> str:
    names = {"hub": run.config["dataset_name"], "files": Path(run.config["train_file"] or "").name}
    return names.get(run.config["dataset"], run.config["dataset"])


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _last(run: Run, key: str) -> Any:
    return run.train[-1][key] if run.train else None


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min {rest:02d} s"


SETTING_COLUMNS = {
    "attention": lambda run: run.config["attn_implementation"],
    "back end": _backend,
    "model": _model,
    "dataset": _dataset,
    "batch": _batch,
    "options": _options,
    "precision": lambda run: {"no": "fp32"}.get(run.config["mixed_precision"], run.config["mixed_precision"]),
    "device": lambda run: (run.env or {}).get("device", "–"),
}
RESULT_COLUMNS = {
    "steps": lambda run: _number(_last(run, "step"), ",d"),
    "train loss": lambda run: _number(run.final_loss, ".4f"),
    "eval loss": lambda run: f"{run.evals[-1]['eval_loss']:.4f} ({run.evals[-1]['split']})" if run.evals else "–",
    "padding": _padding,
    "tokens/s": lambda run: _number(run.rate("tokens"), ",.0f"),
    "examples/s": lambda run: _number(run.rate("examples"), ",.1f"),
    "peak memory": lambda run: "–" if not run.train else f"{_last(run, 'peak_memory_gib'):.2f} GiB",
    "wall clock": lambda run: _duration(_last(run, "seconds")),
}


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    rule = ["---" if column < left else "---:" for column in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def _table(runs: Sequence[Run], columns: dict) -> str:
    left = len(columns) + 1 if columns is SETTING_COLUMNS else 1
    return _markdown(["run", *columns], [[run.name, *(cell(run) for cell in columns.values())] for run in runs], left)


def _rouge_table(runs: Sequence[Run]) -> str:
    rows = []
    for run in runs:
        for label, scores in (("trained", run.rouge), ("untrained", (run.rouge or {}).get("untrained"))):
            if scores:
                values = (scores[name] for name in ROUGE_LABELS)
                cells = (f"{value['score']:.2f} ({value['low']:.2f} to {value['high']:.2f})" for value in values)
                rows.append([run.name, label, *cells])
    if not rows:
        return "No run has ROUGE scores."
    table = _markdown(["run", "model", *ROUGE_LABELS.values()], rows, 2)
    return f"{table}\n\nF-measure from 0 to 100 with stemming; in brackets the 95 % bootstrap interval."


def _memory_table(runs: Sequence[Run]) -> str:
    ledgers = {run.name: run.ledger for run in runs if run.ledger}
    names = part_names(ledgers.values())
    rows = [[name, *(f"{ledger['parts'].get(name, 0) / GIB:.3f}" for ledger in ledgers.values())] for name in names]
    rows.append(["all parts", *(f"{sum(ledger['parts'].values()) / GIB:.3f}" for ledger in ledgers.values())])
    peaks = [ledger["allocator_peak"] for ledger in ledgers.values()]
    if any(peaks):
        rows.append(["allocator's peak", *("–" if peak is None else f"{peak / GIB:.3f}" for peak in peaks)])
    rows.append(["peak in", *(ledger["moment"] for ledger in ledgers.values())])
    return _markdown(["GiB", *ledgers], rows, 1)


def _order_note(runs: Sequence[Run]) -> str:
    first = runs[0].name
    same = [run.name for run in runs[1:] if run.same_data_order(runs[0])]
    other = [run.name for run in runs[1:] if run.name not in same]
    parts = [f"Same documents in the same order as {first}: {', '.join(same)}."] if same else []
    if other:
        parts.append(f"Not the same data order as {first}, so left out of the loss differences: {', '.join(other)}.")
    return " ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories; the first one is the reference")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write to [report]")
    arguments = parser.parse_args(argv)
    return run_script(lambda: print(write_report(arguments.runs, arguments.out)))


if __name__ == "__main__":
    sys.exit(main())
