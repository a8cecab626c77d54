"""benchmarks/first_minute.py runs all its variants and writes a row for each process."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def first_minute(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import first_minute

    folders, run = [], subprocess.run

    def run_here(command, *, env=None, **options):
        """Instead of a new process, whose imports take seconds."""
        if command[0] != sys.executable:
            return run(command, env=env, **options)
        folders.append(env["TRITON_CACHE_DIR"])
        monkeypatch.setattr(sys, "argv", command[1:])
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert first_minute.main() == 0
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(subprocess, "run", run_here)
    monkeypatch.setattr(first_minute, "folders", folders, raising=False)
    return first_minute


def test_rows_and_table(first_minute, tmp_path, monkeypatch, capsys):
    out, variants = tmp_path / "rows.jsonl", first_minute.VARIANTS
    arguments = ["--tiny", "--device", "cpu", "--out", str(out), "--variants", *variants]
    monkeypatch.setattr(sys, "argv", ["first_minute.py", *arguments])
    assert first_minute.main() == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["variant"], row["cache"]) for row in rows] == [(v, c) for v in variants for c in ("cold", "warm")]
    for row in rows:
        ends = list(row["seconds"].values())
        assert set(first_minute.PHASES) < row["seconds"].keys() and ends == sorted(ends) and 0 <= ends[0] < 60
        assert row["compiled"] == row["compiled_in_steps"] == 0 and row["tiny"] and row["torch"]
    cold, warm = first_minute.folders[::2], first_minute.folders[1::2]
    assert cold == warm and len(set(cold)) == len(variants)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:7]] == [[row["variant"], row["cache"]] for row in rows]
