"""Times attention beside other implementations: `python -m hf_flashbsa bench`.

Each measurement runs in a worker process, so that an implementation that crashes or hangs costs one row. Device times
are medians over repeats with a cold L2 cache and count every launch of a pass. TFLOP/s count live scores only.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from hf_flashbsa.bench import report
from hf_flashbsa.bench.cases import MASKS, PASSES, Case, Inputs, make_inputs, reference_error
from hf_flashbsa.bench.environment import device_name, environment
from hf_flashbsa.bench.measure import Timing, measure, measure_host
from hf_flashbsa.bench.providers import CPU_PROVIDERS, GPU_PROVIDERS, PROVIDERS, Runner, Unsupported, enabled
from hf_flashbsa.bench.workers import JobError, run_jobs

#: The problem whose host cost is measured: too small for the device to be the slower of the two.
HOST_CASE = {"batch": 1, "heads": 2, "length": 128}
HOST_PASSES = ("forward", "both")
JOB_SECONDS = 120.0


class Job(NamedTuple):
    """One measurement. `clock` is "device" or "host"."""

    provider: str
    case: Case
    pass_: str
    clock: str


def _pass(inputs: Inputs, run: Runner, pass_: str) -> Callable[[], Any]:
    """What is timed. The output's graph is built beforehand where only the backward pass counts."""
    if pass_ == "forward":
        return torch.no_grad()(run)
    if pass_ == "both":
        return lambda: torch.autograd.grad(run(), inputs.leaves, inputs.dout)
    out = run()
    return lambda: torch.autograd.grad(out, inputs.leaves, inputs.dout, retain_graph=True)


def _usable(device: torch.device) -> bool:
    """Whether the device still answers."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def measure_job(job: Job, device: torch.device, repeats: int) -> dict:
    """The measured part of a row: ms, p20, p80, tflops, relative_error; or why there is none."""
    torch.manual_seed(0)
    try:
        with enabled(job.provider):
            inputs = make_inputs(job.case, device)
            timed = _pass(inputs, PROVIDERS[job.provider](inputs), job.pass_)
            result = timed()
            out, gradients = (result, None) if job.pass_ == "forward" else (None, result)
            error = reference_error(inputs, out, gradients)
            del result, out, gradients
            timing = (measure if job.clock == "device" else measure_host)(timed, device, repeats)
    except (Unsupported, NotImplementedError) as reason:
        return {"ms": None, "tflops": None, "unsupported": str(reason)}
    except Exception as error:
        if not _usable(device):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"ms": None, "tflops": None, "error": f"{type(error).__name__}: {error}"[:500]}
    return _measured(job, timing, error)


def _measured(job: Job, timing: Timing, error: float | None) -> dict:
    tflops = job.case.flops(job.pass_) / timing.median / 1e9 if job.clock == "device" else None
    rounded = {"ms": timing.median, "p20": timing.p20, "p80": timing.p80}
    rounded = {name: round(value, 5) for name, value in rounded.items()}
    return {**rounded, "tflops": tflops and round(tflops, 3), "relative_error": error and float(f"{error:.3g}")}


def cases_of(options: argparse.Namespace) -> list[Case]:
    """The problems that the options name."""
    found = []
    for mask, head_dim, length in itertools.product(options.masks, options.head_dims, options.lengths):
        heads = max(1, options.hidden // head_dim)
        if heads % options.gqa:
            raise SystemExit(f"--gqa: {options.gqa} does not divide {heads} heads (hidden / head dim).")
        batch = max(1, options.tokens // length)
        common = {"dtype": options.dtype, "dropout_p": options.dropout, "bias": options.bias, "window": options.window}
        found.append(Case(mask, batch, heads, heads // options.gqa, length, head_dim, **common))
    return found


def jobs_of(options: argparse.Namespace) -> list[Job]:
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
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--host", action="store_true", help="time the host's cost per call on a small problem instead")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="label of the code in the rows; default: what git says")
    parser.add_argument("--out", type=Path, help="file to append rows to; default benchmarks/results/<device>.jsonl")
    parser.add_argument("--plot", type=Path, help="image file to draw TFLOP/s in")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE", help="show the rows of files; time nothing")


def _show(rows: list[dict], options: argparse.Namespace) -> None:
    baseline = options.baseline or ("fa2" if options.device == "cuda" else "sdpa")
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(report.table(rows, baseline))
    for reason in report.reasons(rows):
        print(reason)
    if options.plot:
        report.plot(rows, options.plot)
        print(f"drew {options.plot}")


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
    rows, jobs = [], jobs_of(options)
    for job, outcome in run_jobs(work, jobs, workers=1, job_seconds=JOB_SECONDS):
        if isinstance(outcome, JobError):
            outcome = {"ms": None, "tflops": None, "error": outcome.message[:500]}
        row = {
            "provider": job.provider,
            "clock": job.clock,
            "pass": job.pass_,
            **dataclasses.asdict(job.case),
            **outcome,
            **made_with,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        report.append(path, row)
        rows.append(row)
        print(f"[{len(rows)}/{len(jobs)}] {report.line(row)}", flush=True)
    _show(rows, options)
    print(f"appended {len(rows)} rows to {path}")
    return 0
