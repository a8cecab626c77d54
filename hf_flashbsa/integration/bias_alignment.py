"""Additive biases in the memory layout that kernels read fast."""

from __future__ import annotations

import torch
from torch.nn.functional import pad

#: What rows begin at multiples of, bytes: the most that a thread loads at once.
_STEP = 16


def in_wide_rows(bias: torch.Tensor) -> torch.Tensor:
    """The same `(B, H, Q, K)` values where keys lie side by side and every row begins at a multiple of 16 bytes, with
    gradient.

    T5's bias comes with the heads of a place side by side, from an embedding, and in rows of any length, which makes
    kernels 2.5 to 4 times as slow. Dimensions that it is expanded along stay so.
    """
    if torch.compiler.is_exporting():  # the program is for any number of keys, and this depends on it
        return bias
    # A single query reads each place once.
    if bias.shape[2] == 1 or bias.stride(3) == 0 or _has_wide_rows(bias):
        return bias
    return _copied(bias)


def _has_wide_rows(bias: torch.Tensor) -> bool:
    rows = (stride for size, stride in zip(bias.shape[:3], bias.stride(), strict=False) if size > 1)
    return bias.stride(3) == 1 and all(stride * bias.element_size() % _STEP == 0 for stride in rows)


def _copied(bias: torch.Tensor) -> torch.Tensor:
    narrow = bias
    for dim in range(3):
        if bias.stride(dim) == 0:
            narrow = narrow.narrow(dim, 0, 1)
    room = -bias.shape[3] % (_STEP // bias.element_size())
    narrow = narrow.contiguous()
    if room:
        narrow = pad(narrow, (0, room))[..., : bias.shape[3]]
    return narrow.expand(bias.shape)
