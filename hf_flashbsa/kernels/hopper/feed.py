"""What the loading warp of the Hopper forward kernel does.

It loads by TMA, block by block, the tiles that the scout finds (scout.py), notes in shared memory what consumers ask
about blocks, and sends off the results that they leave.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from hf_flashbsa.kernels.hopper.common import CONSUMERS, ROWS, barrier, clear, first_key, visits, write_note
from hf_flashbsa.kernels.hopper.scout import (
    allocate_agenda,
    await_found,
    is_job,
    noted_item,
    noted_job,
    noted_part,
    want,
)
from hf_flashbsa.kernels.primitives import block_pointer


class Ring(NamedTuple):
    """Shared memory, the barriers that say what is in it, and the `agenda` of tiles."""

    q_tiles: object
    k_tiles: object
    v_tiles: object
    q_full: object
    q_empty: object
    k_full: object
    k_empty: object
    v_full: object
    v_empty: object
    v_landed: object
    block_notes: object
    agenda: object


class Block(NamedTuple):
    """Where a block of keys and values lies, and which keys, `[lo, hi)`, its tile meets at all."""

    row: object
    head: object
    first: object
    lo: object
    hi: object


#: Tiles whose queries, and later results, have room in shared memory. With two, a tile of a single block has none for
#: the queries of the tile after it until the results before it are stored.
SLOTS = gl.constexpr(3)
#: How many rounds before consumers begin a tile its queries are to be on their way, and how many before that it is
#: wanted. No more, because a tile that nobody has claimed may still go to a program that is done earlier.
QUERIES_AHEAD = gl.constexpr(4)
WANTED_AHEAD = gl.constexpr(4)
#: How many numbers are noted of the block in a stage: its first key, what to do with it, what the grid of a layout
#: says of it, and how many full blocks of the tile follow.
BLOCK_NOTES = gl.constexpr(4)
#: What to do with a block: its scores need masking; it or the full ones that follow end their tile; it is none, and
#: there are no more.
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
        gl.allocate_shared_memory(gl.int64, [1], BARRIER),
        gl.allocate_shared_memory(gl.int32, [STAGES * BLOCK_NOTES, 1], NOTE),
        allocate_agenda(),
    )
    mbarrier.init(ring.v_landed, count=1)
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
            item, head = noted_part(part, ring.agenda, done - SLOTS, call)
            begin = item.begin
            if call.work is not None:
                # Nothing is written beyond the tensor. Consumers write parts that end early (`store`).
                begin = gl.where(begin + ROWS > item.end, call.len_q, begin)
            tma.async_copy_shared_to_global(out, [item.row, head, begin, 0], ring.q_tiles.index(slot))
    tma.store_wait(0)


@gluon.jit
def _load_queries(q, out, done, ring, call, tiles: gl.constexpr):
    """Loads the queries of the `done`-th tile, or tells that there is no such tile."""
    _empty_slots(out, ring, done, call)
    found = await_found(ring.agenda, done)
    item, head = noted_item(ring.agenda, done, call)
    for part in gl.static_range(CONSUMERS):
        slot = done % SLOTS * CONSUMERS + part
        full, begin = ring.q_full.index(slot), item.begin + part * ROWS
        if found:
            mbarrier.expect(full, ROWS * tiles.d * 2)
            tma.async_copy_global_to_shared(q, [item.row, head, begin, 0], full, ring.q_tiles.index(slot))
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def _note_block(first, todo, kind, full, step, ring, STAGES: gl.constexpr):
    """Notes what to do with the `step`-th block, once its stage is empty."""
    stage, phase = step % STAGES, (step // STAGES) & 1
    mbarrier.wait(ring.k_empty.index(stage), phase ^ 1)
    write_note(ring.block_notes, stage * BLOCK_NOTES, first)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 1, todo)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 2, kind)
    write_note(ring.block_notes, stage * BLOCK_NOTES + 3, full)
    barrier()  # one thread tells of what all of them wrote


@gluon.jit
def _load_keys(k, block, step, ring, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Loads the keys of the `step`-th block, which was noted."""
    stage = step % STAGES
    full, tile = ring.k_full.index(stage), ring.k_tiles.index(stage)
    mbarrier.expect(full, tiles.n * tiles.d * 2)
    tma.async_copy_global_to_shared(k, [block.row, block.head, block.first, 0], full, tile)


@gluon.jit
def _load_values(v, block, step, cleared, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr):
    """Loads the values of the `step`-th block. Those that its tile does not meet it clears, before consumers know of
    the block, for whom that would take longer than the wait here. Returns how many blocks were `cleared` so far.
    """
    stage, phase = step % STAGES, (step // STAGES) & 1
    full, tile = ring.v_full.index(stage), ring.v_tiles.index(stage)
    mbarrier.wait(ring.v_empty.index(stage), phase ^ 1)
    # What TMA brings from beyond the tensor is 0.
    if (block.first < block.lo) | (gl.minimum(block.first + tiles.n, call.len_k) > block.hi):
        mbarrier.expect(ring.v_landed, tiles.n * tiles.d * 2)
        tma.async_copy_global_to_shared(v, [block.row, block.head, block.first, 0], ring.v_landed, tile)
        mbarrier.wait(ring.v_landed, cleared & 1)
        clear(tile, block.first, block.lo, block.hi, tiles.n, tiles.d)
        mbarrier.arrive(full, count=1)
        cleared += 1
    else:
        mbarrier.expect(full, tiles.n * tiles.d * 2)
        tma.async_copy_global_to_shared(v, [block.row, block.head, block.first, 0], full, tile)
    return cleared


@gluon.jit
def load(q, k, v, out, ring, call, tiles: gl.constexpr, STAGES: gl.constexpr, STEADY: gl.constexpr):
    """The producer, which also notes for the consumers what to do with each block.

    Values follow the keys of the next block, because consumers need the two at once; queries come ahead of their tile.
    """
    # Keys are loaded STAGES rounds ahead.
    EARLIER: gl.constexpr = QUERIES_AHEAD - STAGES if STAGES < QUERIES_AHEAD else 0
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    cleared, zero = gl.to_tensor(0), gl.to_tensor(0)
    before = Block(zero, zero, zero, zero, zero)
    _load_queries(q, out, done, ring, call, tiles)
    while is_job(ring.agenda, done):
        job = noted_job(ring.agenda, done, call, tiles, False)
        item, span = job.item, job.span
        # One at least, in which nothing may be visible.
        count = gl.maximum(job.count, 1)
        head_k = job.head // call.group
        grid_row = 0
        if tiles.listed > 0:
            if call.rules.blocks.masks is not None:
                # Tiles that meet nothing may lie beyond the grid.
                own = gl.where(job.count > 0, item.begin - item.query_origin, 0)
                grid_row = block_pointer(call.rules.blocks, item.row, job.head, own, 0, tiles)
        first, kind = _block(call, span, grid_row, 0, tiles)
        # The last block that consumers ask notes of.
        general = gl.maximum(span.partial - 1, 0) if STEADY else count - 1
        loading = gl.maximum(count - 1 - EARLIER, 0)
        wanting = gl.maximum(loading - WANTED_AHEAD, 0)
        for i in range(count):
            # On its way while this round waits.
            coming, coming_kind = _block(call, span, grid_row, gl.minimum(i + 1, count - 1), tiles)
            todo = gl.where((i < span.partial) | (kind == 0), MASKED, 0) | gl.where(i == general, LAST, 0)
            full = gl.where(i == general, count - 1 - i, 0)
            _note_block(first, todo, kind, full, step, ring, STAGES)
            block = Block(gl.to_tensor(item.other_row), head_k, first, gl.to_tensor(item.lo), gl.to_tensor(item.hi))
            _load_keys(k, block, step, ring, tiles, STAGES)
            if step > 0:
                cleared = _load_values(v, before, step - 1, cleared, ring, call, tiles, STAGES)
            before = block
            if i == wanting:
                want(done)
            # Behind those values, which consumers may wait for before they leave the slots.
            if i == loading:
                _load_queries(q, out, done + 1, ring, call, tiles)
            first, kind = coming, coming_kind
            step += 1
        done += 1
    _note_block(0, LAST | FINAL, 0, 0, step, ring, STAGES)
    mbarrier.arrive(ring.k_full.index(step % STAGES), count=1)
    if step > 0:
        _load_values(v, before, step - 1, cleared, ring, call, tiles, STAGES)
    for i in gl.static_range(1, SLOTS):
        _empty_slots(out, ring, done + i, call)
