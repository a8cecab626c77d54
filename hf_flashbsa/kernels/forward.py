"""The portable forward kernel: one program for each tile of queries of a head, online softmax over blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.primitives import (
    LN2,
    LOG2E,
    asks_ids,
    bias_tile,
    dot,
    dropout_keep,
    dropout_words,
    first_full,
    head_of,
    hide_segments,
    list_entries,
    load_tile,
    log2_factor,
    logits,
    partial_position,
    place_of,
    scheduled,
    span_of,
    store_tile,
    visible,
    within,
    work_item,
)
from hf_flashbsa.kernels.records import Rules, Tiles


@triton.jit
def _attend(
    acc, row_max, row_sum, q_tile, k, v, n0, item, span, rules, head, pad, factor,
    tiles: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys from `n0`: folds its weights and values into the running softmax."""
    queries = item.begin + tl.arange(0, tiles.m)
    keys = n0 + tl.arange(0, tiles.n)
    inside = None
    if MASKED:
        inside = within(rules.mask, queries, keys, item.end, span.lo, span.hi, item.diagonal, False)
    # [n, d]
    k_block = load_tile(k, n0, span.lo, span.hi, tiles.head_dim, tiles.n, tiles.d, MASKED)
    # [m, n]
    added = bias_tile(
        rules, item.row, head, queries[:, None], keys[None, :], inside, item.query_origin, item.key_origin
    )
    s = dot(q_tile, tl.trans(k_block))
    s, _ = logits(s, rules, added)
    if MASKED:
        ok = visible(
            rules, item.row, head, queries[:, None], keys[None, :], inside, item.query_origin, item.key_origin,
            item.begin, n0, tiles,
        )  # fmt: skip
        s = tl.where(ok, s, float("-inf"))
        s = hide_segments(s, rules.mask, item.row, item.other_row, asks_ids(item), queries[:, None], keys[None, :])
    to_log2 = log2_factor(rules)
    new_max = tl.maximum(row_max, tl.max(s, 1) * to_log2)
    pivot = new_max
    if MASKED or rules.bias.ptr is not None:
        # A row that has met no key yet has maximum -inf; any finite pivot gives it weights of 0 and not NaN.
        pivot = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(s * to_log2 - pivot[:, None])
    total = tl.sum(p, 1)
    if rules.score.seed is not None:
        offsets = tl.arange(0, tiles.n)[None, :]
        keep = dropout_keep(rules.score, pad[:, None], factor[:, None], n0 - item.key_origin, offsets)
        p = tl.where(keep, p, 0.0)
    shrink = tl.math.exp2(row_max - pivot)
    row_sum = row_sum * shrink + total
    acc = acc * shrink[:, None]
    # [n, dv]
    v_block = load_tile(v, n0, span.lo, span.hi, tiles.head_dim_v, tiles.n, tiles.dv, MASKED)
    acc = dot(p.to(v_block.dtype), v_block, acc)
    return acc, new_max, row_sum


@triton.jit(do_not_specialize=["diagonal", "len_q", "len_k", "num_tiles"])
def forward_kernel(
    q, k, v, out, lse, sinks, work, mask, dense, blocks, score, bias, diagonal, heads, group, len_q, len_k, num_tiles,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LISTED: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes `out` and `lse` `(B, Hq, Sq)`. Grid: tiles * heads * batch, the tiles of a head side by side."""
    tiles: tl.constexpr = Tiles(BLOCK_M, BLOCK_N, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, LISTED, WIDTH)
    rules = Rules(mask, dense, blocks, score, bias)
    row, head, tile = scheduled(work, tl.program_id(0), num_tiles, heads, BLOCK_M)
    if work is None:
        # Under causality the last tiles have the most keys: they start first. Work tables are sorted so.
        tile = num_tiles - 1 - tile
    item = work_item(work, tile, row, len_q, len_k, diagonal, BLOCK_M)
    if item.begin >= item.end:
        return
    span = span_of(item, rules, head, list_entries(tiles), tiles, False)
    q_tile = load_tile(head_of(q, item.row, head), item.begin, 0, item.end, HEAD_DIM, BLOCK_M, BLOCK_D, True)
    k_head = head_of(k, item.other_row, head // group)
    v_head = head_of(v, item.other_row, head // group)
    pad, factor = 0, 0
    if score.seed is not None:
        pad, factor = dropout_words(score, item.row * heads + head, item.begin + tl.arange(0, BLOCK_M))
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for index in range(0, span.partial):
        n0 = place_of(span, blocks, partial_position(span, index, BLOCK_N, tiles), tiles)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k_head, v_head, n0, item, span, rules, head, pad, factor, tiles, True
        )
    following = first_full(span, blocks, tiles)
    for position in range(span.full_begin, span.full_end, BLOCK_N):
        n0 = position
        if LISTED > 0:
            n0 = following
            following = place_of(span, blocks, tl.minimum(position + BLOCK_N, span.full_end - 1), tiles)
        acc, row_max, row_sum = _attend(
            acc, row_max, row_sum, q_tile, k_head, v_head, n0, item, span, rules, head, pad, factor, tiles, False
        )
    if sinks is not None:
        # A row that sees no key stays without weights.
        sink = tl.where(row_max == float("-inf"), float("-inf"), tl.load(sinks + head) * LOG2E)
        top = tl.maximum(row_max, sink)
        top = tl.where(top == float("-inf"), 0.0, top)
        shrink = tl.math.exp2(row_max - top)
        acc = acc * shrink[:, None]
        row_sum = row_sum * shrink + tl.math.exp2(sink - top)
        row_max = top
    inverse = tl.where(row_sum > 0.0, 1.0 / row_sum, 0.0)
    if score.seed is not None:
        inverse = inverse * score.keep_scale
    queries = item.begin + tl.arange(0, BLOCK_M)
    place = (tl.cast(item.row, tl.int64) * heads + head) * len_q + queries
    tl.store(lse + place, (row_max + tl.math.log2(row_sum)) * LN2, mask=queries < item.end)
    out_head = head_of(out, item.row, head)
    store_tile(out_head, item.begin, item.end, acc * inverse[:, None], HEAD_DIM_V, BLOCK_M, BLOCK_DV)
