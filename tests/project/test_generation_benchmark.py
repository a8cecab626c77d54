"""benchmarks/generation.py runs all its parts on the CPU."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def generation(monkeypatch):
    """The script, whose folder is on the path where it runs."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("generation")


def test_all_parts(generation, tmp_path):
    out = tmp_path / "rows.jsonl"
    generation.main(["--smoke", "--device", "cpu", "--rounds", "1", "--out", str(out), "--commit", "abc"])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["commit"] for row in rows} == {"abc"}
    assert Counter(row["part"] for row in rows) == {"tokens": 8, "generate": 2, "decode": 12}
    assert all(row["equal"] for row in rows if row["part"] == "tokens")
    assert all(row["ms_per_token"] > 0.0 for row in rows if row["part"] != "tokens")
    assert {row["implementation"] for row in rows} == {"sdpa", "bsa_dense"}
