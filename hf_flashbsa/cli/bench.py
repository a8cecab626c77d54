"""Times attention beside other implementations: `hf-flashbsa bench`.

Each measurement runs in a worker process, so that an implementation that crashes or hangs costs one row. Device times
are medians over repeats with a cold L2 cache and count every launch of a pass. TFLOP/s count live scores only.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import re
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from hf_flashbsa.bench import presets, report
from hf_flashbsa.bench.cases import MASKS, PASSES, Case
from hf_flashbsa.bench.jobs import Job, measure_job
from hf_flashbsa.bench.layouts import PATTERNS
from hf_flashbsa.bench.presets import PRESETS
from hf_flashbsa.bench.providers import CPU_PROVIDERS, GPU_PROVIDERS, PROVIDERS
from hf_flashbsa.bench.workers import JobError, run_jobs
from hf_flashbsa.environment import device_name, environment

#: The problem whose host cost is measured: too small for the device to be the slower of the two.
HOST_CASE = {"batch": 1, "heads": 2, "length": 128}
HOST_PASSES = ("forward", "both")
JOB_SECONDS = 120.0


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The problems that the options name."""
    found, layouts = [], [_layout(name, chance, options) for name in options.patterns for chance in options.densities]
    layouts = [dict(layout) for layout in dict.fromkeys(layouts)]
    wanted = itertools.product(options.masks, layouts, options.head_dims, options.lengths)
    for mask, layout, head_dim, length in wanted:
        heads = max(1, options.hidden // head_dim)
        if heads % options.gqa:
            raise SystemExit(f"--gqa: {options.gqa} does not divide {heads} heads (hidden / head dim).")
        batch = max(1, options.tokens // length)
        common = {"dtype": options.dtype, "dropout_p": options.dropout, "bias": options.bias, "window": options.window}
        try:
            found.append(Case(mask, batch, heads, heads // options.gqa, length, head_dim, **common, **layout))
        except ValueError as error:
            raise SystemExit(str(error)) from None
    return found


def _layout(name: str, density: float, options: argparse.Namespace) -> tuple[tuple[str, Any], ...]:
    """The fields of a case that make its layout; only that of "random" depends on the density."""
    if name == "dense":
        return ()
    chance = density if name == "random" else None
    return ("pattern", name), ("chance", chance), ("block_size", options.block_size)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    if options.preset:
        return presets.jobs(PRESETS[options.preset]())
    if options.host:
        cases = [
            Case("causal", **HOST_CASE, heads_k=HOST_CASE["heads"], head_dim=dim, dtype=options.dtype)
            for dim in options.head_dims
        ]
        return [Job(p, c, pass_, "host") for c, pass_, p in itertools.product(cases, HOST_PASSES, options.providers)]
    wanted = itertools.product(cases_of(options), options.passes, options.providers)
    return [Job(provider, case, pass_, "device") for case, pass_, provider in wanted]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward", "backward"])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=["full", "causal"])
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=["dense"], help="block layouts")
    parser.add_argument("--densities", nargs="+", type=float, default=[0.25], help="of the pattern 'random'")
    parser.add_argument("--block-size", type=int, default=128, help="of block layouts")
    parser.add_argument("--head-dims", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 1024, 4096, 16384])
    parser.add_argument("--tokens", type=int, default=16384, help="batch size x length")
    parser.add_argument("--hidden", type=int, default=2048, help="heads x head dim")
    parser.add_argument("--gqa", type=int, default=1, help="query heads that share a key head")
    parser.add_argument("--window", type=int, default=256, help="earlier keys seen under the mask 'window'")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--bias", action="store_true", help="add a bias (1, H, S, S) that needs a gradient")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: all that the device can have")
    parser.add_argument("--baseline", choices=PROVIDERS, help="whose speed counts as 1; default fa2, on CPU sdpa")
    parser.add_argument("--preset", choices=PRESETS, help="time the comparisons of a preset instead")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no measurement after this long")
    parser.add_argument("--resume", action="store_true", help="leave out what the file has rows of, by this code")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--host", action="store_true", help="time the host's cost per call on a small problem instead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="label of the code in the rows; default: what git says")
    parser.add_argument("--out", type=Path, help="file to append rows to; default benchmarks/results/<device>.jsonl")
    parser.add_argument("--plot", type=Path, help="image file to draw TFLOP/s in")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="show the rows of files; time nothing")


def _left(jobs: list[Job], path: Path, made_with: dict) -> tuple[list[Job], list[dict]]:
    """The jobs that a file has no rows of by the same code, versions and device, and the rows of the others. Errors do
    not count: they may pass."""
    if made_with["commit"] is None or made_with["commit"].endswith("-dirty"):
        raise SystemExit("--resume: rows of changed code cannot be told apart; commit it, or name it by --commit.")
    rows = report.rows_of([path]) if path.exists() else ()
    alike = (row for row in rows if "error" not in row and made_with.items() <= row.items())
    measured = {report.identity(row): row for row in alike}
    identities = {job: report.identity({**job.fields(), **made_with}) for job in jobs}
    before = [measured[identity] for identity in identities.values() if identity in measured]
    print(f"{len(before)} of {len(jobs)} measurements are in {path} already")
    return [job for job in jobs if identities[job] not in measured], before


def _show(rows: list[dict], options: argparse.Namespace) -> None:
    """Prints why measurements are missing, and the rows or, for a preset, its comparisons."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    for reason in report.reasons(rows):
        print(reason)
    if options.plot:
        report.plot(rows, options.plot)
        print(f"drew {options.plot}")
    if options.preset:
        console.print(presets.table(PRESETS[options.preset](), rows))
    else:
        baseline = options.baseline or ("fa2" if options.device == "cuda" else "sdpa")
        console.print(report.table(rows, baseline))


def main(options: argparse.Namespace) -> int:
    if options.show:
        _show(report.read(options.show), options)
        return 0
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(
            "bench needs a CUDA device and torch sees none; use --device cpu for the torch back end.", file=sys.stderr
        )
        return 1
    options.providers = options.providers or list(GPU_PROVIDERS if device.type == "cuda" else CPU_PROVIDERS)
    made_with = environment(device)
    if options.commit:
        made_with["commit"] = options.commit
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    path = options.out or Path("benchmarks", "results", f"{slug}.jsonl")
    work = functools.partial(measure_job, device=device, repeats=options.repeats)
    rows, jobs, before = [], jobs_of(options), []
    if options.resume:
        jobs, before = _left(jobs, path, made_with)
    for job, outcome in run_jobs(work, jobs, workers=1, seconds=options.seconds, job_seconds=JOB_SECONDS):
        if isinstance(outcome, JobError):
            outcome = {"ms": None, "tflops": None, "error": outcome.message[:500]}
        row = {
            **job.fields(),
            **outcome,
            **made_with,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        report.append(path, row)
        rows.append(row)
        print(f"[{len(rows)}/{len(jobs)}] {report.line(row)}", flush=True)
    _show(before + rows, options)
    if len(rows) < len(jobs):
        print(f"{len(jobs) - len(rows)} of {len(jobs)} measurements were left out after {options.seconds:.0f} s")
    print(f"appended {len(rows)} rows to {path}")
    return 0
