"""The examples run, and what they print is right."""

from __future__ import annotations

import re
import runpy
from collections.abc import Callable
from pathlib import Path

import doc_models
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
CHECKPOINTS = {
    "bart_dense.py": "facebook/bart-large",
    "llama_padding_free.py": "meta-llama/Llama-3.2-1B",
    "packed_documents.py": "meta-llama/Llama-3.2-1B",
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return doc_models.save(tmp_path_factory.mktemp("checkpoints"))


def main_of(name: str) -> Callable[[list[str]], None]:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+\.\d+(?:e[-+]\d+)?|\b\d+\b", text)]


def check_bart_dense(lines: list[str]) -> None:
    eager, dense = numbers(lines[0])
    assert dense == pytest.approx(eager, abs=2e-4)
    assert re.fullmatch(r"computed by \{'(torch|triton|gluon_sm90)'\}", lines[1])
    assert numbers(lines[2])[0] < dense


def check_llama_padding_free(lines: list[str]) -> None:
    padded, packed = numbers(lines[0])
    assert packed == pytest.approx(padded, abs=2e-4)
    assert numbers(lines[1]) == [48 + 20 + 12 + 5, 4 * 48]
    assert numbers(lines[2])[0] < packed


def check_longformer_encoder(lines: list[str]) -> None:
    assert 0 < numbers(lines[0])[0] < 50
    # A window of 64 is 32 tokens on each side and the token itself; the global token lies far off.
    assert numbers(lines[1]) == [65 + 1, 512]


def check_packed_documents(lines: list[str]) -> None:
    assert all(numbers(line)[0] < 1e-5 for line in lines) and len(lines) == 2


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example(name, checkpoints, capsys):
    """With its tiny model, and with a checkpoint where this repository has a tiny one to give."""
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
    check = globals()[f"check_{name.removesuffix('.py')}"]
    checkpoint = checkpoints.get(CHECKPOINTS.get(name))
    for options in ([], ["--model", str(checkpoint)] if checkpoint else []):
        main_of(name)(options)
        check(capsys.readouterr().out.splitlines())
