"""What the scouting warp does: it finds out which tiles a program has and what each of them visits.

That takes answers from memory, one after the other: the claim of a tile, its entry of a work table, its list of
blocks. The scout asks for them ahead of the loading warp, and notes in shared memory what that warp and the consumers
need, who have neither time nor registers for it.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hf_flashbsa.kernels.hopper.common import (
    ROWS,
    await_others,
    barrier,
    read_note,
    shared,
    span_met,
    tell_others,
    write_note,
)
from hf_flashbsa.kernels.hopper.turns import place_at, places, tile_at
from hf_flashbsa.kernels.primitives import list_of
from hf_flashbsa.kernels.records import Item, Span


class Job(NamedTuple):
    """A tile of own rows, its head (of keys, if it is one of keys), and what it visits: `count` blocks of the other
    side, of all heads that share the keys; the first `partial` of them need masking.
    """

    item: object
    head: object
    span: object
    partial: object
    count: object


class Agenda(NamedTuple):
    """Shared memory: `notes` of a program's jobs, the `n`-th in place `n % KEPT`, and the barrier that tells that the
    next one is `found`.
    """

    notes: object
    found: object


#: Jobs whose notes are kept. A job is wanted when nobody needs the notes of the one KEPT before it any more.
KEPT = gl.constexpr(4)
#: How many numbers are noted of a job, a multiple of four because loads take up to four; and which of them tells that
#: there is one.
NOTES = gl.constexpr(20)
IS_JOB = gl.constexpr(18)
#: The barrier at which the scout waits until a job is wanted.
WANTED = gl.constexpr(12)


@gluon.jit
def allocate_agenda():
    """An empty agenda. The first job is wanted, and further ones when `want` says so."""
    notes = gl.allocate_shared_memory(gl.int32, [KEPT * NOTES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    found = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(found, count=1)
    return Agenda(notes, found)


@gluon.jit
def _job(call, item, head, span, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    if TRANSPOSED:
        partial, full = span.partial * call.group, (span.full_end - span.full_begin) // tiles.m * call.group
    else:
        partial, full = span.partial, (span.full_end - span.full_begin) // tiles.n
    return Job(item, head, span, partial, partial + full)


@gluon.jit
def _note_job(agenda, n, item, head, span, call, tiles: gl.constexpr):
    notes, place = agenda.notes, n % KEPT * NOTES
    write_note(notes, place, item.row)
    write_note(notes, place + 1, head)
    write_note(notes, place + 2, item.begin)
    write_note(notes, place + 3, item.end)
    write_note(notes, place + 4, span.lo)
    write_note(notes, place + 5, span.hi)
    if call.work is not None:
        write_note(notes, place + 6, item.other_row)
        write_note(notes, place + 7, item.diagonal)
        write_note(notes, place + 8, item.query_origin)
        write_note(notes, place + 9, item.key_origin)
    write_note(notes, place + 10, span.begin)
    write_note(notes, place + 11, span.left)
    write_note(notes, place + 12, span.partial)
    write_note(notes, place + 13, span.full_begin)
    write_note(notes, place + 14, span.full_end)
    if tiles.listed > 0:
        write_note(notes, place + 15, span.right)
        write_note(notes, place + 16, span.listed)
        write_note(notes, place + 17, span.origin)
    write_note(notes, place + IS_JOB, 1)
    if call.rules.mask.segment_ids_k is not None:
        write_note(notes, place + 19, gl.where((item.full_lo <= item.lo) & (item.full_hi >= item.hi), 1, 0))


@gluon.jit
def is_job(agenda, n):
    """Whether a program has an `n`-th job, once that was found out."""
    return shared(read_note(agenda.notes, n % KEPT * NOTES + IS_JOB)) != 0


@gluon.jit
def noted_item(agenda, n, call):
    """The tile and head of a job that was noted. Bounds of the Item are those of its span. As far as segments go, all
    of it is full, or nothing is said to be."""
    notes, place = agenda.notes, n % KEPT * NOTES
    row, head = read_note(notes, place), read_note(notes, place + 1)
    begin, end = read_note(notes, place + 2), read_note(notes, place + 3)
    lo, hi = read_note(notes, place + 4), read_note(notes, place + 5)
    other_row, diagonal, query_origin, key_origin = row, call.diagonal, 0, 0
    if call.work is not None:
        other_row, diagonal = read_note(notes, place + 6), read_note(notes, place + 7)
        query_origin, key_origin = read_note(notes, place + 8), read_note(notes, place + 9)
    full_hi = hi
    if call.rules.mask.segment_ids_k is not None:
        full_hi = gl.where(read_note(notes, place + 19) != 0, hi, lo)
    return Item(row, begin, end, other_row, lo, lo, full_hi, hi, diagonal, query_origin, key_origin), head


@gluon.jit
def noted_part(part: gl.constexpr, agenda, n, call):
    """`noted_item` of the `part`-th 64 rows."""
    item, head = noted_item(agenda, n, call)
    begin = item.begin + part * ROWS
    item = Item(
        item.row, begin, item.end, item.other_row, item.lo, item.full_lo, item.full_hi, item.hi, item.diagonal,
        item.query_origin, item.key_origin,
    )  # fmt: skip
    return item, head


@gluon.jit
def noted_job(agenda, n, call, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The job that was noted."""
    notes, place = agenda.notes, n % KEPT * NOTES
    item, head = noted_item(agenda, n, call)
    begin, left, partial = read_note(notes, place + 10), read_note(notes, place + 11), read_note(notes, place + 12)
    full_begin, full_end = read_note(notes, place + 13), read_note(notes, place + 14)
    right, listed, origin, index = left, 0, 0, 0
    if tiles.listed > 0:
        right, listed = read_note(notes, place + 15), read_note(notes, place + 16)
        origin = read_note(notes, place + 17)
        head_q = head * call.group if TRANSPOSED else head
        index = list_of(item, call.rules.blocks, head_q, item.lo, item.hi, tiles, TRANSPOSED) + 2
    span = Span(begin, left, right, partial, full_begin, full_end, listed, item.lo, item.hi, index, origin)
    return _job(call, item, head, span, tiles, TRANSPOSED)


@gluon.jit
def want(n):
    """Sends the scout for the job behind the `n`-th, which must have been found."""
    tell_others(WANTED, 64, n)


@gluon.jit
def await_found(agenda, n):
    """Waits until the `n`-th job is noted. Whether there is one."""
    mbarrier.wait(agenda.found, n & 1)
    return is_job(agenda, n)


@gluon.jit
def scout(agenda, call, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The scouting warp. Its jobs are tiles of queries, or with `TRANSPOSED` of keys."""
    n = gl.to_tensor(0)
    end, place = places(call), place_at(call, n)
    while place < end:
        head, item = tile_at(call, place, tiles, TRANSPOSED)
        head_q = head * call.group if TRANSPOSED else head
        span = span_met(item, call.rules, head_q, tiles, TRANSPOSED)
        _note_job(agenda, n, item, head, span, call, tiles)
        barrier()  # one thread tells of what all of them wrote
        mbarrier.arrive(agenda.found, count=1)
        n = await_others(WANTED, 64, n) + 1
        place = place_at(call, n)
    write_note(agenda.notes, n % KEPT * NOTES + IS_JOB, 0)
    barrier()
    mbarrier.arrive(agenda.found, count=1)
