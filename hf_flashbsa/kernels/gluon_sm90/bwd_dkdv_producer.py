"""The producer warp of the dK/dV kernel: TMA loads of K, V, Q and dO, row statistics, and TMA stores of dK and dV."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hf_flashbsa.kernels.gluon_sm90.bwd_pipeline import load_resident, produce, q_block, store_results
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import is_valid_tile, load_scheduled_tile
from hf_flashbsa.kernels.triton.row_stats import DELTA, DROPOUT_FACTOR, DROPOUT_PAD, LSE_LOG2


@gluon.jit
def _produce_q(i, step, q, dout, stats, stats_stride, scheduled, tile_iter, smem, problem, tiles: gl.constexpr):
    """Load the tile's `i`-th block of Q and dO and its row statistics, as block `step` of the pipeline."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([tiles.m // 32], [32], [1], [0])
    is_partial = i < scheduled.num_partial
    lo, hi = gl.to_tensor(0), gl.to_tensor(problem.len_q)
    if is_partial:
        # Reload the tile from the mailbox: the producer has few registers.
        masked_tile = load_scheduled_tile(smem.resident.mailbox, tile_iter, problem, tiles, True)
        head, start = q_block(masked_tile, problem, i, True, tiles)
        lo, hi = masked_tile.block_range.lo, masked_tile.block_range.hi
    else:
        head, start = q_block(scheduled, problem, i - scheduled.num_partial, False, tiles)
    queries = start + gl.arange(0, tiles.m, layout=LAYOUT)
    row = stats + (scheduled.work_tile.other_batch.to(gl.int64) * problem.heads + head) * problem.len_q + queries
    in_range = (queries >= lo) & (queries < hi)
    # Queries outside the range get P = 0. Loaded before the wait for the stage, which hides the latency.
    lse = gl.load(row, mask=in_range, other=float("inf"))
    delta = gl.load(row + stats_stride, mask=in_range, other=0.0)
    produce(smem.pipeline, step, q, dout, scheduled.work_tile.other_batch, head, start, is_partial, tiles.m, tiles.d)
    stage = step % smem.pipeline.stages
    word = stage * smem.stats_words
    smem.row_stats.index(word + LSE_LOG2).store(lse)
    smem.row_stats.index(word + DELTA).store(delta)
    if problem.mods.score_mod.seed is not None:
        smem.row_stats.index(word + DROPOUT_PAD).store(
            gl.load(row + DROPOUT_PAD * stats_stride, mask=in_range, other=0.0)
        )
        smem.row_stats.index(word + DROPOUT_FACTOR).store(
            gl.load(row + DROPOUT_FACTOR * stats_stride, mask=in_range, other=0.0)
        )
    mbarrier.arrive(smem.pipeline.full.index(stage), count=1)


@gluon.jit
def load_partition(q, dout, k, v, dk, dv, stats, stats_stride, smem, problem, tiles: gl.constexpr):
    """The producer warp."""
    resident = smem.resident
    # Once consumers have released a block of this tile, the results of the previous tile are in place.
    store_at = smem.pipeline.stages + 1
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    load_resident(resident, tile_iter, k, v, problem, tiles)
    while is_valid_tile(resident.mailbox, tile_iter):
        scheduled = load_scheduled_tile(resident.mailbox, tile_iter, problem, tiles, True)
        for i in range(gl.maximum(scheduled.num_blocks, store_at + 2)):
            if i == store_at:
                store_results(resident, tile_iter + 1, dk, dv, problem.len_k, problem)
            if i == store_at + 1:
                load_resident(resident, tile_iter + 1, k, v, problem, tiles)
            if i < scheduled.num_blocks:
                _produce_q(i, step + i, q, dout, stats, stats_stride, scheduled, tile_iter, smem, problem, tiles)
        step += scheduled.num_blocks
        tile_iter += 1
    store_results(resident, tile_iter + 1, dk, dv, problem.len_k, problem)
    tma.store_wait(0)
