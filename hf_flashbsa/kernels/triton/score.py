"""How a score is modified: softcap, bias, ALiBi and dropout; and small math helpers."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels import dropout
from hf_flashbsa.kernels.triton.load import strided_pointers

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
#: Constants of the dropout mask (dropout.py).
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(dropout.ROUNDS)
KEY_FACTOR: tl.constexpr = tl.constexpr(dropout.KEY_FACTOR)
LAST_FACTOR: tl.constexpr = tl.constexpr(dropout.LAST_FACTOR)
PAIR: tl.constexpr = tl.constexpr(dropout.PAIR)


@triton.jit
def tanh(x):
    """tanh to float32 rounding: a Taylor series near 0, where the exponential form cancels."""
    x2 = x * x
    series = x + x * x2 * (-1.0 / 3.0 + x2 * (2.0 / 15.0 + x2 * (-17.0 / 315.0 + x2 * (62.0 / 2835.0))))
    quotient = 1.0 - 2.0 / (1.0 + tl.math.exp2(x * (2.0 * LOG2E)))
    return tl.where(x2 < 0.0625, series, quotient)


@triton.jit
def _hint_contiguous(rows, origin):
    """`[M, 1]` or `[1, N]` rows as positions relative to `origin`, with the hint that they are contiguous and begin at
    a multiple of their number. Hints only stick to values computed here; Triton drops them for function arguments.
    """
    positions = rows - origin
    positions = tl.max_contiguous(positions, [positions.shape[0], positions.shape[1]])
    return tl.multiple_of(positions, [positions.shape[0], positions.shape[1]])


@triton.jit
def load_bias(mods, score_tile, in_window):
    """Bias of a ScoreTile, float32: -inf where it hides the key or does not reach; 0 without bias.

    `in_window` masks the load; None means a full block, which lies within the bias.
    """
    score_mod, bias = mods.score_mod, mods.bias
    if bias.ptr is None:
        return 0.0
    else:
        # Tiles begin at multiples of their size in the sequence (`get_block_range`), so loads can be vectorised.
        pos_q = _hint_contiguous(score_tile.queries, score_tile.query_origin)
        pos_k = _hint_contiguous(score_tile.keys, score_tile.key_origin)
        pointers = strided_pointers(bias, score_tile.batch_q, score_tile.head, pos_q, pos_k)
        if in_window is None:
            bias_tile = tl.load(pointers)
        else:
            in_bias = in_window & (pos_q < score_mod.bias_len_q) & (pos_k < score_mod.bias_len_k)
            bias_tile = tl.load(pointers, mask=in_bias, other=float("-inf"))
        return tl.where(bias_tile <= score_mod.bias_hidden, float("-inf"), bias_tile.to(tl.float32))


@triton.jit
def _scales_last(mods):
    """Whether the softmax multiplies by the scale (`softmax_scale_log2`), not `apply_score_mod`."""
    return (mods.score_mod.softcap is None) and (mods.bias.ptr is None)


@triton.jit
def _alibi(mods, score_tile):
    """Slope times distance of query and key, in the units of `apply_score_mod`."""
    score_mod = mods.score_mod
    slope = tl.load(
        score_mod.alibi_slopes + tl.cast(score_tile.batch_q, tl.int64) * score_mod.alibi_stride_b + score_tile.head
    )
    if _scales_last(mods):
        slope = slope / score_mod.scale
    # Float32 holds positions up to 2^24 exactly. Converting rows and columns is cheaper than converting each distance.
    pos_q = (score_tile.queries + (score_tile.query_offset - score_tile.key_origin)).to(tl.float32)
    pos_k = (score_tile.keys - score_tile.key_origin).to(tl.float32)
    return slope * tl.abs(pos_q - pos_k)


@triton.jit
def apply_score_mod(s, mods, bias_tile, score_tile):
    """Softcap, bias and ALiBi: returns the logit in units of `softmax_scale_log2`, and d logit / d s, the slope of
    the softcap.

    `bias_tile` comes from `load_bias`.
    """
    score_mod = mods.score_mod
    slope = 1.0
    if score_mod.softcap is not None:
        s = s * score_mod.scale
        t = tanh(s / score_mod.softcap)
        s = score_mod.softcap * t
        slope = 1.0 - t * t
    if mods.bias.ptr is not None:
        if score_mod.softcap is None:
            s = s * score_mod.scale
        s = s + bias_tile
    if score_mod.alibi_slopes is not None:
        s = s - _alibi(mods, score_tile)
    return s, slope


@triton.jit
def softmax_scale_log2(mods):
    """Factor from `apply_score_mod` to exponents of 2: p = exp2(s * factor - row_max)."""
    if _scales_last(mods):
        return mods.score_mod.scale * LOG2E
    else:
        return LOG2E


@triton.jit
def dropout_row_words(score_mod, batch_head, queries):
    """Pad and factor of each query: the two Philox words that key its dropout hash (dropout.py)."""
    zero = (queries * 0).to(tl.uint32)
    row = zero + tl.cast(batch_head, tl.uint32)
    pad, factor, _, _ = tl.philox(
        tl.load(score_mod.seed), queries.to(tl.uint32), row, zero, zero, n_rounds=PHILOX_ROUNDS
    )
    return pad, factor | 1


@triton.jit
def dropout_keep(score_mod, pad, factor, first, offsets):
    """Which weights dropout keeps. `pad` and `factor` are per query and broadcastable; keys are `first + offsets`,
    where `first`, counted in the sequence, is a multiple of 16.
    """
    # From offsets alone, so that the compiler sees which two keys share a draw.
    half = offsets & PAIR
    x = (first + (offsets - half)).to(tl.uint32) * KEY_FACTOR
    x = ((x ^ (x >> 16)) ^ pad) * factor
    x = (x ^ (x >> 15)) * LAST_FACTOR
    x = x << (16 - 2 * half).to(tl.uint32)
    return x >= tl.cast(score_mod.drop_threshold, tl.uint32)


@triton.jit
def dot(a, b, acc=None):
    """Matrix product accumulated in float32; float32 operands are not rounded to TF32."""
    return tl.dot(a, b, acc, input_precision="ieee")
