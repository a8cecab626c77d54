"""What the Hopper kernels of the backward pass share: their jobs, and how tiles come to the consumers and leave them.

A program stays for several tiles of own rows, one job after the other. Of each it holds two tiles for as long as the
job takes, in one of two slots: while consumers work on one job, the loading warp sends off what the job before left in
its slot, and prepares the next one there.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from hf_flashbsa.kernels.hopper.common import (
    CONSUMERS,
    ROWS,
    barrier,
    clear,
    read_note,
    shared,
    store_shared,
    write_note,
)
from hf_flashbsa.kernels.hopper.scout import (
    allocate_agenda,
    await_found,
    is_job,
    noted_item,
    noted_job,
    noted_part,
    want,
)
from hf_flashbsa.kernels.primitives import partial_position, place_of


class Share(NamedTuple):
    """What a consumer keeps of a job: the number of it, the first of its own 64 rows, the first key of their sequence,
    and how many blocks are visited, of which the first `partial` need masking.
    """

    number: object
    begin: object
    key_origin: object
    partial: object
    count: object


#: How many numbers are noted of a block: its first row and its head.
BLOCK_NOTES = gl.constexpr(2)


class Held(NamedTuple):
    """The tiles of two operands that a job keeps, one of each per consumer, in two slots; the barriers that tell that
    they are there, and that results are in their place; and the `agenda` of jobs.
    """

    first: object
    second: object
    full: object
    empty: object
    agenda: object


class Stream(NamedTuple):
    """Pairs of tiles in shared memory that the producer fills and the consumers empty, in turn; `stages` of them, and
    `notes` of each.

    Both tiles of a pair share their barriers, because waiting and telling take time: the threads that tell must meet.
    """

    first: object
    second: object
    full: object
    empty: object
    notes: object
    stages: object


@gluon.jit
def allocate_held(first, second, DIM: gl.constexpr, READERS: gl.constexpr):
    """Two slots, each with room for a tile of each descriptor per consumer. READERS give back each of these."""
    PLACES: gl.constexpr = 2 * CONSUMERS
    tiles_first = gl.allocate_shared_memory(first.dtype, [PLACES, 1, 1, ROWS, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [PLACES, 1, 1, ROWS, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(empty.index(place), count=READERS)
    return Held(tiles_first, tiles_second, full, empty, allocate_agenda())


@gluon.jit
def allocate_stream(first, second, BLOCK: gl.constexpr, DIM: gl.constexpr, STAGES: gl.constexpr, FILLS: gl.constexpr):
    """A stream of tiles of BLOCK rows of each descriptor. A pair takes FILLS arrivals to be full."""
    tiles_first = gl.allocate_shared_memory(first.dtype, [STAGES, 1, 1, BLOCK, DIM], first.layout)
    tiles_second = gl.allocate_shared_memory(second.dtype, [STAGES, 1, 1, BLOCK, DIM], second.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FILLS)
        mbarrier.init(empty.index(stage), count=CONSUMERS)
    notes = gl.allocate_shared_memory(gl.int32, [STAGES * BLOCK_NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return Stream(tiles_first, tiles_second, full, empty, notes, STAGES)


@gluon.jit
def send_results(held, done, first, second, length, call):
    """Waits for the slot of the `done`-th job, and sends off what the last but one before it left there: to `first`
    and `second`, descriptors of tensors of `length` rows, or to `first` alone.
    """
    for part in gl.static_range(CONSUMERS):
        place = (done & 1) * CONSUMERS + part
        mbarrier.wait(held.empty.index(place), ((done >> 1) & 1) ^ 1)
        if done > 1:
            item, head = noted_part(part, held.agenda, done - 2, call)
            begin = item.begin
            if call.work is not None:
                # Nothing is written beyond the tensor. Consumers write parts that end early (`leave`).
                begin = gl.where(begin + ROWS > item.end, length, begin)
            tma.async_copy_shared_to_global(first, [item.row, head, begin, 0], held.first.index(place))
            if second is not None:
                tma.async_copy_shared_to_global(second, [item.row, head, begin, 0], held.second.index(place))


@gluon.jit
def prepare(held, done, first, second, call, tiles: gl.constexpr):
    """Loads what the `done`-th job keeps, into a slot of which `send_results` sent off what was there; or tells that
    there is no such job."""
    found = await_found(held.agenda, done)
    if found:
        want(done)
    item, head = noted_item(held.agenda, done, call)
    tma.store_wait(0)
    for part in gl.static_range(CONSUMERS):
        place = (done & 1) * CONSUMERS + part
        full, begin = held.full.index(place), item.begin + part * ROWS
        if found:
            mbarrier.expect(full, 2 * ROWS * tiles.d * 2)
            tma.async_copy_global_to_shared(first, [item.row, head, begin, 0], full, held.first.index(place))
            tma.async_copy_global_to_shared(second, [item.row, head, begin, 0], full, held.second.index(place))
        else:
            mbarrier.arrive(full, count=1)


@gluon.jit
def await_job(part: gl.constexpr, held, done):
    """Waits until a consumer's part of the slot of the `done`-th job is ready; whether there is such a job."""
    mbarrier.wait(held.full.index((done & 1) * CONSUMERS + part), (done >> 1) & 1)
    return is_job(held.agenda, done)


@gluon.jit
def noted_share(part: gl.constexpr, held, done, call, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """A consumer's share of the `done`-th job. Little of it, because it stays in registers for as long."""
    job = noted_job(held.agenda, done, call, tiles, TRANSPOSED)
    key_origin = 0
    if call.work is not None:
        key_origin = shared(job.item.key_origin)
    begin = shared(job.item.begin) + part * ROWS
    partial = shared(job.partial)
    if (call.work is None) & (call.rules.mask.window_left is None) & (call.rules.mask.window_right is None):
        # One block of each head at most, where the other side ends. Told of that, the compiler leaves no masking in
        # the loop over further blocks.
        partial = gl.minimum(partial, call.group if TRANSPOSED else 1)
    return Share(done, begin, key_origin, partial, shared(job.count))


@gluon.jit
def has_no_rows(share, held, call):
    """Whether a tile ends before a consumer's share of it begins."""
    item, _ = noted_item(held.agenda, share.number, call)
    return share.begin >= shared(item.end)


@gluon.jit
def leave(tile, values, rows, share, held, call, DIM: gl.constexpr):
    """Leaves 64 rows of results in a held tile that is done with, for the producer to send off. `rows` is an Operand
    of the tensor that they belong to.
    """
    tile = tile.reshape([ROWS, DIM])
    tile.store(values.to(tile.dtype))
    if call.work is not None:
        item, head = noted_item(held.agenda, share.number, call)
        if share.begin + ROWS > item.end:
            # Rows of another sequence follow, which the producer would overwrite.
            store_shared(rows, item.row, head, share.begin, item.end, tile, DIM)
    fence_async_shared()


@gluon.jit
def fill(stream, i, first, second, row, head, begin, noted, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Loads block `i` of a stream, rows from `begin` on, once its stage is empty; if it is to be `noted`, notes it."""
    stage, phase = i % stream.stages, (i // stream.stages) & 1
    full = stream.full.index(stage)
    mbarrier.wait(stream.empty.index(stage), phase ^ 1)
    if noted:
        write_note(stream.notes, stage * BLOCK_NOTES, begin)
        write_note(stream.notes, stage * BLOCK_NOTES + 1, head)
        barrier()
    mbarrier.expect(full, 2 * BLOCK * DIM * 2)
    tma.async_copy_global_to_shared(first, [row, head, begin, 0], full, stream.first.index(stage))
    tma.async_copy_global_to_shared(second, [row, head, begin, 0], full, stream.second.index(stage))


@gluon.jit
def wait_for(stream, i):
    """Waits until block `i` of a stream is there."""
    mbarrier.wait(stream.full.index(i % stream.stages), (i // stream.stages) & 1)


@gluon.jit
def noted_block(stream, i):
    """First row and head of block `i` of a stream, which must be there, and noted."""
    place = i % stream.stages * BLOCK_NOTES
    return read_note(stream.notes, place), read_note(stream.notes, place + 1)


@gluon.jit
def block_of_queries(job, call, i, PARTIAL: gl.constexpr, tiles: gl.constexpr):
    """Head and first query of a job's `i`-th block of those that need masking, or of the others: those of the first
    head come first."""
    span, head = job.span, job.head
    if call.group != 1:
        blocks = span.partial if PARTIAL else (span.full_end - span.full_begin) // tiles.m
        head = job.head * call.group + i // blocks
        i = i % blocks
    if PARTIAL:
        position = partial_position(span, i, tiles.m, tiles)
    else:
        position = span.full_begin + i * tiles.m
    return head, place_of(span, call.rules.blocks, position, tiles)


@gluon.jit
def tile_of(tiles, stream, i, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Block `i` of a stream, of its `first` or `second` tiles."""
    return tiles.index(i % stream.stages).reshape([BLOCK, DIM])


@gluon.jit
def release(stream, i):
    """Gives back the stage of block `i`."""
    mbarrier.arrive(stream.empty.index(i % stream.stages), count=1)


@gluon.jit
def pass_over(stream, begin, end):
    """Waits for blocks `[begin, end)` of a stream and gives them back."""
    for i in range(begin, end):
        wait_for(stream, i)
        release(stream, i)


@gluon.jit
def clear_outside(stream, i, agenda, share, call, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Waits for block `i` of a stream, one that needs masking, and clears rows that the job does not meet."""
    wait_for(stream, i)
    begin, _ = noted_block(stream, i)
    item, _ = noted_item(agenda, share.number, call)
    if (begin < item.lo) | (begin + BLOCK > item.hi):
        clear(tile_of(stream.first, stream, i, BLOCK, DIM), begin, item.lo, item.hi, BLOCK, DIM)
        clear(tile_of(stream.second, stream, i, BLOCK, DIM), begin, item.lo, item.hi, BLOCK, DIM)


@gluon.jit
def start_products(
    i, step, first, second, zero, share, ring, call, MASKED: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr
):
    """Starts the products of two held tiles with those of a job's `i`-th block, transposed. It is block `step` of the
    stream, and without `MASKED` none that needs masking.
    """
    stream = ring.stream
    if MASKED and (i < share.partial):
        clear_outside(stream, step, ring.held.agenda, share, call, BLOCK, DIM)
    wait_for(stream, step)
    tile = tile_of(stream.first, stream, step, BLOCK, DIM)
    s = warpgroup_mma(first, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    tile = tile_of(stream.second, stream, step, BLOCK, DIM)
    dp = warpgroup_mma(second, tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    return s, dp
