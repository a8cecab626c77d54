"""Padding-free models under what training and generation do: checkpointing, dropout, compilation, caches, waiting."""

from __future__ import annotations

import pytest
import torch
import transformers
from packed_models import labelled, layers_of, live_rows, losses, packed, widths
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers_models import (
    assert_checkpointing_repeats,
    assert_same,
    batch_for,
    host_never_waits,
    live_logits,
    mask_of,
    tiny,
)
from word_tokens import WordTokens, pad

from hf_flashbsa import enable_padding_free
from hf_flashbsa.integration import attention_function
from hf_flashbsa.integration.padding_free.packing import Packing

# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama", "gemma3"])
def test_gradient_checkpointing(name, use_reentrant):
    inputs = labelled(name, "holes")
    model = packed(name)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    with widths(model) as seen:
        ours = losses(model, inputs)
    assert set(seen) == live_rows(inputs)
    assert_same(ours, losses(tiny(name, "eager"), inputs))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_after_another_forward(use_reentrant):
    """Two forwards, then their backwards: layers that are computed again find the packing of their own batch."""
    batches = [labelled("bart", "left"), labelled("bart", "right", batch=4, length=9)]
    results = []
    for model in (packed("bart"), tiny("bart", "eager")):
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        total = sum(model(**inputs).loss for inputs in batches)
        total.backward()
        results.append((total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_same(*results)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_repeats_the_dropout(use_reentrant):
    inputs = labelled("bart", "right")
    assert_checkpointing_repeats(
        lambda: packed("bart", dropout=0.2, attention_dropout=0.2), losses, inputs, use_reentrant
    )


DROPOUT = [
    ("bart", "dropout"),
    ("bart", "attention_dropout"),
    ("t5", "dropout_rate"),
    ("bert", "attention_probs_dropout_prob"),
    ("llama", "attention_dropout"),
]


@pytest.mark.parametrize(("name", "setting"), DROPOUT)
def test_dropout_has_the_same_statistics(name, setting):
    """Mean and variance of the logits over draws.

    Means differ by their standard error: seen over seeds 0.85 to 1.15 of it. The ratio of variances is within 15% of
    1, and 1.2 or more for p = 0.15.
    """
    inputs = batch_for(name, "right")
    means, variances = [], []
    for model in (packed(name, **{setting: 0.1}), tiny(name, "bsa_dense", **{setting: 0.1})):
        torch.manual_seed(0)
        with torch.no_grad():
            draws = torch.stack([live_logits(model, inputs, use_cache=False) for _ in range(24)])
        means.append(draws.mean(0))
        variances.append(float(draws.var(0).mean()))
    error = (sum(variances) / len(draws)) ** 0.5
    assert float((means[0] - means[1]).square().mean()) ** 0.5 < 1.3 * error
    assert variances[0] == pytest.approx(variances[1], rel=0.15)


@pytest.mark.parametrize("name", ["bart", "t5", "llama", "gemma2"])
def test_autocast(name):
    """No further from float32 than eager attention is under the same autocast, up to rounding."""
    inputs = labelled(name, "right")
    exact, _ = losses(tiny(name, "eager"), inputs)
    errors = []
    for model in (packed(name), tiny(name, "eager")):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = losses(model, inputs)
        assert all(g.isfinite().all() for g in gradients.values())
        errors.append(abs(float(loss - exact)))
    assert errors[0] <= 1.5 * errors[1] + 1e-2 * float(exact)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["bart", "pegasus"])
def test_layerdrop(name, seed):
    inputs = labelled(name, "left")
    results, calls = [], []
    for model in (packed(name, encoder_layerdrop=0.6, decoder_layerdrop=0.6), None):
        model = model or tiny(name, "eager", encoder_layerdrop=0.6, decoder_layerdrop=0.6)
        torch.manual_seed(seed)
        with widths(model) as seen:
            results.append(losses(model, inputs))
        calls.append(len(seen))
    assert calls[0] == calls[1] < 4
    assert_same(*results)


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_compiled_layers_take_any_number_of_tokens(name):
    sizes = {"num_hidden_layers": 1} if name == "llama" else {"encoder_layers": 1, "decoder_layers": 1}
    model = packed(name, **sizes)
    torch._dynamo.reset()
    compiled = CompileCounter()
    for layer in layers_of(model):
        layer.compile(backend=compiled, dynamic=True)
    graphs = []
    for padding in ("right", "left"):
        inputs = labelled(name, padding, length=13 if padding == "right" else 17)
        with widths(model) as seen:
            ours = losses(model, inputs)
        assert set(seen) == live_rows(inputs)
        assert_same(ours, losses(tiny(name, "eager", **sizes), inputs))
        graphs.append(compiled.frame_count)
    assert graphs[0] == graphs[1] > 0


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = labelled("bart", "right")
        counts = tuple(int(inputs[k].sum()) for k in ("attention_mask", "decoder_attention_mask"))
        model = torch.nn.parallel.DistributedDataParallel(tiny("bart", "bsa_dense"))
        enable_padding_free(model)
        with widths(model) as seen:
            loss, gradients = losses(model, inputs | {"num_live_tokens": counts})
        assert set(seen) == live_rows(inputs)
    finally:
        torch.distributed.destroy_process_group()
    ours = (loss, {n.removeprefix("module."): g for n, g in gradients.items()})
    assert_same(ours, losses(tiny("bart", "eager"), inputs))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_seq2seq_trainer(name, tmp_path):
    """One step and one evaluation by generation, equal to eager attention's."""
    outcomes = []
    for model in (packed(name), tiny(name, "eager")):
        arguments = transformers.Seq2SeqTrainingArguments(
            output_dir=str(tmp_path / model.config._attn_implementation), max_steps=1, per_device_train_batch_size=4,
            learning_rate=1e-2, per_device_eval_batch_size=4, predict_with_generate=True, generation_max_length=8,
            generation_num_beams=2, report_to=[], save_strategy="no", use_cpu=True, seed=0,
        )  # fmt: skip
        data = WordTokens()
        trainer = transformers.Seq2SeqTrainer(
            model=model, args=arguments, train_dataset=data, eval_dataset=data, data_collator=pad
        )
        with widths(model) as seen:
            loss = trainer.train().training_loss
        assert {rows for rows, _ in seen} == ({1} if model.config._attn_implementation == "bsa_dense" else {4})
        predictions = trainer.predict(data)
        outcomes.append((loss, predictions.metrics["test_loss"], torch.tensor(predictions.predictions)))
    assert outcomes[0][:2] == pytest.approx(outcomes[1][:2], rel=1e-4)
    assert torch.equal(outcomes[0][2], outcomes[1][2])


# Caches


@pytest.mark.parametrize("search", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beam", "no cache"])
@pytest.mark.parametrize("name", ["bart", "t5", "llama", "mistral"])
def test_generation(name, search):
    inputs = {k: v for k, v in batch_for(name, "left").items() if not k.startswith("decoder")}
    results = []
    for model in (packed(name), tiny(name, "eager")):
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2, decoder_start_token_id=2)
        results.append(model.eval().generate(**inputs, **options, **search))
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "measured"), [("bart", 1), ("llama", 0)])
def test_generation_with_a_cache_measures_the_source_only(name, measured, monkeypatch):
    inputs = {k: v for k, v in batch_for(name, "left").items() if not k.startswith("decoder")}
    of_mask, calls = Packing.of_mask, []
    monkeypatch.setattr(Packing, "of_mask", lambda *args: calls.append(args) or of_mask(*args))
    packed(name).eval().generate(**inputs, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(calls) == measured


CACHES = [
    # training mode, use_cache, is there a cache, are rows packed
    (True, None, False, True),
    (True, True, True, False),
    (True, False, False, True),
    (False, None, True, False),
    (False, True, True, False),
    (False, False, False, True),
]


@pytest.mark.parametrize(("training", "use_cache", "cached", "is_packed"), CACHES)
@pytest.mark.parametrize("name", ["bart", "t5", "llama"])
def test_a_forward_makes_a_cache_or_is_packed(name, training, use_cache, cached, is_packed):
    inputs = batch_for(name, "right")
    model = packed(name).train(training)
    with widths(model) as seen:
        output = model(**inputs, use_cache=use_cache)
    assert (output.past_key_values is not None) == cached
    assert (seen[-1][0] == 1) == is_packed
    if cached:
        assert output.past_key_values.get_seq_length() == inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]


def test_encoders_are_packed_in_evaluation_too():
    model = packed("bert").eval()
    inputs = batch_for("bert", "right")
    with widths(model) as seen:
        model(**inputs)
    assert set(seen) == live_rows(inputs)


def test_a_cached_prefix_continues():
    inputs = batch_for("llama", "left")
    model = packed("llama").eval()
    whole = model(**inputs, use_cache=False).logits
    first = model(input_ids=inputs["input_ids"][:, :8], attention_mask=inputs["attention_mask"][:, :8], use_cache=True)
    rest = model(input_ids=inputs["input_ids"][:, 8:], attention_mask=inputs["attention_mask"],
                 past_key_values=first.past_key_values, use_cache=False)  # fmt: skip
    live = inputs["attention_mask"][:, 8:, None]
    torch.testing.assert_close(rest.logits * live, whole[:, 8:] * live, rtol=0, atol=1e-5)


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: values read back, and shapes that depend on values."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2")

    def __init__(self, monkeypatch):
        super().__init__()
        self.count = 0
        tolist = torch.Tensor.tolist

        def counted(tensor):
            self.count += 1
            return tolist(tensor)

        monkeypatch.setattr(torch.Tensor, "tolist", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.READS
        return func(*args, **(kwargs or {}))


def without_attention(q, k, v, spec, **kwargs):
    """A stand-in for attention, whose CPU back end reads lengths."""
    return (q + v.mean()).transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama", "mistral"])
def test_the_host_waits_at_most_once(name, given, monkeypatch):
    inputs = labelled(name, "right")
    counts = tuple(int(v.sum()) for k, v in inputs.items() if k.endswith("attention_mask"))
    if given:
        inputs["num_live_tokens"] = counts if len(counts) == 2 else counts[0]
    model = packed(name)
    expected = losses(tiny(name, "eager"), {k: v for k, v in inputs.items() if k != "num_live_tokens"})
    assert_same(losses(model, inputs), expected)
    inputs |= {k: v.clone() for k, v in inputs.items() if k.endswith("attention_mask")}  # not yet measured
    monkeypatch.setattr(attention_function, "attention", without_attention)
    model.eval()  # in training Transformers 5.17 compares a random number with BART's layerdrop, on the host
    with Waits(monkeypatch) as waits, widths(model) as seen:
        model(**inputs, use_cache=False).loss.backward()
    assert waits.count == (0 if given else 1)
    assert len(set(seen)) == len(counts)


def test_without_a_mask_the_host_never_waits(monkeypatch):
    inputs = labelled("bart", "none")
    inputs.pop("labels")
    model = packed("bart").eval()
    monkeypatch.setattr(attention_function, "attention", without_attention)
    with Waits(monkeypatch) as waits:
        model(**inputs, use_cache=False)
    assert waits.count == 0


@pytest.mark.parametrize("error", [-1, 1])
def test_wrong_numbers_of_live_tokens_raise(error):
    inputs = batch_for("bert", "right")
    inputs["num_live_tokens"] = int(inputs["attention_mask"].sum()) + error
    with pytest.raises(RuntimeError, match="num_live_tokens is not the sum of the attention mask"):
        packed("bert")(**inputs)


def test_numbers_of_live_tokens_rule_out_holes():
    inputs = batch_for("mistral", "holes")
    inputs["num_live_tokens"] = int(inputs["attention_mask"].sum())
    with pytest.raises(RuntimeError, match="dead tokens between live ones"):
        packed("mistral")(**inputs)


@pytest.mark.parametrize("given", [30, 30.0, torch.tensor(30)], ids=repr)
def test_a_number_for_each_mask(given):
    with pytest.raises(ValueError, match="a Python number for each"):
        packed("bart")(**batch_for("bart", "right"), num_live_tokens=given)


def test_numbers_where_a_mask_was_seen_before():
    inputs = labelled("bart", "right")
    counts = tuple(int(inputs[k].sum()) for k in ("attention_mask", "decoder_attention_mask"))
    inputs.pop("decoder_attention_mask")  # so that each forward makes one of the labels
    model = packed("bart")
    first, second = (losses(model, inputs | {"num_live_tokens": counts}) for _ in range(2))
    assert_same(second, first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama", "mistral"])
def test_on_a_gpu_the_host_never_waits_where_numbers_are_given(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    inputs = {k: v.cuda() for k, v in labelled(name, "right", length=150, target_length=70).items()}
    expected = losses(tiny(name, "eager").cuda(), inputs)
    counts = tuple(int(v.sum()) for k, v in inputs.items() if k.endswith("attention_mask"))
    inputs["num_live_tokens"] = counts if len(counts) == 2 else counts[0]
    model = packed(name).cuda()
    assert_same(losses(model, inputs), expected)  # compiles the kernels
    inputs |= {k: v.clone() for k, v in inputs.items() if k.endswith("attention_mask")}  # not yet measured
    with host_never_waits():
        model(**inputs).loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_masks_may_stay_on_the_host():
    inputs = {k: v.cuda() for k, v in labelled("bart", "right").items()}
    model = packed("bart").cuda()
    expected = losses(model, inputs)
    masks = {k: mask_of(3, n, "right") for k, n in (("attention_mask", 13), ("decoder_attention_mask", 7))}
    assert_same(losses(model, inputs | masks), expected)
