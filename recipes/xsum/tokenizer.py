"""The tokenizer of a run: loaded, or trained on its documents, and whether it can read them."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2TokenizerFast,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaTokenizerFast,
)

from recipes.xsum.config import Config, first_line
from recipes.xsum.records import DataError

REMEDY = "set tokenizer to the Hub name or folder of the model's own, such as tokenizer/ in the run that trained it"
#: How many documents and how much of each are read to see whether a tokenizer knows the language.
SAMPLE, SAMPLE_CHARACTERS = 64, 2000


def load_tokenizer(config: Config, records: Dataset) -> PreTrainedTokenizerFast:
    """`config.tokenizer`, else the model's own, else (a model from scratch) a byte-level BPE trained on `records`.

    Raises:
        DataError: as `pretrained_tokenizer`.
    """
    name = config.tokenizer or config.model
    return train_tokenizer(records, config.vocab_size) if name is None else pretrained_tokenizer(name)


def pretrained_tokenizer(name: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a Hub name or a folder, which may hold no more than `vocab.json` and `merges.txt`.

    It pads on the right, and with its end token where it has no padding token of its own (GPT-2).

    Raises:
        DataError: nothing that can be loaded, an empty vocabulary, or no end token.
    """
    name = str(name)
    try:
        tokenizer = _load_bare_vocabulary(Path(name)) or AutoTokenizer.from_pretrained(name)
    except Exception as error:  # each family reads its own files, with its own kinds of error
        raise DataError(
            f"cannot load tokenizer {name!r}: {first_line(error)}; give a name on the Hub or a folder that holds "
            "tokenizer.json, or vocab.json and merges.txt"
        ) from error
    # From a folder without a vocabulary, Transformers makes a tokenizer of special tokens alone.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise DataError(f"tokenizer {name!r} has an empty vocabulary: its files are missing there; {REMEDY}")
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


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, records: Dataset) -> None:
    """Raise `DataError` where a tokenizer knows less than half the characters of a sample of the documents.

    The others became <unk> or, as with byte-level vocabularies that lack bytes, nothing.
    """
    rows = records.select(range(0, len(records), max(1, len(records) // SAMPLE)))
    texts = [text[:SAMPLE_CHARACTERS] for row in rows for text in (row["document"], row["summary"])]
    characters, known = sum(map(_count_characters, texts)), _known_characters(tokenizer, texts)
    if 2 * known < characters:
        raise DataError(
            f"tokenizer {tokenizer.name_or_path!r} cannot read the documents: its vocabulary of {len(tokenizer)} "
            f"covers {known} of {characters} characters; {REMEDY}"
        )


def _known_characters(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> float:
    """Number of characters, without spaces, that become ordinary tokens."""
    meaningless = {tokenizer.unk_token_id, *tokenizer.all_special_ids}
    options = {"add_special_tokens": False, "verbose": False}
    if not tokenizer.is_fast:  # has no offsets: a token counts for as many characters as any other
        rows = tokenizer(texts, **options)["input_ids"]
        shares = [sum(i not in meaningless for i in row) / max(1, len(row)) for row in rows]
        return sum(share * _count_characters(text) for share, text in zip(shares, texts, strict=True))
    rows = tokenizer(texts, return_offsets_mapping=True, **options)
    known = 0
    for text, ids, offsets in zip(texts, rows["input_ids"], rows["offset_mapping"], strict=True):
        done = 0  # the bytes of one character may be several tokens
        for i, (start, end) in zip(ids, offsets, strict=True):
            if i not in meaningless:
                known += _count_characters(text[max(start, done) : end])
                done = max(done, end)
    return known


def _count_characters(text: str) -> int:
    return sum(map(len, text.split()))


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows that an embedding needs: one more than the largest id, which a vocabulary with gaps may exceed."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))
