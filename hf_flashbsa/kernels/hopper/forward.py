"""The forward kernel for Hopper, in Gluon: one warp loads by TMA, two warpgroups of 64 queries each compute.

Within a warpgroup the product with the values of a block runs while the softmax of the next block is computed (the
scheme of FlashAttention-3, Shah et al., arXiv 2407.08608). Only the loading warp finds out which tiles and blocks
there are: ahead of time, it notes in shared memory what the others ask, who have neither time nor registers for it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_flashbsa.kernels.hopper.common import (
    CONSUMERS,
    ROWS,
    Call,
    barrier,
    by_thread,
    clear,
    first_key,
    pass_token,
    read_note,
    span_met,
    take_token,
    visits,
    write_note,
)
from hf_flashbsa.kernels.hopper.softmax import (
    State,
    are_too_large,
    drop,
    hide,
    no_state,
    operand,
    shrunk,
    softmax,
    softmax_unchecked,
    store,
)
from hf_flashbsa.kernels.hopper.turns import claim, first_place, second_place, settled, tile_at
from hf_flashbsa.kernels.primitives import block_pointer, dropout_words
from hf_flashbsa.kernels.records import Item, Rules, Tiles


class Ring(NamedTuple):
    """Shared memory, and the barriers that say what is in it."""

    q_tiles: object
    k_tiles: object
    v_tiles: object
    q_full: object
    q_empty: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    tile_notes: object
    block_notes: object


#: Tiles whose queries, and later results, have room in shared memory. With two, a tile of a single block has none for
#: the queries of the tile after it until the results before it are stored.
SLOTS = gl.constexpr(3)
#: How many numbers are noted of the tile in a slot of queries (`_note_tile`), and of the block in a stage: its first
#: key, what to do with it, what the grid of a layout says of it, and how many full blocks of the tile follow.
TILE_NOTES = gl.constexpr(10)
BLOCK_NOTES = gl.constexpr(4)
#: What to do with a block: its scores need masking; it or the full ones that follow end their tile; the program.
MASKED = gl.constexpr(1)
LAST = gl.constexpr(2)
FINAL = gl.constexpr(4)


@gluon.jit
def _note_tile(notes, slot, call, head, begin, item, span):
    """Notes what a consumer asks about its part of a tile, from query `begin` on."""
    place = slot * TILE_NOTES
    write_note(notes, place, item.row)
    write_note(notes, place + 1, head)
    write_note(notes, place + 2, begin)
    write_note(notes, place + 3, item.end)
    write_note(notes, place + 4, span.lo)
    write_note(notes, place + 5, span.hi)
    if call.work is not None:
        write_note(notes, place + 6, item.other_row)
        write_note(notes, place + 7, item.diagonal)
        write_note(notes, place + 8, item.query_origin)
        write_note(notes, place + 9, item.key_origin)
    barrier()  # one thread tells of what all of them wrote


@gluon.jit
def _noted_tile(notes, slot, call):
    """The head and part of a tile that were noted, as an Item whose bounds `lo` and `hi` are those of the span."""
    place = slot * TILE_NOTES
    row, head, begin = read_note(notes, place), read_note(notes, place + 1), read_note(notes, place + 2)
    end, lo, hi = read_note(notes, place + 3), read_note(notes, place + 4), read_note(notes, place + 5)
    other_row, diagonal, query_origin, key_origin = row, call.diagonal, 0, 0
    if call.work is not None:
        other_row, diagonal = read_note(notes, place + 6), read_note(notes, place + 7)
        query_origin, key_origin = read_note(notes, place + 8), read_note(notes, place + 9)
    return head, Item(row, begin, end, other_row, lo, lo, hi, hi, diagonal, query_origin, key_origin)


@gluon.jit
def _span(call, item, head, tiles: gl.constexpr):
    """What a tile visits, and in how many blocks: one at least, in which nothing may be visible."""
    span = span_met(item, call.rules, head, tiles, False)
    return span, gl.maximum(visits(span, tiles), 1)


@gluon.jit
def _block(call, span, grid_row, index, tiles: gl.constexpr):
    """First key of the `index`-th block that is visited, and what the grid says of it: 0 where nothing is met."""
    first = first_key(span, call.rules.blocks, index, tiles)
    kind = gl.where(visits(span, tiles) > 0, 1, 0)
    if tiles.listed > 0:
        if call.rules.blocks.masks is not None:
            if index < span.partial:
                kind = gl.load(grid_row + (first - span.origin) // tiles.listed)
    return first, kind


@gluon.jit
def _empty_slots(out, ring, done, call):
    """Waits for the slots of the `done`-th tile: until the results that consumers left there, of the tile SLOTS before
    it, are on their way and the slots may be written.
    """
    for part in gl.static_range(CONSUMERS):
        slot = done % SLOTS * CONSUMERS + part
        mbarrier.wait(ring.q_empty.index(slot), ((done // SLOTS) & 1) ^ 1)
        if done >= SLOTS:
            head, item = _noted_tile(ring.tile_notes, slot, call)
            begin = item.begin
            if call.work is not None:
                # Nothing is written beyond the tensor. Consumers write parts that end early (`store`).
                begin = gl.where(begin + ROWS > item.end, call.len_q, begin)
            tma.async_copy_shared_to_global(out, [item.row, head, begin, 0], ring.q_tiles.index(slot))
    tma.store_wait(0)


@gluon.jit
def _load_queries(q, out, done, head, item, span, ring, call, tiles: gl.constexpr):
    """Loads and notes the `done`-th tile."""
    _empty_slots(out, ring, done, call)
    for part in gl.static_range(CONSUMERS):
        slot, begin = done % SLOTS * CONSUMERS + part, item.begin + part * ROWS
        _note_tile(ring.tile_notes, slot, call, head, begin, item, span)
        mbarrier.expect(ring.q_full.index(slot), ROWS * tiles.d * 2)
        tma.async_copy_global_to_shared(
            q, [item.row, head, begin, 0], ring.q_full.index(slot), ring.q_tiles.index(slot)
        )


@gluon.jit
def _load_keys(k, row, head, first, todo, kind, full, step, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Loads the keys of the `step`-th block, and notes what to do with it."""
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(ring.k_empty.index(stage), phase ^ 1)
    write_note(ring.block_notes, stage * BLOCK_NOTES, first)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 1, todo)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 2, kind)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 3, full)
    barrier()
    mbarrier.expect(ring.k_full.index(stage), tiles.n * tiles.d * 2)
    tma.async_copy_global_to_shared(k, [row, head, first, 0], ring.k_full.index(stage), ring.k_tiles.index(stage))


@gluon.jit
def _load_values(v, row, head, first, step, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Loads the values of the `step`-th block."""
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(ring.v_empty.index(stage), phase ^ 1)
    mbarrier.expect(ring.v_full.index(stage), tiles.n * tiles.d * 2)
    tma.async_copy_global_to_shared(v, [row, head, first, 0], ring.v_full.index(stage), ring.v_tiles.index(stage))


@gluon.jit
def _load(q, k, v, out, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr):
    """The producer, which also finds out what to load, and notes it for the consumers.

    Values follow the keys of the next block: consumers need the two at once, and what to load for the next tile is
    found out while they still compute with what they have.
    """
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    v_row, v_head, v_first = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    place = first_place(call, tiles, False)
    following = second_place(call, place, tiles, False)
    while place < call.total:
        claimed = claim(call, done + 2)
        head, item = tile_at(call, place, tiles, False)
        span, count = _span(call, item, head, tiles)
        head_k = head // call.group
        grid_row = 0
        if tiles.listed > 0:
            if call.rules.blocks.masks is not None:
                # Tiles that meet nothing may lie beyond the grid.
                own = gl.where(visits(span, tiles) > 0, item.begin - item.query_origin, 0)
                grid_row = block_pointer(call.rules.blocks, item.row, head, own, 0, tiles)
        first, kind = _block(call, span, grid_row, 0, tiles)
        at_end = gl.where(following < call.total, LAST, LAST | FINAL)
        # The last block that consumers ask notes of.
        general = gl.maximum(span.partial - 1, 0) if STEADY else count - 1
        todo = gl.where((span.partial > 0) | (kind == 0), MASKED, 0) | gl.where(general == 0, at_end, 0)
        full = gl.where(general == 0, count - 1, 0)
        _load_keys(k, item.other_row, head_k, first, todo, kind, full, step, ring, tiles, STAGES)
        if done > 0:
            _load_values(v, v_row, v_head, v_first, step - 1, ring, tiles, STAGES)
        # Last, since consumers may wait for those values before they leave the slots.
        _load_queries(q, out, done, head, item, span, ring, call, tiles)
        v_row, v_head, v_first = gl.to_tensor(item.other_row), head_k, first
        step += 1
        first, kind = _block(call, span, grid_row, gl.minimum(1, count - 1), tiles)
        for i in range(1, count):
            # On its way while this round waits.
            coming, coming_kind = _block(call, span, grid_row, gl.minimum(i + 1, count - 1), tiles)
            todo = gl.where(i < span.partial, MASKED, 0) | gl.where(i == general, at_end, 0)
            full = gl.where(i == general, count - 1 - i, 0)
            _load_keys(k, item.other_row, head_k, first, todo, kind, full, step, ring, tiles, STAGES)
            _load_values(v, item.other_row, head_k, v_first, step - 1, ring, tiles, STAGES)
            v_first = first
            first, kind = coming, coming_kind
            step += 1
        place, following = following, settled(call, claimed, tiles, False)
        done += 1
    if done > 0:
        _load_values(v, v_row, v_head, v_first, step - 1, ring, tiles, STAGES)
    for i in gl.static_range(SLOTS):
        _empty_slots(out, ring, done + i, call)


@gluon.jit
def _place(first, q_slot, ring, call):
    """The place in its sequence of a block's first key, for dropout."""
    if call.rules.score.seed is not None:
        if call.work is not None:
            _, item = _noted_tile(ring.tile_notes, q_slot, call)
            first -= item.key_origin
    return first


@gluon.jit
def _scores(step, q_slot, s, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Starts the product of the queries in a slot with the keys of the `step`-th block."""
    k_tile = ring.k_tiles.index(step % STAGES).reshape([tiles.n, tiles.d])
    q_tile = ring.q_tiles.index(q_slot).reshape([ROWS, tiles.d])
    return warpgroup_mma(q_tile, k_tile.permute((1, 0)), s, use_acc=False, is_async=True)


@gluon.jit
def _start(
    part: gl.constexpr, step, q_slot, s, p, o, begun, live, ring, tiles: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Starts the products of the queries in a slot with the keys of the `step`-th block, if there is one, and of the
    weights of the block before with its values, if there are some; these are added to `o` where it has `begun`."""
    stage, before = step % STAGES, (step + STAGES - 1) % STAGES
    mbarrier.wait(ring.k_full.index(stage), (step // STAGES) & 1, pred=live)
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
    QUAD: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(1, by_thread(s).type.layout))
    state = no_state(QUAD)
    pad = gl.zeros([ROWS], gl.uint32, ROW)
    factor = gl.zeros([ROWS], gl.uint32, ROW)
    # Triton loses changes of a variable that enters a loop as the value of another one.
    step, done, todo = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(LAST)
    begun = gl.to_tensor(0)
    if part == 1:
        step = pass_token(0, step)
    running = first_place(call, tiles, False) < call.total
    while running:
        live = (todo & FINAL) == 0
        fresh = (todo & LAST) != 0
        stage = step % STAGES
        q_slot = done % SLOTS * CONSUMERS + part
        mbarrier.wait(ring.q_full.index(q_slot), (done // SLOTS) & 1, pred=fresh & live)
        s, product = _start(part, step, q_slot, s, p, o, begun, live, ring, tiles, STAGES)
        s = warpgroup_mma_wait(1, deps=(s,))
        first = read_note(ring.block_notes, stage * BLOCK_NOTES)
        todo = read_note(ring.block_notes, stage * BLOCK_NOTES + 1)
        kind = read_note(ring.block_notes, stage * BLOCK_NOTES + 2)
        # The round without block reads what was noted of another one.
        full = gl.where(live, read_note(ring.block_notes, stage * BLOCK_NOTES + 3), 0)
        mbarrier.arrive(ring.k_empty.index(stage), count=1, pred=live)
        old = state
        if fresh:
            state = no_state(QUAD)
            if rules.score.seed is not None:
                head, item = _noted_tile(ring.tile_notes, q_slot, call)
                rows = item.begin + gl.arange(0, ROWS, layout=ROW)
                pad, factor = dropout_words(rules.score, item.row * call.heads + head, rows)
        shrink = gl.full([ROWS, 4], 1.0, gl.float32, QUAD)
        # Not for the sake of the last round: ptxas would move the wait behind it before the exponentials.
        if live:
            if (todo & MASKED) != 0:
                head, item = _noted_tile(ring.tile_notes, q_slot, call)
                s = hide(s, rules, head, item, first, kind, tiles)
                # What TMA brings from beyond the tensor is 0.
                if (first < item.lo) | (gl.minimum(first + tiles.n, call.len_k) > item.hi):
                    mbarrier.wait(ring.v_full.index(stage), (step // STAGES) & 1)
                    values = ring.v_tiles.index(stage).reshape([tiles.n, tiles.d])
                    clear(values, first, item.lo, item.hi, tiles.n, tiles.d)
            place = _place(first, q_slot, ring, call)
            s, shrink, state = softmax(s, state, rules, tiles)
            s = drop(s, place, pad, factor, rules, tiles)
        o = warpgroup_mma_wait(0, deps=(product,))
        if fresh:
            if step > 0:
                old_slot = (done + SLOTS - 1) % SLOTS * CONSUMERS + part
                head, item = _noted_tile(ring.tile_notes, old_slot, call)
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
                s, product = _start(part, step, q_slot, s, p, o, begun, True, ring, tiles, STAGES)
                if rules.score.seed is not None:
                    first = read_note(ring.block_notes, step % STAGES * BLOCK_NOTES)
                s = warpgroup_mma_wait(1, deps=(s,))
                s, sums = softmax_unchecked(s, state, rules, tiles)
                retry = are_too_large(part, sums, step)
                o = warpgroup_mma_wait(0, deps=(product,))
                if retry != 0:
                    s = warpgroup_mma_wait(0, deps=(_scores(step, q_slot, s, ring, tiles, STAGES),))
                    s, shrink, state = softmax(s, state, rules, tiles)
                    o = shrunk(o, shrink)
                else:
                    state = State(state.pivot, state.sum + sums)
                mbarrier.arrive(ring.k_empty.index(step % STAGES), count=1)
                s = drop(s, _place(first, q_slot, ring, call), pad, factor, rules, tiles)
                p = operand(s, P, ring.q_tiles.dtype)
                mbarrier.arrive(ring.v_empty.index((step + STAGES - 1) % STAGES), count=1)
                step += 1
                begun = gl.to_tensor(1)
        done += gl.where((todo & LAST) != 0, 1, 0)
        running = live
    if part == 0:
        take_token(0, step)  # which is left


@gluon.jit
def _consumer_0(
    rows_out, lse, sinks, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
    _compute(0, rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)


@gluon.jit
def _consumer_1(
    rows_out, lse, sinks, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr,
):  # fmt: skip
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
    ring = Ring(
        gl.allocate_shared_memory(q.dtype, [SLOTS * CONSUMERS, 1, 1, ROWS, HEAD_DIM], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v.layout),
        gl.allocate_shared_memory(gl.int64, [SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [SLOTS * CONSUMERS, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(
            gl.int32, [SLOTS * CONSUMERS * TILE_NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
        ),
        gl.allocate_shared_memory(gl.int32, [STAGES * BLOCK_NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])),
    )
    for slot in gl.static_range(SLOTS * CONSUMERS):
        mbarrier.init(ring.q_full.index(slot), count=1)
        mbarrier.init(ring.q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.k_full.index(stage), count=1)
        mbarrier.init(ring.v_full.index(stage), count=1)
        mbarrier.init(ring.k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(ring.v_empty.index(stage), count=CONSUMERS)
    gl.warp_specialize(
        [
            (_consumer_0, (rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)),
            (_consumer_1, (rows_out, lse, sinks, ring, call, tiles, STAGES, STEADY)),
            (_load, (q, k, v, out, ring, call, tiles, STAGES, STEADY)),
        ],
        [4, 1],
        [232, 40],
    )
