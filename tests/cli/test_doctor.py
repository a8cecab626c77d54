"""The doctor's findings, on this machine and on machines that are not here."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from hf_flashbsa import __main__
from hf_flashbsa.cli import doctor


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_examines_this_machine(no_interpreter, capsys):
    assert __main__.main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["works"]
    assert found["backends"]["torch"] == {"ok": True, "reason": None}
    assert found["backends"]["triton"]["ok"] == torch.cuda.is_available()
    assert found["registered"]["bsa_dense"] == "with its mask function"
    assert found["versions"]["torch"] == torch.__version__
    assert Path(found["configuration"]["file"]).is_file()


def test_prints_one_line_each(no_interpreter, capsys):
    assert doctor.main(argparse.Namespace(json=False)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("torch back end") and "runs" in line for line in lines)
    assert any("bsa_dense" in line for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="describes machines without a CUDA device")
def test_says_why_kernels_do_not_run(no_interpreter, monkeypatch):
    assert "CUDA" in doctor._why_not_triton()
    assert any("slow" in line for line in doctor.examine()["trouble"])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no CUDA device" in doctor._why_not_triton()


def test_old_gpu_and_missing_triton_are_named(no_interpreter, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "sm_75" in doctor._why_not_triton()
    monkeypatch.setattr(doctor, "_importable", lambda module: f"No module named {module!r}")
    assert "pip install triton" in doctor._why_not_triton()


def test_says_why_hopper_kernels_do_not_run(monkeypatch):
    gpu = torch.device("cuda")
    assert "triton" in doctor._why_not_hopper("no Triton", gpu)
    monkeypatch.setattr(doctor.tuning, "is_hopper", lambda device: False)
    assert "sm_90" in doctor._why_not_hopper(None, gpu)
    monkeypatch.setattr(doctor.tuning, "is_hopper", lambda device: True)
    assert doctor._why_not_hopper(None, gpu) is None
    monkeypatch.setattr("hf_flashbsa.kernels.gluon_sm90.dispatch.unavailable_reason", lambda device: "another Gluon")
    assert doctor._why_not_hopper(None, gpu) == "another Gluon"


def test_exit_code_tells_of_attention_that_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_trial", lambda backend, device: f"{backend} is broken")
    assert doctor.main(argparse.Namespace(json=False)) == 1
    assert "is broken" in capsys.readouterr().out


def test_trial_notices_wrong_results(monkeypatch):
    right = doctor.attention
    monkeypatch.setattr(doctor, "attention", lambda *args, **options: right(*args, **options) * 1.1)
    assert "wrong results" in doctor._trial("torch", torch.device("cpu"))


def test_help_without_a_command(capsys):
    assert __main__.main([]) == 0
    assert "doctor" in capsys.readouterr().out


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(__main__.COMMANDS, "doctor", ("a_package_nobody_has", "?"))
    assert __main__.main(["doctor"]) == 1
    assert "pip install" in capsys.readouterr().err


def test_reader_that_has_enough_ends_the_command_quietly(monkeypatch):
    """As in `hf-flashbsa doctor | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert __main__.main([]) == 128 + signal.SIGPIPE
