"""Which tiles a program takes, one after the other: of queries, or with `TRANSPOSED` of keys.

Tiles have places in an order that all programs know. A program begins with that of its own number. The others it takes
in turns; where a work table orders unequal tiles, it claims them from a counter (`Call.claims`), so that all programs
end at about the same time. Results do not depend on who computed them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.hopper.common import shared
from hf_flashbsa.kernels.primitives import WORK_COLUMNS, scheduled, work_item


@gluon.jit
def _tiles(call):
    """How many tiles each head has, or head and batch row."""
    if call.work is None:
        return call.num_tiles
    else:
        return gl.load(call.work + WORK_COLUMNS - 1)  # as many as are used of those that there is room for


@gluon.jit
def places(call):
    """How many places there are."""
    if call.work is None:
        return call.total
    else:
        return call.total // call.num_tiles * _tiles(call)


@gluon.jit
def tile_at(call, place, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The head and tile that have a place."""
    if TRANSPOSED:
        row, head, tile = scheduled(call.work, place, _tiles(call), call.heads // call.group, tiles.n)
        item = work_item(call.work, tile, row, call.len_k, call.len_q, call.diagonal, tiles.n)
    else:
        row, head, tile = scheduled(call.work, place, _tiles(call), call.heads, tiles.m)
        if call.work is None:
            tile = call.num_tiles - 1 - tile  # those with the most work, where attention is causal
        item = work_item(call.work, tile, row, call.len_q, call.len_k, call.diagonal, tiles.m)
    return head, item


@gluon.jit
def place_at(call, turn):
    """The place of a program's `turn`-th tile. There is none if there are not so many `places`."""
    own, programs = gl.program_id(0), gl.num_programs(0)
    if call.claims is None:
        # Every other turn of all programs runs backwards, which evens out long and short tiles.
        place = turn * programs + gl.where(turn % 2 == 1, programs - 1 - own, own)
    else:
        place = own
        if turn > 0:
            place = programs + _claim(call.claims)
    return place


@gluon.jit
def _claim(claims):
    """Counts one up, for the warp; what the counter was."""
    # One of the threads asks, and tells the others.
    return shared(
        gl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 lane;
                mov.u32 lane, %laneid;
                setp.eq.u32 first, lane, 0;
                mov.u32 $0, 0;
                @first atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
            }
            """,
            "=&r,l", [claims], dtype=gl.int32, is_pure=False, pack=1,
        )
    )  # fmt: skip
