"""Formats of the integer tables that the host builds and the kernels read. Imports nothing, so that both can.

Tile schedule, int32 `(tiles, 12)`: one row per tile of up to `SCHEDULE_TILE` rows, most work first (LPT order).
Sequence table, int32 `(sequences, 7)`: one row per sequence, for the gradient of a bias.
Block list, int32 `(batch, heads, blocks, 2 + most)`: the blocks that each block of rows visits.
"""

from __future__ import annotations

from enum import IntEnum

#: Rows of a tile of the schedule, and of a tile of the Gluon kernels: two consumer warpgroups of 64 rows.
SCHEDULE_TILE = 128


class ScheduleColumn(IntEnum):
    """Columns of the tile schedule. All but the last are the fields of `WorkTile`, in its order."""

    BATCH = 0
    BEGIN = 1
    END = 2
    OTHER_BATCH = 3
    LO = 4
    FULL_LO = 5
    FULL_HI = 6
    HI = 7
    QUERY_OFFSET = 8
    QUERY_ORIGIN = 9
    KEY_ORIGIN = 10
    #: Number of rows in use; the same in every row.
    NUM_TILES = 11


class SequenceColumn(IntEnum):
    """Columns of the sequence table: batch row and `[begin, end)` of queries and of keys, and the query offset."""

    BATCH_Q = 0
    BEGIN_Q = 1
    END_Q = 2
    BATCH_K = 3
    BEGIN_K = 4
    END_K = 5
    QUERY_OFFSET = 6


class BlockListColumn(IntEnum):
    """A block list begins with its number of full blocks and of all its blocks. Their indices follow, the full blocks'
    first, both groups in ascending order."""

    NUM_FULL = 0
    NUM_BLOCKS = 1
    FIRST = 2
