"""The report: numbers from run directories alone, pictures, and what is missing said in words."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from made_runs import make_run
from PIL import Image

from recipes.xsum import report

REPORT = Path(report.__file__)


def rows_of(text, start):
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(start)
    ]


def test_script_reports_two_runs(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two", "bsa_dense", loss=3.5, speed=200.0)]
    done = subprocess.run(
        [sys.executable, str(REPORT), *map(str, runs), "--out", str(tmp_path / "out")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "report.md").read_text()
    settings, results, trained, untrained = rows_of(text, "| two |")
    memory = text[text.index("## Memory") : text.index("## Data order")]
    assert rows_of(memory, "| ")[2:] == [
        ["weights", "1.000", "1.000"],
        ["attention", "0.250", "0.250"],
        ["mlp", "0.000", "0.500"],
        ["workspace", "1.000", "1.000"],
        ["all parts", "2.250", "2.750"],
        ["peak in", "backward", "backward"],
    ]
    assert settings == [
        "two",
        "bsa_dense",
        "torch (3 layers)",
        "bart, from scratch",
        "generated",
        "2",
        "group_by_length",
        "fp32",
        "a machine",
    ]
    # The last tenth is steps 37 to 40.
    loss = sum(3.5 + 2.0 / step for step in (37, 38, 39, 40)) / 4
    assert results == ["two", "40", f"{loss:.4f}", "2.5000 (test)", "17%", "200", "4.0", "0.50 GiB", "0 min 25 s"]
    assert trained[:3] == ["two", "trained", "30.00 (28.00 to 32.50)"]
    assert untrained[:3] == ["two", "untrained", "1.00 (0.50 to 1.50)"]
    assert "Same documents in the same order as one: two." in text
    assert "## Missing" not in text
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {
        *("loss_by_step.png", "loss_by_token.png", "loss_by_time.png", "loss_difference.png"),
        *("rouge.png", "throughput.png", "memory.png", "memory_parts.png"),
    }
    for name in pictures:
        assert f"]({name})" in text
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width >= 1000 and len(image.convert("RGB").getcolors(2**24)) > 20


def test_report_is_a_pure_function_of_the_runs(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    outputs = []
    for name in ("a", "b"):
        report.write_report(runs, tmp_path / name)
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert outputs[0] == outputs[1]


def test_missing_pieces_are_stated(tmp_path):
    runs = [
        make_run(tmp_path / "whole"),
        make_run(tmp_path / "killed", model=True, rouge=True),
        make_run(tmp_path / "barely", metrics=True, model=True, rouge=True, ledger=True),
    ]
    metrics = runs[1] / "metrics.jsonl"
    kept = metrics.read_text().splitlines(keepends=True)[:12]
    metrics.write_text("".join(kept) + '{"step": 13, "lo')
    text = report.write_report(runs, tmp_path / "out").read_text()
    for note in (
        "- **killed**: the last line of metrics.jsonl is cut: killed while writing",
        "- **killed**: unfinished: no trained model, last logged step 12",
        "- **killed**: no ROUGE scores: no rouge.json of the trained model",
        "- **killed**: no evaluation loss",
        "- **barely**: no metrics.jsonl: training never started",
        "- **barely**: no ledger.json: a single process writes it after its first step",
    ):
        assert note in text
    assert "- **whole**" not in text
    assert rows_of(text, "| killed |")[1][1] == "12"
    assert rows_of(text, "| barely |")[1][1:] == ["–"] * 8


def test_runs_with_another_data_order_are_left_out_of_differences(tmp_path):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two")]
    changed = runs[1] / "metrics.jsonl"
    changed.write_text(changed.read_text().replace('"source_tokens": 80,', '"source_tokens": 81,'))
    text = report.write_report(runs, tmp_path / "out").read_text()
    assert "Not the same data order as one, so left out of the loss differences: two." in text
    assert not (tmp_path / "out" / "loss_difference.png").exists()


def test_label_smoothing_is_pointed_out(tmp_path):
    run = make_run(tmp_path / "one")
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"label_smoothing": 0.1}))
    text = report.write_report([run], tmp_path / "out").read_text()
    assert "training loss of one includes label smoothing" in text


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["none"], "none is no run directory: it has no config.yaml"),
        (["a/run", "b/run"], "two run directories are called run"),
    ],
    ids=["no run", "same name"],
)
def test_errors_are_one_line(tmp_path, capsys, names, message):
    make_run(tmp_path / "a" / "run")
    make_run(tmp_path / "b" / "run")
    assert report.main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()
