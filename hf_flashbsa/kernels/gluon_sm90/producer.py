"""The producer of the forward kernel: one warp that loads Q, K and V by TMA and stores O by TMA.

- Q: Q_STAGES tiles of 64 rows per consumer, `q_full`/`q_empty`. The consumer's epilogue leaves O in the Q stage.
- K and V: STAGES blocks each, `k_full`/`k_empty` and `v_full`/`v_empty`. V of a block is loaded after K of the next
  one,
because a consumer needs those two at the same time.
- With each K block the producer publishes what to do with it (`block_info`), so that consumers need no schedule.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hf_flashbsa.kernels.gluon_sm90.compat import barrier, tma_load, tma_store
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M, NUM_CONSUMERS, smem_store, zero_rows
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import (
    allocate_mailbox,
    count_blocks,
    is_valid_tile,
    kv_block_start,
    load_consumer_tile_info,
    load_scheduled_tile,
    load_tile_info,
    prefetch_next_tile,
    wait_tile,
)
from hf_flashbsa.kernels.triton.mask import block_pointer


class FwdStorage(NamedTuple):
    """Shared memory of the forward kernel: stages of Q (later O), K and V with their mbarriers, and the tile
    mailbox.
    """

    q_tiles: object
    k_tiles: object
    v_tiles: object
    q_full: object
    q_empty: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    v_loaded: object
    block_info: object
    mailbox: object


class KvBlock(NamedTuple):
    """Where a K/V block lies, and the keys `[lo, hi)` that its tile sees at all."""

    batch: object
    head: object
    start: object
    lo: object
    hi: object


#: Stages of Q (and O). With two, a tile of a single block would stall the next tile's Q until O is stored.
Q_STAGES = gl.constexpr(3)
#: Issue the load of Q this many blocks before its tile begins, and ask for the tile this many blocks before that. Not
#: earlier: a tile that is not claimed yet may still go to a program that finishes sooner.
Q_PREFETCH = gl.constexpr(4)
TILE_PREFETCH = gl.constexpr(4)
#: Words of `block_info` per stage: first key, flags, grid entry, number of full blocks that follow unmasked.
BLOCK_INFO_WORDS = gl.constexpr(4)
INFO_START = gl.constexpr(0)
INFO_FLAGS = gl.constexpr(1)
INFO_KIND = gl.constexpr(2)
INFO_UNMASKED = gl.constexpr(3)
#: Flags: the block needs a mask; it, or the unmasked blocks after it, end the tile; no block, all tiles are done.
NEEDS_MASK = gl.constexpr(1)
LAST_BLOCK = gl.constexpr(2)
END_OF_WORK = gl.constexpr(4)


@gluon.jit
def allocate_fwd_storage(q, k, v, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Q_STAGES query tiles per consumer, STAGES blocks of keys and of values, and their mbarriers."""
    NUM_Q_TILES: gl.constexpr = Q_STAGES * NUM_CONSUMERS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    smem = FwdStorage(
        gl.allocate_shared_memory(q.dtype, [NUM_Q_TILES, 1, 1, CONSUMER_M, HEAD_DIM], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v.layout),
        gl.allocate_shared_memory(gl.int64, [NUM_Q_TILES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [NUM_Q_TILES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int32, [STAGES * BLOCK_INFO_WORDS, 1], WORD),
        allocate_mailbox(),
    )
    mbarrier.init(smem.v_loaded, count=1)
    for slot in gl.static_range(NUM_Q_TILES):
        mbarrier.init(smem.q_full.index(slot), count=1)
        mbarrier.init(smem.q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(smem.k_full.index(stage), count=1)
        mbarrier.init(smem.v_full.index(stage), count=1)
        mbarrier.init(smem.k_empty.index(stage), count=NUM_CONSUMERS)
        mbarrier.init(smem.v_empty.index(stage), count=NUM_CONSUMERS)
    return smem


@gluon.jit
def _next_kv_block(problem, block_range, grid_row, index, tiles: gl.constexpr):
    """First key of the `index`-th visited block and its grid entry; entry 0 means nothing is visible."""
    start = kv_block_start(block_range, problem.mods.blocks, index, tiles)
    block_kind = gl.where(count_blocks(block_range, tiles) > 0, 1, 0)
    if tiles.sparse_block > 0:
        if problem.mods.blocks.mask_words is not None:
            if index < block_range.num_partial:
                block_kind = gl.load(grid_row + (start - block_range.origin) // tiles.sparse_block)
    return start, block_kind


@gluon.jit
def _drain_q_stage(out, smem, tile_iter, problem):
    """Wait until the Q stage of tile `tile_iter` may be overwritten, and TMA-store the output that the epilogue of
    tile `tile_iter - Q_STAGES` left there.
    """
    for wg in gl.static_range(NUM_CONSUMERS):
        slot = tile_iter % Q_STAGES * NUM_CONSUMERS + wg
        mbarrier.wait(smem.q_empty.index(slot), ((tile_iter // Q_STAGES) & 1) ^ 1)
        if tile_iter >= Q_STAGES:
            work_tile, head = load_consumer_tile_info(wg, smem.mailbox, tile_iter - Q_STAGES, problem)
            begin = work_tile.begin
            if problem.schedule is not None:
                # TMA clips at the end of the tensor. Consumers store partial tiles themselves (`epilogue`).
                begin = gl.where(begin + CONSUMER_M > work_tile.end, problem.len_q, begin)
            tma_store(out, [work_tile.batch, head, begin, 0], smem.q_tiles.index(slot))
    tma.store_wait(0)


@gluon.jit
def _load_q(q, out, tile_iter, smem, problem, tiles: gl.constexpr):
    """Load the queries of tile `tile_iter`, or arrive without a load if there is no such tile."""
    _drain_q_stage(out, smem, tile_iter, problem)
    is_valid = wait_tile(smem.mailbox, tile_iter)
    work_tile, head = load_tile_info(smem.mailbox, tile_iter, problem)
    for wg in gl.static_range(NUM_CONSUMERS):
        slot = tile_iter % Q_STAGES * NUM_CONSUMERS + wg
        full, begin = smem.q_full.index(slot), work_tile.begin + wg * CONSUMER_M
        if is_valid:
            mbarrier.expect(full, CONSUMER_M * tiles.d * 2)
            tma_load(q, [work_tile.batch, head, begin, 0], full, smem.q_tiles.index(slot))
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def _publish_block(start, flags, block_kind, num_unmasked, step, smem, STAGES: gl.constexpr):
    """Acquire the stage of block `step` and write its `block_info`."""
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(smem.k_empty.index(stage), phase ^ 1)
    smem_store(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_START, start)
    smem_store(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_FLAGS, flags)
    smem_store(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_KIND, block_kind)
    smem_store(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_UNMASKED, num_unmasked)
    barrier()  # all threads have stored before one arrives


@gluon.jit
def _load_k(k, kv_block, step, smem, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Load the keys of block `step`, after `_publish_block`."""
    stage = step % STAGES
    full, tile = smem.k_full.index(stage), smem.k_tiles.index(stage)
    mbarrier.expect(full, tiles.n * tiles.d * 2)
    tma_load(k, [kv_block.batch, kv_block.head, kv_block.start, 0], full, tile)


@gluon.jit
def _load_v(v, kv_block, step, num_zeroed, smem, problem, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Load the values of block `step`. Rows that the tile does not see are zeroed here, before consumers are told of
    the block: it would cost them more than the wait costs the producer. Returns the number of blocks zeroed so far.
    """
    stage, phase = step % STAGES, (step // STAGES) & 1
    full, tile = smem.v_full.index(stage), smem.v_tiles.index(stage)
    mbarrier.wait(smem.v_empty.index(stage), phase ^ 1)
    # TMA fills with 0 beyond the end of the tensor.
    if (kv_block.start < kv_block.lo) | (gl.minimum(kv_block.start + tiles.n, problem.len_k) > kv_block.hi):
        mbarrier.expect(smem.v_loaded, tiles.n * tiles.d * 2)
        tma_load(v, [kv_block.batch, kv_block.head, kv_block.start, 0], smem.v_loaded, tile)
        mbarrier.wait(smem.v_loaded, num_zeroed & 1)
        zero_rows(tile, kv_block.start, kv_block.lo, kv_block.hi, tiles.n, tiles.d)
        mbarrier.arrive(full, count=1)
        num_zeroed += 1
    else:
        mbarrier.expect(full, tiles.n * tiles.d * 2)
        tma_load(v, [kv_block.batch, kv_block.head, kv_block.start, 0], full, tile)
    return num_zeroed


@gluon.jit
def load_partition(q, k, v, out, smem, problem, tiles: gl.constexpr, STAGES: gl.constexpr, PEEL_MASKED: gl.constexpr):
    """The producer warp. Q is loaded ahead of its tile, and V one block after K."""
    # K already runs STAGES blocks ahead.
    Q_LEAD: gl.constexpr = Q_PREFETCH - STAGES if STAGES < Q_PREFETCH else 0
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    num_zeroed, zero = gl.to_tensor(0), gl.to_tensor(0)
    prev = KvBlock(zero, zero, zero, zero, zero)
    _load_q(q, out, tile_iter, smem, problem, tiles)
    while is_valid_tile(smem.mailbox, tile_iter):
        scheduled = load_scheduled_tile(smem.mailbox, tile_iter, problem, tiles, False)
        work_tile, block_range = scheduled.work_tile, scheduled.block_range
        # At least one block, fully masked if the tile sees nothing.
        num_blocks = gl.maximum(scheduled.num_blocks, 1)
        head_k = scheduled.head // problem.group
        grid_row = 0
        if tiles.sparse_block > 0:
            if problem.mods.blocks.mask_words is not None:
                # A tile that visits nothing may lie outside the grid.
                row_begin = gl.where(scheduled.num_blocks > 0, work_tile.begin - work_tile.query_origin, 0)
                grid_row = block_pointer(problem.mods.blocks, work_tile.batch, scheduled.head, row_begin, 0, tiles)
        start, block_kind = _next_kv_block(problem, block_range, grid_row, 0, tiles)
        # Last block of the general loop; PEEL_MASKED runs the blocks after it unmasked.
        last_general = gl.maximum(block_range.num_partial - 1, 0) if PEEL_MASKED else num_blocks - 1
        q_load_at = gl.maximum(num_blocks - 1 - Q_LEAD, 0)
        tile_prefetch_at = gl.maximum(q_load_at - TILE_PREFETCH, 0)
        for i in range(num_blocks):
            # Prefetched while this iteration waits.
            next_start, next_kind = _next_kv_block(
                problem, block_range, grid_row, gl.minimum(i + 1, num_blocks - 1), tiles
            )
            flags = gl.where((i < block_range.num_partial) | (block_kind == 0), NEEDS_MASK, 0) | gl.where(
                i == last_general, LAST_BLOCK, 0
            )
            num_unmasked = gl.where(i == last_general, num_blocks - 1 - i, 0)
            _publish_block(start, flags, block_kind, num_unmasked, step, smem, STAGES)
            kv_block = KvBlock(
                gl.to_tensor(work_tile.other_batch),
                head_k,
                start,
                gl.to_tensor(work_tile.lo),
                gl.to_tensor(work_tile.hi),
            )
            _load_k(k, kv_block, step, smem, tiles, STAGES)
            if step > 0:
                num_zeroed = _load_v(v, prev, step - 1, num_zeroed, smem, problem, tiles, STAGES)
            prev = kv_block
            if i == tile_prefetch_at:
                prefetch_next_tile(tile_iter)
            # After V, which consumers may need before they release the Q stage.
            if i == q_load_at:
                _load_q(q, out, tile_iter + 1, smem, problem, tiles)
            start, block_kind = next_start, next_kind
            step += 1
        tile_iter += 1
    _publish_block(0, LAST_BLOCK | END_OF_WORK, 0, 0, step, smem, STAGES)
    mbarrier.arrive(smem.k_full.index(step % STAGES), count=1)
    if step > 0:
        _load_v(v, prev, step - 1, num_zeroed, smem, problem, tiles, STAGES)
    for i in gl.static_range(1, Q_STAGES):
        _drain_q_stage(out, smem, tile_iter + i, problem)
