"""What the report reads of a run directory."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from recipes.xsum.errors import RecipeError
from recipes.xsum.files import read_json

COUNTERS = ("examples", "source_tokens", "target_tokens")


class ReportError(RecipeError, ValueError):
    """The arguments name no run, or a file of one is damaged."""


@dataclass(frozen=True)
class Run:
    """One run directory as read; `missing` says in words what was not there."""

    name: str
    config: dict[str, Any]
    train: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    rouge: dict[str, Any] | None = None
    env: dict[str, Any] | None = None
    ledger: dict[str, Any] | None = None  # where the memory of a step goes, in bytes
    missing: tuple[str, ...] = ()

    def rate(self, what: str) -> float | None:
        """Per second of training: "tokens" or "examples"; from the first logged line to the last."""
        if len(self.train) < 2:
            return None
        keys = ("source_tokens", "target_tokens") if what == "tokens" else (what,)
        first, last = self.train[0], self.train[-1]
        return sum(last[key] - first[key] for key in keys) / (last["seconds"] - first["seconds"])

    @property
    def final_loss(self) -> float | None:
        """Mean training loss over the last tenth of the logged lines, each weighted by its target tokens."""
        lines = self.train[-max(1, len(self.train) // 10) :]
        before = self.train[-len(lines) - 1]["target_tokens"] if len(self.train) > len(lines) else 0
        total = weight = 0.0
        for line in lines:
            tokens, before = line["target_tokens"] - before, line["target_tokens"]
            total, weight = total + tokens * line["loss"], weight + tokens
        return total / weight if weight else None

    def same_data_order(self, other: Run) -> bool:
        """Whether both saw the same numbers of documents and tokens by each logged step they share."""
        seen = {line["step"]: [line[key] for key in COUNTERS] for line in other.train}
        shared = [(seen[line["step"]], [line[key] for key in COUNTERS]) for line in self.train if line["step"] in seen]
        return bool(shared) and all(a == b for a, b in shared)


def read_run(path: Path) -> Run:
    """Read a run directory, finished or not. Raises `ReportError` where it has no config.yaml."""
    if not (path / "config.yaml").is_file():
        raise ReportError(f"{path} is no run directory: it has no config.yaml")
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ReportError(f"{path / 'config.yaml'} is no valid YAML: {' '.join(str(error).split())}") from error
    missing, records = [], []
    if not (path / "metrics.jsonl").is_file():
        missing.append("no metrics.jsonl: training never started")
    else:
        lines = (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()
            missing.append("the last line of metrics.jsonl is cut: killed while writing")
        records = [_parse(path / "metrics.jsonl", number, line) for number, line in enumerate(lines, start=1)]
        if not any("loss" in record for record in records):
            missing.append("no training step logged")
    train = [record for record in records if "loss" in record]
    evals = [record for record in records if "eval_loss" in record]
    if not (path / "model").is_dir():
        missing.append("unfinished: no trained model" + (f", last logged step {train[-1]['step']}" if train else ""))
    rouge, env = _read_json(path / "rouge.json"), _read_json(path / "env.json")
    if rouge is None or "rouge1" not in rouge:
        never = config.get("rouge") == "never"
        missing.append("no ROUGE scores" + (" (rouge: never)" if never else ": no rouge.json of the trained model"))
        rouge = None
    if not evals:
        missing.append("no evaluation loss")
    ledger = _read_json(path / "ledger.json")
    if ledger is None:
        missing.append("no ledger.json: a single process writes it after its first step")
    return Run(path.resolve().name, config, train, evals, rouge, env, ledger, tuple(missing))


def _read_json(path: Path) -> dict | None:
    return read_json(path, "remove it to report without it") if path.is_file() else None


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ReportError(f"{path}, line {number} is damaged: {error}; train.py --resume mends it") from error
