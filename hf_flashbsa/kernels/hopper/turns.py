"""Which tiles a program takes, one after the other: of queries, or with `TRANSPOSED` of keys.

Tiles have places in an order that all programs know. A program begins with that of its own number. The others it takes
in turns; where a work table orders unequal tiles, it claims them from a counter (`Call.claims`), so that all programs
end at about the same time. Results do not depend on who computed them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.hopper.common import warp_uniform
from hf_flashbsa.kernels.primitives import NUM_TILES, decode_tile_index, load_work_tile


@gluon.jit
def _tiles_per_head(problem):
    """Tiles of each head, or of each head and batch row."""
    if problem.schedule is None:
        return problem.num_tiles
    else:
        return gl.load(problem.schedule + NUM_TILES)


@gluon.jit
def num_tile_indices(problem):
    """Number of linear tile indices."""
    if problem.schedule is None:
        return problem.total_tiles
    else:
        return problem.total_tiles // problem.num_tiles * _tiles_per_head(problem)


@gluon.jit
def locate_tile(problem, tile_index, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Head and WorkTile of a linear tile index."""
    if TRANSPOSED:
        batch, head, tile = decode_tile_index(
            problem.schedule, tile_index, _tiles_per_head(problem), problem.heads // problem.group, tiles.n
        )
        work_tile = load_work_tile(
            problem.schedule, tile, batch, problem.len_k, problem.len_q, problem.query_offset, tiles.n
        )
    else:
        batch, head, tile = decode_tile_index(
            problem.schedule, tile_index, _tiles_per_head(problem), problem.heads, tiles.m
        )
        if problem.schedule is None:
            tile = problem.num_tiles - 1 - tile  # causal: longest first
        work_tile = load_work_tile(
            problem.schedule, tile, batch, problem.len_q, problem.len_k, problem.query_offset, tiles.m
        )
    return head, work_tile


@gluon.jit
def tile_index_at(problem, tile_iter):
    """Linear index of a program's `tile_iter`-th tile; the program is done once it reaches `num_tile_indices`.

    Static: grid-stride, every other round backwards, which balances long and short tiles. With a `tile_counter`, used
    where a schedule orders unequal tiles: the next unclaimed tile. Results do not depend on which program computes a
    tile.
    """
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    if problem.tile_counter is None:
        tile_index = tile_iter * num_programs + gl.where(tile_iter % 2 == 1, num_programs - 1 - program, program)
    else:
        tile_index = program
        if tile_iter > 0:
            tile_index = num_programs + _fetch_add(problem.tile_counter)
    return tile_index


@gluon.jit
def _fetch_add(counter):
    """Atomic increment of the tile counter by lane 0; returns the old value in all lanes."""
    return warp_uniform(
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
            "=&r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
        )
    )  # fmt: skip
