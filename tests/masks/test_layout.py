"""`BlockLayout`: its lists, its round trips and its errors."""

from __future__ import annotations

import json
import random
import time

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from hf_flashbsa.kernels.block_tables import pack_block_masks
from hf_flashbsa.masks.block_layout import BlockLayout, BlockLists
from hf_flashbsa.ops.validation import check_layout

CPU = torch.device("cpu")


def random_mask(seed: int, size: int = 32) -> torch.Tensor:
    """bool `(B, H, Sq, Sk)` of empty, full and a few kinds of partial blocks, with ragged ends."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, rows, columns = r.choice((1, 2)), r.choice((1, 3)), r.randint(1, 5), r.randint(1, 5)
    kinds = torch.rand(5, size, size, generator=g) < 0.5
    kinds[0], kinds[1] = False, True
    choice = torch.randint(0, 5, (batch, heads, rows, columns), generator=g)
    mask = kinds[choice].transpose(3, 4).reshape(batch, heads, rows * size, columns * size)
    return mask[:, :, : mask.shape[2] - r.randrange(size), : mask.shape[3] - r.randrange(size)]


def brute_force_lists(layout: BlockLayout, side: str) -> dict[tuple, tuple[list[int], list[int]]]:
    """`{(batch, head, row): (full blocks, partial blocks)}`."""
    lists = {}
    for b, grids in enumerate(layout.grid.tolist()):
        for h, grid in enumerate(grids):
            lines = grid if side == "q" else [list(column) for column in zip(*grid, strict=True)]
            for r, line in enumerate(lines):
                full = [c for c, kind in enumerate(line) if kind == 1]
                lists[b, h, r] = full, [c for c, kind in enumerate(line) if kind > 1]
    return lists


@pytest.mark.parametrize("seed", range(20))
def test_mask_round_trip(seed):
    mask = random_mask(seed)
    layout = BlockLayout.from_mask(mask, 32)
    assert torch.equal(layout.to_mask(*mask.shape[2:]), mask)
    masks = [] if layout.tile_masks is None else [tuple(m.flatten().tolist()) for m in layout.tile_masks]
    assert len(set(masks)) == len(masks)
    assert sorted(set(layout.grid.flatten().tolist()) - {0, 1}) == list(range(2, 2 + len(masks)))
    assert BlockLayout.from_mask(mask, 32).equals(layout)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("side", "qk")
def test_lists_hold_the_blocks_of_the_grid(seed, side):
    layout = BlockLayout.from_mask(random_mask(seed), 32)
    lists = layout.lists(side)
    expected = brute_force_lists(layout, side)
    assert lists.index.shape[-1] == max(1, *(len(full) + len(partial) for full, partial in expected.values()))
    for where, (full, partial) in expected.items():
        n_full, n = int(lists.full[where]), int(lists.total[where])
        line = lists.index[where].tolist()
        assert (line[:n_full], line[n_full:n]) == (full, partial)
        assert all(0 <= i < layout.grid.shape[3 if side == "q" else 2] for i in line[n:])
    assert lists.full.shape == lists.index.shape[:3]
    assert all(x.dtype == torch.int32 and x.is_contiguous() for x in lists)
    assert layout.lists(side) is lists


@pytest.mark.parametrize("size", [32, 128])
def test_packed_masks_hold_the_bits_of_tile_masks(size):
    masks = torch.rand(3, size, size, generator=torch.Generator().manual_seed(size)) < 0.5
    words = pack_block_masks(masks)
    assert words.dtype == torch.int32 and words.shape == (3, size, size // 32)
    keys = torch.arange(size)
    assert torch.equal((words[..., keys // 32] >> (keys % 32)) & 1 == 1, masks)


def test_lists_of_both_sides_name_the_same_pairs():
    layout = BlockLayout.from_mask(random_mask(3), 32)
    by_row, by_column = layout.lists("q"), layout.lists("k")

    def pairs(lists: BlockLists) -> set[tuple]:
        count = lists.total.tolist()
        return {
            (b, h, r, c)
            for b in range(len(count))
            for h in range(len(count[b]))
            for r, n in enumerate(count[b][h])
            for c in lists.index[b, h, r, :n].tolist()
        }

    assert pairs(by_row) == {(b, h, r, c) for b, h, c, r in pairs(by_column)}


def test_an_edge_block_is_full_when_all_of_its_real_entries_are_visible():
    layout = BlockLayout.from_mask(torch.ones(40, 70, dtype=torch.bool), 32)
    assert layout.tile_masks is None
    assert layout.grid.tolist() == [[[[1, 1, 1], [1, 1, 1]]]]


@pytest.mark.parametrize("seed", range(5))
def test_json_round_trip(seed):
    layout = BlockLayout.from_mask(random_mask(seed), 32)
    assert BlockLayout.from_json(layout.to_json()).equals(layout)
    assert BlockLayout.from_json(json.dumps(json.loads(layout.to_json()))).equals(layout)


def test_json_is_compact():
    band = torch.ones(512, 512, dtype=torch.bool).tril(4).triu(-4)
    assert len(BlockLayout.from_block_mask(band).to_json()) < 20_000


@pytest.mark.parametrize("seed", range(10))
def test_flex_round_trip(seed):
    mask = random_mask(seed)
    layout = BlockLayout.from_mask(mask, 32)
    flex = layout.to_flex()
    assert BlockLayout.from_flex(flex).equals(layout)
    rows, columns = layout.grid.shape[2:]
    assert flex.seq_lengths == (rows * 32, columns * 32)
    assert torch.equal(flex.to_dense().bool().expand_as(layout.grid), layout.grid != 0)


def test_flex_mask_made_by_torch():
    start = torch.randint(0, 60, (100,), generator=torch.Generator().manual_seed(0))

    def visible(b, h, q, k):
        return (q >= k) & (k >= start[q] - 20 * h)

    flex = create_block_mask(visible, B=None, H=2, Q_LEN=100, KV_LEN=100, device="cpu", BLOCK_SIZE=32)
    q, k = torch.arange(100)[:, None], torch.arange(100)[None]
    expected = torch.stack([(q >= k) & (k >= start[:, None] - 20 * h) for h in range(2)])[None]
    assert torch.equal(BlockLayout.from_flex(flex).to_mask(100, 100), expected)


def test_flex_blocks_must_be_square():
    flex = create_block_mask(lambda b, h, q, k: q >= k, None, None, 128, 128, device="cpu", BLOCK_SIZE=(32, 64))
    with pytest.raises(ValueError, match="32 x 64"):
        BlockLayout.from_flex(flex)


def test_density_says_which_blocks_it_counts():
    layout = BlockLayout.from_block_mask(torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool(), 32)
    assert layout.density() == pytest.approx(5 / 9)
    assert layout.density(causal=True) == pytest.approx(4 / 6)


def test_moving_keeps_the_lists_and_is_done_once():
    layout = BlockLayout.from_mask(random_mask(1), 32)
    assert layout.to("cpu") is layout
    moved = layout.to("meta")
    assert layout.to(torch.device("meta")) is moved
    for side in "qk":
        for ours, theirs in zip(moved.lists(side), layout.lists(side), strict=True):
            assert (ours.device.type, ours.shape, ours.dtype) == ("meta", theirs.shape, theirs.dtype)


def test_picture():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    layout = BlockLayout.from_mask(torch.ones(96, 96, dtype=torch.bool).tril(), 32)
    ax = layout.draw()
    assert ax.images[0].get_array().tolist() == [[2, 0, 0], [1, 2, 0], [1, 1, 2]]
    assert layout.draw(ax=ax) is ax
    matplotlib.pyplot.close("all")


def test_repr_is_one_short_line():
    layout = BlockLayout.from_mask(torch.ones(96, 64, dtype=torch.bool).tril(), 32)
    assert repr(layout) == "BlockLayout(3 x 2 blocks of 32, heads=1, batch=1, tile_masks=1, device=cpu)"


@pytest.mark.parametrize("block_size", [0, 16, 48, 96, 100, 128.0, None])
def test_block_size_that_no_tile_divides(block_size):
    with pytest.raises(ValueError, match="no kernel tile divides"):
        BlockLayout(torch.ones(1, 1, 2, 2, dtype=torch.int32), block_size)
    with pytest.raises(ValueError, match="no kernel tile divides"):
        BlockLayout.from_mask(torch.ones(2, 2, dtype=torch.bool), block_size)


GRID = torch.ones(2, 3, 4, 5, dtype=torch.int32)
MASKS = torch.ones(2, 32, 32, dtype=torch.bool)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"grid": GRID.long()}, "int32"),
        ({"grid": GRID[0]}, "query blocks, key blocks"),
        ({"grid": GRID - 2}, "entries are -1 to -1"),
        ({"grid": GRID * 2}, "entries are 2 to 2; with 0 tile masks give 0 to 1"),
        ({"grid": GRID * 4, "tile_masks": MASKS}, "entries are 4 to 4; with 2 tile masks give 0 to 3"),
        ({"grid": GRID, "tile_masks": MASKS[:, :16]}, r"tile_masks: .* give bool \(U, 32, 32\)"),
        ({"grid": GRID, "tile_masks": MASKS.int()}, "tile_masks: torch.int32"),
        ({"grid": GRID, "tile_masks": MASKS.to("meta")}, "one device"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(block_size=32, **fields)


@pytest.mark.parametrize("make", [BlockLayout.from_mask, BlockLayout.from_block_mask])
@pytest.mark.parametrize("mask", [torch.ones(4, 4), torch.ones(4).bool(), torch.ones(0, 4).bool()])
def test_wrong_masks(make, mask):
    with pytest.raises(ValueError, match="give bool"):
        make(mask, 32)


def test_calls_that_fit():
    layout = BlockLayout(GRID, 32)
    check_layout(layout, heads=3, batch=2, len_q=128, len_k=160, device=CPU)
    check_layout(layout, heads=3, batch=2, len_q=1, len_k=100, device=CPU)
    check_layout(BlockLayout(GRID[:1, :1].contiguous(), 32), heads=7, batch=9, len_q=128, len_k=160, device=CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "made for 3 heads, the queries have 4; give 1 or 4"),
        ({"batch": 4}, "made for batch 2, the queries have 4; give 1 or 4"),
        ({"len_q": 129}, "covers 128 queries .* has 129"),
        ({"len_k": 161}, "covers 160 keys .* has 161"),
        ({"device": torch.device("meta")}, "is on cpu, the queries are on meta"),
    ],
)
def test_calls_that_do_not_fit(change, message):
    fitting = {"heads": 3, "batch": 2, "len_q": 128, "len_k": 160, "device": CPU}
    with pytest.raises(ValueError, match=message):
        check_layout(BlockLayout(GRID, 32), **(fitting | change))


def test_to_mask_beyond_the_grid():
    with pytest.raises(ValueError, match="exceeds"):
        BlockLayout(GRID, 32).to_mask(129, 10)


def test_lists_of_a_long_sequence_take_little_time():
    band = torch.ones(1024, 1024, dtype=torch.bool).tril(2).triu(-2)
    layout = BlockLayout.from_block_mask(band)
    start = time.perf_counter()
    assert layout.lists("q").index.shape[-1] == layout.lists("k").index.shape[-1] == 5
    assert time.perf_counter() - start < 2
