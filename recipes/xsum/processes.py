"""The processes of one run: how many there are, what the main one does for all, and errors that all of them share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

from recipes.xsum.config import Config, ConfigError
from recipes.xsum.errors import RecipeError

T = TypeVar("T")


def start_accelerator(config: Config, **options: Any) -> Accelerator:
    """Accelerate for this process. Raises `ConfigError` where it would not see the processes that were launched."""
    world_size = int(os.environ.get("WORLD_SIZE") or 1)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or _gpus_are_hidden() or not torch.accelerator.is_available()
    if world_size > 1:
        _check_launch(world_size, on_cpu)
        options["cpu"] = on_cpu  # Accelerate needs to be told only where there are several processes
    accelerator = Accelerator(mixed_precision=config.mixed_precision, **options)
    if accelerator.num_processes != world_size:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but Accelerate sees {accelerator.num_processes} on the "
            f"{accelerator.device.type}: for several processes on the CPU use accelerate launch --config_file "
            "recipes/accelerate/multi_cpu.yaml; for a single one unset WORLD_SIZE"
        )
    return accelerator


def _check_launch(world_size: int, on_cpu: bool) -> None:
    """Find what would make Accelerate wait for processes that never come, or see none but this one."""
    if missing := [name for name in ("RANK", "MASTER_ADDR") if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but {' and '.join(missing)} not set, so no launcher started this process: "
            "use torchrun or accelerate launch, or unset WORLD_SIZE for a single process"
        )
    if on_cpu:
        return
    local, devices = int(os.environ.get("LOCAL_WORLD_SIZE") or 1), torch.accelerator.device_count()
    if local > devices:
        raise ConfigError(f"{local} processes on this machine, but it shows {devices} GPUs: launch one on each")


def _gpus_are_hidden() -> bool:
    """Whether CUDA_VISIBLE_DEVICES is set and names no GPU, as recipes/accelerate/multi_cpu.yaml sets it."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    return devices is not None and (not devices.strip() or devices.strip().startswith("-"))


def together(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on every process; where one fails, all raise, so that none waits for it in vain.

    `action` must not wait for other processes where it may fail before they do.
    """
    if accelerator.num_processes == 1:
        return action()
    result, error = _attempt(action)
    sent = [other for other in gather_object([_sendable(error, accelerator)]) if other is not None]
    if sent:
        raise error or sent[0]
    return result


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on the main process alone; every process gets its result, or its error."""
    if accelerator.num_processes == 1:
        return action()
    result, error = _attempt(action) if accelerator.is_main_process else (None, None)
    result, sent = broadcast_object_list([(result, _sendable(error, accelerator))])[0]
    if sent is not None:
        raise error or sent
    return result


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return action(), None
    except Exception as error:
        return None, error


def main_first(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Run `action` on every process, the main one first: what it puts into caches is there for the others."""
    main = accelerator.is_main_process
    first = together(accelerator, action if main else lambda: None)
    second = together(accelerator, (lambda: None) if main else action)
    return first if main else second


def _sendable(error: Exception | None, accelerator: Accelerator) -> Exception | None:
    """An error in a form that other processes can raise."""
    if error is None or isinstance(error, (RecipeError, OSError)):
        return error
    return RecipeError(f"process {accelerator.process_index} failed: {type(error).__name__}: {error}")
