"""Split keys: several programs visit the keys of one tile of few queries, and a second kernel combines what they find
(Flash-Decoding).

Each part leaves its own softmax: float32 `out` `(parts * B, Hq, Sq, Dv)` and `lse` `(parts * B, Hq, Sq)`. They are
added up in the order of the parts, so that results do not depend on which program was first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hf_flashbsa.kernels.structs import WorkTile
from hf_flashbsa.kernels.triton.load import head_view


@triton.jit
def keys_of_split(work_tile, split, split_keys):
    """A WorkTile that visits part `split` of the keys, `split_keys` of them."""
    lo = tl.minimum(work_tile.lo + split * split_keys, work_tile.hi)
    hi = tl.minimum(lo + split_keys, work_tile.hi)
    full_hi = tl.minimum(work_tile.full_hi, hi)
    return WorkTile(
        work_tile.batch, work_tile.begin, work_tile.end, work_tile.other_batch, lo, lo, full_hi, hi,
        work_tile.query_offset, work_tile.query_origin, work_tile.key_origin,
    )  # fmt: skip


@triton.jit(do_not_specialize=["batches", "len_q"])
def combine_kernel(
    out, lse, parts, lse_parts, sinks, batches, heads, len_q, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLITS: tl.constexpr, SPLITS_POW2: tl.constexpr,
):  # fmt: skip
    """Writes `out` and `lse` of a query, given `SPLITS` parts. Grid: queries * heads * batch."""
    index = tl.program_id(0)
    batch, head, query = index // (len_q * heads), index // len_q % heads, index % len_q
    split = tl.arange(0, SPLITS_POW2)
    part_lse = tl.load(
        lse_parts + split * tl.cast(batches * heads * len_q, tl.int64) + index, mask=split < SPLITS,
        other=float("-inf"),
    )  # fmt: skip
    top = tl.max(part_lse, 0)
    sink = float("-inf")
    if sinks is not None:
        # Rows without visible keys keep weight 0.
        sink = tl.where(top == float("-inf"), float("-inf"), tl.load(sinks + head))
    top = tl.maximum(top, sink)
    safe_top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp(part_lse - safe_top)
    total = tl.sum(weights, 0) + tl.exp(sink - safe_top)
    dims = tl.arange(0, BLOCK_DV)
    pointers = head_view(parts, split * batches + batch, head).base[:, None] + query * parts.stride_s + dims[None, :]
    values = tl.load(pointers, mask=(split < SPLITS)[:, None] & (dims < HEAD_DIM_V)[None, :], other=0.0)
    combined = tl.sum(values * weights[:, None], 0) * tl.where(total > 0.0, 1.0 / total, 0.0)
    tl.store(lse + index, top + tl.log(tl.where(top == float("-inf"), 1.0, total)))
    out_row = head_view(out, batch, head).base + tl.cast(query, tl.int64) * out.stride_s
    tl.store(out_row + dims, combined.to(out.ptr.dtype.element_ty), mask=dims < HEAD_DIM_V)
