"""The options that decide how much memory training takes, and the record of where it goes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_flashbsa import enable_fused_loss, enable_padding_free
from hf_flashbsa.training.ledger import measure_step
from recipes.xsum.config import Config, ConfigError
from recipes.xsum.files import write_atomically
from recipes.xsum.model import training_loss

OPTIONS = (
    "padding_free", "cuda_graphs", "fused_linear_cross_entropy", "token_budget", "group_by_length",
    "gradient_checkpointing",
)  # fmt: skip


def options_record(config: Config) -> dict[str, Any]:
    """The options of a run that change its memory and speed but not what it learns."""
    return {name: getattr(config, name) for name in OPTIONS}


def apply_options(config: Config, model: PreTrainedModel) -> None:
    """Make a model for training padding-free, and its loss fused, where `config` asks for it.

    Raises `ConfigError` where the model, the machine or an installed package does not allow it.
    """
    if config.padding_free:
        try:
            enable_padding_free(model, config.cuda_graphs)
        except ValueError as error:  # names the option itself
            raise ConfigError(str(error)) from error
    if config.fused_linear_cross_entropy:
        try:
            enable_fused_loss(model, config.label_smoothing)
        except (ImportError, RuntimeError, ValueError) as error:
            raise ConfigError(f"fused_linear_cross_entropy: {error}") from error


def write_ledger(
    path: Path, config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, Any]
) -> None:
    """Run the forward and backward pass of a micro-batch again, and write where its memory goes.

    `{"parts": {name: bytes}, "moment": ..., "allocator_peak": bytes or null}`, see `hf_flashbsa.training.ledger`.
    Weights and optimiser stay, gradients are None afterwards; random numbers are drawn.
    """
    ledger = measure_step(
        model,
        batch,
        compute_loss=lambda model, batch: training_loss(model, batch, config),
        optimizer=optimizer,
        update=False,
    )
    record = {"parts": dict(ledger.parts), "moment": ledger.moment, "allocator_peak": ledger.peak}
    write_atomically(path, json.dumps(record, indent=2) + "\n")
