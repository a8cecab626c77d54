"""From documents and summaries to batches: token ids, collators, order of an epoch."""

import random
from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from recipes.xsum.config import Config
from recipes.xsum.model import IGNORED_LABEL
from recipes.xsum.records import DataError
from recipes.xsum.tokenizer import check_tokenizer

# Token ids


def tokenize_records(
    records: Dataset, tokenizer: PreTrainedTokenizerFast, config: Config, architecture: str
) -> Dataset:
    """Token ids of every record, in order, with columns `id`, `input_ids`, `labels` and `length` (of `input_ids`).

    "seq2seq": `input_ids` is the document, `labels` the summary, both with the tokenizer's special tokens; what is
    cut off is text, never the end token. "causal": `input_ids` is prompt, summary and end token, `labels` the same
    with the prompt ignored (-100); `prompt_ids` is the prompt alone, as generation needs it. The document is cut
    so that the whole prompt, template included, has at most `max_source_length` tokens.

    Raises:
        DataError: a tokenizer that cannot read the documents, or limits that leave no room for them.
    """
    check_tokenizer(tokenizer, records)
    if architecture == "seq2seq":
        encode = _Seq2SeqEncoder(tokenizer, config)
    else:
        encode = _CausalEncoder(tokenizer, config)
    return records.map(encode, batched=True, remove_columns=["document", "summary"], desc="Tokenizing")


class _Seq2SeqEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Config):
        self.tokenizer = tokenizer
        self.max_source_length, self.max_target_length = config.max_source_length, config.max_target_length
        special = tokenizer.num_special_tokens_to_add()
        for name in ("max_source_length", "max_target_length"):
            if getattr(config, name) <= special:
                raise DataError(
                    f"{name} {getattr(config, name)} leaves no room for text: the tokenizer adds {special} special "
                    f"tokens to each; raise {name}"
                )

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, list]:
        inputs = self.tokenizer(rows["document"], truncation=True, max_length=self.max_source_length)["input_ids"]
        targets = self.tokenizer(text_target=rows["summary"], truncation=True, max_length=self.max_target_length)
        return {"input_ids": inputs, "labels": targets["input_ids"], "length": [len(ids) for ids in inputs]}


class _CausalEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Config):
        before, _, after = config.prompt_template.partition("{document}")
        self.tokenizer = tokenizer
        # Tokenizers that begin every text with a token (Llama's) begin the prompt with it.
        starts = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        self.before, self.after = starts + self._encode([before])[0], self._encode([after])[0]
        self.document_length = config.max_source_length - len(self.before) - len(self.after)
        if self.document_length < 1:
            raise DataError(
                f"prompt_template leaves no room for a document in max_source_length {config.max_source_length}; "
                "shorten it, or raise max_source_length"
            )
        self.summary_length = config.max_target_length - 1

    def _encode(self, texts: list[str], longest: int | None = None) -> list[list[int]]:
        cut = {"truncation": True, "max_length": longest} if longest else {}
        return self.tokenizer(texts, add_special_tokens=False, **cut)["input_ids"]

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, list]:
        prompts = [self.before + ids + self.after for ids in self._encode(rows["document"], self.document_length)]
        summaries = self._encode([f" {summary.strip()}" for summary in rows["summary"]], self.summary_length)
        targets = [ids + [self.tokenizer.eos_token_id] for ids in summaries]
        pairs = list(zip(prompts, targets, strict=True))
        return {
            "input_ids": [prompt + target for prompt, target in pairs],
            "labels": [[IGNORED_LABEL] * len(prompt) + target for prompt, target in pairs],
            "prompt_ids": prompts,
            "length": [len(prompt) + len(target) for prompt, target in pairs],
        }


# Batches


class CausalCollator(DataCollatorForSeq2Seq):
    """Pads rows to `input_ids`, `attention_mask` and `labels` (-100), each `(B, longest row)`, on the right.

    Labels are padded by length, so an end token counts even where it doubles as the padding token.
    """

    def __call__(self, features: Sequence[dict[str, Any]], return_tensors: str | None = None) -> dict[str, Any]:
        rows = [{name: row[name] for name in ("input_ids", "labels")} for row in features]
        return dict(super().__call__(rows, return_tensors))


class Seq2SeqCollator(CausalCollator):
    """Pads rows to `input_ids`, `attention_mask` `(B, S)`, `labels` and `decoder_input_ids` `(B, T)`.

    Needs `model=`, which shifts its own labels to the right. There is no `decoder_attention_mask`: padding comes
    after the summary, where the causal decoder never looks from a real token, and the loss skips what it yields.
    """


def epoch_batches(
    lengths: list[int], batch_size: int, *, seed: int, epoch: int, group_by_length: bool, window: int = 50
) -> list[list[int]]:
    """The batches of an epoch as lists of indices into `lengths`; every index occurs once.

    A pure function, so that a resumed run finds its place in the epoch. The order depends on `seed` and `epoch`.
    With `group_by_length`, the shuffled indices are sorted by length inside windows of `window` batches and the
    batches are shuffled again: less padding, and still a new set of batches in each epoch.
    """
    draw = random.Random(f"{seed}/{epoch}")
    indices = _shuffled(lengths, draw, window * batch_size if group_by_length else None)
    batches = [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
    if group_by_length:
        draw.shuffle(batches)
    return batches


def budget_batches(
    lengths: list[int],
    token_budget: int,
    *,
    padded: bool,
    seed: int,
    epoch: int,
    group_by_length: bool,
    window: int = 50,
) -> list[list[int]]:
    """As `epoch_batches`, but each batch is filled, in order, with as many tokens as the budget allows.

    A batch counts as its documents' tokens or, where `padded`, as its number of documents times the longest one. A
    document beyond the budget is a batch by itself.
    """
    draw = random.Random(f"{seed}/{epoch}")
    documents = max(1, token_budget * len(lengths) // sum(lengths))  # of a batch without padding
    batches, tokens, longest = [], 0, 0
    for index in _shuffled(lengths, draw, window * documents if group_by_length else None):
        tokens, longest = tokens + lengths[index], max(longest, lengths[index])
        if not batches or ((len(batches[-1]) + 1) * longest if padded else tokens) > token_budget:
            batches.append([])
            tokens = longest = lengths[index]
        batches[-1].append(index)
    if group_by_length:
        draw.shuffle(batches)
    return batches


def _shuffled(lengths: list[int], draw: random.Random, window: int | None) -> list[int]:
    """All indices in random order, sorted by length inside each `window` of them unless that is None."""
    indices = list(range(len(lengths)))
    draw.shuffle(indices)
    if window is None:
        return indices
    parts = [sorted(indices[i : i + window], key=lengths.__getitem__) for i in range(0, len(indices), window)]
    return [index for part in parts for index in part]
