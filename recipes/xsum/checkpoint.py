"""The run directory: when it may be used, atomic checkpoints, and what a resumed run must have in common."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import load

from recipes.xsum.config import NAMES, Config, ConfigError, load_config
from recipes.xsum.errors import RecipeError
from recipes.xsum.files import fsync, read_json, sync, write_atomically, writing
from recipes.xsum.manifest import damage_of, write_manifest
from recipes.xsum.metrics import TrainingState
from recipes.xsum.processes import on_main, together
from recipes.xsum.run_lock import LOCK_NAME

# And config.yaml, the mark of a run.
OWN_FILES = ("env.json", "metrics.jsonl", "ledger.json", "rouge.json", "predictions.jsonl")
OWN_FOLDERS = ("checkpoints", "model", "tokenizer", "trackers")
# A resumed run may differ in these: where it lies, how long it goes on, what it logs and keeps.
FREE_ON_RESUME = ("output_dir", "max_steps", "num_epochs", "log_every", "save_every", "keep_checkpoints", "report_to")
CHECKPOINT_NAME = re.compile(r"step_(\d{8})")
#: What --resume takes where it names no checkpoint.
NEWEST = "newest"

logger = logging.getLogger(__name__)


class CheckpointError(RecipeError):
    """A checkpoint that is not whole; the message names the part and how to go on without it."""


def check_run_dir(config: Config, *, resume: str | None, overwrite: bool) -> Path | None:
    """The checkpoint to resume from, None for a new run; writes nothing. The caller holds the run's lock.

    `resume` is `NEWEST` or names a checkpoint. Raises `RecipeError` where the run would destroy files, has nothing
    whole to resume, or resumes another config.
    """
    run_dir = Path(config.output_dir)
    occupied = run_dir.exists() and (not run_dir.is_dir() or any(path.name != LOCK_NAME for path in run_dir.iterdir()))
    if resume and overwrite:
        raise ConfigError("--resume continues a run and --overwrite starts it again: give one of them")
    if resume:
        if not (run_dir / "config.yaml").is_file():
            raise ConfigError(f"--resume: {run_dir} holds no run (no config.yaml); leave --resume out to start one")
        checkpoint = find_checkpoint(run_dir, resume)
        _check_same_config(load_config(run_dir / "config.yaml"), config, checkpoint)
        return checkpoint
    if occupied and not overwrite:
        raise ConfigError(f"output_dir {run_dir} is not empty; continue with --resume, start again with --overwrite")
    own = [name for name in (*OWN_FILES, *OWN_FOLDERS) if (run_dir / name).exists()]
    if own and not (run_dir / "config.yaml").is_file():
        raise ConfigError(f"--overwrite: {run_dir} holds {own[0]} but no config.yaml, so it is no run; choose another")
    return None


def open_run_dir(config: Config, environment: dict[str, Any], checkpoint: Path | None) -> None:
    """Write config.yaml and env.json. A new run first removes what an earlier one left there, nothing else.

    Each resumed session adds its environment to "resumed" in env.json. Checkpoints after the one it resumes from are
    undone, as their lines of metrics.jsonl are: they go when the next one is written.
    """
    run_dir = Path(config.output_dir)
    if checkpoint is not None:
        path = run_dir / "env.json"
        first = read_json(path, "remove it to go on without it") if path.exists() else environment
        environment = {**first, "resumed": [*first.get("resumed", []), environment]}
        for newer in checkpoints_of(run_dir):
            if newer > checkpoint:
                with writing(newer):
                    _set_aside(newer)
    else:
        for name in OWN_FOLDERS:
            if (run_dir / name).exists():
                shutil.rmtree(run_dir / name)
        for name in OWN_FILES:
            (run_dir / name).unlink(missing_ok=True)
        run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", config.to_yaml())
    write_atomically(run_dir / "env.json", json.dumps(environment, indent=2) + "\n")


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The complete checkpoints, fewest steps first; those still being written have other names."""
    return sorted(path for path in (run_dir / "checkpoints").glob("step_*") if CHECKPOINT_NAME.fullmatch(path.name))


def find_checkpoint(run_dir: Path, wanted: str) -> Path:
    """The newest checkpoint of a run, or the one called `wanted` or lying at that path, if it is whole."""
    found = checkpoints_of(run_dir)
    if not found:
        raise ConfigError(f"--resume: {run_dir} holds no complete checkpoint; start again with --overwrite")
    checkpoint = found[-1]
    if wanted != NEWEST:
        named = Path(wanted) if len(Path(wanted).parts) > 1 else run_dir / "checkpoints" / wanted
        checkpoint = next((path for path in found if path.resolve() == named.resolve()), None)
        if checkpoint is None:
            names = ", ".join(path.name for path in found)
            raise ConfigError(f"--resume: {run_dir} holds no checkpoint {wanted}, only {names}")
    if (fault := damage_of(checkpoint)) is not None:
        raise CheckpointError(f"{checkpoint} is damaged: {fault}; {_remedy(checkpoint)}")
    return checkpoint


def _remedy(damaged: Path) -> str:
    """How to go on without a checkpoint."""
    others = [path for path in reversed(checkpoints_of(damaged.parents[1])) if path < damaged]
    older = next((path for path in others if damage_of(path) is None), None)
    if older is None:
        return "no older one is whole, so start again with --overwrite"
    return f"continue from an older one with --resume {older.name}"


def save_checkpoint(
    accelerator: Accelerator, config: Config, state: TrainingState, lengths: list[int], metrics_bytes: int
) -> Path:
    """Write RUN_DIR/checkpoints/step_XXXXXXXX: all at once or not at all. Every process must call it.

    Holds model, optimiser and every process' generators (Accelerate's files), state.json: counters, hashes of
    the config and of the training documents' `lengths`, size of metrics.jsonl; and manifest.json, see `damage_of`.
    The place in the data and the learning rate follow from the step.

    Raises `WriteError`, on every process, where one of them cannot write; earlier checkpoints stay.
    """
    folder = Path(config.output_dir) / "checkpoints"
    complete, partial = folder / f"step_{state.step:08d}", folder / f"partial_{state.step:08d}"
    if on_main(accelerator, lambda: complete.exists() or _remove_partial(folder, complete)):
        return complete
    record = {
        "state": asdict(state),
        "metrics_bytes": metrics_bytes,
        "processes": accelerator.num_processes,
        "config_hash": config_hash(config),
        "data_hash": _hash(lengths),
    }

    def save_parts() -> None:
        with writing(complete):
            accelerator.save_state(str(partial))

    def complete_it() -> None:
        with writing(complete):
            _check_parts(partial, accelerator.num_processes)
            write_atomically(partial / "state.json", json.dumps(record, indent=2) + "\n")
            write_manifest(partial)
            sync(partial)
            partial.rename(complete)
            fsync(folder)
            for old in checkpoints_of(folder.parent)[: -config.keep_checkpoints]:
                # Under another name first: a half-deleted folder must never pass for a checkpoint.
                shutil.rmtree(_set_aside(old))

    try:
        together(accelerator, save_parts)
        on_main(accelerator, complete_it)
    except RecipeError:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return complete


def _remove_partial(folder: Path, complete: Path) -> None:
    with writing(complete):
        for stale in folder.glob("partial_*"):
            shutil.rmtree(stale)


def _set_aside(checkpoint: Path) -> Path:
    """Rename a checkpoint to what the next one to be written removes."""
    aside = checkpoint.with_name(f"partial_{checkpoint.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def _check_parts(partial: Path, processes: int) -> None:
    for process in range(processes):
        if not (partial / f"random_states_{process}.pkl").exists():
            raise CheckpointError(
                f"{partial} lacks the part of process {process}: output_dir must be one folder for all machines"
            )


def load_checkpoint(accelerator: Accelerator, checkpoint: Path, lengths: list[int]) -> tuple[TrainingState, int]:
    """Load model, optimiser and generators in place; returns the counters and metrics.jsonl's size then.

    Raises:
        ConfigError: the run had another number of processes or other training documents, so that its order of the
            data cannot be continued, or metrics.jsonl has lost lines.
        CheckpointError: a part cannot be loaded.
    """
    record = read_json(checkpoint / "state.json", _remedy(checkpoint))
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
    try:
        state = TrainingState(**record["state"])
        accelerator.load_state(str(checkpoint))
        _check_generators(checkpoint / f"random_states_{accelerator.process_index}.pkl", accelerator.device)
    except Exception as error:  # of safetensors, pickle, torch, each its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{checkpoint} cannot be loaded: {reason}; {_remedy(checkpoint)}") from error
    return state, record["metrics_bytes"]


def _check_generators(path: Path, device: torch.device) -> None:
    """Raise where this process' generators are not as saved: Accelerate hides that it could not set them."""
    saved = load(path)
    if not torch.equal(torch.get_rng_state(), saved["torch_manual_seed"]):
        raise ValueError(f"the random generators of {path.name} cannot be set")
    if device.type == "cuda":
        states = saved.get("torch_cuda_manual_seed", [])
        index = torch.cuda.current_device() if device.index is None else device.index
        if index >= len(states) or not torch.equal(torch.cuda.get_rng_state(index), states[index]):
            logger.warning("%s is of %d GPUs: on this one dropout draws other numbers", path, len(states))


def config_hash(config: Config) -> str:
    """SHA-256 of everything that decides the course of training."""
    values = {name: value for name, value in asdict(config).items() if name not in FREE_ON_RESUME}
    return _hash(values)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _check_same_config(saved: Config, config: Config, checkpoint: Path) -> None:
    differing = [name for name in NAMES if getattr(saved, name) != getattr(config, name)]
    fixed = [name for name in differing if name not in FREE_ON_RESUME]
    if fixed:
        details = ", ".join(f"{name} (was {getattr(saved, name)!r}, now {getattr(config, name)!r})" for name in fixed)
        raise ConfigError(f"--resume with another config; differing: {details}")
    record = json.loads((checkpoint / "state.json").read_text())
    if record["config_hash"] != config_hash(config):
        raise ConfigError(f"config.yaml in {config.output_dir} was changed since {checkpoint.name} was written")
