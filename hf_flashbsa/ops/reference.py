"""The oracle: attention written as its definition, in plain differentiable torch, one sequence at a time.

Slow and quadratic in memory, for tests and for reading. Shares no code with the kernels.
"""

from __future__ import annotations

import math

import torch

from hf_flashbsa.masks.spec import AttentionSpec


def sequence_ranges(
    spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor
) -> list[tuple[int, int, int, int, int, int]]:
    """`(q_row, q_begin, q_end, k_row, k_begin, k_end)` of each independent sequence of a call."""

    def side(
        cu: torch.Tensor | None, lengths: torch.Tensor | None, starts: torch.Tensor | None, x: torch.Tensor
    ) -> list[tuple[int, int, int]]:
        if cu is not None:
            edges = cu.tolist()
            return [(0, begin, end) for begin, end in zip(edges[:-1], edges[1:], strict=True)]
        ends = [x.shape[2]] * x.shape[0] if lengths is None else lengths.tolist()
        begins = [0] * x.shape[0] if starts is None else starts.tolist()
        return [(row, min(begin, end), end) for row, (begin, end) in enumerate(zip(begins, ends, strict=True))]

    queries = side(spec.cu_seqlens_q, spec.seqlens_q, spec.starts_q, q)
    keys = side(spec.cu_seqlens_k, spec.seqlens_k, spec.starts_k, k)
    return [(*a, *b) for a, b in zip(queries, keys, strict=True)]


def _keys_ahead(spec: AttentionSpec, n_q: int, n_k: int, device: torch.device) -> torch.Tensor:
    """int64 `(n_q, n_k)`: by how many positions each key of one sequence stands behind (> 0) each query."""
    offset = n_k - n_q if spec.query_offset is None else int(spec.query_offset)
    return torch.arange(n_k, device=device) - (torch.arange(n_q, device=device)[:, None] + offset)


def _visible(spec: AttentionSpec, q_row: int, q: slice, k_row: int, k: slice, device: torch.device) -> torch.Tensor:
    """bool `(1 or H, q, k)`: which scores of one sequence exist."""
    n_q, n_k = q.stop - q.start, k.stop - k.start
    ahead = _keys_ahead(spec, n_q, n_k, device)
    visible = torch.ones(1, n_q, n_k, dtype=torch.bool, device=device)
    if spec.causal:
        visible &= ahead <= 0
    left, right = spec.window_size
    if left is not None:
        visible &= ahead >= -left
    if right is not None:
        visible &= ahead <= right
    if spec.segment_ids_k is not None:
        ids_k = spec.segment_ids_k[k_row if len(spec.segment_ids_k) > 1 else 0, k]
        ids_q = torch.zeros(n_q, dtype=ids_k.dtype, device=device)
        if spec.segment_ids_q is not None:
            ids_q = spec.segment_ids_q[q_row if len(spec.segment_ids_q) > 1 else 0, q]
        visible &= (ids_q[:, None] == ids_k[None, :]) & (ids_k >= 0)[None, :]
    if spec.layout is not None:
        shown = spec.layout.to_mask(n_q, n_k)
        visible = visible & shown[q_row if len(shown) > 1 else 0]
    if spec.mask is not None:
        row = q_row if spec.mask.shape[0] > 1 else 0
        rows = q if spec.mask.shape[2] > 1 else slice(None)
        visible = visible & spec.mask[row, :, rows, k]
    return visible


def reference_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spec: AttentionSpec | None = None,
    *,
    bias: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    keep: torch.Tensor | None = None,
    dtype: torch.dtype | None = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`out` and `lse` of `hf_flashbsa.attention`, whose arguments these are, except:

    Args:
        dropout_p: the exact drop probability of `keep`, for the rescaling of kept weights.
        keep: bool `(B, Hq, Sq, Sk)` dropout mask in absolute rows and keys; required with `dropout_p > 0`.
        dtype: computes in this precision and returns it. None computes in the dtype of `q`, which is the native
            eager attention that low-precision kernels are measured against.
    """
    spec = spec or AttentionSpec()
    if (dropout_p > 0.0) != (keep is not None):
        raise ValueError("dropout_p > 0 needs `keep`, and `keep` needs dropout_p > 0.")
    dtype = dtype or q.dtype
    scale = 1.0 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    q, k, v = (x.to(dtype) for x in (q, k, v))
    heads, group = q.shape[1], q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    lse = torch.full(q.shape[:3], -math.inf, dtype=dtype, device=q.device)
    for q_row, q_begin, q_end, k_row, k_begin, k_end in sequence_ranges(spec, q, k):
        rows, keys = slice(q_begin, q_end), slice(k_begin, k_end)
        k_heads = k[k_row, :, keys].repeat_interleave(group, dim=0)
        v_heads = v[k_row, :, keys].repeat_interleave(group, dim=0)
        s = scale * (q[q_row, :, rows] @ k_heads.mT)
        if softcap is not None:
            s = softcap * torch.tanh(s / softcap)
        visible = _visible(spec, q_row, rows, k_row, keys, q.device)
        if bias is not None:
            b = _bias_of_sequence(spec, bias[q_row if bias.shape[0] > 1 else 0], q_end - q_begin, k_end - k_begin)
            s = s + b.to(dtype)
            visible = visible & (b > torch.finfo(bias.dtype).min)
        if alibi_slopes is not None:
            s = s - _alibi(spec, alibi_slopes, q_row, q_end - q_begin, k_end - k_begin).to(dtype)
        s = s.masked_fill(~visible, -math.inf)
        blind = (s == -math.inf).all(dim=-1, keepdim=True)
        s = s.masked_fill(blind, 0.0)
        if sinks is not None:
            s = torch.cat([s, sinks.to(dtype)[:, None, None].expand(heads, s.shape[1], 1)], dim=-1)
        p = torch.softmax(s, dim=-1)[..., : k_end - k_begin]
        p = p.masked_fill(~visible, 0.0)
        if keep is not None:
            p = p * keep[q_row, :, rows, keys] / (1.0 - dropout_p)
        total = torch.logsumexp(s, dim=-1).masked_fill(blind[..., 0], -math.inf)
        out = out.index_put(_index(q_row, heads, rows, q.device), p @ v_heads)
        lse = lse.index_put(_index(q_row, heads, rows, q.device), total)
    return out, lse


def _alibi(spec: AttentionSpec, slopes: torch.Tensor, q_row: int, n_q: int, n_k: int) -> torch.Tensor:
    """float64 `(H, n_q, n_k)`: slope times distance of the queries and keys of a sequence in batch row `q_row`."""
    if slopes.ndim == 2:
        slopes = slopes[q_row if len(slopes) > 1 else 0]
    return slopes.double()[:, None, None] * _keys_ahead(spec, n_q, n_k, slopes.device).abs()


def _bias_of_sequence(spec: AttentionSpec, bias: torch.Tensor, n_q: int, n_k: int) -> torch.Tensor:
    """The part `(H or 1, n_q or 1, n_k)` of one batch row of a bias, counted from the first rows of the sequence."""
    if spec.cu_seqlens_q is not None or spec.cu_seqlens_k is not None:
        bias = bias[:, :n_q, :n_k]
        missing = (0, n_k - bias.shape[2], 0, n_q - bias.shape[1])
        return torch.nn.functional.pad(bias, missing, value=-math.inf)
    return bias[:, slice(0, n_q) if bias.shape[1] > 1 else slice(None), :n_k]


def _index(row: int, heads: int, rows: slice, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices of `x[row, :, rows]` for an out-of-place write that autograd follows."""
    return (
        torch.full((1, 1), row, device=device),
        torch.arange(heads, device=device)[:, None],
        torch.arange(rows.start, rows.stop, device=device)[None, :],
    )
