"""Launches from the cache give kernels what Triton itself would give, in random calls.

`python tests/kernels/test_launch_random.py` makes them, in a process of its own: here Triton may be the interpreter.
"""

from __future__ import annotations

import json
import os
import random
from unittest import mock

import torch
from aot import run_compiling
from noted_launches import Compiled

from hf_flashbsa import BlockLayout, attention
from hf_flashbsa.kernels import launch_cache, tuning
from hf_flashbsa.kernels.launch_cache import MAX_LAUNCHES, Recorder, launch_cached
from hf_flashbsa.kernels.triton import backend

#: Few enough for all their plans to be kept.
PROBLEMS = 120


def random_problem(r: random.Random) -> dict:
    """Arguments of `attention` whose sizes, strides and alignments hit and miss what Triton specialises on."""
    dtype = r.choice([torch.bfloat16, torch.float32])
    batch, heads_k, dim = r.choice([1, 2]), r.choice([1, 2]), r.choice([16, 64, 65])
    heads, len_q, len_k = heads_k * r.choice([1, 2]), r.choice([1, 16, 33]), r.choice([1, 16, 33])

    def operand(heads: int, length: int) -> torch.Tensor:
        offset, room = r.choice([0, 0, 1, 8]), r.choice([dim, dim, dim + 1, dim + 16])
        shape = (batch, length, heads, room) if r.random() < 0.5 else (batch, heads, length, room)
        x = torch.zeros(offset + torch.Size(shape).numel(), dtype=dtype)[offset:].view(shape)[..., :dim]
        return x.transpose(1, 2) if shape[1] == length else x

    q, k, v = operand(heads, len_q), operand(heads_k, len_k), operand(heads_k, len_k)
    kinds = ("none causal window lengths padding mask bias sinks dropout layout alibi").split()
    options = {
        "none": lambda: {},
        "causal": lambda: {"causal": True, "softmax_scale": r.choice([0.0, 0.5])},
        "window": lambda: {"window_size": (r.choice([1, 16, 33]), None), "softcap": r.choice([None, 20.0])},
        "lengths": lambda: {"seqlens_k": torch.full((batch,), len_k)},
        "padding": lambda: {"mask": torch.ones(batch, 1, 1, len_k, dtype=torch.bool)},
        "mask": lambda: {"mask": torch.ones(r.choice([1, batch]), 1, len_q, len_k, dtype=torch.bool)},
        "bias": lambda: {"bias": torch.zeros(1, heads, len_q, len_k)},
        "sinks": lambda: {"sinks": torch.zeros(heads)},
        "dropout": lambda: {"dropout_p": r.choice([0.1, 0.5]), "causal": True},
        "alibi": lambda: {"alibi_slopes": torch.zeros(r.choice([(heads,), (batch, heads)])), "causal": True},
        "layout": lambda: {"layout": BlockLayout.from_mask(torch.eye(len_q, len_k) > 0, block_size=32)},
    }[r.choice(kinds)]()
    return {"q": q, "k": k, "v": v, **options}


def main() -> None:
    """Makes random calls twice and prints how many came from the cache, and what differed from Triton's own."""
    from aot import _Driver
    from triton.runtime import JITFunction
    from triton.runtime import driver as triton_driver

    compiled, launches, wrong, asked = {}, [], [], 0
    run_of_triton = JITFunction.run

    def run(self, *arguments, **options):
        nonlocal asked
        asked += 1
        return run_of_triton(self, *arguments, **options)

    def do_compile(self, key, *_):
        name = f"{self.__name__} {key}"
        return compiled.setdefault(name, Compiled(name, launches))

    def launched(function, *arguments) -> list[str]:
        launches.clear()
        function(*arguments)
        return [repr(x) for x in launches]

    def cached(body, inputs, outputs, scalars) -> None:
        recorder = launch_cached(body, inputs, outputs, scalars)
        if recorder is not None:
            recorded(recorder, body, scalars)

    def recorded(recorder, body, scalars) -> None:
        with recorder:
            body(recorder, scalars)

    def compared(kind, inputs, outputs, scalars) -> None:
        nonlocal asked
        body = {"forward": backend._launch_forward, "backward": backend._launch_backward}[kind]
        before = asked
        got = launched(cached, body, inputs, outputs, scalars)
        after = asked
        want = launched(recorded, Recorder(inputs, outputs), body, scalars)
        asked = after
        again = launched(cached, body, inputs, outputs, scalars)
        if not want == got == again or asked != after:
            wrong.append({"want": want, "got": got, "again": again, "asked": [before, after, asked]})

    triton_driver.set_active(_Driver(90))
    problems, asked_in_pass = [], []
    with (
        mock.patch.multiple(JITFunction, run=run, _do_compile=do_compile),
        mock.patch.object(backend, "launch_cached", compared),
        mock.patch.object(tuning, "architecture", lambda device: "sm_90"),
        mock.patch.object(torch.Tensor, "get_device", lambda self: triton_driver.active.get_current_device()),
        mock.patch.dict(os.environ, TRITON_INTERPRET="1"),  # `attention` then takes tensors on the CPU
    ):
        for _ in range(2):
            before = asked
            for seed in range(PROBLEMS):
                problem = random_problem(random.Random(seed))
                problems.append(problem)  # alive, so that addresses differ in the second pass
                leaves = [problem[name].requires_grad_() for name in "qkv"]
                for bias_learns in (False, True)[: 1 + ("bias" in problem)]:
                    if bias_learns:
                        leaves.append(problem["bias"].requires_grad_())
                    out, lse = attention(**problem, backend="triton", return_lse=True)
                    torch.autograd.grad(out.sum() + (lse.sum() if seed % 2 else 0.0), leaves)
            asked_in_pass.append(asked - before)
    plans = launch_cache._launches_of.cache_info().currsize
    print(json.dumps({"wrong": wrong, "asked": asked_in_pass, "plans": plans, "kernels": len(compiled)}))


def test_plans_launch_what_triton_would():
    (result,) = run_compiling(__file__)
    assert result["wrong"] == []
    assert PROBLEMS < result["plans"] <= MAX_LAUNCHES
    first, second = result["asked"]
    assert first > second == 0


if __name__ == "__main__":
    main()
