"""The command `hf-flashbsa`, also `python -m hf_flashbsa`: doctor, run, bench, tune."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys

COMMANDS = {
    "doctor": ("hf_flashbsa.cli.doctor", "what this machine can run, and why not"),
    "run": ("hf_flashbsa.cli.run", "run another program with bsa_dense and bsa_sparse registered"),
    "bench": ("hf_flashbsa.cli.bench", "time attention beside other implementations"),
    "tune": ("hf_flashbsa.cli.tune", "search launch configurations for this GPU"),
}


def main(arguments: list[str] | None = None) -> int:
    try:
        code = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()  # a closed pipe is met here, not when the interpreter exits
        return code
    except BrokenPipeError:
        try:
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        raise


def run(arguments: list[str]) -> int:
    """Runs the command that the arguments name. Returns its exit code."""
    if arguments[:1] == ["run"] and arguments[1:2] not in (["-h"], ["--help"], ["--"]):
        arguments = ["run", "--", *arguments[1:]]  # all that follows is another program's
    parser = argparse.ArgumentParser(prog="hf-flashbsa", description="Triton attention for Transformers.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        if arguments[:1] == [name]:  # Others stay unimported: doctor must run where bench cannot.
            try:
                module = importlib.import_module(module)
            except ModuleNotFoundError as error:
                print(f"{name} needs {error.name}; run: pip install 'hf_flashbsa[bench]'", file=sys.stderr)
                return 1
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(main=module.main)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
