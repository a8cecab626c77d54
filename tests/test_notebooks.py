"""The notebooks run from start to end, show what their words promise, and lie in the repository without outputs."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from test_recipe_report import make_run

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch):
    """Kernels import this checkout, even where another one is installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Shown:
    """What an executed notebook shows: `text` with Markdown, rows of its `tables`, number of `pictures`."""

    def __init__(self, name, folder):
        notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
        resources = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", timeout=300, resources=resources).execute()
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        data = [output.get("data", {}) for output in outputs]
        texts = [output.get("text", "") for output in outputs] + [
            part.get("text/markdown", part.get("text/plain", "")) for part in data
        ]
        self.text = "\n\n".join(texts)
        self.pictures = sum("image/png" in part for part in data)

    def table(self, *header):
        """Rows of the table whose first columns these are."""
        lines = iter(self.text.splitlines())
        start = "| " + " | ".join(header) + " |"
        assert any(line.startswith(start) for line in lines), f"no table that begins with {start}"
        next(lines)
        rows = []
        for line in lines:
            if not line.startswith("|"):
                break
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
        return rows


@pytest.mark.parametrize("folder", [ROOT, ROOT / "notebooks"], ids=["root", "notebooks"])
def test_quickstart(folder):
    shown = Shown("quickstart.ipynb", folder)
    backend = "triton" if torch.cuda.is_available() else "torch"
    layers = [line.split() for line in shown.text.splitlines() if "attn" in line]
    assert [line[2] for line in layers] == [backend] * 8  # six of BART, two of Llama
    assert shown.pictures == 1


def test_block_layouts():
    shown = Shown("block_layouts.ipynb", ROOT / "notebooks")
    density = {name: [float(share.strip("%")) for share in row] for name, *row in shown.table("density", "512")}
    assert set(density.pop("all_blocks")) == {100.0}
    for name, shares in density.items():
        assert shares[1] >= 50.0, f"{name}: the words say that half of the blocks are visited at 1,024 tokens"
        assert shares == sorted(shares, reverse=True) and shares[-1] < 5.0
    two, four, eight, random = (float(row[2]) for row in shown.table("blocks", "density", "difference"))
    assert random > 0.5 > two > four > 0.01 > eight
    assert "same output, same gradients" in shown.text
    assert shown.pictures == 8


def test_study_trains_two_small_runs_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XSUM_RUNS", str(tmp_path / "*"))
    shown = Shown("xsum_study.ipynb", ROOT / "notebooks")
    assert f"No run matches {tmp_path}/*: training two very small ones." in shown.text
    for _, written_out, ours, window, flash in shown.table("length"):
        assert ours == window == flash and float(written_out) > float(ours)
    for _, shuffled, grouped in shown.table("documents in a batch"):
        assert float(grouped.strip("%")) < float(shuffled.strip("%"))
    # Where this fails Transformers has been repaired, and the notebook must say so.
    attending = [int(kept) for _, _, kept in shown.table("document tokens")]
    assert attending[0] < 64 and attending[-1] == 64
    eager, ours = shown.table("run", "documents a step")
    assert (eager[0], ours[0]) == ("eager", "bsa_dense")
    assert eager[1:5] == ours[1:5]  # documents, padding, steps and tokens to the same loss
    scores = [row[2:] for row in shown.table("run", "model", "ROUGE-1")]
    assert len(scores) == 2 and float(scores[0][0].split()[0]) > 0
    assert "Same documents in the same order as eager: bsa_dense." in shown.text
    assert shown.pictures == 7


def test_study_reads_given_runs(tmp_path, monkeypatch):
    make_run(tmp_path / "one")
    make_run(tmp_path / "two", "bsa_dense", loss=3.5)
    (tmp_path / "no_run").mkdir()
    monkeypatch.setenv("XSUM_RUNS", str(tmp_path / "*"))
    shown = Shown("xsum_study.ipynb", ROOT)
    assert "training two" not in shown.text
    assert "Loss 3.550:" in shown.text
    # Losses are 3 + 2 / step and 3.5 + 2 / step; a step has 2 documents, 100 tokens, 120 positions and takes 1 s.
    assert shown.table("run", "documents a step") == [
        ["one", "2", "17%", "4", "400", "9.0"],
        ["two", "2", "17%", "40", "4,000", "45.0"],
    ]
    assert shown.pictures == 7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_repository_holds_no_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"{cell.id}: clear all outputs before saving"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_accepts_the_notebooks(command):
    pytest.importorskip("ruff", reason="ruff comes with the dev extra")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *map(str, NOTEBOOKS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
