"""Errors of the training script: one line that names cause and remedy, nothing written, nothing lost."""

import json
import runpy
import shutil
import sys

import pytest
from datasets import Dataset
from recipe_runs import (
    BART,
    command,
    fresh_accelerate,  # noqa: F401 - used by every test
    run_main,
    steps_logged,
    write_config,
)

from recipes.xsum import train as script
from recipes.xsum.config import load_config
from recipes.xsum.corpus import generate_corpus
from recipes.xsum.manifest import write_manifest
from recipes.xsum.tokenizer import load_tokenizer

BERT = {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def error_of(capsys, config, out, *argv):
    """The script's one line of error; asserts that nothing was written or removed."""
    before = {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path.is_file()}
    assert script.main([*command(config, out, *argv)[2:]]) == 2
    assert {path: path.stat().st_mtime_ns for path in out.parent.rglob("*") if path.is_file()} == before
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_errors_come_without_traceback_from_the_real_script(tmp_path, monkeypatch, capsys):
    _, *argv = command(write_config(tmp_path), tmp_path / "run", "--learnig_rate", "1")
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the script adds to it
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(argv[0], run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err == "error: unknown argument '--learnig_rate'; did you mean --learning_rate?\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_implementation": "bsa_dens"}, "unknown attn_implementation 'bsa_dens'; known here: eager, bsa_dense"),
        ({"attn_implementation": "flash_attention_2", "mixed_precision": "bf16"}, "flash_attention_2 needs a CUDA"),
        ({"attn_implementation": "fa2_repaired", "mixed_precision": "bf16"}, "fa2_repaired needs a CUDA device"),
        ({"require_cuda": True}, "require_cuda: true needs a CUDA device, but this run would be on cpu"),
        ({"report_to": ["tensorbord"]}, "report_to: 'tensorbord' is not installed or unknown; installed: "),
        ({"per_device_batch_size": 64}, "40 training documents do not fill one batch of 64"),
        ({"max_source_length": 256}, "max_source_length 256: 256 positions needed, but the model has 128 (max_pos"),
        ({"max_new_tokens": 129, "rouge": "end"}, "max_new_tokens 129: 129 positions needed, but the model has 128"),
        ({"prompt_template": "Sum up: {document}"}, "prompt_template 'Sum up: {document}' is for decoder-only models"),
        ({"max_source_length": 2}, "max_source_length 2 leaves no room for text: the tokenizer adds 2 special tokens"),
        ({"seed": 2**32}, "seed must be below 4294967296, got 4294967296"),
        ({"model_config": BART | {"d_model": -32}}, "model_config: d_model must not be negative, got -32"),
        ({"model_config": BART | {"d_model": 0}}, "cannot build bart with attn_implementation sdpa: "),
        ({"model_config": {"model_type": "encoder-decoder"}}, "encoder-decoder is made of several models"),
        ({"model_config": BERT}, "bert is an encoder, whose tokens see the ones that they are to predict; use an enc"),
        ({"model_config": {"model_type": "xlnet"}}, "xlnet is an encoder, whose tokens see"),
        (
            {"model_config": {"model_type": "vit"}},
            "vit writes no text from text, so it cannot be trained here; use an",
        ),
        ({"model_config": {"model_type": "whisper"}}, "whisper writes no text from text, so it cannot be trained"),
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
        write_manifest(state.parent)
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


def test_older_run_without_a_tokenizer_in_model(capsys, tmp_path):
    run = run_main(tmp_path)
    for path in (run / "model").glob("tokenizer*"):
        path.unlink()
    capsys.readouterr()
    config = write_config(tmp_path / "next", model_config=None, model=str(run / "model"))
    error = error_of(capsys, config, tmp_path / "out")
    assert f"tokenizer '{run / 'model'}' has an empty vocabulary: its files are missing there; set tokenizer" in error
    config = write_config(tmp_path / "next", model_config=None, model=str(run))
    assert error_of(capsys, config, tmp_path / "out").endswith(f"; did you mean {run / 'model'}?")
    (run / "model" / "model.safetensors").write_bytes(b"0123456789abcdef")
    options = {"model": str(run / "model"), "tokenizer": str(run / "tokenizer"), "model_config": None}
    error = error_of(capsys, write_config(tmp_path / "next", **options), tmp_path / "out")
    assert error.startswith(f"error: cannot build {run / 'model'} with attn_implementation sdpa: ")


def test_tokenizers_of_other_models(capsys, tmp_path):
    run = run_main(tmp_path)
    capsys.readouterr()
    settings = json.loads((run / "tokenizer" / "tokenizer_config.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(run / "tokenizer", other)
    (other / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<unk>"}))
    options = {"model": str(run / "model"), "model_config": None, "tokenizer": str(other)}
    error = error_of(capsys, write_config(tmp_path / "next", **options), tmp_path / "out")
    assert f"tokenizer '{other}' ends a text with id 3, but model '{run / 'model'}' with 2: it looks like an" in error
    larger = load_tokenizer(load_config(write_config(tmp_path / "a", vocab_size=420)), load_corpus())
    larger.save_pretrained(other)
    error = error_of(capsys, write_config(tmp_path / "next", **options), tmp_path / "out")
    assert "the tokenizer has 420 entries, but the model's vocab_size is 400; use the model's own tokenizer" in error


def load_corpus():
    return Dataset.from_list(generate_corpus(40, 0, "train"))
