"""Every pattern against its definition, written out on tokens or blocks in plain Python."""

from __future__ import annotations

import random
import time

import pytest
import torch

from hf_flashbsa import patterns
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.patterns import PATTERNS, from_mask, from_mask_function, make_layout

BLOCK = 32


def blocks_of(length: int) -> int:
    return -(-length // BLOCK)


# Each definition says whether query (or block row) i sees key (or block column) j with parameters p.


def local(p, i, j):
    return abs(i - j) <= p["window"]


def longformer(p, i, j):
    first = p["num_global_tokens"]
    return abs(i - j) <= p["window"] // 2 or i < first or j < first


def dilated(p, i, j, head):
    dilations = p["dilation"] if isinstance(p["dilation"], list) else [p["dilation"]]
    step = dilations[head % len(dilations)]
    return any(j == i + n * step for n in range(-(p["window"] // 2), p["window"] // 2 + 1))


def openai_strided(p, i, j):
    return abs(i - j) <= p["stride"] or (i - j) % p["stride"] == 0


def openai_fixed(p, i, j, head):
    window, count = p["window"], p["num_summary_tokens"]
    group = head % p["num_patterns"]
    summary = range(window - (group + 1) * count, window - group * count)
    return i // window == j // window or j % window in summary


def global_columns(p, i, j):
    return j < p["num_global_tokens"]


def all_blocks(p, i, j):
    return True


def butterfly(p, r, c, rows, columns):
    cells = p["num_cells"]
    if cells is None:
        cells = 1
        while cells < max(rows, columns):
            cells *= 2
    else:
        r, c = (
            next(i for i in range(cells) if i * n <= x * cells < (i + 1) * n) for x, n in ((r, rows), (c, columns))
        )
    strides = [2**i for i in range(20) if 2**i < cells]
    if p["num_strides"] is not None:
        strides = strides[: p["num_strides"]]
    return r == c or (r ^ c) in strides


def deepspeed_fixed_globals(p, head: int, n: int) -> set[int]:
    """Global blocks of `n`, window by window."""
    size, count = p["num_local_blocks"], p["num_global_blocks"]
    first = size - (1 + head % p["num_global_patterns"]) * count
    found = set()
    for begin in range(0, n, size):
        start = begin + first if begin + size <= n else min(begin + first, n - count)
        found |= set(range(start, start + count))
    return found


def deepspeed_variable_window(p, r: int) -> int:
    end = 0
    for number in range(r + 1):
        end += p["local_window_blocks"][min(number, len(p["local_window_blocks"]) - 1)]
        if r < end:
            return number
    raise AssertionError("windows are at least one block wide")


def expected_entries(seen, num_queries: int, num_keys: int) -> torch.Tensor:
    return torch.tensor([[seen(i, j) for j in range(num_keys)] for i in range(num_queries)])


def expected_blocks(seen, num_queries: int, num_keys: int) -> torch.Tensor:
    grid = expected_entries(seen, blocks_of(num_queries), blocks_of(num_keys))
    return grid.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:num_queries, :num_keys]


def check(layout: BlockLayout, expected: list[torch.Tensor], causal: bool) -> None:
    """Asserts that each head of a layout shows what is expected, and nothing it need not."""
    num_queries, num_keys = expected[0].shape
    masks = layout.to_mask(num_queries, num_keys)[0]
    assert len(masks) in (1, len(expected))
    for head, right in enumerate(expected):
        mask = masks[head % len(masks)]
        if causal:
            assert not layout.grid.triu(1).any()
            assert torch.equal(mask.tril(), right.tril())
        else:
            assert torch.equal(mask, right)
    whole = layout.grid[:, :, : num_queries // BLOCK, : num_keys // BLOCK]
    for b, h, r, c in (whole >= 2).nonzero().tolist():
        tile = masks[h, r * BLOCK : (r + 1) * BLOCK, c * BLOCK : (c + 1) * BLOCK]
        assert tile.any() and not tile.all(), (b, h, r, c)
    if layout.tile_masks is not None:
        assert len({tuple(m.flatten().tolist()) for m in layout.tile_masks}) == len(layout.tile_masks)


def case(seed: int, self_attention: bool = True) -> tuple[random.Random, int, int, bool, int]:
    """Random sizes: `(random, num_queries, num_keys, causal, num_heads)`."""
    r = random.Random(seed)
    num_queries = r.randint(1, 260)
    causal = self_attention and r.random() < 0.5
    num_keys = num_queries if causal or r.random() < 0.3 else r.randint(1, 260)
    return r, num_queries, num_keys, causal, r.choice((1, 2, 3, 5))


SHARED = {
    "local": (local, lambda r: {"window": r.choice((0, 1, 31, 32, 33, r.randint(0, 300)))}),
    "longformer": (
        longformer,
        lambda r: {"window": 2 * r.choice((0, 16, 32, r.randint(0, 90))), "num_global_tokens": r.choice((0, 32, 50))},
    ),
    "openai_strided": (openai_strided, lambda r: {"stride": r.choice((1, 7, 32, 50, 64, 96, 97))}),
}


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", SHARED)
def test_rules_on_entries(name, seed):
    seen, choose = SHARED[name]
    r, num_queries, num_keys, causal, _ = case(seed)
    p = choose(r)
    layout = PATTERNS[name](num_queries, num_keys, BLOCK, causal=causal, **p)
    check(layout, [expected_entries(lambda i, j: seen(p, i, j), num_queries, num_keys)], causal)


PER_HEAD = {
    "dilated": (
        dilated,
        lambda r: {"window": 2 * r.randint(0, 20), "dilation": r.choice((1, 2, 3, [1, 2], [1, 4, 40, 7]))},
    ),
    "openai_fixed": (
        openai_fixed,
        lambda r: {"window": r.choice((24, 32, 50, 64, 100)), "num_summary_tokens": r.randint(1, 8),
                   "num_patterns": r.randint(1, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("name", PER_HEAD)
def test_rules_on_entries_that_differ_by_head(name, seed):
    seen, choose = PER_HEAD[name]
    r, num_queries, num_keys, causal, heads = case(seed)
    p, heads = choose(r), 3 + heads
    layout = PATTERNS[name](num_queries, num_keys, BLOCK, causal=causal, num_heads=heads, **p)
    expected = [
        expected_entries(lambda i, j, head=head: seen(p, i, j, head), num_queries, num_keys) for head in range(heads)
    ]
    check(layout, expected, causal)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("name", "seen"), [("global_columns", global_columns), ("all_blocks", all_blocks)])
def test_rules_for_cross_attention(name, seen, seed):
    r, num_queries, num_keys, _, _ = case(seed, self_attention=False)
    p = {"num_global_tokens": r.randint(1, 200)} if name == "global_columns" else {}
    layout = PATTERNS[name](num_queries, num_keys, BLOCK, **p)
    check(layout, [expected_entries(lambda i, j: seen(p, i, j), num_queries, num_keys)], False)


@pytest.mark.parametrize("seed", range(20))
def test_butterfly(seed):
    r, num_queries, num_keys, causal, _ = case(seed)
    p = {"num_cells": r.choice((None, 1, 2, 4, 8)), "num_strides": r.choice((None, 0, 1, 2))}
    first = r.choice((0, 1, 2))
    rows, columns = blocks_of(num_queries), blocks_of(num_keys)

    def seen(i, j):
        return i < first or j < first or butterfly(p, i, j, rows, columns)

    layout = patterns.butterfly(num_queries, num_keys, BLOCK, causal=causal, num_global_blocks=first, **p)
    check(layout, [expected_blocks(seen, num_queries, num_keys)], causal)


def test_butterfly_of_eight_blocks():
    grid = patterns.butterfly(8 * BLOCK, 8 * BLOCK, BLOCK).grid[0, 0]
    assert grid[0].nonzero()[:, 0].tolist() == [0, 1, 2, 4]
    assert grid[5].nonzero()[:, 0].tolist() == [1, 4, 5, 7]
    assert grid.sum() == 8 * (1 + 3)


@pytest.mark.parametrize("seed", range(20))
def test_deepspeed_fixed(seed):
    r, num_queries, num_keys, causal, heads = case(seed)
    heads += 5
    p = {"num_local_blocks": r.choice((3, 4, 6)), "num_global_blocks": r.choice((1, 1, 2))}
    p["num_global_patterns"] = r.randint(1, p["num_local_blocks"] // p["num_global_blocks"])
    horizontal = not causal and r.random() < 0.5
    size = p["num_local_blocks"]
    expected = []
    for head in range(heads):
        columns = deepspeed_fixed_globals(p, head, blocks_of(num_keys))
        rows = deepspeed_fixed_globals(p, head, blocks_of(num_queries)) if horizontal else ()
        expected.append(
            expected_blocks(
                lambda i, j, rows=rows, columns=columns: i // size == j // size or j in columns or i in rows,
                num_queries,
                num_keys,
            )
        )
    layout = patterns.deepspeed_fixed(
        num_queries, num_keys, BLOCK, causal=causal, num_heads=heads, horizontal=horizontal, **p
    )
    check(layout, expected, causal)


@pytest.mark.parametrize("seed", range(20))
def test_deepspeed_variable(seed):
    r, num_queries, num_keys, causal, _ = case(seed)
    p = {"local_window_blocks": r.choice(([4], [1], [1, 2], [2, 1, 3])), "global_blocks": r.choice(([0], [1, 4]))}
    p["horizontal"] = not causal and r.random() < 0.5
    global_blocks = set(p["global_blocks"])
    if r.random() < 0.5:
        p["global_block_ends"] = [b + r.randint(1, 3) for b in p["global_blocks"]]
        ranges = zip(p["global_blocks"], p["global_block_ends"], strict=True)
        global_blocks = {x for b, e in ranges for x in range(b, e)}

    def seen(i, j):
        same = deepspeed_variable_window(p, i) == deepspeed_variable_window(p, j)
        return same or j in global_blocks or (p["horizontal"] and i in global_blocks)

    layout = patterns.deepspeed_variable(num_queries, num_keys, BLOCK, causal=causal, **p)
    check(layout, [expected_blocks(seen, num_queries, num_keys)], causal)


def drawn(eligible, rows: int, columns: int, count: int, generator: torch.Generator) -> set[tuple[int, int]]:
    """The random blocks of one head, drawn with Python's sort."""
    scores = torch.rand(rows, columns, generator=generator).tolist()
    found = set()
    for r in range(rows):
        order = sorted((c for c in range(columns) if eligible(r, c)), key=lambda c: -scores[r][c])
        found |= {(r, c) for c in order[:count]}
    return found


@pytest.mark.parametrize("seed", range(20))
def test_bigbird(seed):
    r, num_queries, num_keys, causal, heads = case(seed)
    width, first, count = r.choice((1, 3, 5)), r.choice((0, 1, 2)), r.choice((0, 1, 3, 9))
    rows, columns = blocks_of(num_queries), blocks_of(num_keys)

    def fixed(i, j):
        return abs(i - j) <= width // 2 or i < first or j < first

    generator, expected = torch.Generator().manual_seed(seed), []
    for _ in range(heads):
        extra = drawn(lambda i, j: not fixed(i, j) and (j <= i or not causal), rows, columns, count, generator)
        expected.append(
            expected_blocks(lambda i, j, extra=extra: fixed(i, j) or (i, j) in extra, num_queries, num_keys)
        )
    layout = patterns.bigbird(
        num_queries, num_keys, BLOCK, num_window_blocks=width, num_global_blocks=first, num_random_blocks=count,
        seed=seed, causal=causal, num_heads=heads,
    )  # fmt: skip
    check(layout, expected, causal)


@pytest.mark.parametrize("causal", [False, True])
def test_deepspeed_variable_draws_from_all_blocks_a_row_may_see(causal):
    rows = 7
    layout = patterns.deepspeed_variable(
        rows * BLOCK, rows * BLOCK, BLOCK, local_window_blocks=[1], num_random_blocks=2, seed=5, causal=causal,
        num_heads=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    for head in range(2):
        extra = drawn(lambda i, j: j <= i or not causal, rows, rows, 2, generator)
        expected = expected_entries(lambda i, j, extra=extra: i == j or j == 0 or (i, j) in extra, rows, rows)
        assert torch.equal(layout.grid[0, head].bool(), expected.tril() if causal else expected)


def test_random_blocks_depend_on_their_seed_only():
    def make(seed, **options):
        return patterns.bigbird(640, 640, BLOCK, num_random_blocks=3, seed=seed, num_heads=4, **options)

    torch.manual_seed(1)
    first = make(0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert make(0).equals(first)
    assert not make(1).equals(first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(first.grid[:, 0], first.grid[:, 1])
    assert make(0, per_head=False).grid.shape[1] == 1


@pytest.mark.parametrize("seed", range(20))
def test_from_mask_function_equals_from_mask(seed):
    r, num_queries, num_keys, _, heads = case(seed)
    batch = r.choice((1, 2))
    reach = torch.tensor([[r.randint(0, 80) for _ in range(heads)] for _ in range(batch)])

    def visible(b, h, q, k):
        return (q - k).abs() <= reach[b, h]

    i, j = torch.arange(num_queries)[:, None], torch.arange(num_keys)
    mask = (i - j).abs() <= reach[:, :, None, None]
    layout = from_mask_function(visible, num_queries, num_keys, BLOCK, batch=batch, num_heads=heads)
    assert torch.equal(layout.to_mask(num_queries, num_keys), mask)
    assert layout.equals(from_mask(mask, BLOCK))


def test_from_mask_function_of_nothing_and_of_one_argument():
    nothing = from_mask_function(lambda b, h, q, k: k < 0, 70, 70, BLOCK)
    assert nothing.tile_masks is None and not nothing.grid.any()
    padded = from_mask_function(lambda b, h, q, k: k < 40, 64, 70, BLOCK)
    assert padded.grid[0, 0].tolist() == [[1, 2, 0]] * 2


LONG = {
    "all_blocks": {},
    "bigbird": {"num_random_blocks": 3},
    "butterfly": {},
    "deepspeed_fixed": {"num_global_patterns": 4},
    "deepspeed_variable": {"num_random_blocks": 1},
    "dilated": {"window": 512, "dilation": [1, 2]},
    "global_columns": {"num_global_tokens": 100},
    "local": {"window": 1000},
    "longformer": {"window": 512, "num_global_tokens": 100},
    "openai_fixed": {"window": 1024, "num_summary_tokens": 32, "num_patterns": 4},
    "openai_strided": {"stride": 2048},
}


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_long_sequences_take_seconds(name):
    start = time.perf_counter()
    layout = make_layout(name, 65_536, 65_536, causal=True, num_heads=4, **LONG[name])
    assert layout.grid.shape[2:] == (512, 512)
    assert layout.tile_masks is None or len(layout.tile_masks) < 50
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("name", sorted(PATTERNS))
def test_only_the_number_of_blocks_matters(name):
    layout = make_layout(name, 300, 300, BLOCK, num_heads=4, **LONG[name])
    assert layout.block_size == BLOCK and layout.device.type == "cpu"
    assert layout.equals(make_layout(name, 290, 315, BLOCK, num_heads=4, **LONG[name]))


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("longfromer", {}, "Unknown pattern 'longfromer'; did you mean 'longformer'.* There are: all_blocks, bigbird"),
        (
            "local",
            {"windows": 3},
            "Unknown parameter of 'local': 'windows'; did you mean 'window'.* There are: window",
        ),
        ("all_blocks", {"xyz": 3}, "There are: none"),
        ("local", {}, "local: needs window"),
        ("local", {"window": 1.5}, "local: window is 1.5; give int"),
        ("local", {"window": True}, "local: window is True; give int"),
        ("local", {"window": -1}, "window: -1; give at least 0"),
        ("longformer", {"window": 3}, "window: 3 is odd"),
        ("dilated", {"window": 3, "dilation": 1}, "window: 3 is odd"),
        ("dilated", {"window": 4, "dilation": [1, 0]}, "dilation: 0; give at least 1"),
        ("dilated", {"window": 4, "dilation": []}, "dilation is "),
        ("dilated", {"window": 4, "dilation": [1, 2.0]}, "dilation is .*; give int | Sequence"),
        ("openai_strided", {"stride": 0}, "stride: 0; give at least 1"),
        ("openai_fixed", {"window": 8, "num_summary_tokens": 5, "num_patterns": 2}, "exceed a window of 8"),
        ("bigbird", {"num_window_blocks": 2}, "num_window_blocks: 2; give an odd number"),
        ("bigbird", {"num_random_blocks": -1}, "num_random_blocks: -1"),
        ("bigbird", {"per_head": 1}, "per_head is 1; give bool"),
        ("butterfly", {"num_cells": 6}, "num_cells: 6; give a power of two"),
        ("deepspeed_fixed", {"num_global_patterns": 5}, "exceed a window of 4 blocks"),
        ("deepspeed_variable", {"global_block_ends": [0]}, "global_block_ends"),
        ("deepspeed_variable", {"local_window_blocks": [0]}, "local_window_blocks: 0; give at least 1"),
        ("global_columns", {"num_global_tokens": 0}, "num_global_tokens: 0"),
    ],
)
def test_wrong_parameters(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        make_layout(name, 128, 128, BLOCK, num_heads=8, **parameters)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dilated", {"window": 4, "dilation": [1, 2, 3]}),
        ("openai_fixed", {"window": 8, "num_summary_tokens": 1, "num_patterns": 3}),
        ("deepspeed_fixed", {"num_global_patterns": 3}),
    ],
)
def test_more_variants_than_heads(name, parameters):
    with pytest.raises(ValueError, match="3 variants for num_heads=2"):
        make_layout(name, 128, 128, BLOCK, num_heads=2, **parameters)


@pytest.mark.parametrize("name", ["deepspeed_fixed", "deepspeed_variable"])
def test_horizontal_globals_are_not_causal(name):
    with pytest.raises(ValueError, match="horizontal"):
        make_layout(name, 128, 128, BLOCK, horizontal=True, causal=True)


def test_wrong_sizes():
    with pytest.raises(ValueError, match="causal patterns need as many queries as keys"):
        make_layout("local", 128, 130, BLOCK, window=3, causal=True)
    with pytest.raises(ValueError, match="num_keys: 0"):
        make_layout("all_blocks", 128, 0, BLOCK)
    with pytest.raises(ValueError, match="no kernel tile divides 48"):
        make_layout("all_blocks", 128, 128, 48)
