"""Models made from configs, and batches with random tokens in the lengths of real documents and summaries."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

#: Sizes of BART-large and -base, T5-base and Llama 3.2 1B.
MODELS = {
    "bart-base": (
        BartForConditionalGeneration,
        BartConfig,
        {"d_model": 768, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "encoder_layers": 6, "decoder_layers": 6,
         "encoder_attention_heads": 12, "decoder_attention_heads": 12},
    ),
    "bart-large": (BartForConditionalGeneration, BartConfig, {}),
    "t5-base": (
        T5ForConditionalGeneration,
        T5Config,
        {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12, "decoder_start_token_id": 0},
    ),
    "llama-1b": (
        LlamaForCausalLM,
        LlamaConfig,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    ),
}  # fmt: skip
TINY = {
    "bart-large": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
                   "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "t5-base": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "llama-1b": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
TINY["bart-base"] = TINY["bart-large"]


class Pair(NamedTuple):
    """Tokens of one example."""

    source: int
    target: int


def build(name: str, tiny: bool, device: torch.device) -> PreTrainedModel:
    """A model in training mode, float32, with the dropout of its config."""
    cls, config, sizes = MODELS[name]
    if tiny:
        sizes = {**sizes, **TINY[name], "vocab_size": 1000}
    with device:
        return cls(config(**sizes)).train()


def read_lengths(tokenizer: Path, data: Path, examples: int, longest: int, seed: int) -> list[Pair]:
    """Lengths of documents and summaries with their two special tokens, shuffled; cut at `longest`."""
    encoder = ByteLevelBPETokenizer.from_file(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"))
    with gzip.open(data, "rt") as file:
        records = [json.loads(line) for _, line in zip(range(examples), file, strict=False)]
    sources, targets = (
        [len(encoding) + 2 for encoding in encoder.encode_batch([record[name] for record in records])]
        for name in ("document", "summary")
    )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Pair(min(sources[i], longest), min(targets[i], longest)) for i in order]


class Batches:
    """Right-padded batches for one model.

    Args:
        model: what they are for; a decoder-only model reads source and target as one text.
        lengths: of the examples, used over and over in this order.
        row_length: tokens of a source in a batch without padding.
    """

    def __init__(self, model: PreTrainedModel, lengths: list[Pair], row_length: int) -> None:
        self._lengths, self._row_length = lengths, row_length
        self._vocabulary, self._device = model.config.vocab_size, model.device
        self.encoder_decoder = model.config.is_encoder_decoder

    def pairs(self, count: int) -> list[Pair]:
        return [self._lengths[i % len(self._lengths)] for i in range(count)]

    def batch(self, pairs: list[Pair], options: Iterable[str] = ()) -> dict:
        """The model's inputs for some examples; `options` are those of a variant."""
        if not self.encoder_decoder:
            pairs = [Pair(pair.source + pair.target, 0) for pair in pairs]
        sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
        if "full_rows" in options:
            rows = math.ceil(sum(sources) / self._row_length)
            sources = [math.ceil(sum(sources) / rows)] * rows
            targets = [math.ceil(sum(targets) / rows)] * rows
        ids, mask = self._ids(sources)
        batch = {"input_ids": ids, "attention_mask": mask}
        labels, live = self._ids(targets) if self.encoder_decoder else (ids, mask)
        batch["labels"] = labels.masked_fill(live == 0, -100)
        if "padding_free" in options:
            counts = (sum(sources), sum(targets))
            batch["num_live_tokens"] = counts if self.encoder_decoder else counts[0]
        return batch

    def twice(self, batch: dict) -> dict:
        """Double the batch of the same examples, so that lengths and with them padding stay as they are."""
        double = {name: torch.cat([x, x]) for name, x in batch.items() if isinstance(x, torch.Tensor)}
        if counts := batch.get("num_live_tokens"):
            double["num_live_tokens"] = tuple(2 * x for x in counts) if self.encoder_decoder else 2 * counts
        return double

    def window(self, size: int, count: int, options: Iterable[str]) -> list[dict]:
        """`count` batches, of the same examples for every variant, sorted by length where it says so."""
        pairs = self.pairs(size * count)
        if "grouped" in options:
            pairs.sort(reverse=True)
        return [self.batch(pairs[i : i + size], options) for i in range(0, len(pairs), size)]

    def _ids(self, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Random token numbers `(B, S)` and the mask of the live ones."""
        width = max(lengths)
        ids = torch.randint(4, self._vocabulary, (len(lengths), width), device=self._device)
        mask = torch.arange(width, device=self._device) < torch.tensor(lengths, device=self._device)[:, None]
        return ids, mask.long()
