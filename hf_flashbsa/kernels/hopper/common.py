"""What the Hopper kernels share. All of Gluon that differs between releases of Triton is here."""

from __future__ import annotations

from typing import NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_flashbsa.kernels.primitives import bounds, partial_position, place_of, span_of
from hf_flashbsa.kernels.records import Span

#: Rows of a consumer, a warpgroup: those of a wgmma product. A tile has two of them.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
#: Synchronises the threads of a partition.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@builtin
def add_to_global(descriptor, begin, tile, _semantic=None):
    """Adds where `tma.async_copy_shared_to_global` writes: Gluon's builder can, but has no name for it."""
    begin = _semantic._convert_to_ir_values(begin, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, begin, tile.handle)


class Call(NamedTuple):
    """The arguments of a kernel that say which tiles there are and what they meet. `total` counts those of all heads
    and batch rows, which programs share; `claims` is a counter, 0 at first, or None (turns.py).
    """

    work: object
    rules: object
    diagonal: object
    heads: object
    group: object
    len_q: object
    len_k: object
    num_tiles: object
    total: object
    claims: object


@gluon.jit
def shared(x):
    """A number that all threads have, as one that the compiler knows to be so."""
    # Not pure, or it may go where not all threads do.
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def span_met(item, rules, head, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """`span_of`, without lists of blocks or with.

    What it counts in a list is a sum over threads. ptxas takes that for different in each, and keeps neither it nor
    the descriptors of tiles in the registers that a warp has once, unless told.
    """
    if tiles.listed == 0:
        return span_of(item, rules, head, 0, tiles, TRANSPOSED)
    else:
        entries = gl.arange(0, tiles.width, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        span = span_of(item, rules, head, entries, tiles, TRANSPOSED)
        return Span(
            shared(span.begin), shared(span.left), shared(span.right), shared(span.partial),
            shared(span.full_begin), shared(span.full_end), shared(span.listed),
            span.lo, span.hi, span.index, span.origin,
        )  # fmt: skip


@gluon.jit
def visits(span, tiles: gl.constexpr):
    """In how many blocks a tile of queries visits keys."""
    return span.partial + (span.full_end - span.full_begin) // tiles.n


@gluon.jit
def first_key(span, blocks, index, tiles: gl.constexpr):
    """First key of the `index`-th block that is visited: partial ones first."""
    full = span.full_begin + (index - span.partial) * tiles.n
    position = gl.where(index < span.partial, partial_position(span, index, tiles.n, tiles), full)
    if tiles.listed > 0:
        if visits(span, tiles) == 0:
            position = 0
    return place_of(span, blocks, position, tiles)


@gluon.jit
def by_thread(x):
    """A product's (rows, columns) as (rows, columns / 8, 4, 2): the four threads that share a row hold pairs of it."""
    return x.reshape([x.shape[0], x.shape[1] // 8, 4, 2])


@gluon.constexpr_function
def quad_of(layout):
    """The layout of (rows, 4), one number for each of the threads that share a row, beside `layout` of `by_thread`."""
    return gl.SliceLayout(2, gl.SliceLayout(1, layout))


@gluon.jit
def for_all_pairs(x):
    """(rows, 4) as (rows, 1, 4, 1), to meet what `by_thread` gives."""
    return x[:, :, None][:, None, :, :]


@gluon.jit
def _may_be_hidden(rules, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Whether blocks hold others below the first that a row meets, and others behind the last."""
    if TRANSPOSED:
        # What lies outside of a tile's span is hidden already: queries there have an lse of inf.
        return rules.mask.window_right is not None, rules.mask.window_left is not None
    else:
        # `span_of` begins at the first key that the tile meets, but for these.
        aligned: gl.constexpr = (rules.score.seed is not None) or (tiles.listed > 0)
        return (rules.mask.window_left is not None) or aligned, True


@gluon.jit
def hide_outside(x, rules, begin, first, lo, hi, diagonal, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Of a product of the 64 rows from `begin` on with others from `first` on, as -inf what `within` says is not.

    Here each thread moves the bounds of its rows, and then compares them with constants.
    """
    BELOW, BEHIND = _may_be_hidden(rules, tiles, TRANSPOSED)
    S: gl.constexpr = x.type.layout
    COLUMNS: gl.constexpr = x.shape[1]
    x = by_thread(x)
    PARTS: gl.constexpr = x.type.layout
    QUAD: gl.constexpr = quad_of(PARTS)
    ROW: gl.constexpr = gl.SliceLayout(1, QUAD)
    zero = gl.zeros([ROWS], gl.int32, ROW)
    lo, hi = bounds(rules.mask, begin + gl.arange(0, ROWS, layout=ROW), zero + lo, zero + hi, diagonal, TRANSPOSED)
    own = first + 2 * gl.arange(0, 4, layout=gl.SliceLayout(0, QUAD))
    eighth = gl.arange(0, COLUMNS // 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PARTS))))
    pair = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PARTS))))
    place = 8 * eighth[None, :][:, :, None][:, :, :, None] + pair[None, :][:, None, :][:, :, None, :]
    if BELOW:
        x = gl.where(place >= for_all_pairs(lo[:, None] - own[None, :]), x, float("-inf"))
    if BEHIND:
        x = gl.where(place < for_all_pairs(hi[:, None] - own[None, :]), x, float("-inf"))
    return gl.convert_layout(x.reshape([ROWS, COLUMNS]), S, assert_trivial=True)


@gluon.jit
def clear(tile, first, lo, hi, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Zeros the rows of a `[BLOCK, DIM]` tile from row `first` on that lie outside of `[lo, hi)`: they meet weights of
    0, and memory there may hold NaN. Several warpgroups may do so at once: they write the same bytes.
    """
    gl.static_assert(DIM % 64 == 0, "TMA swizzles within rows of 128 bytes")
    # 64 columns fill a row, 32 words; of 128, TMA writes one half behind the other.
    ROW: gl.constexpr = 32
    PIECE: gl.constexpr = 8 * gl.num_warps()
    PIECES: gl.constexpr = BLOCK // PIECE
    HALVES: gl.constexpr = DIM // 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    pieces = tile._reinterpret(gl.int32, [HALVES * PIECES, PIECE * ROW], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in range(gl.where(first < lo, 0, gl.maximum(hi - first, 0) // PIECE), PIECES):
        begin = first + i * PIECE
        if (begin < lo) | (begin + PIECE > hi):
            rows = begin + gl.arange(0, PIECE * ROW, layout=LAYOUT) // ROW
            for half in gl.static_range(HALVES):
                piece = pieces.index(half * PIECES + i)
                piece.store(gl.where((rows >= lo) & (rows < hi), piece.load(LAYOUT), 0))
    fence_async_shared()
    barrier()


@gluon.jit
def store_shared(x, row, head, begin, end, tile, DIM: gl.constexpr):
    """Writes 64 rows in shared memory to those from `begin` on of an Operand, up to `end`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    rows = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    base = x.ptr + row.to(gl.int64) * x.stride_b + head.to(gl.int64) * x.stride_h
    pointers = base + rows.to(gl.int64)[:, None] * x.stride_s + dims[None, :]
    gl.store(pointers, tile.load(LAYOUT), mask=(rows < end)[:, None])


@gluon.jit
def write_note(notes, place, value):
    """Notes a number in shared memory. One thread tells of it by a barrier: others must meet before."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    notes.index(place).store(gl.full([1], value, gl.int32, ONE))


@gluon.jit
def read_note(notes, place):
    """A number that was noted."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(notes.index(place).load(ONE), 0)


# Barriers of the hardware have numbers, of which Triton takes the first: 8 and 9 are for the token of the consumers,
# 10 and 11 for their sums (softmax.py), 12 for the scout.


@gluon.constexpr_function
def _named_barrier(does, number, threads):
    """PTX for a barrier at which warps wait without asking again; the value of the instruction is its operand."""
    return f"bar.{does} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def await_others(number: gl.constexpr, threads: gl.constexpr, x):
    """Waits at a barrier until, with those of this partition, so many threads came. Gives `x`."""
    return gl.inline_asm_elementwise(
        _named_barrier("sync", number, threads), "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def tell_others(number: gl.constexpr, threads: gl.constexpr, x):
    """Comes to a barrier without waiting there. Gives `x`."""
    return gl.inline_asm_elementwise(
        _named_barrier("arrive", number, threads), "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def take_token(part: gl.constexpr, x):
    """Waits until the other consumer passes the token to the `part`-th one. Gives `x`."""
    return await_others(8 + part, 256, x)


@gluon.jit
def pass_token(part: gl.constexpr, x):
    """Passes the token to the `part`-th consumer. Gives `x`."""
    return tell_others(8 + part, 256, x)
