"""dQ kernel for Hopper: dQ = scale * dS K with dS = P * (dP - delta). No atomics; deterministic.

Warps: two consumer warpgroups, 64 queries each; one producer warp (TMA loads, TMA store of dQ); one scheduler warp
(tile_scheduler.py). Q and dO are resident in two slots; O, then blocks of K and V, stream through STAGES stages
(bwd_pipeline.py). Consumers first compute delta from O and dO, and store the row statistics for the kernels that
follow (row_stats.py).

dS feeds dS K from registers. That product is issued one block late, after S and dP of the next block, and overlaps the
computation of that block's P.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.gluon_sm90.bwd_pipeline import (
    allocate_pipeline,
    allocate_resident,
    consumer_release,
    consumer_wait,
    drain,
    is_empty,
    issue_s_dp,
    load_block_info,
    load_consumer_tile,
    load_resident,
    produce,
    stage_results,
    stage_tile,
    store_results,
    wait_resident,
)
from hf_flashbsa.kernels.gluon_sm90.compat import tma_load
from hf_flashbsa.kernels.gluon_sm90.mask import apply_window_mask
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M, NUM_CONSUMERS, Problem
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import (
    is_valid_tile,
    load_scheduled_tile,
    load_tile_info,
    scheduler_warp,
)
from hf_flashbsa.kernels.structs import AttnMods, Tiles
from hf_flashbsa.kernels.triton.block_range import block_start, partial_block_position
from hf_flashbsa.kernels.triton.mask import apply_segment_mask, needs_segment_mask, visible_mask, window_mask
from hf_flashbsa.kernels.triton.row_stats import load_row_stats, store_row_stats
from hf_flashbsa.kernels.triton.score import dropout_keep, softmax_scale_log2


class DqStorage(NamedTuple):
    """Shared memory: resident Q and dO; a pipeline of O, then K and V."""

    resident: object
    pipeline: object


class StatsArgs(NamedTuple):
    """Arguments of the row statistics: `lse` and `dlse`, and where they are stored."""

    lse: object
    dlse: object
    stats: object
    stats_stride: object


@gluon.jit
def _produce_out(pipeline, i, out, scheduled, tiles: gl.constexpr):
    """Load O of a tile as block `i` of the pipeline."""
    stage, phase = i % pipeline.stages, (i // pipeline.stages) & 1
    full = pipeline.full.index(stage)
    batch, begin = scheduled.work_tile.batch, scheduled.work_tile.begin
    mbarrier.wait(pipeline.empty.index(stage), phase ^ 1)
    mbarrier.expect(full, tiles.m * tiles.d * 2)
    tma_load(out, [batch, scheduled.head, begin, 0], full, pipeline.first.index(stage))
    if tiles.n == CONSUMER_M:
        tma_load(out, [batch, scheduled.head, begin + CONSUMER_M, 0], full, pipeline.second.index(stage))


@gluon.jit
def _out_tile(wg: gl.constexpr, pipeline, i, tiles: gl.constexpr):
    """Consumer `wg`'s 64 rows of O, from block `i` of the pipeline."""
    if tiles.n == CONSUMER_M:
        return stage_tile(pipeline.first if wg == 0 else pipeline.second, pipeline, i, CONSUMER_M, tiles.d)
    else:
        return stage_tile(pipeline.first, pipeline, i, tiles.n, tiles.d).slice(wg * CONSUMER_M, CONSUMER_M)


@gluon.jit
def _produce_kv(i, step, k, v, scheduled, tile_iter, smem, problem, tiles: gl.constexpr):
    """Load the tile's `i`-th block of K and V as block `step` of the pipeline."""
    is_partial = i < scheduled.num_partial
    if is_partial:
        # Reload the tile from the mailbox: the producer has few registers.
        masked_tile = load_scheduled_tile(smem.resident.mailbox, tile_iter, problem, tiles, False)
        position = partial_block_position(masked_tile.block_range, i, tiles.n, tiles)
    else:
        position = scheduled.block_range.full_begin + (i - scheduled.num_partial) * tiles.n
    start = block_start(scheduled.block_range, problem.mods.blocks, position, tiles)
    publish = is_partial if problem.mods.score_mod.seed is None else True  # dropout needs the position of every key
    produce(
        smem.pipeline,
        step,
        k,
        v,
        scheduled.work_tile.other_batch,
        scheduled.head // problem.group,
        start,
        publish,
        tiles.n,
        tiles.d,
    )


@gluon.jit
def _load_partition(q, dout, k, v, out, dq, smem, problem, tiles: gl.constexpr):
    """The producer warp."""
    resident = smem.resident
    # Once consumers have released a block of this tile, the results of the previous tile are in place.
    store_at = smem.pipeline.stages
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    load_resident(resident, tile_iter, q, dout, problem, tiles)
    while is_valid_tile(resident.mailbox, tile_iter):
        scheduled = load_scheduled_tile(resident.mailbox, tile_iter, problem, tiles, False)
        _produce_out(smem.pipeline, step, out, scheduled, tiles)
        step += 1
        for i in range(gl.maximum(scheduled.num_blocks, store_at + 2)):
            if i == store_at:
                store_results(resident, tile_iter + 1, dq, None, problem.len_q, problem)
            if i == store_at + 1:
                load_resident(resident, tile_iter + 1, q, dout, problem, tiles)
            if i < scheduled.num_blocks:
                _produce_kv(i, step + i, k, v, scheduled, tile_iter, smem, problem, tiles)
        step += scheduled.num_blocks
        tile_iter += 1
    store_results(resident, tile_iter + 1, dq, None, problem.len_q, problem)
    tma.store_wait(0)


@gluon.jit
def _preprocess(wg: gl.constexpr, step, queries, do_tile, stats_args, consumer, smem, problem, tiles: gl.constexpr):
    """Row statistics of a consumer's queries; delta = rowsum(O * dO) - dlse. Releases block `step`, which holds O."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([tiles.d // 16, 8], [32 * 8 // tiles.d, tiles.d // 8], [4, 1], [1, 0])
    score_mod = problem.mods.score_mod
    work_tile, head = load_tile_info(smem.resident.mailbox, consumer.tile_iter, problem)
    batch_head, in_range = work_tile.batch * problem.heads + head, queries < work_tile.end
    row_stats = load_row_stats(
        stats_args.lse, stats_args.dlse, score_mod, batch_head, queries, in_range, problem.len_q
    )
    consumer_wait(smem.pipeline, step)
    out, dout = _out_tile(wg, smem.pipeline, step, tiles).load(LAYOUT), do_tile.load(LAYOUT)
    out_dot_dout = gl.convert_layout(gl.sum(out.to(gl.float32) * dout.to(gl.float32), 1), queries.type.layout)
    consumer_release(smem.pipeline, step)
    return store_row_stats(
        row_stats,
        out_dot_dout,
        stats_args.stats,
        stats_args.stats_stride,
        score_mod,
        batch_head,
        queries,
        in_range,
        problem.len_q,
    )


@gluon.jit
def _k_stage(smem, i, tiles: gl.constexpr):
    """K of block `i`."""
    return stage_tile(smem.pipeline.first, smem.pipeline, i, tiles.n, tiles.d)


@gluon.jit
def _recompute_p(i, step, s, row_stats, consumer, smem, problem, MASKED: gl.constexpr, tiles: gl.constexpr):
    """P of the tile's `i`-th block, block `step` of the pipeline, before dropout."""
    mods = problem.mods
    if MASKED and (i < consumer.num_partial):
        work_tile, head = load_tile_info(smem.resident.mailbox, consumer.tile_iter, problem)
        start, _ = load_block_info(smem.pipeline, step)
        queries = consumer.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, s.type.layout))
        keys = start + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
        if (tiles.sparse_block > 0) and (
            mods.blocks.mask_words is not None
        ):  # one combined mask takes fewer registers here
            in_window = window_mask(
                mods.bounds, queries, keys, work_tile.end, work_tile.lo, work_tile.hi, work_tile.query_offset, False
            )
            ok = visible_mask(
                mods, work_tile.batch, head, queries[:, None], keys[None, :], in_window, work_tile.query_origin,
                work_tile.key_origin, consumer.begin, start, tiles,
            )  # fmt: skip
            s = gl.where(ok, s, float("-inf"))
        else:
            s = apply_window_mask(
                s, mods, consumer.begin, start, work_tile.lo, work_tile.hi, work_tile.query_offset, tiles, False
            )
        s = apply_segment_mask(
            s,
            mods.bounds,
            work_tile.batch,
            work_tile.other_batch,
            needs_segment_mask(work_tile),
            queries[:, None],
            keys[None, :],
        )
    return gl.exp2(s * softmax_scale_log2(mods) - row_stats.lse_log2[:, None])


@gluon.jit
def _compute_ds(step, p, dp, row_stats, consumer, smem, score_mod):
    """dS = P * (dP - delta) of block `step`; dP behind dropout."""
    if score_mod.seed is not None:
        start, _ = load_block_info(smem.pipeline, step)
        offsets = gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, p.type.layout))[None, :]
        keep = dropout_keep(
            score_mod, row_stats.pad[:, None], row_stats.factor[:, None], start - consumer.key_origin, offsets
        )
        dp = gl.where(keep, dp * score_mod.keep_scale, 0.0)
    return p * (dp - row_stats.delta[:, None])


@gluon.jit
def _mainloop_blocks(
    begin, end, step, ds, dq, q_tile, do_tile, zero, row_stats, consumer, smem, problem, DS: gl.constexpr,
    MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """Blocks `[begin, end)`: dQ += dS K of the previous block, then dS of this one. Takes dS of block `begin - 1`,
    returns that of block `end - 1`. No masks unless MASKED.
    """
    dtype: gl.constexpr = smem.resident.first.dtype
    for i in range(begin, end):
        step_i, step_prev = step + i, step + i - 1
        s, dp = issue_s_dp(i, step_i, q_tile, do_tile, zero, consumer, smem, problem, MASKED, tiles.n, tiles.d)
        dq_next = warpgroup_mma(ds, _k_stage(smem, step_prev, tiles), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s,))
        p = _recompute_p(i, step_i, s, row_stats, consumer, smem, problem, MASKED, tiles)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds_next = _compute_ds(step_i, p, dp, row_stats, consumer, smem, problem.mods.score_mod)
        # The wgmma in flight reads `ds` from registers: keep it alive until the wait.
        dq, _ = warpgroup_mma_wait(0, deps=(dq_next, ds))
        consumer_release(smem.pipeline, step_prev)
        ds = gl.convert_layout(ds_next.to(dtype), DS)
    return ds, dq


@gluon.jit
def _mainloop(
    step, dq, q_tile, do_tile, row_stats, consumer, smem, problem, S: gl.constexpr, DS: gl.constexpr,
    PEEL_MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """dQ of a tile whose first block is block `step`. PEEL_MASKED: full blocks run in a loop of their own."""
    dtype: gl.constexpr = smem.resident.first.dtype
    zero = gl.zeros([CONSUMER_M, tiles.n], gl.float32, S)
    if tiles.n == 64:
        # Q from registers: with N = 64, wgmma is bound by shared-memory reads of both operands. N = 128 leaves no
        # registers for it.
        q_tile = q_tile.load(gl.DotOperandLayout(0, S, 2))
    s, dp = issue_s_dp(0, step, q_tile, do_tile, zero, consumer, smem, problem, True, tiles.n, tiles.d)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = _recompute_p(0, step, s, row_stats, consumer, smem, problem, True, tiles)
    ds = gl.convert_layout(_compute_ds(step, p, dp, row_stats, consumer, smem, problem.mods.score_mod).to(dtype), DS)
    masked_end = consumer.num_blocks
    if PEEL_MASKED:
        masked_end = gl.maximum(consumer.num_partial, 1)
    ds, dq = _mainloop_blocks(
        1, masked_end, step, ds, dq, q_tile, do_tile, zero, row_stats, consumer, smem, problem, DS, True, tiles
    )
    if PEEL_MASKED:
        ds, dq = _mainloop_blocks(
            masked_end,
            consumer.num_blocks,
            step,
            ds,
            dq,
            q_tile,
            do_tile,
            zero,
            row_stats,
            consumer,
            smem,
            problem,
            DS,
            False,
            tiles,
        )
    step_prev = step + consumer.num_blocks - 1
    dq = warpgroup_mma(ds, _k_stage(smem, step_prev, tiles), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    consumer_release(smem.pipeline, step_prev)
    return dq


@gluon.jit
def _consumer(wg: gl.constexpr, dq_view, stats_args, smem, problem, tiles: gl.constexpr, PEEL_MASKED: gl.constexpr):
    """Consumer warpgroup `wg`: 64 queries of each tile. wgmma is drained in each iteration."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.n, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    DS: gl.constexpr = gl.DotOperandLayout(0, DQ, 2)
    resident = smem.resident
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    while wait_resident(wg, resident, tile_iter):
        slot = (tile_iter & 1) * NUM_CONSUMERS + wg
        consumer = load_consumer_tile(wg, resident, tile_iter, problem, tiles, False)
        queries = consumer.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, S))
        q_tile = resident.first.index(slot).reshape([CONSUMER_M, tiles.d])
        do_tile = resident.second.index(slot).reshape([CONSUMER_M, tiles.d])
        row_stats = _preprocess(wg, step, queries, do_tile, stats_args, consumer, smem, problem, tiles)
        step += 1
        dq = gl.zeros([CONSUMER_M, tiles.d], gl.float32, DQ)
        if is_empty(consumer, resident, problem):
            drain(smem.pipeline, step, step + consumer.num_blocks)
        elif consumer.num_blocks > 0:
            dq = _mainloop(step, dq, q_tile, do_tile, row_stats, consumer, smem, problem, S, DS, PEEL_MASKED, tiles)
        stage_results(
            resident.first.index(slot),
            dq * problem.mods.score_mod.scale,
            dq_view,
            consumer,
            resident,
            problem,
            tiles.d,
        )
        mbarrier.arrive(resident.empty.index(slot), count=1)
        step += consumer.num_blocks
        tile_iter += 1


@gluon.jit
def _consumer_0(dq_view, stats_args, smem, problem, tiles: gl.constexpr, PEEL_MASKED: gl.constexpr):
    _consumer(0, dq_view, stats_args, smem, problem, tiles, PEEL_MASKED)


@gluon.jit
def _consumer_1(dq_view, stats_args, smem, problem, tiles: gl.constexpr, PEEL_MASKED: gl.constexpr):
    _consumer(1, dq_view, stats_args, smem, problem, tiles, PEEL_MASKED)


@gluon.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "total_tiles", "stats_stride"])
def dq_kernel(
    dout, dq, dq_view, q, k, v, out, lse, dlse, stats, stats_stride, schedule, tile_counter, bounds, dense_mask,
    blocks, score_mod, bias, query_offset, heads, group, len_q, len_k, num_tiles, total_tiles, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PEEL_MASKED: gl.constexpr, SPARSE_BLOCK: gl.constexpr,
    MAX_BLOCKS_POW2: gl.constexpr,
):  # fmt: skip
    """Writes `dq` and `stats`. `dout`, `dq`, `q`, `k`, `v`, `out` are TMA descriptors of `(B, H, S, D)`, boxes of 64
    (dout, dq, q) or BLOCK_N rows; `dq_view` is `dq` as a TensorView, for tiles whose box extends into another
    sequence.

    PEEL_MASKED pays where more than the first block is masked. K of a block is needed one iteration longer than V:
    blocks prefetch from STAGES = 3 on. Grid: persistent programs that share `total_tiles` tiles of 128 queries.
    """
    tiles: gl.constexpr = Tiles(
        NUM_CONSUMERS * CONSUMER_M, BLOCK_N, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    # Spelled out: of a function's result, Triton 3.6 does not know that it is a constant.
    gl.static_assert(
        (score_mod.softcap is None) and (bias.ptr is None) and (score_mod.alibi_slopes is None),
        "scores are only scaled",
    )
    problem = Problem(schedule, mods, query_offset, heads, group, len_q, len_k, num_tiles, total_tiles, tile_counter)
    smem = DqStorage(
        allocate_resident(q, dout, HEAD_DIM, 1),
        allocate_pipeline(k, v, BLOCK_N, HEAD_DIM, STAGES, 1),
    )
    stats_args = StatsArgs(lse, dlse, stats, stats_stride)
    gl.warp_specialize(
        [
            (_consumer_0, (dq_view, stats_args, smem, problem, tiles, PEEL_MASKED)),
            (_consumer_1, (dq_view, stats_args, smem, problem, tiles, PEEL_MASKED)),
            (_load_partition, (q, dout, k, v, out, dq, smem, problem, tiles)),
            (scheduler_warp, (smem.resident.mailbox, problem, tiles, False)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
