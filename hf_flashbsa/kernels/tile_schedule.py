"""The tile schedule: which tiles a kernel computes, and the range of the other side that each tile sees.

Ragged lengths, packed sequences, segment ids and block layouts become one int32 table with a row for each tile. It is
built on the tensors' own device, and no value is read back: its size is an upper bound that follows from the shapes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hf_flashbsa.kernels.segment_tiles import segment_tiles
from hf_flashbsa.kernels.tables import SCHEDULE_TILE, ScheduleColumn


class Sizes(NamedTuple):
    """Batch rows and lengths of queries and keys."""

    batch_q: int
    batch_k: int
    len_q: int
    len_k: int


class SequenceRows(NamedTuple):
    """Where `n` sequences lie on one side: rows `[begin, end)` of batch row `row`, int32 tensors `(n,)`.

    Args:
        length: rows of the tensor.
        packed: whether all sequences lie in batch row 0, one behind the other.
        padded_left, padded_right: whether rows before `begin`, or behind `end`, may belong to no sequence.
    """

    row: torch.Tensor
    begin: torch.Tensor
    end: torch.Tensor
    length: int
    packed: bool
    padded_left: bool
    padded_right: bool


class Sequences(NamedTuple):
    """`n` independent attention problems; query row `i` of one stands at key `i + query_offset`, int32 `(n,)`."""

    q: SequenceRows
    k: SequenceRows
    query_offset: torch.Tensor

    def table(self) -> torch.Tensor:
        """int32 `(n, 7)`: batch row, begin and end of the queries, those of the keys, and the query offset."""
        return torch.stack([*self.q[:3], *self.k[:3], self.query_offset], dim=1).contiguous()


class LiveKeys(NamedTuple):
    """The keys of each batch row that are no padding, tensors `(n,)`: none is outside `[begin, end)` (int32), and all
    within are live where `is_whole`."""

    begin: torch.Tensor
    end: torch.Tensor
    is_whole: torch.Tensor


def live_keys(live: torch.Tensor) -> LiveKeys:
    """`LiveKeys` of a bool mask `(B, n)`."""
    place = torch.arange(live.shape[1], device=live.device, dtype=torch.int32)
    if live.shape[1] == 0:
        none = live.new_zeros(live.shape[0], dtype=torch.int32)
        return LiveKeys(none, none, live.new_ones(live.shape[0]))
    end = torch.where(live, place + 1, 0).amax(1)
    begin = torch.minimum(torch.where(live, place, live.shape[1]).amin(1), end)
    return LiveKeys(begin, end, live.sum(1, dtype=torch.int32) == end - begin)


class BlockCounts(NamedTuple):
    """How much of its row of a block layout a tile visits: blocks `(B or 1, H or 1, rows)`, and tokens of a block."""

    visited: torch.Tensor
    block_size: int


def sequence_rows(
    count: int,
    length: int,
    device: torch.device,
    cu_seqlens: torch.Tensor | None = None,
    seqlens: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> SequenceRows:
    """Where the `count` sequences of one side lie in rows of `length`. Lengths that do not fit are cut off: nobody
    reads them back, and they must not lead out of the tensors."""
    row = torch.arange(count, device=device, dtype=torch.int32)
    zero = torch.zeros_like(row)
    if cu_seqlens is not None:
        cu = cu_seqlens.to(torch.int32).clamp(0, length)
        return SequenceRows(zero, cu[:-1], cu[1:], length, True, False, True)
    end = zero + length if seqlens is None else seqlens.to(torch.int32).clamp(0, length)
    begin = zero if starts is None else torch.minimum(starts.to(torch.int32).clamp(min=0), end)
    return SequenceRows(row, begin, end, length, False, starts is not None, seqlens is not None)


def tile_schedule(
    side: str,
    sequences: Sequences,
    segment_ids: tuple[torch.Tensor, torch.Tensor] | None,
    tile: int = SCHEDULE_TILE,
    split_segments: bool = True,
    block_counts: BlockCounts | None = None,
    padding: LiveKeys | None = None,
) -> torch.Tensor:
    """The schedule of one side, longest tiles first.

    Args:
        side: "q" for tiles of queries that walk over keys, "k" for tiles of keys that walk over queries.
        segment_ids: ids of queries `(B, Sq)` and keys `(B, Sk)`, or None. Each sequence has a batch row of its own.
        tile: most rows of a tile. A tile never spans two sequences.
        split_segments: whether tiles may begin where segment ids change; otherwise they begin at multiples of `tile`,
            counted from the first row of a sequence.
        block_counts: what a block layout visits, by block row of this side.
        padding: instead of segment ids that only say which keys are padding, what takes a third of the operations.

    Returns:
        int32 `(tiles, 12)`, columns see `ScheduleColumn`. Every own row is in exactly one tile; where it sees nothing,
        `LO == HI`, unless the rows of the tile have several segment ids. Unused rows have `BEGIN == END`.
    """
    if padding is not None:
        used, columns = _tiles_of_padding(side, sequences, padding, tile, split_segments)
    elif segment_ids is None:
        used, columns = _tiles_of_lengths(side, sequences, tile)
    else:
        used, columns = _tiles_of_segments(side, sequences, segment_ids, tile, split_segments)
    table = torch.stack([c.to(torch.int32) for c in columns], dim=1) * used[:, None]
    amount = table[:, ScheduleColumn.HI] - table[:, ScheduleColumn.LO]
    if block_counts is not None:
        visited = block_counts.visited.float().mean((0, 1)) * block_counts.block_size
        origin = ScheduleColumn.QUERY_ORIGIN if side == "q" else ScheduleColumn.KEY_ORIGIN
        block = (table[:, ScheduleColumn.BEGIN] - table[:, origin]) // block_counts.block_size
        amount = torch.minimum(amount, visited[block.clamp(max=visited.shape[0] - 1)])
    order = torch.argsort(amount.masked_fill(~used, -1), descending=True, stable=True)
    count = used.sum(dtype=torch.int32).expand(table.shape[0], 1)
    return torch.cat([table[order], count], dim=1)


def _tiles_of_lengths(side: str, sequences: Sequences, tile: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Which rows of a schedule are used, and its columns but the last, in order of the sequences."""
    own, other = (sequences.q, sequences.k) if side == "q" else (sequences.k, sequences.q)
    row, begin, end = own.row, own.begin, own.end
    of_sequence = [other.row, other.begin, other.end, sequences.query_offset, sequences.q.begin, sequences.k.begin]
    count = own.length // tile + row.shape[0] if own.packed else row.shape[0] * -(-own.length // tile)
    # Padding still needs its zeros: its rows are sequences that see nothing.
    padding = []
    if own.padded_left:
        padding.append((row, torch.zeros_like(begin), begin))
    if own.padded_right:
        rest_row, rest_begin = (row[:1], end[-1:]) if own.packed else (row, end)
        padding.append((rest_row, rest_begin, torch.full_like(rest_begin, own.length)))
    for of_padding in padding:
        none = torch.zeros_like(of_padding[0])
        count += none.shape[0]
        row, begin, end = (torch.cat(pair) for pair in zip((row, begin, end), of_padding, strict=True))
        of_sequence = [torch.cat([x, none]) for x in of_sequence]
    # Tile t belongs to the sequence whose cumulative number of tiles first exceeds t.
    tiles = (end - begin + tile - 1) // tile
    cumulative = torch.cumsum(tiles, 0)
    place = torch.arange(count, device=row.device)
    index = torch.searchsorted(cumulative, place, right=True)
    used = index < cumulative.shape[0]
    index = index.clamp(max=cumulative.shape[0] - 1)
    own_begin = begin[index] + (place - (cumulative - tiles)[index]) * tile
    own_end = torch.minimum(own_begin + tile, end[index])
    other_row, lo, hi, *rest = (x[index] for x in of_sequence)
    return used, [row[index], own_begin, own_end, other_row, lo, lo, hi, hi, *rest]


def _tiles_of_padding(
    side: str, sequences: Sequences, padding: LiveKeys, tile: int, split: bool
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same where all that hides keys is padding, within sequences that fill their batch rows."""
    k = sequences.k
    if side == "q":
        keys = k._replace(begin=padding.begin, end=padding.end)
        used, columns = _tiles_of_lengths(side, sequences._replace(k=keys), tile)
        row, _, _, _, lo, full_lo, _, hi, offset, query_origin, _ = columns
        full_hi = torch.where(padding.is_whole[row], hi, full_lo)
        return used, [*columns[:4], lo, full_lo, full_hi, hi, offset, query_origin, k.begin[row]]
    if split:  # tiles of live keys, and tiles of padding
        keys = k._replace(begin=padding.begin, end=padding.end, padded_left=True, padded_right=True)
        sequences = sequences._replace(k=keys)
    used, (row, begin, end, other_row, lo, _, _, hi, offset, query_origin, _) = _tiles_of_lengths(
        side, sequences, tile
    )
    live_begin, live_end = padding.begin[row], padding.end[row]
    is_live = (begin < live_end) & (end > live_begin)
    is_full = is_live & padding.is_whole[row] & (begin >= live_begin) & (end <= live_end)
    lo, hi = torch.where(is_live, lo, 0), torch.where(is_live, hi, 0)
    return used, [
        row, begin, end, other_row, lo, lo, torch.where(is_full, hi, lo), hi, offset, query_origin, k.begin[row],
    ]  # fmt: skip


def _tiles_of_segments(
    side: str,
    sequences: Sequences,
    segment_ids: tuple[torch.Tensor, torch.Tensor],
    tile: int,
    split_segments: bool,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The same where segment ids say what sees what."""
    ids_q, ids_k = segment_ids
    own, other, own_ids, other_ids = sequences.q, sequences.k, ids_q, ids_k
    if side == "k":
        own, other, own_ids, other_ids = other, own, other_ids, own_ids
    t = segment_tiles(own_ids, other_ids, own.begin, tile, split_segments)
    used = torch.arange(t.row.shape[0], device=own_ids.device) < t.used
    row = t.row
    # Empty ranges stay empty; rows before the sequence see nothing.
    hi = torch.where(t.begin < own.begin[row], 0, torch.minimum(other.end[row], t.hi))
    lo = torch.minimum(torch.maximum(other.begin[row], t.lo), hi)
    full_lo, full_hi = torch.minimum(torch.maximum(lo, t.full_lo), hi), torch.minimum(hi, t.full_hi)
    of_sequence = [x[row] for x in (sequences.query_offset, sequences.q.begin, sequences.k.begin)]
    return used, [row, t.begin, t.end, row, lo, full_lo, full_hi, hi, *of_sequence]
