"""A record of what ptxas made of kernels, so that tests need not run LLVM and ptxas for code that they have seen.

    python tests/tools/kernel_record.py  # after a change of kernels or of Triton; --anew forgets all

Tests lower each kernel to TTGIR, which takes a fifth of the time, and look its hash up in `kernels/compiled.json`. A
kernel that is there has compiled before, to this very verdict: the hash covers the TTGIR but for names and locations,
the options of the compilation, and the releases of Triton and ptxas, and what follows TTGIR depends on nothing else. A
kernel that is not there, because something of it changed, is compiled and judged on the spot. The limits are no part
of the record: tests apply them to every verdict, wherever it comes from. Rewriting compiles what the record lacks, and
drops what no test asks for.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import triton
from triton.backends.nvidia.compiler import CUDABackend

FILE = Path(__file__).resolve().parents[1] / "kernels" / "compiled.json"


def load(path: Path = FILE) -> dict[str, dict]:
    """Verdicts by hash."""
    return json.loads(path.read_text()) if path.exists() else {}


def save(record: dict[str, dict], path: Path = FILE) -> None:
    """Writes a line for each kernel, sorted by its name."""
    lines = [
        f'"{key}": {json.dumps(row)}' for key, row in sorted(record.items(), key=lambda x: (x[1]["kernel"], x[0]))
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def normalised(ir: str) -> str:
    """TTGIR without locations, and with values and functions numbered in order of appearance."""
    ir = re.sub(r"^#loc.*\n|\s*\bloc\((?:[^()]|\([^()]*\))*\)", "", ir, flags=re.MULTILINE)
    numbers: dict[str, str] = {}
    return re.sub(r"([%@^])\"?[A-Za-z_][\w$.-]*\"?|%\d+", lambda m: numbers.setdefault(m[0], f"%{len(numbers)}"), ir)


def key_of(ir: str, options, backend: CUDABackend) -> str:
    """Hash of normalised TTGIR and of all else that decides what becomes of it."""
    # The file of libdevice comes with Triton, under a path of its own on each machine.
    values = {name: value for name, value in dataclasses.asdict(options).items() if name != "extern_libs"}
    code = "\n".join([ir, repr(sorted(values.items())), triton.__version__, backend.hash()])
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def at_ttgir(visit: Callable[[str, str], None]):
    """A patch in which compilation calls `visit` with normalised TTGIR and its key, and goes on unless that raises."""
    add_stages = CUDABackend.add_stages

    def add_visited_stages(self, stages, options, *rest):
        add_stages(self, stages, options, *rest)
        make = stages["ttgir"]

        def make_and_visit(source, metadata):
            module = make(source, metadata)
            ir = normalised(str(module))
            visit(ir, key_of(ir, options, self))
            return module

        stages["ttgir"] = make_and_visit

    return mock.patch.object(CUDABackend, "add_stages", add_visited_stages)


class _Known(Exception):
    """Ends the compilation of a kernel that is on record."""


class Verdicts:
    """What becomes of kernels: as recorded, or by `read` of the compiled kernel and ptxas' log."""

    def __init__(self, known: dict[str, dict], read: Callable[..., dict]):
        self._known, self._read = known, read
        # Triton compiles equal calls once in a process.
        self._compiled: dict[str, tuple[str, dict]] = {}

    def of(self, compile_kernel: Callable) -> tuple[str, dict]:
        """Key and verdict. Triton's cache must not hold the kernel, and ptxas' log must be printed."""
        keys = []

        def look_up(ir: str, key: str) -> None:
            keys.append(key)
            if key in self._known:
                raise _Known

        with contextlib.redirect_stdout(io.StringIO()) as printed, at_ttgir(look_up):
            try:
                kernel = compile_kernel()
            except _Known:
                verdict = dict(self._known[keys[0]])
                del verdict["kernel"]
                return keys[0], verdict
        if keys:
            self._compiled[kernel.hash] = keys[0], self._read(kernel, printed.getvalue())
        return self._compiled[kernel.hash]


def main(arguments: list[str] | None = None) -> int:
    import aot

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anew", action="store_true", help="compile all kernels, also those on record")
    anew = parser.parse_args(arguments).anew
    hopper = str(Path(__file__).with_name("compile_hopper.py"))
    scripts = [(hopper, "64"), (hopper, "128")]
    scripts += [(str(FILE.with_name(name)),) for name in ("test_aot.py", "test_wide_loads.py")]
    record: dict[str, dict] = {}
    for script in scripts:
        rows = aot.run_compiling(*script, known={} if anew else load())
        record |= {
            row["key"]: {"kernel": row["name"], **{x: row[x] for x in aot.VERDICT}} for row in rows if row["key"]
        }
        print(f"{' '.join(script)}: {len(record)} kernels", flush=True)
    save(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
