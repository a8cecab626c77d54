"""Structs of kernel arguments and of what kernels derive from them, as named tuples.

Fields are `object`: in a kernel each is a tensor, a number or None. None means absent and specialises the kernel at
compile time.
"""

from __future__ import annotations

from typing import NamedTuple


class TensorView(NamedTuple):
    """A `(batch, heads, length, dim)` tensor, contiguous in its last dimension.

    `align_hint` is 1 where rows are aligned to 16 bytes although some stride is not a multiple of 16 elements, so that
    Triton cannot infer it; else None.
    """

    ptr: object
    stride_b: object
    stride_h: object
    stride_s: object
    align_hint: object


class HeadView(NamedTuple):
    """One head of a TensorView: pointer to its row 0, and the row stride."""

    base: object
    stride: object


class Tiles(NamedTuple):
    """Compile-time tile shape: `m` queries by `n` keys; head dims of q/k and of v, and the powers of 2 `d` and `dv`
    that hold them. With a block layout: its block size and the power of 2 that holds the longest block list, else 0.
    """

    m: object
    n: object
    head_dim: object
    head_dim_v: object
    d: object
    dv: object
    sparse_block: object
    max_blocks: object


class StridedTensor(NamedTuple):
    """A `(batch, heads, queries, keys)` tensor (bias, dense mask) with any strides, 0 where it is broadcast; `ptr`
    None means no tensor. `align_hint` as in TensorView.

    Passed to kernels as an argument of its own: nested in another tuple, Triton 3.6 drops the specialisation of
    strides of 1.
    """

    ptr: object
    stride_b: object
    stride_h: object
    stride_q: object
    stride_k: object
    align_hint: object


class BlockTable(NamedTuple):
    """Block-sparse layout, as seen from the side that a kernel tiles (queries, or keys for dK/dV).

    `lists` holds the block lists of `tables.BlockListColumn`, `(batch, heads, blocks, 2 + most)`. `grid` is the
    layout's `(batch, heads, query blocks, key blocks)`: 0 skipped, 1 full, `i >= 2` partial with mask `i - 2` of
    `mask_words`, which is None where no block is partial. Batch and head strides are 0 where they are shared.
    """

    lists: object
    stride_b: object
    stride_h: object
    stride_row: object
    grid: object
    grid_stride_b: object
    grid_stride_h: object
    grid_stride_q: object
    mask_words: object


class MaskBounds(NamedTuple):
    """Sliding window and segment ids (padding, packed documents). Every field may be None. Segment ids are `(batch,
    length)` with batch strides `ids_stride_*`; a key is visible where both ids are equal and >= 0.
    """

    window_left: object
    window_right: object
    segment_ids_q: object
    segment_ids_k: object
    ids_stride_q: object
    ids_stride_k: object
    ids_length_q: object
    ids_length_k: object


class ScoreTile(NamedTuple):
    """Where a tile of scores lies: in `head`, queries of batch row `batch_q` by keys of `batch_k`.

    `queries` and `keys` are rows, broadcastable against each other; `first_q` and `first_k` the first of them. Origins
    and the query offset as in WorkTile.
    """

    batch_q: object
    batch_k: object
    head: object
    queries: object
    keys: object
    first_q: object
    first_k: object
    query_origin: object
    key_origin: object
    query_offset: object


class ScoreMod(NamedTuple):
    """`score = softcap * tanh(scale * q.k / softcap) + bias - alibi_slope * distance`, and dropout of the softmax
    weights.

    Bias values <= `bias_hidden` hide the key, as do positions beyond `bias_len_*`. `drop_threshold` is the 16-bit
    threshold of dropout.py in the upper half of a signed 32-bit number; surviving weights are multiplied by
    `keep_scale`. `alibi_slopes` is `(batch, heads)`, with a batch stride of 0 where rows share it.
    """

    scale: object
    softcap: object
    bias_hidden: object
    bias_len_q: object
    bias_len_k: object
    seed: object
    drop_threshold: object
    keep_scale: object
    alibi_slopes: object
    alibi_stride_b: object


class AttnMods(NamedTuple):
    """Everything beyond q, k and v that decides which scores exist and their value: the data behind FlexAttention's
    mask_mod (`bounds`, `dense_mask`, `blocks`) and score_mod (`score_mod`, `bias`). `blocks` is None without a block
    layout.
    """

    bounds: object
    dense_mask: object
    blocks: object
    score_mod: object
    bias: object


class WorkTile(NamedTuple):
    """One tile of work: rows `[begin, end)` of batch row `batch` visit rows `[lo, hi)` of `other_batch` on the other
    side.

    Rows are queries and the other side is keys, or the reverse in dK/dV. Segments hide nothing in `[full_lo,
    full_hi)`. Query i is aligned with key `i + query_offset`. The origins are the first rows of the sequence on each
    side. The fields are the columns of `tables.ScheduleColumn`; without a tile schedule both batches are the same.
    """

    batch: object
    begin: object
    end: object
    other_batch: object
    lo: object
    full_lo: object
    full_hi: object
    hi: object
    query_offset: object
    query_origin: object
    key_origin: object


class BlockRange(NamedTuple):
    """The blocks that a WorkTile visits (FlashAttention's n_block_min..n_block_max): `num_partial` masked blocks, then
    full blocks.

    Positions count rows of the other side or, with block lists, rows of the listed blocks laid end to end;
    `block_start` maps a position to its row. Full blocks span positions `[full_begin, full_end)`. Masked blocks are
    numbered: `[0, left_end)` lie before the full ones, from position `begin` on; `[left_end, right_end)` lie after
    them; `[right_end, num_partial)` are a layout's partial blocks, from position `partial_begin` on. Nothing outside
    rows `[lo, hi)` is visible. `indices` points to the block list, `origin` is the first row of the sequence.
    """

    begin: object
    left_end: object
    right_end: object
    num_partial: object
    full_begin: object
    full_end: object
    partial_begin: object
    lo: object
    hi: object
    indices: object
    origin: object
