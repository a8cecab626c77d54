"""From a mask and options to the plan of a call.

`lower` is the one place where masks and kernels meet, and holds the one memo: the layers of a forward pass call
`attention` with the same spec and equal sizes, and only the first of them does any work here.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from hf_flashbsa.kernels.backends import resolve_backend
from hf_flashbsa.kernels.block_tables import block_table, pack_block_masks
from hf_flashbsa.kernels.call_plan import NO_TENSORS, CallPlan, CallScalars, CallTensors
from hf_flashbsa.kernels.dropout import drop_threshold
from hf_flashbsa.kernels.tables import SCHEDULE_TILE
from hf_flashbsa.kernels.tile_schedule import (
    BlockCounts,
    LiveKeys,
    Sequences,
    Sizes,
    live_keys,
    sequence_rows,
    tile_schedule,
)
from hf_flashbsa.kernels.tuning import multiprocessors
from hf_flashbsa.masks.block_layout import BlockLayout, TracedLayout
from hf_flashbsa.masks.modes import may_keep
from hf_flashbsa.masks.spec import AttentionSpec
from hf_flashbsa.ops import validation

_T = TypeVar("_T")

#: Of so many scores, those that segment ids hide take the torch back end longer than a tile schedule does.
MANY_SCORES = 1 << 18
#: Up to so many queries, one tile holds those of a head, and a tile schedule takes longer to make than it saves.
FEW_QUERIES = 16
#: Keys are split for so many programs on each multiprocessor, into parts of at least so many keys, and so many parts.
PROGRAMS_PER_PROCESSOR = 2
KEYS_OF_A_SPLIT = 256
MAX_SPLITS = 32


class CallOptions(NamedTuple):
    """The options of `attention` that are no tensors, and what the plan must know of the tensors."""

    softmax_scale: float | None
    softcap: float | None
    dropout_p: float
    deterministic: bool
    backend: str
    has_bias: bool
    needs_grad: bool


def lower(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: tuple) -> CallPlan:
    """The plan of a call, without the caller's own tensors (bias, sinks, slopes, seed). Validates on the way.

    Args:
        options: the fields of `CallOptions`, as a plain tuple, which costs each call less.

    Raises:
        ValueError: an argument that does not fit.
    """
    call = (
        options, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        q.stride(), k.stride(), v.stride(),
    )  # fmt: skip
    return remember(spec, "plan", call, lambda: _plan(spec, q, k, v, CallOptions(*options)))


def _plan(spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: CallOptions) -> CallPlan:
    backend = resolve_backend(options.backend, q)
    validation.check_tensors(q, k, v)
    sizes, heads, device = validation.sizes_of(q, k), q.shape[1], q.device
    validation.check_spec(spec, sizes, heads, device)
    scale = 1.0 / math.sqrt(q.shape[-1]) if options.softmax_scale is None else float(options.softmax_scale)
    validation.check_scalars(scale, options.softcap, options.dropout_p)
    left, right = spec.window
    scalars = CallScalars(
        softmax_scale=scale,
        softcap=None if options.softcap is None else float(options.softcap),
        window_left=None if left is None else int(left),
        window_right=None if right is None else int(right),
        query_offset=_query_offset(spec, sizes),
        drop_threshold=drop_threshold(options.dropout_p) if options.dropout_p > 0.0 else None,
        block_size=None if spec.layout is None else spec.layout.block_size,
        deterministic=options.deterministic,
        backend=backend,
        num_splits=_num_splits(spec, sizes, k.shape[1], device, options._replace(backend=backend)),
    )
    tensors = _tensors(spec, sizes, heads, device, options._replace(backend=backend))
    return CallPlan(tensors, scalars, {} if backend == "torch" and not torch.compiler.is_compiling() else None)


def _query_offset(spec: AttentionSpec, sizes: Sizes) -> int:
    """Key position of query row 0 where every sequence fills its batch row; 0 where the device knows it."""
    if spec.query_offset is None:
        offset = sizes.len_k - sizes.len_q
        return offset if isinstance(offset, torch.SymInt) else int(offset)  # int() would fix the symbol
    return 0 if isinstance(spec.query_offset, torch.Tensor) else int(spec.query_offset)


def _tensors(spec: AttentionSpec, sizes: Sizes, heads: int, device: torch.device, options: CallOptions) -> CallTensors:
    on_torch = options.backend == "torch"
    # The torch back end computes a whole sequence at once, and asks about the keys of each query where that is cheap.
    tile = _longest(sizes) if on_torch else SCHEDULE_TILE
    by_tiles = not on_torch or spec.layout is not None or _are_many_scores(spec, sizes, heads)
    unscheduled = not on_torch and not options.needs_grad and _is_decoding_step(spec, sizes)
    tiles_of_keys = options.needs_grad and not on_torch
    # A bias is read, and keys are dropped, in groups that begin at multiples of a tile, counted from the first row of
    # a sequence.
    split_q = not options.has_bias
    split_k = split_q and options.dropout_p == 0.0
    has_sequences = not by_tiles or (options.has_bias and options.needs_grad)
    ids_q, ids_k, mask, layout = spec.segment_ids_q, spec.segment_ids_k, spec.mask, spec.layout
    tensors = CallTensors(
        mask=None if mask is None else mask.expand(sizes.batch_q, heads, sizes.len_q, sizes.len_k),
        segment_ids_q=None if ids_q is None else _side_by_side(ids_q).expand(sizes.batch_q, -1),
        segment_ids_k=None if ids_k is None else _side_by_side(ids_k).expand(sizes.batch_k, -1),
        schedule_q=schedule_of(spec, "q", sizes, device, tile, split_q) if by_tiles and not unscheduled else None,
        schedule_k=schedule_of(spec, "k", sizes, device, tile, split_k) if tiles_of_keys else None,
        query_offset_tensor=spec.query_offset if unscheduled and isinstance(spec.query_offset, torch.Tensor) else None,
        sequences=sequence_table_of(spec, sizes, device) if has_sequences else None,
        block_grid=None if layout is None else layout.grid,
        block_masks=None if layout is None else _block_masks(layout),
        block_table_q=None if layout is None or on_torch else _block_table(layout, "q"),
        block_table_k=None if layout is None or not tiles_of_keys else _block_table(layout, "k"),
    )
    return NO_TENSORS if all(x is None for x in tensors) else tensors


def _are_many_scores(spec: AttentionSpec, sizes: Sizes, heads: int) -> bool:
    """Whether it pays to find the scores that segment ids hide before any is computed."""
    scores = sizes.batch_q * heads * sizes.len_q * sizes.len_k
    if isinstance(scores, torch.SymInt):  # an exported program is for any number
        return spec.segment_ids_k is not None
    return spec.segment_ids_k is not None and bool(scores > MANY_SCORES)


def _is_decoding_step(spec: AttentionSpec, sizes: Sizes) -> bool:
    """Whether a call has few queries, and kernels can read from the tensors of its mask what hides keys."""
    few = type(sizes.len_q) is int and sizes.len_q <= FEW_QUERIES  # not a symbol of something that traces
    return few and spec.layout is None and not _has_own_lengths(spec)


def _num_splits(spec: AttentionSpec, sizes: Sizes, heads_k: int, device: torch.device, options: CallOptions) -> int:
    """Into how many parts the keys of a call with few queries are split, so that there is work for a whole GPU.

    Calls with a gradient or dropout are not split, nor those whose keys a schedule or a layout divides.
    """
    fixed = options.backend != "triton" or options.needs_grad or options.dropout_p > 0.0
    if fixed or not _is_decoding_step(spec, sizes) or type(sizes.len_k) is not int or type(sizes.batch_k) is not int:
        return 1
    left, _ = spec.window
    keys = sizes.len_k if left is None else min(sizes.len_k, left + sizes.len_q)
    programs = max(1, sizes.batch_k * heads_k)
    wanted = -(-PROGRAMS_PER_PROCESSOR * multiprocessors(device) // programs)
    return max(1, min(wanted, keys // KEYS_OF_A_SPLIT, MAX_SPLITS))


def _longest(sizes: Sizes) -> int:
    """Rows of the longer side, at least 1, without asking `torch.export` which side that is."""
    lengths = sizes.len_q, sizes.len_k
    if any(isinstance(length, torch.SymInt) for length in lengths):
        return torch.sym_max(*lengths)
    return max(*lengths, 1)  # torch.jit.trace has tensors here


def _side_by_side(ids: torch.Tensor) -> torch.Tensor:
    """Segment ids `(B or 1, n)` of which those of a row lie side by side in memory, as kernels load them."""
    return ids if ids.stride(-1) == 1 else ids.contiguous()


def has_own_rows(spec: AttentionSpec) -> bool:
    """Whether batch rows have lengths or an offset that the device knows."""
    return isinstance(spec.query_offset, torch.Tensor) or _has_own_lengths(spec)


def _has_own_lengths(spec: AttentionSpec) -> bool:
    """Whether batch rows have lengths of their own, which only a tile schedule can say."""
    names = ("seqlens", "starts", "cu_seqlens")
    return any(spec.of_side(name, side) is not None for name in names for side in "qk")


def sequences_of(spec: AttentionSpec, sizes: Sizes, device: torch.device) -> Sequences:
    """The independent attention problems of a call. Segment ids are not resolved here."""
    count = validation.sequence_count(spec, sizes)
    q = sequence_rows(count, sizes.len_q, device, spec.cu_seqlens_q, spec.seqlens_q, spec.starts_q)
    k = sequence_rows(count, sizes.len_k, device, spec.cu_seqlens_k, spec.seqlens_k, spec.starts_k)
    offset = k.end - q.end if spec.query_offset is None else k.begin - q.begin + spec.query_offset
    return Sequences(q, k, offset.to(torch.int32))


def sequence_table_of(spec: AttentionSpec, sizes: Sizes, device: torch.device) -> torch.Tensor | None:
    """`Sequences.table` of a call; None where every sequence fills its batch row."""
    if not has_own_rows(spec):
        return None
    return remember(spec, "sequences", (sizes, device), lambda: sequences_of(spec, sizes, device).table())


def schedule_of(
    spec: AttentionSpec,
    side: str,
    sizes: Sizes,
    device: torch.device,
    tile: int = SCHEDULE_TILE,
    split_segments: bool = True,
) -> torch.Tensor | None:
    """The tile schedule of one side, arguments as in `tile_schedule`; None where plain arithmetic says the same."""
    if spec.segment_ids_k is None and spec.layout is None and not has_own_rows(spec):
        return None
    if side == "k" and _sides_are_alike(spec, sizes):
        side = "q"
    # Block layouts count their blocks from the first row of a sequence too.
    split = split_segments and spec.segment_ids_k is not None and spec.layout is None
    return remember(
        spec, "schedule", (side, sizes, device, tile, split), lambda: _schedule(spec, side, sizes, device, tile, split)
    )


def _sides_are_alike(spec: AttentionSpec, sizes: Sizes) -> bool:
    """Whether queries and keys divide into the same tiles, which see the same."""
    alike = all(spec.of_side(name, "q") is spec.of_side(name, "k") for name in ("seqlens", "starts", "cu_seqlens"))
    segments = spec.segment_ids_k is None or spec.segment_ids_q is spec.segment_ids_k
    return alike and segments and sizes.batch_q == sizes.batch_k and sizes.len_q == sizes.len_k and spec.layout is None


def _schedule(
    spec: AttentionSpec, side: str, sizes: Sizes, device: torch.device, tile: int, split: bool
) -> torch.Tensor:
    sequences, layout = sequences_of(spec, sizes, device), spec.layout
    counts = ids = padding = None
    if layout is not None:
        counts = BlockCounts(layout.lists(side).total, layout.block_size)
        if side == "q":
            validation.assert_layout_covers(layout, sequences)
    if spec.segment_ids_k is not None and spec.segment_ids_q is None and layout is None and not _has_own_lengths(spec):
        padding = remember(spec, "live keys", (sizes.batch_k,), lambda: _live_keys(spec, sizes))
    elif spec.segment_ids_k is not None:
        ids_q = spec.segment_ids_q
        if ids_q is None:  # then every query has id 0
            ids_q = spec.segment_ids_k.new_zeros(1, 1).expand(-1, sizes.len_q)
        ids = ids_q.expand(sizes.batch_q, -1), spec.segment_ids_k.expand(sizes.batch_k, -1)
    return tile_schedule(side, sequences, ids, tile, split, counts, padding)


def _live_keys(spec: AttentionSpec, sizes: Sizes) -> LiveKeys:
    """What segment ids say where every query has id 0."""
    assert spec.segment_ids_k is not None
    return live_keys(spec.segment_ids_k.eq(0).expand(sizes.batch_k, -1))


def _block_table(layout: BlockLayout, side: str) -> torch.Tensor:
    return remember(layout, "table", (side,), lambda: block_table(*layout.lists(side)))


def _block_masks(layout: BlockLayout) -> torch.Tensor | None:
    if isinstance(layout, TracedLayout):
        return layout.packed_masks
    if layout.tile_masks is None:
        return None
    return remember(layout, "masks", (), lambda: pack_block_masks(layout.tile_masks))


# The memo


#: Of each kind, so many results are remembered for a mask: calls of as many different sizes or options.
MAX_REMEMBERED = 8


class _Memo:
    """What was derived from one mask: by kind, keys and results, the newest last."""

    def __init__(self, owner: AttentionSpec | BlockLayout):
        #: The tensors of a spec that count changes in place. Layouts are immutable.
        self.tensors = () if isinstance(owner, BlockLayout) else _tensors_that_count(owner)
        self.entries: defaultdict[str, list[tuple[tuple, object]]] = defaultdict(list)


#: The memos of masks and layouts that are alive, by their ids.
_MEMOS: dict[int, _Memo] = {}


def remember(owner: AttentionSpec | BlockLayout, kind: str, key: tuple, make: Callable[[], _T]) -> _T:
    """`make()`, or what it gave for this mask or layout, `key`, and contents of the mask's tensors.

    Changing a tensor of a spec in place is seen, but for tensors made in inference mode, which do not count changes.
    Keys are compared, not hashed: sizes may be symbols under torch.compile, and a hash would fix them.
    """
    if torch.compiler.is_compiling():  # Dynamo traces no memo by id; a graph carries it in the mask
        entries = owner.__dict__.setdefault("_traced", {}).setdefault(kind, [])
    elif not may_keep():
        return make()
    else:
        memo = _MEMOS.get(id(owner)) or _new_memo(owner)
        entries = memo.entries[kind]
        # Tensors made in inference mode are of no use to the backward pass, nor fake ones outside of their mode.
        mode = _get_current_dispatch_mode() if torch._C._len_torch_dispatch_stack() else None
        versions = [x._version for x in memo.tensors] if memo.tensors else None
        key = (key, torch.is_inference_mode_enabled(), mode, versions)
    if entries and entries[-1][0] == key:
        return entries[-1][1]
    for known, value in entries:
        if known == key:
            return value
    value = make()
    if len(entries) == MAX_REMEMBERED:
        del entries[0]
    entries.append((key, value))
    return value


def _new_memo(owner: AttentionSpec | BlockLayout) -> _Memo:
    memo = _MEMOS[id(owner)] = _Memo(owner)
    weakref.finalize(owner, _MEMOS.pop, id(owner), None).atexit = False
    return memo


def _tensors_that_count(spec: AttentionSpec) -> tuple[torch.Tensor, ...]:
    return tuple(x for x in vars(spec).values() if isinstance(x, torch.Tensor) and not x.is_inference())
