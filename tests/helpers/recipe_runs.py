"""Tiny runs of the training script, in this process or as a real one, for the tests of the recipe."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

from recipes.xsum import train as script

ROOT = Path(__file__).resolve().parents[2]
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


def start(*argv, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | variables
    return subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run):
    """CURVE's numbers of each logged step."""
    return [[line[key] for key in CURVE] for line in lines(run) if "loss" in line]


def signal_at_step(monkeypatch, number, step):
    """Sends this process a signal at the begin of a training step, counted from 1."""
    take_step = script.Training._optimiser_step

    def take_signalled_step(training, micro_batches):
        if training.state.step + 1 == step:
            os.kill(os.getpid(), number)
        return take_step(training, micro_batches)

    monkeypatch.setattr(script.Training, "_optimiser_step", take_signalled_step)


def steps_logged(run):
    path = run / "metrics.jsonl"
    return path.read_text().count('"grad_norm"') if path.exists() else 0


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "training ended before it was to be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.002)
