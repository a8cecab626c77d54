"""The gradient of the queries for Hopper, in Gluon: one warp loads by TMA, two warpgroups of 64 queries each compute.

A program holds 128 queries and walks over their keys, without atomics, so results repeat bitwise. Before it does, it
makes what the backward kernels need of each query (rows.py).

The gradients of the scores feed the product with the keys from registers. It is issued one block later, behind the
first two products of the next block, and runs while that block's weights are computed.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from hf_flashbsa.kernels.hopper.common import (
    CONSUMERS,
    ROWS,
    Call,
    allocate_held,
    allocate_stream,
    clear_outside,
    fill,
    first_key,
    hold,
    load_rows,
    release,
    send_rows,
    span_met,
    start_products,
    tile_of,
    visits,
)
from hf_flashbsa.kernels.primitives import dropout_keep, log2_factor, scheduled, visible, within, work_item
from hf_flashbsa.kernels.records import Rules, Tiles
from hf_flashbsa.kernels.rows import begin_rows, finish_rows


class Ring(NamedTuple):
    """Shared memory: queries and output gradients are held, keys and values pass by."""

    held: object
    stream: object


class Sources(NamedTuple):
    """What `Rows` are made from, the Operand `out` and rows `lse` and `dlse`, and the planes that they go to."""

    out: object
    lse: object
    dlse: object
    rowwise: object
    plane: object


class Job(NamedTuple):
    """What a program works on: a tile of queries, their head, and the keys that they meet in `count` blocks."""

    item: object
    head: object
    span: object
    count: object


@gluon.jit
def _job(call, tiles: gl.constexpr):
    """The job of this program."""
    row, head, tile = scheduled(call.work, gl.program_id(0), call.num_tiles, call.heads, tiles.m)
    if call.work is None:
        tile = call.num_tiles - 1 - tile
    item = work_item(call.work, tile, row, call.len_q, call.len_k, call.diagonal, tiles.m)
    span = span_met(item, call.rules, head, tiles, False)
    return Job(item, head, span, visits(span, tiles))


@gluon.jit
def _load(q, dout, k, v, ring, call, tiles: gl.constexpr):
    """The producer."""
    job = _job(call, tiles)
    item = job.item
    # A program must not end before what it loads is there: consumers wait for all of it.
    if item.begin < item.end:
        hold(ring.held, q, dout, item.row, job.head, item.begin, tiles.d)
        head_k = job.head // call.group
        for i in range(job.count):
            first = first_key(job.span, call.rules.blocks, i, tiles)
            fill(ring.stream, i, k, v, item.other_row, head_k, first, tiles.n, tiles.d)


@gluon.jit
def _rows(part: gl.constexpr, begin, queries, sources, job, ring, call, tiles: gl.constexpr):
    """Waits for the tiles that the program holds, and makes Rows of its `part`-th 64 queries, from `begin` on."""
    item, score = job.item, call.rules.score
    batch_head, live = item.row * call.heads + job.head, queries < item.end
    rows = begin_rows(sources.lse, sources.dlse, score, batch_head, queries, live, call.len_q)
    out = load_rows(sources.out, item.row, job.head, begin, item.end, tiles.d)
    mbarrier.wait(ring.held.full.index(part), 0)
    dout = ring.held.second.index(part).reshape([ROWS, tiles.d]).load(out.type.layout)
    product = gl.convert_layout(gl.sum(out.to(gl.float32) * dout.to(gl.float32), 1), queries.type.layout)
    return finish_rows(rows, product, sources.rowwise, sources.plane, score, batch_head, queries, live, call.len_q)


@gluon.jit
def _look_ahead(job, rules, i, tiles: gl.constexpr):
    """What `_key_of` needs for block `i`, asked for a round earlier: entries of a list take their time to come.

    Only dropout needs the place of a full block. Otherwise `span.lo` stands for it, with as many keys behind it.
    """
    ahead = gl.to_tensor(0)
    if tiles.listed > 0:
        ahead = job.span.lo
        needed = job.span.partial if rules.score.seed is None else job.count
        if i < needed:
            ahead = first_key(job.span, rules.blocks, i, tiles)
    return ahead


@gluon.jit
def _key_of(job, ahead, i, tiles: gl.constexpr):
    """First key of block `i`."""
    if tiles.listed > 0:
        return ahead
    else:
        return first_key(job.span, None, i, tiles)


@gluon.jit
def _issue(i, first, q_tile, do_tile, ring, span, zero, tiles: gl.constexpr):
    """Starts the products of the queries with block `i` of the keys, and of their output gradients with its values."""
    clear_outside(ring.stream, i, first, span, tiles.n, tiles.d)
    return start_products(i, q_tile, do_tile, ring.stream, zero, tiles.n, tiles.d)


@gluon.jit
def _keys(ring, i, tiles: gl.constexpr):
    """Block `i` of the keys."""
    return tile_of(ring.stream.first, ring.stream, i, tiles.n, tiles.d)


@gluon.jit
def _weights(i, begin, first, s, job, rules, rows, tiles: gl.constexpr):
    """Weights of queries from `begin` on with block `i`, before dropout."""
    item, span = job.item, job.span
    queries = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
    keys = first + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
    if i < span.partial:
        inside = within(rules.mask, queries, keys, item.end, span.lo, span.hi, item.diagonal, False)
        ok = visible(
            rules, item.row, item.other_row, job.head, queries[:, None], keys[None, :], inside, item.query_origin,
            item.key_origin, begin, first, tiles,
        )  # fmt: skip
        s = gl.where(ok, s, float("-inf"))
    return gl.exp2(s * log2_factor(rules) - rows.lse[:, None])


@gluon.jit
def _gradient(first, p, dp, item, score, rows):
    """Gradient of the scaled scores of the block from key `first` on."""
    if score.seed is not None:
        offsets = gl.arange(0, p.shape[1], layout=gl.SliceLayout(0, p.type.layout))[None, :]
        keep = dropout_keep(score, rows.pad[:, None], rows.factor[:, None], first - item.key_origin, offsets)
        dp = gl.where(keep, dp * score.keep_scale, 0.0)
    return p * (dp - rows.delta[:, None])


@gluon.jit
def _compute(part: gl.constexpr, dq_out, dq_rows, sources, ring, call, tiles: gl.constexpr):
    """A consumer: the `part`-th 64 queries of the tile. No product is left running at the end of a round."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.n, 16])
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    DS: gl.constexpr = gl.DotOperandLayout(0, DQ, 2)
    job = _job(call, tiles)
    item, span = job.item, job.span
    if item.begin < item.end:
        rules = call.rules
        dtype: gl.constexpr = ring.held.first.dtype
        begin = item.begin + part * ROWS
        queries = begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
        rows = _rows(part, begin, queries, sources, job, ring, call, tiles)
        dq = gl.zeros([ROWS, tiles.d], gl.float32, DQ)
        if job.count > 0:
            zero = gl.zeros([ROWS, tiles.n], gl.float32, S)
            q_tile = ring.held.first.index(part).reshape([ROWS, tiles.d])
            do_tile = ring.held.second.index(part).reshape([ROWS, tiles.d])
            if tiles.n == 64:
                # From registers, which blocks of 128 keys leave none of: shared memory feeds products with 64 keys
                # too slowly.
                q_tile = q_tile.load(gl.DotOperandLayout(0, S, 2))
            first = _key_of(job, _look_ahead(job, rules, 0, tiles), 0, tiles)
            ahead = _look_ahead(job, rules, 1, tiles)
            s, dp = _issue(0, first, q_tile, do_tile, ring, span, zero, tiles)
            s, dp = warpgroup_mma_wait(0, deps=(s, dp))
            p = _weights(0, begin, first, s, job, rules, rows, tiles)
            ds = _gradient(first, p, dp, item, rules.score, rows)
            ds = gl.convert_layout(ds.to(dtype), DS)
            for i in range(1, job.count):
                begin_key = _key_of(job, ahead, i, tiles)
                s, dp = _issue(i, begin_key, q_tile, do_tile, ring, span, zero, tiles)
                ahead = _look_ahead(job, rules, i + 1, tiles)
                dq_next = warpgroup_mma(ds, _keys(ring, i - 1, tiles), dq, is_async=True)
                s = warpgroup_mma_wait(2, deps=(s,))
                p = _weights(i, begin, begin_key, s, job, rules, rows, tiles)
                dp = warpgroup_mma_wait(1, deps=(dp,))
                ds_next = _gradient(begin_key, p, dp, item, rules.score, rows)
                # The product in flight reads the registers of `ds`.
                dq, _ = warpgroup_mma_wait(0, deps=(dq_next, ds))
                release(ring.stream, i - 1)
                ds = gl.convert_layout(ds_next.to(dtype), DS)
            dq = warpgroup_mma(ds, _keys(ring, job.count - 1, tiles), dq, is_async=True)
            dq = warpgroup_mma_wait(0, deps=(dq,))
        send_rows(
            dq_out, dq_rows, call.len_q, item.row, job.head, begin, item.end, dq * rules.score.scale,
            ring.held.first.index(part), call, tiles.d,
        )  # fmt: skip
        tma.store_wait(0)


@gluon.jit
def _consumer_0(dq, dq_rows, sources, ring, call, tiles: gl.constexpr):
    _compute(0, dq, dq_rows, sources, ring, call, tiles)


@gluon.jit
def _consumer_1(dq, dq_rows, sources, ring, call, tiles: gl.constexpr):
    _compute(1, dq, dq_rows, sources, ring, call, tiles)


@gluon.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles", "plane"])
def dq_kernel(
    dout, dq, dq_rows, q, k, v, out, lse, dlse, rowwise, plane, work, mask, dense, blocks, score, bias, diagonal,
    heads, group, len_q, len_k, num_tiles, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    LISTED: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Writes `dq` and `rowwise`. `dout`, `dq`, `q`, `k` and `v` are descriptors of `(B, H, S, D)` with boxes of 64
    (dout, dq, q) or BLOCK_N rows, `dq_rows` and `out` are Operands.

    A block of keys is needed a round longer than its values: from STAGES = 3 on, blocks load ahead. Grid: tiles of 128
    queries x heads x batch rows.
    """
    gl.static_assert((score.softcap is None) and (bias.ptr is None), "scores are only scaled")
    tiles: gl.constexpr = Tiles(CONSUMERS * ROWS, BLOCK_N, HEAD_DIM, HEAD_DIM, HEAD_DIM, HEAD_DIM, LISTED, WIDTH)
    call = Call(work, Rules(mask, dense, blocks, score, bias), diagonal, heads, group, len_q, len_k, num_tiles, None)
    ring = Ring(
        allocate_held(q, dout, HEAD_DIM),
        allocate_stream(k, v, BLOCK_N, HEAD_DIM, STAGES, 1),
    )
    sources = Sources(out, lse, dlse, rowwise, plane)
    gl.warp_specialize(
        [
            (_consumer_0, (dq, dq_rows, sources, ring, call, tiles)),
            (_consumer_1, (dq, dq_rows, sources, ring, call, tiles)),
            (_load, (q, dout, k, v, ring, call, tiles)),
        ],
        [4, 1],
        [240, 24],
    )
