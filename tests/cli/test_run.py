"""Other programs find the attention implementations registered."""

from __future__ import annotations

import sys

import pytest

from hf_flashbsa.__main__ import main

PROGRAM = """
import sys
from transformers import AttentionInterface

import beside

print(sys.argv[1:], __name__, beside.VALUE, "bsa_sparse" in AttentionInterface().valid_keys())
if "fail" in sys.argv:
    sys.exit(3)
"""
#: What the program prints after its arguments.
SEEN = "__main__ 7 True\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "beside.py").write_text("VALUE = 7\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("beside", None)


def test_a_script(folder, capsys):
    argv, path = list(sys.argv), list(sys.path)
    assert main(["run", str(folder / "program.py"), "--attn_implementation", "bsa_dense", "-x"]) == 0
    assert capsys.readouterr().out == "['--attn_implementation', 'bsa_dense', '-x'] " + SEEN
    assert (sys.argv, sys.path) == (argv, path)


def test_a_module(folder, capsys):
    sys.path.insert(0, str(folder))
    assert main(["run", "-m", "program", "--help"]) == 0
    assert capsys.readouterr().out == "['--help'] " + SEEN


def test_an_installed_command(folder, capsys, monkeypatch):
    command = folder / "trainer"
    command.write_text("#!/usr/bin/env python3\n" + PROGRAM)
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    assert main(["run", "--", "trainer", "5"]) == 0
    assert capsys.readouterr().out == "['5'] " + SEEN


def test_the_exit_code_is_the_programs(folder):
    argv = list(sys.argv)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(folder / "program.py"), "fail"])
    assert ended.value.code == 3 and sys.argv == argv


@pytest.mark.parametrize(
    ("words", "message"), [([], "give a program"), (["-m"], "give a program"), (["ls"], "ls is no")]
)
def test_what_is_no_program(words, message, capsys):
    assert main(["run", *words]) == 2
    assert message in capsys.readouterr().err
