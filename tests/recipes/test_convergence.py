"""The comparison of loss curves: complete runs only, repeats as draws of their own, shares inside a band."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

from benchmarks import convergence


def run_folder(path, attention: str, seed: int, losses: list[float], steps: int = 6):
    folder = path / f"{attention}_{seed}_{len(list(path.iterdir()))}"
    folder.mkdir()
    config = {"attn_implementation": attention, "seed": seed, "dropout": 0.1, "max_steps": steps}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [{"step": i, "loss": loss} for i, loss in enumerate(losses)] + [{"eval_loss": 1.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_from_run_folders_to_tables_and_a_plot(tmp_path, capsys):
    runs = tmp_path / "runs"
    runs.mkdir()
    for seed in (0, 1):
        run_folder(runs, "eager", seed, [2.0] * 6)
        run_folder(runs, "eager", seed, [2.0] * 6)  # bit for bit the first: no draw of its own
        run_folder(runs, "sdpa", seed, [2.0 + seed] * 6)
        run_folder(runs, "ours", seed, [2.25] * 3 + [2.75] * 3)
    run_folder(runs, "sdpa", 2, [9.0] * 6)  # a seed that others lack
    run_folder(runs, "ours", 3, [9.0] * 5)  # killed
    rows, picture = tmp_path / "rows.jsonl", tmp_path / "plot.png"
    folders = sorted(runs.iterdir())
    convergence.main(["collect", *map(str, folders), "--commit", "abc", "--out", str(rows)])
    assert "ours_3" in capsys.readouterr().out and len(rows.read_text().splitlines()) == len(folders) - 1
    convergence.main(["compare", str(rows), "--window", "1", "--last", "2", "--plot", str(picture)])
    printed = capsys.readouterr().out
    assert "| eager, draw 1 | 2 x 1 | 2.0000 | 1.5000 | 0% | 0.5000 |" in printed and "draw 2" not in printed
    assert "| ours | 2 x 1 | 2.7500 | 1.5000 | 50% | 0.2500 |" in printed
    assert picture.stat().st_size > 1000


@pytest.mark.parametrize("window, inside, beyond", [(1, 0.5, 1.0), (2, 1 / 3, 0.25), (4, 1.0, 0.0)])
def test_share_inside_a_band(window, inside, beyond):
    band = [np.zeros(4), np.ones(4)]
    curve = np.array([0.5, -1.0, 1.0, 1.5])
    got = convergence.held_against(curve, band, window)
    assert got == pytest.approx((inside, beyond))
