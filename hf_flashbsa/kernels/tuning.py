"""Launch configurations as data: `configs/triton_<arch>.json`. The first entry that fits is used."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Tile sizes and launch options of a portable kernel: `block_m` queries by `block_n` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def file_name(arch: str) -> str:
    """Name of the configuration file of `architecture`."""
    return f"triton_{arch.replace('_', '')}.json"


@functools.cache
def _table(arch: str) -> dict:
    return json.loads(resources.files("hf_flashbsa.kernels").joinpath("configs", file_name(arch)).read_text())


@functools.cache
def architecture(device: torch.device) -> str:
    """The configuration file for a device: the newest one that its compute capability reaches."""
    if device.type != "cuda":
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


@functools.cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@torch.compiler.assume_constant_result
def multiprocessors(device: torch.device) -> int:
    """Those of a GPU, or of an H200 for the interpreter."""
    return _multiprocessors(device)


_overrides: dict[str, Config] = {}


@contextlib.contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Within, `select` returns `config` for `kernel`, whatever the problem. For the tuner and for tests."""
    before = dict(_overrides)
    _overrides[kernel] = config
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def overrides() -> tuple[tuple[str, Config], ...]:
    """The configurations that `override` has set."""
    return tuple(_overrides.items())


def select(kernel: str, arch: str, block_dim: int, itemsize: int, plain: bool, aligned: bool = True) -> Config:
    """The configuration of a portable kernel ("forward", "dkdv", "dq", "dbias").

    Args:
        block_dim: the larger padded head dim of q/k and v.
        itemsize: bytes per element.
        plain: scores are only scaled and masked by bounds: no bias, softcap, dense mask or segment ids of packed
            documents, which need registers. Dropout and ALiBi slopes do not count.
        aligned: every row is aligned to 16 bytes. Otherwise loads are narrow, their addresses take registers, and the
            products must not use wgmma (`triton.load.head_view`).

    The first entry that fits is used. `plain_only` and `aligned_only` entries are for such calls alone.
    """
    return _overrides.get(kernel) or _lookup(kernel, arch, block_dim, itemsize, plain, aligned)


@functools.cache
def _lookup(kernel: str, arch: str, block_dim: int, itemsize: int, plain: bool, aligned: bool) -> Config:
    for entry in _table(arch)[kernel]:
        if (
            block_dim <= entry["head_dim"]
            and itemsize <= entry["itemsize"]
            and (plain or not entry.get("plain_only", False))
            and (aligned or not entry.get("aligned_only", False))
        ):
            return Config(entry["block_m"], entry["block_n"], entry["num_warps"], entry["num_stages"])
    raise LookupError(f"configs/{file_name(arch)} lists no {kernel} for head dim {block_dim}, {itemsize} bytes.")
