"""The project's bars on the benchmark's presets."""

import re

import pytest

from benchmarks import bars
from benchmarks.bars import BARS, PRESETS, Bar
from hf_flashbsa.bench import report


@pytest.mark.parametrize("preset", PRESETS)
def test_each_bar_bounds_comparisons_of_its_own(preset):
    texts = [comparison.text for comparison in PRESETS[preset]()]
    named = {bar: [text for text in texts if re.fullmatch(bar.text, text)] for bar in BARS[preset]}
    assert all(named.values()), [bar for bar, found in named.items() if not found]
    bounded = [text for found in named.values() for text in found]
    assert len(set(bounded)) == len(bounded)
    assert len(bounded) > len(texts) / 2


@pytest.mark.parametrize(("ratio", "holds"), [(1.5, True), (1.2, True), (1.19, False)])
def test_rows_are_judged_by_the_newest_of_a_job(ratio, holds, tmp_path, capsys, monkeypatch):
    comparison = next(PRESETS["hopper"]())
    monkeypatch.setitem(BARS, "hopper", (Bar(re.escape(comparison.text), low=1.2),))
    path = tmp_path / "rows.jsonl"
    for ms in (9.0, ratio):
        for job, value in ((comparison.numerator, ms), (comparison.denominator, 1.0)):
            report.append(path, {**job.fields(), "ms": value, "tflops": 1.0, "gpu": "a GPU"})
    assert bars.main(["hopper", str(path)]) == (0 if holds else 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if comparison.text in line)
    assert line.split()[-4:] == [f"{ratio:.3f}", ">=", "1.2", "yes" if holds else "NO"]
