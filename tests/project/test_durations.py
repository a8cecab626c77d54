"""The record of what tests take."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import durations

ROOT = Path(__file__).parents[2]


def functions_of(path: Path) -> set[str]:
    """Names of tests as pytest has them, without parameters."""
    name = path.relative_to(ROOT).as_posix()
    found = set()
    for node in ast.parse(path.read_text()).body:
        inner = node.body if isinstance(node, ast.ClassDef) else [node]
        prefix = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        functions = [x.name for x in inner if isinstance(x, ast.FunctionDef) and x.name.startswith("test")]
        found |= {f"{name}::{prefix}{function}" for function in functions}
    return found


def test_recorded_tests_exist():
    existing = set().union(*map(functions_of, (ROOT / "tests").rglob("test_*.py")))
    assert sorted(durations.recorded().keys() - existing) == []


def test_fast_tests_take_two_minutes_on_two_cores(request):
    """All parameters of fast functions, of a whole collection; of a part of it, less."""
    seconds, fast = durations.recorded(), defaultdict(int)
    for item in request.session.items:
        if item.get_closest_marker("fast"):
            fast[durations.function_of(item.nodeid)] += 1
    assert sum(seconds[name] * count for name, count in fast.items()) < 2 * 100


class Item:
    def __init__(self, nodeid: str):
        self.nodeid, self.markers = nodeid, []

    def add_marker(self, name: str) -> None:
        self.markers.append(name)


def test_long_ones_first_and_unknown_ones_are_not_fast(monkeypatch):
    monkeypatch.setattr(durations, "recorded", lambda: {"a::short": 0.01, "a::many": 0.1, "a::long": 3.0})
    items = [Item(name) for name in ("a::short[1]", "a::long", "a::unknown", *(f"a::many[{i}]" for i in range(50)))]
    durations.sort_and_mark(items)
    assert [item.nodeid for item in items[:3]] == ["a::unknown", "a::long", "a::many[0]"]
    assert [item.nodeid for item in items if item.markers] == ["a::short[1]"]
