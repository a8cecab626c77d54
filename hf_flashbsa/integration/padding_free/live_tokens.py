"""How many tokens of a batch are live, and where they lie: what padding masks say, read once in a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses import FakeTensor

from hf_flashbsa.integration.padding_free.forward_pass import ForwardPass
from hf_flashbsa.integration.padding_free.packing import Packing
from hf_flashbsa.masks.modes import is_eager

#: Keyword by which the caller of a model tells the numbers of live tokens.
HINT = "num_live_tokens"


def is_padding(mask: object) -> bool:
    """Whether this is a padding mask `(B, S)`."""
    return isinstance(mask, torch.Tensor) and mask.ndim == 2


def measure(forward: ForwardPass, masks: list[torch.Tensor], totals: int | Sequence[int] | None) -> None:
    """Prepares `packing_of` for padding masks that the forward pass has not met yet.

    The host waits once for the device, for the numbers of live tokens. Where `totals` gives them it does not wait:
    the device checks them, and that no dead token lies between live ones.

    Raises:
        ValueError: `totals` are not a number for each mask; the masks hold no values that Python may read.
    """
    if torch._C._get_tracing_state() is not None:
        raise ValueError(
            "padding_free: torch.jit.trace would fix the number of live tokens; trace the model without padding_free."
        )
    if totals is not None:
        totals = tuple(totals) if isinstance(totals, (tuple, list)) else (totals,)
        if len(totals) != len(masks) or not all(isinstance(total, int) for total in totals):
            raise ValueError(f"{HINT}: {totals} for {len(masks)} padding masks; give a Python number for each.")
    new = [i for i, x in enumerate(masks) if id(x) not in forward.packings]
    if not new:
        return
    try:
        packings = _packings([masks[i] for i in new], None if totals is None else [totals[i] for i in new])
    except RuntimeError as error:
        if is_eager() and not masks[0].is_meta:
            raise
        raise ValueError(
            "padding_free: the number of live tokens sizes the packed tensors, and cannot be read from an attention "
            f"mask that is on the meta device, traced or mapped by vmap; pass {HINT}, or, to vmap, run the model "
            "without padding_free."
        ) from error
    for i, packing in zip(new, packings, strict=True):
        forward.packings[id(masks[i])] = (masks[i], packing)


def _packings(masks: list[torch.Tensor], totals: list[int] | None) -> list[Packing | None]:
    live = [x.to(torch.bool) for x in masks]
    counts = [torch.stack([x.sum(), _holes(x)]) for x in live]
    if totals is None:
        counts = torch.cat([count.to(counts[0].device) for count in counts]).view(-1, 2)
        # One wait for the device; what traces gives a symbol for each number read by itself.
        traced = isinstance(counts, FakeTensor)
        known = [(int(total), int(holes)) for total, holes in counts] if traced else counts.tolist()
    else:
        known = [(total, 0) for total in totals]
        for count, (total, _) in zip(counts, known, strict=True):
            torch._assert_async(count[0] == total, f"{HINT} is not the sum of the attention mask")
            torch._assert_async(count[1] == 0, f"{HINT}: the attention mask has dead tokens between live ones")
    return [
        None if total == x.numel() else Packing.of_mask(x, total, holes > 0)
        for x, (total, holes) in zip(live, known, strict=True)
    ]


def packing_of(forward: ForwardPass, mask: object, device: torch.device) -> Packing | None:
    """The `Packing` of a measured padding mask; None where nothing is padded or it is no padding mask."""
    rows = forward.packings[id(mask)][1] if is_padding(mask) else None
    return rows if rows is None or rows.cu_seqlens.device == device else rows.to(device)


def _holes(live: torch.Tensor) -> torch.Tensor:
    """Number of rows whose live tokens form more than one run."""
    runs = (live[:, 1:] & ~live[:, :-1]).sum(-1) + live[:, 0]
    return (runs > 1).sum()
