"""What a measurement or a run was made with."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch


def version(package: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """The commit of the checkout that this package runs from, "-dirty" with changes in it; None outside of one."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"


def environment(device: torch.device) -> dict[str, str | None]:
    """Device, versions and commit, for a row of results."""
    return {
        "gpu": device_name(device),
        "torch": torch.__version__,
        "triton": version("triton"),
        "flash_attn": version("flash-attn"),
        "commit": commit(),
    }
