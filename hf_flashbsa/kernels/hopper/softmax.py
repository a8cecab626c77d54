"""What a consumer of the Hopper forward kernel makes of the scores of a block, and at the end of a tile."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from hf_flashbsa.kernels.hopper.common import (
    ROWS,
    by_thread,
    for_all_pairs,
    hide_outside,
    quad_of,
    store_shared,
)
from hf_flashbsa.kernels.primitives import LN2, LOG2E, asks_ids, dropout_keep, hide_segments, log2_factor, shown


class State(NamedTuple):
    """Of each row what its weights so far were taken relative to, the `pivot`, times log2(e), and their `sum`.

    Both have the shape (rows, 4), for the four threads that share a row: their pivots are equal, and each has a part
    of the sum.
    """

    pivot: object
    sum: object


@gluon.jit
def no_state(QUAD: gl.constexpr):
    """The state of rows that have met no key."""
    return State(gl.full([ROWS, 4], float("-inf"), gl.float32, QUAD), gl.zeros([ROWS, 4], gl.float32, QUAD))


@gluon.jit
def hide(s, rules, head, item, first, kind, tiles: gl.constexpr):
    """The scores of the block from key `first` on, -inf where they do not exist. `kind` is what the grid of a layout
    says of the block: `visible` would ask it once more."""
    rows = item.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
    keys = first + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
    hi = gl.where(kind > 0, item.hi, item.lo)
    s = hide_outside(s, rules, item.begin, first, item.lo, hi, item.diagonal, tiles, False)
    s = hide_segments(s, rules.mask, item.row, item.other_row, asks_ids(item), rows[:, None], keys[None, :])
    if tiles.listed > 0:
        if rules.blocks.masks is not None:
            if kind > 1:
                place_q, place_k = item.begin - item.query_origin, first - item.key_origin
                ok = shown(
                    rules.blocks, kind, place_q, place_k, (rows - item.begin)[:, None], (keys - first)[None, :], tiles
                )
                s = gl.where(ok, s, float("-inf"))
    return s


@gluon.jit
def _raised(pivot, largest):
    """Pivots for scores of which each thread has met the `largest`, times log2(e).

    As in FlashAttention-4, they need not be the largest scores, if only weights stay in range: the 16 rows of a warp
    keep theirs until the scores of one exceed it by 8, a weight of 2^8. So threads seldom exchange what they have met.
    """
    return gl.inline_asm_elementwise(
        """
        {
        .reg .pred p0, p1;
        .reg .f32 limit0, limit1, other0, other1;
        add.f32 limit0, $2, 0f41000000;  // 8
        add.f32 limit1, $3, 0f41000000;
        setp.gt.f32 p0, $4, limit0;
        setp.gt.or.f32 p1, $5, limit1, p0;
        mov.f32 $0, $2;
        mov.f32 $1, $3;
        vote.sync.any.pred p1, p1, 0xffffffff;
        @!p1 bra KEEP;
        max.f32 $0, $2, $4;
        max.f32 $1, $3, $5;
        shfl.sync.bfly.b32 other0, $0, 1, 31, 0xffffffff;
        shfl.sync.bfly.b32 other1, $1, 1, 31, 0xffffffff;
        max.f32 $0, $0, other0;
        max.f32 $1, $1, other1;
        shfl.sync.bfly.b32 other0, $0, 2, 31, 0xffffffff;
        shfl.sync.bfly.b32 other1, $1, 2, 31, 0xffffffff;
        max.f32 $0, $0, other0;
        max.f32 $1, $1, other1;
        KEEP:
        }
        """,
        "=&f,=&f,f,f,f,f", [pivot, largest], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def weights_by(pivot, s, rules):
    """Weights of a block relative to pivots, and the threads' sums of them. With the pivots that rows have, unseen,
    the sums `are_too_large` where a pivot was to be raised, or is none yet."""
    parts = gl.exp2(by_thread(s) * log2_factor(rules) - for_all_pairs(pivot))
    sums = gl.sum(gl.sum(parts, 1), 2)
    return gl.convert_layout(parts.reshape([s.shape[0], s.shape[1]]), s.type.layout, assert_trivial=True), sums


@gluon.jit
def softmax(s, state, rules):
    """Weights of a block; what shrinks the sums so far; and the new state of the rows."""
    pivot = _raised(state.pivot, gl.max(gl.max(by_thread(s), 1), 2) * log2_factor(rules))
    # A row that has met no key yet has pivot -inf; any finite one gives it weights of 0 and not NaN.
    finite = gl.where(pivot == float("-inf"), 0.0, pivot)
    shrink = gl.exp2(state.pivot - finite)
    s, sums = weights_by(finite, s, rules)
    return s, shrink, State(pivot, state.sum * shrink + sums)


@gluon.constexpr_function
def _note_too_large(part):
    """PTX that notes, in a predicate of the whole kernel, whether one of two sums is NaN or above 2^13: where one of a
    thread's 32 weights of a row is above 2^8, `_raised` raises the row's pivot."""
    return f"""
        .reg .pred too_large_{part};
        setp.gtu.f32 too_large_{part}, $2, 0f46000000;
        setp.gtu.or.f32 too_large_{part}, $3, 0f46000000, too_large_{part};
        mov.f32 $0, $2;
        mov.f32 $1, $3;
    """


@gluon.constexpr_function
def _any_too_large(part):
    """PTX for whether any thread of a consumer noted so, at one of the barriers that Triton leaves."""
    return f"""
        bar.red.or.pred too_large_{part}, {10 + part}, 128, too_large_{part};
        selp.b32 $0, 1, 0, too_large_{part};
    """


@gluon.jit
def are_too_large(part: gl.constexpr, sums):
    """Whether any of the `part`-th consumer's sums is too large, as a number that all its threads have.

    In two statements, because Gluon makes a number of a tensor by way of shared memory only.
    """
    gl.inline_asm_elementwise(_note_too_large(part), "=f,=f,f,f", [sums], dtype=gl.float32, is_pure=False, pack=2)
    unused = gl.to_tensor(0)
    return gl.inline_asm_elementwise(_any_too_large(part), "=r,r", [unused], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def drop(s, place, pad, factor, rules, tiles: gl.constexpr):
    """Weights of a block behind dropout, of which the first key has `place` in its sequence."""
    score = rules.score
    if score.seed is not None:
        offsets = gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where(dropout_keep(score, pad[:, None], factor[:, None], place, offsets), s, 0.0)
    return s


@gluon.constexpr_function
def _shrinking(count):
    """PTX that multiplies `count` numbers of a thread, two of one row and two of the other in turn, by what shrinks
    their rows, unless that is 1 for all rows of the warp."""
    lines = ["{", ".reg .pred p0, p1;"]
    lines += [f"setp.neu.f32 p0, ${2 * count}, 0f3f800000;", f"setp.neu.or.f32 p1, ${2 * count + 2}, 0f3f800000, p0;"]
    lines += [f"mov.f32 ${i}, ${count + i};" for i in range(count)]
    lines += ["vote.sync.any.pred p1, p1, 0xffffffff;", "@!p1 bra KEEP;"]
    lines += [f"mul.f32 ${i}, ${count + i}, ${2 * count + i};" for i in range(count)]
    return "\n".join([*lines, "KEEP:", "}"])


@gluon.constexpr_function
def _shrinking_constraints(count):
    """Of the operands of `_shrinking`: the results, the numbers, and what shrinks each."""
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def shrunk(o, shrink):
    """`o` for new pivots."""
    COUNT: gl.constexpr = o.shape[1] // 2  # of each thread
    O: gl.constexpr = o.type.layout
    parts = by_thread(o)
    shrink = gl.convert_layout(shrink, quad_of(parts.type.layout), assert_trivial=True)
    parts, shrink = gl.broadcast(parts, for_all_pairs(shrink))
    parts = gl.inline_asm_elementwise(
        _shrinking(COUNT), _shrinking_constraints(COUNT), [parts, shrink], dtype=gl.float32, is_pure=True, pack=COUNT
    )
    return gl.convert_layout(parts.reshape([o.shape[0], o.shape[1]]), O, assert_trivial=True)


@gluon.jit
def operand(s, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """Weights as the left operand of a product. Rounded in pairs by hand: where an operand enters more than one loop,
    LLVM rounds each number on its own."""
    if DTYPE == gl.bfloat16:
        p = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [s], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        p = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [s], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(p, LAYOUT)


@gluon.jit
def store(o, state, tile, rows_out, lse, sinks, head, item, call, S: gl.constexpr, tiles: gl.constexpr):
    """Divides the weighted values by the sum of the weights, and writes its logarithm. The values go to `tile`, from
    where the producer sends them on."""
    O: gl.constexpr = o.type.layout
    score = call.rules.score
    pivot = gl.convert_layout(gl.max(state.pivot, 1), gl.SliceLayout(1, S))
    row_sum = gl.convert_layout(gl.sum(state.sum, 1), gl.SliceLayout(1, S))
    if sinks is not None:
        # A row that sees no key stays without weights.
        sink = gl.where(pivot == float("-inf"), float("-inf"), gl.load(sinks + head) * LOG2E)
        top = gl.maximum(pivot, sink)
        top = gl.where(top == float("-inf"), 0.0, top)
        shrink = gl.exp2(pivot - top)
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, O))[:, None]
        row_sum = row_sum * shrink + gl.exp2(sink - top)
        pivot = top
    inverse = gl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    if score.seed is not None:
        inverse = inverse * score.keep_scale
    o = o * gl.convert_layout(inverse, gl.SliceLayout(1, O))[:, None]
    tile.store(o.to(tile.dtype))
    if call.work is not None:
        if item.begin + ROWS > item.end:
            # Rows of another sequence follow, which the producer would overwrite.
            store_shared(rows_out, item.row, head, item.begin, item.end, tile, tiles.d)
    fence_async_shared()
    rows = item.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, S))
    place = (item.row.to(gl.int64) * call.heads + head) * call.len_q + rows
    gl.store(lse + place, (pivot + gl.log2(row_sum)) * LN2, mask=rows < item.end)
