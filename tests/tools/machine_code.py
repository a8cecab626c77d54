"""Fingerprints of the machine code of the kernels, to show that a change of names changes nothing else.

    PYTHONPATH=. python tests/tools/machine_code.py --out after.json --compare before.json

Compiles the kernels of a fixed set of calls for sm_80 and sm_90 on a machine that needs no GPU, and hashes their SASS
without kernel names. The calls reach every entry of the configuration files and every feature at least once. Kernels
are identified by the call and their position among its launches, so that results compare across renames.

With `--ir`, compilation stops at TTGIR, after inlining, and that is hashed without names and locations. It takes a
tenth of the time, and equal TTGIR compiles to equal machine code.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch
import triton
from aot import _Driver
from compile_hopper import call as hopper_call
from compile_hopper import kinds_for
from kernel_record import at_ttgir
from triton import knobs
from triton.runtime import JITFunction, driver

import hf_flashbsa.kernels
from hf_flashbsa import BlockLayout, attention
from hf_flashbsa.kernels import tuning

LENGTH = 256
_INSTRUCTION = re.compile(
    r"/\*[0-9a-f]{4,}\*/\s+(.*?;)\s+/\* (0x[0-9a-f]+) \*/|^\s+/\* (0x[0-9a-f]+) \*/", re.MULTILINE
)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
#: Portable kernels: head dim, dtype, whether rows begin at multiples of 16 bytes, and the features of a call.
PORTABLE = {
    "d64": (64, "bfloat16", True, {"causal", "dropout"}),
    "d64-bias": (64, "bfloat16", True, {"bias", "softcap", "grouped"}),
    "d64-unaligned": (64, "bfloat16", False, {"causal"}),
    "d64-unaligned-bias": (64, "bfloat16", False, {"bias", "packed"}),
    "d64-packed": (64, "float16", True, {"packed", "sinks", "causal", "dropout", "grouped"}),
    "d64-padded": (64, "bfloat16", True, {"padded", "window"}),
    "d64-documents": (64, "bfloat16", True, {"documents", "causal", "lse"}),
    "d64-layout": (64, "bfloat16", True, {"layout", "dropout"}),
    "d64-fp32": (64, "float32", True, {"bias", "causal"}),
    "d96": (96, "bfloat16", True, {"window"}),
    "d128": (128, "bfloat16", True, {"causal", "sinks"}),
    "d128-mask": (128, "bfloat16", True, {"mask", "bias", "dropout"}),
    "d128-layout-partial": (128, "bfloat16", True, {"layout", "partial", "packed", "bias"}),
    "d256": (256, "bfloat16", True, {"causal"}),
    "d256-bias": (256, "bfloat16", True, {"bias"}),
    "d256-unaligned": (256, "bfloat16", False, {"bias"}),
    "d256-fp32": (256, "float32", True, {"bias"}),
    "d64-alibi": (64, "bfloat16", True, {"alibi", "causal", "packed"}),
    "d128-alibi": (128, "bfloat16", True, {"alibi", "dropout"}),
}


def portable_call(head_dim: int, dtype: str, aligned: bool, features: set[str]) -> None:
    """Calls `attention` and its backward pass."""
    heads_k = 2 if "grouped" in features else 4
    zeros = functools.partial(torch.zeros, dtype=getattr(torch, dtype))
    room = head_dim if aligned else head_dim + 1
    q, k, v, dout = (
        zeros(1, LENGTH, heads, room)[..., :head_dim].transpose(1, 2) for heads in (4, heads_k, heads_k, 4)
    )
    options: dict = {"causal": "causal" in features, "dropout_p": 0.1 if "dropout" in features else 0.0}
    if "window" in features:
        options["window_size"] = (100, 30)
    if "softcap" in features:
        options["softcap"] = 30.0
    if "sinks" in features:
        options["sinks"] = torch.zeros(4, requires_grad=True)
    if "bias" in features:
        options["bias"] = zeros(1, 4, LENGTH, LENGTH).requires_grad_()
    if "alibi" in features:
        options["alibi_slopes"] = torch.zeros(4)
    if "mask" in features:
        options["mask"] = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    if "packed" in features:
        cu_seqlens = torch.tensor([0, 70, LENGTH], dtype=torch.int32)
        options |= {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
    if "padded" in features:
        options["segment_ids_k"] = torch.zeros(1, LENGTH, dtype=torch.int32)
    if "documents" in features:
        options |= {f"segment_ids_{side}": torch.arange(LENGTH, dtype=torch.int32)[None] // 100 for side in "qk"}
    if "layout" in features:
        masks = torch.ones(1, 128, 128, dtype=torch.bool) if "partial" in features else None
        options["layout"] = BlockLayout(torch.ones(1, 1, LENGTH // 128, LENGTH // 128, dtype=torch.int32), 128, masks)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if "lse" in features:
        out, lse = attention(*leaves, backend="triton", return_lse=True, **options)
        torch.autograd.backward([out, lse], [dout, torch.zeros_like(lse)])
    else:
        attention(*leaves, backend="triton", **options).backward(dout)


def calls(arch: int) -> Iterator[tuple[str, bool, Callable]]:
    """Name, whether Hopper kernels are to be launched, and the call."""
    for name, problem in PORTABLE.items():
        yield f"sm_{arch} portable {name}", False, functools.partial(portable_call, *problem)
    if arch == 90:
        for head_dim in (64, 128):
            for kind in kinds_for(head_dim):
                yield f"sm_90 gluon d{head_dim} {kind}", True, functools.partial(hopper_call, kind, head_dim)


def fingerprint(kernel) -> dict:
    """What a compiled kernel is made of. `stack` (spills and local arrays) and `shared` are bytes."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass, resources = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-sass", "-res-usage")
        )
    code = "\n".join(filter(None, (part for match in _INSTRUCTION.findall(sass) for part in match)))
    registers, stack = map(int, _RESOURCES.search(resources).groups())
    return {
        "kernel": kernel.metadata.name,
        "sass": hashlib.sha256(code.encode()).hexdigest()[:16],
        "instructions": len(re.findall(r";$", code, re.MULTILINE)),
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
    }


class _Stop(Exception):
    """Ends a compilation."""


def stop_at_ttgir(found: list[dict], name: str):
    """A patch that notes a fingerprint of TTGIR and ends the compilation."""

    def note_and_stop(ir: str, key: str) -> None:
        found.append({"kernel": name, "ttgir": key, "lines": ir.count("\n")})
        if directory := os.environ.get("DUMP"):
            Path(directory, f"{name}_{len(found)}_{key}.mlir").write_text(ir)
        raise _Stop

    return at_ttgir(note_and_stop)


@contextlib.contextmanager
def launches(arch: int, gluon: bool, ir: bool) -> Iterator[list[dict]]:
    """Within, launches compile for `sm_<arch>`. Of calls for Hopper kernels, those of others are left out unless they
    run around them."""
    found, run = [], JITFunction.run

    def compile_(self, *args, **kwargs):
        if gluon and "gluon" not in type(self).__name__.lower() and not re.search("sums|process", self.fn.__name__):
            return
        kwargs["warmup"] = True
        if not ir:
            found.append(fingerprint(run(self, *args, **kwargs)))
            return
        with contextlib.suppress(_Stop), stop_at_ttgir(found, self.fn.__name__):
            run(self, *args, **kwargs)

    active = driver._active
    driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_),
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
            mock.patch.object(tuning, "architecture", lambda device: f"sm_{arch}"),
            mock.patch.object(tuning, "is_hopper", lambda device: gluon),
        ):
            yield found
    finally:
        driver._active = active


def compile_all(only: str, ir: bool, out: Path | None) -> dict[str, dict]:
    # Kernels decide when they are imported whether they are for the interpreter.
    for module in pkgutil.walk_packages(hf_flashbsa.kernels.__path__, "hf_flashbsa.kernels."):
        importlib.import_module(module.name)
    results, begin = {}, time.monotonic()
    for arch in (80, 90):
        for name, gluon, run in calls(arch):
            if re.search(only, name):
                with launches(arch, gluon, ir) as found:
                    run()
                results |= {f"{name} #{i}": result for i, result in enumerate(found)}
                if out is not None:
                    out.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{time.monotonic() - begin:.0f} s, {len(results)} kernels: {name}", file=sys.stderr, flush=True)
    return results


def compare(before: dict[str, dict], after: dict[str, dict]) -> list[str]:
    """How kernels that both have differ, names aside, and which one of them lacks."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            lines.append(f"{name}: only {'after' if name in after else 'before'}")
            continue
        old, new = before[name], after[name]
        changes = [f"{key} {old[key]} -> {new[key]}" for key in old if key != "kernel" and old[key] != new[key]]
        if changes:
            lines.append(f"{name} ({new['kernel']}): {', '.join(changes)}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write fingerprints to this file")
    parser.add_argument("--compare", type=Path, help="fingerprints to compare with")
    parser.add_argument("--only", default="", help="regular expression for the names of calls")
    parser.add_argument("--ir", action="store_true", help="hash TTGIR instead of SASS")
    options = parser.parse_args(arguments)
    if options.ir:
        knobs.cache.dir = tempfile.mkdtemp()  # a cached kernel would go through no stage
    results = compile_all(options.only, options.ir, options.out)
    if options.compare is None:
        return 0
    before = {
        name: x
        for name, x in json.loads(options.compare.read_text()).items()
        if re.search(options.only, name.rpartition(" ")[0])
    }
    different = compare(before, results)
    print("\n".join([*different, f"{len(results)} kernels, {len(different)} differ"]))
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
