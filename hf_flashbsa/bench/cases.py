"""The problems that attention is timed on: sizes and masks, their tensors, their FLOPs and a float32 reference."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import torch

from hf_flashbsa.reference import reference_attention
from hf_flashbsa.spec import AttentionSpec

MASKS = ("full", "causal", "window", "padded", "packed", "packed-causal")
PASSES = ("forward", "backward", "both")
#: FLOPs of a pass relative to the forward's two matrix products; the backward counts five, recomputation included.
FLOP_FACTOR = {"forward": 1.0, "backward": 2.5, "both": 3.5}
#: Document lengths like those of XSum in tokens: log-normal, cut at the longest that the case has.
MEAN_LENGTH, SIGMA, SHORTEST = 437.0, 0.7, 16
#: Most scores that the reference holds at once.
REFERENCE_SCORES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Case:
    """One problem. `mask` is one of `MASKS`; `length` is that of a batch row, or the longest document's.

    "window" is causal and sees `window` earlier keys; "padded" rows hold documents of different lengths; "packed" is
    one row of `batch * length` tokens in documents of such lengths.
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

    @property
    def is_packed(self) -> bool:
        return self.mask.startswith("packed")

    @property
    def is_causal(self) -> bool:
        return self.mask in ("causal", "window", "packed-causal")

    @functools.cached_property
    def documents(self) -> list[int]:
        """Lengths of the documents, a function of the case alone."""
        if self.mask not in ("padded", "packed", "packed-causal"):
            return [self.length] * self.batch
        r, room, lengths = random.Random(0), self.batch * self.length, []
        while sum(lengths) < room if self.is_packed else len(lengths) < self.batch:
            drawn = round(r.lognormvariate(math.log(MEAN_LENGTH) - SIGMA**2 / 2, SIGMA))
            lengths.append(min(max(drawn, SHORTEST), self.length))
        if self.is_packed:
            lengths[-1] -= sum(lengths) - room
        return lengths

    @property
    def live_scores(self) -> float:
        """Scores of one head that exist. Causal counts half of a square, as is the custom."""
        if self.mask == "window":
            seen = min(self.window + 1, self.length)
            return self.batch * (seen * (seen + 1) / 2 + (self.length - seen) * seen)
        return sum(n * n for n in self.documents) * (0.5 if self.is_causal else 1.0)

    def flops(self, pass_: str) -> float:
        """Floating-point operations of a pass on live scores."""
        return 4.0 * self.heads * self.head_dim * self.live_scores * FLOP_FACTOR[pass_]


@dataclasses.dataclass
class Inputs:
    """Tensors of a case: `q`, `dout` `(B, H, S, D)`, `k`, `v` `(B, Hkv, S, D)` laid out in memory as `(B, S, H, D)`,
    `bias` `(1, H, S, S)` or None, and for ragged cases `lengths` and `cu_seqlens`, int32. Rows of `dout` are 0 at
    padding, which no loss depends on."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    bias: torch.Tensor | None
    lengths: torch.Tensor
    cu_seqlens: torch.Tensor

    @property
    def leaves(self) -> tuple[torch.Tensor, ...]:
        """What gradients are taken for."""
        return (self.q, self.k, self.v) + (() if self.bias is None else (self.bias,))

    @functools.cached_property
    def live(self) -> torch.Tensor:
        """bool `(B, S)`: which rows are no padding."""
        return torch.arange(self.q.shape[2], device=self.q.device) < self.lengths[:, None]

    @functools.cached_property
    def document(self) -> torch.Tensor:
        """int32 `(1, T)`: the number of each packed token's document."""
        position = torch.arange(self.q.shape[2], device=self.q.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:], position, right=True, out_int32=True)[None]

    @functools.cached_property
    def spec(self) -> AttentionSpec:
        """The mask as the plugin makes it: padding as segment ids, packed documents as cumulative lengths, or where
        a bias rules these out, as segment ids."""
        case = self.case
        window_size = (case.window, None) if case.mask == "window" else (None, None)
        if case.is_packed and case.bias:
            return AttentionSpec(case.is_causal, segment_ids_q=self.document, segment_ids_k=self.document)
        if case.is_packed:
            return AttentionSpec(case.is_causal, cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=self.cu_seqlens)
        ids = self.live.to(torch.int32) - 1 if case.mask == "padded" else None
        return AttentionSpec(case.is_causal, window_size, segment_ids_k=ids)

    @functools.cached_property
    def mask(self) -> torch.Tensor | None:
        """bool `(B or 1, 1, S or 1, S)` for implementations that take nothing better; None where all is visible."""
        case, device = self.case, self.q.device
        if case.mask == "padded":
            return self.live[:, None, None]
        if case.mask == "full":
            return None
        position = torch.arange(self.q.shape[2], device=device)
        ahead = position - position[:, None]
        visible = torch.ones_like(ahead, dtype=torch.bool)
        if case.is_causal:
            visible &= ahead <= 0
        if case.mask == "window":
            visible &= ahead >= -case.window
        if case.is_packed:
            visible &= self.document.T == self.document
        return visible[None, None]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Random tensors of a case, the same for every implementation."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, case.dtype)
    batch, length = (1, sum(case.documents)) if case.is_packed else (case.batch, case.length)

    def draw(heads: int) -> torch.Tensor:
        x = torch.randn(batch, length, heads, case.head_dim, device=device, dtype=dtype, generator=generator)
        return x.transpose(1, 2)

    q, dout, k, v = draw(case.heads), draw(case.heads), draw(case.heads_k), draw(case.heads_k)
    bias = None
    if case.bias:
        bias = torch.randn(1, case.heads, length, length, device=device, dtype=dtype, generator=generator)
    lengths = torch.tensor(case.documents, device=device, dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    inputs = Inputs(case, q, k, v, dout, bias, lengths, cu_seqlens)
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
        spec = AttentionSpec(segment_ids_k=spec.segment_ids_k[:1])
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
