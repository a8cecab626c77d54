"""Which tiles a program of the Hopper forward kernel takes, one after the other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.primitives import scheduled, work_item


@gluon.jit
def tile_at(call, turn, tiles: gl.constexpr):
    """The head and tile of this program's `turn`-th turn. Every other round of programs runs backwards, which evens
    out long and short tiles."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    place = turn * programs + gl.where(turn % 2 == 1, programs - 1 - place, place)
    place = gl.minimum(place, call.total - 1)
    row, head, tile = scheduled(call.work, place, call.num_tiles, call.heads, tiles.m)
    if call.work is None:
        tile = call.num_tiles - 1 - tile
    return head, work_item(call.work, tile, row, call.len_q, call.len_k, call.diagonal, tiles.m)


@gluon.jit
def next_turn(call, turn, tiles: gl.constexpr):
    """The first turn from `turn` on whose tile has rows, or that behind the last one."""
    turn = gl.to_tensor(turn)
    if call.work is not None:
        turns = turns_of(call)
        while (turn < turns) & _is_empty(call, turn, tiles):
            turn += 1
    return turn


@gluon.jit
def _is_empty(call, turn, tiles: gl.constexpr):
    _, item = tile_at(call, turn, tiles)
    return item.begin >= item.end


@gluon.jit
def turns_of(call):
    """How many tiles this program has."""
    programs = gl.num_programs(0)
    rest = call.total % programs
    turns = call.total // programs
    place = gl.program_id(0)
    return turns + (gl.where(turns % 2 == 1, programs - 1 - place, place) < rest).to(gl.int32)
