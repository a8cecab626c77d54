"""Identifiers use the terms of FlashAttention and Hopper: words of our own that were replaced do not come back."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Words that are no part of any identifier of the package, and what to write instead.
REPLACED = {
    "agenda": "mailbox",
    "asks": "needs",
    "carried": "flat, tensors",
    "claim": "tile_counter",
    "claims": "tile_counter",
    "companion": "per_token",
    "companions": "per_token",
    "crew": "pool",
    "extras": "tensors",
    "handover": "ds_pipeline",
    "held": "resident, or what it is",
    "kept": "memoize, dropped, cached",
    "listed": "sparse_block, indices, index_lists",
    "narrowest": "min_window",
    "noted": "smem_load, info",
    "notes": "smem_store, info",
    "outbox": "ds_producer",
    "params": "scalars",
    "pivot": "row_max",
    "refusal": "why_unsupported",
    "ring": "pipeline, storage",
    "rotated": "dkv_overlap",
    "rowwise": "stats",
    "scout": "scheduler_warp",
    "share": "consumer, probs, fraction",
    "shrink": "row_scale",
    "shrunk": "rescale_o",
    "speaks": "is_main_process",
    "steady": "peel_masked",
    "sums": "dq_accum, fused, totals",
    "tell": "warn, report, store",
    "todo": "pending",
    "told": "info",
    "turns": "tile_scheduler",
    "wish": "deterministic",
}
#: Words that are no part of an identifier of the kernels, where other parts of the package use them as plain English.
REPLACED_IN_KERNELS = {
    "hide": "apply_mask",
    "item": "work_tile",
    "job": "scheduled",
    "matrix": "strided_tensor",
    "operand": "tensor_view",
    "params": "scalars",
    "repeats": "deterministic",
    "replay": "launch_cached",
    "rules": "mods",
    "shown": "visible_mask, block_bits",
    "span": "block_range",
    "token": "sched_barrier",
    "within": "window_mask",
}
#: Words that are no part of an identifier of the recipes.
REPLACED_IN_RECIPES = {
    "crew": "pool",
    "kept": "saved, cached",
    "refusal": "error",
    "speaks": "is_main_process",
    "wish": "deterministic",
}
#: What functions and classes were called that have a clearer name now, and that name.
REPLACED_NAMES = {
    "asks_ids": "needs_ids",
    "configure": "set_block_sparse",
    "faster": "speedup",
    "launcher_of": "select_launcher",
    "register_stack": "register_layer_stack",
    "resolve": "lower",
    "span_of": "block_range",
    "unavailable": "unavailable_reason",
    "weights_by": "exp_scores",
}
#: Names that are not ours.
FOREIGN = {"item", "DotOperandLayout", "ListedColormap"}


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
            for word in sorted(words(name) & replaced.keys() if name not in FOREIGN else ()):
                lines.append(f"{path}:{line}: {name}: instead of {word}, write {replaced[word]}")
    return lines


@pytest.mark.parametrize(
    ("folder", "replaced"),
    [
        ("hf_flashbsa", REPLACED),
        ("hf_flashbsa/kernels", REPLACED_IN_KERNELS),
        ("recipes", REPLACED_IN_RECIPES),
    ],
)
def test_replaced_words_stay_away(folder, replaced):
    paths = [path for suffix in ("py", "json") for path in sorted((ROOT / folder).rglob(f"*.{suffix}"))]
    assert len(paths) > 10
    assert not found(paths, replaced)
    assert not [path for path in paths if words(path.stem) & replaced.keys()]


def defined(source: str) -> set[str]:
    """Names of the functions and classes of a source."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return {node.name for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


def test_replaced_names_stay_away():
    names = {path: defined(path.read_text()) & REPLACED_NAMES.keys() for path in (ROOT / "hf_flashbsa").rglob("*.py")}
    assert {path: found for path, found in names.items() if found} == {}
    assert defined("class A:\n    def resolve(self): pass") == {"A", "resolve"}


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
