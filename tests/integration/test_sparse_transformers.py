"""bsa_sparse in whole models: against dense masks of the same layouts, packed, in generation, and what it refuses."""

from __future__ import annotations

import pytest
import torch
import transformers
from packed_models import labelled, losses
from sparse_models import BLOCK, BY_PLACE, MIXED, NAMES, SELECTING, SIZES, inputs_for, oracle, sparse
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DataCollatorWithFlattening
from transformers_models import OWN_ATTENTION, assert_checkpointing_repeats, assert_same, batch_for, run, tiny

from hf_flashbsa import BlockSparseConfig, backends_used, enable_padding_free, set_block_sparse
from hf_flashbsa.integration.sparse_layers import SparseLayer
from hf_flashbsa.ops import lowering

CONFIGS = {"patterns": MIXED, "selection": SELECTING}
BY_QUERY = BlockSparseConfig("top_k_blocks", BLOCK, top_k=2)
ALL = BlockSparseConfig("all_blocks", BLOCK, roles={"cross": "all_blocks"})
FORWARD = AttentionInterface()["bsa_sparse"]


def test_both_interfaces_know_the_name():
    assert "bsa_sparse" in AttentionInterface() and "bsa_sparse" in AttentionMaskInterface()


@pytest.mark.parametrize("padding", ["none", "right", "left", "holes"])
@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", [*NAMES, "mbart"])
def test_logits_and_gradients(name, rules, padding):
    inputs, config = inputs_for(name, padding), CONFIGS[rules]
    dtype = torch.float64 if name == "t5" else torch.float32  # see `assert_matches_eager`
    result = run(sparse(name, config).to(dtype), inputs)
    assert_same(result, run(oracle(name, config).to(dtype), inputs))
    dense, _ = run(tiny(name, "bsa_dense").to(dtype), inputs)
    assert (result[0] - dense).abs().max() > 0.1 * dense.abs().max(), "the layouts should matter"


@pytest.mark.parametrize("padding", ["right", "left", "holes"])
@pytest.mark.parametrize("name", [*NAMES, "mbart", "marian", "pegasus", "roberta", "modernbert", "qwen3", "gemma3"])
def test_all_blocks_are_dense_attention(name, padding):
    inputs = inputs_for(name, padding)
    assert_same(run(sparse(name, ALL), inputs), run(tiny(name, "bsa_dense"), inputs))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_dropout_is_that_of_dense_attention(name):
    setting = {"bart": {"attention_dropout": 0.3}, "t5": {"dropout_rate": 0.3}}[name]
    results = []
    for model in (sparse(name, ALL, **setting), tiny(name, "bsa_dense", **setting)):
        torch.manual_seed(0)
        results.append(run(model, inputs_for(name, "right")))
    assert_same(*results)


@pytest.mark.parametrize("name", NAMES)
def test_documents_do_not_depend_on_the_side_of_their_padding(name):
    model = sparse(name, BY_PLACE).eval()
    for path, parameter in model.named_parameters():
        if "position" in path and "relative" not in path:
            nn.init.zeros_(parameter)  # absolute positions count columns
    tokens = batch_for(name, "none", batch=1, length=100, target_length=100)
    dead = torch.full((1, 23), 5)
    outputs = []
    for left in (False, True):
        padded = {}
        for key, ids in tokens.items():
            if key.endswith("input_ids"):
                padded[key] = torch.cat([dead, ids] if left else [ids, dead], dim=1)
                live = torch.cat([torch.zeros_like(dead), torch.ones_like(ids)], dim=1)
                padded[key.replace("input_ids", "attention_mask")] = live if left else live.flip(1)
        logits = model(**padded).logits
        outputs.append(logits[:, 23:] if left else logits[:, :100])
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_roles_that_share_a_mask_and_a_layout(name):
    """A 4-D mask of source tokens goes to encoder and cross-attention, whose queries begin at other places."""
    rule = {"pattern": "global_columns", "num_global_tokens": 50}
    model = sparse(name, BlockSparseConfig(**rule, block_size=BLOCK, roles={"cross": rule}))
    inputs = batch_for(name, "left", length=150, target_length=140)
    expected = run(model, inputs)
    source = inputs["attention_mask"].bool()
    assert_same(run(model, inputs | {"attention_mask": source[:, None, None]}), expected)


# Packed documents


# Without dead tokens between live ones: layouts count the tokens of a packed document, but columns of a padded one.
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_padding_free(name, rules, padding):
    inputs = labelled(name, padding, **SIZES)
    # In a padded batch cross-attention does not know which queries are padding, and lets them choose blocks too.
    config = BY_QUERY if rules == "selection" else MIXED
    model = sparse(name, config)
    enable_padding_free(model)
    assert_same(losses(model, inputs), losses(sparse(name, config), inputs))


def test_as_many_live_tokens_as_columns():
    """Position ids of the packed row are no documents of the padded batch, on which selections run."""
    tokens = batch_for("llama", "none", batch=2, length=100)["input_ids"]
    mask = (torch.arange(100) < torch.tensor([[40], [60]])).long()
    model = sparse("llama", SELECTING)
    expected = model(tokens, mask, use_cache=False).logits
    enable_padding_free(model)
    logits = model(tokens, mask, use_cache=False).logits
    torch.testing.assert_close(logits * mask[..., None], expected * mask[..., None], rtol=1e-4, atol=1e-4)


def test_flattened_documents_have_their_own_layouts():
    model = sparse("llama", BY_PLACE)
    generator = torch.Generator().manual_seed(0)
    documents = [torch.randint(3, 64, (n,), generator=generator).tolist() for n in (40, 130, 1, 70)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_tensors="pt")
    together = model(**collate([{"input_ids": ids} for ids in documents]), use_cache=False).logits[0]
    alone = [model(input_ids=torch.tensor([ids]), use_cache=False).logits[0] for ids in documents]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


# What models do around attention


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_gradient_checkpointing(name, rules, use_reentrant):
    inputs = inputs_for(name, "right")
    setting = {"t5": "dropout_rate"}.get(name, "attention_dropout")
    assert_checkpointing_repeats(lambda: sparse(name, CONFIGS[rules], **{setting: 0.2}), run, inputs, use_reentrant)


@pytest.mark.parametrize(("name", "rules"), list(zip(["bert", "llama"], CONFIGS, strict=True)))
def test_compiled_training_step(name, rules):
    inputs = inputs_for(name, "right")
    expected = run(oracle(name, CONFIGS[rules]), inputs)
    model = sparse(name, CONFIGS[rules])
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_same(run(model, inputs), expected)


def test_autocast():
    inputs = inputs_for("bart", "right")
    exact, _ = run(oracle("bart"), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        errors = [(run(m, inputs)[0].float() - exact).norm() / exact.norm() for m in (sparse("bart"), oracle("bart"))]
    assert errors[0] <= 1.5 * errors[1] + 1e-3


@pytest.mark.parametrize("name", ["mbart", "t5"])
def test_saved_and_loaded(name, tmp_path):
    inputs = inputs_for(name, "right")
    model = sparse(name).eval()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, attn_implementation="bsa_sparse")
    if name == "mbart":  # whose encoder layers have no numbers, which the rules of MIXED need
        set_block_sparse(loaded, BlockSparseConfig.of(loaded.config))
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert len(backends_used(loaded)) == 6 and set(backends_used(loaded).values()) == {"torch"}


def test_tables_are_made_once_for_a_layout(monkeypatch):
    """BART: two encoder layers and two decoder layers with a layout each, one cross-attention with and one without.
    The torch back end reads the schedule of queries alone."""
    made = []
    build = lowering._schedule

    def counted(spec, side, *rest):
        made.append((spec.layout, side))
        return build(spec, side, *rest)

    monkeypatch.setattr(lowering, "_schedule", counted)
    run(sparse("bart"), inputs_for("bart", "right"))
    assert len(made) == len(set(made)) == 5
    made.clear()
    run(sparse("bart", BY_PLACE, encoder_layers=3, decoder_layers=3), inputs_for("bart", "right"))
    assert len(made) == len(set(made)) == 3


# Generation


def test_prefill_follows_the_layout_and_cached_steps_are_dense():
    model = sparse("llama").eval()
    tokens = inputs_for("llama", "none")["input_ids"]
    prefill = model(tokens[:, :-1], use_cache=True)
    reference = oracle("llama").eval()  # whose cached steps have no layout
    expected = reference(tokens[:, :-1], use_cache=True)
    torch.testing.assert_close(prefill.logits, expected.logits, rtol=1e-3, atol=1e-3)
    step = model(tokens[:, -1:], past_key_values=prefill.past_key_values).logits
    wanted = reference(tokens[:, -1:], past_key_values=expected.past_key_values).logits
    torch.testing.assert_close(step, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rules", CONFIGS)
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_generation_is_that_of_the_oracle(name, rules):
    padding = "left" if name == "llama" else "right"
    inputs = {key: x for key, x in inputs_for(name, padding).items() if not key.startswith("decoder")}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2)
    config = CONFIGS[rules]
    ours = sparse(name, config).eval().generate(**inputs, **options)
    assert torch.equal(ours, oracle(name, config).eval().generate(**inputs, **options))


def test_static_caches_are_dense():
    inputs = inputs_for("llama", "left")
    options = dict(max_new_tokens=6, do_sample=False, cache_implementation="static", disable_compile=True)
    tokens = [model.eval().generate(**inputs, **options) for model in (sparse("llama"), tiny("llama", "bsa_dense"))]
    assert torch.equal(*tokens)


# What is refused


def test_a_model_without_layouts():
    with pytest.raises(ValueError, match="has no block layout.*set_block_sparse"):
        run(tiny("bart", "bsa_sparse"), inputs_for("bart", "none"))


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_that_compute_their_own_attention(name):
    with pytest.raises(ValueError, match="computes attention of its own"):
        model = tiny(name, "bsa_sparse")
        set_block_sparse(model, MIXED)
        run(model, batch_for(name, "right"))


def test_layer_rules_need_numbered_layers(tmp_path):
    sparse("mbart").save_pretrained(tmp_path)
    loaded = transformers.MBartForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="bsa_sparse")
    with pytest.raises(ValueError, match="does not know which layer it is.*hf_flashbsa.set_block_sparse"):
        run(loaded, inputs_for("mbart", "none"))


def bare_module(**attributes) -> nn.Module:
    module = nn.Module()
    module.config = transformers.LlamaConfig(block_sparse=BY_PLACE.to_dict())
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def test_roles():
    assert SparseLayer.of(bare_module(is_causal=True), None).role == "decoder"
    assert SparseLayer.of(bare_module(is_causal=True), False).role == "encoder"
    assert SparseLayer.of(bare_module(is_causal=False, is_decoder=True), None).role == "cross"
    bert = transformers.models.bert.modeling_bert
    config = transformers.BertConfig(is_decoder=True, block_sparse=BY_PLACE.to_dict(), hidden_size=32)
    config.num_attention_heads = 2
    assert SparseLayer.of(bert.BertCrossAttention(config), None).role == "cross"
    assert SparseLayer.of(bert.BertSelfAttention(config, is_causal=True), None).role == "decoder"
    with pytest.raises(ValueError, match="does not say whether it is an encoder's"):
        SparseLayer.of(bare_module(), None)
    with pytest.raises(ValueError, match="holds no config"):
        SparseLayer.of(nn.Module(), None)


def test_documents_that_only_positions_tell():
    model = sparse("llama")
    tokens = inputs_for("llama", "none")["input_ids"]
    position = torch.cat([torch.arange(60), torch.arange(90)])[None].expand(3, -1)
    with pytest.raises(ValueError, match="position_ids divide rows into documents.*cu_seq_lens"):
        model(tokens, position_ids=position, use_cache=False)
    # Beside a mask positions divide nothing, as in eager attention.
    padded = inputs_for("llama", "right") | {"position_ids": position}
    expected = run(oracle("llama", MIXED), padded)
    assert_same(run(model, padded), expected)
    enable_padding_free(model)
    assert_same(run(model, padded), expected)


def test_selection_in_packed_rows():
    model = sparse("llama", SELECTING)
    ends = torch.tensor([0, 60, 150], dtype=torch.int32)
    tokens = inputs_for("llama", "none")["input_ids"][:1]
    with pytest.raises(ValueError, match="selects blocks of padded batches.*pad the batch"):
        model(tokens, cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)


def test_packed_rows_with_padding():
    model = sparse("llama", BY_PLACE)
    ends = torch.tensor([0, 60, 150], dtype=torch.int32)
    tokens = inputs_for("llama", "none")["input_ids"][:1]
    with pytest.raises(ValueError, match="cu_seq_lens_.*do not go together with a padding mask"):
        model(tokens, torch.ones_like(tokens), cu_seq_lens_q=ends, cu_seq_lens_k=ends, use_cache=False)


def test_training_with_cached_keys():
    module = bare_module(is_causal=True, layer_idx=0)
    q, k = (torch.randn(1, 2, n, 8, requires_grad=True) for n in (40, 50))
    with pytest.raises(ValueError, match="40 queries with 50 keys has no layout"):
        FORWARD(module, q, k, k, None)
    with torch.no_grad():
        out, _ = FORWARD(module, q, k, k, None)
    assert torch.equal(out, AttentionInterface()["bsa_dense"](module, q, k, k, None)[0])


def test_a_per_head_layout_of_another_head_count():
    model = sparse("bert", BlockSparseConfig("dilated", BLOCK, window=20, dilation=[1, 2, 3, 4, 5]))
    with pytest.raises(ValueError, match="heads"):
        run(model, inputs_for("bert", "none"))
