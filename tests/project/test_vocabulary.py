"""Identifiers use the terms of FlashAttention and Hopper: words of our own that were replaced do not come back."""

from __future__ import annotations

import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hf_flashbsa"
#: Words that are no part of any identifier of the package, and what to write instead.
REPLACED = {
    "agenda": "mailbox",
    "asks": "needs",
    "claim": "tile_counter",
    "claims": "tile_counter",
    "extras": "tensors",
    "handover": "ds_pipeline",
    "narrowest": "min_window",
    "noted": "smem_load, info",
    "notes": "smem_store, info",
    "outbox": "ds_producer",
    "pivot": "row_max",
    "refusal": "why_unsupported",
    "replay": "launch_cached",
    "ring": "pipeline, storage",
    "rotated": "dkv_overlap",
    "rowwise": "stats",
    "scout": "scheduler_warp",
    "shrink": "row_scale",
    "shrunk": "rescale_o",
    "steady": "peel_masked",
    "turns": "tile_scheduler",
}
#: Words that are no part of an identifier of the kernels, where other parts of the package use them as plain English.
REPLACED_IN_KERNELS = {
    "held": "resident",
    "item": "work_tile",
    "job": "scheduled",
    "listed": "sparse_block, indices",
    "rules": "mods",
    "share": "consumer",
    "shown": "visible_mask, block_bits",
    "span": "block_range",
    "sums": "dq_accum, fused",
    "token": "sched_barrier",
    "told": "info",
    "wish": "deterministic",
}
#: Names that are not ours.
FOREIGN = {"item"}


def identifiers(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each name in a Python file, and of each key of a JSON file."""
    if path.suffix == ".json":
        keys: set[str] = set()
        json.loads(path.read_text(), object_pairs_hook=lambda pairs: keys.update(key for key, _ in pairs))
        yield from ((1, key) for key in sorted(keys))
        return
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type == tokenize.NAME:
            yield token.start[0], token.string


def words(identifier: str) -> set[str]:
    """The words of a name in snake_case or CamelCase, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", identifier)}


def found(paths: list[Path], replaced: dict[str, str]) -> list[str]:
    lines = []
    for path in paths:
        for line, name in identifiers(path):
            for word in sorted(words(name) & replaced.keys() - ({name} & FOREIGN)):
                lines.append(f"{path}:{line}: {name}: instead of {word}, write {replaced[word]}")
    return lines


@pytest.mark.parametrize(("folder", "replaced"), [("", REPLACED), ("kernels", REPLACED_IN_KERNELS)])
def test_replaced_words_stay_away(folder, replaced):
    paths = [path for suffix in ("py", "json") for path in sorted((PACKAGE / folder).rglob(f"*.{suffix}"))]
    assert len(paths) > 10
    assert not found(paths, replaced)
    assert not [path for path in paths if words(path.stem) & replaced.keys()]


def test_words_are_found(tmp_path):
    source = "class RingBuffer:\n    string_claims = 1  # scout\n    strings = sharing = 'held'\n"
    (tmp_path / "a.py").write_text(source)
    (tmp_path / "b.json").write_text('{"STEADY": [{"narrowest": 1}]}')
    lines = found(sorted(tmp_path.iterdir()), REPLACED | REPLACED_IN_KERNELS)
    assert [line.rpartition("/")[2].split(": instead")[0] for line in lines] == [
        "a.py:1: RingBuffer",
        "a.py:2: string_claims",
        "b.json:1: STEADY",
        "b.json:1: narrowest",
    ]
