"""Masks on the registers of a wgmma accumulator."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M
from hf_flashbsa.kernels.triton.mask import apply_segment_mask, block_bits, needs_segment_mask, window_bounds


@gluon.jit
def as_fragments(x):
    """A wgmma accumulator (M, N) as (M, N / 8, 4, 2): the four threads that share a row (a quad) hold two adjacent
    columns of every eight.
    """
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.constexpr_function
def quad_layout(layout):
    """Layout of (M, 4), one value per thread of the quad that shares a row, given the layout of `as_fragments`."""
    return gl.SliceLayout(2, gl.SliceLayout(1, layout))


@gluon.jit
def broadcast_pairs(x):
    """(M, 4) as (M, 1, 4, 1), to broadcast against `as_fragments`."""
    return x[:, :, None][:, None, :, :]


@gluon.jit
def _masked_sides(mods, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Whether a masked block may hold columns left of the first, and right of the last, that a row sees."""
    if TRANSPOSED:
        # Queries outside `[lo, hi)` are masked already: their lse is +inf.
        return mods.bounds.window_right is not None, mods.bounds.window_left is not None
    else:
        # `get_block_range` begins at the first visible key, except where blocks are aligned.
        aligned: gl.constexpr = (mods.score_mod.seed is not None) or (tiles.sparse_block > 0)
        return (mods.bounds.window_left is not None) or aligned, True


@gluon.jit
def apply_window_mask(x, mods, begin, start, lo, hi, query_offset, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """-inf outside the window: rows are the 64 from `begin` on, columns those from `start` on within `[lo, hi)`. As
    `window_mask`, but each thread shifts its rows' bounds once and compares them with compile-time column numbers.
    """
    MASK_LEFT, MASK_RIGHT = _masked_sides(mods, tiles, TRANSPOSED)
    S: gl.constexpr = x.type.layout
    COLUMNS: gl.constexpr = x.shape[1]
    x = as_fragments(x)
    FRAGMENTS: gl.constexpr = x.type.layout
    QUAD: gl.constexpr = quad_layout(FRAGMENTS)
    ROW: gl.constexpr = gl.SliceLayout(1, QUAD)
    zero = gl.zeros([CONSUMER_M], gl.int32, ROW)
    lo, hi = window_bounds(
        mods.bounds, begin + gl.arange(0, CONSUMER_M, layout=ROW), zero + lo, zero + hi, query_offset, TRANSPOSED
    )
    thread_start = start + 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))
    eighth = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, FRAGMENTS))))
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, FRAGMENTS))))
    column = 8 * eighth[None, :][:, :, None][:, :, :, None] + pair[None, :][:, None, :][:, :, None, :]
    if MASK_LEFT:
        x = gl.where(column >= broadcast_pairs(lo[:, None] - thread_start[None, :]), x, float("-inf"))
    if MASK_RIGHT:
        x = gl.where(column < broadcast_pairs(hi[:, None] - thread_start[None, :]), x, float("-inf"))
    return gl.convert_layout(x.reshape([CONSUMER_M, COLUMNS]), S, assert_trivial=True)


@gluon.jit
def apply_mask(s, mods, head, work_tile, start, block_kind, tiles: gl.constexpr):
    """Scores of the block from key `start` on, -inf where hidden. `block_kind` is the grid entry of a layout, loaded
    by the producer; `visible_mask` would load it again.
    """
    rows = work_tile.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, s.type.layout))
    keys = start + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
    hi = gl.where(block_kind > 0, work_tile.hi, work_tile.lo)
    s = apply_window_mask(s, mods, work_tile.begin, start, work_tile.lo, hi, work_tile.query_offset, tiles, False)
    s = apply_segment_mask(
        s,
        mods.bounds,
        work_tile.batch,
        work_tile.other_batch,
        needs_segment_mask(work_tile),
        rows[:, None],
        keys[None, :],
    )
    if tiles.sparse_block > 0:
        if mods.blocks.mask_words is not None:
            if block_kind > 1:
                pos_q, pos_k = work_tile.begin - work_tile.query_origin, start - work_tile.key_origin
                ok = block_bits(
                    mods.blocks,
                    block_kind,
                    pos_q,
                    pos_k,
                    (rows - work_tile.begin)[:, None],
                    (keys - start)[None, :],
                    tiles,
                )
                s = gl.where(ok, s, float("-inf"))
    return s
