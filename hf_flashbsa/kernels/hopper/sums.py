"""The gradient of the queries as sums in memory: what a third warpgroup adds to the kernel of dkdv.py.

Consumers hand it their gradients of scores, in shared memory. It multiplies them with the keys and adds the products,
by TMA, to those that other programs have added for the same queries. Five products of a block, where two kernels need
seven; but in which order programs add is left open, and with it how sums are rounded.
"""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hf_flashbsa.kernels.hopper.common import CONSUMERS, ROWS, add_to_global, barrier
from hf_flashbsa.kernels.hopper.jobs import await_job, block_of_queries
from hf_flashbsa.kernels.hopper.scout import noted_job

#: Blocks of gradients of scores, and of products, that there is room for.
BUFFERS = gl.constexpr(2)


class Handover(NamedTuple):
    """Shared memory: gradients of scores, keys by queries, 64 keys of each consumer, with the barriers that tell that
    they are there and used; and products on their way to global memory."""

    scores: object
    full: object
    empty: object
    products: object


class Outbox(NamedTuple):
    """A consumer's side of a Handover: the number of the consumer, and where the rows of its sequence end. Without a
    third warpgroup a consumer has None, and what takes it does nothing."""

    handover: object
    part: object
    end: object


@gluon.jit
def allocate_handover(sums, dtype: gl.constexpr, BLOCK: gl.constexpr, DIM: gl.constexpr):
    """Room for blocks of BLOCK queries. `sums` is the descriptor that products go to."""
    SCORES: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK], dtype)
    scores = gl.allocate_shared_memory(dtype, [BUFFERS * CONSUMERS, ROWS, BLOCK], SCORES)
    products = gl.allocate_shared_memory(gl.float32, [BUFFERS, 1, 1, BLOCK, DIM], sums.layout)
    full = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [BUFFERS, 1], mbarrier.MBarrierLayout())
    for buffer in gl.static_range(BUFFERS):
        mbarrier.init(full.index(buffer), count=CONSUMERS)
        mbarrier.init(empty.index(buffer), count=1)
    return Handover(scores, full, empty, products)


@gluon.jit
def of_own_keys(ds, share, outbox):
    """Gradients of scores without those of rows behind the last key: nothing of these is in the sums."""
    if outbox is not None:
        if share.begin + ROWS > outbox.end:
            keys = share.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, ds.type.layout))
            ds = gl.where((keys < outbox.end)[:, None], ds, gl.zeros_like(ds))
    return ds


@gluon.jit
def hand_over(step, ds, outbox):
    """Hands over a consumer's gradients of scores with block `step` of the stream."""
    if outbox is not None:
        handover = outbox.handover
        buffer = step % BUFFERS
        mbarrier.wait(handover.empty.index(buffer), (step // BUFFERS & 1) ^ 1)
        handover.scores.index(buffer * CONSUMERS + outbox.part).store(ds)
        fence_async_shared()
        mbarrier.arrive(handover.full.index(buffer), count=1)


@gluon.jit
def await_use(step, outbox):
    """Waits until what was handed over up to block `step` is used, and the job's keys with it."""
    if outbox is not None:
        mbarrier.wait(outbox.handover.empty.index(step % BUFFERS), step // BUFFERS & 1)


@gluon.jit
def _start(step, slot, zero, held, handover, tiles: gl.constexpr):
    """Waits for the gradients of scores with block `step`, and starts their product with the keys of a slot."""
    buffer = step % BUFFERS
    mbarrier.wait(handover.full.index(buffer), step // BUFFERS & 1)
    dq = zero
    for part in gl.static_range(CONSUMERS):
        scores = handover.scores.index(buffer * CONSUMERS + part).permute((1, 0))
        keys = held.first.index(slot * CONSUMERS + part).reshape([ROWS, tiles.d])
        dq = warpgroup_mma(scores, keys, dq, use_acc=part > 0, is_async=True)
    return dq


@gluon.jit
def _finish(dq, step, handover):
    """Waits for the product that `_start` began, and gives back what it was made of."""
    dq = warpgroup_mma_wait(0, deps=(dq,))
    mbarrier.arrive(handover.empty.index(step % BUFFERS), count=1)
    return dq


@gluon.jit
def _add(sums, dq, i, step, job, handover, call, tiles: gl.constexpr):
    """Adds the product of a job's `i`-th block, block `step` of the stream, to the sums."""
    if i < job.partial:
        head, first = block_of_queries(job, call, i, True, tiles)
    else:
        head, first = block_of_queries(job, call, i - job.partial, False, tiles)
    tma.store_wait(BUFFERS - 1)  # one thread has to wait, and the others for it
    barrier()
    products = handover.products.index(step % BUFFERS)
    products.reshape([tiles.m, tiles.d]).store(dq)
    fence_async_shared()
    barrier()
    add_to_global(sums, [job.item.other_row, head, first, 0], products)


@gluon.jit
def add_queries(sums, ring, call, tiles: gl.constexpr):
    """The third warpgroup. `sums` is a descriptor of float32 `(B, H, S, D)` with boxes of `tiles.m` rows."""
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, tiles.d, 16])
    held, handover = ring.held, ring.handover
    zero = gl.zeros([tiles.m, tiles.d], gl.float32, DQ)
    step, done = gl.to_tensor(0), gl.to_tensor(0)
    while await_job(0, held, done):
        slot = done & 1
        mbarrier.wait(held.full.index(slot * CONSUMERS + 1), (done >> 1) & 1)
        job = noted_job(held.agenda, done, call, tiles, True)
        if job.count > 0:
            dq = _finish(_start(step, slot, zero, held, handover, tiles), step, handover)
            for i in range(1, job.count):
                following = _start(step + i, slot, zero, held, handover, tiles)
                _add(sums, dq, i - 1, step + i - 1, job, handover, call, tiles)
                dq = _finish(following, step + i, handover)
            last = job.count - 1
            _add(sums, dq, last, step + last, job, handover, call, tiles)
        for part in gl.static_range(CONSUMERS):
            mbarrier.arrive(held.empty.index(slot * CONSUMERS + part), count=1)
        step += job.count
        done += 1
    tma.store_wait(0)
