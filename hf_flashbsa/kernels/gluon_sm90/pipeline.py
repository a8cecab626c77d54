"""Building blocks of the Gluon kernels: named barriers, shared-memory words, uniform values."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_flashbsa.kernels import tables
from hf_flashbsa.kernels.gluon_sm90.compat import barrier, reinterpret

#: Consumer warpgroups, and rows of each: the M of one wgmma.
NUM_CONSUMERS = gl.constexpr(2)
CONSUMER_M = gl.constexpr(tables.SCHEDULE_TILE // NUM_CONSUMERS.value)


class NamedBarrier(IntEnum):
    """Hardware barriers in use. Triton takes the first eight."""

    #: Consumer 0's turn to issue its wgmmas, then consumer 1's.
    CONSUMER_TURN = 8
    #: Vote of a consumer's threads on a rescale, one barrier per consumer.
    RESCALE_VOTE = 10
    #: A warp asks the scheduler warp for the next tile.
    NEXT_TILE = 12


CONSUMER_TURN = gl.constexpr(int(NamedBarrier.CONSUMER_TURN))
RESCALE_VOTE = gl.constexpr(int(NamedBarrier.RESCALE_VOTE))
NEXT_TILE = gl.constexpr(int(NamedBarrier.NEXT_TILE))


class Problem(NamedTuple):
    """The arguments that every kernel has: tile schedule (or None), modifications of the scores, sizes.

    `num_tiles` counts tiles per head (with a schedule, its rows), `total_tiles` those of all heads and batch rows;
    `tile_counter` is the scheduler's semaphore, zero at launch, or None (static schedule).
    """

    schedule: object
    mods: object
    query_offset: object
    heads: object
    group: object
    len_q: object
    len_k: object
    num_tiles: object
    total_tiles: object
    tile_counter: object


@gluon.jit
def warp_uniform(x):
    """Broadcast lane 0's value, so that ptxas knows it to be uniform and keeps it in a uniform register."""
    # Marked impure, so that it is not sunk into divergent code.
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def zero_rows(tile, start, lo, hi, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Zero the rows outside `[lo, hi)` of a `[BLOCK, DIM]` tile in shared memory whose first row is `first`: they are
    multiplied by weights of 0, and memory there may hold NaN. Several warpgroups may do so at once; they store the
    same bytes.
    """
    gl.static_assert(DIM % 64 == 0, "TMA swizzles within rows of 128 bytes")
    # Swizzled rows are 64 columns (32 words); TMA writes the two halves of 128 columns one after the other.
    ROW: gl.constexpr = 32
    PIECE: gl.constexpr = 8 * gl.num_warps()
    PIECES: gl.constexpr = BLOCK // PIECE
    HALVES: gl.constexpr = DIM // 64
    LAYOUT: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    pieces = reinterpret(tile, gl.int32, [HALVES * PIECES, PIECE * ROW], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in range(gl.where(start < lo, 0, gl.maximum(hi - start, 0) // PIECE), PIECES):
        begin = start + i * PIECE
        if (begin < lo) | (begin + PIECE > hi):
            rows = begin + gl.arange(0, PIECE * ROW, layout=LAYOUT) // ROW
            for half in gl.static_range(HALVES):
                piece = pieces.index(half * PIECES + i)
                piece.store(gl.where((rows >= lo) & (rows < hi), piece.load(LAYOUT), 0))
    fence_async_shared()
    barrier()


@gluon.jit
def smem_store(words, slot, value):
    """Store an int to shared memory. All threads of the partition must pass a `barrier()` before one of them arrives
    on the mbarrier that publishes it.
    """
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    words.index(slot).store(gl.full([1], value, gl.int32, ONE))


@gluon.jit
def smem_load(words, slot):
    """Load an int from shared memory."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.sum(words.index(slot).load(ONE), 0)


@gluon.constexpr_function
def _named_barrier_ptx(op, number, threads):
    """PTX of a named barrier. Its operand passes through, which orders it among the values of the program."""
    return f"bar.{op} {number}, {threads}; mov.b32 $0, $1;"


@gluon.jit
def named_barrier_sync(number: gl.constexpr, threads: gl.constexpr, x):
    """bar.sync: wait until `threads` threads, those of this partition included, have arrived. Returns `x`."""
    return gl.inline_asm_elementwise(
        _named_barrier_ptx("sync", number, threads), "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def named_barrier_arrive(number: gl.constexpr, threads: gl.constexpr, x):
    """bar.arrive: arrive without waiting. Returns `x`."""
    return gl.inline_asm_elementwise(
        _named_barrier_ptx("arrive", number, threads), "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def sched_barrier_sync(wg: gl.constexpr, x):
    """Wait for consumer `wg`'s turn to issue its wgmmas (FlashAttention-3's warp scheduler barrier). Returns `x`."""
    return named_barrier_sync(CONSUMER_TURN + wg, 256, x)


@gluon.jit
def sched_barrier_arrive(wg: gl.constexpr, x):
    """Give the turn to consumer `wg`. Returns `x`."""
    return named_barrier_arrive(CONSUMER_TURN + wg, 256, x)
