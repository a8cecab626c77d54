"""Imports point one way: recipes -> integration -> attention -> kernels -> torch; importing the package is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = [*ROOT.glob("hf_flashbsa/**/*.py"), *ROOT.glob("recipes/**/*.py")]
#: What lowers a mask, and what back ends are told: nothing that imports Triton.
HOST_KERNELS = {
    f"hf_flashbsa.kernels.{name}"
    for name in ("block_tables", "backends", "call_plan", "dropout", "tables", "tile_schedule", "tuning")
}
#: What a module may import beside the standard library; the longest prefix of its name counts. A name allows all
#: that lies in it.
ALLOWED = {
    "hf_flashbsa": {
        "hf_flashbsa.ops", "hf_flashbsa.masks", "hf_flashbsa.kernels.backends", "hf_flashbsa.integration",
        "hf_flashbsa.patterns", "hf_flashbsa.selection", "hf_flashbsa._deprecated",
    },
    "hf_flashbsa.masks": {"torch", "hf_flashbsa.masks"},
    "hf_flashbsa.masks.block_layout": {"torch", "matplotlib", "hf_flashbsa.masks.modes"},
    "hf_flashbsa.masks.modes": {"torch"},
    "hf_flashbsa.masks.spec": {"torch", "hf_flashbsa.masks.block_layout"},
    "hf_flashbsa.masks.selection": {"torch", "hf_flashbsa.masks.block_layout"},
    "hf_flashbsa.ops": {"torch", "hf_flashbsa.ops", "hf_flashbsa.masks", *HOST_KERNELS},
    "hf_flashbsa.ops.reference": {"torch", "hf_flashbsa.masks.spec"},
    "hf_flashbsa.ops.autograd": {"torch", "hf_flashbsa.ops.batching", *HOST_KERNELS},
    "hf_flashbsa.ops.batching": {"torch", *HOST_KERNELS},
    "hf_flashbsa.kernels": {"torch", "hf_flashbsa.kernels"},
    "hf_flashbsa.kernels.tables": set(),
    "hf_flashbsa.kernels.structs": set(),
    "hf_flashbsa.kernels.triton": {
        "triton", "hf_flashbsa.kernels.dropout", "hf_flashbsa.kernels.structs", "hf_flashbsa.kernels.tables",
        "hf_flashbsa.kernels.triton",
    },
    "hf_flashbsa.kernels.launch_cache": {
        "torch", "triton", "hf_flashbsa.kernels.backends", "hf_flashbsa.kernels.tuning",
    },
    "hf_flashbsa.kernels.compile_only": {"torch", "triton", "hf_flashbsa.kernels"},
    "hf_flashbsa.kernels.arguments": {
        "torch", "hf_flashbsa.kernels.dropout", "hf_flashbsa.kernels.call_plan", "hf_flashbsa.kernels.structs",
        "hf_flashbsa.kernels.tables",
    },
    "hf_flashbsa.kernels.gluon_sm90": {
        "triton", "hf_flashbsa.kernels.gluon_sm90", "hf_flashbsa.kernels.structs", "hf_flashbsa.kernels.tables",
        "hf_flashbsa.kernels.triton",
    },
    "hf_flashbsa.kernels.gluon_sm90.dispatch": {
        "torch", "hf_flashbsa.kernels.arguments", "hf_flashbsa.kernels.launch_cache", "hf_flashbsa.kernels.call_plan",
        "hf_flashbsa.kernels.tuning",
    },
    "hf_flashbsa.kernels.gluon_sm90.trial": {
        "torch", "triton", "hf_flashbsa.kernels.call_plan", "hf_flashbsa.kernels.torch",
    },
    "hf_flashbsa.kernels.gluon_sm90.launch": {
        "torch", "triton", "hf_flashbsa.kernels.arguments", "hf_flashbsa.kernels.gluon_sm90",
        "hf_flashbsa.kernels.call_plan", "hf_flashbsa.kernels.tables", "hf_flashbsa.kernels.triton",
        "hf_flashbsa.kernels.tuning",
    },
    "hf_flashbsa.kernels.triton.backend": {"torch", "hf_flashbsa.kernels"},
    "hf_flashbsa.kernels.triton.launch": {"torch", "hf_flashbsa.kernels"},
    "hf_flashbsa.integration": {
        "torch", "transformers", "packaging", "hf_flashbsa.ops.api", "hf_flashbsa.ops.lowering", "hf_flashbsa.masks",
        "hf_flashbsa.integration", "hf_flashbsa.kernels.backends", "hf_flashbsa.kernels.block_tables",
    },
    "hf_flashbsa.integration.warm_up": {"torch", "transformers", "hf_flashbsa.integration.padding_free.graphs"},
    "hf_flashbsa.integration.forward": {"hf_flashbsa._deprecated", "hf_flashbsa.integration"},
    "hf_flashbsa.integration.mask": {"hf_flashbsa._deprecated", "hf_flashbsa.integration"},
    "hf_flashbsa.integration.fused_loss": {"torch", "transformers", "liger_kernel", "hf_flashbsa.integration"},
    "hf_flashbsa.training": {"torch", "transformers", "rich", "matplotlib", "hf_flashbsa.training"},
    "hf_flashbsa.environment": {"torch"},
    "hf_flashbsa.bench": {"torch", "triton", "rich", "matplotlib", "hf_flashbsa"},
    "hf_flashbsa.cli": {"torch", "triton", "rich", "hf_flashbsa"},
    "hf_flashbsa.cli.doctor": {"torch", "transformers", "packaging", "hf_flashbsa"},
    "recipes": {
        "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "yaml", "rich", "matplotlib",
        "rouge_score", "safetensors", "hf_flashbsa", "recipes",
    },
}  # fmt: skip
#: Loaded by nobody who does not ask for them.
HEAVY = ("hf_flashbsa.kernels.triton", "hf_flashbsa.kernels.launch_cache", "hf_flashbsa.kernels.compile_only",
         "hf_flashbsa.bench", "datasets", "matplotlib", "rich", "liger_kernel",
         "transformers.models.bart.modeling_bart")  # fmt: skip


def _name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _imports(path: Path) -> set[str]:
    """Modules that a file imports, at its top or later, outside the standard library."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # A name may be a module of the package it is imported from.
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inside = {name for name in names if name in PROJECT}
            modules |= inside or {node.module}
    return {module for module in modules if module.split(".")[0] not in sys.stdlib_module_names}


PROJECT = {_name(path) for path in SOURCES}


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_direction_of_imports(path):
    layer = max((name for name in ALLOWED if _within(_name(path), name)), key=len)
    wrong = {m for m in _imports(path) if not any(_within(m, package) for package in ALLOWED[layer])}
    assert not wrong, f"{_name(path)} imports {sorted(wrong)}; {layer} may import {sorted(ALLOWED[layer])}"


def _python(code: str) -> list[str]:
    """The lines that a new process prints."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def test_import_is_light_and_triton_without_a_gpu_refused():
    """Transformers' masks import Triton by way of torch's compiler; that aside, nothing but what attention needs. The
    kernels want a GPU, unless the interpreter is asked for, which Triton decides when they are imported."""
    code = """
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import hf_flashbsa
print(*sys.modules)
import torch
q = torch.randn(1, 1, 3, 4)
try:
    hf_flashbsa.attention(q, q, q, backend="triton")
except ValueError as error:
    print(error)
"""
    loaded, message = _python(code)
    assert "hf_flashbsa" in loaded.split()
    assert not [module for module in loaded.split() if any(_within(module, heavy) for heavy in HEAVY)]
    assert message.startswith("backend: 'triton' ") and "CUDA device" in message


def test_works_without_triton():
    """CPU builds of torch lack it."""
    code = """
import sys
sys.modules["triton"] = None
import torch, hf_flashbsa
q = torch.randn(1, 1, 3, 4, requires_grad=True)
hf_flashbsa.attention(q, q, q, causal=True).sum().backward()
print(tuple(q.grad.shape))
"""
    assert _python(code) == ["(1, 1, 3, 4)"]
