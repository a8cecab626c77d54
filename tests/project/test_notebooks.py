"""The notebooks run from start to end, show what their words promise, and hold outputs of just this code."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from made_runs import make_run
from notebook_outputs import HASH, code_cells, execute, source_hash, texts, words

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def this_checkout(monkeypatch):
    """Kernels import this checkout, even where another one is installed."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Shown:
    """What an executed notebook shows: `text` with Markdown, rows of its `tables`, number of `pictures`."""

    def __init__(self, name, folder):
        self.cells = {cell.id: cell for cell in code_cells(execute(ROOT / "notebooks" / name, folder))}
        found = [text for cell in self.cells.values() for text in texts(cell)]
        self.text = "\n\n".join(found)
        self.pictures = found.count("picture")

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


def assert_stored(name, shown, but=()):
    """The stored outputs say what a run says, numbers aside. They are those of a machine without a GPU."""
    if torch.cuda.is_available():
        return
    for cell in code_cells(nbformat.read(ROOT / "notebooks" / name, as_version=4)):
        if cell.id not in but:
            found = words(shown.cells[cell.id])
            assert words(cell) == found, f"{cell.id}: run python tests/tools/notebook_outputs.py notebooks/{name}"


def test_quickstart():
    shown = Shown("quickstart.ipynb", ROOT / "notebooks")
    assert_stored("quickstart.ipynb", shown)
    backend = "triton" if torch.cuda.is_available() else "torch"
    layers = [line.split() for line in shown.text.splitlines() if "attn" in line]
    assert [line[2] for line in layers] == [backend] * 8  # six of BART, two of Llama
    assert shown.pictures == 1


def test_block_layouts():
    shown = Shown("block_layouts.ipynb", ROOT / "notebooks")
    assert_stored("block_layouts.ipynb", shown)
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
    assert_stored("xsum_study.ipynb", shown, but=("runs",))  # which shows progress
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
def test_outputs_belong_to_the_code(path):
    """Code that changed since its outputs were stored changes the hash."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.get(HASH) == source_hash(notebook), f"run: python tests/tools/notebook_outputs.py {path}"
    assert [cell.execution_count for cell in code_cells(notebook)] == list(range(1, len(code_cells(notebook)) + 1))
    assert str(ROOT) not in path.read_text() and "/tmp/" not in path.read_text()


def test_a_changed_cell_is_noticed():
    notebook = nbformat.read(NOTEBOOKS[0], as_version=4)
    code_cells(notebook)[0].source += "\n"
    assert notebook.metadata[HASH] != source_hash(notebook)


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff_accepts_the_notebooks(command):
    pytest.importorskip("ruff", reason="ruff comes with the dev extra")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *map(str, NOTEBOOKS)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
