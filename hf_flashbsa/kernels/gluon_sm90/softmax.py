"""Online softmax of the forward kernel, on the registers of a wgmma accumulator."""

from __future__ import annotations

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from hf_flashbsa.kernels.gluon_sm90.mask import as_fragments, broadcast_pairs, quad_layout
from hf_flashbsa.kernels.gluon_sm90.pipeline import CONSUMER_M, RESCALE_VOTE
from hf_flashbsa.kernels.triton.score import dropout_keep, softmax_scale_log2


class SoftmaxState(NamedTuple):
    """Per row, in the shape (rows, 4) for the quad of threads that share it: `row_max` in log2 units, equal in the
    quad, and each thread's part of `row_sum`.

    As in FlashAttention-4, `row_max` may lag behind the true maximum by up to 8 (a weight of 2^8).
    """

    row_max: object
    row_sum: object


@gluon.jit
def init_softmax(QUAD: gl.constexpr):
    """row_max = -inf, row_sum = 0."""
    return SoftmaxState(
        gl.full([CONSUMER_M, 4], float("-inf"), gl.float32, QUAD), gl.zeros([CONSUMER_M, 4], gl.float32, QUAD)
    )


@gluon.jit
def _update_row_max(row_max, block_max):
    """New row_max, given each thread's `block_max` in log2 units.

    Conditional rescaling (FlashAttention-4): a warp keeps the maxima of its 16 rows until one is exceeded by more than
    8, so that quads rarely exchange maxima and O is rarely rescaled.
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
        "=&f,=&f,f,f,f,f", [row_max, block_max], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def exp_scores(row_max, s, mods):
    """P = exp2(S * scale - row_max) and each thread's row sums of it. `needs_rescale` tells from the sums whether
    row_max was too small or still -inf.
    """
    fragments = gl.exp2(as_fragments(s) * softmax_scale_log2(mods) - broadcast_pairs(row_max))
    block_sum = gl.sum(gl.sum(fragments, 1), 2)
    return gl.convert_layout(
        fragments.reshape([s.shape[0], s.shape[1]]), s.type.layout, assert_trivial=True
    ), block_sum


@gluon.jit
def softmax(s, state, mods):
    """P of a block, the factor `row_scale` for O and row_sum, and the new state."""
    row_max = _update_row_max(state.row_max, gl.max(gl.max(as_fragments(s), 1), 2) * softmax_scale_log2(mods))
    # Rows without a visible key so far have maximum -inf: exp2(-inf - 0) is 0, exp2(-inf + inf) would be NaN.
    safe_max = gl.where(row_max == float("-inf"), 0.0, row_max)
    row_scale = gl.exp2(state.row_max - safe_max)
    s, block_sum = exp_scores(safe_max, s, mods)
    return s, row_scale, SoftmaxState(row_max, state.row_sum * row_scale + block_sum)


@gluon.constexpr_function
def _flag_rescale_ptx(wg):
    """PTX that sets a kernel-wide predicate if one of two sums is NaN or above 2^13: of a thread's 32 weights of a
    row, one is above 2^8, where `_update_row_max` would raise the maximum.
    """
    return f"""
        .reg .pred too_large_{wg};
        setp.gtu.f32 too_large_{wg}, $2, 0f46000000;
        setp.gtu.or.f32 too_large_{wg}, $3, 0f46000000, too_large_{wg};
        mov.f32 $0, $2;
        mov.f32 $1, $3;
    """


@gluon.constexpr_function
def _vote_rescale_ptx(wg, number):
    """PTX that reduces the predicate over the threads of consumer `wg`, at a named barrier of its own."""
    return f"""
        bar.red.or.pred too_large_{wg}, {number}, 128, too_large_{wg};
        selp.b32 $0, 1, 0, too_large_{wg};
    """


@gluon.jit
def needs_rescale(wg: gl.constexpr, block_sum):
    """Whether a row sum of consumer `wg` calls for a rescale, as a uniform int.

    Two asm statements: Gluon turns a tensor into a scalar only by way of shared memory.
    """
    gl.inline_asm_elementwise(_flag_rescale_ptx(wg), "=f,=f,f,f", [block_sum], dtype=gl.float32, is_pure=False, pack=2)
    unused = gl.to_tensor(0)
    return gl.inline_asm_elementwise(
        _vote_rescale_ptx(wg, RESCALE_VOTE + wg), "=r,r", [unused], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def apply_dropout(s, key_pos, pad, factor, mods, tiles: gl.constexpr):
    """P after dropout, without keep_scale; `key_pos` is the position of the first key in its sequence."""
    score_mod = mods.score_mod
    if score_mod.seed is not None:
        offsets = gl.arange(0, tiles.n, layout=gl.SliceLayout(0, s.type.layout))[None, :]
        s = gl.where(dropout_keep(score_mod, pad[:, None], factor[:, None], key_pos, offsets), s, 0.0)
    return s


@gluon.constexpr_function
def _rescale_ptx(count):
    """PTX that multiplies a thread's `count` accumulators, alternating pairs of two rows, by their row scale; skipped
    where that is 1 for all rows of the warp.
    """
    lines = ["{", ".reg .pred p0, p1;"]
    lines += [f"setp.neu.f32 p0, ${2 * count}, 0f3f800000;", f"setp.neu.or.f32 p1, ${2 * count + 2}, 0f3f800000, p0;"]
    lines += [f"mov.f32 ${i}, ${count + i};" for i in range(count)]
    lines += ["vote.sync.any.pred p1, p1, 0xffffffff;", "@!p1 bra KEEP;"]
    lines += [f"mul.f32 ${i}, ${count + i}, ${2 * count + i};" for i in range(count)]
    return "\n".join([*lines, "KEEP:", "}"])


@gluon.constexpr_function
def _rescale_constraints(count):
    """Operand constraints of `_rescale_ptx`: results, accumulators, scales."""
    return ",".join(["=&f"] * count + ["f"] * (2 * count))


@gluon.jit
def rescale_o(o, row_scale):
    """O * row_scale."""
    COUNT: gl.constexpr = o.shape[1] // 2  # accumulators per thread
    O: gl.constexpr = o.type.layout
    fragments = as_fragments(o)
    row_scale = gl.convert_layout(row_scale, quad_layout(fragments.type.layout), assert_trivial=True)
    fragments, row_scale = gl.broadcast(fragments, broadcast_pairs(row_scale))
    fragments = gl.inline_asm_elementwise(
        _rescale_ptx(COUNT),
        _rescale_constraints(COUNT),
        [fragments, row_scale],
        dtype=gl.float32,
        is_pure=True,
        pack=COUNT,
    )
    return gl.convert_layout(fragments.reshape([o.shape[0], o.shape[1]]), O, assert_trivial=True)


@gluon.jit
def cast_p(s, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """P as the register operand of P V. Rounds pairs explicitly: where an operand enters two loops, LLVM rounds the
    elements one by one.
    """
    if DTYPE == gl.bfloat16:
        p = gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [s], dtype=gl.bfloat16, is_pure=True, pack=2
        )
    else:
        p = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [s], dtype=gl.float16, is_pure=True, pack=2
        )
    return gl.convert_layout(p, LAYOUT)
