"""Errors of the training script: one line that names cause and remedy, nothing written, nothing lost."""

import json

import pytest
from recipe_runs import (
    BART,
    command,
    finish,
    fresh_accelerate,  # noqa: F401 - used by every test
    run_main,
    start,
    steps_logged,
    write_config,
)

from recipes.xsum import train as script


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
        ({"attn_implementation": "fa2_repaired", "mixed_precision": "bf16"}, "fa2_repaired needs a CUDA device"),
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
