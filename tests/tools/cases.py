"""Random attention problems, and the rule by which their results are judged. Used on CPU and on GPU machines."""

from __future__ import annotations

import dataclasses
import random

import torch

from hf_flashbsa import AttentionSpec, attention
from hf_flashbsa.kernels.dropout import drop_threshold, keep_mask
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.ops.reference import reference_attention, sequence_ranges

MASKS = ("none", "seqlens", "cu_seqlens", "key_padding", "segments", "dense", "offset_tensor", "mixed", "starts")


LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 100, 111, 127, 128, 129, 203, 217, 256, 300, 437, 512, 777, 1024)


@dataclasses.dataclass
class Case:
    """One problem: sizes and options from a seed, tensors made on demand."""

    seed: int
    dtype: torch.dtype
    batch: int
    heads: int
    heads_k: int
    len_q: int
    len_k: int
    dim: int
    dim_v: int
    masking: str
    causal: bool
    window_size: tuple[int | None, int | None]
    bias: tuple[int, int] | None
    sinks: bool
    softcap: float | None
    dropout_p: float
    scale: float | None
    strides: str
    gain: float
    blocks: int | None
    #: ALiBi slopes of the "heads", or of each head of each batch row ("rows").
    alibi: str | None = None

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        fields["dtype"] = str(self.dtype).removeprefix("torch.")
        return " ".join(f"{name}={value}" for name, value in fields.items() if value not in (None, False, 0.0))


def _with_yardstick(case: Case) -> Case:
    """The case, its softmax flattened and without sinks where the queries are so few that all of them may see but one
    key, or hardly more than one: the same cancellation as where there is one, and one rounding of ours against one of
    eager attention's. Nearly all weight on one of two keys is enough, which ordinary scores bring about now and then.
    """
    few = min(case.len_q, case.len_k) <= 2
    return dataclasses.replace(case, gain=1.0, scale=0.01, sinks=False) if few else case


def random_case(seed: int, *, dtypes: tuple[torch.dtype, ...], max_len: int, dims: tuple[int, ...]) -> Case:
    """A case that is a function of its seed and limits alone."""
    r = random.Random(seed)
    masking = r.choice(MASKS)
    heads_k = r.choice((1, 1, 2, 3))
    dim = r.choice(dims)
    lengths = [n for n in LENGTHS if n <= max_len]
    len_q, len_k = r.choice(lengths), r.choice(lengths)
    if r.random() < 0.5:
        len_q = len_k
    window_size = r.choice([(None, None)] * 3 + [(r.randrange(max_len), None), (r.randrange(40), r.randrange(40))])
    dropout_p = r.choice((0.0, 0.0, 0.0, 0.1, 0.17, 0.5))
    if len_k < 15 or window_size[0] is not None:
        # A query with one visible key has gradients of exactly 0, in eager attention too: there is no yardstick for
        # a kernel that, like every FlashAttention, takes the rounded output for its delta.
        dropout_p = 0.0
    case = Case(
        seed=seed,
        dtype=r.choice(dtypes),
        batch=r.choice((1, 2, 3)),
        heads=heads_k * r.choice((1, 1, 2, 4)),
        heads_k=heads_k,
        len_q=len_q,
        len_k=len_k,
        dim=dim,
        dim_v=r.choice((dim, dim, r.choice(dims))),
        masking=masking,
        causal=r.random() < 0.5,
        window_size=window_size,
        bias=None if r.random() < 0.6 else (int(masking != "cu_seqlens" and r.random() < 0.5), r.randrange(2)),
        sinks=r.random() < 0.2,
        softcap=r.choice((None, None, None, 5.0, 50.0)),
        dropout_p=dropout_p,
        scale=r.choice((None, None, None, 1.0, 0.05)),
        strides=r.choice(("bhsd", "bshd", "sliced", "fused")),
        gain=r.choice((1.0, 1.0, 3.0)),
        blocks=r.choice((None, None, None, 32, 64, 128)),
        alibi=r.choice((None, None, None, "heads", "rows")),
    )
    return _with_yardstick(case)


def _lengths(r: random.Random, n: int, high: int, dropout: bool) -> list[int]:
    # One full length, so that there are queries with more than one key, and eager attention has errors to compare.
    rest = [r.choice((0, 1, high, r.randint(0, high), r.randint(0, high))) for _ in range(n - 1)]
    rest = [max(length, 15) if dropout and length else length for length in rest]
    return r.sample([high, *rest], n)


def _cumulative(lengths: list[int], device) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _placed(values: torch.Tensor, strides: str) -> torch.Tensor:
    """The same `(B, H, S, D)` values under other strides, with NaN in whatever memory lies between."""
    b, h, s, d = values.shape
    if strides == "bhsd":
        return values
    if strides == "bshd":
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    if strides == "sliced":
        room = torch.full((b, h, s + 3, d + 5), float("nan"), dtype=values.dtype, device=values.device)
        view = room[:, :, 1 : s + 1, 2 : d + 2]
    else:
        room = torch.full((b, s, 3, h, d), float("nan"), dtype=values.dtype, device=values.device)
        view = room[:, :, 1].transpose(1, 2)
    view.copy_(values)
    return view


def _spec(case: Case, r: random.Random, g: torch.Generator, device) -> AttentionSpec:
    options = {"causal": case.causal, "window_size": case.window_size}
    b, lq, lk = case.batch, case.len_q, case.len_k
    if case.masking == "seqlens":
        options["seqlens_k"] = torch.tensor(_lengths(r, b, lk, case.dropout_p > 0.0), device=device, dtype=torch.int32)
        if r.random() < 0.5:
            options["seqlens_q"] = torch.tensor(_lengths(r, b, lq, False), device=device, dtype=torch.int64)
    elif case.masking == "key_padding":
        keep = torch.ones(b, 1, 1, lk, dtype=torch.bool)
        for row in range(b):
            pad = r.randint(0, lk)
            side = r.choice(("left", "right", "holes"))
            keep[row, ..., : pad if side == "left" else 0] = False
            keep[row, ..., lk - pad if side == "right" else lk :] = False
            if side == "holes":
                keep[row] = torch.rand(1, 1, lk, generator=g) < 0.7
        options["mask"] = keep.to(device)
    elif case.masking == "segments":
        cuts_q, cuts_k = (torch.rand(b, n, generator=g) < 3.0 / n for n in (lq, lk))
        ids_q, ids_k = cuts_q.cumsum(1).to(torch.int32), cuts_k.cumsum(1).to(torch.int32)
        if r.random() < 0.5 and lk > 4:
            ids_k[:, -3:] = -1
        if lq == lk and r.random() < 0.7:
            ids_q = ids_k.clone()
        options |= {"segment_ids_q": ids_q.to(device), "segment_ids_k": ids_k.to(device)}
    elif case.masking in ("dense", "mixed"):
        shape = (r.choice((1, b)), r.choice((1, case.heads)), r.choice((1, lq)), lk)
        options["mask"] = (torch.rand(shape, generator=g) < 0.6).to(device)
        if case.masking == "mixed":
            options["segment_ids_k"] = (torch.rand(b, lk, generator=g) < 0.3).to(device, torch.int32) * -1
    elif case.masking == "starts":
        ends = _lengths(r, b, lk, case.dropout_p > 0.0)
        options["starts_k"] = lk - torch.tensor(ends, device=device)
        if r.random() < 0.5:
            options["starts_q"] = lq - torch.tensor(_lengths(r, b, lq, False), device=device)
        if r.random() < 0.5:
            options["segment_ids_k"] = (torch.rand(b, lk, generator=g) < 0.1).to(device, torch.int32) * -1
    elif case.masking == "offset_tensor":
        options["query_offset"] = torch.tensor([r.randint(-lq, lk)], device=device)
    return AttentionSpec(**options)


def _layout(size: int, batch: int, heads: int, len_q: int, len_k: int, r: random.Random, g, device) -> BlockLayout:
    """Random blocks, full and partial ones, of which some rows and columns have none."""
    rows, columns = (max(1, -(-n // size)) for n in (len_q, len_k))
    shape = (r.choice((1, batch)), r.choice((1, heads)), rows, columns)
    masks = torch.rand(3, size, size, generator=g) < 0.6
    masks[1].tril_()
    masks[2, : size // 2] = False
    kinds = r.choice(((0, 1), (0, 1, 1, 2, 3, 4), (1, 1, 2)))
    grid = torch.tensor(kinds, dtype=torch.int32)[torch.randint(len(kinds), shape, generator=g)]
    return BlockLayout(grid, size, masks if 2 in kinds else None).to(device)


@dataclasses.dataclass
class Problem:
    """Tensors of a case. `sizes` are those of q and k after packing."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    spec: AttentionSpec
    options: dict


def make_problem(case: Case, device: torch.device | str) -> Problem:
    """Random tensors of a case, the same on every device. Dead memory holds NaN."""
    r = random.Random(case.seed + 1)
    g = torch.Generator().manual_seed(case.seed)
    batch_q = batch_k = case.batch
    len_q, len_k = case.len_q, case.len_k
    if case.masking == "cu_seqlens":
        n = case.batch + 2
        lengths_q, lengths_k = _lengths(r, n, len_q, False), _lengths(r, n, len_k, case.dropout_p > 0.0)
        if r.random() < 0.5:
            lengths_q = lengths_k
        options = {"causal": case.causal, "window_size": case.window_size}
        pack_q, pack_k = r.choice(((True, True), (True, True), (False, True), (True, False)))
        tail = r.choice((0, 0, 7))
        if pack_q:
            batch_q, len_q = 1, sum(lengths_q) + tail
            options["cu_seqlens_q"] = _cumulative(lengths_q, device)
        else:
            batch_q, len_q = n, max(1, max(lengths_q))
            options["seqlens_q"] = torch.tensor(lengths_q, device=device)
        if pack_k:
            batch_k, len_k = 1, sum(lengths_k) + tail
            options["cu_seqlens_k"] = _cumulative(lengths_k, device)
        else:
            batch_k, len_k = n, max(1, max(lengths_k))
            options["seqlens_k"] = torch.tensor(lengths_k, device=device)
        spec = AttentionSpec(**options)
        longest = max(1, max(lengths_q)), max(1, max(lengths_k))
    else:
        spec = _spec(case, r, g, device)
        longest = len_q, len_k
    if case.blocks is not None:
        batch = 1 if case.masking == "cu_seqlens" else batch_q
        layout = _layout(case.blocks, batch, case.heads, *longest, r, g, device)
        spec = dataclasses.replace(spec, layout=layout)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(device=device, dtype=case.dtype)

    q = _placed(draw(batch_q, case.heads, len_q, case.dim) * case.gain, case.strides)
    k = _placed(draw(batch_k, case.heads_k, len_k, case.dim), case.strides)
    v = _placed(draw(batch_k, case.heads_k, len_k, case.dim_v), r.choice(("bhsd", "bshd", "sliced")))
    dout = _placed(draw(batch_q, case.heads, len_q, case.dim_v), r.choice(("bhsd", "bshd", "sliced")))
    dlse = torch.randn(batch_q, case.heads, len_q, generator=g).to(device) * 0.1
    options = {"softmax_scale": case.scale, "softcap": case.softcap, "bias": None, "sinks": None}
    if case.bias is not None:
        rows, heads = (size if full else 1 for size, full in zip((batch_q, case.heads), case.bias, strict=True))
        if case.masking == "cu_seqlens":
            # By place in the sequence; a little more than the longest needs.
            len_q, len_k = longest[0] + 3, longest[1] + 1
        options["bias"] = draw(rows, heads, len_q, len_k)
        if r.random() < 0.3:
            options["bias"][..., : len_k // 2] = r.choice((float("-inf"), torch.finfo(case.dtype).min))
    if case.sinks:
        options["sinks"] = torch.randn(case.heads, generator=g).to(device)
    if case.alibi is not None:
        # From 1, whose weights fall off within a few keys, to 1/256, as ALiBi's own.
        shape = (batch_q, case.heads) if case.alibi == "rows" else (case.heads,)
        options["alibi_slopes"] = 0.5 ** (8 * torch.rand(shape, generator=g)).to(device)
    for x in (q, k, v):
        x.requires_grad_()
    for name in ("bias", "sinks"):
        if options[name] is not None:
            options[name].requires_grad_()
    return Problem(q, k, v, dout, dlse, spec, options)


def dropout_keep(problem: Problem, case: Case, seed: torch.Tensor) -> torch.Tensor:
    """The keep mask `(B, Hq, Sq, Sk)` of a call in absolute keys, from the torch definition of the generator."""
    q, k = problem.q, problem.k
    batch, heads, len_q, len_k = *q.shape[:3], k.shape[2]
    keep = torch.zeros(batch, heads, len_q, len_k, dtype=torch.bool, device=q.device)
    for q_row, q_begin, q_end, _, k_begin, k_end in sequence_ranges(problem.spec, q, k):
        batch_head = torch.arange(q_row * heads, (q_row + 1) * heads, device=q.device)
        queries = torch.arange(q_begin, q_end, device=q.device)
        keep[q_row, :, q_begin:q_end, k_begin:k_end] = keep_mask(
            seed, drop_threshold(case.dropout_p), batch_head, queries, (0, k_end - k_begin)
        )
    return keep


def run(problem: Problem, case: Case, backend: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """`out`, `lse` and every gradient of `attention`."""
    torch.manual_seed(seed)
    out, lse = attention(
        problem.q, problem.k, problem.v, problem.spec, **problem.options, dropout_p=case.dropout_p, return_lse=True,
        backend=backend,
    )  # fmt: skip
    return {"out": out, "lse": lse, **_gradients(problem, out, lse)}


def expected(problem: Problem, case: Case, dtype: torch.dtype | None, seed: int = 0) -> dict[str, torch.Tensor]:
    """What `run` should give: by the oracle in `dtype`, or in the problem's own precision (None)."""
    keep, dropout_p = None, 0.0
    if case.dropout_p > 0.0:
        torch.manual_seed(seed)
        drawn = torch.randint(torch.iinfo(torch.int64).max, (1,), dtype=torch.int64, device=problem.q.device)
        keep, dropout_p = dropout_keep(problem, case, drawn), drop_threshold(case.dropout_p) / 2**16
    out, lse = reference_attention(
        problem.q, problem.k, problem.v, problem.spec, **problem.options, dropout_p=dropout_p, keep=keep, dtype=dtype
    )
    return {"out": out, "lse": lse, **_gradients(problem, out, lse)}


def _gradients(problem: Problem, out: torch.Tensor, lse: torch.Tensor) -> dict[str, torch.Tensor]:
    names = {"dq": problem.q, "dk": problem.k, "dv": problem.v}
    names |= {f"d{n}": problem.options[n] for n in ("bias", "sinks") if problem.options[n] is not None}
    seen = lse > float("-inf")
    loss = (out * problem.dout.to(out.dtype)).sum() + (lse.masked_fill(~seen, 0.0) * problem.dlse).sum()
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def worst_ratio(case: Case, device: torch.device | str, backend: str) -> dict[str, float]:
    """Error over allowed error for each result of a case; above 1 fails.

    FlashAttention's rule: the largest error against float64 is at most 2 times (gradients: 3 times) that of eager
    attention in the tensors' own precision, plus a rounding of the largest value in that precision. Gradients of q
    and k are differences of equal terms where a query sees one key: eager gets 0 there, kernels that recompute get
    float32 roundings of the terms, which `cancelled` allows for. `dv` is a sum over all queries that see a key, see
    `accumulation_error`.
    """
    problem = make_problem(case, device)
    truth = expected(problem, case, torch.float64)
    native = expected(problem, case, None)
    ours = run(problem, case, backend)
    scale = case.scale if case.scale is not None else case.dim**-0.5
    q, k, v, dout = (_largest(x) for x in (problem.q, problem.k, problem.v, problem.dout))
    eps32, eps = torch.finfo(torch.float32).eps, torch.finfo(case.dtype).eps
    cancelled = 4 * eps32 * case.dim_v**0.5 * v * dout
    score = scale * q * k * case.dim**0.5
    floor = {
        "out": eps32 * score * v,
        "lse": eps32 * score,
        "dq": cancelled * scale * k,
        "dk": cancelled * scale * q,
        "dv": eps32 * score * dout + accumulation_error(problem, case),
        "dbias": cancelled,
        "dsinks": 2 * eps * (truth["out"].detach() * problem.dout).norm().item(),
    }
    ratios = {}
    for name, want in truth.items():
        got = ours[name].double()
        if not torch.equal(torch.isinf(got), torch.isinf(want)) or torch.isnan(got).any():
            ratios[name] = float("inf")
            continue
        finite = ~torch.isinf(want)
        error, yardstick = (_largest(x[finite].double() - want[finite].double()) for x in (got, native[name]))
        precision = torch.float32 if name in ("lse", "dsinks") else case.dtype
        allowed = (3 if name.startswith("d") else 2) * yardstick + floor.get(name, 0.0)
        allowed += 2 * torch.finfo(precision).eps * (_largest(want[finite]) + 1e-3)
        ratios[name] = error / allowed
    return ratios


def accumulation_error(problem: Problem, case: Case) -> float:
    """Error of `dv = sum_q p[q] * dout[q]` where one float32 accumulator takes its n terms one after another.

    Adding to a partial sum S costs 0.2 eps |S| (standard deviation of a rounding). Partial sums of independent terms
    grow to sqrt(m) rms(dout), where m is the sum of the weights of a key, so that n additions cost
    0.2 eps sqrt(m n / 2) rms(dout); the largest of some hundred elements is six to nine times as large, as sums that
    drift far stay far. Eager attention adds up in an order of its library's choosing, often pairwise, with hardly any
    error: where all queries see one key and nothing else, m = n, it is no yardstick for this.
    """
    terms = case.len_q * (case.heads // case.heads_k)
    ones = dataclasses.replace(problem, dout=torch.ones_like(problem.dout), dlse=torch.zeros_like(problem.dlse))
    weight = _largest(expected(ones, case, torch.float64)["dv"])
    rms = problem.dout.double().pow(2).mean().sqrt().item() if problem.dout.numel() else 0.0
    return 1.25 * torch.finfo(torch.float32).eps * (weight * terms) ** 0.5 * rms


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
