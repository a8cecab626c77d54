"""What the Hopper kernels share. All of Gluon that differs between releases of Triton is here."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from hf_flashbsa.kernels.primitives import partial_position, place_of, span_of
from hf_flashbsa.kernels.records import Span

#: Rows of a consumer, a warpgroup: those of a wgmma product. A tile has two of them.
ROWS = gl.constexpr(64)
CONSUMERS = gl.constexpr(2)
#: Synchronises the threads of a partition.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


class Call(NamedTuple):
    """The arguments of a kernel that say which tiles a program works on and what they meet. `total` counts the tiles
    of all heads and batch rows, where programs share them.
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


@gluon.jit
def _shared(x):
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
            _shared(span.begin), _shared(span.left), _shared(span.right), _shared(span.partial),
            _shared(span.full_begin), _shared(span.full_end), _shared(span.listed),
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
def clear(tile, first, lo, hi, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Zeros the rows of a `[BLOCK, DIM]` tile from row `first` on that lie outside of `[lo, hi)`: they meet weights of
    0, and memory there may hold NaN. All warpgroups write the same bytes.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    # Consumers have no registers left for all rows at once.
    PIECE: gl.constexpr = 32
    for i in gl.static_range(BLOCK // PIECE):
        begin = first + i * PIECE
        piece = tile.slice(i * PIECE, PIECE)
        values = piece.load(LAYOUT)
        rows = begin + gl.arange(0, PIECE, layout=gl.SliceLayout(1, LAYOUT))
        piece.store(gl.where(((rows >= lo) & (rows < hi))[:, None], values, gl.zeros_like(values)))
    fence_async_shared()
    barrier()


@gluon.jit
def _places(x, row, head, begin, end, LAYOUT: gl.constexpr, DIM: gl.constexpr):
    """Pointers to 64 rows from `begin` on of an Operand, and which of them are before `end`."""
    rows = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    base = x.ptr + row.to(gl.int64) * x.stride_b + head.to(gl.int64) * x.stride_h
    return base + rows.to(gl.int64)[:, None] * x.stride_s + dims[None, :], (rows < end)[:, None]


@gluon.jit
def load_rows(x, row, head, begin, end, DIM: gl.constexpr):
    """Reads 64 rows from `begin` on of an Operand, 0 from `end` on. A warp gets those of its wgmma products."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([DIM // 16, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    pointers, live = _places(x, row, head, begin, end, LAYOUT, DIM)
    return gl.load(pointers, mask=live, other=0.0)


@gluon.jit
def store_shared(x, row, head, begin, end, tile, DIM: gl.constexpr):
    """Writes 64 rows in shared memory to those from `begin` on of an Operand, up to `end`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    pointers, live = _places(x, row, head, begin, end, LAYOUT, DIM)
    gl.store(pointers, tile.load(LAYOUT), mask=live)


# ---- the backward kernels ----


class Held(NamedTuple):
    """The tiles of two operands that a program keeps, one of each per consumer, and the barrier of each consumer."""

    first: object
    second: object
    full: object


class Stream(NamedTuple):
    """Pairs of tiles in shared memory that the producer fills and the consumers empty, in turn; `stages` of them.

    Both tiles of a pair share their barriers, because waiting and telling take time: the threads that tell must meet.
    """

    first: object
    second: object
    full: object
    empty: object
    stages: object


@gluon.jit
def allocate_held(first, second, DIM: gl.constexpr):
    """Room for a tile of each descriptor per consumer."""
    tiles_first = gl.allocate_shared_memory(first.dtype, [CONSUMERS, 1, 1, ROWS, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [CONSUMERS, 1, 1, ROWS, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(CONSUMERS):
        mbarrier.init(full.index(part), count=1)
    return Held(tiles_first, tiles_second, full)


@gluon.jit
def allocate_stream(first, second, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, FILLS: gl.constexpr):
    """A stream of tiles of BLOCK rows of each descriptor. A pair takes FILLS arrivals to be full."""
    tiles_first = gl.allocate_shared_memory(first.dtype, [STAGES, 1, 1, BLOCK, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [STAGES, 1, 1, BLOCK, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FILLS)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    return Stream(tiles_first, tiles_second, full, empty, STAGES)


@gluon.jit
def hold(held, first, second, row, head, begin, DIM: gl.constexpr):
    """Loads the tiles that the program keeps."""
    for part in gl.static_range(CONSUMERS):
        full = held.full.index(part)
        mbarrier.expect(full, 2 * ROWS * DIM * 2)
        place = begin + part * ROWS
        tma.async_copy_global_to_shared(first, [row, head, place, 0], full, held.first.index(part))
        tma.async_copy_global_to_shared(second, [row, head, place, 0], full, held.second.index(part))


@gluon.jit
def fill(stream, i, first, second, row, head, begin, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Loads block `i` of a stream, rows from `begin` on, once its stage is empty."""
    stage, phase = i % stream.stages, (i // stream.stages) & 1
    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
    mbarrier.expect(full, 2 * BLOCK * DIM * 2)
    tma.async_copy_global_to_shared(first, [row, head, begin, 0], full, stream.first.index(stage))
    tma.async_copy_global_to_shared(second, [row, head, begin, 0], full, stream.second.index(stage))


@gluon.jit
def wait_for(stream, i):
    """Waits until block `i` of a stream is there."""
    mbarrier.wait(stream.full.index(i % stream.stages), (i // stream.stages) & 1)


@gluon.jit
def tile_of(tiles, stream, i, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Block `i` of a stream, of its `first` or `second` tiles."""
    return tiles.index(i % stream.stages).reshape([BLOCK, DIM])


@gluon.jit
def start_products(i, first, second, stream, zero, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Starts the products of two held tiles with those of block `i` of a stream, transposed."""
    wait_for(stream, i)
    tile = tile_of(stream.first, stream, i, BLOCK, DIM)
    s = warpgroup_mma(first, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    tile = tile_of(stream.second, stream, i, BLOCK, DIM)
    dp = warpgroup_mma(second, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp


@gluon.jit
def send_rows(x, rows, length, row, head, begin, end, values, box, call, DIM: gl.constexpr):
    """Starts to write 64 rows from `begin` on, by way of `box`, a held tile that is done with. `x` is a descriptor and
    `rows` an Operand of the same tensor, of `length` rows."""
    tile = box.reshape([ROWS, DIM])
    tile.store(values.to(x.dtype))
    place = begin
    if call.work is not None:
        if begin + ROWS > end:
            # Rows of another sequence follow. Nothing is sent beyond the tensor.
            store_shared(rows, row, head, begin, end, tile, DIM)
            place = gl.to_tensor(length)
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(x, [row, head, place, 0], box)


@gluon.jit
def release(stream, i):
    """Gives back the stage of block `i`."""
    mbarrier.arrive(stream.empty.index(i % stream.stages), count=1)


@gluon.jit
def clear_outside(stream, i, begin, span, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Waits for block `i` of a stream, rows from `begin` on, and clears those outside of the span, if it has any."""
    if (begin < span.lo) | (begin + BLOCK > span.hi):
        wait_for(stream, i)
        clear(tile_of(stream.first, stream, i, BLOCK, DIM), begin, span.lo, span.hi, BLOCK, DIM)
        clear(tile_of(stream.second, stream, i, BLOCK, DIM), begin, span.lo, span.hi, BLOCK, DIM)
