"""The problems that attention is timed on: sizes and masks, their tensors, their FLOPs and a float32 reference."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import torch

from hf_flashbsa.bench.layouts import layout_of, live_scores
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.spec import AttentionSpec, padding_segment_ids
from hf_flashbsa.ops.reference import reference_attention

MASKS = ("full", "causal", "window", "padded", "packed", "packed-causal", "packed-ids", "packed-cross")
PASSES = ("forward", "backward", "both")
#: FLOPs of a pass relative to the forward's two matrix products; the backward counts five, recomputation included.
FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
#: Document lengths like those of XSum in tokens: log-normal, cut at the longest that the case has.
MEAN_LENGTH, SIGMA, SHORTEST = 437.0, 0.7, 16
#: Queries of each document in cross-attention, the mean length of an XSum summary in tokens.
CROSS_QUERIES = 28
#: Most scores that the reference holds at once.
REFERENCE_SCORES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `mask` is one of `MASKS`; `length` is that of a batch row, or the longest document's.

    "window" is causal and sees `window` earlier keys; "padded" rows hold documents of different lengths; "packed" is
    one row of `batch * length` tokens in documents of such lengths, "packed-ids" is "packed-causal" with segment ids
    for cumulative lengths, and "packed-cross" has `CROSS_QUERIES` queries for each document. `pattern` names a
    block layout of `layouts.PATTERNS`, and `chance` is a block's to be visited under "random".

    Raises:
        ValueError: fields that do not go together.
    """

    mask: str
    batch: int
    heads: int
    heads_k: int
    length: int
    head_dim: int
    dtype: str = "bfloat16"
    dropout_p: float = 0.0
    bias: bool = False
    window: int = 256
    pattern: str | None = None
    chance: float | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.mask == "packed-cross" and self.bias:
            raise ValueError("bias: there is none for the mask 'packed-cross'; time it without.")
        if self.pattern is not None and self.is_packed and self.bias:
            raise ValueError("bias: packed documents have none together with a pattern; time it without.")
        if self.pattern is not None and self.mask in ("window", "packed-ids", "packed-cross"):
            raise ValueError(f"pattern: {self.pattern!r} is not timed with the mask {self.mask!r}; take another one.")
        if (self.pattern is None) != (self.block_size is None):
            raise ValueError("pattern, block_size: give both, or none of them.")
        if (self.pattern == "random") != (self.chance is not None):
            raise ValueError("chance: give one for the pattern 'random', and none for others.")

    @property
    def is_packed(self) -> bool:
        return self.mask.startswith("packed")

    @property
    def is_causal(self) -> bool:
        return self.mask in ("causal", "window", "packed-causal", "packed-ids")

    @functools.cached_property
    def documents(self) -> list[int]:
        """Lengths of the documents, a function of the case alone."""
        if self.mask != "padded" and not self.is_packed:
            return [self.length] * self.batch
        r, room, lengths = random.Random(0), self.batch * self.length, []
        while sum(lengths) < room if self.is_packed else len(lengths) < self.batch:
            drawn = round(r.lognormvariate(math.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA))
            lengths.append(min(max(drawn, SHORTEST), self.length))
        if self.is_packed:
            lengths[-1] -= sum(lengths) - room
        return lengths

    @property
    def queries(self) -> list[int]:
        """How many queries each document has."""
        return [CROSS_QUERIES] * len(self.documents) if self.mask == "packed-cross" else self.documents

    @property
    def layout(self) -> BlockLayout | None:
        """The block layout, on the CPU."""
        if self.pattern is None:
            return None
        return layout_of(self.pattern, self.chance, self.length, self.block_size, self.is_causal, self.heads)

    @property
    def dense(self) -> Case:
        """The same problem without its layout."""
        return dataclasses.replace(self, pattern=None, chance=None, block_size=None)

    @property
    def live_scores(self) -> float:
        """Scores of one head that exist. Causal without a layout counts half of a square, as is the custom."""
        if self.layout is not None:
            counts = {n: live_scores(self.layout, n, self.is_causal) for n in set(self.documents)}
            return sum(counts[n] for n in self.documents)
        if self.mask == "window":
            seen = min(self.window + 1, self.length)
            return self.batch * (seen * (seen + 1) / 2 + (self.length - seen) * seen)
        if self.mask == "packed-cross":
            return CROSS_QUERIES * sum(self.documents)
        return sum(n * n for n in self.documents) * (0.5 if self.is_causal else 1.0)

    def flops(self, pass_: str) -> float:
        """Floating-point operations of a pass on live scores."""
        return 4.0 * self.heads * self.head_dim * self.live_scores * FLOP_FACTOR[pass_]

    def fields(self) -> dict:
        """The fields as a row of results has them, with the layout's density: visited blocks over all blocks, of which
        there are none above the diagonal where attention is causal."""
        density = None if self.layout is None else round(self.layout.density(self.is_causal), 4)
        return dataclasses.asdict(self) | {"density": density}


@dataclasses.dataclass
class Inputs:
    """Tensors of a case: `q`, `dout` `(B, H, S, D)`, `k`, `v` `(B, Hkv, S, D)` laid out in memory as `(B, S, H, D)`,
    `bias` `(1, H, S, S)` or None, and for ragged cases the documents' `lengths` and the cumulative lengths of queries
    and keys, int32. Rows of `dout` are 0 at padding, which no loss depends on."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    bias: torch.Tensor | None
    lengths: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What gradients are taken for."""
        return (self.q, self.k, self.v) + (() if self.bias is None else (self.bias,))

    @functools.cached_property
    def live(self) -> torch.Tensor:
        """bool `(B, S)`: which rows are no padding."""
        return torch.arange(self.k.shape[2], device=self.k.device) < self.lengths[:, None]

    @functools.cached_property
    def document_q(self) -> torch.Tensor:
        """int32 `(1, T)`: the number of each packed query's document."""
        return _document(self.cu_seqlens_q, self.q.shape[2])

    @functools.cached_property
    def document_k(self) -> torch.Tensor:
        """int32 `(1, T)`: the number of each packed key's document."""
        return _document(self.cu_seqlens_k, self.k.shape[2])

    @functools.cached_property
    def layout(self) -> BlockLayout | None:
        """The block layout, on the device of the tensors."""
        return None if self.case.layout is None else self.case.layout.to(self.q.device)

    @functools.cached_property
    def spec(self) -> AttentionSpec:
        """The mask as the plugin makes it: padding as segment ids, packed documents as cumulative lengths, or where
        there are none or a bias rules them out, as segment ids."""
        case, layout = self.case, self.layout
        window_size = (case.window, None) if case.mask == "window" else (None, None)
        if case.mask == "packed-ids" or (case.is_packed and case.bias):
            ids = self.document_k
            return AttentionSpec(case.is_causal, segment_ids_q=ids, segment_ids_k=ids)
        if case.is_packed:
            ragged = {"cu_seqlens_q": self.cu_seqlens_q, "cu_seqlens_k": self.cu_seqlens_k}
            return AttentionSpec(case.is_causal, **ragged, layout=layout)
        ids = padding_segment_ids(self.live) if case.mask == "padded" else None
        return AttentionSpec(case.is_causal, window_size, segment_ids_k=ids, layout=layout)

    @functools.cached_property
    def mask(self) -> torch.Tensor | None:
        """bool, broadcasts to `(B, H, Sq, Sk)`, for implementations that take nothing better; None where all is
        visible."""
        case, device = self.case, self.q.device
        if case.pattern is None and case.mask in ("full", "padded"):
            return None if case.mask == "full" else self.live[:, None, None]
        queries, keys = (torch.arange(x.shape[2], device=device) for x in (self.q, self.k))
        ahead = keys - queries[:, None]
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if case.is_causal:
            visible &= ahead <= 0
        if case.mask == "window":
            visible &= ahead >= -case.window
        if case.is_packed:
            visible &= self.document_q.T == self.document_k
        visible = visible[None, None]
        if case.pattern is not None:
            visible = visible & self._visible_by_layout()
        return visible & self.live[:, None, None] if case.mask == "padded" else visible

    def _visible_by_layout(self) -> torch.Tensor:
        """bool `(1, H or 1, S, S)`: what the layout shows, of packed documents from the first token of each."""
        if not self.case.is_packed:
            return self.layout.to_mask(self.case.length, self.case.length)
        total = self.k.shape[2]
        visible = torch.zeros(*self.layout.grid.shape[:2], total, total, dtype=torch.bool, device=self.k.device)
        begin = 0
        for length in self.case.documents:
            own = slice(begin, begin + length)
            visible[:, :, own, own] = self.layout.to_mask(length, length)
            begin += length
        return visible


def _document(cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    position = torch.arange(total, device=cu_seqlens.device, dtype=torch.int32)
    return torch.searchsorted(cu_seqlens[1:], position, right=True, out_int32=True)[None]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random tensors of a case, the same for every implementation."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    batch, length_q, length = case.batch, case.length, case.length
    if case.is_packed:
        batch, length_q, length = 1, sum(case.queries), sum(case.documents)

    def draw(heads: int, length: int) -> torch.Tensor:
        x = torch.randn(batch, length, heads, case.head_dim, device=device, dtype=dtype, generator=generator)
        return x.transpose(1, 2)

    q, dout = draw(case.heads, length_q), draw(case.heads, length_q)
    k, v = draw(case.heads_k, length), draw(case.heads_k, length)
    bias = None
    if case.bias:
        bias = torch.randn(1, case.heads, length, length, device=device, dtype=dtype, generator=generator)
    lengths = torch.tensor(case.documents, device=device, dtype=torch.int32)
    queries = torch.tensor(case.queries, device=device, dtype=torch.int32)
    cu_seqlens = (torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (queries, lengths))
    inputs = Inputs(case, q, k, v, dout, bias, lengths, *cu_seqlens)
    if case.mask == "padded":
        dout.masked_fill_(~inputs.live[:, None, :, None], 0.0)
    for x in inputs.leaves:
        x.requires_grad_()
    return inputs


def reference_error(inputs: Inputs, out: torch.Tensor, gradients: tuple[torch.Tensor, ...] | None) -> float | None:
    """Relative error in norm of `out`, or of the worst of `dq, dk, dv`, against float32 on batch row 0, key head 0.

    None with dropout, whose mask implementations draw as they like, and where the reference needs too much memory.
    """
    case, group = inputs.case, inputs.case.heads // inputs.case.heads_k
    longest = inputs.q.shape[2] if case.bias else max(case.documents)
    if case.dropout_p > 0.0 or group * longest**2 > REFERENCE_SCORES:
        return None
    spec = inputs.spec
    if case.mask == "padded":
        spec = dataclasses.replace(spec, segment_ids_k=spec.segment_ids_k[:1])
    if spec.layout is not None:
        layout = spec.layout
        spec = dataclasses.replace(spec, layout=dataclasses.replace(layout, grid=layout.grid[:, :group]))
    q, k, v = (x.detach()[:1, : group if x is inputs.q else 1].float() for x in (inputs.q, inputs.k, inputs.v))
    bias = None if inputs.bias is None else inputs.bias.detach()[:, :group].float()
    live = slice(None) if case.is_packed else slice(0, case.documents[0])
    for x in (q, k, v):
        x.requires_grad_(gradients is not None)
    want, _ = reference_attention(q, k, v, spec, bias=bias, dtype=torch.float32)
    if gradients is None:
        return _relative(out.detach()[:1, :group, live], want[:, :, live])
    wanted = torch.autograd.grad(want, (q, k, v), inputs.dout[:1, :group].float())
    pairs = zip(gradients[:3], wanted, strict=True)
    return max(_relative(got[:1, : w.shape[1], live], w[:, :, live]) for got, w in pairs)


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got.float() - want).norm() / want.norm()).item()
