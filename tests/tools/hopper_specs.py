"""Masks and tensors for the Hopper kernels, in which each program has several tiles."""

from __future__ import annotations

import torch

from hf_flashbsa import BlockLayout
from hf_flashbsa.masks.spec import AttentionSpec

DEVICE = "cuda"
#: The last tile is cut short.
LENGTH = 1500
#: Programs of a forward call, and the choice among the options of each kernel (`every_call_on_hopper`).
LAUNCHES = [(1, 0), (3, 1), (132, 0), (132, 1), (6, 2)]


def packed() -> dict[str, torch.Tensor]:
    cu_seqlens = torch.tensor([0, 1, 130, 130, 700, LENGTH], dtype=torch.int32, device=DEVICE)
    return {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}


def padding() -> torch.Tensor:
    """Ids, 0 or -1, of two rows: with padding on both sides, and in many places."""
    live = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.7
    live[0] = (torch.arange(LENGTH) >= 100) & (torch.arange(LENGTH) < LENGTH - 333)
    return live.to(DEVICE, torch.int32) - 1


def documents(shortest: int = 100) -> torch.Tensor:
    """Ids of two rows of documents, whose lengths differ."""
    position = torch.arange(LENGTH, device=DEVICE)
    return torch.stack([position // (3 * shortest), position // shortest]).to(torch.int32)


def layout(kinds: tuple[int, ...], heads: int = 1) -> BlockLayout:
    """Random blocks of `kinds`: 0 none, 1 full, 2 to 4 partial. Block row 5 and block column 2 have none."""
    g = torch.Generator().manual_seed(0)
    grid = torch.tensor(kinds, dtype=torch.int32)[torch.randint(len(kinds), (1, heads, 12, 12), generator=g)]
    grid[:, :, 5] = 0
    grid[..., 2] = 0
    masks = torch.rand(3, 128, 128, generator=g) < 0.6
    masks[1].tril_()
    masks[2, :64] = False
    return BlockLayout(grid, 128, masks if max(kinds) > 1 else None).to(DEVICE)


SPECS = {
    "full": AttentionSpec,
    "causal": lambda: AttentionSpec(causal=True),
    "window": lambda: AttentionSpec(causal=True, window_size=(300, None)),
    "lengths": lambda: AttentionSpec(seqlens_k=torch.tensor([LENGTH, 77], device=DEVICE)),
    "lengths of queries": lambda: AttentionSpec(
        causal=True,
        seqlens_q=torch.tensor([70, LENGTH - 3], device=DEVICE),
        seqlens_k=torch.tensor([70, LENGTH - 3], device=DEVICE),
    ),
    "packed": lambda: AttentionSpec(causal=True, **packed()),
    "padding": lambda: AttentionSpec(causal=True, segment_ids_k=padding()),
    "documents": lambda: AttentionSpec(segment_ids_q=documents(), segment_ids_k=documents()),
    "documents and padding": lambda: AttentionSpec(
        causal=True, window_size=(200, None), segment_ids_q=documents(), segment_ids_k=documents() + padding() * LENGTH
    ),
    "very short documents": lambda: AttentionSpec(segment_ids_q=documents(3), segment_ids_k=documents(3)),
    "layout": lambda: AttentionSpec(layout=layout((0, 0, 1))),
    "layout of partial blocks": lambda: AttentionSpec(layout=layout((0, 2, 3, 4))),
    "causal layout": lambda: AttentionSpec(causal=True, layout=layout((0, 1, 2, 3, 4))),
    "layout per head": lambda: AttentionSpec(layout=layout((0, 0, 1, 2, 3, 4), heads=4)),
    "layout, lengths and window": lambda: AttentionSpec(
        causal=True,
        window_size=(500, None),
        seqlens_k=torch.tensor([LENGTH - 50, 777], device=DEVICE),
        layout=layout((0, 1, 1, 2, 3)),
    ),
    "packed layout": lambda: AttentionSpec(causal=True, layout=layout((0, 1, 1, 2, 3, 4)), **packed()),
}


def made(batch: int, heads_k: int, head_dim: int) -> list[torch.Tensor]:
    """Random q, k, v and gradient of the output."""
    g = torch.Generator(DEVICE).manual_seed(1)
    return [
        torch.randn(batch, LENGTH, heads, head_dim, device=DEVICE, generator=g).bfloat16().transpose(1, 2)
        for heads in (4, heads_k, heads_k, 4)
    ]


def tensors_for(name: str, head_dim: int) -> list[torch.Tensor]:
    """Those of `made` that one of `SPECS` is for."""
    return made(1 if "packed" in name else 2, 4 if "per head" in name else 2, head_dim)


def results(function, tensors, dout, spec) -> list[torch.Tensor]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves, spec)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))]
