"""The run directory: when it may be used, atomic checkpoints, and what a resumed run must have in common."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from recipes.xsum.config import NAMES, Config, ConfigError, load_config
from recipes.xsum.metrics import TrainingState

# And config.yaml, the mark of a run.
OWN_FILES = ("env.json", "metrics.jsonl", "ledger.json", "rouge.json", "predictions.jsonl")
OWN_FOLDERS = ("checkpoints", "model", "tokenizer", "trackers")
# A resumed run may differ in these: where it lies, how long it goes on, what it logs and keeps.
FREE_ON_RESUME = ("output_dir", "max_steps", "num_epochs", "log_every", "save_every", "keep_checkpoints", "report_to")
CHECKPOINT_NAME = re.compile(r"step_(\d{8})")


def check_run_dir(config: Config, *, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; writes nothing.

    Raises `ConfigError` where the run would destroy files, has nothing to resume, or resumes another config.
    """
    run_dir = Path(config.output_dir)
    occupied = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts it again: give one of them")
    if resume:
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"--resume: {run_dir} holds no run (no config.yaml); leave --resume out to start one")
        checkpoint = latest_checkpoint(run_dir)
        if checkpoint is None:
            raise ConfigError(f"--resume: {run_dir} holds no complete checkpoint; start again with --overwrite")
        _check_same_config(load_config(run_dir / "config.yaml"), config, checkpoint)
        return checkpoint
    if occupied and not overwrite:
        raise ConfigError(f"output_dir {run_dir} is not empty; continue with --resume, start again with --overwrite")
    own = [name for name in (*OWN_FILES, *OWN_FOLDERS) if (run_dir / name).exists()]
    if own and not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--overwrite: {run_dir} holds {own[0]} but no config.yaml, so it is no run; choose another")
    return None


def open_run_dir(config: Config, environment: dict[str, Any], *, resume: bool) -> None:
    """Write config.yaml and env.json. A new run first removes what an earlier one left there, nothing else.

    Each resumed session adds its environment to "resumed" in env.json.
    """
    run_dir = Path(config.output_dir)
    if resume:
        first = json.loads((run_dir / "env.json").read_text())
        environment = {**first, "resumed": [*first.get("resumed", []), environment]}
    else:
        for name in OWN_FOLDERS:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", config.to_yaml())
    write_atomically(run_dir / "env.json", json.dumps(environment, indent=2) + "\n")


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The complete checkpoint with the most steps; one still being written has another name."""
    folders = (run_dir / "checkpoints").glob("step_*")
    return max((folder for folder in folders if CHECKPOINT_NAME.fullmatch(folder.name)), default=None)


def save_checkpoint(
    accelerator: Accelerator, config: Config, state: TrainingState, lengths: list[int], metrics_bytes: int
) -> Path:
    """Write RUN_DIR/checkpoints/step_XXXXXXXX: all at once or not at all. Every process must call it.

    Holds model, optimiser and every process' generators (Accelerate's files) and state.json: counters, hashes of
    the config and of the training documents' `lengths`, size of metrics.jsonl. The place in the data and the
    learning rate follow from the step.
    """
    folder = Path(config.output_dir) / "checkpoints"
    complete, partial = folder / f"step_{state.step:08d}", folder / f"partial_{state.step:08d}"
    if complete.exists():
        return complete
    if accelerator.is_main_process:
        for stale in folder.glob("partial_*"):
            shutil.rmtree(stale)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        record = {
            "state": asdict(state),
            "metrics_bytes": metrics_bytes,
            "processes": accelerator.num_processes,
            "config_hash": config_hash(config),
            "data_hash": _hash(lengths),
        }
        (partial / "state.json").write_text(json.dumps(record, indent=2) + "\n")
        for path in partial.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        partial.rename(complete)
        checkpoints = sorted(path for path in folder.iterdir() if CHECKPOINT_NAME.fullmatch(path.name))
        for old in checkpoints[: -config.keep_checkpoints]:
            # Under another name first: a half-deleted folder must never pass for a checkpoint.
            shutil.rmtree(old.rename(folder / f"partial_{old.name}"))
    accelerator.wait_for_everyone()
    return complete


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, lengths: list[int]) -> tuple[TrainingState, int]:
    """Load model, optimiser and generators in place; returns the counters and metrics.jsonl's size then.

    Raises `ConfigError` where the run had another number of processes or other training documents, so that its
    order of the data cannot be continued, or where metrics.jsonl has lost lines.
    """
    record = json.loads((checkpoint / "state.json").read_text())
    metrics = checkpoint.parents[1] / "metrics.jsonl"
    size = metrics.stat().st_size if metrics.exists() else 0
    if size < record["metrics_bytes"]:
        raise ConfigError(f"{metrics} is shorter than it was at {checkpoint.name}: lines were removed since")
    if record["data_hash"] != _hash(lengths):
        raise ConfigError(f"the training documents are not those that {checkpoint} was trained on")
    if record["processes"] != accelerator.num_processes:
        raise ConfigError(
            f"{checkpoint} was written by {record['processes']} processes and this run has "
            f"{accelerator.num_processes}; resume with as many"
        )
    accelerator.load_state(str(checkpoint))
    return TrainingState(**record["state"]), record["metrics_bytes"]


def config_hash(config: Config) -> str:
    """SHA-256 of everything that decides the course of training."""
    values = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    return _hash(values)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _check_same_config(saved: Config, config: Config, checkpoint: Path) -> None:
    differing = [name for name in NAMES if getattr(saved, name) != getattr(config, name)]
    fixed = [name for name in differing if name not in FREE_ON_RESUME]
    if fixed:
        details = ", ".join(f"{name} (was {getattr(saved, name)!r}, now {getattr(config, name)!r})" for name in fixed)
        raise ConfigError(f"--resume with another config; differing: {details}")
    record = json.loads((checkpoint / "state.json").read_text())
    if record["config_hash"] != config_hash(config):
        raise ConfigError(f"config.yaml in {config.output_dir} was changed since {checkpoint.name} was written")
