"""Which tiles a program takes, one after the other: of queries, or with `TRANSPOSED` of keys.

Tiles have places in an order that all programs know. A program begins with that of its own number. The others it takes
in turns; where a work table orders unequal tiles, it claims them from a counter (`Call.claims`), so that all programs
end at about the same time. Results do not depend on who computed them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.hopper.common import shared
from hf_flashbsa.kernels.primitives import scheduled, work_item


@gluon.jit
def tile_at(call, place, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The head and tile that have a place."""
    place = gl.minimum(place, call.total - 1)
    if TRANSPOSED:
        row, head, tile = scheduled(call.work, place, call.num_tiles, call.heads // call.group, tiles.n)
        item = work_item(call.work, tile, row, call.len_k, call.len_q, call.diagonal, tiles.n)
    else:
        row, head, tile = scheduled(call.work, place, call.num_tiles, call.heads, tiles.m)
        if call.work is None:
            tile = call.num_tiles - 1 - tile  # those with the most work, where attention is causal
        item = work_item(call.work, tile, row, call.len_q, call.len_k, call.diagonal, tiles.m)
    return head, item


@gluon.jit
def first_place(call, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The place of a program's first tile, `call.total` where it gets none: unused entries end a work table."""
    place = gl.program_id(0)
    if call.work is not None:
        place = gl.where(_is_empty(call, place, tiles, TRANSPOSED), call.total, place)
    return place


@gluon.jit
def second_place(call, place, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The place of the second tile of a program whose first one has `place`; from `call.total` on there is none."""
    following = gl.to_tensor(call.total)
    if place < call.total:
        following = settled(call, claim(call, 1), tiles, TRANSPOSED)
    return following


@gluon.jit
def claim(call, turn):
    """Asks for the place of a program's `turn`-th tile, behind the first: what `settled` turns into one. The answer
    takes its time, for which nothing waits here."""
    programs = gl.num_programs(0)
    if call.claims is None:
        # Every other turn of all programs runs backwards, which evens out long and short tiles.
        own = gl.program_id(0)
        return turn * programs + gl.where(turn % 2 == 1, programs - 1 - own, own)
    else:
        # One of the threads asks, and has the answer.
        return programs + gl.inline_asm_elementwise(
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
            "=&r,l", [call.claims], dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def settled(call, place, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The place that a `claim` gave, or that of the next tile with rows; from `call.total` on there is none."""
    if call.claims is not None:
        place = shared(place)
        while (place < call.total) & _is_empty(call, place, tiles, TRANSPOSED):
            place = shared(claim(call, 0))
    return place


@gluon.jit
def _is_empty(call, place, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    _, item = tile_at(call, place, tiles, TRANSPOSED)
    return item.begin >= item.end
