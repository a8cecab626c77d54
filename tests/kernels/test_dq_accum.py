"""Gradients of queries that are added up in any order: who asks for them, and the kernels around dq_accum."""

from __future__ import annotations

import pytest
import torch

from hf_flashbsa import attention, use_deterministic
from hf_flashbsa.kernels.arguments import score_mod_of, tensor_view
from hf_flashbsa.kernels.call_plan import NO_TENSORS, CallPlan, CallScalars
from hf_flashbsa.kernels.triton.dq_accum import bwd_postprocess_kernel, bwd_preprocess_kernel
from hf_flashbsa.ops import api, autograd

BATCH, HEADS, LENGTH, DIM = 2, 3, 70, 64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def asked(monkeypatch):
    """What calls of `attention` ask the back ends for, in turn."""
    wishes, attend = [], autograd.attend

    def noted(q, k, v, plan, needs_grad):
        wishes.append(plan.scalars.deterministic)
        return attend(q, k, v, plan, needs_grad)

    monkeypatch.setattr(api, "attend", noted)
    yield wishes
    use_deterministic(True)
    torch.use_deterministic_algorithms(False)


def test_a_call_or_the_process_may_let_the_order_vary_and_torch_may_forbid_it(asked):
    q = torch.randn(1, 1, 5, 8, requires_grad=True)
    attention(q, q, q)
    attention(q, q, q, deterministic=False)
    use_deterministic(False)
    attention(q, q, q)
    attention(q, q, q, deterministic=True)
    torch.use_deterministic_algorithms(True)
    attention(q, q, q, deterministic=False)
    assert asked == [True, False, False, True, True]


def tensors(count: int) -> list[torch.Tensor]:
    """`(B, H, S, D)`, laid out as models have them."""
    return [torch.randn(BATCH, LENGTH, HEADS, DIM, device=DEVICE).bfloat16().transpose(1, 2) for _ in range(count)]


@pytest.mark.parametrize("with_dlse", [False, True])
def test_rows_are_made_and_sums_begin_at_zero(with_dlse):
    torch.manual_seed(0)
    dout, out = tensors(2)
    lse = torch.randn(BATCH, HEADS, LENGTH, device=DEVICE)
    lse[0, 1, 3] = float("-inf")
    dlse = torch.randn_like(lse) if with_dlse else None
    stats = torch.full((2, lse.numel()), float("nan"), device=DEVICE)
    dq_accum = torch.full((BATCH, HEADS, LENGTH, DIM), float("nan"), device=DEVICE)
    score_mod = score_mod_of(CallPlan(NO_TENSORS, CallScalars(1.0, None, None, None, 0, None, None, False, "triton")))
    bwd_preprocess_kernel[(BATCH * HEADS, 2)](
        tensor_view(dout), tensor_view(out), lse, dlse, stats, lse.numel(), dq_accum, score_mod, HEADS, LENGTH,
        HEAD_DIM=DIM, BLOCK_M=64,
    )  # fmt: skip
    assert torch.equal(dq_accum, torch.zeros_like(dq_accum))
    in_log2 = torch.where(lse == float("-inf"), float("inf"), lse * torch.log2(torch.tensor(torch.e)))
    delta = (dout.float() * out.float()).sum(-1) - (dlse if with_dlse else 0.0)
    torch.testing.assert_close(stats[0].view_as(lse), in_log2)
    torch.testing.assert_close(stats[1].view_as(lse), delta)


def test_sums_are_scaled_and_rounded():
    torch.manual_seed(0)
    (dq,) = tensors(1)
    dq_accum = torch.randn(BATCH, HEADS, LENGTH, DIM, device=DEVICE)
    bwd_postprocess_kernel[(BATCH * HEADS, 2)](
        tensor_view(dq), dq_accum, 0.125, HEADS, LENGTH, HEAD_DIM=DIM, BLOCK_M=64
    )
    assert torch.equal(dq, (dq_accum * 0.125).bfloat16())
