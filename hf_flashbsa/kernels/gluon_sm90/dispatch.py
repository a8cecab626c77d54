"""Kernels for Hopper GPUs (compute capability 9.0) in Gluon, Triton's lower-level language, and which calls use them.

`why_unsupported` lists the reasons to fall back to the portable kernels. `configs/gluon_sm90.json` lists the calls for
which these kernels were faster on an H200 (on an H100 for packed documents by segment ids). Layouts of packed
documents or with dropout are not benchmarked; they are listed because their neighbours are faster.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from importlib import resources

import torch

from hf_flashbsa.kernels import launch_cache, tuning
from hf_flashbsa.kernels.arguments import is_aligned
from hf_flashbsa.kernels.call_plan import NO_TENSORS, CallPlan

logger = logging.getLogger(__name__)

_log_once = functools.cache(logger.info)

#: Tensors that the kernels know; calls with others are left to the portable kernels. A bias or dense mask would exceed
#: the registers of a consumer.
KNOWN_TENSORS = {
    "sinks", "seed", "segment_ids_q", "segment_ids_k", "schedule_q", "schedule_k", "sequences", "block_grid",
    "block_masks", "block_table_q", "block_table_k",
}  # fmt: skip
#: The modules that need Gluon.
_LAUNCH = "hf_flashbsa.kernels.gluon_sm90.launch"
_TRIAL = "hf_flashbsa.kernels.gluon_sm90.trial"


#: Devices on which the kernels are being tried.
_on_trial: set[torch.device] = set()


def unavailable_reason(device: torch.device) -> str | None:
    """Why this release of Triton cannot run the kernels, logged once; None where it can. A release that they were not
    tested with is tried on the device first (trial.py)."""
    return None if device in _on_trial else _unavailable_reason(device)


@functools.cache
def _unavailable_reason(device: torch.device) -> str | None:
    try:
        importlib.import_module(_LAUNCH)
        reason = None if launch_cache.is_known_triton() else _failure_on_trial(device)
    except (ImportError, AttributeError) as error:
        reason = f"this release of Triton lacks what they need ({error})"
    if reason is not None:
        logger.warning("Hopper kernels: %s", reason)
    return reason


def _failure_on_trial(device: torch.device) -> str | None:
    known = " and ".join(launch_cache.KNOWN_TRITON)
    logger.info(
        "Hopper kernels: tested with Triton %s; they are tried with %s", known, launch_cache.triton.__version__
    )
    _on_trial.add(device)
    try:
        failure = importlib.import_module(_TRIAL).failure(device)
    finally:
        _on_trial.remove(device)
    return None if failure is None else f"they failed a trial with Triton {launch_cache.triton.__version__}: {failure}"


@functools.cache
def _entries(kernel: str) -> list[dict]:
    file = resources.files("hf_flashbsa.kernels").joinpath("configs", "gluon_sm90.json")
    return json.loads(file.read_text())[kernel]


def _options(kernel: str, q: torch.Tensor, k: torch.Tensor, plan: CallPlan) -> dict | None:
    """Launch options of the first entry that fits the call, or None.

    An entry fits calls of its head dim with at least `min_seqlen` queries and keys, at least `min_q_per_k` queries per
    key and windows of at least `min_window` keys; where it says so, with or without a tile schedule (`varlen`),
    segment ids, a block layout, causality, dropout.
    """
    len_q, len_k, window = q.shape[2], k.shape[2], plan.scalars.window
    call = {
        "head_dim": q.shape[-1],
        "varlen": (plan.tensors.schedule_q if kernel in ("forward", "dq") else plan.tensors.schedule_k) is not None,
        "layout": plan.tensors.block_grid is not None,
        "causal": plan.scalars.window_right is not None,
        "segments": plan.tensors.segment_ids_k is not None,
        "dropout": plan.scalars.drop_threshold is not None,
    }
    for entry in _entries(kernel):
        matches = all(entry.get(name, value) == value for name, value in call.items())
        wide_enough = window is None or window >= entry.get("min_window", 0)
        long_enough = min(len_q, len_k) >= entry["min_seqlen"] and len_q >= entry.get("min_q_per_k", 0.0) * len_k
        if matches and wide_enough and long_enough:
            return entry["options"]
    return None


def why_unsupported(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: tuple, plan: CallPlan
) -> str | None:
    """Why `kernel` ("forward", "dq", "dkdv", or "fused_backward" for dK/dV with accumulated dQ) cannot take a call;
    None where it can.

    Args:
        others: further tensors that the kernel loads by TMA, beside q, k and v.
    """
    if not tuning.is_hopper(q.device):
        return "not a Hopper GPU"
    replaced = ("dq", "dkdv") if kernel == "fused_backward" else (kernel,)
    if any(name in replaced for name, _ in tuning.overrides()):
        return "a configuration of the portable kernel is set"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    if q.shape[-1] != v.shape[-1]:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}"
    if plan.tensors is not NO_TENSORS:
        for name, x in plan.tensors._asdict().items():
            if x is not None and name not in KNOWN_TENSORS:
                return name
    if plan.tensors.segment_ids_k is not None and plan.tensors.schedule_q is None:
        return "segment ids without a tile schedule"
    if plan.scalars.softcap is not None:
        return "softcap"
    if plan.tensors.block_grid is not None and plan.scalars.block_size % 128:
        return f"block layouts, blocks of {plan.scalars.block_size}"
    if (
        plan.tensors.block_grid is not None
        and "dkdv" in replaced
        and plan.tensors.block_table_k.shape[1] > 1
        and q.shape[1] != k.shape[1]
    ):
        return "block layouts of their own for query heads that share keys"
    if 0 in (q.numel(), k.numel()):
        return "no tokens"
    if _options(kernel, q, k, plan) is None:
        return "a shape or options that configs/gluon_sm90.json does not list"
    for x in (q, k, v, *others):
        # TMA needs 16-byte alignment and positive strides.
        if not is_aligned(x) or any(n > 1 and s <= 0 for n, s in zip(x.shape, x.stride(), strict=True)):
            return "rows that do not begin at multiples of 16 bytes, or expanded tensors"
    return unavailable_reason(q.device)


def new_tile_counters(
    schedule: torch.Tensor | None, kernels: int, device: torch.device
) -> torch.Tensor | tuple[None, ...]:
    """A zeroed tile counter (tile_scheduler.py) for each of `kernels`; None each without a tile schedule or on other
    GPUs.
    """
    if schedule is None or not tuning.is_hopper(device):
        return (None,) * kernels
    return torch.zeros(kernels, 4, dtype=torch.int32, device=device)  # 16 bytes apart


def select_launcher(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    others: tuple,
    tile_counter: torch.Tensor | None,
    plan: CallPlan,
):
    """The launch function of `kernel`, called as the portable ones; None where `why_unsupported` has a reason."""
    reason = why_unsupported(kernel, q, k, v, others, plan)
    if reason is not None:
        if tuning.is_hopper(q.device):
            takers = (
                f"the portable {kernel} kernel takes" if kernel != "fused_backward" else "those of dq and dkdv take"
            )
            _log_once("Hopper kernels: %s calls with %s", takers, reason)
        return None
    options = _options(kernel, q, k, plan)
    return functools.partial(getattr(importlib.import_module(_LAUNCH), f"launch_{kernel}"), options, tile_counter)
