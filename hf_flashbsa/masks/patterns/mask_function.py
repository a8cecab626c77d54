"""Layouts of mask functions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hf_flashbsa.masks.block_layout import FULL, PARTIAL, BlockLayout, distinct_masks
from hf_flashbsa.masks.patterns._builders import block_indices


def from_mask_function(
    visible: Callable,
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    batch: int = 1,
    num_heads: int = 1,
    device: torch.device | str = "cpu",
) -> BlockLayout:
    """The layout of a mask function, evaluated for one block row at a time. Waits for the device.

    Args:
        visible: `(b, h, q, k) -> bool`, as FlexAttention's `mask_mod`: batch row and head are ints, positions are
            integer tensors `(rows, 1)` and `(1, num_keys)`.
        batch, num_heads: how many batch rows and heads to evaluate; 1 where it does not depend on them.
    """
    block_indices(num_queries, num_keys, block_size)
    positions_q, positions_k = (torch.arange(n, device=device) for n in (num_queries, num_keys))
    parts = [
        BlockLayout.from_mask(visible(b, h, q[:, None], positions_k[None]).expand(len(q), num_keys), block_size)
        for b in range(batch)
        for h in range(num_heads)
        for q in positions_q.split(block_size)
    ]
    masks = [part.tile_masks for part in parts if part.tile_masks is not None]
    if masks:
        masks, which = distinct_masks(torch.cat(masks))
        which = which.to(torch.int32) + PARTIAL
    rows, used = [], 0
    for part in parts:
        kinds = torch.tensor([0, FULL], dtype=torch.int32, device=device)
        if part.tile_masks is not None:
            kinds = torch.cat([kinds, which[used : used + len(part.tile_masks)]])
            used += len(part.tile_masks)
        rows.append(kinds[part.grid.long()])
    grid = torch.cat(rows, dim=2)
    return BlockLayout(grid.view(batch, num_heads, -1, grid.shape[-1]), block_size, masks if used else None)
