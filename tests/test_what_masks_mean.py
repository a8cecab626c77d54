"""What positions, `is_causal`, windows of no size and no mask at all mean: what they mean in eager attention."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from transformers import AttentionInterface
from transformers_models import DECODER, SIZE, assert_same, batch_for, run, strengthen, tiny

from hf_flashbsa import AttentionSpec
from hf_flashbsa.integration import forward as integration
from hf_flashbsa.reference import reference_attention

DENSE = AttentionInterface()["bsa_dense"]
LENGTH = 13

#: Positions of `LENGTH` tokens, whatever they are there for.
POSITIONS = {
    "documents": torch.cat([torch.arange(6), torch.arange(7)]),
    "zeros": torch.zeros(LENGTH, dtype=torch.int64),
    "pairs": torch.arange(LENGTH) // 2,
    "descending": torch.arange(LENGTH).flip(0),
    "clamped": (torch.arange(LENGTH) - 4).clamp(min=0),
}
#: Another mask or a cache beside them -> whether eager attention reads the positions as documents.
BESIDE = {
    "nothing": {"use_cache": False},
    "a cache to be made": {"use_cache": True},
    "a mask of ones": {"attention_mask": torch.ones(3, LENGTH, dtype=torch.int64), "use_cache": False},
    "a 4-D mask": {"attention_mask": torch.ones(3, 1, LENGTH, LENGTH, dtype=torch.bool).tril(), "use_cache": False},
}


def run_model(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Output and all gradients of any model, as `transformers_models.run` gives them of language models."""
    output = model(**inputs)
    states = output.logits if "logits" in output else output.last_hidden_state
    weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
    (states * weights).sum().backward()
    return states.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def made(cls: type, config, implementation: str) -> nn.Module:
    model = cls._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.eval()


def additive(inputs: dict) -> dict:
    """The inputs with a bool mask of four dimensions as eager attention takes it."""
    mask = inputs.get("attention_mask")
    if mask is None or mask.ndim == 2:
        return inputs
    hidden = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    return inputs | {"attention_mask": hidden}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_divide_documents_where_eager_attention_says_so(positions, beside):
    inputs = {"input_ids": batch_for("llama", "none")["input_ids"], "position_ids": POSITIONS[positions].expand(3, -1)}
    inputs |= BESIDE[beside]
    assert_same(run_model(tiny("llama", "bsa_dense"), inputs), run_model(tiny("llama", "eager"), additive(inputs)))


def test_a_model_that_makes_its_masks_without_positions():
    inputs = {"input_ids": batch_for("gpt_oss", "none")["input_ids"]}
    inputs |= {"position_ids": POSITIONS["documents"].expand(3, -1)}
    assert_same(*(run(tiny("gpt_oss", how), inputs) for how in ("bsa_dense", "eager")))


@pytest.mark.parametrize("padding", ["left", "right", "holes"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_beside_padding_divide_nothing(name, padding, positions):
    inputs = batch_for(name, padding) | {"position_ids": POSITIONS[positions].expand(3, -1)}
    assert_same(run(tiny(name, "bsa_dense"), inputs), run(tiny(name, "eager"), inputs))


def test_positions_of_three_dimensions():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLTextConfig(**DECODER, rope_parameters=rope)
    positions = torch.stack([torch.arange(LENGTH), POSITIONS["pairs"], POSITIONS["zeros"]])[:, None].expand(3, 3, -1)
    inputs = {"input_ids": batch_for("llama", "none")["input_ids"], "position_ids": positions, "use_cache": False}
    cls = transformers.models.qwen2_vl.modeling_qwen2_vl.Qwen2VLTextModel
    assert_same(*(run_model(made(cls, config, how), inputs) for how in ("bsa_dense", "eager")))


def bidirectional(name: str) -> tuple[type, object]:
    """An encoder that hands `position_ids` to its layers."""
    if name == "t5gemma":
        module = transformers.T5GemmaModuleConfig(**DECODER, head_dim=8, sliding_window=LENGTH)
        config = transformers.T5GemmaConfig(encoder=module, decoder=module, is_encoder_decoder=False)
        return transformers.T5GemmaEncoderModel, config
    if name == "eurobert":
        return transformers.EuroBertModel, transformers.EuroBertConfig(**DECODER)
    settings = dict(SIZE, pad_token_id=0, local_attention=2 * LENGTH, global_attn_every_n_layers=2)
    return transformers.ModernBertModel, transformers.ModernBertConfig(**settings)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("positions", ["documents", "clamped", "zeros"])
@pytest.mark.parametrize("name", ["t5gemma", "eurobert", "modernbert"])
def test_bidirectional_encoders_with_positions(name, positions, padding):
    """All rows count: queries on padding see the live keys, on whichever side it is, as windows are wide enough."""
    cls, config = bidirectional(name)
    inputs = batch_for("bert", padding) | {"position_ids": POSITIONS[positions].expand(3, -1)}
    assert_same(*(run_model(made(cls, config, how), inputs) for how in ("bsa_dense", "eager")))


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
    monkeypatch.setattr(integration.logger, "warning_once", lines.append)
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


def test_qwen2_moe_with_its_window_off():
    config = transformers.Qwen2MoeConfig(
        **DECODER, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    )
    assert config.sliding_window == 0
    models = (made(transformers.Qwen2MoeForCausalLM, config, how) for how in ("bsa_dense", "eager"))
    assert_same(*(run(model, batch_for("llama", "right")) for model in models))


def test_cross_attention_without_a_mask_and_without_is_causal():
    """Llama 3.2 Vision; its cross-attention gets no mask where the caller gives none."""
    text = dict(
        DECODER, cross_attention_layers=[1], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = transformers.models.mllama.configuration_mllama.MllamaTextConfig(**text)
    cls = transformers.models.mllama.modeling_mllama.MllamaTextModel
    inputs = batch_for("llama", "right") | {"use_cache": False}
    inputs["cross_attention_states"] = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(4))
    results = []
    for how in ("bsa_dense", "eager"):
        states, gradients = run_model(made(cls, config, how), inputs)
        results.append((states * inputs["attention_mask"][..., None], gradients))
    assert "layers.1.cross_attn.q_proj.weight" in results[0][1]
    assert_same(*results)
