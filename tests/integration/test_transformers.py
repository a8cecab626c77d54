"""bsa_dense against Transformers' eager attention: whole models, logits and every gradient."""

from __future__ import annotations

import gc
import types
import weakref

import pytest
import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers_models import (
    DISPATCHING,
    FAMILIES,
    OWN_ATTENTION,
    PADDINGS,
    SIZE,
    T5,
    additive,
    assert_matches_eager,
    assert_same,
    batch_for,
    mask_of,
    run,
    strengthen,
    tiny,
)

from hf_flashbsa import backends_used
from hf_flashbsa.integration import attention_function, register
from hf_flashbsa.masks.spec import AttentionSpec
from hf_flashbsa.ops.reference import reference_attention

DENSE = AttentionInterface()["bsa_dense"]
DECODERS = ("llama", "mistral", "gemma2", "gpt_oss")


def test_both_interfaces_know_the_name():
    assert "bsa_dense" in AttentionInterface() and "bsa_dense" in AttentionMaskInterface()


def test_old_transformers_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(register, "transformers", types.SimpleNamespace(__version__="5.16.2"))
    with pytest.raises(ImportError, match="pip install -U 'transformers>=5.17'"):
        register.register()


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DISPATCHING)
def test_logits_and_gradients(name, padding):
    assert_matches_eager(name, batch_for(name, padding))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_compute_their_own_attention_stay_exact(name, padding):
    assert_matches_eager(name, batch_for(name, padding))


@pytest.mark.parametrize("name", ["bart", "t5"])
@pytest.mark.parametrize("target_length", [1, 13, 29])
def test_targets_of_any_length(name, target_length):
    assert_matches_eager(name, batch_for(name, "right", target_length=target_length))


def test_an_image_model_without_masks():
    config = dict(SIZE, image_size=12, patch_size=4, num_channels=1, attention_probs_dropout_prob=0.0)
    config.pop("vocab_size")
    results = []
    for implementation in ("bsa_dense", "eager"):
        model = transformers.ViTForImageClassification._from_config(
            transformers.ViTConfig(**config), attn_implementation=implementation
        )
        strengthen(model)
        pixels = torch.randn(2, 1, 12, 12, generator=torch.Generator().manual_seed(0))
        model(pixel_values=pixels).logits.square().sum().backward()
        results.append((model(pixel_values=pixels).logits.detach(), {n: p.grad for n, p in model.named_parameters()}))
    assert_same(*results)


def test_attention_between_channels():
    """Florence-2's vision tower hands over transposed views, whose last dimension is not contiguous."""
    config = transformers.Florence2VisionConfig(
        embed_dim=[16, 32], num_heads=[2, 4], num_groups=[2, 4], depths=[1, 1], window_size=4, patch_size=[7, 3],
        patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True], projection_dim=32, drop_path_rate=0.0,
        max_position_embeddings=8,
    )  # fmt: skip
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    results = []
    for how in ("bsa_dense", "eager"):
        model = transformers.Florence2VisionBackbone._from_config(config, attn_implementation=how)
        strengthen(model)
        states = model(image).last_hidden_state
        states.square().mean().backward()
        results.append((states.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(*results)


def test_backends_used_lists_the_layers_that_came_here():
    bart = tiny("bart", "bsa_dense")
    assert backends_used(bart) == {}
    run(bart, batch_for("bart", "right"))
    attention = {n: "torch" for n, _ in bart.named_modules() if n.endswith(("self_attn", "encoder_attn"))}
    assert len(attention) == 6 and backends_used(bart) == attention
    for name, expected in (("led", 0), ("bloom", 0), ("bigbird_pegasus", 4)):
        model = tiny(name, "bsa_dense")
        run(model, batch_for(name, "right"))
        assert len(backends_used(model)) == expected


# Masks that callers pass themselves


def user_mask(batch: int = 3, length: int = 13) -> torch.Tensor:
    """bool `(B, 1, S, S)`, irregular, with every query seeing itself."""
    visible = torch.rand(batch, 1, length, length, generator=torch.Generator().manual_seed(3)) < 0.4
    return visible | torch.eye(length, dtype=torch.bool)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bert"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_4d_masks_of_the_caller(name, kind):
    visible = user_mask()
    inputs = batch_for(name, "none")
    mask = visible if kind == "bool" else additive(visible)
    ours = run(tiny(name, "bsa_dense"), inputs, attention_mask=mask)
    assert_same(ours, run(tiny(name, "eager"), inputs, attention_mask=additive(visible)))


def test_additive_masks_and_position_bias_add_up():
    model, reference = (
        transformers.T5EncoderModel._from_config(transformers.T5Config(**T5), attn_implementation=how)
        for how in ("bsa_dense", "eager")
    )
    inputs = batch_for("bert", "none")["input_ids"]
    values = additive(user_mask()) + torch.rand(3, 1, 13, 13, generator=torch.Generator().manual_seed(4))
    results = []
    for each in (model, reference):
        strengthen(each)
        out = each(input_ids=inputs, attention_mask=values).last_hidden_state
        out.square().sum().backward()
        results.append((out.detach(), {n: p.grad for n, p in each.named_parameters()}))
    assert_same(*results)


def qkv(len_q: int, len_k: int, batch: int = 2, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(batch, length, h, 8, generator=generator).transpose(1, 2)
        for length, h in ((len_q, heads), (len_k, 2), (len_k, 2))
    )


class Layer(torch.nn.Module):
    is_causal = True


@pytest.mark.parametrize(("len_q", "len_k"), [(1, 9), (4, 9), (9, 9), (9, 4)])
@pytest.mark.parametrize("window", [None, 3])
def test_without_a_mask_the_last_query_stands_at_the_last_key(len_q, len_k, window):
    q, k, v = qkv(len_q, len_k)
    layer = Layer()
    out, weights = DENSE(layer, q, k, v, None, scaling=0.3, sliding_window=window, is_causal=True)
    spec = AttentionSpec(causal=True, window_size=(None if window is None else window - 1, None))
    expected, _ = reference_attention(q, k, v, spec, softmax_scale=0.3)
    assert weights is None and out.shape == (2, len_q, 4, 8)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)
    assert out.is_contiguous(), "the model reshapes it without a copy"
    # A window without causality reaches as far to the right.
    out, _ = DENSE(layer, q, k, v, None, scaling=0.3, sliding_window=window, is_causal=False)
    reach = None if window is None else window - 1
    expected, _ = reference_attention(q, k, v, AttentionSpec(window_size=(reach, reach)), softmax_scale=0.3)
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_2d_masks_at_the_layer(dtype):
    q, k, v = qkv(5, 9)
    padding = mask_of(2, 9, "left").to(dtype)
    out, _ = DENSE(Layer(), q, k, v, padding)
    expected, _ = reference_attention(q, k, v, AttentionSpec(causal=True, segment_ids_k=padding.int() - 1))
    torch.testing.assert_close(out.double(), expected.transpose(1, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mask", [torch.ones(2, 8), torch.ones(2, 9), torch.ones(2, 5, 9), torch.ones(2, 1, 5, 9).int()]
)
def test_masks_that_mean_nothing_raise(mask):
    with pytest.raises(ValueError, match="attention_mask"):
        DENSE(Layer(), *qkv(5, 9), mask)


def test_masks_of_the_caller_are_resolved_once_and_not_kept_alive():
    q, k, _ = qkv(5, 9)
    mask = torch.ones(2, 1, 5, 9, dtype=torch.bool)
    specs = [attention_function._as_mask_spec(mask, q, k, True, None).spec for _ in range(2)]
    assert specs[0] is specs[1], "layers share one spec"
    gone = weakref.ref(specs[0])
    del specs, mask
    gc.collect()
    assert gone() is None


# Documents packed into one row


def documents(name: str) -> tuple[list[dict], dict]:
    """Three documents, and the row that Transformers' collator packs them into."""
    generator = torch.Generator().manual_seed(5)
    features = [{"input_ids": torch.randint(3, 64, (n,), generator=generator).tolist()} for n in (7, 1, 11)]
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    packed = collator(features)
    packed.pop("labels")
    separate = [{"input_ids": torch.tensor([f["input_ids"]])} for f in features]
    return separate, packed


def separately(name: str, separate: list[dict]) -> torch.Tensor:
    model = tiny(name, "eager")
    return torch.cat([model(**inputs, use_cache=False).logits for inputs in separate], dim=1).detach()


LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
WAYS = {
    "cu_seq_lens": lambda packed: {k: packed[k] for k in ("input_ids", *LENGTHS)},
    "both": dict,
    "position_ids": lambda packed: {k: packed[k] for k in ("input_ids", "position_ids")},
    "lengths and mask": lambda packed: WAYS["cu_seq_lens"](packed) | {"attention_mask": torch.ones(1, 19)},
}  # Rotary positions are relative: they need not restart.


#: gpt-oss makes its masks without `position_ids`: its documents need lengths, whatever the implementation.
PACKING = [(name, way) for name in DECODERS for way in WAYS if (name, way) != ("gpt_oss", "position_ids")]


@pytest.mark.parametrize(("name", "way"), PACKING)
def test_packed_documents_do_not_see_each_other(name, way):
    separate, packed = documents(name)
    logits = tiny(name, "bsa_dense")(**{"use_cache": False, **WAYS[way](packed)}).logits
    torch.testing.assert_close(logits, separately(name, separate), rtol=0, atol=2e-5)


def test_packed_batches_of_several_rows():
    separate, packed = documents("llama")
    inputs = {k: packed[k].repeat(2, 1) for k in ("input_ids", "position_ids")}
    logits = tiny("llama", "bsa_dense")(**inputs, use_cache=False).logits
    torch.testing.assert_close(logits, separately("llama", separate).repeat(2, 1, 1), rtol=0, atol=2e-5)


def test_a_position_bias_with_packed_documents():
    model = transformers.T5EncoderModel._from_config(transformers.T5Config(**T5), attn_implementation="bsa_dense")
    strengthen(model)
    separate, packed = documents("t5")
    inputs = {k: packed[k] for k in ("input_ids", *LENGTHS)}
    expected = torch.cat([model(**each).last_hidden_state for each in separate], dim=1)
    torch.testing.assert_close(model(**inputs).last_hidden_state, expected, rtol=0, atol=2e-5)


def test_layers_share_the_spec_of_packed_documents(monkeypatch):
    seen = []
    attention = attention_function.attention
    monkeypatch.setattr(attention_function, "attention", lambda *a, **k: seen.append(a[3]) or attention(*a, **k))
    for way in ("cu_seq_lens", "position_ids"):
        seen.clear()
        tiny("llama", "bsa_dense")(**WAYS[way](documents("llama")[1]), use_cache=False)
        assert len(seen) == 2 and seen[0] is seen[1]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_packed_encoder_decoder_batches_raise(name):
    packed = documents(name)[1]
    lengths = {k: packed[k] for k in LENGTHS}
    with pytest.raises(ValueError, match="pad encoder-decoder batches"):
        tiny(name, "bsa_dense")(input_ids=packed["input_ids"], decoder_input_ids=packed["input_ids"], **lengths)


@pytest.mark.parametrize(
    ("batch", "len_k", "kwargs", "message"),
    [
        (1, 9, {"cu_seq_lens_q": torch.tensor([0, 9])}, "give both"),
        (2, 9, {"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 9])}, "one row"),
        (1, 12, {"cu_seq_lens_q": torch.tensor([0, 9]), "cu_seq_lens_k": torch.tensor([0, 12])}, "cached keys"),
    ],
)
def test_lengths_that_do_not_fit_raise(batch, len_k, kwargs, message):
    with pytest.raises(ValueError, match=message):
        DENSE(Layer(), *qkv(9, len_k, batch), None, **kwargs)


# Keywords


@pytest.mark.parametrize("indices", [torch.ones(1), torch.zeros(1, 5, 2), torch.zeros(1, 4, 2, dtype=torch.long)])
def test_indices_that_do_not_fit_raise(indices):
    with pytest.raises(ValueError, match=r"indices: .*\(B, Q, n\)"):
        DENSE(Layer(), *qkv(5, 5), None, indices=indices)


@pytest.mark.parametrize("keyword", ["block_indices", "sinks", "cache", "head_mask", "layer_head_mask"])
def test_keywords_that_would_be_ignored_raise(keyword):
    with pytest.raises(ValueError, match=f"{keyword}.*attn_implementation='eager'"):
        DENSE(Layer(), *qkv(5, 5), None, **{keyword: torch.ones(1)})
    DENSE(Layer(), *qkv(5, 5), None, **{keyword: None}, use_cache=True, num_items_in_batch=3)


def test_output_attentions_warns_once(monkeypatch):
    lines = []
    monkeypatch.setattr(attention_function.logger, "warning_once", lines.append)
    DENSE(Layer(), *qkv(5, 5), None, output_attentions=True, is_causal=True)
    DENSE(Layer(), *qkv(5, 5), None, output_attentions=False, is_causal=True)
    assert len(lines) == 1 and "eager" in lines[0]


def test_a_mask_for_other_lengths_raises():
    mask = AttentionMaskInterface()["bsa_dense"](batch_size=2, q_length=5, kv_length=5)
    with pytest.raises(ValueError, match="the layer has"):
        DENSE(Layer(), *qkv(5, 9), mask)


def test_families_are_all_tested():
    assert set(DISPATCHING) | set(OWN_ATTENTION) == set(FAMILIES)
