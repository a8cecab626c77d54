"""Pipelines of the backward kernels: resident tiles, streamed blocks, and the epilogue.

A program works through several tiles. Each keeps two operands resident in shared memory (Q and dO for dQ; K and V for
dK/dV), in one of two slots: while consumers work on one tile, the producer stores the results of the previous tile
from its slot and loads the next tile there. Blocks of the other two operands stream through a pipeline of STAGES
stages with full and empty mbarriers.

`step` numbers the blocks of all tiles: block `step` is in stage `step % STAGES`, phase `step // STAGES & 1`.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from hf_flashbsa.kernels.gluon_sm90.compat import barrier, tma_load, tma_store
from hf_flashbsa.kernels.gluon_sm90.epilogue import store_smem_rows
from hf_flashbsa.kernels.gluon_sm90.pipeline import (
    CONSUMER_M,
    NUM_CONSUMERS,
    smem_load,
    smem_store,
    warp_uniform,
    zero_rows,
)
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import (
    allocate_mailbox,
    is_valid_tile,
    load_consumer_tile_info,
    load_scheduled_tile,
    load_tile_info,
    prefetch_next_tile,
    wait_tile,
)
from hf_flashbsa.kernels.triton.block_range import block_start, partial_block_position


class ConsumerTile(NamedTuple):
    """A consumer's 64 rows of a tile: the tile's number in this program, first row, first key of the sequence, and how
    many blocks it visits, the first `num_partial` masked.
    """

    tile_iter: object
    begin: object
    key_origin: object
    num_partial: object
    num_blocks: object


#: Words of `block_info` per stage: first row and head.
BLOCK_INFO_WORDS = gl.constexpr(2)


class ResidentTiles(NamedTuple):
    """Two slots, each with the tiles of two operands per consumer; mbarriers `full` (loaded) and `empty` (results are
    in place); and the tile mailbox.
    """

    first: object
    second: object
    full: object
    empty: object
    mailbox: object


class Pipeline(NamedTuple):
    """`stages` stages of a pair of tiles each, with full and empty mbarriers and `block_info` words. Both tiles of a
    pair share their mbarriers, since every arrival costs a barrier of the partition.
    """

    first: object
    second: object
    full: object
    empty: object
    block_info: object
    stages: object


@gluon.jit
def allocate_resident(first, second, DIM: gl.constexpr, EMPTY_ARRIVALS: gl.constexpr):
    """Two slots with a tile of each descriptor per consumer. Each is released by EMPTY_ARRIVALS arrivals."""
    NUM_SLOTS: gl.constexpr = 2 * NUM_CONSUMERS
    tiles_first = gl.allocate_shared_memory(first.dtype, [NUM_SLOTS, 1, 1, CONSUMER_M, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [NUM_SLOTS, 1, 1, CONSUMER_M, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [NUM_SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(NUM_SLOTS):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=EMPTY_ARRIVALS)
    return ResidentTiles(tiles_first, tiles_second, full, empty, allocate_mailbox())


@gluon.jit
def allocate_pipeline(
    first, second, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, FULL_ARRIVALS: gl.constexpr
):
    """STAGES stages of BLOCK rows of each descriptor. A stage is full after FULL_ARRIVALS arrivals."""
    tiles_first = gl.allocate_shared_memory(first.dtype, [STAGES, 1, 1, BLOCK, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [STAGES, 1, 1, BLOCK, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FULL_ARRIVALS)
        mbarrier.init(empty.index(stage), count=NUM_CONSUMERS)
    block_info = gl.allocate_shared_memory(
        gl.int32, [STAGES * BLOCK_INFO_WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    return Pipeline(tiles_first, tiles_second, full, empty, block_info, STAGES)


@gluon.jit
def store_results(resident, tile_iter, first, second, length, problem):
    """Wait until the slot of tile `tile_iter` is free, and TMA-store the results of tile `tile_iter - 2` from it to
    `first` and `second`, descriptors of tensors of `length` rows; to `first` alone where `second` is None.
    """
    for wg in gl.static_range(NUM_CONSUMERS):
        slot = (tile_iter & 1) * NUM_CONSUMERS + wg
        mbarrier.wait(resident.empty.index(slot), ((tile_iter >> 1) & 1) ^ 1)
        if tile_iter > 1:
            work_tile, head = load_consumer_tile_info(wg, resident.mailbox, tile_iter - 2, problem)
            begin = work_tile.begin
            if problem.schedule is not None:
                # TMA clips at the end of the tensor. Consumers store partial tiles themselves (`stage_results`).
                begin = gl.where(begin + CONSUMER_M > work_tile.end, length, begin)
            tma_store(first, [work_tile.batch, head, begin, 0], resident.first.index(slot))
            if second is not None:
                tma_store(second, [work_tile.batch, head, begin, 0], resident.second.index(slot))


@gluon.jit
def load_resident(resident, tile_iter, first, second, problem, tiles: gl.constexpr):
    """Load the resident operands of tile `tile_iter` into its slot, after `store_results`; arrive without a load if
    there is no such tile.
    """
    is_valid = wait_tile(resident.mailbox, tile_iter)
    if is_valid:
        prefetch_next_tile(tile_iter)
    work_tile, head = load_tile_info(resident.mailbox, tile_iter, problem)
    tma.store_wait(0)
    for wg in gl.static_range(NUM_CONSUMERS):
        slot = (tile_iter & 1) * NUM_CONSUMERS + wg
        full, begin = resident.full.index(slot), work_tile.begin + wg * CONSUMER_M
        if is_valid:
            mbarrier.expect(full, 2 * CONSUMER_M * tiles.d * 2)
            tma_load(first, [work_tile.batch, head, begin, 0], full, resident.first.index(slot))
            tma_load(second, [work_tile.batch, head, begin, 0], full, resident.second.index(slot))
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def wait_resident(wg: gl.constexpr, resident, tile_iter):
    """Wait for a consumer's part of the slot of tile `tile_iter`. Returns whether there is such a tile."""
    mbarrier.wait(resident.full.index((tile_iter & 1) * NUM_CONSUMERS + wg), (tile_iter >> 1) & 1)
    return is_valid_tile(resident.mailbox, tile_iter)


@gluon.jit
def load_consumer_tile(wg: gl.constexpr, resident, tile_iter, problem, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Consumer `wg`'s part of tile `tile_iter`: few values, because they stay in registers."""
    scheduled = load_scheduled_tile(resident.mailbox, tile_iter, problem, tiles, TRANSPOSED)
    key_origin = 0
    if problem.schedule is not None:
        key_origin = warp_uniform(scheduled.work_tile.key_origin)
    begin = warp_uniform(scheduled.work_tile.begin) + wg * CONSUMER_M
    num_partial = warp_uniform(scheduled.num_partial)
    if (
        (problem.schedule is None)
        & (problem.mods.bounds.window_left is None)
        & (problem.mods.bounds.window_right is None)
    ):
        # At most the last block of each head is masked. Knowing that, the compiler drops masks from the loop.
        num_partial = gl.minimum(num_partial, problem.group if TRANSPOSED else 1)
    return ConsumerTile(tile_iter, begin, key_origin, num_partial, warp_uniform(scheduled.num_blocks))


@gluon.jit
def is_empty(consumer, resident, problem):
    """Whether the tile ends before this consumer's rows."""
    work_tile, _ = load_tile_info(resident.mailbox, consumer.tile_iter, problem)
    return consumer.begin >= warp_uniform(work_tile.end)


@gluon.jit
def stage_results(tile, result, view, consumer, resident, problem, DIM: gl.constexpr):
    """Epilogue: put 64 rows of results where a resident operand was, for the producer to store. `view` is the
    TensorView of their tensor.
    """
    tile = tile.reshape([CONSUMER_M, DIM])
    tile.store(result.to(tile.dtype))
    if problem.schedule is not None:
        work_tile, head = load_tile_info(resident.mailbox, consumer.tile_iter, problem)
        if consumer.begin + CONSUMER_M > work_tile.end:
            # The TMA box extends into the next sequence: store only this one's rows.
            store_smem_rows(view, work_tile.batch, head, consumer.begin, work_tile.end, tile, DIM)
    fence_async_shared()


@gluon.jit
def produce(pipeline, i, first, second, batch, head, start, publish, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Acquire the stage of block `i`, publish its first row and head if `publish`, and load both tiles."""
    stage, phase = i % pipeline.stages, (i // pipeline.stages) & 1
    full = pipeline.full.index(stage)
    mbarrier.wait(pipeline.empty.index(stage), phase ^ 1)
    if publish:
        smem_store(pipeline.block_info, stage * BLOCK_INFO_WORDS, start)
        smem_store(pipeline.block_info, stage * BLOCK_INFO_WORDS + 1, head)
        barrier()
    mbarrier.expect(full, 2 * BLOCK * DIM * 2)
    tma_load(first, [batch, head, start, 0], full, pipeline.first.index(stage))
    tma_load(second, [batch, head, start, 0], full, pipeline.second.index(stage))


@gluon.jit
def consumer_wait(pipeline, i):
    """Wait until block `i` is full."""
    mbarrier.wait(pipeline.full.index(i % pipeline.stages), (i // pipeline.stages) & 1)


@gluon.jit
def load_block_info(pipeline, i):
    """First row and head of block `i`, which must be full and have been published."""
    word = i % pipeline.stages * BLOCK_INFO_WORDS
    return smem_load(pipeline.block_info, word), smem_load(pipeline.block_info, word + 1)


@gluon.jit
def q_block(scheduled, problem, i, PARTIAL: gl.constexpr, tiles: gl.constexpr):
    """Head and first query of the `i`-th masked (PARTIAL) or full block of a key tile; heads of the group in turn."""
    block_range, head = scheduled.block_range, scheduled.head
    if problem.group != 1:
        blocks_per_head = (
            block_range.num_partial if PARTIAL else (block_range.full_end - block_range.full_begin) // tiles.m
        )
        head = scheduled.head * problem.group + i // blocks_per_head
        i = i % blocks_per_head
    if PARTIAL:
        position = partial_block_position(block_range, i, tiles.m, tiles)
    else:
        position = block_range.full_begin + i * tiles.m
    return head, block_start(block_range, problem.mods.blocks, position, tiles)


@gluon.jit
def stage_tile(tiles, pipeline, i, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Tile of block `i` in `tiles`, the `first` or `second` of a pipeline."""
    return tiles.index(i % pipeline.stages).reshape([BLOCK, DIM])


@gluon.jit
def consumer_release(pipeline, i):
    """Release the stage of block `i`."""
    mbarrier.arrive(pipeline.empty.index(i % pipeline.stages), count=1)


@gluon.jit
def drain(pipeline, begin, end):
    """Wait for blocks `[begin, end)` and release them unused."""
    for i in range(begin, end):
        consumer_wait(pipeline, i)
        consumer_release(pipeline, i)


@gluon.jit
def zero_outside(pipeline, i, mailbox, consumer, problem, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Wait for block `i`, a masked one, and zero the rows that the tile does not see."""
    consumer_wait(pipeline, i)
    start, _ = load_block_info(pipeline, i)
    work_tile, _ = load_tile_info(mailbox, consumer.tile_iter, problem)
    if (start < work_tile.lo) | (start + BLOCK > work_tile.hi):
        zero_rows(stage_tile(pipeline.first, pipeline, i, BLOCK, DIM), start, work_tile.lo, work_tile.hi, BLOCK, DIM)
        zero_rows(stage_tile(pipeline.second, pipeline, i, BLOCK, DIM), start, work_tile.lo, work_tile.hi, BLOCK, DIM)


@gluon.jit
def issue_s_dp(
    i, step, first, second, zero, consumer, smem, problem, MASKED: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr
):
    """Issue S^T or S, and dP^T or dP: the two resident tiles times those of the tile's `i`-th block, block `step` of
    the pipeline, transposed. Without `MASKED` it must be a full block.
    """
    pipeline = smem.pipeline
    if MASKED and (i < consumer.num_partial):
        zero_outside(pipeline, step, smem.resident.mailbox, consumer, problem, BLOCK, DIM)
    consumer_wait(pipeline, step)
    tile = stage_tile(pipeline.first, pipeline, step, BLOCK, DIM)
    s = warpgroup_mma(first, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    tile = stage_tile(pipeline.second, pipeline, step, BLOCK, DIM)
    dp = warpgroup_mma(second, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp
