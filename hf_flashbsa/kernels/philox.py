"""The dropout mask as a pure function of seed and position, in torch operations.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by the
64-bit seed. Counter `(key // 16, query, batch * heads + head, 0)` gives four 32-bit words, whose 16 bytes in
little-endian order serve 16 consecutive keys. Query, batch row and head are absolute, the key counts from the
first of its sequence. A weight is dropped when its byte is below the threshold. The
Triton kernels draw the same bytes (`primitives.dropout_keep`), whatever their tiles.
"""

from __future__ import annotations

import torch

ROUNDS = 7
KEYS_PER_COUNTER = 16
_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def drop_threshold(dropout_p: float) -> int:
    """The number of byte values, of 256, that drop a weight. A positive probability never rounds to 0 or 1."""
    return 0 if dropout_p == 0.0 else min(max(round(dropout_p * 256), 1), 255)


def keep_scale(threshold: int) -> float:
    """What kept weights are multiplied with: 1 / the keep probability that the threshold gives."""
    return 256.0 / (256 - threshold)


def keep_mask(
    seed: torch.Tensor, threshold: int, batch_head: torch.Tensor, queries: torch.Tensor, keys: tuple[int, int]
) -> torch.Tensor:
    """Which weights dropout keeps.

    Args:
        seed: int64 with one element, >= 0.
        threshold: see `drop_threshold`.
        batch_head: int64 `(...)`, absolute batch row * heads + head.
        queries: int64 `(Sq,)`, absolute query rows.
        keys: `(begin, end)`, keys counted from the first of their sequence.

    Returns:
        bool `(..., Sq, end - begin)`.
    """
    begin, end = keys
    first = begin // KEYS_PER_COUNTER
    groups = torch.arange(first, -(-end // KEYS_PER_COUNTER), device=seed.device)
    c0, c1, c2 = torch.broadcast_tensors(groups, queries[:, None], batch_head[..., None, None])
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    words = torch.stack([c0, c1, c2, c3], dim=-1)
    shifts = torch.tensor([0, 8, 16, 24], device=seed.device)
    drawn = ((words[..., None] >> shifts) & 255).flatten(-3)
    offset = first * KEYS_PER_COUNTER
    return drawn[..., begin - offset : end - offset] >= threshold


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product of unsigned 32-bit numbers, held in int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _LOW
