"""What all tests share. The environment is set here because Triton and the Hub's client read it on import."""

from __future__ import annotations

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import durations
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.repair()

from run_cases import poisoned_memory


def pytest_addoption(parser):
    parser.addoption("--record-durations", action="store_true", help=f"write {durations.FILE.name} of a whole run")


def pytest_configure(config):
    if config.getoption("record_durations"):
        config.pluginmanager.register(durations.Recording())


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by markers
def pytest_collection_modifyitems(items):
    durations.sort_and_mark(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Workers without tests take over what others have not begun. By default, the longest would all stay with the
    first worker."""
    if config.getoption("dist") == "load":
        from xdist.scheduler import WorkStealingScheduling

        return WorkStealingScheduling(config, log)


@pytest.fixture
def nan_memory():
    """Uninitialised floating-point tensors hold NaN, so that memory that a kernel should have written shows."""
    with poisoned_memory():
        yield
