"""Runs another Python program with the attention implementations registered: `hf-flashbsa run PROGRAM ...`.

PROGRAM is a script, the name of an installed command written in Python, or `-m MODULE`; everything after it is the
program's own. Under `accelerate launch` or `torchrun`, run this command as the module:
`accelerate launch -m hf_flashbsa run train.py --attn_implementation bsa_dense`.
"""

from __future__ import annotations

import argparse
import runpy
import shutil
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "hf-flashbsa run [-m MODULE | PROGRAM] [ARGUMENTS ...]"
    parser.add_argument("program", nargs=argparse.REMAINDER, help="a program and its arguments")


def main(options: argparse.Namespace) -> int:
    words = options.program[1:] if options.program[:1] == ["--"] else options.program
    if not words or words == ["-m"]:
        print(
            "run: give a program, for example: hf-flashbsa run train.py --attn_implementation bsa_dense",
            file=sys.stderr,
        )
        return 2
    # `hf_flashbsa` is imported already, by the command itself, which registers the names.
    before = sys.argv, sys.path[0]
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            return 0
        script = _script(words[0])
        if script is None:
            print(f"run: {words[0]} is no file, and no command written in Python", file=sys.stderr)
            return 2
        sys.argv, sys.path[0] = words, str(script.parent)  # as `python script` has them
        runpy.run_path(str(script), run_name="__main__")
        return 0
    finally:
        sys.argv, sys.path[0] = before


def _script(name: str) -> Path | None:
    """The Python file to run: a path, or a command's entry script."""
    if Path(name).is_file():
        return Path(name)
    found = shutil.which(name)
    if found is None:
        return None
    with open(found, "rb") as file:
        first = file.readline()
    return Path(found) if first.startswith(b"#!") and b"python" in first else None
