"""The dropout mask against its definition in Python's integers, Triton's against torch's, and both against chance."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from hf_flashbsa.kernels import dropout
from hf_flashbsa.kernels.arguments import _as_int32
from hf_flashbsa.kernels.dropout import drop_threshold, keep_mask, keep_scale
from hf_flashbsa.kernels.structs import ScoreMod
from hf_flashbsa.kernels.triton.score import dropout_keep, dropout_row_words

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


def drawn(seed: int, batch_head: int, query: int, begin: int, end: int, rounds: int) -> list[int]:
    """The numbers of keys `[begin, end)` as the module's text defines them, one at a time."""
    pad, factor, _, _ = philox4x32((query, batch_head, 0, 0), (seed % 2**32, seed >> 32), rounds)
    values = []
    for place in range(begin, end):
        x = (place - 8 if place // 8 % 2 else place) * 0x9E3779B9 % 2**32
        x = ((x ^ x >> 16) ^ pad) * (factor | 1) % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        values.append(x >> 16 if place // 8 % 2 else x % 2**16)
    return values


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


POSITIONS = ((0, 0, 0, 40), (5, 1000, 0, 16), (2**31 - 1, 2**31 - 1, 35, 70), (3, 77, 2**31 - 40, 2**31 - 1))


@pytest.mark.parametrize("rounds", [7, 10])
@pytest.mark.parametrize("seed", SEEDS)
def test_numbers(seed, rounds, monkeypatch):
    assert dropout.ROUNDS == 7
    monkeypatch.setattr(dropout, "ROUNDS", rounds)
    for batch_head, query, begin, end in POSITIONS:
        words = dropout._row_words(torch.tensor([seed]), torch.tensor([batch_head]), torch.tensor([query]))
        got = dropout._draw(*words, torch.arange(begin, end)).flatten().tolist()
        assert got == drawn(seed, batch_head, query, begin, end, rounds)


@pytest.mark.parametrize("seed", SEEDS)
def test_triton_keeps_the_same(seed):
    @triton.jit
    def kernel(seed, out, batch_head, query, begin, threshold, N: tl.constexpr):
        score = ScoreMod(1.0, None, None, None, None, seed, threshold, 1.0, None, None)
        pad, factor = dropout_row_words(score, batch_head, query + tl.arange(0, 2))
        keep = dropout_keep(score, pad[:, None], factor[:, None], begin, tl.arange(0, N)[None, :])
        tl.store(out + tl.arange(0, 2)[:, None] * N + tl.arange(0, N)[None, :], keep.to(tl.int8))

    for batch_head, query, begin, _ in POSITIONS:
        query, begin = min(query, 2**31 - 2), min(begin, 2**31 - 128) // 16 * 16
        for threshold in (drop_threshold(0.1), drop_threshold(0.5), drop_threshold(0.9)):
            out = torch.zeros(2, 128, dtype=torch.int8, device=DEVICE)
            kernel[(1,)](
                torch.tensor([seed], device=DEVICE), out, batch_head, query, begin, _as_int32(threshold << 16), 128
            )
            at = torch.tensor([batch_head]), torch.arange(query, query + 2)
            want = keep_mask(torch.tensor([seed]), threshold, *at, (begin, begin + 128))[0]
            assert torch.equal(out.cpu() != 0, want)


def test_positions_are_absolute():
    """A part of the mask is the mask of the part, whatever the cut."""
    seed, heads, queries = torch.tensor([7]), torch.arange(6).reshape(2, 3), torch.arange(50)
    whole = keep_mask(seed, 100, heads, queries, (0, 90))
    assert whole.shape == (2, 3, 50, 90)
    assert torch.equal(whole[1:, :, 20:33, 37:81], keep_mask(seed, 100, heads[1:], queries[20:33], (37, 81)))


def deviates(p: float, heads: int, queries: int, keys: int, seed: int = 5) -> torch.Tensor:
    """Whether each weight is dropped, `(heads, queries, keys)`, scaled to mean 0 and variance 1."""
    kept = keep_mask(torch.tensor([seed]), drop_threshold(p), torch.arange(heads), torch.arange(queries), (0, keys))
    return (p - kept.logical_not().double()) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.5])
class TestLooksLikeChance:
    """What true random numbers would pass in all but about one of a million runs (5 standard deviations)."""

    def test_rates(self, p):
        """The whole, each query and each key drop as often as told, and vary as much as independent draws do."""
        x = deviates(p, 16, 512, 1024)
        assert abs(x.sum().item()) < 5 * x.numel() ** 0.5
        for totals in (x.sum(-1), x.sum(-2), x.unflatten(-1, (-1, 16)).sum(-1)):
            terms = x.numel() / totals.numel()
            assert abs(totals.var().item() / terms - 1) < 5 * (2 / totals.numel()) ** 0.5

    def test_neighbours_and_other_seeds_are_uncorrelated(self, p):
        x = deviates(p, 16, 512, 1024)
        pairs = [(x[1:], x[:-1]), (x[:, 1:], x[:, :-1]), (x, deviates(p, 16, 512, 1024, seed=6))]
        pairs += [(x[..., lag:], x[..., :-lag]) for lag in (1, 2, 3, 4, 8, 16, 32, 64, 128)]
        # Four weights at the corners of a rectangle share their queries' words and their keys in pairs.
        pairs.append((x[:, 1:, 1:] * x[:, :-1, :-1], x[:, 1:, :-1] * x[:, :-1, 1:]))
        for a, b in pairs:
            assert abs((a * b).sum().item()) < 5 * a.numel() ** 0.5 * (2 if p == 0.1 else 1)

    def test_no_query_repeats_itself(self, p):
        """Correlation of each query's weights with those at every distance, in a long row."""
        n = 32768
        x = deviates(p, 1, 128, n)[0]
        spectrum = torch.fft.rfft(x, 2 * n).abs() ** 2
        lags = torch.arange(1, n // 2)
        z = torch.fft.irfft(spectrum)[:, 1 : n // 2] / (n - lags) ** 0.5
        assert abs((z**2).mean().item() - 1) < 0.01 and z.abs().max().item() < 7

    def test_queries_and_heads_are_uncorrelated(self, p):
        x = deviates(p, 4, 512, 1024).flatten(0, 1)
        z = (x @ x.T / 32)[~torch.eye(2048, dtype=torch.bool)]
        assert abs((z**2).mean().item() - 1) < 0.01 and z.abs().max().item() < 7


@pytest.mark.parametrize("keys", [range(8), range(8, 16), (0, 8, 1, 9, 2, 10, 3, 11)], ids=["low", "high", "pairs"])
def test_patterns_of_eight_keys_are_equally_likely(keys):
    kept = keep_mask(torch.tensor([5]), drop_threshold(0.5), torch.arange(4), torch.arange(512), (0, 1024))
    bits = (kept.unflatten(-1, (-1, 16))[..., list(keys)] * 2 ** torch.arange(8)).sum(-1)
    counts = torch.bincount(bits.flatten(), minlength=256)
    expected = counts.sum().item() / 256
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert abs(((counts - expected) ** 2 / expected).sum().item() - 255) < 5 * 22.6


@pytest.mark.parametrize("p", [1e-12, 1e-6, 0.1, 0.17, 0.5, 0.9999, 1 - 1e-12])
def test_threshold(p):
    threshold = drop_threshold(p)
    assert 0 < threshold < 2**16
    assert abs(threshold / 2**16 - p) <= 2**-16
    assert keep_scale(threshold) == pytest.approx(1 / (1 - threshold / 2**16))
    assert drop_threshold(0.0) == 0
