"""Searches launch configurations for this GPU: `hf-flashbsa tune`.

Candidates compile in parallel processes first. Those that spill no registers (or, where all do, all) and compute what
the configuration in use computes are timed; the lowest geometric mean over lengths and masks wins. Backward kernels
are timed within a whole backward pass, with the other kernels as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.bench.measure import measure
from hf_flashbsa.bench.workers import JobError, run_jobs
from hf_flashbsa.environment import environment
from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.tuning import Config

KERNELS = ("forward", "dkdv", "dq", "dbias")
VARIANTS = ("plain", "rich")
#: float32 numbers of its accumulators and scores that one thread can hold beside everything else.
REGISTER_BUDGET = 192
#: A candidate this many times slower than the best so far is not timed further.
HOPELESS = 1.25
#: A change that gains less than this factor is noise.
LEAST_GAIN = 1.01
#: Longest a bias `(1, H, S, S)` is timed at.
LONGEST_BIAS = 1024


class Setting(NamedTuple):
    """A problem to time a kernel on."""

    length: int
    causal: bool
    dropout_p: float
    bias: bool


class Target(NamedTuple):
    """A table entry to find: one kernel, for one head dim, dtype and kind of scores ("plain" or "rich")."""

    kernel: str
    head_dim: int
    dtype: torch.dtype
    variant: str


class Candidate(NamedTuple):
    """A configuration to compile and time for a target."""

    target: Target
    config: Config


class Compiled(NamedTuple):
    """What the compiler made of a candidate: registers and spills of a thread, shared memory in bytes."""

    registers: int
    spills: int
    shared: int


class Measured(NamedTuple):
    """A candidate's time relative to the configuration in use, the geometric mean over settings."""

    config: Config
    ratio: float
    compiled: Compiled


def settings(target: Target, lengths: list[int]) -> list[Setting]:
    """Problems for a target, the longest first."""
    lengths = sorted(lengths, reverse=True)
    if target.variant == "plain":
        return [Setting(n, causal, 0.0, False) for n in lengths for causal in (True, False)]
    short = [n for n in lengths if n <= LONGEST_BIAS] or lengths[-1:]
    biased = [Setting(n, False, 0.0, True) for n in short]
    return biased if target.kernel == "dbias" else [Setting(n, True, 0.1, False) for n in lengths] + biased


def candidates(target: Target, shared_bytes: int) -> list[Config]:
    """Configurations worth compiling: their tiles fit shared memory and registers and keep all warps busy."""
    dim, itemsize = target.head_dim, target.dtype.itemsize
    small = itemsize == 4 or dim > 128
    stay = (32, 64, 128) if small else (64, 128)  # Rows of the tile that a program keeps.
    pass_by = (16, 32, 64) if small else (32, 64, 128)
    stages_of = (1, 2) if target.variant == "rich" or small else (2, 3, 4)
    configs = []
    for own, other, warps, stages in itertools.product(stay, pass_by, (4, 8), stages_of):
        registers, tiles = {
            "forward": (own * dim + own * other, own + 2 * other * stages),
            "dkdv": (2 * own * dim + 2 * own * other, 2 * own + 2 * other * stages),
            "dq": (own * dim + 2 * own * other, 2 * own + 2 * other * stages),
            "dbias": (3 * own * other, 2 * (own + other) * stages),
        }[target.kernel]
        if (
            registers <= REGISTER_BUDGET * 32 * warps
            and tiles * dim * itemsize <= shared_bytes
            and own * other >= 16 * 32 * warps
        ):
            m, n = (other, own) if target.kernel == "dkdv" else (own, other)
            configs.append(Config(m, n, warps, stages))
    return configs


def problem(target: Target, setting: Setting, options: argparse.Namespace) -> Callable[[], Any]:
    """A function that runs the target's pass on random tensors and returns its results."""
    batch, heads = max(1, options.tokens // setting.length), max(1, options.hidden // target.head_dim)
    shape, device = (batch, heads, setting.length, target.head_dim), torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, device=device, dtype=target.dtype, generator=generator)
    q, k, v, dout = (draw(shape) for _ in range(4))
    bias = draw(1, heads, setting.length, setting.length) if setting.bias else None
    inputs = [q, k, v] + ([bias] if target.kernel == "dbias" else [])
    spec = AttentionSpec(causal=setting.causal)
    backward = target.kernel != "forward"
    for x in inputs:
        x.requires_grad_(backward)

    def forward() -> torch.Tensor:
        torch.manual_seed(0)
        return attention(q, k, v, spec, bias=bias, dropout_p=setting.dropout_p, backend="triton")

    if not backward:
        return lambda: (forward(),)
    out = forward()
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


@contextlib.contextmanager
def _recorded() -> Iterator[list]:
    """Within, Triton kernels compile but do not run. Yields the list of those compiled."""
    from triton.runtime import JITFunction

    kernels, run = [], JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernels.append(run(self, *args, **kwargs | {"warmup": True}))
        return kernels[-1]

    with mock.patch.object(JITFunction, "run", compile_only):
        yield kernels


def compile_candidate(candidate: Candidate, options: argparse.Namespace) -> Compiled | JobError:
    """Compiles a candidate into Triton's cache on disk, for all masks that its target is timed with."""
    from triton.runtime.errors import OutOfResources

    target = candidate.target
    chosen = {(s.causal, s.dropout_p, s.bias): s for s in settings(target, options.lengths)}
    worst = Compiled(0, 0, 0)
    for setting in chosen.values():
        with _recorded() as kernels, tuning.override(target.kernel, candidate.config):
            problem(target, setting, options)()
        (kernel,) = (kernel for kernel in kernels if kernel.name == f"{target.kernel}_kernel")
        try:
            kernel._init_handles()  # Loads it, which tells what it needs.
        except OutOfResources as error:
            return JobError(str(error))
        worst = Compiled(*map(max, worst, (kernel.n_regs, kernel.n_spills, kernel.metadata.shared)))
    return worst


def compile_all(pending: list[Candidate], options: argparse.Namespace) -> dict[Candidate, Compiled | JobError]:
    """Compiles candidates in parallel processes. The interpreter has nothing to compile."""
    if options.device == "cpu":
        return dict.fromkeys(pending, Compiled(0, 0, 0))
    work = functools.partial(compile_candidate, options=options)
    return dict(run_jobs(work, pending, workers=options.workers))


def _differs(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> bool:
    """Whether results differ by more than reordered sums do."""
    for a, b in zip(got, want, strict=True):
        limit = 2e-2 if b.dtype.itemsize == 2 else 2e-3
        if not (a.float() - b.float()).norm() <= limit * b.float().norm():
            return True
    return False


def time_target(
    target: Target, compiled: dict[Config, Compiled], current: Config, options: argparse.Namespace
) -> list[Measured]:
    """Times a target's candidates beside the configuration in use, which is one of them; the fastest first."""
    device = torch.device(options.device)
    ratios: dict[Config, list[float]] = {config: [] for config in compiled}
    for setting in settings(target, options.lengths):
        run = problem(target, setting, options)
        with tuning.override(target.kernel, current):
            want = run()
            base = measure(run, device, options.repeats).median
        best = 1.0
        for config in list(ratios):
            with tuning.override(target.kernel, config):
                if _differs(run(), want):
                    print(f"{_name(target)} {_text(config)} computes something else: left out", file=sys.stderr)
                    del ratios[config]
                    continue
                ratio = measure(run, device, options.repeats).median / base
            best = min(best, ratio)
            ratios[config].append(ratio)
        ratios = {config: r for config, r in ratios.items() if config == current or r[-1] <= HOPELESS * best}
    scored = [Measured(c, math.exp(sum(map(math.log, r)) / len(r)), compiled[c]) for c, r in ratios.items()]
    return sorted(scored, key=lambda measured: measured.ratio)


def _name(target: Target) -> str:
    return f"{target.kernel} {target.head_dim} {str(target.dtype).removeprefix('torch.')} {target.variant}"


def _text(config: Config) -> str:
    return f"{config.block_m}x{config.block_n}/{config.num_warps}/{config.num_stages}"


def _current(target: Target, arch: str) -> Config:
    return tuning.select(target.kernel, arch, target.head_dim, target.dtype.itemsize, target.variant == "plain")


def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program can have."""
    if device.type == "cpu":
        return 1 << 18
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(torch.cuda.current_device())["max_shared_mem"]


def _table(arch: str) -> dict[str, list[dict]]:
    file = resources.files("hf_flashbsa.kernels").joinpath("configs", tuning.file_name(arch))
    return {kernel: entries for kernel, entries in json.loads(file.read_text()).items() if kernel in KERNELS}


def merged(arch: str, chosen: dict[Target, Config]) -> dict[str, list[dict]]:
    """The architecture's table with the chosen configurations put in; what was not tuned stays as it is."""
    table = {}
    for kernel, entries in _table(arch).items():
        keys = {(entry["itemsize"], entry["head_dim"]) for entry in entries}
        keys |= {(t.dtype.itemsize, t.head_dim) for t in chosen if t.kernel == kernel}
        table[kernel] = []
        for itemsize, head_dim in sorted(keys):
            found = {
                t.variant: c for t, c in chosen.items() if (*t[:2], t.dtype.itemsize) == (kernel, head_dim, itemsize)
            }
            plain, rich = (
                found.get(variant) or tuning.select(kernel, arch, head_dim, itemsize, variant == "plain")
                for variant in VARIANTS
            )
            if kernel == "dbias":  # Where there is a bias, no scores are plain.
                plain = rich
            key = {"head_dim": head_dim, "itemsize": itemsize}
            if plain != rich:
                table[kernel].append({**key, "plain_only": True, **plain._asdict()})
            table[kernel].append({**key, **rich._asdict()})
    return table


def write_table(path: Path, table: dict[str, list[dict]], measured_on: dict) -> None:
    """One entry a line, as the shipped files are."""
    lines = [f' "_measured": {json.dumps(measured_on)}']
    for kernel, entries in table.items():
        rows = ",\n".join(f"  {json.dumps(entry)}" for entry in entries)
        lines.append(f' "{kernel}": [\n{rows}\n ]')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 4096])
    parser.add_argument("--tokens", type=int, default=16384, help="batch size x length")
    parser.add_argument("--hidden", type=int, default=2048, help="heads x head dim")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="compiling processes")
    parser.add_argument("--show", type=int, default=3, help="configurations to print for each target")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: Triton's interpreter")
    parser.add_argument("--out", type=Path, help="configuration file to write; default <architecture>.json here")


def main(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("tune needs a CUDA device; torch sees none. `hf-flashbsa doctor` tells more.", file=sys.stderr)
        return 1
    arch, shared_bytes = tuning.architecture(device), _shared_bytes(device)
    dtype = getattr(torch, options.dtype)
    targets = [
        Target(kernel, dim, dtype, variant)
        for kernel, dim, variant in itertools.product(options.kernels, options.head_dims, options.variants)
        if kernel != "dbias" or variant == "rich"
    ]
    current = {target: _current(target, arch) for target in targets}
    configs = {target: {current[target], *candidates(target, shared_bytes)} for target in targets}
    pending = [Candidate(target, config) for target in targets for config in sorted(configs[target])]
    begin = time.monotonic()
    compiled = compile_all(pending, options)
    failed = {candidate: result for candidate, result in compiled.items() if isinstance(result, JobError)}
    print(f"compiled {len(pending) - len(failed)} of {len(pending)} in {time.monotonic() - begin:.0f} s", flush=True)
    for message, count in Counter(error.message for error in failed.values()).most_common(5):
        print(f"    {count} x {message}")
    table = Table("kernel", "head dim", "scores", "configuration", "time", "regs", "spills", "shared KiB")
    path = options.out or Path(f"{arch}.json")
    measured_on = environment(device) | {"date": str(date.today())}
    chosen = {}
    for target in targets:
        usable = {c: r for (t, c), r in compiled.items() if t == target and not isinstance(r, JobError)}
        if current[target] not in usable:
            message = failed[Candidate(target, current[target])].message
            print(f"{_name(target)}: the configuration in use does not compile: {message}", file=sys.stderr)
            return 1
        clean = {c: r for c, r in usable.items() if r.spills == 0}
        chosen_from = {current[target]: usable[current[target]], **(clean or usable)}
        ranking = time_target(target, chosen_from, current[target], options)
        winner = ranking[0] if ranking[0].ratio * LEAST_GAIN < 1.0 else None
        chosen[target] = winner.config if winner else current[target]
        print(f"{_name(target)}: {_text(chosen[target])} of {len(chosen_from)}", flush=True)
        write_table(path, merged(arch, chosen), measured_on)
        baseline = next(m for m in ranking if m.config == current[target])
        for m in dict.fromkeys([*ranking[: options.show], baseline]):
            mark = " (in use)" if m is baseline else ""
            table.add_row(
                target.kernel, str(target.head_dim), target.variant, _text(m.config) + mark, f"{m.ratio:.3f}",
                str(m.compiled.registers), str(m.compiled.spills), f"{m.compiled.shared / 1024:.0f}",
            )  # fmt: skip
        table.add_section()
    Console(width=110).print(table)
    print(f"{time.monotonic() - begin:.0f} s in all; wrote {path}. To use it, put it in hf_flashbsa/kernels/configs.")
    return 0
