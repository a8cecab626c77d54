"""What Triton kernels are given, and what they work out of it, as tuples.

Fields are `object` because kernels get them as tensors, numbers or None; None specialises the code at launch.
"""

from __future__ import annotations

from typing import NamedTuple


class Operand(NamedTuple):
    """A `(batch, heads, length, dim)` tensor whose last dimension is contiguous. `wide` is 1 where rows begin at
    multiples of 16 bytes and Triton does not see it, else None."""

    ptr: object
    stride_b: object
    stride_h: object
    stride_s: object
    wide: object


class Head(NamedTuple):
    """One head of an Operand: pointer to its row 0, and the distance between rows."""

    base: object
    stride: object


class Tiles(NamedTuple):
    """Compile-time sizes of a kernel: blocks of queries and keys, head dims, and the powers of 2 that hold them;
    then, where `Blocks` are given, their size, and the power of 2 that holds the longest list.
    """

    m: object
    n: object
    head_dim: object
    head_dim_v: object
    d: object
    dv: object
    listed: object
    width: object


class Matrix(NamedTuple):
    """A `(batch, heads, queries, keys)` tensor with any strides, 0 where it is broadcast. None stands for no tensor.
    `wide` is that of an Operand.

    Kernels take it as an argument of its own: within another tuple, Triton 3.6 loses strides of 1.
    """

    ptr: object
    stride_b: object
    stride_h: object
    stride_q: object
    stride_k: object
    wide: object


class Blocks(NamedTuple):
    """The blocks of a BlockLayout that one side visits, in place of ranges.

    `lists` is `(batch, heads, rows, width)`: the number of full blocks of a row, that of all listed blocks, and their
    indices, full ones first, both groups ascending. `grid` is that of the layout, `masks` its `mask_words`, None where
    no block is partial. Strides of batch and head are 0 where they are shared.
    """

    lists: object
    stride_b: object
    stride_h: object
    stride_row: object
    grid: object
    grid_stride_b: object
    grid_stride_h: object
    grid_stride_q: object
    masks: object


class Mask(NamedTuple):
    """What hides scores. Every field may be None; segment ids are `(batch, length)`, the strides their batch's, and
    their lengths stand beside them."""

    window_left: object
    window_right: object
    segment_ids_q: object
    segment_ids_k: object
    ids_stride_q: object
    ids_stride_k: object
    ids_length_q: object
    ids_length_k: object


class Score(NamedTuple):
    """How a score is made of a product of query and key, and which weights are dropped (None: not at all).

    Bias values up to `bias_hidden` hide the key, and so do places beyond `bias_len_*`. `drop_threshold` is that of
    dropout.py in the upper half of 32 bits, read as a signed number; `keep_scale` is what kept weights are multiplied
    with.
    """

    scale: object
    softcap: object
    bias_hidden: object
    bias_len_q: object
    bias_len_k: object
    seed: object
    drop_threshold: object
    keep_scale: object


class Rules(NamedTuple):
    """Everything that says which scores exist and what they are; `blocks` are None where `Tiles.listed` is 0."""

    mask: object
    dense: object
    blocks: object
    score: object
    bias: object


class Item(NamedTuple):
    """A tile of work: own rows `[begin, end)` of batch row `row` against `[lo, hi)` of `other_row`."""

    row: object
    begin: object
    end: object
    other_row: object
    lo: object
    full_lo: object
    full_hi: object
    hi: object
    diagonal: object
    query_origin: object
    key_origin: object


class Span(NamedTuple):
    """What a tile visits, in steps of a kernel's block: `partial` blocks that need masking, then the full ones.

    Positions count along the rows themselves, or along the listed blocks laid end to end (`place_of` tells the row).
    Those of the full blocks are `[full_begin, full_end)`. Of the partial ones, `left` lie before them from `begin`
    on, `right - left` behind them, and the rest from `listed` on. No row outside `[lo, hi)` is met.
    """

    begin: object
    left: object
    right: object
    partial: object
    full_begin: object
    full_end: object
    listed: object
    lo: object
    hi: object
    index: object
    origin: object
