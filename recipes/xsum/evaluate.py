"""Loss and ROUGE of a model on held-out documents; also a script that scores a finished run.

    python recipes/xsum/evaluate.py runs/xsum                          # final model, test split
    accelerate launch recipes/xsum/evaluate.py runs/xsum --split validation --max_eval_examples 500

It writes rouge.json and predictions.jsonl to RUN_DIR, or to `--out` where that cannot be written; `--checkpoint
untrained` adds the scores of the model before its first step to rouge.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, send_to_device, set_seed
from datasets import Dataset
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

import hf_flashbsa  # noqa: F401 - registers bsa_dense
from recipes.xsum.config import Config, ConfigError, load_config
from recipes.xsum.data import tokenize_records
from recipes.xsum.errors import WriteError, run_script
from recipes.xsum.files import read_json, write_atomically, write_files
from recipes.xsum.model import (
    IGNORED_LABEL,
    apply_layouts,
    architecture_of,
    build_model,
    check_attention,
    check_vocabulary,
    load_weights,
    summed_loss,
    transformers_config,
)
from recipes.xsum.processes import on_main, start_accelerator
from recipes.xsum.records import load_records
from recipes.xsum.rouge import rouge_scores
from recipes.xsum.run_lock import RunLock
from recipes.xsum.tokenizer import pretrained_tokenizer

# Loss


def loss_batches(
    dataset: Dataset, collator: Callable[[list[dict]], dict], batch_size: int, accelerator: Accelerator
) -> Iterator[dict[str, Any]]:
    """This process' share of the tokenised documents, padded, longest first.

    Every process gets equally many batches, as sharded models need; one that makes up the number has no labels.
    """
    for indices, counts in _share(dataset["length"][:], batch_size, accelerator):
        batch = collator([dataset[i] for i in indices])
        if not counts:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED_LABEL)
        yield batch


@torch.no_grad()
def evaluate_loss(model: torch.nn.Module, batches: Iterable[dict[str, Any]], accelerator: Accelerator) -> float:
    """Cross-entropy in nats per target token, over the batches of all processes; no label smoothing, no dropout.

    Every token counts alike, however long its batch. The model's mode is restored.

    Raises:
        ValueError: no target token in any batch.
    """
    was_training = model.training
    model.eval()
    totals = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in batches:
        batch = send_to_device(batch, accelerator.device)
        # A decoder-only model has no target at the first position.
        labels = batch["labels"] if "decoder_input_ids" in batch else batch["labels"][:, 1:]
        with accelerator.autocast():
            loss = summed_loss(model, batch, smoothing=0.0)
        totals += torch.stack([loss.double(), (labels != IGNORED_LABEL).sum().double()])
    model.train(was_training)
    loss, tokens = accelerator.reduce(totals, "sum").tolist()
    if not tokens:
        raise ValueError("no target token to evaluate: every label is ignored, or there is no batch")
    return loss / tokens


# Summaries


@torch.no_grad()
def generate_summaries(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    config: Config,
    accelerator: Accelerator,
    progress: Progress | None = None,
) -> list[str]:
    """A summary of each tokenised document by beam search, in the order of `dataset`, on every process.

    The search is set by `num_beams`, `max_new_tokens`, `min_new_tokens`, `length_penalty` and
    `no_repeat_ngram_size` of `config`; nothing is sampled. The model's mode is restored.
    """
    prompt = "prompt_ids" if "prompt_ids" in dataset.column_names else "input_ids"
    module = accelerator.unwrap_model(model)
    options = _generation_options(module, tokenizer, config, accelerator)
    was_training = module.training
    module.eval()
    batches = _share(dataset["length"][:], config.per_device_eval_batch_size, accelerator)
    task = progress.add_task("Generating summaries", total=len(batches)) if progress else None
    written = []
    for indices, counts in batches:
        # Left padding lets a decoder-only model go on from the last token; an encoder does not mind it on the right.
        side = "right" if module.config.is_encoder_decoder else "left"
        rows = pad_without_fast_tokenizer_warning(
            tokenizer, {"input_ids": dataset[indices][prompt]}, padding_side=side, return_tensors="pt"
        )
        inputs = send_to_device({name: rows[name] for name in ("input_ids", "attention_mask")}, accelerator.device)
        with accelerator.autocast():
            output = module.generate(**inputs, **options)
        if not module.config.is_encoder_decoder:
            output = output[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(output, skip_special_tokens=True)
        if counts:
            written += [(index, " ".join(text.split())) for index, text in zip(indices, texts, strict=True)]
        if progress:
            progress.advance(task)
    if progress:
        progress.remove_task(task)
    module.train(was_training)
    return [text for _, text in sorted(gather_object(written))]


def _generation_options(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: Config, accelerator: Accelerator
) -> dict[str, Any]:
    options = {
        "do_sample": False,
        "num_beams": config.num_beams,
        "max_new_tokens": config.max_new_tokens,
        "min_new_tokens": config.min_new_tokens,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        # Sharded weights are gathered by all processes together, so none may stop generating before the others.
        "synced_gpus": accelerator.distributed_type == DistributedType.FSDP and accelerator.num_processes > 1,
    }
    if config.num_beams > 1:
        options["length_penalty"] = config.length_penalty
    return options


def _share(lengths: list[int], batch_size: int, accelerator: Accelerator) -> list[tuple[list[int], bool]]:
    """This process' batches of indices, longest first: little padding, and memory runs out at once if at all.

    Where the batches do not divide among the processes the last one is repeated, and False says not to count it.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    batches = [(order[i : i + batch_size], True) for i in range(0, len(order), batch_size)]
    while len(batches) % accelerator.num_processes:
        batches.append((batches[-1][0], False))
    return batches[accelerator.process_index :: accelerator.num_processes]


# Scores of a run


def write_scores(run_dir: Path, split: str, records: Dataset, predictions: list[str], scores: dict[str, dict]) -> None:
    """Write RUN_DIR/rouge.json and RUN_DIR/predictions.jsonl; `scores` is what `rouge_scores` returned.

    Scores of the untrained model stay in rouge.json where they are of the same documents.
    """
    result = {"split": split, "examples": len(records), **scores}
    earlier = _read_scores(run_dir)
    if "untrained" in earlier and (earlier["split"], earlier["examples"]) == (split, len(records)):
        result["untrained"] = earlier["untrained"]
    rows = zip(records["id"], predictions, records["summary"], strict=True)
    lines = [
        json.dumps({"id": name, "prediction": prediction, "reference": reference}, ensure_ascii=False) + "\n"
        for name, prediction, reference in rows
    ]
    texts = {"predictions.jsonl": "".join(lines), "rouge.json": json.dumps(result, indent=2) + "\n"}
    write_files({run_dir / name: text for name, text in texts.items()})


def write_untrained_scores(run_dir: Path, split: str, records: Dataset, scores: dict[str, dict]) -> None:
    """Put the untrained model's scores into RUN_DIR/rouge.json, dropping those of other documents."""
    result = {"split": split, "examples": len(records)}
    earlier = _read_scores(run_dir)
    if earlier.items() >= result.items():
        result = earlier
    write_atomically(run_dir / "rouge.json", json.dumps({**result, "untrained": scores}, indent=2) + "\n")


def _read_scores(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "rouge.json"
    return read_json(path, "remove it and score the run again") if path.is_file() else {}


def load_trained(
    run_dir: Path, config: Config, *, untrained: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A run's final model, or the one it began with, and its tokenizer; the model in float32 on the CPU.

    Raises:
        ConfigError: no finished run there, or a model and a tokenizer that do not belong together.
        DataError: a tokenizer that cannot be loaded.
    """
    folders = [run_dir / "tokenizer"] + ([] if untrained else [run_dir / "model"])
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{run_dir} has no {folder.name}/: finish the run with train.py --resume")
    tokenizer = pretrained_tokenizer(run_dir / "tokenizer")
    if untrained:
        set_seed(config.seed)
        return build_model(config, tokenizer), tokenizer
    saved = replace(config, model=str(run_dir / "model"), model_config=None)
    model_config = transformers_config(saved)
    check_vocabulary(tokenizer, model_config)
    model = load_weights(saved, model_config)
    apply_layouts(config, model)
    return model, tokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Score the summaries of a run's model with ROUGE.")
    parser.add_argument("run_dir", type=Path, help="folder that train.py wrote")
    parser.add_argument("--split", choices=("validation", "test"), help="held-out split [the run's final_split]")
    parser.add_argument("--checkpoint", choices=("last", "untrained"), default="last", help="which weights [last]")
    parser.add_argument("--out", type=Path, help="folder to write to [RUN_DIR]")
    parser.add_argument("--max_eval_examples", help="use only the first documents [the run's max_eval_examples]")
    arguments = parser.parse_args(argv)
    return run_script(lambda: _evaluate_run(arguments))


def _evaluate_run(arguments: argparse.Namespace) -> None:
    """Everything that can fail is tried before summaries are generated, which may take hours: writing, too."""
    run_dir, untrained = arguments.run_dir, arguments.checkpoint == "untrained"
    out = arguments.out or run_dir
    limit = arguments.max_eval_examples
    config = load_config(run_dir / "config.yaml", {} if limit is None else {"max_eval_examples": limit})
    split = arguments.split or config.final_split
    accelerator = start_accelerator(config)
    check_attention(config, accelerator.device)
    with RunLock(out) as lock:
        on_main(accelerator, lambda: lock.acquire() or _read_scores(out))
        model, tokenizer = load_trained(run_dir, config, untrained=untrained)
        model.to(accelerator.device)
        records = load_records(config, split)
        dataset = tokenize_records(records, tokenizer, config, architecture_of(transformers_config(config)))
        predictions = _generate(model, tokenizer, dataset, config, accelerator)
        accelerator.end_training()  # a process that just stops can make the others abort
        if not accelerator.is_main_process:
            return
        scores = rouge_scores(
            predictions, records["summary"], bootstrap_samples=config.bootstrap_samples, seed=config.seed
        )
        if untrained:
            _write_or_rescue(out, lambda folder: write_untrained_scores(folder, split, records, scores))
        else:
            _write_or_rescue(out, lambda folder: write_scores(folder, split, records, predictions, scores))
    table = Table("", "ROUGE", "95 % interval", title=f"{run_dir.name}: {len(records)} {split} documents")
    for kind, points in scores.items():
        table.add_row(kind, f"{points['score']:.2f}", f"{points['low']:.2f} to {points['high']:.2f}")
    Console().print(table)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    dataset: Dataset,
    config: Config,
    accelerator: Accelerator,
) -> list[str]:
    """`generate_summaries` with a progress bar on the main process' stderr."""
    console = Console(stderr=True, soft_wrap=True, quiet=not accelerator.is_main_process)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        return generate_summaries(model, tokenizer, dataset, config, accelerator, progress)


def _write_or_rescue(out: Path, write: Callable[[Path], None]) -> None:
    """Write scores to `out`, elsewhere if it cannot be written any more: summaries that took hours are not lost."""
    try:
        write(out)
    except WriteError as error:
        rescue = Path(tempfile.mkdtemp(prefix=f"{out.resolve().name}_scores_"))
        write(rescue)
        remedy = f"{error.remedy}; what was to be written there is in {rescue}"
        raise WriteError(error.path, error.reason, remedy) from error


if __name__ == "__main__":
    sys.exit(main())
