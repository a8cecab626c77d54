"""What positions, `is_causal`, windows of no size and no mask at all mean: what they mean in eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from eager_comparisons import (
    HOW,
    LENGTH,
    POSITIONS,
    ROPE,
    additive,
    assert_cross_attention_matches,
    assert_encoder_matches,
    assert_positions_match,
    assert_window_of_zero_matches,
    made,
    run_model,
    with_positions,
)
from torch import nn
from transformers import AttentionInterface
from transformers_models import DECODER, assert_same, batch_for, tiny

from hf_flashbsa import AttentionSpec
from hf_flashbsa.integration import attention_function
from hf_flashbsa.ops.reference import reference_attention

DENSE = AttentionInterface()["bsa_dense"]
#: Another mask or a cache beside them -> whether eager attention reads the positions as documents.
BESIDE = {
    "nothing": {"use_cache": False},
    "a cache to be made": {"use_cache": True},
    "a mask of ones": {"attention_mask": torch.ones(3, LENGTH, dtype=torch.int64), "use_cache": False},
    "a 4-D mask": {"attention_mask": torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril(), "use_cache": False},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_divide_documents_where_eager_attention_says_so(positions, beside):
    inputs = with_positions("llama", "none", positions) | BESIDE[beside]
    given = inputs.get("attention_mask")
    for_eager = inputs if given is None or given.ndim == 2 else inputs | {"attention_mask": additive(given)}
    assert_same(run_model(tiny("llama", "bsa_dense"), inputs), run_model(tiny("llama", "eager"), for_eager))


def test_a_model_that_makes_its_masks_without_positions():
    assert_positions_match("gpt_oss", "none", "documents")


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_beside_padding_divide_nothing(name, padding, positions):
    assert_positions_match(name, padding, positions)


def test_positions_of_three_dimensions():
    config = transformers.Qwen2VLTextConfig(**DECODER, rope_parameters=ROPE | {"mrope_section": [1, 1, 2]})
    positions = torch.stack([torch.arange(LENGTH), POSITIONS["pairs"], POSITIONS["zeros"]])[:, None].expand(3, 3, -1)
    inputs = batch_for("llama", "none") | {"position_ids": positions, "use_cache": False}
    cls = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel
    assert_same(*(run_model(made(cls, config, how), inputs) for how in HOW))


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("positions", ["documents", "clamped", "zeros"])
@pytest.mark.parametrize("name", ["t5gemma", "eurobert", "modernbert"])
def test_bidirectional_encoders_with_positions(name, positions, padding):
    assert_encoder_matches(name, padding, positions)


class Bare(nn.Module):
    pass


class Causal(nn.Module):
    is_causal = True


class Bidirectional(nn.Module):
    is_causal = False


def qkv(len_q: int = 5, len_k: int = 5) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, n, 8, generator=g) for n in (len_q, len_k, len_k)]


def assert_sees(spec: AttentionSpec, module: nn.Module, mask, len_k: int = 5, **kwargs) -> None:
    q, k, v = qkv(5, len_k)
    out, _ = DENSE(module, q, k, v, mask, **kwargs)
    expected, _ = reference_attention(q, k, v, spec)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("len_k", [5, 9])
@pytest.mark.parametrize("module", [Bare, Causal, Bidirectional])
def test_without_a_mask_all_keys_are_seen_unless_the_call_says_otherwise(module, len_k):
    assert_sees(AttentionSpec(), module(), None, len_k)
    assert_sees(AttentionSpec(), module(), None, len_k, is_causal=False)
    assert_sees(AttentionSpec(causal=True), module(), None, len_k, is_causal=True)


def test_a_causal_module_without_a_mask_is_warned_of_once(monkeypatch):
    lines = []
    monkeypatch.setattr(attention_function.logger, "warning_once", lines.append)
    for module, kwargs in ((Bare, {}), (Bidirectional, {}), (Causal, {"is_causal": True})):
        DENSE(module(), *qkv(), None, **kwargs)
    assert not lines
    DENSE(Causal(), *qkv(), None)
    assert len(lines) == 1 and "pass is_causal=True" in lines[0]


ENDS = torch.tensor([0, 2, 5], dtype=torch.int32)
LIVE = torch.tensor([[0, 0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("mask", "lengths", "fields"),
    [
        (LIVE, {}, {"segment_ids_k": LIVE - 1}),
        (None, {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}, {"cu_seqlens_q": ENDS, "cu_seqlens_k": ENDS}),
    ],
    ids=["2-D mask", "lengths"],
)
def test_padding_and_lengths_leave_causality_to_the_module(mask, lengths, fields):
    """As in flash attention, whose arguments these are."""
    q, k, v = (x[:1] for x in qkv())
    for module, causal in ((Causal(), True), (Bidirectional(), False)):
        expected, _ = reference_attention(q, k, v, AttentionSpec(causal=causal, **fields))
        out, _ = DENSE(module, q, k, v, mask, **lengths)
        torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)
        assert torch.equal(DENSE(Bare(), q, k, v, mask, is_causal=causal, **lengths)[0], out)
    with pytest.raises(ValueError, match="is_causal: .*Bare must say whether it is causal"):
        DENSE(Bare(), q, k, v, mask, **lengths)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_of_no_size_is_none_at_the_layer(window):
    assert_sees(AttentionSpec(), Bidirectional(), None, sliding_window=window)
    assert_sees(AttentionSpec(causal=True), Causal(), None, sliding_window=window, is_causal=True)


def test_a_window_of_zero_in_a_config():
    assert_window_of_zero_matches()


def test_cross_attention_without_a_mask_and_without_is_causal():
    assert_cross_attention_matches()
