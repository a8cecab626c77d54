"""A block layout in the formats that kernels read."""

from __future__ import annotations

import torch


def block_table(full: torch.Tensor, total: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """int32 `(B or 1, H or 1, rows, 2 + C)` of a layout's lists: full blocks, all blocks, and their C indices."""
    return torch.cat([full[..., None], total[..., None], index], dim=-1)


def pack_block_masks(masks: torch.Tensor) -> torch.Tensor:
    """bool `(U, size, size)` as int32 `(U, size, size // 32)`: key `i` of a row in bit `i % 32` of word `i // 32`."""
    bits = masks.reshape(*masks.shape[:2], -1, 8)
    powers = 2 ** torch.arange(8, dtype=torch.uint8, device=masks.device)
    return (bits * powers).sum(-1, dtype=torch.uint8).view(torch.int32)
