"""The training script: what a run leaves behind, and exact resumption after every kind of interruption."""

import contextlib
import io
import json
import os
import shutil
import signal

import pytest
import torch
from recipe_runs import (
    command,
    curve,
    finish,
    forget_accelerate,
    fresh_accelerate,  # noqa: F401 - used by every test
    lines,
    run_main,
    signal_at_step,
    start,
    steps_logged,
    wait_until,
    write_config,
)
from safetensors.torch import load_file

from recipes.xsum import train as script
from recipes.xsum.config import load_config
from recipes.xsum.loop import Interrupted, StopSignal
from recipes.xsum.records import load_records
from recipes.xsum.tokenizer import load_tokenizer

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


@pytest.fixture(scope="module")
def full_config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("config"), **FULL)


@pytest.fixture(scope="module")
def finished(full_config, tmp_path_factory):
    """The run of FULL without interruption."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as printed:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert script.main(command(full_config, run)[2:]) == 0
    forget_accelerate()
    assert "step 36/36" in printed.getvalue() and "finished" in printed.getvalue()
    return run


# What a run leaves


def test_run_directory_holds_everything(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("config.yaml", "env.json", "metrics.jsonl", "ledger.json", "rouge.json", "predictions.jsonl"),
        *("checkpoints", "model", "tokenizer", "trackers"),
    }
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step_00000030", "step_00000036"]
    config = load_config(finished / "config.yaml")
    assert (config.max_steps, config.dropout, config.output_dir) == (36, 0.1, str(finished))
    env = json.loads((finished / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__
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
    """The real script, killed, and continued in another process."""
    run = tmp_path / "run"
    process = start(*command(full_config, run))
    wait_until(lambda: steps_logged(run) >= 14 and (run / "checkpoints" / "step_00000012").exists(), process)
    process.send_signal(signal.SIGKILL)
    assert finish(process)[0] == -signal.SIGKILL
    assert 14 <= steps_logged(run) < 36

    assert script.main(command(full_config, run, "--resume")[2:]) == 0
    assert curve(run) == curve(finished)
    strip = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in lines(run)]
    full = [{k: v for k, v in line.items() if k not in ("seconds", "peak_memory_gib")} for line in lines(finished)]
    assert strip == full
    for name in ("model/model.safetensors", "rouge.json", "predictions.jsonl"):
        assert (run / name).read_bytes() == (finished / name).read_bytes(), name
    env = json.loads((run / "env.json").read_text())
    assert "--output_dir" in env["command"] and len(env["resumed"]) == 1


def assert_stopped_and_continued(number, code, err, config, run, finished):
    """What a signal leaves: its exit code, its message, and a checkpoint to go on from."""
    saved = sorted((run / "checkpoints").iterdir())[-1]
    assert code == 128 + number
    assert err.strip() == f"stopped by {number.name}: {saved} is saved; continue with --resume"
    assert saved.name == f"step_{steps_logged(run):08d}"
    assert script.main(command(config, run, "--resume")[2:]) == 0
    assert curve(run) == curve(finished)


def test_real_script_saves_a_checkpoint_at_a_signal(full_config, finished, tmp_path):
    run = tmp_path / "run"
    process = start(*command(full_config, run))
    wait_until(lambda: steps_logged(run) >= 2, process)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert_stopped_and_continued(signal.SIGTERM, code, err, full_config, run, finished)


def test_interrupt_saves_a_checkpoint_to_go_on_from(full_config, finished, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at_step(patch, signal.SIGINT, 8)
        code = script.main(command(full_config, run)[2:])
    forget_accelerate()
    assert steps_logged(run) == 8
    assert_stopped_and_continued(signal.SIGINT, code, capsys.readouterr().err, full_config, run, finished)


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
