"""Gradients of keys and values for Hopper, in Gluon: two warpgroups of 64 keys each compute what one warp finds
(scout.py) and one loads by TMA.

A job holds 128 keys and walks over the queries of every head that shares them, without atomics, so results repeat
bitwise. What depends on a query alone is made before (rows.py). If asked to, a third warpgroup makes the gradient of
the queries beside them, which does not repeat bitwise (sums.py).

Scores are held keys by queries, so that weights and gradients of scores feed the last two products from registers.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.hopper.common import CONSUMERS, ROWS, Call, hide_outside, shared
from hf_flashbsa.kernels.hopper.jobs import (
    allocate_held,
    allocate_stream,
    await_job,
    block_of_queries,
    fill,
    has_no_rows,
    leave,
    noted_block,
    noted_share,
    pass_over,
    prepare,
    release,
    send_results,
    start_products,
    tile_of,
)
from hf_flashbsa.kernels.hopper.scout import is_job, noted_item, noted_job, scout
from hf_flashbsa.kernels.hopper.sums import Outbox, add_queries, allocate_handover, await_use, hand_over, of_own_keys
from hf_flashbsa.kernels.primitives import asks_ids, dropout_keep, hide_segments, log2_factor, visible
from hf_flashbsa.kernels.records import Rules, Tiles


class Ring(NamedTuple):
    """Shared memory: keys and values are held, queries and output gradients pass by.

    With the queries come `words` of each: lse, delta, and with dropout its pad and factor. `row_words` is
    `[stages * words, BLOCK_M]`. The `handover` to a third warpgroup is None without one.
    """

    held: object
    stream: object
    row_words: object
    words: object
    handover: object


class Gradients(NamedTuple):
    """Operands of what a program writes."""

    dk: object
    dv: object


@gluon.jit
def _fill(i, step, q, dout, rowwise, plane, job, done, ring, call, tiles: gl.constexpr):
    """Loads a job's `i`-th block of queries with what belongs to them, as block `step` of the stream."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([tiles.m // 32], [32], [1], [0])
    is_partial = i < job.partial
    lo, hi = gl.to_tensor(0), gl.to_tensor(call.len_q)
    if is_partial:
        # The job is read anew, because the producer has registers for little.
        whole = noted_job(ring.held.agenda, done, call, tiles, True)
        head, first = block_of_queries(whole, call, i, True, tiles)
        lo, hi = whole.span.lo, whole.span.hi
    else:
        head, first = block_of_queries(job, call, i - job.partial, False, tiles)
    queries = first + gl.arange(0, tiles.m, layout=LAYOUT)
    row = rowwise + (job.item.other_row.to(gl.int64) * call.heads + head) * call.len_q + queries
    live = (queries >= lo) & (queries < hi)
    # Queries outside of the span have weights of 0. Loaded before the wait, which hides the latency.
    lse = gl.load(row, mask=live, other=float("inf"))
    delta = gl.load(row + plane, mask=live, other=0.0)
    fill(ring.stream, step, q, dout, job.item.other_row, head, first, is_partial, tiles.m, tiles.d)
    stage = step % ring.stream.stages
    word = stage * ring.words
    ring.row_words.index(word).store(lse)
    ring.row_words.index(word + 1).store(delta)
    if call.rules.score.seed is not None:
        ring.row_words.index(word + 2).store(gl.load(row + 2 * plane, mask=live, other=0.0))
        ring.row_words.index(word + 3).store(gl.load(row + 3 * plane, mask=live, other=0.0))
    mbarrier.arrive(ring.stream.full.index(stage), count=1)


@gluon.jit
def _load(q, dout, k, v, dk, dv, rowwise, plane, ring, call, tiles: gl.constexpr):
    """The producer."""
    held = ring.held
    # Once consumers have given back a block of a job, they have left the results of the job before.
    early = ring.stream.stages + 1
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    prepare(held, done, k, v, call, tiles)
    while is_job(held.agenda, done):
        job = noted_job(held.agenda, done, call, tiles, True)
        for i in range(gl.maximum(job.count, early + 2)):
            if i == early:
                send_results(held, done + 1, dk, dv, call.len_k, call)
            if i == early + 1:
                prepare(held, done + 1, k, v, call, tiles)
            if i < job.count:
                _fill(i, step + i, q, dout, rowwise, plane, job, done, ring, call, tiles)
        step += job.count
        done += 1
    send_results(held, done + 1, dk, dv, call.len_k, call)
    tma.store_wait(0)


@gluon.jit
def _row_word(i, word, ring, COLUMNS: gl.constexpr):
    """The lse (word 0), delta (1), pad (2) or factor (3) of the queries of block `i`."""
    return ring.row_words.index(i % ring.stream.stages * ring.words + word).load(COLUMNS)


@gluon.jit
def _weights(i, step, s, lse, share, ring, call, MASKED: gl.constexpr, tiles: gl.constexpr):
    """Weights of a share's keys with block `i` of its job, block `step` of the stream.

    Weights that dropout drops have a minus sign: both gradients need to know, and a sign takes no registers.
    """
    COLUMNS: gl.constexpr = gl.SliceLayout(0, s.type.layout)
    rules = call.rules
    if MASKED and (i < share.partial):
        item, _ = noted_item(ring.held.agenda, share.number, call)
        first, head = noted_block(ring.stream, step)
        queries = first + gl.arange(0, tiles.m, layout=COLUMNS)
        keys = share.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
        s = hide_outside(s, rules, share.begin, first, item.lo, item.hi, item.diagonal, tiles, True)
        if (tiles.listed > 0) and (rules.blocks.masks is not None):
            ok = visible(
                rules, item.other_row, head, queries[None, :], keys[:, None], (keys < item.end)[:, None],
                item.query_origin, item.key_origin, first, share.begin, tiles,
            )  # fmt: skip
            s = gl.where(ok, s, float("-inf"))
        s = hide_segments(s, rules.mask, item.other_row, item.row, asks_ids(item), queries[None, :], keys[:, None])
    p = gl.exp2(s * log2_factor(rules) - lse[None, :])
    if rules.score.seed is not None:
        pad = _row_word(step, 2, ring, COLUMNS).to(gl.uint32, bitcast=True)
        factor = _row_word(step, 3, ring, COLUMNS).to(gl.uint32, bitcast=True)
        offsets = gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))[:, None]
        place = share.begin - share.key_origin
        p = gl.where(dropout_keep(rules.score, pad[None, :], factor[None, :], place, offsets), p, -p)
    return p


@gluon.jit
def _kept(p, score):
    """The weights behind dropout, but for their scale."""
    if score.seed is not None:
        p = gl.maximum(p, 0.0)
    return p


@gluon.jit
def _gradient(p, dp, delta, score):
    """Gradient of the scaled scores of a block."""
    if score.seed is not None:
        dp = gl.where(p > 0.0, dp * score.keep_scale, 0.0)
        p = gl.abs(p)
    return p * (dp - delta[None, :])


@gluon.jit
def _queries(ring, i, tiles: gl.constexpr):
    """Block `i` of the queries."""
    return tile_of(ring.stream.first, ring.stream, i, tiles.m, tiles.d)


@gluon.jit
def _dout(ring, i, tiles: gl.constexpr):
    """The output gradients of block `i`."""
    return tile_of(ring.stream.second, ring.stream, i, tiles.m, tiles.d)


@gluon.jit
def _last_products(i, p, ds, dk, dv, ring, tiles: gl.constexpr):
    """Starts the products of weights and gradients of scores with block `i`."""
    dv = warpgroup_mma(p, _dout(ring, i, tiles), dv, is_async=True)
    dk = warpgroup_mma(ds, _queries(ring, i, tiles), dk, is_async=True)
    return dk, dv


@gluon.jit
def _finish(i, p, ds, dk, dv, ring, tiles: gl.constexpr):
    """The last products of the last block."""
    dk, dv = _last_products(i, p, ds, dk, dv, ring, tiles)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    release(ring.stream, i)
    return dk, dv


@gluon.jit
def _begin(step, k_tile, v_tile, zero, share, ring, call, tiles: gl.constexpr):
    """Weights of the first block, block `step` of the stream, the product of the values with output gradients, and
    delta of the queries."""
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    s, dp = start_products(0, step, k_tile, v_tile, zero, share, ring, call, True, tiles.m, tiles.d)
    lse, delta = _row_word(step, 0, ring, COLUMNS), _row_word(step, 1, ring, COLUMNS)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    return _weights(0, step, s, lse, share, ring, call, True, tiles), dp, delta


@gluon.jit
def _rotated_rounds(
    begin, end, step, weights, dp, delta, dk, dv, k_tile, v_tile, zero, share, outbox, ring, call,
    OPERAND: gl.constexpr, MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """Rounds `[begin, end)` of `_rotated`, without masks unless `MASKED`."""
    dtype: gl.constexpr = ring.held.first.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    score = call.rules.score
    for i in range(begin, end):
        at, last = step + i, step + i - 1
        p = gl.convert_layout(_kept(weights, score).to(dtype), OPERAND)
        dv_next = warpgroup_mma(p, _dout(ring, last, tiles), dv, is_async=True)
        gradient = of_own_keys(_gradient(weights, dp, delta, score).to(dtype), share, outbox)
        ds = gl.convert_layout(gradient, OPERAND)
        dk_next = warpgroup_mma(ds, _queries(ring, last, tiles), dk, is_async=True)
        s, dp_next = start_products(i, at, k_tile, v_tile, zero, share, ring, call, MASKED, tiles.m, tiles.d)
        hand_over(last, gradient, outbox)
        lse = _row_word(at, 0, ring, COLUMNS)
        s, dv, dk, _, _ = warpgroup_mma_wait(1, deps=(s, dv_next, dk_next, p, ds))
        release(ring.stream, last)
        weights = _weights(i, at, s, lse, share, ring, call, MASKED, tiles)
        delta = _row_word(at, 1, ring, COLUMNS)
        dp = warpgroup_mma_wait(0, deps=(dp_next,))
    return weights, dp, delta, dk, dv


@gluon.jit
def _rotated(
    step, dk, dv, k_tile, v_tile, zero, share, outbox, ring, call, OPERAND: gl.constexpr, STEADY: gl.constexpr,
    tiles: gl.constexpr,
):  # fmt: skip
    """Adds all blocks to `dk` and `dv`. A round issues the last products of a block behind its weights, and with them
    the first ones of the next block; the second of those runs under that block's weights.
    """
    dtype: gl.constexpr = ring.held.first.dtype
    score = call.rules.score
    weights, dp, delta = _begin(step, k_tile, v_tile, zero, share, ring, call, tiles)
    masked = share.count
    if STEADY:
        masked = gl.maximum(share.partial, 1)
    weights, dp, delta, dk, dv = _rotated_rounds(
        1, masked, step, weights, dp, delta, dk, dv, k_tile, v_tile, zero, share, outbox, ring, call, OPERAND, True,
        tiles,
    )  # fmt: skip
    if STEADY:
        weights, dp, delta, dk, dv = _rotated_rounds(
            masked, share.count, step, weights, dp, delta, dk, dv, k_tile, v_tile, zero, share, outbox, ring, call,
            OPERAND, False, tiles,
        )  # fmt: skip
    p = gl.convert_layout(_kept(weights, score).to(dtype), OPERAND)
    gradient = of_own_keys(_gradient(weights, dp, delta, score).to(dtype), share, outbox)
    ds = gl.convert_layout(gradient, OPERAND)
    last = step + share.count - 1
    hand_over(last, gradient, outbox)
    dk, dv = _finish(last, p, ds, dk, dv, ring, tiles)
    await_use(last, outbox)  # results take the place of the keys
    return dk, dv


@gluon.jit
def _late_rounds(
    begin, end, step, p, ds, dk, dv, k_tile, v_tile, zero, share, ring, call, OPERAND: gl.constexpr,
    MASKED: gl.constexpr, tiles: gl.constexpr,
):  # fmt: skip
    """Rounds `[begin, end)` of `_late`, without masks unless `MASKED`."""
    dtype: gl.constexpr = ring.held.first.dtype
    COLUMNS: gl.constexpr = gl.SliceLayout(0, zero.type.layout)
    score = call.rules.score
    for i in range(begin, end):
        at, last = step + i, step + i - 1
        s, dp = start_products(i, at, k_tile, v_tile, zero, share, ring, call, MASKED, tiles.m, tiles.d)
        dk_next, dv_next = _last_products(last, p, ds, dk, dv, ring, tiles)
        lse = _row_word(at, 0, ring, COLUMNS)
        s = warpgroup_mma_wait(3, deps=(s,))
        weights = _weights(i, at, s, lse, share, ring, call, MASKED, tiles)
        delta = _row_word(at, 1, ring, COLUMNS)
        p_next = _kept(weights, score)
        dp = warpgroup_mma_wait(2, deps=(dp,))
        ds_next = _gradient(weights, dp, delta, score)
        # Rounded only behind the wait: products in flight read the registers that the operands of the next ones take.
        dk, dv, _, _ = warpgroup_mma_wait(0, deps=(dk_next, dv_next, p, ds))
        release(ring.stream, last)
        p = gl.convert_layout(p_next.to(dtype), OPERAND)
        ds = gl.convert_layout(ds_next.to(dtype), OPERAND)
    return p, ds, dk, dv


@gluon.jit
def _late(
    step, dk, dv, k_tile, v_tile, zero, share, ring, call, OPERAND: gl.constexpr, STEADY: gl.constexpr,
    tiles: gl.constexpr,
):  # fmt: skip
    """Adds all blocks to `dk` and `dv`. The last products of a block are issued behind the first ones of the next
    block, and run under that block's weights.
    """
    dtype: gl.constexpr = ring.held.first.dtype
    score = call.rules.score
    weights, dp, delta = _begin(step, k_tile, v_tile, zero, share, ring, call, tiles)
    p = gl.convert_layout(_kept(weights, score).to(dtype), OPERAND)
    ds = gl.convert_layout(_gradient(weights, dp, delta, score).to(dtype), OPERAND)
    masked = share.count
    if STEADY:
        masked = gl.maximum(share.partial, 1)
    p, ds, dk, dv = _late_rounds(
        1, masked, step, p, ds, dk, dv, k_tile, v_tile, zero, share, ring, call, OPERAND, True, tiles
    )
    if STEADY:
        p, ds, dk, dv = _late_rounds(
            masked, share.count, step, p, ds, dk, dv, k_tile, v_tile, zero, share, ring, call, OPERAND, False, tiles
        )
    return _finish(step + share.count - 1, p, ds, dk, dv, ring, tiles)


@gluon.jit
def _compute(
    part: gl.constexpr, out, ring, call, tiles: gl.constexpr, ROTATED: gl.constexpr, STEADY: gl.constexpr
):  # fmt: skip
    """A consumer: the `part`-th 64 keys of each job. No product is left running at the end of a round."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.m, 16])
    DK: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, DK, 2)
    held, score = ring.held, call.rules.score
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    while await_job(part, held, done):
        place = (done & 1) * CONSUMERS + part
        share = noted_share(part, held, done, call, tiles, True)
        dk = gl.zeros([ROWS, tiles.d], gl.float32, DK)
        dv = gl.zeros([ROWS, tiles.d], gl.float32, DK)
        outbox = None
        if ring.handover is None:
            idle = has_no_rows(share, held, call)
        else:
            # The third warpgroup waits for both consumers.
            item, _ = noted_item(held.agenda, share.number, call)
            outbox = Outbox(ring.handover, part, shared(item.end))
            idle = False
        if idle:
            pass_over(ring.stream, step, step + share.count)
        elif share.count > 0:
            zero = gl.zeros([ROWS, tiles.m], gl.float32, S)
            k_tile = held.first.index(place).reshape([ROWS, tiles.d])
            v_tile = held.second.index(place).reshape([ROWS, tiles.d])
            # From registers as far as there are some, and masks of partial blocks take many: shared memory feeds
            # products with few queries too slowly.
            if (tiles.d == 64) or (tiles.listed == 0) or (call.rules.blocks.masks is None):
                k_tile = k_tile.load(gl.DotOperandLayout(0, S, 2))
            if (tiles.d == 64) and (ring.handover is None):
                v_tile = v_tile.load(gl.DotOperandLayout(0, S, 2))
            if ROTATED:
                dk, dv = _rotated(
                    step, dk, dv, k_tile, v_tile, zero, share, outbox, ring, call, OPERAND, STEADY, tiles
                )
            else:
                dk, dv = _late(step, dk, dv, k_tile, v_tile, zero, share, ring, call, OPERAND, STEADY, tiles)
        leave(held.first.index(place), dk * score.scale, out.dk, share, held, call, tiles.d)
        if score.seed is not None:
            dv = dv * score.keep_scale
        leave(held.second.index(place), dv, out.dv, share, held, call, tiles.d)
        mbarrier.arrive(held.empty.index(place), count=1)
        step += share.count
        done += 1


@gluon.jit
def _consumer_0(out, ring, call, tiles: gl.constexpr, ROTATED: gl.constexpr, STEADY: gl.constexpr):
    _compute(0, out, ring, call, tiles, ROTATED, STEADY)


@gluon.jit
def _consumer_1(out, ring, call, tiles: gl.constexpr, ROTATED: gl.constexpr, STEADY: gl.constexpr):
    _compute(1, out, ring, call, tiles, ROTATED, STEADY)


@gluon.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "total", "plane"])
def dkdv_kernel(
    dout, sums, dk, dk_rows, dv, dv_rows, q, k, v, rowwise, plane, work, claims, mask, dense, blocks, score, bias,
    diagonal, heads, group, len_q, len_k, num_tiles, total, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, ROTATED: gl.constexpr, STEADY: gl.constexpr, LISTED: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Writes `dk` and `dv`. They, `dout`, `q`, `k` and `v` are descriptors of `(B, H, S, D)` with boxes of BLOCK_M
    (dout, q) or 64 rows; `dk_rows` and `dv_rows` are Operands. `rowwise` and its planes are those of rows.py. If not
    None, `sums`, the descriptor that `add_queries` takes, gets the gradient of the queries added, but for its scale.

    STEADY: full blocks have a loop of their own, without masks. Grid: programs that share the `total` tiles of 128
    keys of all their heads and batch rows.
    """
    gl.static_assert((score.softcap is None) and (bias.ptr is None), "scores are only scaled")
    tiles: gl.constexpr = Tiles(BLOCK_M, CONSUMERS * ROWS, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    call = Call(work, rules, diagonal, heads, group, len_q, len_k, num_tiles, total, claims)
    WORDS: gl.constexpr = 4 if score.seed is not None else 2
    WORD: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    handover = None
    if sums is not None:
        gl.static_assert(ROTATED, "gradients of scores are handed over by `_rotated`")
        handover = allocate_handover(sums, q.dtype, BLOCK_M, HEAD_DIM)
    ring = Ring(
        allocate_held(k, v, HEAD_DIM, 1 if sums is None else 2),
        # The second arrival is that of the queries' words.
        allocate_stream(q, dout, BLOCK_M, HEAD_DIM, STAGES, 2),
        gl.allocate_shared_memory(gl.float32, [STAGES * WORDS, BLOCK_M], WORD),
        WORDS,
        handover,
    )
    out = Gradients(dk_rows, dv_rows)
    # Written out twice: Triton takes functions in the list itself alone.
    if sums is None:
        gl.warp_specialize(
            [
                (_consumer_0, (out, ring, call, tiles, ROTATED, STEADY)),
                (_consumer_1, (out, ring, call, tiles, ROTATED, STEADY)),
                (_load, (q, dout, k, v, dk, dv, rowwise, plane, ring, call, tiles)),
                (scout, (ring.held.agenda, call, tiles, True)),
            ],
            [4, 1, 1],
            [240, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer_0, (out, ring, call, tiles, ROTATED, STEADY)),
                (_consumer_1, (out, ring, call, tiles, ROTATED, STEADY)),
                (add_queries, (sums, ring, call, tiles)),
                (_load, (q, dout, k, v, dk, dv, rowwise, plane, ring, call, tiles)),
                (scout, (ring.held.agenda, call, tiles, True)),
            ],
            [4, 4, 1, 1],
            [208, 72, 24, 24],
        )
