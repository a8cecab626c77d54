"""Which attention scores exist, as data.

An `AttentionSpec` says which keys each query may see: causality, a window, ragged lengths, packed documents,
segment ids or an arbitrary mask. It is made once per forward pass and shared by all layers. What the kernels
need from it, one row of bounds per tile, is derived on the tensors' own device without reading a value back,
and kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_flashbsa.layout import BlockLayout
from hf_flashbsa.segments import segment_tiles

#: Rows per entry of a work table. Kernel tiles divide it, so one table serves every tile size.
TILE = 128


class Shape(NamedTuple):
    """The sizes that a spec is resolved against."""

    batch_q: int
    batch_k: int
    len_q: int
    len_k: int


class Sequences(NamedTuple):
    """`n` independent attention problems. Each field is an int32 tensor `(n,)`; rows are absolute.

    Query rows `[q_begin, q_end)` of batch row `q_row` see keys `[k_begin, k_end)` of batch row `k_row`; query
    row `i` stands at key `i + diagonal`.
    """

    q_row: torch.Tensor
    q_begin: torch.Tensor
    q_end: torch.Tensor
    k_row: torch.Tensor
    k_begin: torch.Tensor
    k_end: torch.Tensor
    diagonal: torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec:
    """The mask of an attention call, in the most structured form known. All conditions apply together.

    Args:
        causal: query `i` sees keys up to its own position. Queries are aligned with the *last* keys (bottom
            right) of their sequence unless `query_offset` says otherwise.
        window_size: `(left, right)`, the most keys visible before and after a query's own position, both
            inclusive; `None` is unlimited. `causal` is a right window of 0.
        query_offset: key position of the first query, an int or an integer tensor with one element. Default:
            number of keys minus number of queries, for each sequence.
        seqlens_q, seqlens_k: `(B,)` integers, live rows of each batch row, counted from the start. Dead query
            rows give zeros; dead keys are seen by nobody.
        starts_q, starts_k: `(B,)` integers, the first live row of each batch row, for padding on the left. Layouts and
            biases count from it; dead rows as above.
        cu_seqlens_q, cu_seqlens_k: `(n + 1,)` integers, cumulative lengths of `n` sequences packed in one batch
            row. Queries and keys are packed independently; a side that is not packed has `n` batch rows.
        segment_ids_q, segment_ids_k: `(B or 1, Sq)` and `(B or 1, Sk)` integers; a query sees the keys of equal id.
            Negative ids see nothing and are seen by nobody. Without `segment_ids_q` every query has id 0.
        mask: bool `(B or 1, H or 1, Sq or 1, Sk)`, True where a key is visible. Slower than the forms above,
            except for `(B, 1, 1, Sk)`, which is read as padding of the keys.
        layout: the blocks of scores that are visited at all; all where there is none. Rows and columns count from
            the first query and key of each packed sequence, or of each batch row (`starts_*`).
    """

    causal: bool = False
    window_size: tuple[int | None, int | None] = (None, None)
    query_offset: int | torch.Tensor | None = None
    seqlens_q: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None
    starts_q: torch.Tensor | None = None
    starts_k: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    segment_ids_q: torch.Tensor | None = None
    segment_ids_k: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    layout: BlockLayout | None = None
    _cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        window = self.window_size
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise ValueError(f"window_size: {window!r}; give (left, right), None for unlimited.")
        for side, value in zip(("left", "right"), window, strict=True):
            if value is not None and (isinstance(value, (float, torch.Tensor)) or value < 0):
                raise ValueError(f"window_size: {side} is {value}; give an integer >= 0, or None for unlimited.")
        if isinstance(self.query_offset, float):
            raise ValueError(f"query_offset: {self.query_offset}; give an integer, or a tensor with one.")
        if self.layout is not None and not isinstance(self.layout, BlockLayout):
            raise ValueError(f"layout: {type(self.layout).__name__}; give a BlockLayout; its from_mask makes one.")
        for side in "qk":
            if self._get("seqlens", side) is not None and self._get("cu_seqlens", side) is not None:
                raise ValueError(f"seqlens_{side} and cu_seqlens_{side} exclude each other; give one of them.")
            if self._get("starts", side) is not None and self._get("cu_seqlens", side) is not None:
                raise ValueError(
                    f"starts_{side} and cu_seqlens_{side} exclude each other; packed rows are not padded."
                )
            if (cu := self._get("cu_seqlens", side)) is not None and (cu.ndim != 1 or cu.shape[0] < 1):
                raise ValueError(f"cu_seqlens_{side}: shape is {tuple(cu.shape)}; give (sequences + 1,).")
            if (ids := self._get("segment_ids", side)) is not None and ids.ndim != 2:
                raise ValueError(f"segment_ids_{side}: shape is {tuple(ids.shape)}; give (B or 1, length).")
        ragged = any(self._get(name, side) is not None for name in ("seqlens", "cu_seqlens") for side in "qk")
        if self.segment_ids_q is not None and self.segment_ids_k is None:
            raise ValueError("segment_ids_q needs segment_ids_k; give both.")
        if ragged and self.segment_ids_k is not None:
            raise ValueError(
                "segment_ids_* and seqlens_*/cu_seqlens_* exclude each other; express all in one of them."
            )
        if ragged and self.mask is not None:
            raise ValueError("mask and seqlens_*/cu_seqlens_* exclude each other; express all in the mask.")
        if self.mask is not None:
            if self.mask.dtype != torch.bool:
                raise ValueError(f"mask: dtype is {self.mask.dtype}; give a bool mask, or additive values as `bias`.")
            if self.mask.ndim != 4:
                raise ValueError(f"mask: shape is {tuple(self.mask.shape)}; give (B or 1, H or 1, Sq or 1, Sk).")
            if self.segment_ids_k is None and self.mask.shape[1] == 1 and self.mask.shape[2] == 1:
                object.__setattr__(self, "segment_ids_k", self.mask[:, 0, 0].to(torch.int32) - 1)
                object.__setattr__(self, "mask", None)

    def _get(self, name: str, side: str) -> torch.Tensor | None:
        return getattr(self, f"{name}_{side}")

    @property
    def window(self) -> tuple[int | None, int | None]:
        """`window_size` with causality folded in."""
        left, right = self.window_size
        return (left, 0) if self.causal else (left, right)

    @property
    def differs_by_row(self) -> bool:
        """Whether batch rows have lengths or an offset of their own, which only a work table can say."""
        return (
            isinstance(self.query_offset, torch.Tensor)
            or self.seqlens_q is not None
            or self.seqlens_k is not None
            or self.starts_q is not None
            or self.starts_k is not None
            or self.cu_seqlens_q is not None
            or self.cu_seqlens_k is not None
        )

    @property
    def is_ragged(self) -> bool:
        """Whether tiles differ in what they see beyond causality and window, so that a work table is needed."""
        return self.segment_ids_k is not None or self.differs_by_row or self.layout is not None

    def diagonal(self, shape: Shape) -> int:
        """Key position of query row 0 when every sequence fills its batch row (0 where a work table says it)."""
        if self.query_offset is None:
            return shape.len_k - shape.len_q
        return 0 if isinstance(self.query_offset, torch.Tensor) else self.query_offset

    def validate(self, shape: Shape, heads: int, device: torch.device) -> None:
        """Raises ValueError where the spec does not fit tensors of these sizes. Reads no tensor's values."""
        n = self._count(shape)
        for side, batch, length in (("q", shape.batch_q, shape.len_q), ("k", shape.batch_k, shape.len_k)):
            if (cu := self._get("cu_seqlens", side)) is not None:
                if batch != 1:
                    raise ValueError(f"cu_seqlens_{side}: packed rows need batch size 1, got {batch}.")
                self._expect(f"cu_seqlens_{side}", cu, (n + 1,), device)
            elif batch != n:
                raise ValueError(
                    f"{side} has {batch} batch rows for {n} sequences; "
                    f"give cu_seqlens_{side}, or one batch row for each sequence."
                )
            for name in ("seqlens", "starts"):
                if (rows := self._get(name, side)) is not None:
                    self._expect(f"{name}_{side}", rows, (n,), device)
            if (ids := self._get("segment_ids", side)) is not None:
                name = f"segment_ids_{side}" if self.segment_ids_q is not None else "mask or segment_ids_k"
                self._expect(name, ids, (batch if ids.shape[0] != 1 else 1, length), device)
        if isinstance(self.query_offset, torch.Tensor):
            if self.query_offset.numel() != 1:
                raise ValueError(
                    f"query_offset: {tuple(self.query_offset.shape)} elements; give an int or one element."
                )
            self._expect("query_offset", self.query_offset, tuple(self.query_offset.shape), device)
        if self.layout is not None:
            packed = [side for side in "qk" if self._get("cu_seqlens", side) is not None]
            length_q, length_k = (0 if s in packed else n for s, n in (("q", shape.len_q), ("k", shape.len_k)))
            self.layout.validate(heads, 1 if packed else shape.batch_q, length_q, length_k, device)
        if self.mask is not None:
            full = (shape.batch_q, heads, shape.len_q, shape.len_k)
            if (
                any(m not in (1, s) for m, s in zip(self.mask.shape[:3], full, strict=False))
                or self.mask.shape[3] != full[3]
            ):
                raise ValueError(f"mask: shape {tuple(self.mask.shape)} does not broadcast to {full}.")
            if self.mask.device != device:
                raise ValueError(f"mask is on {self.mask.device}, q on {device}; move it there.")

    @staticmethod
    def _expect(name: str, tensor: torch.Tensor, shape: tuple[int, ...], device: torch.device) -> None:
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape is {tuple(tensor.shape)}, expected {shape}.")
        if tensor.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name}: dtype is {tensor.dtype}; give int32 or int64.")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q on {device}; move it there.")

    def _count(self, shape: Shape) -> int:
        for side in "qk":
            if (cu := self._get("cu_seqlens", side)) is not None:
                return cu.shape[0] - 1
        return shape.batch_q

    def sequences(self, shape: Shape, device: torch.device) -> Sequences:
        """The independent problems of this spec. Segment ids are not resolved here."""
        n = self._count(shape)

        def side(name: str, length: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            index = torch.arange(n, device=device, dtype=torch.int32)
            zero = torch.zeros_like(index)
            if (cu := self._get("cu_seqlens", name)) is not None:
                # Wrong lengths, which nobody can see without waiting for the device, must not lead out of the tensors.
                cu = cu.to(torch.int32).clamp(0, length)
                return zero, cu[:-1], cu[1:]
            lengths, starts = self._get("seqlens", name), self._get("starts", name)
            end = zero + length if lengths is None else lengths.to(torch.int32).clamp(0, length)
            return index, zero if starts is None else torch.minimum(starts.to(torch.int32).clamp(min=0), end), end

        q_row, q_begin, q_end = side("q", shape.len_q)
        k_row, k_begin, k_end = side("k", shape.len_k)
        diagonal = k_end - q_end if self.query_offset is None else k_begin - q_begin + self.query_offset
        return Sequences(q_row, q_begin, q_end, k_row, k_begin, k_end, diagonal.to(torch.int32))

    def kept(self, name: str, arguments: tuple, make: Callable[[], object]):
        """`make()`, kept for the next call with equal arguments.

        Arguments are compared, not hashed: sizes may be symbolic under `torch.compile`, and a hash would fix them.
        """
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return make()  # tensors that a transform wraps must not outlive it
        known = self._cache.get(name)
        if known is None or known[0] != arguments:
            known = self._cache[name] = (arguments, make())
        return known[1]

    def segment_ids(self, shape: Shape) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Segment ids with a batch row for every sequence."""
        ids_q, ids_k = self.segment_ids_q, self.segment_ids_k
        return (
            None if ids_q is None else ids_q.expand(shape.batch_q, -1),
            None if ids_k is None else ids_k.expand(shape.batch_k, -1),
        )

    def sequence_table(self, shape: Shape, device: torch.device) -> torch.Tensor | None:
        """`sequences` as one int32 tensor `(n, 7)`, or None where every sequence fills its batch row."""
        if not self.differs_by_row:
            return None
        return self.kept(
            "sequences", (shape, device), lambda: torch.stack(self.sequences(shape, device), dim=1).contiguous()
        )

    def work(
        self, side: str, shape: Shape, device: torch.device, tile: int = TILE, divided: bool = True
    ) -> torch.Tensor | None:
        """The work table of one side, or None where plain arithmetic says the same.

        Args:
            side: "q" for tiles of queries that walk over keys, "k" for tiles of keys that walk over queries.
            shape: sizes of the tensors.
            tile: rows per entry. One entry never spans two sequences.
            divided: whether entries may begin where segment ids change; otherwise they do so at multiples of `tile`,
                counted from the first row of a sequence.

        Returns:
            int32 `(tiles, 12)`: `own_row, own_begin, own_end, other_row, lo, full_lo, full_hi, hi, diagonal,
            query_origin, key_origin, used`. The origins are the first rows of the sequence. Own rows
            `[own_begin, own_end)` meet rows `[lo, hi)` of the other side, of which `[full_lo, full_hi)` are all
            visible as far as lengths and segments go; causality, window and mask are not resolved. The first
            `used` entries are used, a number that stands in all of them; others have `own_begin == own_end`. Every
            own row is in exactly one entry; where it meets nothing, `lo == hi`, unless its rows have several segment
            ids. Entries with the most work come first.
        """
        if not self.is_ragged:
            return None
        if side == "k" and self._is_symmetric(shape):
            side = "q"
        # Block layouts count their blocks from the first row of a sequence too.
        divided = divided and self.segment_ids_k is not None and self.layout is None
        name = f"{side}, divided" if divided else side
        return self.kept(name, (shape, device, tile), lambda: self._build_work(side, shape, device, tile, divided))

    def _is_symmetric(self, shape: Shape) -> bool:
        """Whether queries and keys divide into the same tiles, which meet the same."""
        alike = all(self._get(name, "q") is self._get(name, "k") for name in ("seqlens", "starts", "cu_seqlens"))
        segments = self.segment_ids_k is None or self.segment_ids_q is self.segment_ids_k
        same_sizes = shape.batch_q == shape.batch_k and shape.len_q == shape.len_k
        return alike and segments and same_sizes and self.layout is None

    def _build_work(self, side: str, shape: Shape, device: torch.device, tile: int, divided: bool) -> torch.Tensor:
        sequences = self.sequences(shape, device)
        if side == "q":
            self._assert_covered(sequences)
        if self.segment_ids_k is None:
            used, columns = self._tiles_of_lengths(side, shape, sequences, tile)
        else:
            used, columns = self._tiles_of_segments(side, shape, sequences, tile, divided)
        table = torch.stack([c.to(torch.int32) for c in columns], dim=1) * used[:, None]
        amount = table[:, 7] - table[:, 4]
        if self.layout is not None:
            listed = self.layout.lists(side).total.float().mean((0, 1)) * self.layout.block_size
            place = (table[:, 1] - table[:, 9 if side == "q" else 10]) // self.layout.block_size
            amount = torch.minimum(amount, listed[place.clamp(max=listed.shape[0] - 1)])
        order = torch.argsort(amount.masked_fill(~used, -1), descending=True, stable=True)
        count = used.sum(dtype=torch.int32).expand(table.shape[0], 1)
        return torch.cat([table[order], count], dim=1)

    def _tiles_of_lengths(
        self, side: str, shape: Shape, s: Sequences, tile: int
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Entries of a work table that are used, and the columns but for the last, in order of the sequences."""
        if side == "q":
            row, begin, end, other_row, lo, hi = s.q_row, s.q_begin, s.q_end, s.k_row, s.k_begin, s.k_end
            length, packed = shape.len_q, self.cu_seqlens_q is not None
        else:
            row, begin, end, other_row, lo, hi = s.k_row, s.k_begin, s.k_end, s.q_row, s.q_begin, s.q_end
            length, packed = shape.len_k, self.cu_seqlens_k is not None
        diagonal, origin_q, origin_k = s.diagonal, s.q_begin, s.k_begin
        count = length // tile + row.shape[0] if packed else row.shape[0] * -(-length // tile)
        # Dead rows still need their zeros: they are sequences that meet nothing.
        dead = []
        if self._get("starts", side) is not None:
            dead.append((row, torch.zeros_like(begin), begin))
        if packed or self._get("seqlens", side) is not None:
            rest_row, rest_begin = (row[:1], end[-1:]) if packed else (row, end)
            dead.append((rest_row, rest_begin, torch.full_like(rest_begin, length)))
        for dead_row, dead_begin, dead_end in dead:
            count += dead_row.shape[0]
            row, begin, end = (
                torch.cat(pair) for pair in zip((row, begin, end), (dead_row, dead_begin, dead_end), strict=True)
            )
            other_row, diagonal, origin_q, origin_k, lo, hi = (
                torch.cat([x, torch.zeros_like(dead_row)]) for x in (other_row, diagonal, origin_q, origin_k, lo, hi)
            )
        # Entry e belongs to the sequence whose cumulative number of tiles first exceeds e.
        tiles = (end - begin + tile - 1) // tile
        cumulative = torch.cumsum(tiles, 0)
        entry = torch.arange(count, device=row.device)
        index = torch.searchsorted(cumulative, entry, right=True)
        used = index < cumulative.shape[0]
        index = index.clamp(max=cumulative.shape[0] - 1)
        own_begin = begin[index] + (entry - (cumulative - tiles)[index]) * tile
        own_end = torch.minimum(own_begin + tile, end[index])
        row, other_row, lo, hi = row[index], other_row[index], lo[index], hi[index]
        of_sequence = [x[index] for x in (diagonal, origin_q, origin_k)]
        return used, [row, own_begin, own_end, other_row, lo, lo, hi, hi, *of_sequence]

    def _tiles_of_segments(
        self, side: str, shape: Shape, s: Sequences, tile: int, divided: bool
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The same where segment ids say what meets. Every sequence has a batch row here."""
        ids_q, ids_k = self.segment_ids(shape)
        if ids_q is None:
            ids_q = ids_k.new_zeros(1, 1).expand(shape.batch_q, shape.len_q)
        if side == "q":
            own, other, begin, lo, hi = ids_q, ids_k, s.q_begin, s.k_begin, s.k_end
        else:
            own, other, begin, lo, hi = ids_k, ids_q, s.k_begin, s.q_begin, s.q_end
        t = segment_tiles(own, other, begin, tile, divided)
        used = torch.arange(t.row.shape[0], device=own.device) < t.used
        row = t.row
        # What meets nothing stays empty; rows before the sequence meet nothing.
        hi = torch.where(t.begin < begin[row], 0, torch.minimum(hi[row], t.hi))
        lo = torch.minimum(torch.maximum(lo[row], t.lo), hi)
        full_lo, full_hi = torch.minimum(torch.maximum(lo, t.full_lo), hi), torch.minimum(hi, t.full_hi)
        of_sequence = [x[row] for x in (s.diagonal, s.q_begin, s.k_begin)]
        return used, [row, t.begin, t.end, row, lo, full_lo, full_hi, hi, *of_sequence]

    def _assert_covered(self, s: Sequences) -> None:
        """Stops the device where a packed sequence is longer than the layout; `validate` sees lengths of rows only."""
        if self.layout is None:
            return
        blocks = self.layout.grid.shape[2:]
        for side, begin, end, count in (("q", s.q_begin, s.q_end, blocks[0]), ("k", s.k_begin, s.k_end, blocks[1])):
            if self._get("cu_seqlens", side) is not None:
                most = count * self.layout.block_size
                message = f"layout: covers {most} rows of {side}; make it for the longest sequence."
                torch._assert_async((end - begin <= most).all(), message)
