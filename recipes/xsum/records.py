"""The documents and summaries of a split: generated, read from files of JSON, or loaded from the Hub."""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from datasets import Dataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from recipes.xsum.config import Config, first_line
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.errors import RecipeError

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
FORM = "the file must hold one JSON object a line, or one JSON array of objects"
JSON_KINDS = {
    list: "an array",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    dict: "an object",
}


class DataError(RecipeError, ValueError):
    """Data or a tokenizer that cannot be used; the message names the place and the remedy."""


def load_records(config: Config, split: str) -> Dataset:
    """The documents of `split` ("train", "validation" or "test") with columns `id`, `document` and `summary`.

    Training leaves out records without text in the document or in the summary. Held-out splits keep them, so that
    their scores are those of the whole split. Both are logged.

    Raises:
        DataError: missing, empty or unreadable file; broken line; missing column; no text; Hub out of reach.
    """
    limit = config.max_train_examples if split == "train" else config.max_eval_examples
    if config.dataset == "generated":
        # A held-out split has no size of its own: a tenth of the training split unless limited.
        available = config.generated_examples if split == "train" else limit or -(-config.generated_examples // 10)
        rows = generate_corpus(min(limit or available, available), config.corpus_seed, split)
        return Dataset.from_list(rows)
    if config.dataset == "hub":
        records = _load_hub(config, split, limit)
        places = [f"{config.dataset_name} ({split}), record {number}" for number in range(1, len(records) + 1)]
        return _without_empty(records, places, f"{config.dataset_name} ({split})", config, split)
    name = getattr(config, f"{split}_file")
    if name is None:
        raise DataError(f"no {split} documents: set {split}_file")
    rows, places = _read_file(Path(name), config, limit)
    return _without_empty(Dataset.from_list(rows), places, name, config, split)


def _without_empty(records: Dataset, places: list[str], source: str, config: Config, split: str) -> Dataset:
    """`records` without those that have no text, for training; all of them for a held-out split."""
    names = {"document": config.text_column, "summary": config.summary_column}
    empty = {column: {i for i, text in enumerate(records[column]) if not text.strip()} for column in names}
    for column, indices in empty.items():
        if len(indices) == len(records):
            raise DataError(
                f"{source}: {names[column]!r} is empty in all of its {len(records)} records; "
                "fill it, or set text_column and summary_column to the columns that hold text"
            )
    left_out = empty["document"] | empty["summary"]
    if not left_out:
        return records
    if len(left_out) == len(records):
        raise DataError(f"{source}: each of its {len(records)} records lacks its document or its summary; fill them")
    if os.environ.get("RANK", "0") == "0":
        logger.warning(
            "%s: no text in the document or summary of %d of %d records, which are %s",
            places[min(left_out)],
            len(left_out),
            len(records),
            "left out of training" if split == "train" else "scored all the same",
        )
    return records.select([i for i in range(len(records)) if i not in left_out]) if split == "train" else records


# Hub


def _load_hub(config: Config, split: str, limit: int | None) -> Dataset:
    name = config.dataset_name
    try:
        # XSum's main branch holds a loading script, which datasets no longer runs; the Hub keeps every data set as
        # Parquet on this branch too.
        rows = load_dataset(name, revision="refs/convert/parquet", split=split)
    except (DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"cannot load {split} of {name!r} from the Hub: {first_line(error)}; check the name and "
            "the connection, or use dataset: files with your own JSON lines, or dataset: generated"
        ) from error
    for column in (config.text_column, config.summary_column):
        if column not in rows.column_names:
            raise DataError(_missing_column(name, column, rows.column_names))
        kind = rows.features[column]
        if getattr(kind, "dtype", None) not in ("string", "large_string"):
            raise DataError(f"{name} ({split}): {column!r} holds {kind}, not text; choose another column")
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    for column in (config.text_column, config.summary_column):
        for number, text in enumerate(rows[column], start=1):
            if text is None:
                raise DataError(
                    f"{name} ({split}), record {number}: {column!r} is null; write the records that have text to a "
                    "file, and use dataset: files"
                )
    if "id" not in rows.column_names:
        rows = rows.add_column("id", [f"{split}-{i}" for i in range(len(rows))])
    names = {"id": "id", config.text_column: "document", config.summary_column: "summary"}
    rows = rows.select_columns(list(names)).rename_columns({old: new for old, new in names.items() if old != new})
    return rows.cast_column("id", Value("string"))


# Files


def _read_file(path: Path, config: Config, limit: int | None) -> tuple[list[dict[str, str]], list[str]]:
    """The first `limit` records, and where each of them stands."""
    _check_path(path)
    rows, places = [], []
    for place, default_id, record in _read_values(path):
        if limit is not None and len(rows) == limit:
            break
        rows.append(_to_row(record, place, f"{path.stem}-{default_id}", config))
        places.append(place)
    if not rows:
        raise DataError(f"{path}: the file holds no record; {FORM}")
    return rows, places


def _check_path(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: a folder; give one file")
    if not path.name.endswith(SUFFIXES):
        raise DataError(
            f"{path}: the name must end in one of {', '.join(SUFFIXES)}; write a table as JSON lines first, "
            "with pandas: frame.to_json('train.jsonl', orient='records', lines=True)"
        )
    if not path.exists():
        raise DataError(f"{path}: no such file; give a path that exists, or use dataset: generated")


def _read_values(path: Path) -> Iterator[tuple[str, int, Any]]:
    """Each JSON value of a file, with its place and its number: of the line, or in the array that the file holds."""
    lines = _read_lines(path)
    first = next(((number, line) for number, line in lines if line.strip()), None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith("["):
        text = "".join([line, *(line for _, line in lines)])
        for record, value in enumerate(_parse(text, path, number), start=1):
            yield f"{path}, record {record}", record, value
        return
    for number, line in chain([first], lines):
        if line.strip():
            yield f"{path}, line {number}", number, _parse(line.rstrip("\n"), path, number)


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file, with or without a byte order mark, and their numbers."""
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        # Bytes that are not UTF-8 become lone surrogates, so that their line can be named.
        with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                if (wrong := _lone_surrogate(line)) is not None:
                    byte = ord(line[wrong]) - 0xDC00
                    raise DataError(
                        f"{path}, line {number}: byte 0x{byte:02x} at character {wrong + 1} is not UTF-8; "
                        "save the file as UTF-8, compressed if and only if its name ends in .gz"
                    )
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}; replace it by a whole copy") from error


def _lone_surrogate(text: str) -> int | None:
    """The place of a character that no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _parse(text: str, path: Path, number: int) -> Any:
    """The JSON value of `text`, which begins in line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}, line {number + error.lineno - 1}"
        raise DataError(f"{place}: not valid JSON: {error.msg} (character {error.colno}); {FORM}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets nested too deep
        raise DataError(f"{path}, line {number}: JSON that cannot be read: {first_line(error)}; {FORM}") from error


def _to_row(record: Any, place: str, default_id: str, config: Config) -> dict[str, str]:
    if not isinstance(record, dict):
        raise DataError(f"{place}: {JSON_KINDS.get(type(record), 'null')}, not an object; {FORM}")
    name = default_id if record.get("id") is None else str(record["id"])
    row = {"id": name}
    for target, column in (("document", config.text_column), ("summary", config.summary_column)):
        if column not in record:
            raise DataError(_missing_column(f"{place} (id {name!r})", column, record))
        row[target] = record[column]
        if not isinstance(row[target], str):
            kind = JSON_KINDS.get(type(row[target]), "null")
            raise DataError(f"{place} (id {name!r}): {column!r} must be text, not {kind}; fix or remove the record")
    for column, text in row.items():
        if (wrong := _lone_surrogate(text)) is not None:
            raise DataError(
                f"{place} (id {name!r}): character {wrong + 1} of {column!r} is half a surrogate pair, "
                f"\\u{ord(text[wrong]):04x}, and no text; write the whole character, or remove it"
            )
    return row


def _missing_column(place: str, column: str, present: Iterable[str]) -> str:
    return f"{place}: no {column!r}, only {', '.join(present) or 'nothing'}; set text_column and summary_column to fit"
