"""The training script: what it writes, exact resumption, every error, and that splitting a batch changes nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING as MODEL_TYPES
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, BertModel, get_scheduler
from transformers.modeling_outputs import Seq2SeqLMOutput
from transformers.trainer_pt_utils import LabelSmoother

import hf_flashbsa
from recipes.xsum import train as script
from recipes.xsum.config import load_config
from recipes.xsum.data import load_records, load_tokenizer
from recipes.xsum.loop import Interrupted, StopSignal, learning_rate_at
from recipes.xsum.model import attention_layers, attention_record, build_model, summed_loss

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "recipes" / "xsum" / "train.py"
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
BART = {"model_type": "bart", "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, **HEADS}
BART |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128}
TINY = {
    "model_config": BART,
    "attn_implementation": "sdpa",
    "generated_examples": 40,
    "max_eval_examples": 4,
    "vocab_size": 400,
    "max_source_length": 64,
    "max_target_length": 24,
    "per_device_batch_size": 4,
    "max_steps": 6,
    "learning_rate": 1e-3,
    "num_beams": 2,
    "max_new_tokens": 6,
    "bootstrap_samples": 10,
    "rouge": "never",
    "log_every": 1,
    "report_to": [],
}
# 10 steps an epoch; step 12 is in the middle of the second one. Both kinds of dropout draw random numbers.
FULL = {
    "attn_implementation": "bsa_dense",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "max_steps": 36,
    "eval_every": 18,
    "save_every": 6,
    "rouge": "end",
    "eval_untrained": True,
    "report_to": ["tensorboard"],
}
CURVE = ("step", "examples", "source_tokens", "target_tokens", "padded_tokens", "loss", "grad_norm", "learning_rate")


@pytest.fixture(autouse=True)
def fresh_accelerate(monkeypatch):
    """Each run is on the CPU, where it is exactly repeatable, and finds Accelerate as a new process would."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    yield
    forget_accelerate()


def forget_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def write_config(folder, **values):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(TINY | values))
    return path


def run_main(tmp_path, *argv, name="run", **values):
    """Train in this process; returns the run directory."""
    config = write_config(tmp_path / "given", **values)
    forget_accelerate()
    assert script.main(["--config", str(config), "--output_dir", str(tmp_path / name), *argv]) == 0
    return tmp_path / name


def command(config, out, *argv):
    return [sys.executable, str(TRAIN), "--config", str(config), "--output_dir", str(out), *argv]


def start(*argv, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen(
        argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run, keys=CURVE):
    return [[line[key] for key in keys] for line in lines(run) if "loss" in line]


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "training ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.fixture(scope="module")
def full_config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), **FULL)


@pytest.fixture(scope="module")
def finished(full_config, tmp_path_factory):
    """The run of FULL without interruption, by the real script."""
    run = tmp_path_factory.mktemp("finished") / "run"
    code, out, err = finish(start(*command(full_config, run)))
    assert code == 0, err
    assert "step 36/36" in out and "finished" in out
    return run


# What a run leaves


def test_run_directory_holds_everything(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "env.json", "metrics.jsonl", "rouge.json", "predictions.jsonl"),
        *("checkpoints", "model", "tokenizer", "trackers"),
    }
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step_00000030", "step_00000036"]
    config = load_config(finished / "config.yaml")
    assert (config.max_steps, config.dropout, config.output_dir) == (36, 0.1, str(finished))
    env = json.loads((finished / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__ and "--output_dir" in env["command"]
    scores = json.loads((finished / "rouge.json").read_text())
    assert scores["split"] == "test" and scores["examples"] == 4
    assert scores["rouge1"].keys() == scores["untrained"]["rouge1"].keys() == {"score", "low", "high"}
    assert len((finished / "predictions.jsonl").read_text().splitlines()) == 4
    saved = load_file(finished / "model" / "model.safetensors")
    last = load_file(finished / "checkpoints" / "step_00000036" / "model.safetensors")
    assert all(torch.equal(saved[name], last[name]) for name in saved)


def test_metrics_count_tokens_time_memory_and_attention(finished):
    records = [line for line in lines(finished) if "loss" in line]
    assert [line["step"] for line in records] == list(range(1, 37))
    assert [line["examples"] for line in records] == list(range(4, 4 * 36 + 1, 4))
    assert records[19]["epoch"] == 2.0
    assert records[-1]["loss"] < records[0]["loss"]
    for line in records:
        assert line["attention"] == {"implementation": "bsa_dense", "backends": {"torch": 3}, "layers": 3}
        assert 0.05 < line["peak_memory_gib"] < 50
        # Batches of documents of similar length: some padding, not much.
        tokens = line["source_tokens"] + line["target_tokens"]
        assert tokens <= line["padded_tokens"] < 1.5 * tokens
    assert all(a["seconds"] < b["seconds"] for a, b in zip(records, records[1:], strict=False))
    # An epoch sees each document once: 40 documents cut to 64 tokens, and their summaries.
    config = load_config(finished / "config.yaml")
    rows = load_records(config, "train")
    tokenizer = load_tokenizer(config, rows)
    sources = tokenizer(list(rows["document"]), truncation=True, max_length=64)["input_ids"]
    targets = tokenizer(list(rows["summary"]), truncation=True, max_length=24)["input_ids"]
    assert records[9]["source_tokens"] == sum(map(len, sources))
    assert records[9]["target_tokens"] == sum(map(len, targets))


def test_evaluations_are_logged(finished):
    evals = [(line["step"], line["split"]) for line in lines(finished) if "eval_loss" in line]
    assert evals == [(18, "validation"), (36, "validation"), (36, "test")]
    last = lines(finished)[-1]
    scores = json.loads((finished / "rouge.json").read_text())
    assert last["rouge"]["rougeL"] == scores["rougeL"]


def test_tensorboard_holds_the_losses(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "trackers" / "xsum"))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in logged] == list(range(1, 37))
    assert [value for _, value in logged] == pytest.approx([line[5] for line in curve(finished)])
    assert [event.step for event in events.Scalars("eval_validation/loss")] == [18, 36]


# Interruption and resumption


def test_killed_run_resumes_to_the_last_bit(full_config, finished, tmp_path):
    run = tmp_path / "run"
    process = start(*command(full_config, run))
    wait_until(lambda: steps_logged(run) >= 14 and (run / "checkpoints" / "step_00000012").exists(), process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert 14 <= steps_logged(run) < 36

    code, out, err = finish(start(*command(full_config, run, "--resume")))
    assert code == 0, err
    assert curve(run) == curve(finished)
    strip = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in lines(run)]
    full = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in lines(finished)]
    assert strip == full
    for name in ("model/model.safetensors", "rouge.json", "predictions.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    assert len(json.loads((run / "env.json").read_text())["resumed"]) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_signal_saves_a_checkpoint_to_go_on_from(number, full_config, finished, tmp_path):
    run = tmp_path / "run"
    process = start(*command(full_config, run))
    wait_until(lambda: steps_logged(run) >= 2, process)
    process.send_signal(number)
    code, _, err = finish(process)
    saved = sorted((run / "checkpoints").iterdir())[-1]
    assert code == 128 + number
    assert err.strip() == f"stopped by {number.name}: {saved} is saved; continue with --resume"
    assert saved.name == f"step_{steps_logged(run):08d}"

    assert script.main([*command(full_config, run, "--resume")[2:]]) == 0
    assert curve(run) == curve(finished)


def test_signal_during_an_evaluation_ends_it_at_once():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal()
    with pytest.raises(Interrupted, match="stopped by SIGTERM: nothing is saved yet") as stopped:
        with stop, stop.at_once("nothing is saved yet"):
            os.kill(os.getpid(), signal.SIGTERM)
            pytest.fail("the signal did not interrupt")
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_second_interrupt_does_not_wait_for_the_step():
    stop = StopSignal()
    with pytest.raises(KeyboardInterrupt), stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == signal.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)  # as launchers do; the checkpoint is still to be written
        os.kill(os.getpid(), signal.SIGINT)


def test_resumed_run_may_be_longer(tmp_path):
    short = run_main(tmp_path, max_steps=4, lr_scheduler="constant")
    run_main(tmp_path, "--resume", max_steps=9, lr_scheduler="constant", log_every=1)
    full = run_main(tmp_path, name="full", max_steps=9, lr_scheduler="constant")
    assert curve(short) == curve(full)


def test_resuming_a_finished_run_repeats_only_its_evaluation(tmp_path):
    run = run_main(tmp_path, rouge="end")
    before = (run / "metrics.jsonl").read_bytes()
    (run / "rouge.json").unlink()
    run_main(tmp_path, "--resume", rouge="end")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert (run / "rouge.json").exists()


def test_loss_between_log_lines_survives_a_checkpoint(tmp_path):
    """A line averages over the steps since the last one, also where a run stopped between the two."""
    values = {"log_every": 4, "save_every": 6, "max_steps": 8, "dropout": 0.1}
    full = run_main(tmp_path, name="full", **values)
    each = run_main(tmp_path, name="each", **(values | {"log_every": 1}))
    cut = run_main(tmp_path, **values)
    shutil.rmtree(cut / "checkpoints" / "step_00000008")
    run_main(tmp_path, "--resume", **values)
    assert curve(cut) == curve(full)
    single = [(line["loss"], line["target_tokens"]) for line in lines(each) if "loss" in line]
    weights = [b[1] - a[1] for a, b in zip([(0, 0), *single], single, strict=False)]
    mean = sum(loss * weight for (loss, _), weight in zip(single[4:], weights[4:], strict=True)) / sum(weights[4:])
    assert curve(full)[1][5] == pytest.approx(mean, rel=1e-6)


def test_half_written_checkpoint_is_no_checkpoint(tmp_path):
    run = run_main(tmp_path, max_steps=4, save_every=2)
    checkpoint = run / "checkpoints"
    (checkpoint / "step_00000004").rename(checkpoint / "partial_00000004")
    (checkpoint / "partial_00000004" / "optimizer.bin").unlink()
    (run / "model" / "model.safetensors").unlink()
    run_main(tmp_path, "--resume", max_steps=4, save_every=2)
    assert sorted(path.name for path in checkpoint.iterdir()) == ["step_00000002", "step_00000004"]
    assert (run / "model" / "model.safetensors").exists()


# Errors


def error_of(capsys, config, out, *argv):
    """The script's one line of error; asserts that nothing was written or removed."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path.is_file()}
    assert script.main([*command(config, out, *argv)[2:]]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path.is_file()} == before
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_errors_come_without_traceback_from_the_real_script(tmp_path):
    config = write_config(tmp_path)
    code, out, err = finish(start(*command(config, tmp_path / "run", "--learnig_rate", "1")))
    assert (code, out) == (2, "")
    assert err == "error: unknown argument '--learnig_rate'; did you mean --learning_rate?\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_implementation": "bsa_dens"}, "unknown attn_implementation 'bsa_dens'; known here: eager, bsa_dense"),
        ({"attn_implementation": "flash_attention_2", "mixed_precision": "bf16"}, "flash_attention_2 needs a CUDA"),
        ({"require_cuda": True}, "require_cuda: true needs a CUDA device, but this run would be on cpu"),
        ({"report_to": ["tensorbord"]}, "report_to: 'tensorbord' is not installed or unknown; installed: "),
        ({"per_device_batch_size": 64}, "40 training documents do not fill one batch of 64"),
        ({"max_source_length": 256}, "need 256 positions, but the model has 128"),
        ({"model_config": {"model_type": "bartt"}}, "unknown model_type 'bartt'; did you mean bart?"),
        ({"model_config": BART | {"d_modle": 8}}, "bart has no model_config field 'd_modle'; did you mean d_model?"),
        ({"model_config": BART | {"d_model": "wide"}}, "model_config does not make a bart config"),
        ({"model_config": BART | {"d_model": 33}}, "cannot build bart with attn_implementation sdpa: embed_dim must"),
        ({"model_config": BART | {"vocab_size": 9}}, "the tokenizer has 400 entries, but the model's vocab_size is 9"),
        ({"model_config": {"model_type": "t5"}, "attention_dropout": 0.1}, "t5 has no attention_dropout of its own"),
        ({"model_config": None, "model": "/no/such/model"}, "cannot load model '/no/such/model'"),
        (
            {"dataset": "files", **dict.fromkeys(("train_file", "validation_file", "test_file"), "no.jsonl")},
            "no.jsonl",
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_unfit_settings_are_errors_before_anything_is_written(capsys, tmp_path, values, message):
    config = write_config(tmp_path, **values)
    assert message in error_of(capsys, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_errors_of_the_run_directory(capsys, tmp_path):
    out = tmp_path / "run"
    config = write_config(tmp_path / "given", max_steps=4, save_every=2)
    assert f"--resume: {out} holds no run" in error_of(capsys, config, out, "--resume")
    run_main(tmp_path, max_steps=4, save_every=2)
    capsys.readouterr()
    assert f"output_dir {out} is not empty; continue with --resume" in error_of(capsys, config, out)
    assert "give one of them" in error_of(capsys, config, out, "--resume", "--overwrite")
    message = error_of(capsys, config, out, "--resume", "--learning_rate", "2", "--seed", "1", "--log_every", "2")
    assert "differing: seed (was 0, now 1), learning_rate (was 0.001, now 2.0)" in message
    assert "has more steps than this run is to have, 3" in error_of(
        capsys, config, out, "--resume", "--max_steps", "3"
    )
    # An error with --overwrite must not have removed the earlier run.
    assert "unknown attn_impl" in error_of(capsys, config, out, "--overwrite", "--attn_implementation", "x")

    state = out / "checkpoints" / "step_00000004" / "state.json"
    record = json.loads(state.read_text())
    for key, wrong, words in (
        ("processes", 2, "was written by 2 processes and this run has 1"),
        ("data_hash", "0", "the training documents are not those"),
        ("config_hash", "0", "was changed since step_00000004 was written"),
        ("metrics_bytes", 10**6, "metrics.jsonl is shorter than it was at step_00000004"),
    ):
        state.write_text(json.dumps(record | {key: wrong}))
        assert words in error_of(capsys, config, out, "--resume")
    (out / "checkpoints").rename(out / "elsewhere")
    assert "holds no complete checkpoint; start again with --overwrite" in error_of(capsys, config, out, "--resume")
    (out / "config.yaml").unlink()
    assert "no config.yaml, so it is no run" in error_of(capsys, config, out, "--overwrite")


def test_overwrite_removes_the_runs_own_files_alone(tmp_path):
    run = run_main(tmp_path, max_steps=4, save_every=2)
    (run / "notes.txt").write_text("mine")
    (run / "model" / "old.bin").write_text("stale")
    run_main(tmp_path, "--overwrite", max_steps=2)
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "model" / "old.bin").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert steps_logged(run) == 2


def test_loss_that_is_no_number_ends_the_run(capsys, tmp_path):
    config = write_config(tmp_path, learning_rate=1e30)
    assert script.main([*command(config, tmp_path / "run")[2:]]) == 2
    assert "error: the loss is nan at step 2" in capsys.readouterr().err
    assert steps_logged(tmp_path / "run") == 1


# The course of training


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
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    code, _, err = finish(start(*launch, *command(config, tmp_path / "two")[1:]))
    assert code == 0, err
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
    start = {"model": str(first / "model"), "model_config": None, "tokenizer": str(first / "tokenizer")}
    second = run_main(tmp_path, name="second", **start, learning_rate=1e-12, max_steps=1)
    assert lines(second)[-1]["eval_loss"] == pytest.approx(lines(first)[-1]["eval_loss"], rel=1e-6)


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
