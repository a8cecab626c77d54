"""What a run reads: the documents of its splits, its tokenizer, and the micro-batches of every step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, PreTrainedModel

from recipes.xsum.config import Config, ConfigError
from recipes.xsum.data import (
    CausalCollator,
    Seq2SeqCollator,
    epoch_batches,
    load_records,
    load_tokenizer,
    tokenize_records,
)


class RunData:
    """Documents (`records`) and token ids (`tokens`) by split, the tokenizer, and how they make up steps.

    The tokenizer is the one in `tokenizer_folder` where a run goes on from there.

    Raises:
        ConfigError, DataError: a split or the tokenizer cannot be loaded, or the documents do not fill one batch.
    """

    def __init__(self, config: Config, accelerator: Accelerator, tokenizer_folder: Path | None) -> None:
        self.config, self.accelerator = config, accelerator
        architecture = config.architecture  # a model that does not exist is known before documents are read
        with accelerator.main_process_first():
            self.records = {split: load_records(config, split) for split in config.splits}
            name = config.tokenizer if tokenizer_folder is None else str(tokenizer_folder)
            self.tokenizer = load_tokenizer(replace(config, tokenizer=name), self.records["train"])
            self.tokens = {
                split: tokenize_records(records, self.tokenizer, config, architecture)
                for split, records in self.records.items()
            }
        self.lengths = list(self.tokens["train"]["length"])
        self.batch_size = config.per_device_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        self.steps_per_epoch = len(self.lengths) // self.batch_size
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{len(self.lengths)} training documents do not fill one batch of {self.batch_size} "
                "(per_device_batch_size x gradient_accumulation_steps x processes)"
            )

    def collator(self, model: PreTrainedModel) -> DataCollatorForSeq2Seq:
        kind = Seq2SeqCollator if self.config.architecture == "seq2seq" else CausalCollator
        return kind(self.tokenizer, model=model)

    def steps(self, collator: DataCollatorForSeq2Seq, first: int) -> Iterator[list[dict[str, torch.Tensor]]]:
        """This process' micro-batches of each step after the first `first` ones, without end.

        Which documents a step sees depends on the global batch size alone, not on how devices and accumulation
        split it. Documents that do not fill an epoch's last batch are left out of that epoch.
        """
        config, accelerator = self.config, self.accelerator
        size = config.per_device_batch_size
        epoch, done = divmod(first, self.steps_per_epoch)
        while True:
            batches = epoch_batches(
                self.lengths, self.batch_size, seed=config.seed, epoch=epoch, group_by_length=config.group_by_length
            )
            batches = [batch for batch in batches if len(batch) == self.batch_size][done:]
            shares = [batch[i : i + size] for batch in batches for i in range(0, self.batch_size, size)]
            loader = DataLoader(
                self.tokens["train"],
                batch_sampler=shares[accelerator.process_index :: accelerator.num_processes],
                collate_fn=collator,
                pin_memory=accelerator.device.type == "cuda",
                generator=torch.Generator(),  # else the loader draws from the generator that dropout uses
            )
            micro_batches = iter(loader)
            for _ in batches:
                yield list(islice(micro_batches, config.gradient_accumulation_steps))
            epoch, done = epoch + 1, 0
