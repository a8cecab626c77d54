"""Selection at run time against its definition, written out in plain Python on lists."""

from __future__ import annotations

import math
import random

import pytest
import torch

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.selection import SELECTIONS, antidiagonal_blocks, top_k_blocks

BLOCK = 32


def case(seed: int) -> dict:
    """Random queries, keys and options."""
    r, g = random.Random(seed), torch.Generator().manual_seed(seed)
    batch, heads, group, dim = r.choice((1, 2)), r.choice((1, 2)), r.choice((1, 3)), 4
    causal = r.random() < 0.4
    len_q = r.randint(1, 200)
    len_k = len_q if causal else r.randint(1, 200)
    options = {"causal": causal, "keep_diagonal": causal or r.random() < 0.5}
    for side, length in (("q", len_q), ("k", len_k)):
        kind = r.choice(("none", "lengths", "mask"))
        if kind == "lengths":
            options[f"live_{side}"] = torch.tensor([r.choice((0, length, r.randint(0, length))) for _ in range(batch)])
        elif kind == "mask":
            options[f"live_{side}"] = torch.rand(r.choice((1, batch)), length, generator=g) < r.choice((0.05, 0.7))
    q = torch.randn(batch, heads * group, len_q, dim, generator=g, dtype=torch.float64)
    return {"q": q, "k": torch.randn(batch, heads, len_k, dim, generator=g, dtype=torch.float64), **options}


def live_rows(live: torch.Tensor | None, batch: int, length: int) -> list[list[bool]]:
    if live is None:
        return [[True] * length] * batch
    if live.dtype == torch.bool:
        return live.expand(batch, -1).tolist()
    return [[i < n for i in range(length)] for n in live.tolist()]


def problems(q, k, live_q=None, live_k=None):
    """`(batch row, head, queries, keys, live queries, live keys)` as lists, for each independent choice."""
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        rows_q = live_rows(live_q, q.shape[0], q.shape[2])[b]
        rows_k = live_rows(live_k, k.shape[0], k.shape[2])[b]
        for h in range(q.shape[1]):
            yield b, h, q[b, h].tolist(), k[b, h // group].tolist(), rows_q, rows_k


def dot(x, y) -> float:
    return sum(a * b for a, b in zip(x, y, strict=True))


def mean(rows: list[list[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def blocks(live: list[bool]) -> list[list[int]]:
    """Live rows of each block."""
    n = -(-len(live) // BLOCK)
    return [[i for i in range(b * BLOCK, min((b + 1) * BLOCK, len(live))) if live[i]] for b in range(n)]


def top_k_by_definition(q, k, live_q, live_k, causal, keep_diagonal, top_k) -> set[tuple[int, int]]:
    chosen = set()
    for r, rows in enumerate(blocks(live_q)):
        scores = {}
        for c, columns in enumerate(blocks(live_k)):
            if rows and columns and not (causal and c > r):
                scores[c] = dot(mean([q[i] for i in rows]), mean([k[j] for j in columns]))
                if keep_diagonal and r == c:
                    scores[c] = math.inf
        chosen |= {(r, c) for c in sorted(scores, key=lambda c: -scores[c])[:top_k]}
    return chosen


def antidiagonal_by_definition(q, k, live_q, live_k, causal, keep_diagonal, threshold, stride) -> set[tuple[int, int]]:
    scale = 1 / (stride * math.sqrt(len(q[0])))
    mass: dict[tuple[int, int], float] = {}
    for t in range(-(-len(q) // stride)):
        scores = {}
        for u in range(-(-len(k) // stride)):
            alive = [j for j in range(u * stride, min((u + 1) * stride, len(k))) if live_k[j]]
            if not alive or (causal and u > t):
                continue
            # The anti-diagonal pairs the tile's last query with its first key.
            pairs = (((t + 1) * stride - 1 - n, u * stride + n) for n in range(stride))
            seen = ((i, j) for i, j in pairs if i < len(q) and j < len(k) and live_q[i] and live_k[j])
            scores[u] = scale * sum(dot(q[i], k[j]) for i, j in seen)
        if not any(live_q[t * stride : (t + 1) * stride]) or not scores:
            continue
        total = sum(math.exp(s) for s in scores.values())
        for u, s in scores.items():
            where = t * stride // BLOCK, u * stride // BLOCK
            mass[where] = mass.get(where, 0.0) + math.exp(s) / total
    chosen = set()
    for r, rows in enumerate(blocks(live_q)):
        legal = [c for c, columns in enumerate(blocks(live_k)) if rows and columns and not (causal and c > r)]
        forced = [c for c in legal if c == 0 or (keep_diagonal and c == r)]
        rest = sorted((c for c in legal if c not in forced), key=lambda c: -mass.get((r, c), 0.0))
        row_mass = sum(mass.get((r, c), 0.0) for c in legal)
        held = sum(mass.get((r, c), 0.0) for c in forced)
        chosen |= {(r, c) for c in forced}
        for c in rest:
            if held >= threshold * row_mass:
                break
            chosen.add((r, c))
            held += mass.get((r, c), 0.0)
    return chosen


def check(layout: BlockLayout, inputs: dict, definition, **parameters) -> None:
    q, k = inputs["q"], inputs["k"]
    assert layout.grid.shape == (q.shape[0], q.shape[1], -(-q.shape[2] // BLOCK), -(-k.shape[2] // BLOCK))
    assert layout.tile_masks is None
    flags = {name: inputs[name] for name in ("causal", "keep_diagonal")}
    for b, h, *lists in problems(q, k, inputs.get("live_q"), inputs.get("live_k")):
        found = {tuple(where) for where in layout.grid[b, h].nonzero().tolist()}
        assert found == definition(*lists, **flags, **parameters), (b, h)


@pytest.mark.parametrize("seed", range(30))
def test_top_k(seed):
    inputs = case(seed)
    top_k = random.Random(seed).choice((1, 2, 3, 9))
    layout = top_k_blocks(**inputs, block_size=BLOCK, top_k=top_k)
    check(layout, inputs, top_k_by_definition, top_k=top_k)


@pytest.mark.parametrize("seed", range(30))
def test_antidiagonal(seed):
    inputs = case(seed)
    r = random.Random(seed)
    parameters = {"threshold": r.choice((0.3, 0.6, 0.9)), "stride": r.choice((4, 8, 16))}
    layout = antidiagonal_blocks(**inputs, block_size=BLOCK, **parameters)
    check(layout, inputs, antidiagonal_by_definition, **parameters)


def test_antidiagonal_scores_are_the_same_in_parts(monkeypatch):
    inputs = case(3) | {"causal": False, "live_q": None, "live_k": None}
    whole = antidiagonal_blocks(**inputs, block_size=BLOCK, stride=8, threshold=0.6)
    monkeypatch.setattr("hf_flashbsa.masks.selection.CHUNK", 1)
    assert antidiagonal_blocks(**inputs, block_size=BLOCK, stride=8, threshold=0.6).equals(whole)


PARAMETERS = {"top_k_blocks": {"top_k": 2}, "antidiagonal_blocks": {"stride": 8, "threshold": 0.5}}
EACH = pytest.mark.parametrize("name", sorted(SELECTIONS))


@EACH
def test_padding_may_hold_anything(name):
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 100, 4, generator=g), torch.randn(2, 1, 100, 4, generator=g)
    lengths = torch.tensor([70, 20])
    options = dict(PARAMETERS[name], block_size=BLOCK, causal=True, live_q=lengths, live_k=lengths)
    expected = SELECTIONS[name](q, k, **options)
    for b, n in enumerate(lengths.tolist()):
        q[b, :, n:], k[b, :, n:] = math.nan, math.inf
    assert SELECTIONS[name](q, k, **options).equals(expected)
    assert not expected.grid[1, :, 1:].any()


@EACH
def test_gradients_do_not_pass(name):
    q, k = (torch.randn(1, 1, 64, 4, requires_grad=True) for _ in range(2))
    assert not SELECTIONS[name](q, k, BLOCK, **PARAMETERS[name]).grid.requires_grad


@EACH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(name, dtype):
    q, k = torch.zeros(2, 1, 1, 128, 4, dtype=dtype)
    q[..., 0], k[:, :, 64:96, 0] = 8, 8
    grid = SELECTIONS[name](q, k, BLOCK, keep_diagonal=False, **PARAMETERS[name]).grid
    assert grid[0, 0, :, 2].all()


@EACH
def test_nothing_waits_for_the_device(name):
    """Tensors without values cannot be waited for."""
    q, k = torch.empty(2, 4, 300, 8, device="meta"), torch.empty(2, 2, 300, 8, device="meta")
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    layout = SELECTIONS[name](q, k, causal=True, live_q=lengths, live_k=lengths, **PARAMETERS[name])
    assert layout.grid.shape == (2, 4, 3, 3)
    assert layout.lists("q").index.shape == layout.lists("k").index.shape == (2, 4, 3, 3)


Q = torch.zeros(2, 4, 64, 8)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("top_k_blocks", {"top_k": 0}, "top_k: 0"),
        ("antidiagonal_blocks", {"threshold": 0.0}, "threshold: 0.0"),
        ("antidiagonal_blocks", {"threshold": 1.5}, "threshold: 1.5"),
        ("antidiagonal_blocks", {"stride": 24}, "stride: 24 does not divide the block size 32"),
        ("top_k_blocks", {"k": Q[:, :3]}, "Hkv divides Hq"),
        ("top_k_blocks", {"k": Q[:1]}, "q and k"),
        ("top_k_blocks", {"k": Q[:, :, :32], "causal": True}, "causal: 64 queries and 32 keys"),
        ("top_k_blocks", {"live_k": torch.ones(2, 32).bool()}, r"live: torch.bool \(2, 32\)"),
        ("top_k_blocks", {"live_k": torch.ones(2, 64)}, "live: torch.float32"),
        ("top_k_blocks", {"block_size": 40}, "no kernel tile divides 40"),
    ],
)
def test_wrong_arguments(name, change, message):
    with pytest.raises(ValueError, match=message):
        SELECTIONS[name](**({"q": Q, "k": Q, "block_size": BLOCK} | PARAMETERS[name] | change))
