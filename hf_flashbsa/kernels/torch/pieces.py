"""How the torch back end divides a call: into pieces, each of which a few torch operations compute.

A call is a number of tiles: the queries of a sequence and the keys that they may see. Each tile could be a piece, and
every piece costs the host some time. Tiles of nearly equal lengths become one: the shorter ones are filled up, as long
as that adds fewer scores than a piece is worth. Batch rows that are alike need no copy for it.
"""

from __future__ import annotations

from bisect import bisect, insort
from collections.abc import Iterator
from typing import NamedTuple

import torch

from hf_flashbsa.kernels.call_plan import CallPlan

#: Most scores held at once: what a core's cache holds, as several operations go over them.
MAX_SCORES = 1 << 19
#: As many where the fused kernel holds none of them, but is given a mask or a bias for each.
MAX_MASKED = 1 << 23
#: As many scores take about as long as what a piece costs beside its scores.
PIECE_SCORES = 1 << 15
#: Fewest queries of a tile that is cut for the sake of a window.
MIN_QUERIES = 128


class Tile(NamedTuple):
    """Queries `[begin, end)` of batch row `row` and the keys `[lo, hi)` of `other` that they may see; the same for the
    `count - 1` rows behind. Origins are the first rows of the sequence, query `i` stands at key `i + query_offset`.
    `has_ids`: whether segment ids hide something within.
    """

    row: int
    begin: int
    end: int
    other: int
    lo: int
    hi: int
    query_offset: int
    query_origin: int
    key_origin: int
    has_ids: bool
    count: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        return self.end - self.begin, self.hi - self.lo

    @property
    def ahead(self) -> int:
        """Position of the first key less that of the first query."""
        return self.lo - self.begin - self.query_offset

    def narrowed(self, left: int | None, right: int | None) -> Tile:
        """Without the queries that see no key because of the window, and the keys that none sees."""
        _, begin, end, _, lo, hi, offset, *_ = self
        if right is not None:
            begin, hi = max(begin, lo - offset - right), min(hi, end + offset + right)
        if left is not None:
            end, lo = min(end, hi + left - offset), max(lo, begin + offset - left)
        return self._replace(begin=begin, end=end, lo=lo, hi=hi)

    def follows(self, other: Tile) -> bool:
        """Whether this is the same as `other` in the next batch row."""
        return self == other._replace(row=other.row + 1, other=other.other + 1)


class Place(NamedTuple):
    """Where `(n, m)` rows of a `(B, H, S, D)` tensor are.

    Slices: batch rows `rows` (a slice) and the `length` rows from `first` on. Else the tensors `rows` `(n,)`, `first`
    `(n, 1)`, `index` `(n * m,)` into the flattened `(B * S)` rows, and `live` bool `(n, m)`, False where a row stands
    in for one that is not there; None where all are.
    """

    rows: slice | torch.Tensor
    first: int | torch.Tensor
    length: int
    index: torch.Tensor | None = None
    live: torch.Tensor | None = None

    @classmethod
    def of_parts(cls, rows: list[int], begins: list[int], ends: list[int], size: int, device: torch.device) -> Place:
        """That of rows `[begin, end)` of each of the batch rows, which have `size` rows."""
        row, begin, end = torch.tensor([rows, begins, ends], device=device)[..., None].unbind(0)
        lengths = [b - a for a, b in zip(begins, ends, strict=True)]
        at = begin + torch.arange(max(lengths), device=device)
        index = (row * size + torch.minimum(at, end - 1)).flatten()
        return cls(row[:, 0], begin, max(lengths), index, None if min(lengths) == max(lengths) else at < end)

    @property
    def extent(self) -> slice:
        """The rows of slices."""
        return slice(self.first, self.first + self.length)

    def positions(self, device: torch.device) -> torch.Tensor:
        """`(m,)` or `(n, m)`: which rows of the tensor, where they are there."""
        return self.first + torch.arange(self.length, device=device)


class Piece(NamedTuple):
    """Queries and keys that are computed at once.

    Args:
        q, k: where they are.
        ahead: position of the first key less that of the first query, `(n,)` where it differs.
        query_start, key_start: place of the first query and key in their sequence; the former is of use for slices
            only.
        banded: whether the left and the right side of the window hide something.
        has_ids: whether segment ids do.
        is_diagonal: whether all that is hidden are keys behind the `i`-th for query `i`.
    """

    q: Place
    k: Place
    ahead: int | torch.Tensor
    query_start: int
    key_start: int
    banded: tuple[bool, bool]
    has_ids: bool
    is_diagonal: bool

    def is_all_of(self, q: torch.Tensor, k: torch.Tensor) -> bool:
        """Whether there is nothing beside this piece."""
        sides = ((self.q, q), (self.k, k))
        return all(p.index is None and p.rows == slice(0, x.shape[0]) and p.length == x.shape[2] for p, x in sides)


def pieces_of(q: torch.Tensor, k: torch.Tensor, plan: CallPlan, with_scores: bool) -> list[Piece]:
    """The pieces of a call, which cover all scores that may exist, none twice.

    Args:
        with_scores: whether the scores of a piece are held at once.
    """
    window = plan.scalars.window_left, plan.scalars.window_right
    tensors = plan.tensors
    # What is read by place in the batch or the sequence is read as a slice.
    sliced = tensors.mask is not None or tensors.bias is not None or tensors.block_grid is not None
    plain = not sliced and tensors.alibi_slopes is None
    most = (MAX_SCORES if with_scores else MAX_MASKED) // max(1, q.shape[1])  # of a head
    tiles = []
    for tile in _tiles(q, k, plan):
        tile = tile.narrowed(*window)
        limited = with_scores or not plain or tile.has_ids or _needs_band(tile, window)
        tiles += _cut(tile, window, most if limited else None)
    groups = _groups(tiles, most, PIECE_SCORES // max(1, q.shape[1]), sliced, plan.scalars.drop_threshold is not None)
    return [_piece(group, q, k, window, plain) for group in groups]


def _tiles(q: torch.Tensor, k: torch.Tensor, plan: CallPlan) -> Iterator[Tile]:
    tensors, has_ids = plan.tensors, plan.tensors.segment_ids_k is not None
    if tensors.schedule_q is not None:
        for row, begin, end, other, lo, full_lo, full_hi, hi, *places, _ in tensors.schedule_q.tolist():
            if begin < end:
                yield Tile(row, begin, end, other, lo, hi, *places, has_ids and (lo, hi) != (full_lo, full_hi))
    elif tensors.sequences is not None:
        for row, begin, end, other, lo, hi, offset in tensors.sequences.tolist():
            yield Tile(row, begin, end, other, lo, hi, offset, begin, lo, has_ids)
    else:
        yield Tile(0, 0, q.shape[2], 0, 0, k.shape[2], plan.scalars.query_offset, 0, 0, has_ids, q.shape[0])


def _needs_band(tile: Tile, window: tuple[int | None, int | None]) -> bool:
    """Whether a window hides scores of a narrowed tile, other than all behind the diagonal."""
    hides = _hides(tile, window)
    return hides[0] or (hides[1] and (tile.ahead != 0 or window[1] != 0))


def _hides(tile: Tile, window: tuple[int | None, int | None]) -> tuple[bool, bool]:
    """Whether the left and the right side of a window hide scores of a tile."""
    (left, right), (len_q, len_k) = window, tile.shape
    return (
        left is not None and tile.ahead - (len_q - 1) < -left,
        right is not None and tile.ahead + len_k - 1 > right,
    )


def _cut(tile: Tile, window: tuple[int | None, int | None], most: int | None) -> Iterator[Tile]:
    """Tiles of at most so many scores, and of hardly more than a window shows."""
    len_q, len_k = tile.shape
    if len_q <= 0 or len_k <= 0 or tile.count == 0:
        return
    step, rows = len_q, tile.count
    if most is not None:
        step = min(step, max(1, most // len_k))
        rows = min(rows, max(1, most // (step * len_k)))
    if None not in window:
        step = min(step, max(MIN_QUERIES, sum(window)))
    for row in range(0, tile.count, rows):
        of_rows = tile._replace(row=tile.row + row, other=tile.other + row, count=min(rows, tile.count - row))
        for begin in range(tile.begin, tile.end, step):
            yield of_rows._replace(begin=begin, end=min(begin + step, tile.end)).narrowed(*window)


def _groups(tiles: list[Tile], most: int, spare: int, sliced: bool, dropped: bool) -> list[list[Tile]]:
    """Tiles that become one piece each.

    Args:
        most: scores of a piece.
        spare: scores beside its own that a tile may bring.
        sliced: whether only tiles that are alike may do so.
        dropped: whether weights are dropped, by place of the key.
    """
    groups: list[list[Tile]] = []
    longest, scores, keys = 0, 0, []  # the most queries of a tile of the last group; its scores; its keys
    for tile in sorted(tiles, key=lambda t: (-t.shape[1], -t.shape[0], t.begin, t.lo, t.row)):
        len_q, len_k = tile.shape
        first = groups[-1][0] if groups else tile
        rows = len(groups[-1]) + 1 if groups else 1
        longest, scores = max(longest, len_q), scores + len_q * len_k
        filled = rows * longest * first.shape[1]
        if (
            groups
            and filled <= most
            and filled - scores <= rows * spare
            and tile.count == first.count == 1
            and (not sliced or tile.follows(groups[-1][-1]))
            and tile.has_ids == first.has_ids
            and (not dropped or tile.lo - tile.key_origin == first.lo - first.key_origin)
            and _are_new(tile, keys)
        ):
            groups[-1].append(tile)
        else:
            groups.append([tile])
            longest, scores, keys = len_q, len_q * len_k, []
        insort(keys, (tile.other, tile.lo, tile.hi))
    return groups


def _are_new(tile: Tile, keys: list[tuple[int, int, int]]) -> bool:
    """Whether none of a tile's keys is in `keys`, disjoint `(row, lo, hi)` in order: a piece adds to each key once."""
    at = bisect(keys, (tile.other, tile.lo, tile.hi))
    before, behind = keys[max(at - 1, 0) : at], keys[at : at + 1]
    return not any(row == tile.other and lo < tile.hi and tile.lo < hi for row, lo, hi in (*before, *behind))


def _piece(
    group: list[Tile], q: torch.Tensor, k: torch.Tensor, window: tuple[int | None, int | None], plain: bool
) -> Piece:
    first = group[0]
    banded = tuple(map(any, zip(*(_hides(tile, window) for tile in group), strict=True)))
    aheads = {tile.ahead for tile in group}
    diagonal = banded == (False, True) and aheads == {0} and window[1] == 0 and not first.has_ids and plain
    # Rows that stand in for keys are behind all queries then.
    diagonal = diagonal and (len({t.hi - t.lo for t in group}) == 1 or all(t.shape[0] <= t.shape[1] for t in group))
    if all(tile.follows(before) for before, tile in zip(group, group[1:], strict=False)):
        count = first.count + len(group) - 1
        place_q = Place(slice(first.row, first.row + count), first.begin, first.shape[0])
        place_k = Place(slice(first.other, first.other + count), first.lo, first.shape[1])
    else:
        row, begin, end, other, lo, hi, *_ = map(list, zip(*group, strict=True))
        place_q = Place.of_parts(row, begin, end, q.shape[2], q.device)
        place_k = Place.of_parts(other, lo, hi, k.shape[2], k.device)
    ahead = first.ahead if len(aheads) == 1 else torch.tensor([tile.ahead for tile in group], device=q.device)
    starts = first.begin - first.query_origin, first.lo - first.key_origin
    return Piece(place_q, place_k, ahead, *starts, banded, first.has_ids, diagonal)
