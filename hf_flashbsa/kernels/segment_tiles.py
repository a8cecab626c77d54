"""Tiles of rows that segment ids divide, and what they meet, for `AttentionSpec.work`.

Packed documents have an id each. Tiles that end where the id changes meet the rows of one id alone: none has rows of
two documents and the scores between them, and as a rule those rows lie side by side, so that bounds say all there is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

#: Tiles end where ids change, unless runs of equal ids are shorter than this on average: so many tiles there is room
#: for, whatever the ids are. Nobody waits for the device to hear how many there will be.
SHORTEST_RUN = 32
#: Rows of which the least and the largest id say whether they may meet tiles of several ids.
CHUNK = 128
_MOST = torch.iinfo(torch.int64).max


class SegmentTiles(NamedTuple):
    """Tiles of own rows `[begin, end)` of a batch row, which meet rows of `[lo, hi)` of the other side and all of
    `[full_lo, full_hi)`; int64 tensors, one element for each. The first `used` are tiles, and others are unspecified.
    Those of one id meet the first and the last row of `[lo, hi)`, and those of several may meet fewer.
    """

    row: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    lo: torch.Tensor
    full_lo: torch.Tensor
    full_hi: torch.Tensor
    hi: torch.Tensor
    used: torch.Tensor


def segment_tiles(
    own: torch.Tensor, other: torch.Tensor, first: torch.Tensor, tile: int, divided: bool
) -> SegmentTiles:
    """Tiles of all rows of `own`, in order.

    Args:
        own, other: ids `(B, n)` and `(B, m)`.
        first: `(B,)`, rows that begin a tile beside the first ones.
        tile: most rows of a tile.
        divided: whether tiles end where ids change, if there is room for so many.
    """
    (batch, length), device = own.shape, own.device
    own, other = own.to(torch.int64).contiguous(), other.to(torch.int64).contiguous()
    room = batch * (length // tile + 2) + batch * length // SHORTEST_RUN
    if own.numel() == 0:
        return SegmentTiles(*[torch.zeros(room, dtype=torch.int64, device=device)] * 7, first.new_zeros(()))
    position = torch.arange(length, device=device)
    edges = (position == 0) | (position == first[:, None])
    if divided:
        changes = edges | _changes(own)
        cumulative, fewer = _cumulative_tiles(changes, tile), _cumulative_tiles(edges, tile)
        fits = cumulative[-1] <= room
        cumulative, edges = torch.where(fits, cumulative, fewer), torch.where(fits, changes, edges)
    else:
        cumulative = _cumulative_tiles(edges, tile)
    # Tile e begins at the row at which the number of tiles begun first exceeds e.
    at = torch.searchsorted(cumulative, torch.arange(room, device=device), right=True).clamp(max=batch * length - 1)
    row, begin = at // length, at % length
    end = torch.minimum(begin + tile, _next(edges).flatten()[at])
    if other.shape[1] == 0:
        bounds = (torch.zeros_like(at),) * 4
    else:
        run = _changes(own).flatten().cumsum(0)
        alone = run[at] == run[row * length + end - 1]
        lo, hi = _hull(own, other, row, begin, end)
        of_one = [x.flatten()[at] for x in _met(own, other)]
        bounds = [torch.where(alone, a, b) for a, b in zip(of_one, (lo, lo, lo, hi), strict=True)]
    return SegmentTiles(row, begin, end, *bounds, cumulative[-1])


def _changes(ids: torch.Tensor) -> torch.Tensor:
    """bool `(B, n)`: rows whose id is not that of the row before."""
    changes = ids != ids.roll(1, 1)  # no slice of n - 1 rows, or tracers would ask whether n is 2
    changes[:, 0] = True
    return changes


def _cumulative_tiles(edges: torch.Tensor, tile: int) -> torch.Tensor:
    """`(B * n,)`: how many tiles begin up to each row, if they end after `tile` rows and before each of `edges`."""
    position = torch.arange(edges.shape[1], device=edges.device)
    since = position - torch.where(edges, position, 0).cummax(1).values
    return (since % tile == 0).flatten().cumsum(0)


def _next(edges: torch.Tensor) -> torch.Tensor:
    """`(B, n)`: the first of `edges` behind each row, n where there is none."""
    length = edges.shape[1]
    at = torch.where(edges, torch.arange(length, device=edges.device), length)
    behind = at.flip(1).cummin(1).values.flip(1).roll(-1, 1)
    behind[:, -1] = length
    return behind


def _met(own: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`(lo, full_lo, full_hi, hi)`, each `(B, n)`: what a tile of the id of each own row meets, `[full_lo, full_hi)`
    being the first run of it."""
    ordered, order = other.sort(dim=1, stable=True)
    first, behind = torch.searchsorted(ordered, own), torch.searchsorted(ordered, own, right=True)
    met = (behind > first) & (own >= 0)
    lo = order.gather(1, first.clamp(max=other.shape[1] - 1))
    hi = order.gather(1, (behind - 1).clamp(min=0)) + 1
    run = _next(_changes(other)).gather(1, lo)
    return tuple(torch.where(met, x, 0) for x in (lo, lo, run, hi))


def _chunks(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least id of each CHUNK rows that is not negative, and the largest, `(B, chunks)`."""
    count = ids.shape[1] // CHUNK + 2  # two at least, or torch.compile would make graphs of one for themselves
    chunks = torch.nn.functional.pad(ids, (0, count * CHUNK - ids.shape[1]), value=-1).unfold(1, CHUNK, CHUNK)
    return chunks.masked_fill(chunks < 0, _MOST).amin(-1), chunks.amax(-1)


def _hull(
    own: torch.Tensor, other: torch.Tensor, row: torch.Tensor, begin: torch.Tensor, end: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lo, hi`: tiles of several ids, own rows `[begin, end)` of batch row `row`, meet no row outside."""
    (least, most), (other_least, other_most) = _chunks(own), _chunks(other)
    first = torch.arange(least.shape[1], device=own.device) * CHUNK
    of_tile = (first < end[:, None]) & (first + CHUNK > begin[:, None])
    smallest = torch.where(of_tile, least[row], _MOST).amin(1, keepdim=True)
    largest = torch.where(of_tile, most[row], -1).amax(1, keepdim=True)
    met = (other_least[row] <= largest) & (other_most[row] >= smallest)
    first = torch.arange(met.shape[1], device=own.device) * CHUNK
    hi = torch.where(met, first + CHUNK, 0).amax(1).clamp(max=other.shape[1])
    return torch.minimum(torch.where(met, first, other.shape[1]).amin(1), hi), hi
