"""The dropout mask against Philox written from its paper, against Triton's Philox, and as a random variable."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hf_flashbsa.kernels import philox
from hf_flashbsa.kernels.philox import drop_threshold, keep_mask, keep_scale

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = (0, 1, 0x9E3779B97F4A7C15 >> 1, 2**63 - 1)


def philox4x32(counter: tuple[int, ...], key: tuple[int, int], rounds: int) -> tuple[int, ...]:
    """Four 32-bit words, in Python's unbounded integers."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(rounds):
        a, b = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (b >> 32) ^ x1 ^ k0, b % 2**32, (a >> 32) ^ x3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return x0, x1, x2, x3


def drawn_bytes(seed: int, batch_head: int, query: int, begin: int, end: int, rounds: int) -> list[int]:
    """The bytes of keys `[begin, end)`, one at a time."""
    key = seed % 2**32, seed >> 32
    values = []
    for place in range(begin, end):
        words = philox4x32((place // 16, query, batch_head, 0), key, rounds)
        values.append(words[place % 16 // 4] >> 8 * (place % 4) & 255)
    return values


def bytes_of_mask(seed: int, batch_head: int, query: int, begin: int, end: int) -> list[int]:
    """The bytes that `keep_mask` compares with its threshold, read off the masks of all thresholds."""
    at = torch.tensor([batch_head]), torch.tensor([query])
    kept = sum(keep_mask(torch.tensor([seed]), threshold, *at, (begin, end)).long() for threshold in range(1, 256))
    return kept.flatten().tolist()


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_vectors_of_10_rounds(counter, key, words):
    """Those of Random123, the authors' library (`kat_vectors`): the yardstick of this file is itself right."""
    assert philox4x32(counter, key, 10) == words


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_bytes(seed, rounds, monkeypatch):
    assert philox.ROUNDS == 7
    monkeypatch.setattr(philox, "ROUNDS", rounds)
    for batch_head, query, begin, end in ((0, 0, 0, 40), (5, 1000, 0, 16), (2**31 - 1, 2**31 - 1, 35, 70)):
        want = drawn_bytes(seed, batch_head, query, begin, end, rounds)
        assert bytes_of_mask(seed, batch_head, query, begin, end) == want


@pytest.mark.parametrize("seed", SEEDS)
def test_triton_draws_the_same_bytes(seed):
    @triton.jit
    def kernel(seed, out, N: tl.constexpr, ROUNDS: tl.constexpr):
        c0 = tl.arange(0, N).to(tl.uint32)
        words = tl.philox(tl.load(seed), c0, c0 * 3, c0 + 9, tl.zeros_like(c0), n_rounds=ROUNDS)
        for i in tl.static_range(4):
            tl.store(out + 4 * tl.arange(0, N) + i, words[i].to(tl.int32, bitcast=True))

    out = torch.zeros(16, 4, dtype=torch.int32, device=DEVICE)
    kernel[(1,)](torch.tensor([seed], device=DEVICE), out, 16, philox.ROUNDS)
    drawn = out.cpu().view(torch.uint8).tolist()
    assert drawn == [drawn_bytes(seed, i + 9, 3 * i, 16 * i, 16 * i + 16, philox.ROUNDS) for i in range(16)]


def test_positions_are_absolute():
    """A part of the mask is the mask of the part, whatever the cut."""
    seed, heads, queries = torch.tensor([7]), torch.arange(6).reshape(2, 3), torch.arange(50)
    whole = keep_mask(seed, 100, heads, queries, (0, 90))
    assert whole.shape == (2, 3, 50, 90)
    assert torch.equal(whole[1:, :, 20:33, 37:81], keep_mask(seed, 100, heads[1:], queries[20:33], (37, 81)))


def test_uniform_and_uncorrelated():
    """Every byte value as often as chance has it; neighbours along every axis and other seeds agree by chance only."""
    at = torch.arange(4), torch.arange(128)
    masks = [keep_mask(torch.tensor([5]), t, *at, (0, 128)) for t in range(1, 256)]
    counts = torch.bincount(torch.stack(masks).sum(0).flatten(), minlength=256)
    n = counts.sum().item()
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(chi2 - 255) < 5 * 22.6
    half = masks[127].float() - 0.5
    other = keep_mask(torch.tensor([6]), 128, *at, (0, 128)).float() - 0.5
    pairs = [(half[1:], half[:-1]), (half[:, 1:], half[:, :-1]), (half[..., 1:], half[..., :-1]), (half, other)]
    for a, b in pairs:
        assert abs((a * b).mean().item() * 4) < 5 / a.numel() ** 0.5


@pytest.mark.parametrize(
    "p, threshold", [(0.0, 0), (1e-6, 1), (1 / 256, 1), (0.1, 26), (0.17, 44), (0.5, 128), (0.9999, 255)]
)
def test_probability_in_256ths(p, threshold):
    assert drop_threshold(p) == threshold
    assert keep_scale(threshold) == pytest.approx(1 / (1 - threshold / 256))
    kept = keep_mask(torch.tensor([3]), threshold, torch.arange(8), torch.arange(128), (0, 512)).double().mean()
    assert abs((1 - kept) - threshold / 256) < 0.005
