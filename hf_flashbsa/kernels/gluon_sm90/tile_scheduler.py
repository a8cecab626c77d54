"""The scheduler warp: finds a program's next work tile and what it visits, one tile ahead of everyone else.

That takes dependent loads (tile counter, tile schedule, block list), for which the producer and the consumers have
neither time nor registers. The scheduler warp publishes each tile in a mailbox in shared memory, on an mbarrier; the
producer asks for the next one by a named barrier (`prefetch_next_tile`).
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from hf_flashbsa.kernels.gluon_sm90.compat import barrier
from hf_flashbsa.kernels.gluon_sm90.pipeline import (
    CONSUMER_M,
    NEXT_TILE,
    named_barrier_arrive,
    named_barrier_sync,
    smem_load,
    smem_store,
    warp_uniform,
)
from hf_flashbsa.kernels.structs import BlockRange, WorkTile
from hf_flashbsa.kernels.triton.block_range import (
    NUM_TILES,
    block_list,
    block_start,
    decode_tile_index,
    get_block_range,
    load_work_tile,
    partial_block_position,
)


class ScheduledTile(NamedTuple):
    """A work tile, its head (key head if it tiles keys) and the blocks it visits: `num_blocks` in all, over all query
    heads of the group where it tiles keys; the first `num_partial` are masked.
    """

    work_tile: object
    head: object
    block_range: object
    num_partial: object
    num_blocks: object


class TileMailbox(NamedTuple):
    """Shared memory: MAILBOX_DEPTH entries of MAILBOX_WORDS ints, and the mbarrier that publishes the next one."""

    words: object
    full: object


#: Entries of the mailbox. A tile is asked for when nobody reads the entry that it overwrites any more.
MAILBOX_DEPTH = gl.constexpr(4)
#: Words of an entry, a multiple of 4 for vector loads.
MAILBOX_WORDS = gl.constexpr(20)


class MailboxSlot(IntEnum):
    """Words of a mailbox entry: a WorkTile, its head and its BlockRange. Words that only schedules or block lists need
    are written only with those.
    """

    BATCH = 0
    HEAD = 1
    BEGIN = 2
    END = 3
    LO = 4
    HI = 5
    OTHER_BATCH = 6
    QUERY_OFFSET = 7
    QUERY_ORIGIN = 8
    KEY_ORIGIN = 9
    RANGE_BEGIN = 10
    LEFT_END = 11
    NUM_PARTIAL = 12
    FULL_BEGIN = 13
    FULL_END = 14
    RIGHT_END = 15
    PARTIAL_BEGIN = 16
    RANGE_ORIGIN = 17
    VALID = 18
    SEGMENTS_FULL = 19


AT_BATCH = gl.constexpr(int(MailboxSlot.BATCH))
AT_HEAD = gl.constexpr(int(MailboxSlot.HEAD))
AT_BEGIN = gl.constexpr(int(MailboxSlot.BEGIN))
AT_END = gl.constexpr(int(MailboxSlot.END))
AT_LO = gl.constexpr(int(MailboxSlot.LO))
AT_HI = gl.constexpr(int(MailboxSlot.HI))
AT_OTHER_BATCH = gl.constexpr(int(MailboxSlot.OTHER_BATCH))
AT_QUERY_OFFSET = gl.constexpr(int(MailboxSlot.QUERY_OFFSET))
AT_QUERY_ORIGIN = gl.constexpr(int(MailboxSlot.QUERY_ORIGIN))
AT_KEY_ORIGIN = gl.constexpr(int(MailboxSlot.KEY_ORIGIN))
AT_RANGE_BEGIN = gl.constexpr(int(MailboxSlot.RANGE_BEGIN))
AT_LEFT_END = gl.constexpr(int(MailboxSlot.LEFT_END))
AT_NUM_PARTIAL = gl.constexpr(int(MailboxSlot.NUM_PARTIAL))
AT_FULL_BEGIN = gl.constexpr(int(MailboxSlot.FULL_BEGIN))
AT_FULL_END = gl.constexpr(int(MailboxSlot.FULL_END))
AT_RIGHT_END = gl.constexpr(int(MailboxSlot.RIGHT_END))
AT_PARTIAL_BEGIN = gl.constexpr(int(MailboxSlot.PARTIAL_BEGIN))
AT_RANGE_ORIGIN = gl.constexpr(int(MailboxSlot.RANGE_ORIGIN))
AT_VALID = gl.constexpr(int(MailboxSlot.VALID))
AT_SEGMENTS_FULL = gl.constexpr(int(MailboxSlot.SEGMENTS_FULL))


@gluon.jit
def _tiles_per_head(problem):
    """Tiles of each head, or of each head and batch row."""
    if problem.schedule is None:
        return problem.num_tiles
    else:
        return gl.load(problem.schedule + NUM_TILES)


@gluon.jit
def num_tile_indices(problem):
    """Number of linear tile indices."""
    if problem.schedule is None:
        return problem.total_tiles
    else:
        return problem.total_tiles // problem.num_tiles * _tiles_per_head(problem)


@gluon.jit
def locate_tile(problem, tile_index, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Head and WorkTile of a linear tile index."""
    if TRANSPOSED:
        batch, head, tile = decode_tile_index(
            problem.schedule, tile_index, _tiles_per_head(problem), problem.heads // problem.group, tiles.n
        )
        work_tile = load_work_tile(
            problem.schedule,
            tile,
            batch,
            problem.len_k,
            problem.len_q,
            problem.query_offset,
            problem.mods.bounds,
            tiles.n,
        )
    else:
        batch, head, tile = decode_tile_index(
            problem.schedule, tile_index, _tiles_per_head(problem), problem.heads, tiles.m
        )
        if problem.schedule is None:
            tile = problem.num_tiles - 1 - tile  # causal: longest first
        work_tile = load_work_tile(
            problem.schedule,
            tile,
            batch,
            problem.len_q,
            problem.len_k,
            problem.query_offset,
            problem.mods.bounds,
            tiles.m,
        )
    return head, work_tile


@gluon.jit
def tile_index_at(problem, tile_iter):
    """Linear index of a program's `tile_iter`-th tile; the program is done once it reaches `num_tile_indices`.

    Static: grid-stride, every other round backwards, which balances long and short tiles. With a `tile_counter`, used
    where a schedule orders unequal tiles: the next unclaimed tile. Results do not depend on which program computes a
    tile.
    """
    program, num_programs = gl.program_id(0), gl.num_programs(0)
    if problem.tile_counter is None:
        tile_index = tile_iter * num_programs + gl.where(tile_iter % 2 == 1, num_programs - 1 - program, program)
    else:
        tile_index = program
        if tile_iter > 0:
            tile_index = num_programs + _fetch_add(problem.tile_counter)
    return tile_index


@gluon.jit
def _fetch_add(counter):
    """Atomic increment of the tile counter by lane 0; returns the old value in all lanes."""
    return warp_uniform(
        gl.inline_asm_elementwise(
            """
            {
                .reg .pred first;
                .reg .u32 lane;
                mov.u32 lane, %laneid;
                setp.eq.u32 first, lane, 0;
                mov.u32 $0, 0;
                @first atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
            }
            """,
            "=&r,l", [counter], dtype=gl.int32, is_pure=False, pack=1,
        )
    )  # fmt: skip


@gluon.jit
def uniform_block_range(work_tile, mods, head, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """`get_block_range`, warp-uniform.

    With block lists its fields are reductions over threads, which ptxas takes for divergent: it would keep neither
    them nor the TMA coordinates derived from them in uniform registers.
    """
    if tiles.sparse_block == 0:
        return get_block_range(work_tile, mods, head, 0, tiles, TRANSPOSED)
    else:
        list_offsets = gl.arange(0, tiles.max_blocks, layout=gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        block_range = get_block_range(work_tile, mods, head, list_offsets, tiles, TRANSPOSED)
        return BlockRange(
            warp_uniform(block_range.begin), warp_uniform(block_range.left_end), warp_uniform(block_range.right_end),
            warp_uniform(block_range.num_partial), warp_uniform(block_range.full_begin),
            warp_uniform(block_range.full_end), warp_uniform(block_range.partial_begin), block_range.lo,
            block_range.hi, block_range.indices, block_range.origin,
        )  # fmt: skip


@gluon.jit
def count_blocks(block_range, tiles: gl.constexpr):
    """Number of key blocks that a query tile visits."""
    return block_range.num_partial + (block_range.full_end - block_range.full_begin) // tiles.n


@gluon.jit
def kv_block_start(block_range, blocks, index, tiles: gl.constexpr):
    """First key of the `index`-th block that a query tile visits: masked blocks first."""
    full_position = block_range.full_begin + (index - block_range.num_partial) * tiles.n
    position = gl.where(
        index < block_range.num_partial, partial_block_position(block_range, index, tiles.n, tiles), full_position
    )
    if tiles.sparse_block > 0:
        if count_blocks(block_range, tiles) == 0:
            position = 0
    return block_start(block_range, blocks, position, tiles)


@gluon.jit
def allocate_mailbox():
    """An empty mailbox. The scheduler warp fetches the first tile at once, later ones on `prefetch_next_tile`."""
    words = gl.allocate_shared_memory(
        gl.int32, [MAILBOX_DEPTH * MAILBOX_WORDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    return TileMailbox(words, full)


@gluon.jit
def _scheduled_tile(problem, work_tile, head, block_range, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """Adds the numbers of blocks to a tile and its block range."""
    if TRANSPOSED:
        num_partial, num_full = (
            block_range.num_partial * problem.group,
            (block_range.full_end - block_range.full_begin) // tiles.m * problem.group,
        )
    else:
        num_partial, num_full = block_range.num_partial, (block_range.full_end - block_range.full_begin) // tiles.n
    return ScheduledTile(work_tile, head, block_range, num_partial, num_partial + num_full)


@gluon.jit
def store_tile_info(mailbox, tile_iter, work_tile, head, block_range, problem, tiles: gl.constexpr):
    """Write the `tile_iter`-th tile of this program to the mailbox. `publish` it afterwards."""
    words, slot = mailbox.words, tile_iter % MAILBOX_DEPTH * MAILBOX_WORDS
    smem_store(words, slot + AT_BATCH, work_tile.batch)
    smem_store(words, slot + AT_HEAD, head)
    smem_store(words, slot + AT_BEGIN, work_tile.begin)
    smem_store(words, slot + AT_END, work_tile.end)
    smem_store(words, slot + AT_LO, block_range.lo)
    smem_store(words, slot + AT_HI, block_range.hi)
    if problem.schedule is not None:
        smem_store(words, slot + AT_OTHER_BATCH, work_tile.other_batch)
        smem_store(words, slot + AT_QUERY_OFFSET, work_tile.query_offset)
        smem_store(words, slot + AT_QUERY_ORIGIN, work_tile.query_origin)
        smem_store(words, slot + AT_KEY_ORIGIN, work_tile.key_origin)
    smem_store(words, slot + AT_RANGE_BEGIN, block_range.begin)
    smem_store(words, slot + AT_LEFT_END, block_range.left_end)
    smem_store(words, slot + AT_NUM_PARTIAL, block_range.num_partial)
    smem_store(words, slot + AT_FULL_BEGIN, block_range.full_begin)
    smem_store(words, slot + AT_FULL_END, block_range.full_end)
    if tiles.sparse_block > 0:
        smem_store(words, slot + AT_RIGHT_END, block_range.right_end)
        smem_store(words, slot + AT_PARTIAL_BEGIN, block_range.partial_begin)
        smem_store(words, slot + AT_RANGE_ORIGIN, block_range.origin)
    smem_store(words, slot + AT_VALID, 1)
    if problem.mods.bounds.segment_ids_k is not None:
        smem_store(
            words,
            slot + AT_SEGMENTS_FULL,
            gl.where((work_tile.full_lo <= work_tile.lo) & (work_tile.full_hi >= work_tile.hi), 1, 0),
        )


@gluon.jit
def is_valid_tile(mailbox, tile_iter):
    """Whether the program has a `tile_iter`-th tile; it must have been published."""
    return warp_uniform(smem_load(mailbox.words, tile_iter % MAILBOX_DEPTH * MAILBOX_WORDS + AT_VALID)) != 0


@gluon.jit
def load_tile_info(mailbox, tile_iter, problem):
    """Work tile and head from the mailbox. Bounds are those of its block range; segments are recorded as one bit, so
    the tile is either all full or not at all.
    """
    words, slot = mailbox.words, tile_iter % MAILBOX_DEPTH * MAILBOX_WORDS
    batch, head = smem_load(words, slot + AT_BATCH), smem_load(words, slot + AT_HEAD)
    begin, end = smem_load(words, slot + AT_BEGIN), smem_load(words, slot + AT_END)
    lo, hi = smem_load(words, slot + AT_LO), smem_load(words, slot + AT_HI)
    other_batch, query_offset, query_origin, key_origin = batch, problem.query_offset, 0, 0
    if problem.schedule is not None:
        other_batch, query_offset = smem_load(words, slot + AT_OTHER_BATCH), smem_load(words, slot + AT_QUERY_OFFSET)
        query_origin, key_origin = smem_load(words, slot + AT_QUERY_ORIGIN), smem_load(words, slot + AT_KEY_ORIGIN)
    full_hi = hi
    if problem.mods.bounds.segment_ids_k is not None:
        full_hi = gl.where(smem_load(words, slot + AT_SEGMENTS_FULL) != 0, hi, lo)
    return WorkTile(batch, begin, end, other_batch, lo, lo, full_hi, hi, query_offset, query_origin, key_origin), head


@gluon.jit
def load_consumer_tile_info(wg: gl.constexpr, mailbox, tile_iter, problem):
    """`load_tile_info` of the 64 rows of consumer `wg`."""
    work_tile, head = load_tile_info(mailbox, tile_iter, problem)
    begin = work_tile.begin + wg * CONSUMER_M
    work_tile = WorkTile(
        work_tile.batch, begin, work_tile.end, work_tile.other_batch, work_tile.lo, work_tile.full_lo,
        work_tile.full_hi, work_tile.hi, work_tile.query_offset, work_tile.query_origin, work_tile.key_origin,
    )  # fmt: skip
    return work_tile, head


@gluon.jit
def load_scheduled_tile(mailbox, tile_iter, problem, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The ScheduledTile in the mailbox."""
    words, slot = mailbox.words, tile_iter % MAILBOX_DEPTH * MAILBOX_WORDS
    work_tile, head = load_tile_info(mailbox, tile_iter, problem)
    begin, left_end, num_partial = (
        smem_load(words, slot + AT_RANGE_BEGIN),
        smem_load(words, slot + AT_LEFT_END),
        smem_load(words, slot + AT_NUM_PARTIAL),
    )
    full_begin, full_end = smem_load(words, slot + AT_FULL_BEGIN), smem_load(words, slot + AT_FULL_END)
    right_end, partial_begin, origin, indices = left_end, 0, 0, 0
    if tiles.sparse_block > 0:
        right_end, partial_begin = smem_load(words, slot + AT_RIGHT_END), smem_load(words, slot + AT_PARTIAL_BEGIN)
        origin = smem_load(words, slot + AT_RANGE_ORIGIN)
        head_q = head * problem.group if TRANSPOSED else head
        indices = block_list(work_tile, problem.mods.blocks, head_q, work_tile.lo, work_tile.hi, tiles, TRANSPOSED) + 2
    block_range = BlockRange(
        begin,
        left_end,
        right_end,
        num_partial,
        full_begin,
        full_end,
        partial_begin,
        work_tile.lo,
        work_tile.hi,
        indices,
        origin,
    )
    return _scheduled_tile(problem, work_tile, head, block_range, tiles, TRANSPOSED)


@gluon.jit
def prefetch_next_tile(tile_iter):
    """Ask the scheduler warp for the tile after `tile_iter`, which must have been published."""
    named_barrier_arrive(NEXT_TILE, 64, tile_iter)


@gluon.jit
def wait_tile(mailbox, tile_iter):
    """Wait until the `tile_iter`-th tile is published. Returns whether there is one."""
    mbarrier.wait(mailbox.full, tile_iter & 1)
    return is_valid_tile(mailbox, tile_iter)


@gluon.jit
def scheduler_warp(mailbox, problem, tiles: gl.constexpr, TRANSPOSED: gl.constexpr):
    """The scheduler warp of a kernel that tiles queries or, `TRANSPOSED`, keys."""
    tile_iter = gl.to_tensor(0)
    end, tile_index = num_tile_indices(problem), tile_index_at(problem, tile_iter)
    while tile_index < end:
        head, work_tile = locate_tile(problem, tile_index, tiles, TRANSPOSED)
        head_q = head * problem.group if TRANSPOSED else head
        block_range = uniform_block_range(work_tile, problem.mods, head_q, tiles, TRANSPOSED)
        store_tile_info(mailbox, tile_iter, work_tile, head, block_range, problem, tiles)
        barrier()  # all threads have stored before one arrives
        mbarrier.arrive(mailbox.full, count=1)
        tile_iter = named_barrier_sync(NEXT_TILE, 64, tile_iter) + 1
        tile_index = tile_index_at(problem, tile_iter)
    smem_store(mailbox.words, tile_iter % MAILBOX_DEPTH * MAILBOX_WORDS + AT_VALID, 0)
    barrier()
    mbarrier.arrive(mailbox.full, count=1)
