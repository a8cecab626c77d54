"""AttentionSpec: its work tables against brute force, without a host synchronisation, and its immutability."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_flashbsa import AttentionSpec, BlockLayout
from hf_flashbsa.kernels.tables import SCHEDULE_TILE
from hf_flashbsa.kernels.tile_schedule import Sizes
from hf_flashbsa.ops.lowering import schedule_of, sequence_table_of
from hf_flashbsa.ops.validation import check_spec

CPU = torch.device("cpu")
COLUMNS = "own_row own_begin own_end other_row lo full_lo full_hi hi diagonal query_origin key_origin used".split()


def _lengths(r: random.Random, n: int, high: int) -> list[int]:
    return [r.choice((0, 1, high, r.randint(0, high))) for _ in range(n)]


def random_spec(seed: int) -> tuple[AttentionSpec, Sizes]:
    """A ragged spec, and sizes it fits."""
    r = random.Random(seed)
    g = torch.Generator().manual_seed(seed)
    n = r.choice((1, 2, 5))
    len_q, len_k = r.choice((1, 7, 64, 70)), r.choice((1, 9, 64, 70))
    batch_q = batch_k = n
    options: dict = {"causal": r.random() < 0.3, "window_size": r.choice([(None, None), (5, 2)])}
    kind = r.choice(("seqlens", "packed", "segments", "padding", "offset", "left"))
    if kind == "seqlens":
        options["seqlens_k"] = torch.tensor(_lengths(r, n, len_k))
        if r.random() < 0.5:
            options["seqlens_q"] = torch.tensor(_lengths(r, n, len_q), dtype=torch.int32)
    elif kind == "packed":
        lengths_q, lengths_k = _lengths(r, n, len_q), _lengths(r, n, len_k)
        if r.random() < 0.7:
            options["cu_seqlens_q"] = torch.tensor([0, *lengths_q]).cumsum(0)
            batch_q, len_q = 1, sum(lengths_q) + r.choice((0, 40))
        if r.random() < 0.7 or "cu_seqlens_q" not in options:
            options["cu_seqlens_k"] = torch.tensor([0, *lengths_k]).cumsum(0).int()
            batch_k, len_k = 1, sum(lengths_k) + r.choice((0, 40))
    elif kind == "segments":
        for side, length in (("q", len_q), ("k", len_k)):
            chance = r.choice((3 / length, 3 / length, 0.7))
            ids = (torch.rand(r.choice((1, n)), length, generator=g) < chance).cumsum(1) - r.choice((0, 1))
            options[f"segment_ids_{side}"] = ids.flip(1) if r.random() < 0.2 else ids
    elif kind == "padding":
        options["mask"] = torch.rand(n, 1, 1, len_k, generator=g) < r.choice((0.0, 0.5, 0.97))
    elif kind == "left":
        options["starts_k"] = torch.tensor(_lengths(r, n, len_k))
        if r.random() < 0.5:
            options["starts_q"] = torch.tensor(_lengths(r, n, len_q), dtype=torch.int32)
        if r.random() < 0.5:
            options["mask"] = torch.rand(n, 1, 1, len_k, generator=g) < r.choice((0.0, 0.5, 0.97))
        elif r.random() < 0.5:
            options["seqlens_q"] = torch.tensor(_lengths(r, n, len_q))
    else:
        options["query_offset"] = torch.tensor([r.randint(-9, 9)])
    return AttentionSpec(**options), Sizes(batch_q, batch_k, len_q, len_k)


def sequences(spec: AttentionSpec, shape: Sizes) -> list[tuple[int, int, int, int, int, int]]:
    """`(q_row, q_begin, q_end, k_row, k_begin, k_end)` of each sequence."""

    def side(cu, lengths, starts, batch: int, length: int) -> list[tuple[int, int, int]]:
        if cu is not None:
            return [(0, a, b) for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)]
        ends = [length] * batch if lengths is None else lengths.tolist()
        begins = [0] * batch if starts is None else starts.tolist()
        return [(row, min(begin, end), end) for row, (begin, end) in enumerate(zip(begins, ends, strict=True))]

    queries = side(spec.cu_seqlens_q, spec.seqlens_q, spec.starts_q, shape.batch_q, shape.len_q)
    keys = side(spec.cu_seqlens_k, spec.seqlens_k, spec.starts_k, shape.batch_k, shape.len_k)
    return [(*a, *b) for a, b in zip(queries, keys, strict=True)]


def ids_of(spec: AttentionSpec, shape: Sizes, side: str) -> torch.Tensor:
    """Segment ids of each row of a side."""
    batch, length = (shape.batch_q, shape.len_q) if side == "q" else (shape.batch_k, shape.len_k)
    ids = spec.segment_ids_q if side == "q" else spec.segment_ids_k
    return torch.zeros(batch, length) if ids is None else ids.expand(batch, -1)


def meetings(spec: AttentionSpec, shape: Sizes, side: str) -> torch.Tensor:
    """bool `(own rows, other rows)`, both flattened over the batch: who meets whom by lengths and segments."""
    met = torch.zeros(shape.batch_q, shape.len_q, shape.batch_k, shape.len_k, dtype=torch.bool)
    for q_row, q0, q1, k_row, k0, k1 in sequences(spec, shape):
        met[q_row, q0:q1, k_row, k0:k1] = True
    if spec.segment_ids_k is not None:
        ids_q, ids_k = ids_of(spec, shape, "q"), ids_of(spec, shape, "k")
        met &= (ids_q[:, :, None, None] == ids_k) & (ids_k >= 0)
    return met if side == "q" else met.permute(2, 3, 0, 1)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("seed", range(60))
def test_work_table(seed, side):
    spec, shape = random_spec(seed)
    tile = 16
    table = schedule_of(spec, side, shape, CPU, tile)
    assert table.dtype == torch.int32 and table.shape[1] == len(COLUMNS)
    met = meetings(spec, shape, side)
    visits = torch.zeros(met.shape[:2], dtype=torch.int64)
    for values in table.tolist():
        e = dict(zip(COLUMNS, values, strict=True))
        own = slice(e["own_begin"], e["own_end"])
        visits[e["own_row"], own] += 1
        assert 0 <= e["own_end"] - e["own_begin"] <= tile
        if e["own_begin"] == e["own_end"]:
            continue
        mine = met[e["own_row"], own]
        where = mine[:, e["other_row"]].any(0).nonzero().flatten()
        elsewhere = mine.clone()
        elsewhere[:, e["other_row"], e["lo"] : e["hi"]] = False
        assert not elsewhere.any(), "rows that meet lie outside [lo, hi)"
        if spec.segment_ids_k is None:
            assert where.tolist() == list(range(e["lo"], e["hi"])), "lengths leave no hole"
        elif ids_of(spec, shape, side)[e["own_row"], own].unique().numel() == 1:
            assert (len(where) == 0) == (e["lo"] == e["hi"])
            assert len(where) == 0 or int(where[-1]) + 1 == e["hi"]
        assert e["lo"] <= e["full_lo"] <= e["hi"] and e["full_hi"] <= e["hi"]
        assert mine[:, e["other_row"], e["full_lo"] : e["full_hi"]].all(), "[full_lo, full_hi) is not full"
    assert (visits == 1).all(), "a row without an entry, or with several"
    used = int((table[:, 1] < table[:, 2]).sum())
    assert (table[:, COLUMNS.index("used")] == used).all() and (table[:used, 1] < table[:used, 2]).all()
    width = table[:, COLUMNS.index("hi")] - table[:, COLUMNS.index("lo")]
    assert (width[:-1] >= width[1:]).all(), "most work comes first"


@pytest.mark.parametrize("seed", range(60))
def test_work_table_places_diagonal_and_origin(seed):
    """They count from each sequence's own first rows."""
    spec, shape = random_spec(seed)
    at = {}
    for q_row, q0, q1, k_row, k0, k1 in sequences(spec, shape):
        offset = (k1 - k0) - (q1 - q0) if spec.query_offset is None else int(spec.query_offset)
        at |= {("q", q_row, i): (k_row, k0 - q0 + offset, k0) for i in range(q0, q1)}
        at |= {("k", k_row, i): (q_row, k0 - q0 + offset, k0) for i in range(k0, k1)}
    for side in "qk":
        for values in schedule_of(spec, side, shape, CPU, 16).tolist():
            e = dict(zip(COLUMNS, values, strict=True))
            for row in range(e["own_begin"], e["own_end"]):
                if e["lo"] < e["hi"]:
                    assert at[side, e["own_row"], row] == (e["other_row"], e["diagonal"], e["key_origin"])


def _bounds(ids: torch.Tensor, **options) -> dict[int, tuple[int, ...]]:
    """`begin -> (end, lo, full_lo, full_hi, hi)` of one row of ids in tiles of 16."""
    shape = Sizes(1, 1, ids.shape[1], ids.shape[1])
    table = schedule_of(AttentionSpec(segment_ids_q=ids, segment_ids_k=ids, **options), "q", shape, CPU, 16)
    return {row[1]: (row[2], *row[4:8]) for row in table[: int(table[0, -1])].tolist()}


def test_tiles_end_where_documents_do():
    """So that each meets its own document, and its bounds say all."""
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor([16, 48, 5, 27]))[None]
    documents = {0: (16, 0, 16), 16: (32, 16, 64), 32: (48, 16, 64), 48: (64, 16, 64), 64: (69, 64, 69)}
    documents |= {69: (85, 69, 96), 85: (96, 69, 96)}
    assert _bounds(ids) == {begin: (end, lo, lo, hi, hi) for begin, (end, lo, hi) in documents.items()}


def test_more_documents_than_there_is_room_for():
    """Tiles have rows of many then, and of what they meet a hull is known."""
    bounds = _bounds(torch.arange(384)[None])
    assert [(begin, values[0]) for begin, values in sorted(bounds.items())] == [(i, i + 16) for i in range(0, 384, 16)]
    for begin, (_, lo, full_lo, full_hi, hi) in bounds.items():
        assert (lo, hi) == (begin // 128 * 128, begin // 128 * 128 + 128) and full_lo == full_hi


def test_tiles_of_a_block_layout_are_those_of_its_blocks():
    layout = BlockLayout(torch.ones(1, 1, 3, 3, dtype=torch.int32), 32)
    bounds = _bounds(torch.repeat_interleave(torch.arange(2), torch.tensor([24, 72]))[None], layout=layout)
    assert sorted(bounds) == list(range(0, 96, 16))


def test_no_table_where_arithmetic_says_the_same():
    dense = torch.ones(1, 2, 4, 4, dtype=torch.bool)
    for options in ({}, {"causal": True}, {"window_size": (3, 4)}, {"query_offset": 2}, {"mask": dense}):
        spec = AttentionSpec(**options)
        assert schedule_of(spec, "q", Sizes(1, 1, 4, 4), CPU) is None


@pytest.mark.parametrize("name", ["cu_seqlens", "seqlens", "starts", "segment_ids"])
def test_queries_and_keys_of_the_same_rows_share_a_table(name):
    values = torch.zeros(1, 6, dtype=torch.int32) if name == "segment_ids" else torch.tensor([0, 6])
    sides = {f"{name}_q": values, f"{name}_k": values}
    batch = 1 if values.ndim == 2 or name == "cu_seqlens" else 2
    shape = Sizes(batch, batch, 6, 6)
    spec = AttentionSpec(**sides, causal=True)
    assert schedule_of(spec, "k", shape, CPU) is schedule_of(spec, "q", shape, CPU)
    apart = AttentionSpec(**sides | {f"{name}_k": values.clone()})
    assert schedule_of(apart, "k", shape, CPU) is not schedule_of(apart, "q", shape, CPU)


def test_tables_are_made_once_for_a_size():
    spec, shape = AttentionSpec(seqlens_k=torch.tensor([3, 4])), Sizes(2, 2, 5, 6)
    assert schedule_of(spec, "q", shape, CPU) is schedule_of(spec, "q", shape, CPU)
    assert schedule_of(spec, "q", shape, CPU).shape[0] == 2
    assert schedule_of(spec, "q", shape._replace(len_q=2 * SCHEDULE_TILE), CPU).shape[0] == 4


@pytest.mark.parametrize("seed", range(40))
def test_reads_no_value_back(seed):
    """A fake tensor has no values: whoever asks for one (a host synchronisation on a GPU) gets an error."""
    spec, shape = random_spec(seed)
    options = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    entries = {side: schedule_of(spec, side, shape, CPU).shape for side in "qk"}
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        fake = AttentionSpec(**fake)
        check_spec(fake, shape, 1, CPU)
        assert {side: schedule_of(fake, side, shape, CPU).shape for side in "qk"} == entries
        fake_table = sequence_table_of(fake, shape, CPU)
    table = sequence_table_of(spec, shape, CPU)
    assert (table is None) == (fake_table is None)
    assert table is None or fake_table.shape == table.shape


def test_fields_cannot_be_changed():
    spec = AttentionSpec(causal=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.causal = False
    assert spec == spec and spec != AttentionSpec(causal=True), "specs hold tensors, so that identity compares them"


def test_padding_masks_become_key_segments():
    mask = torch.tensor([[True, False, True]])[:, None, None]
    spec = AttentionSpec(mask=mask)
    assert spec.mask is None and spec.segment_ids_k.tolist() == [[0, -1, 0]]


def test_sequence_table_says_what_lengths_say():
    spec = AttentionSpec(causal=True, seqlens_q=torch.tensor([2, 3]), seqlens_k=torch.tensor([4, 2]))
    table = sequence_table_of(spec, Sizes(2, 2, 3, 4), CPU)
    assert table.tolist() == [[0, 0, 2, 0, 0, 4, 2], [1, 0, 3, 1, 0, 2, -1]]
    assert sequence_table_of(AttentionSpec(causal=True), Sizes(2, 2, 3, 4), CPU) is None
