"""The walks of docs/architecture.md are those of the code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import walks

from hf_flashbsa import attention

PAGE = walks.PAGE.read_text()
WALKS = walks.walks(PAGE)
Q = "`q` to the portable kernel"


def test_lines_are_right():
    assert walks.with_right_lines(PAGE) == PAGE, "lines have moved; run: python tests/tools/walks.py"


def test_lines_are_written(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("class A:\n    x = 1\n\n    def f(self):\n        return B\n")
    monkeypatch.setattr(walks, "ROOT", tmp_path)
    steps = "1. `a.py:9` `A.f`: does\n   this\n2. `a.py:0` `A`: and that\n"
    text = f"### Walk of x\n\n{steps}\n## Other\n\n1. `a.py:1` `A`: no\n"
    right = text.replace("a.py:9", "a.py:4").replace("a.py:0", "a.py:1")
    assert walks.with_right_lines(text) == right
    (steps,) = walks.walks(right).values()
    assert [(step.line, step.name, step.text) for step in steps] == [(4, "A.f", "does\n   this"), (1, "A", "and that")]
    assert steps[0].names() == {"B"}
    with pytest.raises(LookupError, match="has no A.g"):
        walks.with_right_lines("1. `a.py:1` `A.g`: no\n")


@pytest.mark.parametrize("walk", WALKS)
def test_steps_are_called_by_earlier_ones(walk):
    steps = WALKS[walk]
    assert len(steps) > 5
    for i, step in enumerate(steps[1:], start=1):
        earlier = set().union(*(before.names() for before in steps[:i]))
        assert set(step.name.split(".")) & earlier or "calls it" in step.text, f"{walk}: nothing calls {step.name}"


def test_the_walk_of_q_is_short():
    assert set(WALKS) == {
        Q, "`q` to the Hopper kernel", "`attention_mask`", "`padding_free: true`", "`block_sparse.window`"
    }  # fmt: skip
    assert len(WALKS[Q]) <= 15
    files = [step.file for step in WALKS[Q]]
    assert len(set(files)) <= 6
    assert [file for i, file in enumerate(files) if file != files[i - 1]] == list(dict.fromkeys(files)), "goes back up"


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels have frames in Triton's interpreter only")
def test_the_walk_of_q_is_the_stack_of_a_call():
    q = torch.randn(1, 1, 1, 16, requires_grad=True)
    stacks = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_name == "forward_kernel":
            stack = []
            while frame is not None:
                stack.append((Path(frame.f_code.co_filename), frame.f_code.co_qualname.rpartition("<locals>.")[2]))
                frame = frame.f_back
            stacks.append(stack[::-1])

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        attention(q, q, q, backend="triton")
    finally:
        sys.setprofile(before)
    package = walks.ROOT / "hf_flashbsa"
    called = [(str(path.relative_to(walks.ROOT)), name) for path, name in stacks[0] if package in path.parents]
    assert called == [(step.file, step.name) for step in WALKS[Q]]
