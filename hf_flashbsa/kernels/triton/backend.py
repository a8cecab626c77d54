"""The Triton back end: outputs and scratch memory of a call, and which kernels fill them."""

from __future__ import annotations

import torch

from hf_flashbsa.kernels.call_plan import CallPlan, CallScalars, CallTensors, given, sinks_gradient
from hf_flashbsa.kernels.gluon_sm90 import dispatch
from hf_flashbsa.kernels.launch_cache import Recorder, launch_cached
from hf_flashbsa.kernels.triton.launch import launch_dbias, launch_dkdv, launch_dq, launch_forward


def forward(q, k, v, out, lse, plan: CallPlan) -> None:
    """Fills `out` and `lse`, as `ops.autograd` makes them for `q` and `v`."""
    if q.numel() == 0:
        return
    counters = dispatch.new_tile_counters(plan.tensors.schedule_q, 1, q.device)
    outputs = (out, lse, *counters, *_new_parts(q, v, plan.scalars.num_splits))
    recorder = launch_cached("forward", (q, k, v, *given(plan.tensors)), outputs, plan.scalars)
    if recorder is not None:
        with recorder:
            _launch_forward(recorder, plan.scalars)


def _new_parts(q: torch.Tensor, v: torch.Tensor, num_splits: int) -> tuple[torch.Tensor, ...]:
    """Scratch memory of `launch_forward`; none where keys are not split."""
    if num_splits == 1:
        return ()
    batch, heads, len_q, _ = q.shape
    rows = num_splits * batch, heads, len_q
    return q.new_empty(*rows, v.shape[-1], dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)


def _launch_forward(launch: Recorder, scalars: CallScalars) -> None:
    (q, k, v, *tensors), (out, lse, tile_counter, *parts) = launch.inputs, launch.outputs
    plan = CallPlan(CallTensors(*tensors), scalars)
    if parts:
        launch.ran = "triton"
        launch_forward(launch, q, k, v, out, lse, plan, tuple(parts))
        return
    on_hopper = dispatch.select_launcher("forward", q, k, v, (), tile_counter, plan)
    launch.ran = "gluon_sm90" if on_hopper else "triton"
    (on_hopper or launch_forward)(launch, q, k, v, out, lse, plan)


def backward(dout, dlse, q, k, v, out, lse, gradients, plan: CallPlan) -> None:
    """Fills `gradients`: dq, dk, dv, dbias, dsinks, as `ops.autograd` makes them for the other arguments, or None."""
    dq, dk, dv, dbias, dsinks = gradients
    stats_stride = lse.numel()
    # log-sum-exp and delta of each query, and two words of dropout.
    stats = lse.new_empty_strided((2 if plan.scalars.drop_threshold is None else 4, stats_stride), (stats_stride, 1))
    dlse = None if dlse is None else dlse.contiguous()
    counters = dispatch.new_tile_counters(plan.tensors.schedule_q, 2, q.device)
    dq_accum = None
    if not plan.scalars.deterministic and dispatch.select_launcher("fused_backward", q, k, v, (dout, out), None, plan):
        dq_accum = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    inputs = (dout, dlse, q, k, v, out, lse, *given(plan.tensors))
    filled = (stats, dq_accum, dq, dk, dv, None if dbias is None or dbias.numel() == 0 else dbias, *counters)
    recorder = launch_cached("backward", inputs, filled, plan.scalars)
    if recorder is not None:
        with recorder:
            _launch_backward(recorder, plan.scalars)
    if plan.tensors.sinks is not None:
        dsinks.copy_(sinks_gradient(plan.tensors.sinks, lse, stats[1].view_as(lse)))


def _launch_backward(launch: Recorder, scalars: CallScalars) -> None:
    dout, dlse, q, k, v, out, lse, *tensors = launch.inputs
    stats, dq_accum, dq, dk, dv, dbias, tile_counter_dq, tile_counter_dkdv = launch.outputs
    plan = CallPlan(CallTensors(*tensors), scalars)
    stats_stride = lse.numel()
    if dq_accum is not None:
        run = dispatch.select_launcher("fused_backward", q, k, v, (dout, out), tile_counter_dkdv, plan)
        run(launch, dout, dq, dk, dv, q, k, v, out, lse, dlse, stats, stats_stride, dq_accum, plan)
        return
    if q.numel() > 0:  # before the others, which read what it makes of each query
        run = dispatch.select_launcher("dq", q, k, v, (dout, out), tile_counter_dq, plan) or launch_dq
        run(launch, dout, dq, q, k, v, out, lse, dlse, stats, stats_stride, plan)
    if k.numel() > 0:
        run = dispatch.select_launcher("dkdv", q, k, v, (dout,), tile_counter_dkdv, plan) or launch_dkdv
        run(launch, dout, dk, dv, q, k, v, stats, stats_stride, plan)
    if dbias is not None:
        launch_dbias(launch, dout, dbias, q, k, v, stats, stats_stride, plan)
