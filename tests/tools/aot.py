"""Compiles the kernels for a GPU that need not be there, by way of their own launchers, and reads what ptxas did."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from sass import disassemble, lost_operands, overwritten_operands
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import JITFunction, driver

#: Most shared memory of one program, bytes.
SHARED_LIMIT = {80: 166_912, 90: 232_448}


class Compiled(NamedTuple):
    """One compiled kernel, or what is known of one that was not to be compiled. `spills` are bytes stored; `wgmma` and
    `mma` count matrix instructions, `narrow` loads of 16 bits.

    `serialized` tells whether ptxas waits for each wgmma, `overwritten` counts `sass.overwritten_operands` and `lost`
    `sass.lost_operands`.
    """

    name: str
    module: str
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


class _Driver:
    """Answers what compilation asks a driver."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # A device for each architecture: kernels keep what they compiled by device.
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int, within: str = ""):
    """Within, launches of kernels whose module's name begins with `within` compile for `sm_<arch>` instead of running,
    and others do nothing. Yields the list of what was launched."""
    # Kernels decide when they are imported; `attention` looks at the variable when it is called.
    for module in ("triton.backend", "triton.dq_accum"):
        importlib.import_module(f"hf_flashbsa.kernels.{module}")
    compiled, run = [], JITFunction.run

    def compile_(self, *args, **kwargs):
        module = self.fn.__module__
        if not module.startswith(within):
            compiled.append(Compiled(self.fn.__name__, module))
            return None
        kwargs["warmup"] = True
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            kernel = run(self, *args, **kwargs)
            if "ptxas info" not in printed.getvalue():  # Triton had compiled it before
                make_backend(kernel.metadata.target).make_cubin(kernel.asm["ptx"], {}, kernel.metadata, arch)
        compiled.append(read(kernel, module, printed.getvalue()))
        return kernel

    active = driver._active
    driver.set_active(_Driver(arch))
    environment = {"TRITON_INTERPRET": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    try:
        with mock.patch.object(JITFunction, "run", compile_), mock.patch.dict(os.environ, environment):
            yield compiled
    finally:
        driver._active = active


def read(kernel, module: str, log: str) -> Compiled:
    """What became of a kernel, with the `log` of ptxas."""
    ptx = kernel.asm["ptx"]
    wgmma = len(re.findall(r"wgmma\.mma_async", ptx))
    sass = disassemble(kernel.asm["cubin"]) if wgmma else ""  # without, there is nothing that `sass` could find
    return Compiled(
        kernel.metadata.name,
        module,
        int(re.search(r"Used (\d+) registers", log).group(1)),
        int(re.search(r"(\d+) bytes spill stores", log).group(1)),
        kernel.metadata.shared,
        kernel.metadata.num_warps,
        wgmma,
        len(re.findall(r"\bmma\.sync", ptx)),
        len(re.findall(r"\bld\.global[.\w]*\.b16", ptx)),
        "wgmma.mma_async instructions are serialized" in log,
        len(overwritten_operands(sass)),
        len(lost_operands(sass)),
    )


def run_compiling(script: str, *arguments: str) -> list:
    """The JSON lines that a script prints in a process of its own; in that of a test Triton may be the interpreter."""
    root = Path(__file__).resolve().parents[2]
    paths = (root, root / "tests" / "tools", root / "tests" / "helpers")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]
