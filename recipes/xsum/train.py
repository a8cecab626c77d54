"""Train a summarisation model, evaluate it, and leave everything in one run directory.

    python recipes/xsum/train.py --config recipes/xsum/configs/smoke.yaml
    accelerate launch --config_file recipes/accelerate/multi_gpu.yaml recipes/xsum/train.py \\
        --config recipes/xsum/configs/bsa_dense.yaml --output_dir runs/bsa_dense

`--help` lists every option; any of them may follow `--config`, and wins over the file.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a file: the repository's root is not on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, send_to_device, set_seed

from hf_flashbsa import warm_up  # and registers bsa_dense
from recipes.xsum.batches import RunData
from recipes.xsum.checkpoint import NEWEST, check_run_dir, load_checkpoint, open_run_dir, save_checkpoint
from recipes.xsum.config import Config, ConfigError, load_config, parse_arguments
from recipes.xsum.display import Display, quiet_libraries
from recipes.xsum.errors import Interrupted, RecipeError, WriteError, run_script
from recipes.xsum.evaluate import (
    evaluate_loss,
    generate_summaries,
    loss_batches,
    write_scores,
    write_untrained_scores,
)
from recipes.xsum.files import new_folder, write_atomically, writing
from recipes.xsum.loop import StopSignal, check_trackers, learning_rate_at
from recipes.xsum.memory import apply_options, options_record, write_ledger
from recipes.xsum.metrics import GIB, Meter, MetricsLog, TrainingState, Window, run_environment
from recipes.xsum.model import (
    IGNORED_LABEL,
    attention_record,
    build_model,
    build_optimizer,
    check_attention,
    prepare,
    training_loss,
)
from recipes.xsum.processes import on_main, start_accelerator, together
from recipes.xsum.rouge import rouge_scores
from recipes.xsum.run_lock import RunLock

#: What gloo's threads are given to end their work; they take microseconds.
GLOO_SECONDS = 0.5


class TrainingError(RecipeError):
    """Training cannot go on; the message says why and what to change."""


def train(config: Config, *, resume: str | None = None, overwrite: bool = False) -> Path:
    """Train, save and evaluate as `config` says; returns the run directory.

    `resume` names the checkpoint to go on from, `NEWEST` takes the last one. Nothing is written but the lock of the
    run directory, and with `overwrite` nothing deleted, before device, data, tokenizer and model are known to fit
    together.

    Raises:
        RecipeError: something does not fit, another process writes this run, a checkpoint is damaged, the loss is no
            longer a number; the message names it. Every process raises the same.
        WriteError: a file cannot be written; the message says what is saved.
        Interrupted: SIGINT or SIGTERM came; the message names the checkpoint to resume from.
    """
    quiet_libraries()
    check_trackers(config)
    accelerator = start_accelerator(
        config,
        log_with=config.report_to or None,
        project_config=ProjectConfiguration(logging_dir=str(Path(config.output_dir) / "trackers")),
    )
    check_attention(config, accelerator.device)
    with RunLock(Path(config.output_dir)) as lock:

        def claim() -> Path | None:
            lock.acquire()
            return check_run_dir(config, resume=resume, overwrite=overwrite)

        checkpoint = on_main(accelerator, claim)
        with Training(config, accelerator, checkpoint) as training:
            training.open()
            training.fit()
            training.finish()
    return training.run_dir


class Training:
    """A run in memory: data, model, optimiser, counters; continued from `checkpoint` unless that is None."""

    def __init__(self, config: Config, accelerator: Accelerator, checkpoint: Path | None) -> None:
        self.config, self.accelerator, self.checkpoint = config, accelerator, checkpoint
        self.run_dir = Path(config.output_dir)
        self.data = RunData(config, accelerator, self.run_dir / "tokenizer" if checkpoint else None)
        self.total_steps = config.max_steps or self.data.steps_in(config.num_epochs)
        set_seed(config.seed)
        model = together(accelerator, lambda: build_model(config, self.data.tokenizer))
        apply_options(config, model)
        self.collator = self.data.collator(model)
        self.model, self.optimizer = prepare(accelerator, model, build_optimizer(config, model))
        set_seed(config.seed, device_specific=True)  # the same weights on every process, but not the same dropout
        self.state, self.metrics_bytes = TrainingState(), 0
        if checkpoint is not None:
            self.state, self.metrics_bytes = together(
                accelerator, lambda: load_checkpoint(accelerator, checkpoint, self.data.lengths)
            )
        if self.state.step > self.total_steps:
            raise ConfigError(f"{checkpoint} has more steps than this run is to have, {self.total_steps}")
        self.window = Window()
        self.meter = Meter(accelerator.device, self.state.seconds, self.state.peak_memory_bytes)
        self.display = Display(self.total_steps, enabled=accelerator.is_main_process)
        self.stop = StopSignal()
        self.log: MetricsLog | None = None  # the main process'
        self.attention: dict[str, Any] | None = None  # known once the model has run

    def __enter__(self) -> Training:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            self.close()
        except OSError:  # of a tracker
            if error is None:
                raise
        if isinstance(error, WriteError):
            then = (
                f"continue with --resume: {self.checkpoint} is whole"
                if self.checkpoint
                else "start again with --overwrite"
            )
            raise WriteError(error.path, error.reason, f"{error.remedy}, then {then}") from error

    # Phases

    def open(self) -> None:
        """Begin or continue the run directory, and score the untrained model if asked to."""
        config, accelerator, resume = self.config, self.accelerator, self.checkpoint is not None

        def open_files() -> None:
            open_run_dir(config, run_environment(accelerator.device, accelerator.num_processes), self.checkpoint)
            if not resume:
                with new_folder(self.run_dir / "tokenizer") as folder:
                    self.data.tokenizer.save_pretrained(folder)
            self.log = MetricsLog(self.run_dir / "metrics.jsonl", self.metrics_bytes)

        def open_trackers() -> None:
            # TensorBoard drops what it holds from this step on: the steps that were taken after the checkpoint.
            with writing(self.run_dir / "trackers"):
                accelerator.init_trackers("xsum", init_kwargs={"tensorboard": {"purge_step": self.state.step + 1}})

        on_main(accelerator, open_files)
        together(accelerator, open_trackers)
        self.display.start(asdict(self.state))
        if config.eval_untrained and not resume:
            self.display.say(f"scoring the untrained model on the {config.final_split} split")
            with self.stop, self._aside():
                _, scores = self._score(config.final_split)
            split, records = config.final_split, self.data.records[config.final_split]
            on_main(accelerator, lambda: write_untrained_scores(self.run_dir, split, records, scores))

    def fit(self) -> None:
        """Every optimiser step still to take, with log lines, evaluations and checkpoints."""
        config, state = self.config, self.state
        batches = self.data.steps(self.collator, state.step)
        self.model.train()
        with self.stop:
            self._warm_up()
            self.meter.start()
            for micro_batches in islice(batches, self.total_steps - state.step):
                grad_norm, learning_rate = self._optimiser_step(micro_batches)
                state.step += 1
                self._measure_memory(micro_batches[0])
                self.display.step(state.step)
                last = state.step == self.total_steps
                logged = last or state.step % config.log_every == 0
                if logged:
                    self._log_step(grad_norm, learning_rate)
                if config.eval_every and state.step % config.eval_every == 0:
                    self._evaluate("validation", with_rouge=config.rouge == "every_eval")
                # Several processes agree on stopping only where they wait for each other anyway.
                stopping = (logged or self.accelerator.num_processes == 1) and self._stopping()
                if last or stopping or state.step % config.save_every == 0:
                    self._save_checkpoint()
                if stopping:
                    raise Interrupted(stopping, f"{self.checkpoint} is saved; continue with --resume")
            self.meter.pause()

    def finish(self) -> None:
        """Save model/, with the tokenizer that it needs, and score it on the held-out split."""
        state_dict = self.accelerator.get_state_dict(self.model)

        def save() -> None:
            with new_folder(self.run_dir / "model") as folder:
                self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
                self.data.tokenizer.save_pretrained(folder)

        on_main(self.accelerator, save)
        with self.stop:
            self._evaluate(self.config.final_split, with_rouge=self.config.rouge != "never", final=True)
        self.display.say(f"finished: {self.run_dir}")

    def close(self) -> None:
        if self.accelerator.num_processes > 1 and "gloo" in torch.distributed.get_backend():
            # Freeing DDP joins gloo's threads while it holds the GIL, which they need once more to free what the last
            # message held: a deadlock (torch 2.13). Until they have, this thread does without the GIL.
            time.sleep(GLOO_SECONDS)
        self.display.stop()
        if self.log is not None:
            self.log.close()
        self.accelerator.end_training()

    # Steps

    def _warm_up(self) -> None:
        """Compile the kernels of the next step, and write warm_up.json; on a CPU there are none."""
        if self.config.attn_implementation not in ("bsa_dense", "bsa_sparse"):
            return
        steps = islice(self.data.steps(self.collator, self.state.step), 1)
        with self._aside(), self.display.counting("Compiling kernels") as progress:
            done = warm_up(
                self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True),  # with its autocast
                (batch for micro_batches in steps for batch in micro_batches),
                loss=lambda model, batch: training_loss(model, batch, self.config),
                progress=progress,
            )
        if done.kernels:
            self.display.say(f"{done.kernels} kernels are ready after {done.seconds:.1f} s, {done.compiled} compiled")
            path = self.run_dir / "warm_up.json"
            on_main(self.accelerator, lambda: write_atomically(path, json.dumps(done._asdict(), indent=2) + "\n"))

    def _optimiser_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """Descend the mean loss per target token of all micro-batches; returns gradient norm and learning rate."""
        accelerator = self.accelerator
        learning_rate = learning_rate_at(self.state.step + 1, self.total_steps, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        targets = sum(int((batch["labels"] != IGNORED_LABEL).sum()) for batch in micro_batches)
        targets = accelerator.reduce(torch.tensor(float(targets), device=accelerator.device), "sum")
        # Gradients are averaged over the processes, the tokens counted over all of them.
        scale = accelerator.num_processes / targets.clamp(min=1)
        for batch in micro_batches:
            with nullcontext() if batch is micro_batches[-1] else accelerator.no_sync(self.model):
                inputs = send_to_device(batch, accelerator.device, non_blocking=True)
                loss = training_loss(self.model, inputs, self.config)
                accelerator.backward(loss * scale)
            self.window.add(batch, loss)
        grad_norm = accelerator.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return grad_norm, learning_rate

    def _stopping(self) -> int:
        """The signal that came to any process, else 0."""
        flag = torch.tensor([self.stop.received or 0], device=self.accelerator.device)
        return int(self.accelerator.gather(flag).max())

    # Records

    def _count(self) -> None:
        """Bring the state up to the last step."""
        self.window.flush(self.state, self.accelerator)
        self.state.seconds, peak = self.meter.read()
        peaks = self.accelerator.gather(torch.tensor([peak], device=self.accelerator.device))
        self.state.peak_memory_bytes = int(peaks.max())

    def _log_step(self, grad_norm: torch.Tensor, learning_rate: float) -> None:
        self._count()
        state = self.state
        loss = state.window_loss / max(1, state.window_tokens)
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss} at step {state.step}; go back with --resume, or start again with a lower "
                "learning_rate or max_grad_norm"
            )
        state.window_loss, state.window_tokens = 0.0, 0
        if self.attention is None:
            model = self.accelerator.unwrap_model(self.model)
            self.attention = attention_record(model, self.config.attn_implementation)
        record = {
            **state.counters(),
            "epoch": self.data.epochs_at(state.step),
            "loss": loss,
            "grad_norm": float(grad_norm),
            "learning_rate": learning_rate,
            "peak_memory_gib": state.peak_memory_bytes / GIB,
            "attention": self.attention,
            "options": options_record(self.config),
        }
        self._write(record, {name: record[name] for name in ("loss", "grad_norm", "learning_rate")}, "train")
        self.display.log(record)

    def _write(self, record: dict[str, Any], tracked: dict[str, float], prefix: str) -> None:
        def write() -> None:
            self.log.write(record)
            with writing(self.run_dir / "trackers"):
                self.accelerator.log(
                    {f"{prefix}/{name}": value for name, value in tracked.items()}, step=record["step"]
                )

        on_main(self.accelerator, write)

    def _measure_memory(self, batch: dict[str, Any]) -> None:
        """Write ledger.json once, when the optimiser has a state; models spread over processes have no ledger."""
        path = self.run_dir / "ledger.json"
        if self.accelerator.distributed_type == DistributedType.NO and not path.exists():
            with self._aside():
                batch = send_to_device(batch, self.accelerator.device)
                write_ledger(path, self.config, self.model, self.optimizer.optimizer, batch)

    def _save_checkpoint(self) -> None:
        self.meter.pause()
        self._count()
        on_main(self.accelerator, lambda: self.log.sync())
        size = self.log.size if self.log is not None else 0
        self.checkpoint = save_checkpoint(self.accelerator, self.config, self.state, self.data.lengths, size)
        self.meter.start()

    # Evaluation

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Work beside training: it takes none of its time, draws none of its random numbers, may be interrupted."""
        running = self.meter.pause()
        device = self.accelerator.device
        saved = f"{self.checkpoint} is saved; continue with --resume" if self.checkpoint else "nothing is saved yet"
        with self.stop.at_once(saved), torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
        if running:
            self.meter.start()

    def _score(self, split: str) -> tuple[list[str], dict[str, dict[str, float]]]:
        """The model's summaries of a held-out split and their ROUGE."""
        config, tokens = self.config, self.data.tokens[split]
        predictions = generate_summaries(
            self.model, self.data.tokenizer, tokens, config, self.accelerator, self.display.progress
        )
        references = self.data.records[split]["summary"]
        samples = config.bootstrap_samples
        return predictions, rouge_scores(predictions, references, bootstrap_samples=samples, seed=config.seed)

    def _evaluate(self, split: str, *, with_rouge: bool, final: bool = False) -> None:
        config, records = self.config, self.data.records[split]
        self.display.say(f"step {self.state.step}: evaluating on {len(records)} {split} documents")
        with self._aside():
            batches = loss_batches(
                self.data.tokens[split], self.collator, config.per_device_eval_batch_size, self.accelerator
            )
            loss = evaluate_loss(self.model, batches, self.accelerator)
            predictions, scores = self._score(split) if with_rouge else ([], None)
        record = {
            "step": self.state.step,
            "epoch": self.data.epochs_at(self.state.step),
            "split": split,
            "eval_loss": loss,
            "rouge": scores,
        }
        points = {kind: value["score"] for kind, value in (scores or {}).items()}
        self._write(record, {"loss": loss, **points}, f"eval_{split}")
        self.display.say("  ".join([f"{split} loss {loss:.3f}", *(f"{kind} {x:.2f}" for kind, x in points.items())]))
        if final and scores is not None:
            on_main(self.accelerator, lambda: write_scores(self.run_dir, split, records, predictions, scores))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        usage="train.py --config FILE [--resume [CHECKPOINT] | --overwrite] [--OPTION VALUE ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file, see recipes/xsum/configs")
    parser.add_argument(
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="CHECKPOINT",
        help="continue the run in output_dir, from its newest checkpoint or the one named, as step_00000500",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the earlier run in output_dir first")

    def run() -> None:
        arguments, overrides = parse_arguments(parser, argv)
        config = load_config(arguments.config, overrides)
        train(config, resume=arguments.resume, overwrite=arguments.overwrite)

    return run_script(run)


if __name__ == "__main__":
    sys.exit(main())
