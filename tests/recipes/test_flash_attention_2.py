"""Transformers' flash_attention_2 computes padded cross-attention wrongly, and the recipes' repaired one rightly.

On the CPU the functions of flash_attn are played by plain torch with the same contract.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import modeling_flash_attention_utils as shipped
from transformers.utils import is_flash_attn_2_available
from transformers_models import assert_same, batch_for, run, tiny

from recipes.xsum import flash_attention_2 as repaired
from recipes.xsum.flash_attention_2 import REPAIRED


def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False):
    """`flash_attn_func`: `(B, S, H, D)`; a causal mask is aligned at the last query and the last key."""
    assert dropout_p == 0.0
    queries, keys = q.shape[1], k.shape[1]
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    if causal:
        seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
        scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
    """`flash_attn_varlen_func`: `(T, H, D)`, documents one behind the other; zeros where one has no keys."""
    lengths_q, lengths_k = (ends.diff().tolist() for ends in (cu_seqlens_q, cu_seqlens_k))
    assert max(lengths_q) == max_seqlen_q and max(lengths_k) == max_seqlen_k
    assert sum(lengths_q) == len(q) and sum(lengths_k) == len(k) == len(v)
    rows = zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    return torch.cat([dense(a[None], b[None], c[None], **options)[0] if len(b) else 0 * a for a, b, c in rows])


@pytest.fixture
def played(monkeypatch):
    functions = (dense, varlen, None, shipped._pad_input, shipped._unpad_input)
    monkeypatch.setattr(shipped, "_lazy_imports", lambda *args, **kwargs: functions)
    monkeypatch.setattr(shipped, "_loaded_implementation", None)
    monkeypatch.setattr(repaired, "is_flash_attn_2_available", lambda: True)


def bart(implementation: str, **changes) -> nn.Module:
    model = tiny("bart", "eager", **changes)
    # Past the checks for a GPU and an installed package; all parts of the model share one config.
    model.config._attn_implementation = implementation
    return model


@pytest.mark.parametrize("target_padding", [True, False], ids=["padded targets", "full targets"])
@pytest.mark.parametrize("length", [13, 7], ids=["longer source", "equal lengths"])
@pytest.mark.parametrize("padding", ["right", "left", "holes"])
def test_repaired_equals_eager(played, padding, length, target_padding):
    inputs = batch_for("bart", padding, length=length)
    if not target_padding:
        inputs.pop("decoder_attention_mask")
    assert_same(run(bart(REPAIRED), inputs), run(bart("eager"), inputs))


@pytest.mark.parametrize("length", [13, 7], ids=["longer source", "equal lengths"])
def test_the_one_of_transformers_does_not(played, length):
    inputs = batch_for("bart", "right", length=length)
    inputs.pop("decoder_attention_mask")
    with pytest.raises(AssertionError, match="logits: relative error"):
        assert_same(run(bart("flash_attention_2"), inputs), run(bart("eager"), inputs), tolerance=0.1)


def test_both_are_right_without_padding(played):
    inputs = batch_for("bart", "none")
    expected = run(bart("eager"), inputs)
    for implementation in ("flash_attention_2", REPAIRED):
        assert_same(run(bart(implementation), inputs), expected)


def test_sources_of_padding_only_give_zeros(played):
    """As bsa_dense; eager attention would give averages of padding."""
    inputs = batch_for("bart", "right")
    inputs["attention_mask"][1] = 0
    assert_same(run(bart(REPAIRED), inputs), run(bart("bsa_dense"), inputs))


def test_generation(played):
    inputs = {k: v for k, v in batch_for("bart", "left").items() if not k.startswith("decoder")}
    results = [
        bart(implementation).eval().generate(**inputs, max_new_tokens=6, num_beams=2, do_sample=False)
        for implementation in (REPAIRED, "eager")
    ]
    assert torch.equal(*results)


def test_errors_name_the_remedy(played, monkeypatch):
    with pytest.raises(ValueError, match="adds no position bias; use bsa_dense"):
        tiny("t5", REPAIRED)(**batch_for("t5", "none"))
    monkeypatch.setattr(repaired, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ImportError, match="fa2_repaired needs flash-attn: pip install"):
        tiny("bart", REPAIRED)(**batch_for("bart", "none"))


@pytest.mark.gpu
@pytest.mark.skipif(not is_flash_attn_2_available(), reason="needs a CUDA device and flash-attn")
def test_with_flash_attn():
    """In bfloat16: at most twice as far from float32 as eager attention is; Transformers' is far beyond that."""
    inputs = {k: v.cuda() for k, v in batch_for("bart", "right", length=150, target_length=70).items()}
    size = {"d_model": 64, "encoder_attention_heads": 1, "decoder_attention_heads": 1}

    def results(implementation: str, low_precision: bool) -> dict[str, torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=low_precision):
            logits, gradients = run(tiny("bart", implementation, **size).cuda(), inputs)
        # Gradients of key biases are 0 in exact arithmetic.
        return {"logits": logits} | {n: g for n, g in gradients.items() if not n.endswith("k_proj.bias")}

    exact = results("eager", False)
    errors = {}
    for implementation in ("eager", REPAIRED, "flash_attention_2"):
        found = results(implementation, True)
        errors[implementation] = {n: float((found[n] - x).norm() / x.norm()) for n, x in exact.items()}
    for name, error in errors[REPAIRED].items():
        assert error <= 2 * errors["eager"][name] + 2**-8, name
    assert errors["flash_attention_2"]["logits"] > 10 * errors["eager"]["logits"]
