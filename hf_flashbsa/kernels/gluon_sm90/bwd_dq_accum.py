"""Fused dQ: a third consumer warpgroup of the dK/dV kernel computes dS K and accumulates it in fp32 with TMA
reduce-add.

Consumers put dS^T of each block into shared memory (DS_STAGES stages, full/empty mbarriers). Five matmuls per block
where separate dQ and dK/dV kernels need seven; the order of the additions is not fixed, so dQ is not deterministic.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_flashbsa.kernels.gluon_sm90.bwd_pipeline import q_block, wait_resident
from hf_flashbsa.kernels.gluon_sm90.compat import barrier, tma_reduce_add
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M, NUM_CONSUMERS
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import load_scheduled_tile

#: Stages of dS, and of dS K.
DS_STAGES = gl.constexpr(2)


class DsPipeline(NamedTuple):
    """Shared memory: stages of dS^T, 64 keys of each consumer by BLOCK_M queries, with full and empty mbarriers; and
    stages of dS K on their way to global memory.
    """

    ds_tiles: object
    full: object
    empty: object
    dq_tiles: object


class DsProducer(NamedTuple):
    """A consumer's end of the DsPipeline: consumer index, and the end of its sequence. None without a dQ warpgroup,
    and then its functions do nothing.
    """

    ds_pipeline: object
    wg: object
    end: object


@gluon.jit
def allocate_ds_pipeline(dq_accum, dtype: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Stages for blocks of BLOCK queries; `dq_accum` is the descriptor that dS K is added to."""
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([CONSUMER_M, BLOCK], dtype)
    ds_tiles = gl.allocate_shared_memory(dtype, [DS_STAGES * NUM_CONSUMERS, CONSUMER_M, BLOCK], DS)
    dq_tiles = gl.allocate_shared_memory(gl.float32, [DS_STAGES, 1, 1, BLOCK, DIM], dq_accum.layout)
    full = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [DS_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(DS_STAGES):
        mbarrier.init(full.index(stage), count=NUM_CONSUMERS)
        mbarrier.init(empty.index(stage), count=1)
    return DsPipeline(ds_tiles, full, empty, dq_tiles)


@gluon.jit
def zero_past_end(ds, consumer, ds_producer):
    """dS with 0 for rows past the last key: nothing else masks them in dS K."""
    if ds_producer is not None:
        if consumer.begin + CONSUMER_M > ds_producer.end:
            keys = consumer.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, ds.type.layout))
            ds = gl.where((keys < ds_producer.end)[:, None], ds, gl.zeros_like(ds))
    return ds


@gluon.jit
def produce_ds(step, ds, ds_producer):
    """Put a consumer's dS of block `step` into its stage."""
    if ds_producer is not None:
        ds_pipeline = ds_producer.ds_pipeline
        stage = step % DS_STAGES
        mbarrier.wait(ds_pipeline.empty.index(stage), (step // DS_STAGES & 1) ^ 1)
        ds_pipeline.ds_tiles.index(stage * NUM_CONSUMERS + ds_producer.wg).store(ds)
        fence_async_shared()
        mbarrier.arrive(ds_pipeline.full.index(stage), count=1)


@gluon.jit
def wait_ds_consumed(step, ds_producer):
    """Wait until dS up to block `step`, and with it K of the tile, is consumed."""
    if ds_producer is not None:
        mbarrier.wait(ds_producer.ds_pipeline.empty.index(step % DS_STAGES), step // DS_STAGES & 1)


@gluon.jit
def _issue_dq(step, slot, zero, resident, ds_pipeline, tiles: gl.constexpr):
    """Wait for dS of block `step` and issue dS K with K of a slot."""
    stage = step % DS_STAGES
    mbarrier.wait(ds_pipeline.full.index(stage), step // DS_STAGES & 1)
    dq = zero
    for wg in gl.static_range(NUM_CONSUMERS):
        ds_tile = ds_pipeline.ds_tiles.index(stage * NUM_CONSUMERS + wg).permute((1, 0))
        k_tile = resident.first.index(slot * NUM_CONSUMERS + wg).reshape([CONSUMER_M, tiles.d])
        dq = warpgroup_mma(ds_tile, k_tile, dq, use_acc=wg > 0, is_async=True)
    return dq


@gluon.jit
def _wait_dq(dq, step, ds_pipeline):
    """Wait for dS K of block `step` and release its stage."""
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(ds_pipeline.empty.index(step % DS_STAGES), count=1)
    return dq


@gluon.jit
def _reduce_add_dq(dq_accum, dq, i, step, scheduled, ds_pipeline, problem, tiles: gl.constexpr):
    """Add dS K of the tile's `i`-th block, block `step` of the pipeline, to `dq_accum`."""
    if i < scheduled.num_partial:
        head, start = q_block(scheduled, problem, i, True, tiles)
    else:
        head, start = q_block(scheduled, problem, i - scheduled.num_partial, False, tiles)
    tma.store_wait(DS_STAGES - 1)  # one thread waits for the TMA, and the barrier for it
    barrier()
    dq_tiles = ds_pipeline.dq_tiles.index(step % DS_STAGES)
    dq_tiles.reshape([tiles.m, tiles.d]).store(dq)
    fence_async_shared()
    barrier()
    tma_reduce_add(dq_accum, [scheduled.work_tile.other_batch, head, start, 0], dq_tiles)


@gluon.jit
def dq_partition(dq_accum, smem, problem, tiles: gl.constexpr):
    """The dQ warpgroup. `dq_accum` is a descriptor of float32 `(B, H, S, D)`, boxes of `tiles.m` rows."""
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    resident, ds_pipeline = smem.resident, smem.ds_pipeline
    zero = gl.zeros([tiles.m, tiles.d], gl.float32, DQ)
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    while wait_resident(0, resident, tile_iter):
        slot = tile_iter & 1
        mbarrier.wait(resident.full.index(slot * NUM_CONSUMERS + 1), (tile_iter >> 1) & 1)
        scheduled = load_scheduled_tile(resident.mailbox, tile_iter, problem, tiles, True)
        if scheduled.num_blocks > 0:
            dq = _wait_dq(_issue_dq(step, slot, zero, resident, ds_pipeline, tiles), step, ds_pipeline)
            for i in range(1, scheduled.num_blocks):
                dq_next = _issue_dq(step + i, slot, zero, resident, ds_pipeline, tiles)
                _reduce_add_dq(dq_accum, dq, i - 1, step + i - 1, scheduled, ds_pipeline, problem, tiles)
                dq = _wait_dq(dq_next, step + i, ds_pipeline)
            last = scheduled.num_blocks - 1
            _reduce_add_dq(dq_accum, dq, last, step + last, scheduled, ds_pipeline, problem, tiles)
        for wg in gl.static_range(NUM_CONSUMERS):
            mbarrier.arrive(resident.empty.index(slot * NUM_CONSUMERS + wg), count=1)
        step += scheduled.num_blocks
        tile_iter += 1
    tma.store_wait(0)
