"""The walks in docs/architecture.md: numbered steps, each a function with its file and line.

    python tests/tools/walks.py  # writes the lines anew

A step is ``1. `path/of/file.py:12` `Class.function`: what it does`` below a heading `### Walk of ...`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "architecture.md"
_STEP = re.compile(
    r"^\d+\. `(?P<file>[\w/.]+\.py):(?P<line>\d+)` `(?P<name>[\w.]+)`: (?P<text>.+(?:\n   .+)*)", re.MULTILINE
)


class Step(NamedTuple):
    file: str
    line: int
    name: str
    text: str

    def node(self) -> ast.AST:
        """The function or class, as its file has it.

        Raises:
            LookupError: it has none of this name.
        """
        node: ast.AST = ast.parse((ROOT / self.file).read_text())
        for part in self.name.split("."):
            named = [child for child in ast.iter_child_nodes(node) if getattr(child, "name", None) == part]
            if not named:
                raise LookupError(f"{PAGE.name}: {self.file} has no {self.name}")
            node = named[-1]
        return node

    def names(self) -> set[str]:
        """All names that the function's source uses."""
        nodes = list(ast.walk(self.node()))
        return {n.id for n in nodes if isinstance(n, ast.Name)} | {
            n.attr for n in nodes if isinstance(n, ast.Attribute)
        }


def walks(text: str) -> dict[str, list[Step]]:
    """Steps by what walks."""
    found = {}
    for section in re.split(r"^(?=##+ )", text, flags=re.MULTILINE):
        if heading := re.match(r"### Walk of (.*)\n", section):
            steps = [match.groupdict() for match in _STEP.finditer(section)]
            found[heading[1]] = [Step(**step | {"line": int(step["line"])}) for step in steps]
    return found


def with_right_lines(text: str) -> str:
    def right(match: re.Match) -> str:
        step = Step(match["file"], int(match["line"]), match["name"], match["text"])
        return match[0].replace(f"{step.file}:{step.line}", f"{step.file}:{step.node().lineno}", 1)

    return _STEP.sub(right, text)


if __name__ == "__main__":
    PAGE.write_text(with_right_lines(PAGE.read_text()))
