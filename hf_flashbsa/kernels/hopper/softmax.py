"""What a consumer of the Hopper forward kernel makes of the scores of a block."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.hopper.common import ROWS
from hf_flashbsa.kernels.primitives import dropout_keep, log2_factor, related, shown, within


class State(NamedTuple):
    """Of each row the largest score so far, times log2(e), and the sum of the weights."""

    max: object
    sum: object


@gluon.jit
def no_state(ROW: gl.constexpr):
    """The state of rows that have met no key."""
    return State(gl.full([ROWS], float("-inf"), gl.float32, ROW), gl.zeros([ROWS], gl.float32, ROW))


@gluon.jit
def hide(s, rules, head, item, first, kind, tiles: gl.constexpr):
    """The scores of the block from key `first` on, -inf where they do not exist. `kind` is what the grid of a layout
    says of the block: `visible` would ask it once more."""
    rows = item.begin + gl.arange(0, ROWS, layout=gl.SliceLayout(1, s.type.layout))
    keys = first + gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))
    end = gl.where(kind > 0, item.end, item.begin)
    inside = within(rules.mask, rows, keys, end, item.lo, item.hi, item.diagonal, False)
    ok = related(rules, item.row, item.other_row, head, rows[:, None], keys[None, :], inside)
    s = gl.where(ok, s, float("-inf"))
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
def _largest(s, STEADY: gl.constexpr):
    """The largest score of each row. Triton compares one after the other what one reduction takes; in strands it is
    done sooner, which gained nothing without STEADY."""
    ROW: gl.constexpr = gl.SliceLayout(1, s.type.layout)
    if STEADY:
        strands = s.reshape([s.shape[0], s.shape[1] // 16, 16])
        return gl.convert_layout(gl.max(gl.max(strands, 1), 1), ROW)
    else:
        return gl.max(s, 1)


@gluon.jit
def softmax(s, state, place, pad, factor, rules, tiles: gl.constexpr, STEADY: gl.constexpr):
    """Weights of a block behind dropout, of which the first key has `place` in its sequence; what shrinks the sums so
    far; and the new state of the rows."""
    score = rules.score
    to_log2 = log2_factor(rules)
    new_max = gl.maximum(state.max, _largest(s, STEADY) * to_log2)
    # A row that has met no key yet has maximum -inf; any finite pivot gives it weights of 0 and not NaN.
    pivot = gl.where(new_max == float("-inf"), 0.0, new_max)
    s = gl.exp2(s * to_log2 - pivot[:, None])
    shrink = gl.exp2(state.max - pivot)
    new_sum = state.sum * shrink + gl.sum(s, 1)
    if score.seed is not None:
        offsets = gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where(dropout_keep(score, pad[:, None], factor[:, None], place, offsets), s, 0.0)
    return s, shrink, State(new_max, new_sum)


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
