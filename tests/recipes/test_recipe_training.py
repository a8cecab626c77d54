"""The course of training: splitting a batch changes nothing, nor does evaluation; loss, schedule, model families."""

import json
import sys

import pytest
import torch
from recipe_runs import (
    BART,
    ROOT,
    command,
    curve,
    finish,
    fresh_accelerate,  # noqa: F401 - used by every test
    lines,
    run_main,
    start,
    write_config,
)
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING as MODEL_TYPES
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, BertModel, get_scheduler
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_pt_utils import LabelSmoother

import hf_flashbsa
from recipes.xsum import train as script
from recipes.xsum.config import load_config
from recipes.xsum.loop import learning_rate_at
from recipes.xsum.model import attention_layers, attention_record, build_model, summed_loss
from recipes.xsum.records import load_records
from recipes.xsum.tokenizer import load_tokenizer


def close(one, other, rel=1e-5):
    assert [line[:5] for line in curve(one)] != []
    for a, b in zip(curve(one), curve(other), strict=True):
        assert a[:4] == b[:4]
        assert a[5:] == pytest.approx(b[5:], rel=rel)


def test_accumulation_equals_the_large_batch(tmp_path):
    values = {"dropout": 0.0, "label_smoothing": 0.1, "max_steps": 8}
    large = run_main(tmp_path, name="large", per_device_batch_size=8, **values)
    small = run_main(tmp_path, name="small", per_device_batch_size=2, gradient_accumulation_steps=4, **values)
    close(small, large)
    # The parts are padded less than the whole, so the sums differ in their last bits alone.
    one, other = (load_file(run / "model" / "model.safetensors") for run in (small, large))
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=2e-5)


def test_two_processes_equal_one(tmp_path):
    values = {"dropout": 0.0, "label_smoothing": 0.1, "rouge": "end"}
    one = run_main(tmp_path, name="one", per_device_batch_size=8, **values)
    config = write_config(tmp_path, per_device_batch_size=4, **values)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    launch += ["--config_file", str(ROOT / "recipes" / "accelerate" / "multi_cpu.yaml")]
    code, _, err = finish(start(*launch, *command(config, tmp_path / "two")[1:], ACCELERATE_USE_CPU="false"))
    assert code == 0, err
    assert json.loads((tmp_path / "two" / "env.json").read_text())["processes"] == 2
    close(tmp_path / "two", one)
    assert lines(tmp_path / "two")[-1]["eval_loss"] == pytest.approx(lines(one)[-1]["eval_loss"], rel=1e-5)


def test_attention_implementations_start_alike_and_see_the_same_data(tmp_path):
    names = ("eager", "sdpa", "bsa_dense")
    runs = [run_main(tmp_path, name=name, attn_implementation=name, dropout=0.0) for name in names]
    for run in runs[1:]:
        close(run, runs[0], rel=1e-4)
    config = load_config(write_config(tmp_path))
    tokenizer = load_tokenizer(config, load_records(config, "train"))
    weights = []
    for name in names:
        torch.manual_seed(5)
        weights.append(
            build_model(load_config(write_config(tmp_path, attn_implementation=name)), tokenizer).state_dict()
        )
    for other in weights[1:]:
        assert all(torch.equal(weights[0][name], other[name]) for name in weights[0])


def test_training_starts_from_saved_weights(tmp_path):
    first = run_main(tmp_path, name="first")
    start = {"model": str(first / "model"), "model_config": None}
    for name, tokenizer in (("saved with it", {}), ("named", {"tokenizer": str(first / "tokenizer")})):
        second = run_main(tmp_path, name=name, **start, **tokenizer, learning_rate=1e-12, max_steps=1)
        assert lines(second)[-1]["eval_loss"] == pytest.approx(lines(first)[-1]["eval_loss"], rel=1e-6)
        assert lines(second)[0]["source_tokens"] == lines(first)[0]["source_tokens"]
    saved, own = (AutoTokenizer.from_pretrained(first / folder) for folder in ("model", "tokenizer"))
    assert saved.get_vocab() == own.get_vocab() and saved("A storm.")["input_ids"] == own("A storm.")["input_ids"]


def test_kernels_are_compiled_before_the_first_step(tmp_path, monkeypatch):
    """With the first step's micro-batches and the loss of training; only where there is something to compile."""
    losses = []

    def warm_up(model, batches, *, loss, progress):
        losses.extend(loss(model, batch).item() for batch in batches)
        progress(1, 2)
        return hf_flashbsa.WarmUp(2, 1, 0.5)

    given = {"attn_implementation": "bsa_dense", "max_steps": 1, "gradient_accumulation_steps": 2, "dropout": 0.0}
    plain = run_main(tmp_path, name="plain", **given)
    monkeypatch.setattr(script, "warm_up", warm_up)
    run = run_main(tmp_path, **given)
    assert json.loads((run / "warm_up.json").read_text()) == {"kernels": 2, "compiled": 1, "seconds": 0.5}
    assert not (plain / "warm_up.json").exists()
    (line,) = (line for line in lines(run) if "loss" in line)
    assert curve(run) == curve(plain) and len(losses) == 2
    assert sum(losses) == pytest.approx(line["loss"] * line["target_tokens"], rel=1e-4)


def test_evaluation_leaves_training_untouched(tmp_path):
    values = {"dropout": 0.1, "max_steps": 8}
    plain = run_main(tmp_path, name="plain", **values)
    evaluated = run_main(tmp_path, name="evaluated", **values, eval_every=3, rouge="every_eval", eval_untrained=True)
    assert curve(evaluated) == curve(plain)


def test_gradient_checkpointing_changes_no_bit(tmp_path):
    values = {"dropout": 0.1, "attention_dropout": 0.1, "attn_implementation": "bsa_dense"}
    plain = run_main(tmp_path, name="plain", **values)
    recomputed = run_main(tmp_path, name="recomputed", gradient_checkpointing=True, **values)
    assert curve(recomputed) == curve(plain)


def test_bf16_autocast_keeps_float32_weights(tmp_path):
    run = run_main(tmp_path, mixed_precision="bf16", dropout=0.0)
    full = run_main(tmp_path, name="full", dropout=0.0)
    assert all(weight.dtype == torch.float32 for weight in load_file(run / "model" / "model.safetensors").values())
    losses, exact = ([line[5] for line in curve(path)] for path in (run, full))
    assert losses != exact and losses == pytest.approx(exact, rel=5e-3)


FAMILIES = {
    "pegasus": BART | {"model_type": "pegasus"},
    "t5": {"model_type": "t5", "d_model": 32, "d_kv": 16, "num_heads": 2, "num_layers": 1, "d_ff": 64},
    "llama": {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"intermediate_size": 64, "max_position_embeddings": 128},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_train_and_write_summaries(family, tmp_path):
    run = run_main(tmp_path, model_config=FAMILIES[family], max_steps=10, learning_rate=5e-3, rouge="end")
    losses = [line[5] for line in curve(run)]
    assert losses[-1] < 0.95 * losses[0]
    record = lines(run)[0]
    assert record["attention"]["layers"] == (3 if family in ("pegasus", "t5") else 2)
    assert record["examples"] == 4 and record["padded_tokens"] >= record["source_tokens"] + record["target_tokens"]
    assert (run / "predictions.jsonl").exists()


# Parts


def test_loss_is_transformers_label_smoothing():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 11), torch.randint(11, (3, 5))
    labels[0, 2:] = labels[2, :4] = -100
    batch = {"labels": labels, "decoder_input_ids": labels}

    def model(**_):
        return Seq2SeqLMOutput(logits=logits.bfloat16())

    for smoothing in (0.0, 0.1):
        expected = LabelSmoother(smoothing)({"logits": logits.bfloat16().float()}, labels)
        loss = summed_loss(model, batch, smoothing)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss / (labels != -100).sum(), expected)


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
def test_learning_rate_is_transformers_schedule_without_its_zero_step(name, tmp_path):
    config = load_config(write_config(tmp_path, lr_scheduler=name, warmup_steps=5, learning_rate=2.0))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = get_scheduler("constant_with_warmup" if name == "constant" else name, optimizer, 5, 20).lr_lambdas[0]
    ours = [learning_rate_at(step, 20, config) for step in range(1, 21)]
    # During the warm-up theirs is a step behind, at zero first.
    expected = [2.0 * theirs(step) for step in range(1, 6)] + [2.0 * theirs(step - 1) for step in range(6, 21)]
    assert ours == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "layers"),
    [
        (BART | {"encoder_layers": 2, "decoder_layers": 3}, 2 + 2 * 3),
        (FAMILIES["t5"] | {"num_decoder_layers": 2}, 1 + 2 * 2),
        (FAMILIES["llama"], 2),
        (FAMILIES["gpt2"], 2),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_attention_layers_are_counted(values, layers):
    config = MODEL_TYPES[values["model_type"]](**{k: v for k, v in values.items() if k != "model_type"}, vocab_size=50)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    assert attention_layers(auto.from_config(config)) == layers


def test_attention_layers_inside_other_attention_modules_are_counted_once():
    config = MODEL_TYPES["bert"](hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    assert attention_layers(BertModel(config)) == 2


def test_layers_that_did_not_run_our_attention_are_an_error(monkeypatch):
    config = MODEL_TYPES["bart"](**{k: v for k, v in BART.items() if k != "model_type"}, vocab_size=50)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="bsa_dense")
    monkeypatch.setattr(hf_flashbsa, "backends_used", lambda model: {"a": "torch", "b": "triton"})
    with pytest.raises(RuntimeError, match="bsa_dense ran in 2 of 3 attention layers"):
        attention_record(model, "bsa_dense")
    assert attention_record(model, "sdpa") == {"implementation": "sdpa", "backends": {}, "layers": 3}
