"""Judges random cases on a GPU, spread over worker processes, then repeats some of them and compares bits.

    PYTHONPATH=. python tests/run_cases.py --cases 500 --workers 16 --out cases.jsonl

Triton's compiler takes most of the time, since nearly every case is a variant of its own. Uninitialised memory holds
NaN throughout. Rows are written as they come; the summary comes last. Exit code 1 if anything failed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import NamedTuple
from unittest import mock

import cases
import torch

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIMS = (8, 16, 32, 40, 59, 64, 80, 96, 100, 111, 128, 160, 192, 256)
#: Cases whose outputs are compared bit by bit over many runs.
REPEATED_CASES = 12
#: Longest that one job may take before its worker is taken for hung, seconds.
JOB_SECONDS = 180


class Job(NamedTuple):
    """`kind` is "case" (judge against the oracle) or "repeat" (compare runs bit by bit)."""

    kind: str
    seed: int


@dataclasses.dataclass
class Worker:
    """A process that takes jobs from `pipe`, one at a time, and the job it is at."""

    process: multiprocessing.Process
    pipe: Connection
    job: Job | None = None
    started: float = 0.0


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
    return cases.random_case(seed, dtypes=dtypes, max_len=options.max_len, dims=DIMS)


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
    """The row of one job. Errors become part of it; "dead" tells that the process can run no further job."""
    case = case_of(job.seed, options)
    row = {"kind": job.kind, **dataclasses.asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}
    begin = time.perf_counter()
    try:
        if job.kind == "case":
            row["ratios"] = cases.worst_ratio(case, options.device, options.backend)
            row["ok"] = all(ratio <= 1.0 for ratio in row["ratios"].values())
        else:
            row["differing"] = repeat(case, options)
            row["ok"] = not row["differing"]
    except Exception as error:
        row |= {"ok": False, "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        row["dead"] = not usable(options.device)
    row["seconds"] = round(time.perf_counter() - begin, 3)
    return row


def usable(device: str) -> bool:
    """Whether the device still answers: an illegal access by a kernel leaves a process without its GPU."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def work(pipe: Connection, options: argparse.Namespace) -> None:
    """What a worker process does: takes jobs and sends rows until it is told None."""
    torch.set_num_threads(1)
    if options.integers:
        cases.make_problem = with_integers(cases.make_problem)
    with poisoned_memory():
        while (job := pipe.recv()) is not None:
            row = run_job(job, options)
            pipe.send(row)
            if row.get("dead"):
                return


def start_worker(options: argparse.Namespace) -> Worker:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, options), daemon=True)
    process.start()
    there.close()
    return Worker(process, here)


def rows_of(jobs: list[Job], options: argparse.Namespace) -> Iterator[dict]:
    """Runs the jobs in worker processes and yields their rows until all are done or the time is up.

    A worker that dies or hangs costs its own job a failure; another takes its place.
    """
    deadline = time.monotonic() + options.seconds
    waiting = jobs[::-1]
    workers = [start_worker(options) for _ in range(min(options.workers, len(jobs)))]
    try:
        while (waiting or any(worker.job for worker in workers)) and time.monotonic() < deadline:
            for worker in workers:
                if worker.job is None and waiting:
                    worker.job, worker.started = waiting.pop(), time.monotonic()
                    with contextlib.suppress(OSError):  # It died meanwhile: receiving will tell.
                        worker.pipe.send(worker.job)
            busy = {worker.pipe: worker for worker in workers if worker.job is not None}
            for pipe in wait(list(busy), timeout=0.2):
                worker = busy[pipe]
                try:
                    row = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    row = failure(worker.job, options, f"the worker died with exit code {worker.process.exitcode}")
                worker.job = None
                if row.pop("dead", False) or not worker.process.is_alive():
                    workers[workers.index(worker)] = start_worker(options)
                yield row
            for index, worker in enumerate(workers):
                if worker.job is not None and time.monotonic() - worker.started > JOB_SECONDS:
                    worker.process.kill()
                    workers[index] = start_worker(options)
                    yield failure(worker.job, options, f"no answer within {JOB_SECONDS} s")
    finally:
        for worker in workers:
            worker.process.kill()


def failure(job: Job, options: argparse.Namespace, error: str) -> dict:
    case = case_of(job.seed, options)
    fields = dataclasses.asdict(case) | {"dtype": str(case.dtype).removeprefix("torch.")}
    return {"kind": job.kind, **fields, "ok": False, "error": error}


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
    parser.add_argument("--integers", action="store_true", help="round q, k, v and the output gradient to integers")
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
