"""Kernels for Hopper GPUs (compute capability 9.0) in Gluon, the layer under Triton's language.

One warp finds out which tiles there are, one loads them by TMA, and two warpgroups compute. They take the calls that
`configs/hopper.json` lists and leave the rest to the portable kernels: `refusal` says why. The list is of calls that
they were faster on, timed beside the portable ones on an H200, or on an H100 for documents that segment ids tell
apart; layouts of packed documents or with dropout are taken because others are, untimed.
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
from importlib import resources

import torch

from hf_flashbsa.kernels import launch, tuning
from hf_flashbsa.kernels.arguments import is_aligned
from hf_flashbsa.kernels.state import Extras, Params

logger = logging.getLogger(__name__)

_log_once = functools.cache(logger.info)

#: The module that needs Gluon.
_LAUNCHERS = "hf_flashbsa.kernels.hopper.launchers"


@functools.cache
def unavailable() -> str | None:
    """Why this release of Triton cannot have the kernels, which is logged once; None where it can."""
    reason = None
    if not launch.is_known_triton():
        reason = f"tested with Triton {' and '.join(launch.KNOWN_TRITON)} only"
    else:
        try:
            importlib.import_module(_LAUNCHERS)
        except (ImportError, AttributeError) as error:
            reason = f"this release of Triton lacks what they need ({error})"
    if reason is not None:
        logger.warning("Hopper kernels: %s", reason)
    return reason


@functools.cache
def _entries(kernel: str) -> list[dict]:
    return json.loads(resources.files("hf_flashbsa.kernels").joinpath("configs", "hopper.json").read_text())[kernel]


def _options(kernel: str, q: torch.Tensor, k: torch.Tensor, extras: Extras, params: Params) -> dict | None:
    """The launch options that are listed for such a call; None where it is not.

    An entry lists calls of one head dim, with rows of queries and keys of at least `shortest`, at least `queries`
    queries for each key, and windows of at least `narrowest` keys. Where it says so, calls must have a work table
    (`ragged`) or none, segments or none, a block layout or none, keys ahead of a query hidden (`causal`) or not,
    dropout or not.
    """
    len_q, len_k, window = q.shape[2], k.shape[2], params.window
    call = {
        "head_dim": q.shape[-1],
        "ragged": (extras.work_q if kernel in ("forward", "dq") else extras.work_k) is not None,
        "layout": extras.grid is not None,
        "causal": params.window_right >= 0,
        "segments": extras.segment_ids_k is not None,
        "dropout": params.drop_threshold > 0,
    }
    for entry in _entries(kernel):
        alike = all(entry.get(name, value) == value for name, value in call.items())
        wide = window is None or window >= entry.get("narrowest", 0)
        long = min(len_q, len_k) >= entry["shortest"] and len_q >= entry.get("queries", 0.0) * len_k
        if alike and wide and long:
            return entry["options"]
    return None


def refusal(
    kernel: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, others: tuple, extras: Extras, params: Params
) -> str | None:
    """Why `kernel` ("forward", "dq", "dkdv", or "sums" for the backward pass of sums.py) leaves a call to others; None
    where it does not.

    Args:
        others: further tensors that the kernel loads as it does q, k and v.
    """
    if not tuning.is_hopper(q.device):
        return "not a Hopper GPU"
    replaced = ("dq", "dkdv") if kernel == "sums" else (kernel,)
    if any(name in replaced for name, _ in tuning.overrides()):
        return "a configuration of the portable kernel is set"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {q.dtype}"
    if q.shape[-1] != v.shape[-1]:
        return f"head dims {q.shape[-1]} and {v.shape[-1]}"
    for name in ("bias", "mask"):  # more registers than consumers have
        if getattr(extras, name) is not None:
            return name
    if params.softcap > 0.0:
        return "softcap"
    if extras.grid is not None and params.block_size % 128:
        return f"block layouts, blocks of {params.block_size}"
    if extras.grid is not None and "dkdv" in replaced and extras.blocks_k.shape[1] > 1 and q.shape[1] != k.shape[1]:
        return "block layouts of their own for query heads that share keys"
    if 0 in (q.numel(), k.numel()):
        return "no tokens"
    if _options(kernel, q, k, extras, params) is None:
        return "what configs/hopper.json does not list"
    for x in (q, k, v, *others):
        # What TMA can address.
        if not is_aligned(x) or any(n > 1 and s <= 0 for n, s in zip(x.shape, x.stride(), strict=True)):
            return "rows that do not begin at multiples of 16 bytes, or expanded tensors"
    return unavailable()


def new_claims(extras: Extras, kernels: int, device: torch.device) -> torch.Tensor | tuple[None, ...]:
    """Counters from which the programs of each of `kernels` claim the tiles of a work table (turns.py); None each
    without one, or where the GPU has other kernels.
    """
    if extras.work_q is None or not tuning.is_hopper(device):
        return (None,) * kernels
    return torch.zeros(kernels, 4, dtype=torch.int32, device=device)  # 16 bytes apart


def launcher_of(
    kernel: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    others: tuple,
    claims: torch.Tensor | None,
    extras: Extras,
    params: Params,
):
    """What launches `kernel` here, called as the portable launchers are; None where `refusal` has a reason."""
    reason = refusal(kernel, q, k, v, others, extras, params)
    if reason is not None:
        if tuning.is_hopper(q.device):
            takers = f"the portable {kernel} kernel takes" if kernel != "sums" else "those of dq and dkdv take"
            _log_once("Hopper kernels: %s calls with %s", takers, reason)
        return None
    options = _options(kernel, q, k, extras, params)
    return functools.partial(getattr(importlib.import_module(_LAUNCHERS), f"launch_{kernel}"), options, claims)
