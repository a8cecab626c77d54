"""What tests take, as recorded by `pytest --record-durations`: the order to run them in, and which are `fast`.

Times are seconds of one test, the mean over the parameters of a test function, on two cores.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).resolve().parents[1] / "durations.json"
#: A test is `fast` if it takes so long at most, and with all its parameters so long.
FAST_EACH, FAST_ALL = 0.2, 4.0


def function_of(nodeid: str) -> str:
    """`tests/ops/test_ops.py::test_name` without parameters."""
    return nodeid.partition("[")[0]


def recorded() -> dict[str, float]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def sort_and_mark(items: list) -> None:
    """Longest first, so that none of them is the last one running; those without a record are taken to be long."""
    seconds = recorded()
    of_function = defaultdict(list)
    for item in items:
        of_function[function_of(item.nodeid)].append(item)
    for function, tests in of_function.items():
        each = seconds.get(function, float("inf"))
        if each <= FAST_EACH and each * len(tests) <= FAST_ALL:
            for item in tests:
                item.add_marker("fast")
    items.sort(key=lambda item: -seconds.get(function_of(item.nodeid), float("inf")))


class Recording:
    """Plugin that writes the durations of a whole run."""

    def __init__(self):
        self._seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def pytest_runtest_logreport(self, report) -> None:
        self._seconds[function_of(report.nodeid)][report.nodeid] += report.duration

    def pytest_sessionfinish(self, session) -> None:
        if hasattr(session.config, "workerinput"):  # the controller hears of all tests
            return
        means = {name: round(sum(each.values()) / len(each), 3) for name, each in self._seconds.items()}
        FILE.write_text(json.dumps(dict(sorted(means.items())), indent=0) + "\n")
