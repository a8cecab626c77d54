"""benchmarks/padding_free.py runs all its parts on the CPU, and a variant that fails costs no other its row."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import ByteLevelBPETokenizer

ROOT = Path(__file__).parents[2]
#: The longest documents are longer than what a query sees of them in bsa_sparse, and else as short as may be.
EXAMPLES = [
    {"document": "rain fell on the town " * 13 * n, "summary": "it rained " * (1 + n % 3)} for n in (3, 9, 1, 6, 2, 8)
]
DENSE, PACKED = "bsa_dense", "bsa_dense+padding_free"


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """Where the script finds documents and a tokenizer; it runs without Triton's interpreter, and without git."""
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text for example in EXAMPLES for text in example.values()], vocab_size=300)
    tokenizer.save_model(str(tmp_path))
    with gzip.open(tmp_path / "data.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(example) + "\n" for example in EXAMPLES)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("PATH", "")
    return tmp_path


def command(files: Path, *arguments: str) -> list[str]:
    made = ["benchmarks/padding_free.py", "--tiny", "--device", "cpu", "--tokenizer", str(files), "--repeats", "1"]
    made += ["--documents", str(files / "data.jsonl.gz"), "--out", str(files / "rows.jsonl")]
    return [*made, "--source-length", "640", *arguments]


def rows_in(files: Path) -> list[dict]:
    return [json.loads(line) for line in (files / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def run(files, monkeypatch) -> Callable[..., list[dict]]:
    """Runs the script in this process and returns the rows that it wrote."""

    def run_script(*arguments: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", command(files, *arguments))
        runpy.run_path("benchmarks/padding_free.py", run_name="__main__")
        return rows_in(files)

    return run_script


def test_all_parts(run):
    variants = (
        DENSE,
        PACKED,
        "bsa_dense+full_rows",
        "sdpa+grouped",
        "bsa_sparse+padding_free",
        f"{PACKED}+checkpointing",
        "nonsense",
    )
    sizes = ("--batches", "3", "--window", "2", "--ledger-batch", "4", "--budgets", "1")
    rows = run("--model", "bart-large", *sizes, "--variants", *variants, "--commit", "abc")
    assert {row["commit"] for row in rows} == {"abc"}
    by_part = {
        part: {row["variant"]: row for row in rows if row["part"] == part} for part in ("steps", "ledger", "largest")
    }
    assert all(tuple(found) == variants for found in by_part.values())
    assert all("nonsense" in found.pop("nonsense")["error"] for found in by_part.values())
    steps, ledger, largest = by_part.values()
    live = {variant: row["live_share"] for variant, row in steps.items()}
    assert live[DENSE] == live[PACKED] < live["sdpa+grouped"] < live["bsa_dense+full_rows"] == 1.0
    assert all(row["ms"] > 0 for row in steps.values())
    assert sum(ledger[PACKED]["bytes"].values()) < sum(ledger[DENSE]["bytes"].values())
    assert predictions(ledger) == pytest.approx([1, 1], abs=0.05)
    assert {row["batch"] for row in largest.values()} == {8}  # what --tiny is limited to: nothing limits it here


def predictions(ledger: dict[str, dict]) -> list[float]:
    return [ledger[variant]["double_predicted_over_measured"] for variant in (DENSE, PACKED)]


@pytest.mark.parametrize("model", ["t5-base", "llama-1b"])
def test_memory_of_other_models(run, model):
    sizes = ("--window", "1", "--ledger-batch", "4")
    rows = run("--model", model, *sizes, "--parts", "ledger", "--variants", DENSE, PACKED)
    ledger = {row["variant"]: row for row in rows}
    assert sum(ledger[PACKED]["bytes"].values()) < sum(ledger[DENSE]["bytes"].values())
    if model == "t5-base":  # its position bias is most of so small a model's memory, and does not double
        assert min(predictions(ledger)) > 1
    else:
        assert predictions(ledger) == pytest.approx([1, 1], abs=0.05)


def test_the_run_of_all_claims(run, capsys):
    """Without a GPU, variants that need one fail, and of the others' claims those on memory predicted are judged."""
    rows = run("--batches", "2", "--window", "1", "--ledger-batch", "2", "--budgets", "40")
    assert {(row["model"], row["part"]) for row in rows} == {
        ("bart-large", "steps"),
        ("bart-large", "largest"),
        ("bart-large", "ledger"),
        ("llama-1b", "ledger"),
        ("t5-base", "steps"),
    }
    failed = {row["variant"] for row in rows if "error" in row}
    fused = f"{PACKED}+fused_ce"
    assert failed == {
        *("flash_attention_2", "flash_attention_2+grouped", "fa2_repaired", fused, f"{fused}+checkpointing")
    }
    claims = capsys.readouterr().out.partition("claims")[2]
    assert "llama-1b: double the batch" in claims and "t5-base B=" not in claims  # whose batches are 32 and 128


def test_out_of_time_is_a_row(files):
    """The script as a user starts it."""
    arguments = ("--seconds", "0", "--model", "bart-large", "--parts", "steps", "--variants", "sdpa", DENSE)
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *command(files, *arguments)], env=environment, check=True, timeout=300)
    assert {row["error"] for row in rows_in(files)} == {"out of time: raise --seconds"}


def claimed(*values: tuple) -> dict[str, str]:
    """The claims table of rows of padding_free (128 examples) and others."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from padding_free_tables import claims
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    rows = [
        {"model": "bart-large", "part": "steps", "variant": variant, "batch": 128, "ms": ms, "peak_gib": peak}
        for variant, ms, peak in values
    ]
    table = next(claims(rows))
    return dict(zip(*(list(table.columns[i].cells) for i in (0, 3)), strict=True))


def test_claims_are_judged_by_the_newest_rows():
    fast = [("flash_attention_2", 442.7, 80.7), (PACKED, 228.1, 42.0)]
    judged = claimed(*fast)
    assert [word for word in judged.values() if word] == ["yes", "yes"] and len(judged) == 2
    assert [word for word in claimed(*fast, (PACKED, 300.0, 42.0)).values() if word] == ["NO", "yes"]
