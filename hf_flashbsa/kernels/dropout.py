"""The dropout mask as a pure function of seed and position, in torch operations.

Each query has two 32-bit words of its own: the first two that Philox4x32 with 7 rounds (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011), keyed by the 64-bit seed, gives for the counter
`(query, batch * heads + head, 0, 0)`. A multiplicative hash under these two, a pad and a factor, then draws 32 bits
for every two keys of the query, 16 for each (`_draw`). A weight is dropped when its number is below the threshold.

Philox for every weight is many times as many instructions, and several weights to a Philox counter would tie the mask
to a layout of threads. The hash is a handful of instructions on a weight's own indices, wherever it is held. The two
keys of a draw are 8 apart, because matrix instructions give a thread such pairs, whether keys run along rows or along
columns: there the draw is made once. Tests hold rates and correlations against what chance gives. Query, batch row and
head are absolute, the key counts from the first of its sequence. The Triton kernels draw the same numbers
(`triton.score.dropout_keep`).
"""

from __future__ import annotations

import torch

ROUNDS = 7
#: Multipliers of the hash of keys: odd, with bits spread out. The first is 2**32 divided by the golden ratio.
KEY_FACTOR = 0x9E3779B9
LAST_FACTOR = 0x846CA68B
#: Keys that differ in this bit alone share a draw.
PAIR = 8
_RANGE = 1 << 16
_LOW = (1 << 32) - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def drop_threshold(dropout_p: float) -> int:
    """The number of 16-bit values that drop a weight. A positive probability never rounds to 0 or 1."""
    return 0 if dropout_p == 0.0 else min(max(round(dropout_p * _RANGE), 1), _RANGE - 1)


def keep_scale(threshold: int) -> float:
    """What kept weights are multiplied with: 1 / the keep probability that the threshold gives."""
    return _RANGE / (_RANGE - threshold)


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
    return _draw(*_row_words(seed, batch_head, queries), torch.arange(*keys, device=seed.device)) >= threshold


def _row_words(
    seed: torch.Tensor, batch_head: torch.Tensor, queries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad and (odd) factor of each query, `(..., Sq)`."""
    c0, c1 = torch.broadcast_tensors(queries, batch_head[..., None])
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1 | 1


def _draw(pad: torch.Tensor, factor: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The number `(..., Sq, keys)` below 2**16 of each weight."""
    x = ((keys & ~PAIR) * KEY_FACTOR) & _LOW
    x = ((x ^ (x >> 16)) ^ pad[..., None]) * factor[..., None] & _LOW
    x = (x ^ (x >> 15)) * LAST_FACTOR
    return torch.where((keys & PAIR) == 0, x, x >> 16) & (_RANGE - 1)


def _multiply(a: torch.Tensor, b: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the product of unsigned 32-bit numbers, held in int64."""
    high = (a * (b >> 16) + ((a * (b & 0xFFFF)) >> 16)) >> 16
    return high, (a * b) & _LOW
