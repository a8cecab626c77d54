"""Files and functions stay small enough to read, and modules import each other in no circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(path for folder in ("hf_flashbsa", "recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
FILE_LINES, FUNCTION_LINES, PARAMETERS = 450, 60, 8
#: What runs on a device is compiled as a whole, and has each tensor and constant as an argument of its own.
DEVICE = {"triton.jit", "gluon.jit", "gluon.constexpr_function"}
_OPERANDS = "the operands of a kernel, by their names in the papers"
_SCHEMA = "the fields of an op's schema, one by one"
_PATTERN = "the parameters that the pattern's paper or code has, keyword-only but for the lengths"
#: Functions with more than 8 parameters, and why they have them.
MANY_PARAMETERS = {
    "hf_flashbsa/integration/attention_function.py:_bsa_forward": "the keywords of Transformers' attention functions",
    "hf_flashbsa/integration/mask_function.py:bsa_mask": "the keywords of Transformers' mask functions",
    "hf_flashbsa/kernels/gluon_sm90/launch.py:launch_forward": _OPERANDS,
    "hf_flashbsa/kernels/gluon_sm90/launch.py:launch_dq": _OPERANDS,
    "hf_flashbsa/kernels/gluon_sm90/launch.py:launch_dkdv": _OPERANDS,
    "hf_flashbsa/kernels/gluon_sm90/launch.py:launch_fused_backward": _OPERANDS,
    "hf_flashbsa/kernels/torch/backend.py:backward": _OPERANDS,
    "hf_flashbsa/kernels/torch/backend.py:_backward": _OPERANDS,
    "hf_flashbsa/kernels/torch/fused.py:backward": _OPERANDS,
    "hf_flashbsa/kernels/triton/backend.py:backward": _OPERANDS,
    "hf_flashbsa/kernels/triton/launch.py:launch_dq": _OPERANDS,
    "hf_flashbsa/kernels/triton/launch.py:launch_dkdv": _OPERANDS,
    "hf_flashbsa/kernels/triton/launch.py:launch_dbias": _OPERANDS,
    "hf_flashbsa/masks/patterns/bigbird.py:bigbird": _PATTERN,
    "hf_flashbsa/masks/patterns/deepspeed.py:deepspeed_fixed": _PATTERN,
    "hf_flashbsa/masks/patterns/deepspeed.py:deepspeed_variable": _PATTERN,
    "hf_flashbsa/masks/selection.py:top_k_blocks": _PATTERN,
    "hf_flashbsa/masks/selection.py:antidiagonal_blocks": _PATTERN,
    "hf_flashbsa/ops/api.py:attention": "the operation: every option of attention is a keyword",
    "hf_flashbsa/ops/reference.py:reference_attention": "defines what the options of attention mean",
    "hf_flashbsa/ops/autograd.py:_backward": _SCHEMA,
    "hf_flashbsa/ops/autograd.py:_jvp_op": _SCHEMA,
    "hf_flashbsa/ops/autograd.py:_jvp_fake": _SCHEMA,
    "hf_flashbsa/training/largest_batch.py:largest_batch": "settings of the search, keyword-only, with defaults",
    "recipes/xsum/flash_attention_2.py:repaired_attention": "the keywords of Transformers' attention functions",
}


class Function(NamedTuple):
    """A function of a source file, named `file:Class.function`."""

    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def is_for_device(self) -> bool:
        return any(ast.unparse(d).partition("(")[0] in DEVICE for d in self.node.decorator_list)

    @property
    def lines(self) -> int:
        """From `def` to its last line, without the docstring."""
        documented = ast.get_docstring(self.node) is not None
        docstring = self.node.body[0]
        return _height(self.node) - (_height(docstring) if documented else 0)

    @property
    def parameters(self) -> int:
        arguments = self.node.args
        named = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        return len(named) - (named[:1] in (["self"], ["cls"]))


def _height(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1


def functions(file: str, text: str) -> Iterator[Function]:
    def below(node: ast.AST, scope: str) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield Function(f"{file}:{scope}{child.name}", child)
                yield from below(child, f"{scope}{child.name}.")
            else:
                yield from below(child, f"{scope}{child.name}." if isinstance(child, ast.ClassDef) else scope)

    return below(ast.parse(text), "")


def _file(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


HOST_FUNCTIONS = [
    function for path in SOURCES for function in functions(_file(path), path.read_text()) if not function.is_for_device
]


def test_files_are_short():
    lengths = {_file(path): len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lengths) > 100
    assert {file: length for file, length in lengths.items() if length > FILE_LINES} == {}


def test_functions_are_short():
    assert {f.name: f.lines for f in HOST_FUNCTIONS if f.lines > FUNCTION_LINES} == {}


def test_functions_have_few_parameters_or_a_reason():
    many = {f.name for f in HOST_FUNCTIONS if f.parameters > PARAMETERS}
    assert many == set(MANY_PARAMETERS)


def test_functions_are_measured():
    text = (
        'class A:\n    def f(self, a, b=1, *rest, c, **more):\n        """One\n        two."""\n\n'
        "        def g():\n            pass\n\n@triton.jit(x=1)\ndef h():\n    pass\n"
    )
    found = {f.name: (f.lines, f.parameters, f.is_for_device) for f in functions("a.py", text)}
    assert found == {"a.py:A.f": (4, 3, False), "a.py:A.f.g": (2, 0, False), "a.py:h": (2, 0, True)}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(text: str, modules: set[str]) -> set[str]:
    """Those of `modules` that a source imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found & modules


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_no_import_goes_in_a_circle():
    """Imports within functions and those for annotations count too."""
    texts = {module_of(path): path.read_text() for path in SOURCES}
    assert circle({module: imported(text, set(texts)) - {module} for module, text in texts.items()}) == []


@pytest.mark.parametrize(("line", "closes"), [("from p import b", True), ("import p.b", True), ("import q", False)])
def test_circles_are_found(line, closes):
    texts = {"p.a": "def f():\n    from p.b import x", "p.b": "import p.c", "p.c": f"if TYPE_CHECKING:\n    {line}"}
    graph = {module: imported(text, set(texts)) for module, text in texts.items()}
    assert bool(circle(graph)) == closes
