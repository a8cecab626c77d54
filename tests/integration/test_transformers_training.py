"""bsa_dense under what training and generation do around a model: checkpointing, autocast, compilation, caches."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import AttentionInterface, GenerationConfig
from transformers_models import (
    TOLERANCE,
    assert_checkpointing_repeats,
    assert_dropout_is_applied,
    assert_same,
    batch_for,
    run,
    tiny,
)
from word_tokens import WordTokens, pad

from hf_flashbsa import backends_used


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gpt_oss"])
def test_gradient_checkpointing(name, use_reentrant):
    inputs = batch_for(name, "right")
    model = tiny(name, "bsa_dense")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(run(model, inputs), run(tiny(name, "eager"), inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    inputs = batch_for("bart", "right")
    assert_checkpointing_repeats(lambda: tiny("bart", "bsa_dense", attention_dropout=0.3), run, inputs, use_reentrant)


def test_attention_dropout():
    assert_dropout_is_applied()


@pytest.mark.parametrize(("name", "setting"), [("bart", "attention_dropout"), ("t5", "dropout_rate")])
def test_models_drop_attention_in_training_only(name, setting):
    inputs = batch_for(name, "right")
    model = tiny(name, "bsa_dense", **{setting: 0.25})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # leaves the dropout of the attention weights
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(model(**inputs).logits)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    expected = tiny(name, "eager").eval()(**inputs).logits
    error = (model.eval()(**inputs).logits - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE


@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gemma2", "gpt_oss"])
def test_autocast(name):
    """No further from float32 than eager attention is under the same autocast, up to rounding."""
    inputs = batch_for(name, "right")
    exact, _ = run(tiny(name, "eager"), inputs)
    errors = {}
    for implementation in ("eager", "bsa_dense"):
        model = tiny(name, implementation)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, gradients = run(model, inputs)
        errors[implementation] = float((logits.float() - exact).norm() / exact.norm())
        assert all(g.isfinite().all() for g in gradients.values())
    assert errors["bsa_dense"] <= 1.5 * errors["eager"] + 1e-3


@pytest.mark.parametrize("dtypes", [("float32", "float32", "bfloat16"), ("float32",) * 3, ("bfloat16",) * 3])
def test_autocast_runs_attention_in_its_own_dtype(dtypes):
    q, k, v = (torch.randn(1, 2, 5, 8, dtype=getattr(torch, dtype)) for dtype in dtypes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = AttentionInterface()["bsa_dense"](torch.nn.Linear(1, 1), q, k, v, None)
    assert out.dtype == torch.bfloat16


def test_mixed_dtypes_follow_the_weights_outside_autocast():
    layer = torch.nn.Sequential(torch.nn.Linear(1, 1, dtype=torch.bfloat16))
    layer.config = transformers.LlamaConfig()
    q, k = (torch.randn(1, 2, 5, 8) for _ in range(2))
    out, _ = AttentionInterface()["bsa_dense"](layer, q, k, k.bfloat16(), None)
    assert out.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "padding"), [("bart", "right"), ("t5", "right"), ("llama", "none"), ("mistral", "right")]
)
def test_compiled_training_step(name, padding):
    if name == "bart" and transformers.__version__.startswith("5.17."):
        pytest.skip("BART's layerdrop of Transformers 5.17 is not traceable, whatever the attention")
    inputs = batch_for(name, padding)
    expected = run(tiny(name, "eager"), inputs)
    model = tiny(name, "bsa_dense")
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert_same(run(model, inputs), expected)
    assert backends_used(model) == {}


CACHES = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}
SEARCHES = {"greedy": {}, "beam": {"num_beams": 3}}


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("name", ["bart", "pegasus", "t5", "llama", "mistral", "gemma2"])
def test_generation(name, search, cache):
    """Sequences and scores of ragged prompts, longer than the windows of windowed models."""
    inputs = batch_for(name, "left")
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    results = []
    for implementation in ("bsa_dense", "eager"):
        model = tiny(name, implementation).eval()
        config = GenerationConfig(
            max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_scores=True,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=2, **SEARCHES[search], **CACHES[cache],
        )  # fmt: skip
        results.append(model.generate(**inputs, generation_config=config))
    assert torch.equal(results[0].sequences, results[1].sequences)
    for ours, eager in zip(results[0].scores, results[1].scores, strict=True):
        finite = eager.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        assert (ours - eager)[finite].abs().max() <= TOLERANCE * eager[finite].abs().max()


def test_decoding_after_a_cached_prefix_in_chunks():
    """A cache, then several tokens at once: the queries stand behind the cached keys."""
    inputs = batch_for("llama", "left")
    model = tiny("llama", "bsa_dense").eval()
    whole = model(**inputs, use_cache=False).logits
    first = model(input_ids=inputs["input_ids"][:, :8], attention_mask=inputs["attention_mask"][:, :8], use_cache=True)
    rest = model(
        input_ids=inputs["input_ids"][:, 8:],
        attention_mask=inputs["attention_mask"],
        past_key_values=first.past_key_values,
    )
    live = inputs["attention_mask"][:, 8:, None]
    torch.testing.assert_close(rest.logits * live, whole[:, 8:] * live, rtol=0, atol=1e-5)


def test_saving_forgets_the_implementation_and_keeps_the_weights(tmp_path):
    model = tiny("bart", "bsa_dense").eval()
    inputs = batch_for("bart", "right")
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    assert plain.config._attn_implementation != "bsa_dense"
    again = type(model).from_pretrained(tmp_path, attn_implementation="bsa_dense").eval()
    torch.testing.assert_close(again(**inputs).logits, expected)
    plain.set_attn_implementation("bsa_dense")
    torch.testing.assert_close(plain.eval()(**inputs).logits, expected)
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    assert len(backends_used(plain)) == 6


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_seq2seq_trainer(name, tmp_path):
    """One step and one evaluation by generation, equal to eager attention's."""
    outcomes = []
    for implementation in ("bsa_dense", "eager"):
        model = tiny(name, implementation)
        arguments = transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / implementation), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
            per_device_eval_batch_size=4, predict_with_generate=True, generation_max_length=8, generation_num_beams=2,
            gradient_checkpointing=True, report_to=[], save_strategy="no", use_cpu=True, seed=0,
        )  # fmt: skip
        data = WordTokens()
        trainer = transformers.Seq2SeqTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=pad
        )
        loss = trainer.train().training_loss
        predictions = trainer.predict(data)
        outcomes.append((loss, predictions.metrics["test_loss"], torch.tensor(predictions.predictions)))
        assert bool(backends_used(model)) == (implementation == "bsa_dense")
    assert outcomes[0][:2] == pytest.approx(outcomes[1][:2], rel=1e-4)
    assert torch.equal(outcomes[0][2], outcomes[1][2])
