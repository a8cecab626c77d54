"""What the loading warp of the Hopper forward kernel does.

It finds out which tiles and blocks there are, loads them by TMA, notes in shared memory what the consumers ask about
them, who have neither time nor registers for it, and sends off the results that they leave.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hf_flashbsa.kernels.hopper.common import (
    CONSUMERS,
    ROWS,
    barrier,
    first_key,
    read_note,
    span_met,
    visits,
    write_note,
)
from hf_flashbsa.kernels.hopper.turns import claim, first_place, second_place, settled, tile_at
from hf_flashbsa.kernels.primitives import block_pointer
from hf_flashbsa.kernels.records import Item


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
def allocate_ring(q, k, v, BLOCK_N: gl.constexpr, HEAD_DIM: gl.constexpr, STAGES: gl.constexpr):
    """Room for the queries of SLOTS tiles, a part for each consumer, and for STAGES blocks of keys and of values."""
    PARTS: gl.constexpr = SLOTS * CONSUMERS
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    NOTE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ring = Ring(
        gl.allocate_shared_memory(q.dtype, [PARTS, 1, 1, ROWS, HEAD_DIM], q.layout),
        gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k.layout),
        gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v.layout),
        gl.allocate_shared_memory(gl.int64, [PARTS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [PARTS, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER),
        gl.allocate_shared_memory(gl.int32, [PARTS * TILE_NOTES, 1], NOTE),
        gl.allocate_shared_memory(gl.int32, [STAGES * BLOCK_NOTES, 1], NOTE),
    )
    for slot in gl.static_range(PARTS):
        mbarrier.init(ring.q_full.index(slot), count=1)
        mbarrier.init(ring.q_empty.index(slot), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ring.k_full.index(stage), count=1)
        mbarrier.init(ring.v_full.index(stage), count=1)
        mbarrier.init(ring.k_empty.index(stage), count=CONSUMERS)
        mbarrier.init(ring.v_empty.index(stage), count=CONSUMERS)
    return ring


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
def noted_tile(notes, slot, call):
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
            head, item = noted_tile(ring.tile_notes, slot, call)
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
def load(q, k, v, out, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr):
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
