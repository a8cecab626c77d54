"""dK/dV kernel for Hopper: dV = P^T dO, dK = scale * dS^T Q. Deterministic, unless it also accumulates dQ.

Warps: two consumer warpgroups, 64 keys each; one producer warp (TMA loads, TMA stores of dK and dV); one scheduler
warp (tile_scheduler.py). K and V are resident in two slots; blocks of Q and dO, with the row statistics of their
queries, stream through STAGES stages (bwd_pipeline.py), for every query head of the group. With `dq_accum`, a third
warpgroup accumulates dQ (bwd_dq_accum.py).

Scores are S^T, keys by queries, so that P^T and dS^T feed the last two products from registers.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.gluon_sm90.bwd_dkdv_producer import load_partition
from hf_flashbsa.kernels.gluon_sm90.bwd_dq_accum import (
    DsProducer,
    allocate_ds_pipeline,
    dq_partition,
    produce_ds,
    wait_ds_consumed,
    zero_past_end,
)
from hf_flashbsa.kernels.gluon_sm90.bwd_pipeline import (
    allocate_pipeline,
    allocate_resident,
    consumer_release,
    drain,
    is_empty,
    issue_s_dp,
    load_block_info,
    load_consumer_tile,
    stage_results,
    stage_tile,
    wait_resident,
)
from hf_flashbsa.kernels.gluon_sm90.mask import apply_window_mask
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M, NUM_CONSUMERS, Problem, warp_uniform
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import load_tile_info, scheduler_warp
from hf_flashbsa.kernels.structs import AttnMods, Tiles
from hf_flashbsa.kernels.triton.mask import apply_segment_mask, needs_segment_mask, visible_mask
from hf_flashbsa.kernels.triton.row_stats import DELTA, DROPOUT_FACTOR, DROPOUT_PAD, LSE_LOG2
from hf_flashbsa.kernels.triton.score import dropout_keep, softmax_scale_log2


class DkdvStorage(NamedTuple):
    """Shared memory: resident K and V; a pipeline of Q and dO; per stage `stats_words` rows of float32 statistics
    (lse_log2, delta, and with dropout pad and factor); the dS pipeline to the dQ warpgroup, or None.
    """

    resident: object
    pipeline: object
    row_stats: object
    stats_words: object
    ds_pipeline: object


class OutputViews(NamedTuple):
    """dK and dV as TensorViews."""

    dk: object
    dv: object


@gluon.jit
def _load_row_stat(i, word, smem, COLUMNS: gl.constexpr):
    """Row statistics of block `i`: the plane `word` of row_stats.py."""
    return smem.row_stats.index(i % smem.pipeline.stages * smem.stats_words + word).load(COLUMNS)


@gluon.jit
def _recompute_p(i, step, s, lse, consumer, smem, problem, MASKED: gl.constexpr, tiles: gl.constexpr):
    """P^T of the tile's `i`-th block, block `step` of the pipeline.

    Weights that dropout drops get a minus sign: both gradients need the mask, and a sign takes no registers.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    mods = problem.mods
    if MASKED and (i < consumer.num_partial):
        work_tile, _ = load_tile_info(smem.resident.mailbox, consumer.tile_iter, problem)
        start, head = load_block_info(smem.pipeline, step)
        queries = start + gl.arange(0, tiles.m, layout=COLUMNS)
        keys = consumer.begin + gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, s.type.layout))
        s = apply_window_mask(
            s, mods, consumer.begin, start, work_tile.lo, work_tile.hi, work_tile.query_offset, tiles, True
        )
        if (tiles.sparse_block > 0) and (mods.blocks.mask_words is not None):
            ok = visible_mask(
                mods, work_tile.other_batch, head, queries[None, :], keys[:, None], (keys < work_tile.end)[:, None],
                work_tile.query_origin, work_tile.key_origin, start, consumer.begin, tiles,
            )  # fmt: skip
            s = gl.where(ok, s, float("-inf"))
        s = apply_segment_mask(
            s,
            mods.bounds,
            work_tile.other_batch,
            work_tile.batch,
            needs_segment_mask(work_tile),
            queries[None, :],
            keys[:, None],
        )
    p = gl.exp2(s * softmax_scale_log2(mods) - lse[None, :])
    if mods.score_mod.seed is not None:
        pad = _load_row_stat(step, DROPOUT_PAD, smem, COLUMNS).to(gl.uint32, bitcast=True)
        factor = _load_row_stat(step, DROPOUT_FACTOR, smem, COLUMNS).to(gl.uint32, bitcast=True)
        offsets = gl.arange(0, CONSUMER_M, layout=gl.SliceLayout(1, s.type.layout))[:, None]
        key_pos = consumer.begin - consumer.key_origin
        p = gl.where(dropout_keep(mods.score_mod, pad[None, :], factor[None, :], key_pos, offsets), p, -p)
    return p


@gluon.jit
def _dropped_p(p, score_mod):
    """P after dropout, without keep_scale."""
    if score_mod.seed is not None:
        p = gl.maximum(p, 0.0)
    return p


@gluon.jit
def _compute_ds(p, dp, delta, score_mod):
    """dS = P * (dP - delta); dP behind dropout."""
    if score_mod.seed is not None:
        dp = gl.where(p > 0.0, dp * score_mod.keep_scale, 0.0)
        p = gl.abs(p)
    return p * (dp - delta[None, :])


@gluon.jit
def _q_stage(smem, i, tiles: gl.constexpr):
    """Q of block `i`."""
    return stage_tile(smem.pipeline.first, smem.pipeline, i, tiles.m, tiles.d)


@gluon.jit
def _do_stage(smem, i, tiles: gl.constexpr):
    """dO of block `i`."""
    return stage_tile(smem.pipeline.second, smem.pipeline, i, tiles.m, tiles.d)


@gluon.jit
def _issue_dk_dv(i, p, ds, dk, dv, smem, tiles: gl.constexpr):
    """Issue dV += P^T dO and dK += dS^T Q of block `i`."""
    dv = warpgroup_mma(p, _do_stage(smem, i, tiles), dv, is_async=True)
    dk = warpgroup_mma(ds, _q_stage(smem, i, tiles), dk, is_async=True)
    return dk, dv


@gluon.jit
def _finish_dk_dv(i, p, ds, dk, dv, smem, tiles: gl.constexpr):
    """dV and dK of the last block."""
    dk, dv = _issue_dk_dv(i, p, ds, dk, dv, smem, tiles)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    consumer_release(smem.pipeline, i)
    return dk, dv


@gluon.jit
def _first_block(step, k_tile, v_tile, zero, consumer, smem, problem, tiles: gl.constexpr):
    """P^T, dP^T and delta of the first block, block `step` of the pipeline."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    s, dp = issue_s_dp(0, step, k_tile, v_tile, zero, consumer, smem, problem, True, tiles.m, tiles.d)
    lse, delta = _load_row_stat(step, LSE_LOG2, smem, COLUMNS), _load_row_stat(step, DELTA, smem, COLUMNS)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    return _recompute_p(0, step, s, lse, consumer, smem, problem, True, tiles), dp, delta


@gluon.jit
def _dkv_overlap_blocks(
    begin, end, step, signed_p, dp, delta, dk, dv, k_tile, v_tile, zero, consumer, ds_producer, smem, problem,
    P_LAYOUT: gl.constexpr, MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """Blocks `[begin, end)` of `_dkv_overlap_mainloop`; no masks unless MASKED."""
    dtype: gl.constexpr = smem.resident.first.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    score_mod = problem.mods.score_mod
    for i in range(begin, end):
        step_i, step_prev = step + i, step + i - 1
        p = gl.convert_layout(_dropped_p(signed_p, score_mod).to(dtype), P_LAYOUT)
        dv_next = warpgroup_mma(p, _do_stage(smem, step_prev, tiles), dv, is_async=True)
        ds_cast = zero_past_end(_compute_ds(signed_p, dp, delta, score_mod).to(dtype), consumer, ds_producer)
        ds = gl.convert_layout(ds_cast, P_LAYOUT)
        dk_next = warpgroup_mma(ds, _q_stage(smem, step_prev, tiles), dk, is_async=True)
        s, dp_next = issue_s_dp(i, step_i, k_tile, v_tile, zero, consumer, smem, problem, MASKED, tiles.m, tiles.d)
        produce_ds(step_prev, ds_cast, ds_producer)
        lse = _load_row_stat(step_i, LSE_LOG2, smem, COLUMNS)
        s, dv, dk, _, _ = warpgroup_mma_wait(1, deps=(s, dv_next, dk_next, p, ds))
        consumer_release(smem.pipeline, step_prev)
        signed_p = _recompute_p(i, step_i, s, lse, consumer, smem, problem, MASKED, tiles)
        delta = _load_row_stat(step_i, DELTA, smem, COLUMNS)
        dp = warpgroup_mma_wait(0, deps=(dp_next,))
    return signed_p, dp, delta, dk, dv


@gluon.jit
def _dkv_overlap_mainloop(
    step, dk, dv, k_tile, v_tile, zero, consumer, ds_producer, smem, problem, P_LAYOUT: gl.constexpr,
    PEEL_MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """dK and dV of a tile, for head dim 64 (OVERLAP_DKV). After P of a block: issue its dV and dK, then S and dP of
    the next block; dP overlaps the computation of that block's P.
    """
    dtype: gl.constexpr = smem.resident.first.dtype
    score_mod = problem.mods.score_mod
    signed_p, dp, delta = _first_block(step, k_tile, v_tile, zero, consumer, smem, problem, tiles)
    masked_end = consumer.num_blocks
    if PEEL_MASKED:
        masked_end = gl.maximum(consumer.num_partial, 1)
    signed_p, dp, delta, dk, dv = _dkv_overlap_blocks(
        1, masked_end, step, signed_p, dp, delta, dk, dv, k_tile, v_tile, zero, consumer, ds_producer, smem, problem,
        P_LAYOUT, True, tiles,
    )  # fmt: skip
    if PEEL_MASKED:
        signed_p, dp, delta, dk, dv = _dkv_overlap_blocks(
            masked_end, consumer.num_blocks, step, signed_p, dp, delta, dk, dv, k_tile, v_tile, zero, consumer,
            ds_producer, smem, problem, P_LAYOUT, False, tiles,
        )  # fmt: skip
    p = gl.convert_layout(_dropped_p(signed_p, score_mod).to(dtype), P_LAYOUT)
    ds_cast = zero_past_end(_compute_ds(signed_p, dp, delta, score_mod).to(dtype), consumer, ds_producer)
    ds = gl.convert_layout(ds_cast, P_LAYOUT)
    step_prev = step + consumer.num_blocks - 1
    produce_ds(step_prev, ds_cast, ds_producer)
    dk, dv = _finish_dk_dv(step_prev, p, ds, dk, dv, smem, tiles)
    wait_ds_consumed(step_prev, ds_producer)  # dK overwrites K, which the dQ warpgroup reads
    return dk, dv


@gluon.jit
def _sdp_overlap_blocks(
    begin, end, step, p, ds, dk, dv, k_tile, v_tile, zero, consumer, smem, problem, P_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """Blocks `[begin, end)` of `_sdp_overlap_mainloop`; no masks unless MASKED."""
    dtype: gl.constexpr = smem.resident.first.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    score_mod = problem.mods.score_mod
    for i in range(begin, end):
        step_i, step_prev = step + i, step + i - 1
        s, dp = issue_s_dp(i, step_i, k_tile, v_tile, zero, consumer, smem, problem, MASKED, tiles.m, tiles.d)
        dk_next, dv_next = _issue_dk_dv(step_prev, p, ds, dk, dv, smem, tiles)
        lse = _load_row_stat(step_i, LSE_LOG2, smem, COLUMNS)
        s = warpgroup_mma_wait(3, deps=(s,))
        signed_p = _recompute_p(i, step_i, s, lse, consumer, smem, problem, MASKED, tiles)
        delta = _load_row_stat(step_i, DELTA, smem, COLUMNS)
        p_next = _dropped_p(signed_p, score_mod)
        dp = warpgroup_mma_wait(2, deps=(dp,))
        ds_next = _compute_ds(signed_p, dp, delta, score_mod)
        # Round only after the wait: the next operands take the registers that wgmmas in flight read.
        dk, dv, _, _ = warpgroup_mma_wait(0, deps=(dk_next, dv_next, p, ds))
        consumer_release(smem.pipeline, step_prev)
        p = gl.convert_layout(p_next.to(dtype), P_LAYOUT)
        ds = gl.convert_layout(ds_next.to(dtype), P_LAYOUT)
    return p, ds, dk, dv


@gluon.jit
def _sdp_overlap_mainloop(
    step, dk, dv, k_tile, v_tile, zero, consumer, smem, problem, P_LAYOUT: gl.constexpr, PEEL_MASKED: gl.constexpr,
    tiles: gl.constexpr,
):  # fmt: skip
    """dK and dV of a tile, for head dim 128. dV and dK of a block are issued one block late, after S and dP of the
    next block, and overlap the computation of that block's P.
    """
    dtype: gl.constexpr = smem.resident.first.dtype
    score_mod = problem.mods.score_mod
    signed_p, dp, delta = _first_block(step, k_tile, v_tile, zero, consumer, smem, problem, tiles)
    p = gl.convert_layout(_dropped_p(signed_p, score_mod).to(dtype), P_LAYOUT)
    ds = gl.convert_layout(_compute_ds(signed_p, dp, delta, score_mod).to(dtype), P_LAYOUT)
    masked_end = consumer.num_blocks
    if PEEL_MASKED:
        masked_end = gl.maximum(consumer.num_partial, 1)
    p, ds, dk, dv = _sdp_overlap_blocks(
        1, masked_end, step, p, ds, dk, dv, k_tile, v_tile, zero, consumer, smem, problem, P_LAYOUT, True, tiles
    )
    if PEEL_MASKED:
        p, ds, dk, dv = _sdp_overlap_blocks(
            masked_end,
            consumer.num_blocks,
            step,
            p,
            ds,
            dk,
            dv,
            k_tile,
            v_tile,
            zero,
            consumer,
            smem,
            problem,
            P_LAYOUT,
            False,
            tiles,
        )
    return _finish_dk_dv(step + consumer.num_blocks - 1, p, ds, dk, dv, smem, tiles)


@gluon.jit
def _consumer(
    wg: gl.constexpr, views, smem, problem, tiles: gl.constexpr, OVERLAP_DKV: gl.constexpr, PEEL_MASKED: gl.constexpr
):  # fmt: skip
    """Consumer warpgroup `wg`: 64 keys of each tile. wgmma is drained in each iteration."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.m, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, DK, 2)
    resident, score_mod = smem.resident, problem.mods.score_mod
    step, tile_iter = gl.to_tensor(0), gl.to_tensor(0)
    while wait_resident(wg, resident, tile_iter):
        slot = (tile_iter & 1) * NUM_CONSUMERS + wg
        consumer = load_consumer_tile(wg, resident, tile_iter, problem, tiles, True)
        dk = gl.zeros([CONSUMER_M, tiles.d], gl.float32, DK)
        dv = gl.zeros([CONSUMER_M, tiles.d], gl.float32, DK)
        ds_producer = None
        if smem.ds_pipeline is None:
            skip = is_empty(consumer, resident, problem)
        else:
            # Never skip: the dQ warpgroup waits for both consumers.
            work_tile, _ = load_tile_info(resident.mailbox, consumer.tile_iter, problem)
            ds_producer = DsProducer(smem.ds_pipeline, wg, warp_uniform(work_tile.end))
            skip = False
        if skip:
            drain(smem.pipeline, step, step + consumer.num_blocks)
        elif consumer.num_blocks > 0:
            zero = gl.zeros([CONSUMER_M, tiles.m], gl.float32, S)
            k_tile = resident.first.index(slot).reshape([CONSUMER_M, tiles.d])
            v_tile = resident.second.index(slot).reshape([CONSUMER_M, tiles.d])
            # K and V from registers where they fit (masks of partial blocks take many): with few queries per block,
            # wgmma is bound by shared-memory reads of both operands.
            if (tiles.d == 64) or (tiles.sparse_block == 0) or (problem.mods.blocks.mask_words is None):
                k_tile = k_tile.load(gl.DotOperandLayout(0, S, 2))
            if (tiles.d == 64) and (smem.ds_pipeline is None):
                v_tile = v_tile.load(gl.DotOperandLayout(0, S, 2))
            if OVERLAP_DKV:
                dk, dv = _dkv_overlap_mainloop(
                    step,
                    dk,
                    dv,
                    k_tile,
                    v_tile,
                    zero,
                    consumer,
                    ds_producer,
                    smem,
                    problem,
                    P_LAYOUT,
                    PEEL_MASKED,
                    tiles,
                )
            else:
                dk, dv = _sdp_overlap_mainloop(
                    step, dk, dv, k_tile, v_tile, zero, consumer, smem, problem, P_LAYOUT, PEEL_MASKED, tiles
                )
        stage_results(resident.first.index(slot), dk * score_mod.scale, views.dk, consumer, resident, problem, tiles.d)
        if score_mod.seed is not None:
            dv = dv * score_mod.keep_scale
        stage_results(resident.second.index(slot), dv, views.dv, consumer, resident, problem, tiles.d)
        mbarrier.arrive(resident.empty.index(slot), count=1)
        step += consumer.num_blocks
        tile_iter += 1


@gluon.jit
def _consumer_0(views, smem, problem, tiles: gl.constexpr, OVERLAP_DKV: gl.constexpr, PEEL_MASKED: gl.constexpr):
    _consumer(0, views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)


@gluon.jit
def _consumer_1(views, smem, problem, tiles: gl.constexpr, OVERLAP_DKV: gl.constexpr, PEEL_MASKED: gl.constexpr):
    _consumer(1, views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)


@gluon.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "total_tiles", "stats_stride"])
def dkdv_kernel(
    dout, dq_accum, dk, dk_view, dv, dv_view, q, k, v, stats, stats_stride, schedule, tile_counter, bounds, dense_mask,
    blocks, score_mod, bias, query_offset, heads, group, len_q, len_k, num_tiles, total_tiles, HEAD_DIM: gl.constexpr,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, OVERLAP_DKV: gl.constexpr, PEEL_MASKED: gl.constexpr,
    SPARSE_BLOCK: gl.constexpr, MAX_BLOCKS_POW2: gl.constexpr,
):  # fmt: skip
    """Writes `dk` and `dv`. They, `dout`, `q`, `k`, `v` are TMA descriptors of `(B, H, S, D)`, boxes of BLOCK_M (dout,
    q) or 64 rows; `dk_view` and `dv_view` are TensorViews, for tiles whose box extends into another sequence. `stats`
    as in row_stats.py. With `dq_accum`, a descriptor as `dq_partition` takes it, dQ / scale is added there.

    OVERLAP_DKV: `_dkv_overlap_mainloop`, else `_sdp_overlap_mainloop`. PEEL_MASKED: full blocks run in a loop of their
    own. Grid: persistent programs that share `total_tiles` tiles of 128 keys.
    """
    tiles: gl.constexpr = Tiles(
        BLOCK_M, NUM_CONSUMERS * CONSUMER_M, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, SPARSE_BLOCK, MAX_BLOCKS_POW2
    )
    mods = AttnMods(bounds, dense_mask, blocks, score_mod, bias)
    # Spelled out: of a function's result, Triton 3.6 does not know that it is a constant.
    gl.static_assert(
        (score_mod.softcap is None) and (bias.ptr is None) and (score_mod.alibi_slopes is None),
        "scores are only scaled",
    )
    problem = Problem(schedule, mods, query_offset, heads, group, len_q, len_k, num_tiles, total_tiles, tile_counter)
    STATS_WORDS: gl.constexpr = 4 if score_mod.seed is not None else 2
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ds_pipeline = None
    if dq_accum is not None:
        gl.static_assert(OVERLAP_DKV, "only `_dkv_overlap_mainloop` produces dS for dq_accum")
        ds_pipeline = allocate_ds_pipeline(dq_accum, q.dtype, BLOCK_M, HEAD_DIM)
    smem = DkdvStorage(
        allocate_resident(k, v, HEAD_DIM, 1 if dq_accum is None else 2),
        # Full: one arrival by TMA, one for the row statistics.
        allocate_pipeline(q, dout, BLOCK_M, HEAD_DIM, STAGES, 2),
        gl.allocate_shared_memory(gl.float32, [STAGES * STATS_WORDS, BLOCK_M], WORD),
        STATS_WORDS,
        ds_pipeline,
    )
    views = OutputViews(dk_view, dv_view)
    # Two literal lists: Triton accepts partition functions only in the list itself.
    if dq_accum is None:
        gl.warp_specialize(
            [
                (_consumer_0, (views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)),
                (_consumer_1, (views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)),
                (load_partition, (q, dout, k, v, dk, dv, stats, stats_stride, smem, problem, tiles)),
                (scheduler_warp, (smem.resident.mailbox, problem, tiles, True)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)),
                (_consumer_1, (views, smem, problem, tiles, OVERLAP_DKV, PEEL_MASKED)),
                (dq_partition, (dq_accum, smem, problem, tiles)),
                (load_partition, (q, dout, k, v, dk, dv, stats, stats_stride, smem, problem, tiles)),
                (scheduler_warp, (smem.resident.mailbox, problem, tiles, True)),
            ],
            [4, 4, 1, 1],
            [208, 72, 24, 24],
        )
