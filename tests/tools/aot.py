"""Compiles the kernels for a GPU that need not be there, by way of their own launchers, and reads what ptxas did."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import kernel_record
from sass import disassemble, lost_operands, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

#: Most shared memory of one program, bytes.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


class Compiled(NamedTuple):
    """One compiled kernel, or what is known of one of which nobody asks. `spills` are bytes stored; `wgmma` and `mma`
    count matrix instructions, `narrow` loads of 16 bits; `key` is that of `kernel_record`.

    `serialized` tells whether ptxas waits for each wgmma, `overwritten` counts `sass.overwritten_operands` and `lost`
    `sass.lost_operands`.
    """

    name: str
    module: str
    key: str | None = None
    registers: int | None = None
    spills: int | None = None
    shared: int | None = None
    warps: int | None = None
    wgmma: int | None = None
    mma: int | None = None
    narrow: int | None = None
    serialized: bool | None = None
    overwritten: int | None = None
    lost: int | None = None


#: What `kernel_record` keeps of a kernel.
VERDICT = Compiled._fields[3:]


class _Driver:
    """Answers what compilation asks a driver."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # A device for each architecture: kernels keep what they compiled by device.
        return self.target.arch

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int, within: str = "", verdicts: kernel_record.Verdicts | None = None):
    """Within, launches of kernels whose module's name begins with `within` compile for `sm_<arch>` instead of running,
    and others do nothing. Yields the list of what was launched.

    With `verdicts`, which one process shares, the compiled kernels are read, and those on record are not compiled
    again. Without, they are left in Triton's cache.
    """
    # Kernels decide when they are imported; `attention` looks at the variable when it is called.
    for module in ("triton.backend", "triton.dq_accum"):
        importlib.import_module(f"hf_flashbsa.kernels.{module}")
    compiled, run = [], JITFunction.run

    def compile_(self, *args, **kwargs):
        module, key, verdict = self.fn.__module__, None, {}
        if module.startswith(within):
            kwargs["warmup"] = True
            if verdicts is None:
                run(self, *args, **kwargs)
            else:
                key, verdict = verdicts.of(lambda: run(self, *args, **kwargs))
        compiled.append(Compiled(self.fn.__name__, module, key, **verdict))

    active = driver._active
    driver.set_active(_Driver(arch))
    environment = {"TRITON_INTERPRET": "1"}
    with contextlib.ExitStack() as stack:
        if verdicts is not None:
            cache = stack.enter_context(tempfile.TemporaryDirectory())  # kernels that it held would be noted nowhere
            environment |= {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_))
        stack.enter_context(mock.patch.dict(os.environ, environment))
        try:
            yield compiled
        finally:
            driver._active = active


def read(kernel, log: str) -> dict:
    """`VERDICT` of a compiled kernel, with the `log` of ptxas."""
    ptx = kernel.asm["ptx"]
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    sass = disassemble(kernel.asm["cubin"]) if wgmma else ""  # without, there is nothing that `sass` could find
    return {
        "registers": int(re.search(r"Used (\d+) registers", log).group(1)),
        "spills": int(re.search(r"(\d+) bytes spill stores", log).group(1)),
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wgmma": wgmma,
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "narrow": len(re.findall(r"\bld\.global[.\w]*\.b16", ptx)),
        "serialized": "wgmma.mma_async instructions are serialized" in log,
        "overwritten": len(overwritten_operands(sass)),
        "lost": len(lost_operands(sass)),
    }


def recorded_verdicts() -> kernel_record.Verdicts:
    """For a script that `run_compiling` runs: what is known comes on its standard input."""
    gc.freeze()  # Triton's frontend makes much garbage; to go through all imported modules for it takes a tenth longer
    return kernel_record.Verdicts(json.load(sys.stdin), read)


def run_compiling(script: str, *arguments: str, known: dict[str, dict] | None = None) -> list:
    """The JSON lines that a script prints in a process of its own; in that of a test Triton may be the interpreter.

    Scripts that ask for `recorded_verdicts` are given those of `kernel_record`, or what is `known` instead.
    """
    root = Path(__file__).resolve().parents[2]
    paths = (root, root / "tests" / "tools", root / "tests" / "helpers")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, script, *arguments]
    known = kernel_record.load() if known is None else known
    done = subprocess.run(command, cwd=root, env=environment, input=json.dumps(known), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    keys = {line["key"] for line in lines if isinstance(line, dict) and line.get("key")}
    if new := len(keys - known.keys()):
        warnings.warn(f"{new} kernels were compiled anew; run: python tests/tools/kernel_record.py", stacklevel=2)
    return lines
