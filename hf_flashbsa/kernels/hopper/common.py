"""What the Hopper kernels share. All of Gluon that differs between releases of Triton is here."""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_flashbsa.kernels import tables
from hf_flashbsa.kernels.primitives import block_start, get_block_range, partial_block_position, window_bounds
from hf_flashbsa.kernels.records import BlockRange

#: Consumer warpgroups, and rows of each: the M of one wgmma.
NUM_CONSUMERS = gl.constexpr(2)
CONSUMER_M = gl.constexpr(tables.SCHEDULE_TILE // NUM_CONSUMERS.value)
#: bar.sync of the threads of this partition.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # renamed in Triton 3.7


@builtin
def tma_reduce_add(descriptor, begin, tile, _semantic=None):
    """TMA reduce-add of a shared-memory tile to global memory. The builder has the op; Gluon 3.6 has no wrapper for
    it.
    """
    begin = _semantic._convert_to_ir_values(begin, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, begin, tile.handle)


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
def uniform_block_range(work_tile, mods, head, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """`get_block_range`, warp-uniform.

    With block lists its fields are reductions over threads, which ptxas takes for divergent: it would keep neither
    them nor the TMA coordinates derived from them in uniform registers.
    """
    if tiles.sparse_block == 0:
        return get_block_range(work_tile, mods, head, 0, tiles, TRANSPOSED)
    else:
        list_offsets = gl.arange(0, tiles.max_blocks, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        block_range = get_block_range(work_tile, mods, head, list_offsets, tiles, TRANSPOSED)
        return BlockRange(
            warp_uniform(block_range.begin), warp_uniform(block_range.left_end), warp_uniform(block_range.right_end),
            warp_uniform(block_range.num_partial), warp_uniform(block_range.full_begin),
            warp_uniform(block_range.full_end), warp_uniform(block_range.partial_begin), block_range.lo,
            block_range.hi, block_range.indices, block_range.origin,
        )  # fmt: skip


@gluon.jit
def count_blocks(block_range, tiles: gl.constexpr):
    """Number of key blocks that a query tile visits."""
    return block_range.num_partial + (block_range.full_end - block_range.full_begin) // tiles.n


@gluon.jit
def kv_block_start(block_range, blocks, index, tiles: gl.constexpr):
    """First key of the `index`-th block that a query tile visits: masked blocks first."""
    full_position = block_range.full_begin + (index - block_range.num_partial) * tiles.n
    position = gl.where(
        index < block_range.num_partial, partial_block_position(block_range, index, tiles.n, tiles), full_position
    )
    if tiles.sparse_block > 0:
        if count_blocks(block_range, tiles) == 0:
            position = 0
    return block_start(block_range, blocks, position, tiles)


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
    pieces = tile._reinterpret(gl.int32, [HALVES * PIECES, PIECE * ROW], gl.SwizzledSharedLayout(1, 1, 1, [0]))
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
def store_smem_rows(view, batch, head, begin, end, tile, DIM: gl.constexpr):
    """Copy a consumer's 64 rows from shared memory to rows `[begin, end)` of a TensorView, masked by `end`."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 * 8 // DIM, DIM // 8], [4, 1], [1, 0])
    rows = begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, DIM, layout=gl.SliceLayout(0, LAYOUT))
    base = view.ptr + batch.to(gl.int64) * view.stride_b + head.to(gl.int64) * view.stride_h
    pointers = base + rows.to(gl.int64)[:, None] * view.stride_s + dims[None, :]
    gl.store(pointers, tile.load(LAYOUT), mask=(rows < end)[:, None])


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
