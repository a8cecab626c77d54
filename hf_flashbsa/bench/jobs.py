"""One measurement of one provider: what is timed, and the measured part of its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_flashbsa.bench.cases import Case, Inputs, make_inputs, reference_error
from hf_flashbsa.bench.measure import Timing, measure, measure_host, measure_wall, peak_bytes
from hf_flashbsa.bench.providers import DENSE_PROVIDERS, PROVIDERS, Runner, Unsupported, enabled

CLOCKS = {"device": measure, "host": measure_host, "wall": measure_wall}


class Job(NamedTuple):
    """One measurement. `clock` is one of `CLOCKS`."""

    provider: str
    case: Case
    pass_: str
    clock: str = "device"

    @property
    def computed(self) -> Case:
        """What the provider is given: the dense problem where it knows no block layouts."""
        return self.case.dense if self.provider in DENSE_PROVIDERS else self.case

    def fields(self) -> dict:
        """What a row of results says of the job. `dense` marks a layout that was left out."""
        named = {"provider": self.provider, "clock": self.clock, "pass": self.pass_, **self.case.fields()}
        return named | ({"dense": True} if self.computed != self.case else {})


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
    """The measured part of a row: ms, p20, p80, tflops, relative_error, peak_bytes; or why there is none."""
    torch.manual_seed(0)
    try:
        with enabled(job.provider):
            inputs = make_inputs(job.computed, device)
            timed = _pass(inputs, PROVIDERS[job.provider](inputs), job.pass_)
            result = timed()
            out, gradients = (result, None) if job.pass_ == "forward" else (None, result)
            error = reference_error(inputs, out, gradients)
            del result, out, gradients
            peak = peak_bytes(timed, device)
            timing = CLOCKS[job.clock](timed, device, repeats)
    except (Unsupported, NotImplementedError) as reason:
        return {"ms": None, "tflops": None, "unsupported": str(reason)}
    except Exception as error:
        if not _usable(device):
            raise
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return {"ms": None, "tflops": None, "error": f"{type(error).__name__}: {error}"[:500]}
    return {**_measured(job, timing, error), "peak_bytes": peak}


def _measured(job: Job, timing: Timing, error: float | None) -> dict:
    tflops = job.computed.flops(job.pass_) / timing.median / 1e9 if job.clock == "device" else None
    rounded = {"ms": timing.median, "p20": timing.p20, "p80": timing.p80}
    rounded = {name: round(value, 5) for name, value in rounded.items()}
    return {**rounded, "tflops": tflops and round(tflops, 3), "relative_error": error and float(f"{error:.3g}")}
