"""What ends a run early, and what it leaves: a second writer, damaged checkpoints, files that cannot be written."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from recipe_runs import (
    ROOT,
    command,
    curve,
    forget_accelerate,
    fresh_accelerate,  # noqa: F401 - used by every test
    run_main,
    write_config,
)
from safetensors import SafetensorError

from recipes.xsum import evaluate, processes, report, run_lock
from recipes.xsum import train as script
from recipes.xsum.checkpoint import NEWEST, CheckpointError, find_checkpoint
from recipes.xsum.errors import RecipeError, WriteError, run_script
from recipes.xsum.files import new_folder, write_files, writing
from recipes.xsum.manifest import MANIFEST, damage_of
from recipes.xsum.metrics import MetricsLog
from recipes.xsum.run_lock import LOCK_NAME, RunLock

DROPOUT = {"dropout": 0.3, "lr_scheduler": "constant", "save_every": 2}


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run with checkpoints after 2 and 4 steps; tests copy it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        run = run_main(tmp_path_factory.mktemp("four"), max_steps=4, **DROPOUT)
        forget_accelerate()
    return run


@pytest.fixture
def run(four_steps, tmp_path):
    return shutil.copytree(four_steps, tmp_path / "run")


def error_of(capsys, main, *argv):
    """The one line of error that a script ends with."""
    forget_accelerate()
    capsys.readouterr()
    assert main([str(value) for value in argv]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def resume(tmp_path, *argv, **values):
    config = write_config(tmp_path / "given", **DROPOUT, **values)
    return [*command(config, tmp_path / "run")[2:], "--resume", *argv]


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


@contextmanager
def largest_file(size):
    """Let no file of this process grow beyond `size` bytes: the system's own error, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# One writer


def test_lock_names_its_holder_and_leaves_no_trace(tmp_path):
    folder = tmp_path / "runs" / "one"
    with RunLock(folder) as first:
        first.acquire()
        with pytest.raises(RecipeError, match=rf"one is being written by process {os.getpid()} on .* since 20\d\d-"):
            RunLock(folder).acquire()
        (folder / "metrics.jsonl").write_text("")
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]
    with RunLock(tmp_path / "new" / "run") as other:
        other.acquire()
    assert not (tmp_path / "new").exists()


def test_lock_of_a_killed_process_does_not_block(tmp_path):
    code = (
        "import pathlib, sys, time; from recipes.xsum.run_lock import RunLock; "
        "RunLock(pathlib.Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RecipeError, match=f"is being written by process {holder.pid} on"):
            RunLock(tmp_path).acquire()
    finally:
        holder.kill()
        holder.communicate()
    assert (tmp_path / LOCK_NAME).exists()
    with RunLock(tmp_path) as lock:
        lock.acquire()


def test_of_many_that_start_at_once_one_holds_the_lock(tmp_path):
    held, most, wins = [], [], []

    def compete():
        for _ in range(40):
            with RunLock(tmp_path / "run") as lock:
                try:
                    lock.acquire()
                except RecipeError:
                    continue
                held.append(1)
                most.append(len(held))
                wins.append(1)
                held.pop()

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(wins) >= 6
    assert not list(tmp_path.glob("run/*"))


def test_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_lock.fcntl, "flock", flock)
    with RunLock(tmp_path) as lock:
        lock.acquire()
    assert "file system without locks" in caplog.text


def test_no_script_writes_a_run_that_another_process_writes(run, tmp_path, capsys):
    fresh = resume(tmp_path, max_steps=4)[:-1]
    with RunLock(run) as lock:
        lock.acquire()
        before = files_of(run)
        for argv in (fresh, [*fresh, "--resume"], [*fresh, "--overwrite"]):
            assert f"{run} is being written by process {os.getpid()}" in error_of(capsys, script.main, *argv)
        assert f"{run} is being written by" in error_of(capsys, evaluate.main, run)
        assert f"{run} is being written by" in error_of(capsys, report.main, run, "--out", run)
        assert files_of(run) == before


# Damaged checkpoints


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "without"])
def test_each_damaged_part_is_found_and_named(run, manifest):
    newest = find_checkpoint(run, NEWEST)
    assert newest.name == "step_00000004" and damage_of(newest) is None
    parts = {path.name for path in newest.iterdir()}
    assert parts >= {"model.safetensors", "optimizer.bin", "random_states_0.pkl", "state.json", MANIFEST}
    if not manifest:
        (newest / MANIFEST).unlink()
        assert damage_of(newest) is None
    for name in sorted(parts if manifest else parts - {MANIFEST}):
        whole = (newest / name).read_bytes()
        for spoil in (cut, os.remove):
            if (name, spoil) == (MANIFEST, os.remove):  # then it is a checkpoint of an earlier version
                continue
            spoil(newest / name)
            with pytest.raises(CheckpointError) as caught:
                find_checkpoint(run, NEWEST)
            assert f"{newest} is damaged: {name} " in str(caught.value)
            assert "with --resume step_00000002" in str(caught.value)
            (newest / name).write_bytes(whole)
    assert damage_of(newest) is None


@pytest.mark.parametrize("manifest", [True, False], ids=["manifest", "without"])
def test_a_changed_byte_is_found(run, manifest):
    newest = find_checkpoint(run, NEWEST)
    if not manifest:
        (newest / MANIFEST).unlink()
    for name in ("optimizer.bin", *(["model.safetensors"] if manifest else [])):
        content = bytearray((newest / name).read_bytes())
        content[len(content) // 2] ^= 1
        (newest / name).write_bytes(content)
        assert f"{name} has another checksum" in damage_of(newest)


def test_older_checkpoint_continues_to_the_same_curve(run, tmp_path, capsys):
    reference = run_main(tmp_path, name="reference", max_steps=6, **DROPOUT)
    cut(run / "checkpoints" / "step_00000004" / "random_states_0.pkl")
    before = files_of(run)
    error = error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    assert "step_00000004 is damaged: random_states_0.pkl has" in error and files_of(run) == before
    assert "holds no checkpoint step_00000003, only step_00000002, step_00000004" in error_of(
        capsys, script.main, *resume(tmp_path, "step_00000003", max_steps=6)
    )
    forget_accelerate()
    older = run / "checkpoints" / "step_00000002"
    assert script.main(resume(tmp_path, str(older), max_steps=6)) == 0
    assert curve(run) == curve(reference)
    found = sorted(path for path in (run / "checkpoints").iterdir())
    assert [path.name for path in found] == ["step_00000004", "step_00000006"]
    assert [damage_of(path) for path in found] == [None, None]


def test_generators_that_cannot_be_set_are_an_error(run, tmp_path, capsys):
    """Accelerate swallows whatever goes wrong with them."""
    newest = find_checkpoint(run, NEWEST)
    (newest / MANIFEST).unlink()
    torch.save({"step": 0, "torch_manual_seed": torch.zeros(8, dtype=torch.uint8)}, newest / "random_states_0.pkl")
    error = error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    assert f"{newest} cannot be loaded: the random generators of random_states_0.pkl cannot be set" in error
    assert "with --resume step_00000002" in error


def test_no_whole_checkpoint_left(run, tmp_path, capsys):
    for path in run.glob("checkpoints/*/optimizer.bin"):
        path.unlink()
    error = error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    assert "optimizer.bin is missing; no older one is whole, so start again with --overwrite" in error


# Files that cannot be written


def test_disk_that_fills_up_costs_no_checkpoint(tmp_path, capsys):
    reference = run_main(tmp_path, name="reference", max_steps=6, **DROPOUT)
    run = run_main(tmp_path, max_steps=2, **DROPOUT)
    largest = max((run / "checkpoints" / "step_00000002").iterdir(), key=lambda path: path.stat().st_size)
    assert largest.name == "optimizer.bin"  # which torch writes, and says "enforce fail at inline_container.cc"
    with largest_file(largest.stat().st_size - 1000):
        error = error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    checkpoints = run / "checkpoints"
    assert f"cannot write {checkpoints / 'step_00000004'}: {os.strerror(errno.EFBIG)}; " in error
    assert f"continue with --resume: {checkpoints / 'step_00000002'} is whole" in error
    assert [path.name for path in checkpoints.iterdir()] == ["step_00000002"]
    forget_accelerate()
    assert script.main(resume(tmp_path, max_steps=6)) == 0
    assert curve(run) == curve(reference)


def test_first_checkpoint_that_cannot_be_written(tmp_path, capsys):
    config = write_config(tmp_path / "given", max_steps=2)
    with largest_file(60_000):
        error = error_of(capsys, script.main, *command(config, tmp_path / "run")[2:])
    assert "cannot write " in error and "then start again with --overwrite" in error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EDQUOT, "quota"), os.strerror(errno.EDQUOT) + "; make room there"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left on device; make room"),
        (Exception("Read-only file system (os error 30)"), "Read-only file system; make it writable or choose"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 0"), "[enforce fail at inline"),
    ],
    ids=["python", "safetensors", "tokenizers", "torch"],
)
def test_every_library_s_failure_to_write_is_one_error(tmp_path, error, reason):
    with pytest.raises(WriteError) as caught, writing(tmp_path / "file"):
        raise error
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'file'}: {reason}")


def test_other_errors_pass(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), writing(tmp_path / "file"):
        raise RuntimeError("shapes do not fit")
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)


def test_metrics_hold_whole_lines(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    with largest_file(log.size + 4), pytest.raises(WriteError, match="metrics.jsonl: File too large"):
        log.write({"step": 2})
    log.write({"step": 3})
    log.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 3}\n'


def test_partial_files_and_folders_replace_nothing(tmp_path):
    first, second, folder = tmp_path / "first", tmp_path / "second", tmp_path / "model"
    write_files({first: "old", second: "old"})
    with new_folder(folder) as filled:
        (filled / "weights").write_text("old")
    with largest_file(100):
        with pytest.raises(WriteError, match="second"):
            write_files({first: "new", second: "new" * 100})
        with pytest.raises(WriteError, match="model"), new_folder(folder) as filled:
            (filled / "weights").write_text("new" * 100)
    assert {first.read_text(), second.read_text(), (folder / "weights").read_text()} == {"old"}
    assert {path.name for path in tmp_path.iterdir()} == {"first", "second", "model"}


def test_evaluation_of_a_read_only_run_ends_before_it_generates(run, tmp_path, capsys, monkeypatch):
    def read_only(path, *rest, open=os.open):
        if str(path) == str(run / LOCK_NAME):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return open(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(run_lock.os, "open", read_only)
        patch.setattr(evaluate, "generate_summaries", lambda *_: pytest.fail("generated"))
        assert "run.lock: Read-only file system; make it" in error_of(capsys, evaluate.main, run)
        assert "Read-only file system" in error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    before = files_of(run)
    forget_accelerate()
    assert evaluate.main([str(run), "--out", str(tmp_path / "scores")]) == 0
    assert files_of(run) == before
    assert {path.name for path in (tmp_path / "scores").iterdir()} == {"rouge.json", "predictions.jsonl"}


def test_summaries_that_cannot_be_written_are_saved_elsewhere(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(tmp_path))
    (run / "rouge.json.partial").mkdir()  # in the way
    error = error_of(capsys, evaluate.main, run)
    assert f"cannot write {run / 'rouge.json'}: {os.strerror(errno.EISDIR)}" in error
    [rescue] = tmp_path.glob("run_scores_*")
    assert error.endswith(f"what was to be written there is in {rescue}")
    assert len((rescue / "predictions.jsonl").read_text().splitlines()) == 4
    assert "rouge1" in json.loads((rescue / "rouge.json").read_text())
    assert not (run / "predictions.jsonl").exists()


def test_damaged_files_of_a_run_are_named(run, tmp_path, capsys):
    (run / "rouge.json").write_text('{"split": ')
    assert f"{run / 'rouge.json'} is damaged: " in error_of(capsys, evaluate.main, run)
    assert f"{run / 'rouge.json'} is damaged: " in error_of(capsys, report.main, run, "--out", tmp_path / "out")
    (run / "rouge.json").unlink()
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text('{"step": 1}\n{"st\n')
    assert "metrics.jsonl, line 2 is damaged" in error_of(capsys, report.main, run, "--out", tmp_path / "out")
    (run / "metrics.jsonl").write_text(whole)
    (tmp_path / "out").write_text("a file")
    assert "it is no folder: choose another" in error_of(capsys, report.main, run, "--out", tmp_path / "out")
    shutil.copy(ROOT / "LICENSE", run / "env.json")
    assert f"{run / 'env.json'} is damaged" in error_of(capsys, script.main, *resume(tmp_path, max_steps=6))
    cut(run / "model" / "model.safetensors")
    assert f"cannot build {run / 'model'} with attn_implementation sdpa: " in error_of(capsys, evaluate.main, run)


# Processes


@pytest.mark.skipif(torch.cuda.is_available(), reason="Accelerate would wait for the other process on the GPU")
def test_processes_that_no_launcher_started(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    before = files_of(run)
    for main, argv in ((script.main, resume(tmp_path, max_steps=6)), (evaluate.main, [run])):
        assert "WORLD_SIZE is 2, but RANK and MASTER_ADDR not set" in error_of(capsys, main, *argv)
    assert files_of(run) == before


def test_processes_that_accelerate_does_not_see(run, tmp_path, capsys, monkeypatch):
    """Accelerate joins processes on a machine without GPUs only if it is told to use the CPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    told = []

    def alone(**options):
        told.append(options["cpu"])
        return SimpleNamespace(num_processes=1, device=torch.device("cpu"))

    monkeypatch.setattr(processes, "Accelerator", alone)
    before = files_of(run)
    for main, argv in ((script.main, resume(tmp_path, max_steps=6)), (evaluate.main, [run])):
        error = error_of(capsys, main, *argv)
        assert "WORLD_SIZE is 2, but Accelerate sees 1 on the cpu" in error
        assert "recipes/accelerate/multi_cpu.yaml" in error
    assert told == [True, True] and files_of(run) == before


AGREE = """
import sys
from accelerate import Accelerator
from recipes.xsum.errors import WriteError
from recipes.xsum.processes import main_first, on_main, together

accelerator = Accelerator()
rank, seen, order = accelerator.process_index, [], []

def fail(error, *ranks):
    def action():
        if rank in ranks:
            raise error
    return action

for agree, action in (
    (together, fail(WriteError("state", "No space left on device"), 1)),
    (together, fail(KeyError("odd"), 0)),
    (on_main, fail(OSError(30, "Read-only file system", "run"), 0)),
    (main_first, fail(WriteError("cache", "full"), 0)),
):
    try:
        agree(accelerator, action)
    except Exception as error:
        seen.append(f"{type(error).__name__}: {error}")
seen.append(on_main(accelerator, lambda: f"from {rank}"))
seen.append(main_first(accelerator, lambda: f"own {rank}"))
print("\\n" + repr((rank, seen)), flush=True)
accelerator.end_training()
"""


def test_error_of_one_process_ends_all(tmp_path):
    (tmp_path / "agree.py").write_text(AGREE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "agree.py"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    zero, one = (seen for _, seen in sorted(eval(line) for line in done.stdout.splitlines() if line.startswith("(")))
    full = "WriteError: cannot write state: No space left on device; see that the folder can be written"
    read_only = "OSError: [Errno 30] Read-only file system: 'run'"
    assert zero[0] == one[0] == full and zero[2] == one[2] == read_only
    assert (zero[1], one[1]) == ("KeyError: 'odd'", "RecipeError: process 0 failed: KeyError: 'odd'")
    assert zero[3] == one[3] and zero[3].startswith("WriteError: cannot write cache: full")
    assert zero[4:] == ["from 0", "own 0"] and one[4:] == ["from 0", "own 1"]
