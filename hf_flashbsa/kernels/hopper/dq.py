"""The gradient of the queries for Hopper, in Gluon: two warpgroups of 64 queries each compute what one warp finds
(scout.py) and one loads by TMA.

A job holds 128 queries and walks over their keys, without atomics, so results repeat bitwise. Before it does, it makes
what the backward kernels need of each query (rows.py).

The gradients of the scores feed the product with the keys from registers. It is issued one block later, behind the
first two products of the next block, and runs while that block's weights are computed.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.hopper.common import CONSUMERS, ROWS, Call, hide_outside
from hf_flashbsa.kernels.hopper.jobs import (
    allocate_held,
    allocate_stream,
    await_job,
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
    wait_for,
)
from hf_flashbsa.kernels.hopper.scout import is_job, noted_item, noted_job, scout
from hf_flashbsa.kernels.primitives import (
    asks_ids,
    dropout_keep,
    hide_segments,
    log2_factor,
    partial_position,
    place_of,
    visible,
    within,
)
from hf_flashbsa.kernels.records import Rules, Tiles
from hf_flashbsa.kernels.rows import begin_rows, finish_rows


class Ring(NamedTuple):
    """Shared memory: queries and output gradients are held; outputs, then keys and values pass by."""

    held: object
    stream: object


class Sources(NamedTuple):
    """What `Rows` are made from besides outputs and their gradients, rows `lse` and `dlse`, and the planes that they
    go to."""

    lse: object
    dlse: object
    rowwise: object
    plane: object


@gluon.jit
def _fill_out(stream, i, out, job, tiles: gl.constexpr):
    """Loads the outputs of a job's queries as block `i` of the stream."""
    stage, phase = i % stream.stages, (i // stream.stages) & 1
    full = stream.full.index(stage)
    row, begin = job.item.row, job.item.begin
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
    mbarrier.expect(full, tiles.m * tiles.d * 2)
    tma.async_copy_global_to_shared(out, [row, job.head, begin, 0], full, stream.first.index(stage))
    if tiles.n == ROWS:
        tma.async_copy_global_to_shared(out, [row, job.head, begin + ROWS, 0], full, stream.second.index(stage))


@gluon.jit
def _out(part: gl.constexpr, stream, i, tiles: gl.constexpr):
    """A consumer's 64 rows of the outputs that are block `i` of the stream."""
    if tiles.n == ROWS:
        return tile_of(stream.first if part == 0 else stream.second, stream, i, ROWS, tiles.d)
    else:
        return tile_of(stream.first, stream, i, tiles.n, tiles.d).slice(part * ROWS, ROWS)


@gluon.jit
def _fill(i, step, k, v, job, done, ring, call, tiles: gl.constexpr):
    """Loads a job's `i`-th block of keys and values as block `step` of the stream."""
    is_partial = i < job.partial
    if is_partial:
        # The job is read anew, because the producer has registers for little.
        whole = noted_job(ring.held.agenda, done, call, tiles, False)
        position = partial_position(whole.span, i, tiles.n, tiles)
    else:
        position = job.span.full_begin + (i - job.partial) * tiles.n
    first = place_of(job.span, call.rules.blocks, position, tiles)
    noted = is_partial if call.rules.score.seed is None else True  # dropout goes by the places of all keys
    fill(ring.stream, step, k, v, job.item.other_row, job.head // call.group, first, noted, tiles.n, tiles.d)


@gluon.jit
def _load(q, dout, k, v, out, dq, ring, call, tiles: gl.constexpr):
    """The producer."""
    held = ring.held
    # Once consumers have given back a block of a job, they have left the results of the job before.
    early = ring.stream.stages
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    prepare(held, done, q, dout, call, tiles)
    while is_job(held.agenda, done):
        job = noted_job(held.agenda, done, call, tiles, False)
        _fill_out(ring.stream, step, out, job, tiles)
        step += 1
        for i in range(gl.maximum(job.count, early + 2)):
            if i == early:
                send_results(held, done + 1, dq, None, call.len_q, call)
            if i == early + 1:
                prepare(held, done + 1, q, dout, call, tiles)
            if i < job.count:
                _fill(i, step + i, k, v, job, done, ring, call, tiles)
        step += job.count
        done += 1
    send_results(held, done + 1, dq, None, call.len_q, call)
    tma.store_wait(0)


@gluon.jit
def _rows(part: gl.constexpr, step, queries, do_tile, sources, share, ring, call, tiles: gl.constexpr):
    """Makes Rows of a share's queries. Their outputs are block `step` of the stream, which it gives back."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([tiles.d // 16, 8], [32 * 8 // tiles.d, tiles.d // 8], [4, 1], [1, 0])
    score = call.rules.score
    item, head = noted_item(ring.held.agenda, share.number, call)
    batch_head, live = item.row * call.heads + head, queries < item.end
    rows = begin_rows(sources.lse, sources.dlse, score, batch_head, queries, live, call.len_q)
    wait_for(ring.stream, step)
    out, dout = _out(part, ring.stream, step, tiles).load(LAYOUT), do_tile.load(LAYOUT)
    product = gl.convert_layout(gl.sum(out.to(gl.float32) * dout.to(gl.float32), 1), queries.type.layout)
    release(ring.stream, step)
    return finish_rows(rows, product, sources.rowwise, sources.plane, score, batch_head, queries, live, call.len_q)


@gluon.jit
def _keys(ring, i, tiles: gl.constexpr):
    """Block `i` of the keys."""
    return tile_of(ring.stream.first, ring.stream, i, tiles.n, tiles.d)


@gluon.jit
def _weights(i, step, s, rows, share, ring, call, MASKED: gl.constexpr, tiles: gl.constexpr):
    """Weights of a share's queries with block `i` of its job, block `step` of the stream, before dropout."""
    rules = call.rules
    if MASKED and (i < share.partial):
        item, head = noted_item(ring.held.agenda, share.number, call)
        first, _ = noted_block(ring.stream, step)
        queries = share.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
        keys = first + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
        if (tiles.listed > 0) and (rules.blocks.masks is not None):  # all at once takes fewer registers here
            inside = within(rules.mask, queries, keys, item.end, item.lo, item.hi, item.diagonal, False)
            ok = visible(
                rules, item.row, head, queries[:, None], keys[None, :], inside, item.query_origin, item.key_origin,
                share.begin, first, tiles,
            )  # fmt: skip
            s = gl.where(ok, s, float("-inf"))
        else:
            s = hide_outside(s, rules, share.begin, first, item.lo, item.hi, item.diagonal, tiles, False)
        s = hide_segments(s, rules.mask, item.row, item.other_row, asks_ids(item), queries[:, None], keys[None, :])
    return gl.exp2(s * log2_factor(rules) - rows.lse[:, None])


@gluon.jit
def _gradient(step, p, dp, rows, share, ring, score):
    """Gradient of the scaled scores of block `step` of the stream."""
    if score.seed is not None:
        first, _ = noted_block(ring.stream, step)
        offsets = gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, p.type.layout))[None, :]
        keep = dropout_keep(score, rows.pad[:, None], rows.factor[:, None], first - share.key_origin, offsets)
        dp = gl.where(keep, dp * score.keep_scale, 0.0)
    return p * (dp - rows.delta[:, None])


@gluon.jit
def _rounds(
    begin, end, step, ds, dq, q_tile, do_tile, zero, rows, share, ring, call, DS: gl.constexpr, MASKED: gl.constexpr,
    tiles: gl.constexpr,
):  # fmt: skip
    """Adds blocks `[begin - 1, end - 1)` of a job to `dq`, without masks for their successors unless `MASKED`. `ds` is
    that of the first block, then that of block `end - 1`."""
    dtype: gl.constexpr = ring.held.first.dtype
    for i in range(begin, end):
        at, last = step + i, step + i - 1
        s, dp = start_products(i, at, q_tile, do_tile, zero, share, ring, call, MASKED, tiles.n, tiles.d)
        dq_next = warpgroup_mma(ds, _keys(ring, last, tiles), dq, is_async=True)
        s = warpgroup_mma_wait(2, deps=(s,))
        p = _weights(i, at, s, rows, share, ring, call, MASKED, tiles)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds_next = _gradient(at, p, dp, rows, share, ring, call.rules.score)
        # The product in flight reads the registers of `ds`.
        dq, _ = warpgroup_mma_wait(0, deps=(dq_next, ds))
        release(ring.stream, last)
        ds = gl.convert_layout(ds_next.to(dtype), DS)
    return ds, dq


@gluon.jit
def _gradients(
    step, dq, q_tile, do_tile, rows, share, ring, call, S: gl.constexpr, DS: gl.constexpr, STEADY: gl.constexpr,
    tiles: gl.constexpr,
):  # fmt: skip
    """Adds all blocks of a job, of which the first one is block `step` of the stream, to `dq`."""
    dtype: gl.constexpr = ring.held.first.dtype
    zero = gl.zeros([ROWS, tiles.n], gl.float32, S)
    if tiles.n == 64:
        # From registers, which blocks of 128 keys leave none of: shared memory feeds products with 64 keys too slowly.
        q_tile = q_tile.load(gl.DotOperandLayout(0, S, 2))
    s, dp = start_products(0, step, q_tile, do_tile, zero, share, ring, call, True, tiles.n, tiles.d)
    s, dp = warpgroup_mma_wait(0, deps=(s, dp))
    p = _weights(0, step, s, rows, share, ring, call, True, tiles)
    ds = gl.convert_layout(_gradient(step, p, dp, rows, share, ring, call.rules.score).to(dtype), DS)
    masked = share.count
    if STEADY:
        masked = gl.maximum(share.partial, 1)
    ds, dq = _rounds(1, masked, step, ds, dq, q_tile, do_tile, zero, rows, share, ring, call, DS, True, tiles)
    if STEADY:
        ds, dq = _rounds(
            masked, share.count, step, ds, dq, q_tile, do_tile, zero, rows, share, ring, call, DS, False, tiles
        )
    last = step + share.count - 1
    dq = warpgroup_mma(ds, _keys(ring, last, tiles), dq, is_async=True)
    dq = warpgroup_mma_wait(0, deps=(dq,))
    release(ring.stream, last)
    return dq


@gluon.jit
def _compute(part: gl.constexpr, dq_rows, sources, ring, call, tiles: gl.constexpr, STEADY: gl.constexpr):
    """A consumer: the `part`-th 64 queries of each job. No product is left running at the end of a round."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.n, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    DS: gl.constexpr = gl.DotOperandLayout(0, DQ, 2)
    held = ring.held
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    while await_job(part, held, done):
        place = (done & 1) * CONSUMERS + part
        share = noted_share(part, held, done, call, tiles, False)
        queries = share.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        q_tile = held.first.index(place).reshape([ROWS, tiles.d])
        do_tile = held.second.index(place).reshape([ROWS, tiles.d])
        rows = _rows(part, step, queries, do_tile, sources, share, ring, call, tiles)
        step += 1
        dq = gl.zeros([ROWS, tiles.d], gl.float32, DQ)
        if has_no_rows(share, held, call):
            pass_over(ring.stream, step, step + share.count)
        elif share.count > 0:
            dq = _gradients(step, dq, q_tile, do_tile, rows, share, ring, call, S, DS, STEADY, tiles)
        leave(held.first.index(place), dq * call.rules.score.scale, dq_rows, share, held, call, tiles.d)
        mbarrier.arrive(held.empty.index(place), count=1)
        step += share.count
        done += 1


@gluon.jit
def _consumer_0(dq_rows, sources, ring, call, tiles: gl.constexpr, STEADY: gl.constexpr):
    _compute(0, dq_rows, sources, ring, call, tiles, STEADY)


@gluon.jit
def _consumer_1(dq_rows, sources, ring, call, tiles: gl.constexpr, STEADY: gl.constexpr):
    _compute(1, dq_rows, sources, ring, call, tiles, STEADY)


@gluon.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "total", "plane"])
def dq_kernel(
    dout, dq, dq_rows, q, k, v, out, lse, dlse, rowwise, plane, work, claims, mask, dense, blocks, score, bias,
    diagonal, heads, group, len_q, len_k, num_tiles, total, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, STEADY: gl.constexpr, LISTED: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Writes `dq` and `rowwise`. `dout`, `dq`, `q`, `k`, `v` and `out` are descriptors of `(B, H, S, D)` with boxes of
    64 (dout, dq, q) or BLOCK_N rows; `dq_rows`, an Operand, is `dq` once more, for parts of tiles whose box has rows
    of another sequence.

    STEADY: full blocks have a loop of their own, without masks, which pays where masked ones are not the first alone.
    A block of keys is needed a round longer than its values: from STAGES = 3 on, blocks load ahead. Grid: programs
    that share the `total` tiles of 128 queries of all heads and batch rows.
    """
    gl.static_assert((score.softcap is None) and (bias.ptr is None), "scores are only scaled")
    tiles: gl.constexpr = Tiles(CONSUMERS * ROWS, BLOCK_N, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    call = Call(work, rules, diagonal, heads, group, len_q, len_k, num_tiles, total, claims)
    ring = Ring(
        allocate_held(q, dout, HEAD_DIM, 1),
        allocate_stream(k, v, BLOCK_N, HEAD_DIM, STAGES, 1),
    )
    sources = Sources(lse, dlse, rowwise, plane)
    gl.warp_specialize(
        [
            (_consumer_0, (dq_rows, sources, ring, call, tiles, STEADY)),
            (_consumer_1, (dq_rows, sources, ring, call, tiles, STEADY)),
            (_load, (q, dout, k, v, out, dq, ring, call, tiles)),
            (scout, (ring.held.agenda, call, tiles, False)),
        ],
        [4, 1, 1],
        [240, 24, 24],
    )
