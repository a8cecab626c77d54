"""What a run reads: the documents of its splits, its tokenizer, and the micro-batches of every step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from recipes.xsum.config import Config, ConfigError
from recipes.xsum.data import (
    CausalCollator,
    Seq2SeqCollator,
    budget_batches,
    epoch_batches,
    tokenize_records,
)
from recipes.xsum.model import IGNORED_LABEL, architecture_of, check_prompt, transformers_config
from recipes.xsum.processes import main_first
from recipes.xsum.records import load_records
from recipes.xsum.tokenizer import load_tokenizer

Collator = Callable[[Sequence[dict[str, Any]]], dict[str, Any]]


class RunData:
    """Documents (`records`) and token ids (`tokens`) by split, the tokenizer, and how they make up steps.

    The tokenizer is the one in `tokenizer_folder` where a run goes on from there.

    Raises:
        ConfigError, DataError: a split or the tokenizer cannot be loaded, or the documents do not make up one step,
            or one of them exceeds `token_budget`.
    """

    def __init__(self, config: Config, accelerator: Accelerator, tokenizer_folder: Path | None) -> None:
        self.config, self.accelerator = config, accelerator
        # A model that does not exist is known before documents are read.
        self.architecture = architecture_of(transformers_config(config))
        check_prompt(config, self.architecture)
        if config.seed + accelerator.num_processes > 2**32:
            raise ConfigError(f"seed {config.seed}: each process adds its rank, beyond 2**32 - 1; lower it")

        def load() -> None:
            self.records = {split: load_records(config, split) for split in config.splits}
            name = config.tokenizer if tokenizer_folder is None else str(tokenizer_folder)
            self.tokenizer = load_tokenizer(replace(config, tokenizer=name), self.records["train"])
            self.tokens = {
                split: tokenize_records(records, self.tokenizer, config, self.architecture)
                for split, records in self.records.items()
            }

        main_first(accelerator, load)
        self.lengths = list(self.tokens["train"]["length"])
        self._per_step = config.gradient_accumulation_steps * accelerator.num_processes
        self._starts = [0]  # the first step of each epoch, as far as they are known
        if config.token_budget is not None and max(self.lengths) > config.token_budget:
            raise ConfigError(
                f"a training document has {max(self.lengths)} tokens, more than token_budget {config.token_budget}; "
                "raise it, or cut documents by a lower max_source_length"
            )
        if not self._micro_batches(0):
            unit, size = "documents", config.per_device_batch_size * self._per_step
            if config.token_budget is not None:
                unit, size = "tokens", config.token_budget * self._per_step
            raise ConfigError(
                f"{len(self.lengths)} training documents do not fill one batch of {size} {unit} "
                f"({'per_device_batch_size' if unit == 'documents' else 'token_budget'} x "
                "gradient_accumulation_steps x processes)"
            )

    def collator(self, model: PreTrainedModel) -> Collator:
        kind = Seq2SeqCollator if self.architecture == "seq2seq" else CausalCollator
        collator = kind(self.tokenizer, model=model)
        return PaddingFreeCollator(collator) if self.config.padding_free else collator

    def steps_in(self, epochs: int) -> int:
        """Number of steps of the first epochs."""
        while len(self._starts) <= epochs:
            size = len(self._micro_batches(len(self._starts) - 1)) // self._per_step
            self._starts.append(self._starts[-1] + size)
        return self._starts[epochs]

    def epochs_at(self, step: int) -> float:
        """Passes over the documents after so many steps."""
        epoch, done = self._place(step)
        return epoch + done / (self.steps_in(epoch + 1) - self.steps_in(epoch))

    def steps(self, collator: Collator, first: int) -> Iterator[list[dict[str, Any]]]:
        """This process' micro-batches of each step after the first `first` ones, without end.

        Every process gets as many. Which documents a step sees depends on the global batch size alone, not on how
        devices and accumulation split it. Documents that do not make up an epoch's last step are left out of that
        epoch.
        """
        accelerator = self.accelerator
        epoch, done = self._place(first)
        while True:
            shares = self._micro_batches(epoch)[done * self._per_step :]
            loader = DataLoader(
                self.tokens["train"],
                batch_sampler=shares[accelerator.process_index :: accelerator.num_processes],
                collate_fn=collator,
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator(),  # else the loader draws from the generator that dropout uses
            )
            micro_batches = iter(loader)
            for _ in range(len(shares) // self._per_step):
                yield list(islice(micro_batches, self.config.gradient_accumulation_steps))
            epoch, done = epoch + 1, 0

    def _place(self, step: int) -> tuple[int, int]:
        """The epoch of the step after `step` ones, and the steps before it in that epoch."""
        while self.steps_in(len(self._starts) - 1) <= step:
            self.steps_in(len(self._starts))
        epoch = bisect_right(self._starts, step) - 1
        return epoch, step - self._starts[epoch]

    def _micro_batches(self, epoch: int) -> list[list[int]]:
        """An epoch's documents by forward pass, for whole steps of all processes."""
        config = self.config
        order = {"seed": config.seed, "epoch": epoch, "group_by_length": config.group_by_length}
        if config.token_budget is None:
            size = config.per_device_batch_size
            whole = size * self._per_step
            steps = [step for step in epoch_batches(self.lengths, whole, **order) if len(step) == whole]
            return [step[i : i + size] for step in steps for i in range(0, whole, size)]
        batches = budget_batches(self.lengths, config.token_budget, padded=not config.padding_free, **order)
        return batches[: len(batches) // self._per_step * self._per_step]


class PaddingFreeCollator:
    """Adds to a collator's batches what padding-free models would otherwise wait for the device to learn.

    That is `num_live_tokens`, and for encoder-decoders `decoder_attention_mask`, `(B, T)`: the labels, which tell it
    too, do not always reach the model.
    """

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(features)
        live = int(batch["attention_mask"].sum())
        if "decoder_input_ids" not in batch:
            return {**batch, "num_live_tokens": live}
        targets = (batch["labels"] != IGNORED_LABEL).long()
        return {**batch, "decoder_attention_mask": targets, "num_live_tokens": (live, int(targets.sum()))}
