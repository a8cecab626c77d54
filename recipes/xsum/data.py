"""From documents and summaries to batches: records, tokenizer, token ids, collators, order of an epoch."""

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    GPT2TokenizerFast,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from recipes.xsum.config import Config
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.model import IGNORED_LABEL

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")


class DataError(ValueError):
    """Data or a tokenizer that cannot be used; the message names the place and the remedy."""


# Records


def load_records(config: Config, split: str) -> Dataset:
    """The documents of `split` ("train", "validation" or "test") with columns `id`, `document` and `summary`.

    Raises:
        DataError: missing, empty or unreadable file; broken line; missing column; Hub out of reach.
    """
    limit = config.max_train_examples if split == "train" else config.max_eval_examples
    if config.dataset == "generated":
        # A held-out split has no size of its own: a tenth of the training split unless limited.
        available = config.generated_examples if split == "train" else limit or -(-config.generated_examples // 10)
        rows = generate_corpus(min(limit or available, available), config.corpus_seed, split)
        return Dataset.from_list(rows)
    if config.dataset == "hub":
        return _load_hub(config, split, limit)
    path = getattr(config, f"{split}_file")
    if path is None:
        raise DataError(f"no {split} documents: set {split}_file")
    return Dataset.from_list(_read_rows(Path(path), config, limit))


def _load_hub(config: Config, split: str, limit: int | None) -> Dataset:
    try:
        # XSum's main branch holds a loading script, which datasets no longer runs; the Hub keeps every data set as
        # Parquet on this branch too.
        rows = load_dataset(config.dataset_name, revision="refs/convert/parquet", split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"cannot load {split} of {config.dataset_name!r} from the Hub: {_first_line(error)}; check the name and "
            "the connection, or use dataset: files with your own JSON lines, or dataset: generated"
        ) from error
    for column in (config.text_column, config.summary_column):
        if column not in rows.column_names:
            raise DataError(_missing_column(config.dataset_name, column, rows.column_names))
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{i}" for i in range(len(rows))])
    names = {"id": "id", config.text_column: "document", config.summary_column: "summary"}
    rows = rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    return rows.cast_column("id", Value("string"))


def _read_rows(path: Path, config: Config, limit: int | None) -> list[dict[str, str]]:
    if not path.name.endswith(SUFFIXES):
        raise DataError(f"{path}: the name must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"{path}: no such file; give a path that exists, or use dataset: generated")
    rows = []
    for number, line in _read_lines(path):
        if limit is not None and len(rows) == limit:
            break
        rows.append(_parse_row(line, f"{path}, line {number}", f"{path.stem}-{number}", config))
    if not rows:
        raise DataError(f"{path}: the file holds no record; it needs one JSON object a line")
    return rows


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, line
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}; it must be UTF-8, compressed if it ends in .gz") from error


def _parse_row(line: str, place: str, default_id: str, config: Config) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not valid JSON: {error}; each line must be one JSON object") from error
    if not isinstance(row, dict):
        raise DataError(f"{place}: a JSON {type(row).__name__}, not an object; each line must be one record")
    for column in (config.text_column, config.summary_column):
        if column not in row:
            raise DataError(_missing_column(f"{place} (id {row.get('id', default_id)})", column, row))
        if not isinstance(row[column], str):
            kind = type(row[column]).__name__
            raise DataError(f"{place} (id {row.get('id', default_id)}): {column!r} must be text, not {kind}")
    return {
        "id": str(row.get("id", default_id)),
        "document": row[config.text_column],
        "summary": row[config.summary_column],
    }


def _missing_column(place: str, column: str, present: Any) -> str:
    return f"{place}: no {column!r}, only {', '.join(present)}; set text_column and summary_column to fit"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Tokenizer


def load_tokenizer(config: Config, records: Dataset) -> PreTrainedTokenizerFast:
    """`config.tokenizer`, else the model's own, else (a model from scratch) a byte-level BPE trained on `records`.

    A name is one on the Hub or a local folder; a folder may hold no more than `vocab.json` and `merges.txt`. The
    tokenizer pads on the right, and with its end token where it has no padding token of its own (GPT-2).

    Raises:
        DataError: nothing that can be loaded, or no end token.
    """
    name = config.tokenizer or config.model
    if name is None:
        return train_tokenizer(records, config.vocab_size)
    try:
        tokenizer = _load_bare_vocabulary(Path(name)) or AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot load tokenizer {name!r}: {_first_line(error)}; give a name on the Hub or a folder that holds "
            "tokenizer.json, or vocab.json and merges.txt"
        ) from error
    if tokenizer.eos_token is None:
        raise DataError(f"tokenizer {name!r} has no end token, without which no summary would end; use another one")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def _load_bare_vocabulary(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer of a folder with a byte-level vocabulary and nothing that names its class, else None."""
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if not {"vocab.json", "merges.txt"} <= present or present & {"tokenizer.json", "tokenizer_config.json"}:
        return None
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if {"<s>", "</s>", "<pad>"} <= vocabulary.keys():
        return RobertaTokenizerFast.from_pretrained(folder)  # BART's differs in the name only
    if "<|endoftext|>" in vocabulary:
        return GPT2TokenizerFast.from_pretrained(folder)
    raise ValueError("vocab.json has neither BART's special tokens (<s>) nor GPT-2's (<|endoftext|>)")


def train_tokenizer(records: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the documents and summaries, with BART's special tokens at BART's ids.

    The same records give the same tokenizer.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"{row['document']}\n{row['summary']}" for row in records)
    tokenizer.train_from_iterator(texts, trainer, length=len(records))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


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
        DataError: a prompt template without `{document}`, or too long.
    """
    if architecture == "seq2seq":
        encode = _Seq2SeqEncoder(tokenizer, config)
    else:
        encode = _CausalEncoder(tokenizer, config)
    return records.map(encode, batched=True, remove_columns=["document", "summary"], desc="Tokenizing")


class _Seq2SeqEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Config):
        self.tokenizer = tokenizer
        self.max_source_length, self.max_target_length = config.max_source_length, config.max_target_length

    def __call__(self, rows: dict[str, list[str]]) -> dict[str, list]:
        inputs = self.tokenizer(rows["document"], truncation=True, max_length=self.max_source_length)["input_ids"]
        targets = self.tokenizer(text_target=rows["summary"], truncation=True, max_length=self.max_target_length)
        return {"input_ids": inputs, "labels": targets["input_ids"], "length": [len(ids) for ids in inputs]}


class _CausalEncoder:
    def __init__(self, tokenizer: PreTrainedTokenizerFast, config: Config):
        before, slot, after = config.prompt_template.partition("{document}")
        if not slot:
            raise DataError(f"prompt_template {config.prompt_template!r} has no {{document}} in it")
        self.tokenizer = tokenizer
        # Tokenizers that begin every text with a token (Llama's) begin the prompt with it.
        starts = [tokenizer.bos_token_id] if tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id] else []
        self.before, self.after = starts + self._encode([before])[0], self._encode([after])[0]
        self.document_length = config.max_source_length - len(self.before) - len(self.after)
        if self.document_length < 1:
            raise DataError(
                f"prompt_template leaves no room for a document in max_source_length {config.max_source_length}"
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
