"""Forward kernel for Hopper (FlashAttention-3, Shah et al., arXiv 2407.08608): warp-specialised, persistent.

Warps: two consumer warpgroups, 64 queries each; one producer warp (producer.py: TMA loads of Q, K, V and the TMA store
of O); one scheduler warp (tile_scheduler.py). Q_STAGES stages of Q and STAGES of K and V connect them, each with full
and empty mbarriers, plus the tile mailbox.

Within a consumer, P V of a block overlaps the softmax of the next; between consumers, the scheduler barrier alternates
their wgmmas, so that one computes softmax while the other uses the tensor cores.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.gluon_sm90.epilogue import epilogue
from hf_flashbsa.kernels.gluon_sm90.mask import apply_mask, as_fragments, quad_layout
from hf_flashbsa.kernels.gluon_sm90.pipeline import (
    CONSUMER_M,
    NUM_CONSUMERS,
    Problem,
    sched_barrier_arrive,
    sched_barrier_sync,
    smem_load,
)
from hf_flashbsa.kernels.gluon_sm90.producer import (
    BLOCK_INFO_WORDS,
    END_OF_WORK,
    INFO_FLAGS,
    INFO_KIND,
    INFO_START,
    INFO_UNMASKED,
    LAST_BLOCK,
    NEEDS_MASK,
    Q_STAGES,
    allocate_fwd_storage,
    load_partition,
)
from hf_flashbsa.kernels.gluon_sm90.softmax import (
    SoftmaxState,
    apply_dropout,
    cast_p,
    exp_scores,
    init_softmax,
    needs_rescale,
    rescale_o,
    softmax,
)
from hf_flashbsa.kernels.gluon_sm90.tile_scheduler import load_consumer_tile_info, load_tile_info, scheduler_warp
from hf_flashbsa.kernels.structs import AttnMods, Tiles
from hf_flashbsa.kernels.triton.score import dropout_row_words


@gluon.jit
def _key_position(start, tile_iter, smem, problem):
    """Position of the first key of a block in its sequence, which dropout counts from."""
    if problem.mods.score_mod.seed is not None:
        if problem.schedule is not None:
            work_tile, _ = load_tile_info(smem.mailbox, tile_iter, problem)
            start -= work_tile.key_origin
    return start


@gluon.jit
def _issue_qk(step, q_slot, s, smem, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Issue S = Q K^T of block `step`."""
    k_tile = smem.k_tiles.index(step % STAGES).reshape([tiles.n, tiles.d])
    q_tile = smem.q_tiles.index(q_slot).reshape([CONSUMER_M, tiles.d])
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _issue_qk_pv(wg: gl.constexpr, step, q_slot, s, p, o, accumulate, smem, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Issue S = Q K^T of block `step`, and O += P V of block `step - 1`; O = P V where `accumulate` is 0."""
    stage, prev_stage = step % STAGES, (step + STAGES - 1) % STAGES
    mbarrier.wait(smem.k_full.index(stage), (step // STAGES) & 1)
    step = sched_barrier_sync(wg, step)
    s = _issue_qk(step, q_slot, s, smem, tiles, STAGES)
    mbarrier.wait(smem.v_full.index(prev_stage), ((step - 1) // STAGES) & 1, pred=step > 0)
    v_tile = smem.v_tiles.index(prev_stage).reshape([tiles.n, tiles.d])
    o = warpgroup_mma(p, v_tile, o, use_acc=(accumulate != 0), is_async=True)
    step = sched_barrier_arrive(1 - wg, step)
    return s, o


@gluon.jit
def _consumer(
    wg: gl.constexpr, out_view, lse, sinks, smem, problem, tiles: gl.constexpr, STAGES: gl.constexpr,
    PEEL_MASKED: gl.constexpr,
):  # fmt: skip
    """Consumer warpgroup `wg`: 64 queries of each tile.

    Mainloop iteration: issue Q K^T of this block and P V of the previous one, softmax of this block, wait for P V,
    rescale O. Iterations run on across tiles, so that there is one loop body: the epilogue of a tile runs in the first
    iteration of the next, and a last iteration has no block. wgmma is drained in each iteration; ptxas otherwise
    reuses registers of in-flight accumulators.

    PEEL_MASKED: full blocks after the last masked one run in a loop of their own, without masks and without the row
    maximum: P is computed against the current `row_max` and recomputed in the rare case that its sums show a larger
    score. The larger code does not pay where tiles have few full blocks.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.n, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    mods = problem.mods
    s = gl.zeros([CONSUMER_M, tiles.n], gl.float32, S)
    o = gl.zeros([CONSUMER_M, tiles.d], gl.float32, O)
    p = gl.zeros([CONSUMER_M, tiles.n], smem.q_tiles.dtype, P)
    QUAD: gl.constexpr = quad_layout(as_fragments(s).type.layout)
    state = init_softmax(QUAD)
    pad = gl.zeros([CONSUMER_M], gl.uint32, ROW)
    factor = gl.zeros([CONSUMER_M], gl.uint32, ROW)
    # Separate tensors: Triton loses updates of a loop-carried variable that starts as an alias of another.
    step, tile_iter, flags = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(LAST_BLOCK)
    accumulate = gl.to_tensor(0)
    if wg == 1:
        step = sched_barrier_arrive(0, step)
    running = gl.to_tensor(True)
    while running:
        is_first = (flags & LAST_BLOCK) != 0
        stage = step % STAGES
        q_slot = tile_iter % Q_STAGES * NUM_CONSUMERS + wg
        mbarrier.wait(smem.q_full.index(q_slot), (tile_iter // Q_STAGES) & 1, pred=is_first)
        s, o_next = _issue_qk_pv(wg, step, q_slot, s, p, o, accumulate, smem, tiles, STAGES)
        s = warpgroup_mma_wait(1, deps=(s,))
        start = smem_load(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_START)
        flags = smem_load(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_FLAGS)
        block_kind = smem_load(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_KIND)
        num_unmasked = smem_load(smem.block_info, stage * BLOCK_INFO_WORDS + INFO_UNMASKED)
        running = (flags & END_OF_WORK) == 0
        mbarrier.arrive(smem.k_empty.index(stage), count=1)
        prev_state = state
        if is_first:
            state = init_softmax(QUAD)
            if mods.score_mod.seed is not None:
                work_tile, head = load_consumer_tile_info(wg, smem.mailbox, tile_iter, problem)
                rows = work_tile.begin + gl.arange(0, CONSUMER_M, layout=ROW)
                pad, factor = dropout_row_words(mods.score_mod, work_tile.batch * problem.heads + head, rows)
        row_scale = gl.full([CONSUMER_M, 4], 1.0, gl.float32, QUAD)
        # Guarded although it need not be: without the branch ptxas hoists the wgmma wait above the exp2s.
        if running:
            if (flags & NEEDS_MASK) != 0:
                work_tile, head = load_consumer_tile_info(wg, smem.mailbox, tile_iter, problem)
                s = apply_mask(s, mods, head, work_tile, start, block_kind, tiles)
            key_pos = _key_position(start, tile_iter, smem, problem)
            s, row_scale, state = softmax(s, state, mods)
            s = apply_dropout(s, key_pos, pad, factor, mods, tiles)
        o = warpgroup_mma_wait(0, deps=(o_next,))
        if is_first:
            if step > 0:
                prev_slot = (tile_iter + Q_STAGES - 1) % Q_STAGES * NUM_CONSUMERS + wg
                work_tile, head = load_consumer_tile_info(wg, smem.mailbox, tile_iter - 1, problem)
                # Q K^T of the previous tile completed an iteration ago: its Q stage is free for O.
                prev_tile = smem.q_tiles.index(prev_slot).reshape([CONSUMER_M, tiles.d])
                epilogue(o, prev_state, prev_tile, out_view, lse, sinks, head, work_tile, problem, S, tiles)
                mbarrier.arrive(smem.q_empty.index(prev_slot), count=1)
        p = cast_p(s, P, smem.q_tiles.dtype)
        mbarrier.arrive(smem.v_empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        o = rescale_o(o, row_scale)
        step += 1
        accumulate = gl.where(is_first, 0, 1)
        if PEEL_MASKED:
            for _ in range(num_unmasked):
                s, o_next = _issue_qk_pv(wg, step, q_slot, s, p, o, accumulate, smem, tiles, STAGES)
                if mods.score_mod.seed is not None:
                    start = smem_load(smem.block_info, step % STAGES * BLOCK_INFO_WORDS + INFO_START)
                s = warpgroup_mma_wait(1, deps=(s,))
                s, block_sum = exp_scores(state.row_max, s, mods)
                redo = needs_rescale(wg, block_sum)
                o = warpgroup_mma_wait(0, deps=(o_next,))
                if redo != 0:
                    s = warpgroup_mma_wait(0, deps=(_issue_qk(step, q_slot, s, smem, tiles, STAGES),))
                    s, row_scale, state = softmax(s, state, mods)
                    o = rescale_o(o, row_scale)
                else:
                    state = SoftmaxState(state.row_max, state.row_sum + block_sum)
                mbarrier.arrive(smem.k_empty.index(step % STAGES), count=1)
                s = apply_dropout(s, _key_position(start, tile_iter, smem, problem), pad, factor, mods, tiles)
                p = cast_p(s, P, smem.q_tiles.dtype)
                mbarrier.arrive(smem.v_empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
                accumulate = gl.to_tensor(1)
        tile_iter += gl.where((flags & LAST_BLOCK) != 0, 1, 0)
    if wg == 0:
        sched_barrier_sync(0, step)  # consume the last arrival


@gluon.jit
def _consumer_0(
    out_view, lse, sinks, smem, problem, tiles: gl.constexpr, STAGES: gl.constexpr, PEEL_MASKED: gl.constexpr
):
    _consumer(0, out_view, lse, sinks, smem, problem, tiles, STAGES, PEEL_MASKED)


@gluon.jit
def _consumer_1(
    out_view, lse, sinks, smem, problem, tiles: gl.constexpr, STAGES: gl.constexpr, PEEL_MASKED: gl.constexpr
):
    _consumer(1, out_view, lse, sinks, smem, problem, tiles, STAGES, PEEL_MASKED)


@gluon.jit(do_not_specialize=["query_offset", "len_q", "len_k", "num_tiles", "total_tiles"])
def forward_kernel(
    q, k, v, out, out_view, lse, sinks, schedule, tile_counter, bounds, dense_mask, blocks, score_mod, bias,
    query_offset, heads, group, len_q, len_k, num_tiles, total_tiles, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr, PEEL_MASKED: gl.constexpr, SPARSE_BLOCK: gl.constexpr, MAX_BLOCKS_POW2: gl.constexpr,
):  # fmt: skip
    """Writes `out` and `lse`. `q`, `k`, `v`, `out` are TMA descriptors of `(B, H, S, D)`, boxes of 64 (q, out) or
    BLOCK_N rows; `out_view` is `out` as a TensorView, for tiles whose box extends into another sequence. `_consumer`
    explains PEEL_MASKED. Grid: persistent programs that share `total_tiles` tiles.
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
    smem = allocate_fwd_storage(q, k, v, BLOCK_N, HEAD_DIM, STAGES)
    gl.warp_specialize(
        [
            (_consumer_0, (out_view, lse, sinks, smem, problem, tiles, STAGES, PEEL_MASKED)),
            (_consumer_1, (out_view, lse, sinks, smem, problem, tiles, STAGES, PEEL_MASKED)),
            (load_partition, (q, k, v, out, smem, problem, tiles, STAGES, PEEL_MASKED)),
            (scheduler_warp, (smem.mailbox, problem, tiles, False)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
