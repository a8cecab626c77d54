"""Compiles for a Hopper GPU that need not be there: time on one is then not spent on Triton's compiler.

    TRITON_CACHE_DIR=/tmp/triton PYTHONPATH=. python tests/tools/prewarm.py --preset hopper --gpu-tests --cases 200

What is left there is the launcher in C that Triton builds for each signature. The cache must lie under the same path,
beside the same source of the kernels and the same wheel of Triton, of which each release of Python has its own: its
files are part of every key (`triton.runtime.cache.triton_key` tells whether two machines agree).
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from unittest import mock

import aot
import cases
import hopper_specs
import run_cases
import torch
from hopper_calls import every_call_on_hopper

from hf_flashbsa import attention, use_deterministic
from hf_flashbsa.bench import presets
from hf_flashbsa.bench.cases import Case, make_inputs
from hf_flashbsa.kernels import tuning

CPU = torch.device("cpu")
#: What runs something whose launches are to be compiled, and its name.
Work = tuple[str, Callable[[], object]]
attend = functools.partial(attention, backend="triton")


def _bench(case: Case, deterministic: bool) -> None:
    inputs = make_inputs(case, CPU)
    options = {"bias": inputs.bias, "dropout_p": case.dropout_p, "deterministic": deterministic}
    out = attend(inputs.q, inputs.k, inputs.v, inputs.spec, **options)
    torch.autograd.grad(out, inputs.leaves, inputs.dout)


def _gpu_test(launches: tuple[int, int], name: str, head_dim: int, deterministic: bool = True) -> None:
    *tensors, dout = hopper_specs.tensors_for(name, head_dim)
    run = functools.partial(attend, deterministic=deterministic)
    with every_call_on_hopper(*launches):
        hopper_specs.results(run, tensors, dout, hopper_specs.SPECS[name]())


def _case(seed: int, options: argparse.Namespace) -> None:
    use_deterministic(not options.unordered)
    case = run_cases.case_of(seed, options)
    with run_cases.sent_to_hopper(seed):
        cases.run(cases.make_problem(case, CPU), case, "triton")


def works(options: argparse.Namespace) -> Iterator[Work]:
    """What the options name."""
    for preset in options.preset:
        jobs = presets.jobs(presets.PRESETS[preset]())
        for deterministic, provider in ((True, presets.OURS), (False, presets.UNORDERED)):
            for case in dict.fromkeys(job.case for job in jobs if job.provider == provider):
                yield f"{preset} {case}, {provider}", functools.partial(_bench, case, deterministic)
    if options.gpu_tests:
        for launches in hopper_specs.LAUNCHES:
            for name in hopper_specs.SPECS:
                for head_dim in (64, 128):
                    yield f"{name} {head_dim} {launches}", functools.partial(_gpu_test, launches, name, head_dim)
        for name in hopper_specs.SPECS:
            yield f"{name}, fused backward", functools.partial(_gpu_test, (132, 0), name, 64, deterministic=False)
    random_cases = run_cases.parse(["--hopper", "--out", "-", *(["--unordered"] if options.unordered else [])])
    for seed in range(options.seed0, options.seed0 + options.cases):
        yield f"case {seed}", functools.partial(_case, seed, random_cases)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", nargs="+", choices=presets.PRESETS, default=[], help="cells of the benchmark")
    parser.add_argument("--gpu-tests", action="store_true", help="tests/kernels/test_hopper_gpu.py")
    parser.add_argument("--cases", type=int, default=0, help="so many of tests/tools/run_cases.py --hopper")
    parser.add_argument("--unordered", action="store_true", help="compile the cases for sums whose order may vary")
    parser.add_argument("--seed0", type=int, default=0, help="seed of the first case")
    parser.add_argument("--share", default="0/1", help="i/n: this process does every n-th from the i-th on")
    options = parser.parse_args(arguments)
    first, step = map(int, options.share.split("/"))
    begin, launches = time.monotonic(), 0
    with (
        mock.patch.object(tuning, "architecture", lambda device: "sm_90"),
        mock.patch.object(tuning, "is_hopper", lambda device: True),
        mock.patch.object(hopper_specs, "DEVICE", CPU),
    ):
        for i, (name, work) in enumerate(works(options)):
            if i % step != first:
                continue
            with aot.compile_only(90) as kernels:
                work()
            launches += len(kernels)
            print(f"{time.monotonic() - begin:.0f} s, {launches} launches: {name}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
