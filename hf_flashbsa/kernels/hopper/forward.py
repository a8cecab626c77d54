"""The forward kernel for Hopper, in Gluon: two warpgroups of 64 queries each compute what one warp finds (scout.py)
and one loads by TMA (feed.py).

Within a warpgroup the product with the values of a block runs while the softmax of the next block is computed (the
scheme of FlashAttention-3, Shah et al., arXiv 2407.08608).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.hopper.common import (
    CONSUMERS,
    ROWS,
    Call,
    by_thread,
    pass_token,
    quad_of,
    read_note,
    take_token,
)
from hf_flashbsa.kernels.hopper.feed import BLOCK_NOTES, FINAL, LAST, MASKED, SLOTS, allocate_ring, load
from hf_flashbsa.kernels.hopper.scout import noted_item, noted_part, scout
from hf_flashbsa.kernels.hopper.softmax import (
    State,
    are_too_large,
    drop,
    hide,
    no_state,
    operand,
    shrunk,
    softmax,
    store,
    weights_by,
)
from hf_flashbsa.kernels.primitives import dropout_words
from hf_flashbsa.kernels.records import Rules, Tiles


@gluon.jit
def _place(first, done, ring, call):
    """The place in its sequence of the first key of a block of the `done`-th tile, for dropout."""
    if call.rules.score.seed is not None:
        if call.work is not None:
            item, _ = noted_item(ring.agenda, done, call)
            first -= item.key_origin
    return first


@gluon.jit
def _scores(step, q_slot, s, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Starts the product of the queries in a slot with the keys of the `step`-th block."""
    k_tile = ring.k_tiles.index(step % STAGES).reshape([tiles.n, tiles.d])
    q_tile = ring.q_tiles.index(q_slot).reshape([ROWS, tiles.d])
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _start(part: gl.constexpr, step, q_slot, s, p, o, begun, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Starts the products of the queries in a slot with the keys of the `step`-th block, and of the weights of the
    block before with its values, if there are some; these are added to `o` where it has `begun`."""
    stage, before = step % STAGES, (step + STAGES - 1) % STAGES
    mbarrier.wait(ring.k_full.index(stage), (step // STAGES) & 1)
    step = take_token(part, step)
    s = _scores(step, q_slot, s, ring, tiles, STAGES)
    mbarrier.wait(ring.v_full.index(before), ((step - 1) // STAGES) & 1, pred=step > 0)
    v_tile = ring.v_tiles.index(before).reshape([tiles.n, tiles.d])
    o = warpgroup_mma(p, v_tile, o, use_acc=(begun != 0), is_async=True)
    step = pass_token(1 - part, step)
    return s, o


@gluon.jit
def _compute(
    part: gl.constexpr, rows_out, lse, sinks, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr,
    STEADY: gl.constexpr,
):  # fmt: skip
    """A consumer: the `part`-th 64 queries of each tile.

    A round of the loop issues the product of a block with the keys, and the product of the block before with the
    values, under which it computes the block's softmax. Blocks follow each other across tiles, so that there is one
    body for all of them: a tile is stored in the first round of the next one, and there is a last round without block.
    No product is left running at the end of a round: ptxas gives away registers of those.

    With STEADY, full blocks behind the first round without partial ones to come have a loop of their own, which asks
    nothing, not even for the largest scores: weights are made by the pivots that there are, and in the rare case that
    their sums tell of a larger one, made once more. The larger code costs time where tiles have few such blocks.

    Consumers issue their products in turn, as in FlashAttention-3, so that those of one run while the other computes
    weights.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.n, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    P: gl.constexpr = gl.DotOperandLayout(0, O, 2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    rules = call.rules
    s = gl.zeros([ROWS, tiles.n], gl.float32, S)
    o = gl.zeros([ROWS, tiles.d], gl.float32, O)
    p = gl.zeros([ROWS, tiles.n], ring.q_tiles.dtype, P)
    QUAD: gl.constexpr = quad_of(by_thread(s).type.layout)
    state = no_state(QUAD)
    pad = gl.zeros([ROWS], gl.uint32, ROW)
    factor = gl.zeros([ROWS], gl.uint32, ROW)
    # Triton loses changes of a variable that enters a loop as the value of another one.
    step, done, todo = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(LAST)
    begun = gl.to_tensor(0)
    if part == 1:
        step = pass_token(0, step)
    live = gl.to_tensor(True)
    while live:
        fresh = (todo & LAST) != 0
        stage = step % STAGES
        q_slot = done % SLOTS * CONSUMERS + part
        mbarrier.wait(ring.q_full.index(q_slot), (done // SLOTS) & 1, pred=fresh)
        s, product = _start(part, step, q_slot, s, p, o, begun, ring, tiles, STAGES)
        s = warpgroup_mma_wait(1, deps=(s,))
        first = read_note(ring.block_notes, stage * BLOCK_NOTES)
        todo = read_note(ring.block_notes, stage * BLOCK_NOTES + 1)
        kind = read_note(ring.block_notes, stage * BLOCK_NOTES + 2)
        full = read_note(ring.block_notes, stage * BLOCK_NOTES + 3)
        live = (todo & FINAL) == 0
        mbarrier.arrive(ring.k_empty.index(stage), count=1)
        old = state
        if fresh:
            state = no_state(QUAD)
            if rules.score.seed is not None:
                item, head = noted_part(part, ring.agenda, done, call)
                rows = item.begin + gl.arange(0, ROWS, layout=ROW)
                pad, factor = dropout_words(rules.score, item.row * call.heads + head, rows)
        shrink = gl.full([ROWS, 4], 1.0, gl.float32, QUAD)
        # Not for the sake of the last round: ptxas would move the wait behind it before the exponentials.
        if live:
            if (todo & MASKED) != 0:
                item, head = noted_part(part, ring.agenda, done, call)
                s = hide(s, rules, head, item, first, kind, tiles)
            place = _place(first, done, ring, call)
            s, shrink, state = softmax(s, state, rules)
            s = drop(s, place, pad, factor, rules, tiles)
        o = warpgroup_mma_wait(0, deps=(product,))
        if fresh:
            if step > 0:
                old_slot = (done + SLOTS - 1) % SLOTS * CONSUMERS + part
                item, head = noted_part(part, ring.agenda, done - 1, call)
                # The scores of the tile before were complete a round ago: nothing reads its queries any more.
                old_tile = ring.q_tiles.index(old_slot).reshape([ROWS, tiles.d])
                store(o, old, old_tile, rows_out, lse, sinks, head, item, call, S, tiles)
                mbarrier.arrive(ring.q_empty.index(old_slot), count=1)
        p = operand(s, P, ring.q_tiles.dtype)
        mbarrier.arrive(ring.v_empty.index((step + STAGES - 1) % STAGES), count=1, pred=step > 0)
        o = shrunk(o, shrink)
        step += 1
        begun = gl.where(fresh, 0, 1)
        if STEADY:
            for _ in range(full):
                s, product = _start(part, step, q_slot, s, p, o, begun, ring, tiles, STAGES)
                if rules.score.seed is not None:
                    first = read_note(ring.block_notes, step % STAGES * BLOCK_NOTES)
                s = warpgroup_mma_wait(1, deps=(s,))
                s, sums = weights_by(state.pivot, s, rules)
                retry = are_too_large(part, sums)
                o = warpgroup_mma_wait(0, deps=(product,))
                if retry != 0:
                    s = warpgroup_mma_wait(0, deps=(_scores(step, q_slot, s, ring, tiles, STAGES),))
                    s, shrink, state = softmax(s, state, rules)
                    o = shrunk(o, shrink)
                else:
                    state = State(state.pivot, state.sum + sums)
                mbarrier.arrive(ring.k_empty.index(step % STAGES), count=1)
                s = drop(s, _place(first, done, ring, call), pad, factor, rules, tiles)
                p = operand(s, P, ring.q_tiles.dtype)
                mbarrier.arrive(ring.v_empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
                begun = gl.to_tensor(1)
        done += gl.where((todo & LAST) != 0, 1, 0)
    if part == 0:
        take_token(0, step)  # which is left


@gluon.jit
def _consumer_0(rows_out, lse, sinks, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr):
    _compute(0, rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)


@gluon.jit
def _consumer_1(rows_out, lse, sinks, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr):
    _compute(1, rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)


@gluon.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "total"])
def forward_kernel(
    q, k, v, out, rows_out, lse, sinks, work, claims, mask, dense, blocks, score, bias, diagonal, heads, group, len_q,
    len_k, num_tiles, total, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr,
    STEADY: gl.constexpr, LISTED: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Writes `out` and `lse`. `q`, `k`, `v` and `out` are descriptors of `(B, H, S, D)` with boxes of 64 or BLOCK_N
    rows; `rows_out`, an Operand, is `out` once more, for parts of tiles whose box has rows of another sequence.

    STEADY: `_compute` says when it pays. Grid: programs that share the `total` tiles of all heads and batch rows.
    """
    gl.static_assert((score.softcap is None) and (bias.ptr is None), "scores are only scaled")
    tiles: gl.constexpr = Tiles(CONSUMERS * ROWS, BLOCK_N, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    call = Call(work, rules, diagonal, heads, group, len_q, len_k, num_tiles, total, claims)
    ring = allocate_ring(q, k, v, BLOCK_N, HEAD_DIM, STAGES)
    gl.warp_specialize(
        [
            (_consumer_0, (rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)),
            (_consumer_1, (rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)),
            (load, (q, k, v, out, ring, call, tiles, STAGES, STEADY)),
            (scout, (ring.agenda, call, tiles, False)),
        ],
        [4, 1, 1],
        [232, 40, 40],
    )
