"""Judges random cases on a GPU, spread over worker processes, then repeats some of them and compares bits.

    PYTHONPATH=. python tests/tools/run_cases.py --cases 500 --workers 16 --out cases.jsonl

Triton's compiler takes most of the time, since nearly every case is a variant of its own. Uninitialised memory holds
NaN throughout. Rows are written as they come; the summary comes last. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import cases
import torch
from hopper_calls import every_call_on_hopper

from hf_flashbsa import use_deterministic
from hf_flashbsa.bench.workers import JobError, run_jobs

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Masks that the Hopper kernels know.
HOPPER_MASKS = ("none", "cu_seqlens", "seqlens", "key_padding", "segments", "starts")
#: Programs that share the tiles of a forward call on the Hopper kernels: one has several, or each has one.
PROGRAMS = (1, 2, 6, 132)
DIMS = (8, 16, 32, 40, 59, 64, 80, 96, 100, 111, 128, 160, 192, 256)
#: Cases whose outputs are compared bit by bit over many runs.
REPEATED_CASES = 12


class Job(NamedTuple):
    """`kind` is "case" (judge against the oracle) or "repeat" (compare runs bit by bit)."""

    kind: str
    seed: int


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, torch's uninitialised floating-point tensors hold NaN, so that an element never written shows."""

    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    makers = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    with contextlib.ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, poison(getattr(owner, name))))
        yield


def case_of(seed: int, options: argparse.Namespace) -> cases.Case:
    dtypes = tuple(DTYPES[name] for name in options.dtypes)
    if not options.hopper:
        return cases.random_case(seed, dtypes=dtypes, max_len=options.max_len, dims=DIMS)
    dtypes = tuple(dtype for dtype in dtypes if dtype != torch.float32)
    case = cases.random_case(seed, dtypes=dtypes, max_len=options.max_len, dims=(64, 128))
    # What keeps a call from the Hopper kernels, or makes ever more variants to compile.
    return dataclasses.replace(
        case,
        dim_v=case.dim,
        masking=HOPPER_MASKS[seed % len(HOPPER_MASKS)],
        bias=None,
        softcap=None,
        alibi=None,
        sinks=case.sinks and seed % 4 == 0,
        strides="bhsd" if case.strides == "sliced" else case.strides,
        blocks=case.blocks and 128,
    )


def sent_to_hopper(seed: int) -> contextlib.AbstractContextManager[Counter]:
    """Within, the Hopper kernels get the case of a seed, if they can take it. Counts launches."""
    return every_call_on_hopper(PROGRAMS[seed % len(PROGRAMS)], choice=seed // len(PROGRAMS))


def with_integers(make_problem):
    """`make_problem` with values rounded to integers, whose products are exact: no rounding hides a wrong term."""

    def make(case: cases.Case, device: torch.device | str) -> cases.Problem:
        problem = make_problem(case, device)
        with torch.no_grad():
            for x in (problem.q, problem.k, problem.v, problem.dout):
                x.round_()
        return problem

    return make


def repeat(case: cases.Case, options: argparse.Namespace) -> list[str]:
    """Names of the results that did not come out bitwise equal in every run."""
    problem = cases.make_problem(case, options.device)
    first = cases.run(problem, case, options.backend)
    differing = set()
    for _ in range(options.repeats - 1):
        again = cases.run(problem, case, options.backend)
        differing |= {name for name, value in first.items() if not torch.equal(value, again[name])}
    return sorted(differing)


def run_job(job: Job, options: argparse.Namespace) -> dict:
    """The outcome of one job, in a worker process."""
    torch.set_num_threads(1)
    use_deterministic(not options.unordered)
    case = case_of(job.seed, options)
    make = with_integers(cases.make_problem) if options.integers else cases.make_problem
    begin = time.perf_counter()
    forced = sent_to_hopper(job.seed) if options.hopper else contextlib.nullcontext({})
    with poisoned_memory(), mock.patch.object(cases, "make_problem", make), forced as launched:
        if job.kind == "case":
            ratios = cases.worst_ratio(case, options.device, options.backend)
            outcome = {"ok": all(ratio <= 1.0 for ratio in ratios.values()), "ratios": ratios}
        else:
            differing = repeat(case, options)
            outcome = {"ok": not differing, "differing": differing}
    on_hopper = sorted({kernel for (kernel, taken), _ in launched.items() if taken})
    return {**outcome, "hopper": on_hopper, "seconds": round(time.perf_counter() - begin, 3)}


def rows_of(jobs: list[Job], options: argparse.Namespace) -> Iterator[dict]:
    """Runs the jobs in worker processes; one row for each that came to an end, well or not."""
    work = functools.partial(run_job, options=options)
    for job, outcome in run_jobs(work, jobs, workers=options.workers, seconds=options.seconds):
        if isinstance(outcome, JobError):
            outcome = {"ok": False, "error": outcome.message, "traceback": outcome.traceback}
        fields = dataclasses.asdict(case_of(job.seed, options))
        fields["dtype"] = str(fields["dtype"]).removeprefix("torch.")
        yield {"kind": job.kind, **fields, **outcome}


def summarise(rows: list[dict], jobs: list[Job], options: argparse.Namespace) -> int:
    """Prints the summary; the number of failures."""
    judged = [row for row in rows if row["kind"] == "case"]
    repeated = [row for row in rows if row["kind"] == "repeat"]
    failed = [row for row in rows if not row["ok"]]
    for row in failed[:20]:
        print(f"FAILED {row['kind']} {case_of(row['seed'], options)}")
        bad = {name: round(ratio, 2) for name, ratio in row.get("ratios", {}).items() if not ratio <= 1.0}
        print(f"    {row.get('error') or row.get('differing') or bad}")
    if len(failed) > 20:
        print(f"... and {len(failed) - 20} more failures")
    worst: dict[str, tuple[float, int]] = {}
    for row in judged:
        for name, ratio in row.get("ratios", {}).items():
            worst[name] = max(worst.get(name, (0.0, row["seed"])), (ratio, row["seed"]))
    taken = Counter(kernel for row in judged for kernel in row.get("hopper", ()))
    if taken:
        print("on Hopper kernels: " + ", ".join(f"{kernel} {count}" for kernel, count in sorted(taken.items())))
    print("worst ratio (seed): " + ", ".join(f"{name} {ratio:.3f} ({seed})" for name, (ratio, seed) in worst.items()))
    print(
        f"{options.repeats} repeats bitwise equal in {sum(row['ok'] for row in repeated)} of {len(repeated)} cases; "
        f"{sum(row['ok'] for row in judged)} of {len(judged)} cases passed; {len(failed)} failures"
    )
    if len(rows) < len(jobs):
        print(f"time was up after {options.seconds:.0f} s: {len(jobs) - len(rows)} of {len(jobs)} jobs did not run")
    return len(failed)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed0", type=int, default=0, help="seed of the first case; the others follow")
    parser.add_argument("--repeats", type=int, default=100, help="runs of each repeated case; 0 for no repeat check")
    parser.add_argument("--unordered", action="store_true", help="let the order of sums vary; wants --repeats 0")
    parser.add_argument("--integers", action="store_true", help="round q, k, v and the output gradient to integers")
    parser.add_argument(
        "--hopper", action="store_true", help="cases for the Hopper kernels, which are made to take them"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--max-len", type=int, default=1024)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=540.0, help="stop after this long, finished or not")
    parser.add_argument("--out", required=True, help="JSON Lines file to write")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    seeds = range(options.seed0, options.seed0 + options.cases)
    step = max(1, options.cases // REPEATED_CASES)
    repeated = seeds[::step][:REPEATED_CASES] if options.repeats > 1 else []
    jobs = [Job("repeat", seed) for seed in repeated] + [Job("case", seed) for seed in seeds]
    begin, rows = time.monotonic(), []
    with open(options.out, "w") as file:
        for row in rows_of(jobs, options):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            if len(rows) % 50 == 0:
                failures = sum(not row["ok"] for row in rows)
                print(f"{len(rows)}/{len(jobs)} in {time.monotonic() - begin:.0f} s, {failures} failures", flush=True)
    return 1 if summarise(rows, jobs, options) or len(rows) < len(jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
