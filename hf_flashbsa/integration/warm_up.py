"""Compiles the kernels of a model before its first step, in parallel."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils.logging import tqdm

from hf_flashbsa.integration.padding_free.graphs import without_cuda_graphs

logger = logging.getLogger("hf_flashbsa")

#: Threads that compile. Triton works for a second or so on each of the dozen kernels of a training step.
MAX_WORKERS = 16
#: Rows of a batch that is made up, and most tokens of a row.
ROWS, LONGEST = 2, 512
#: Tokens that are generated: of the first one, the queries are the prompt.
NEW_TOKENS = 3


class WarmUp(NamedTuple):
    """What `warm_up` did: how many kernels the model needs, how many of them Triton's cache folder did not hold, and
    seconds."""

    kernels: int
    compiled: int
    seconds: float


def warm_up(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    loss: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
    generate: Mapping[str, Any] | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> WarmUp:
    """Compiles the attention kernels that a model on a GPU is going to launch, several at a time.

    The model runs as in a step, a forward pass and, in training mode, a backward pass, but attention launches nothing:
    it gives zeros, and its kernels are compiled. Weights, gradients, buffers and random numbers are afterwards what
    they were. Call it as you are going to call the model: after `padding_free`, `set_block_sparse`, and within
    `torch.autocast`. On a CPU there is nothing to compile, and it returns at once.

    Args:
        model: as it is trained or evaluated, in the mode (`train()` or `eval()`) that it is going to be in.
        batches: keyword arguments of the model, some for each of the kinds of batches to come. Kernels are chosen by
            lengths, and by whether a batch has padding; beyond that, lengths do not matter. None: a long and a short
            batch of random tokens with padding, and labels for models that generate.
        loss: `loss(model, batch)` calls the model and gives what training descends. None: `model(**batch).loss`, or
            the sum of all outputs where there is none.
        generate: keyword arguments of `model.generate`, such as `{"num_beams": 4}`, for the kernels of generation
            with the prompts in `batches`. None: no generation.
        workers: kernels compiled at a time. None: the number of processors, at most 16.
        progress: called with the number of kernels that are ready, and that of all. None: a progress bar.

    Raises:
        ValueError: `batches` is None, and the model does not read tokens.
    """
    begin, device = time.perf_counter(), next(model.parameters()).device
    if device.type != "cuda":
        logger.info("warm_up: nothing to compile for the %s", device.type)
        return WarmUp(0, 0, time.perf_counter() - begin)
    kernels = _compile(model, batches, loss or _loss, generate, workers or _processors(), progress)
    done = WarmUp(kernels.total, kernels.compiled, time.perf_counter() - begin)
    logger.info("warm_up: %d kernels, %d of them compiled, in %.1f s", *done)
    return done


def _compile(model: nn.Module, batches, loss, generate, workers: int, progress):
    # Triton is there where a GPU is.
    compile_only = importlib.import_module("hf_flashbsa.kernels.compile_only").compile_only
    device = next(model.parameters()).device
    with contextlib.ExitStack() as stack:
        if progress is None:
            progress = stack.enter_context(_bar())
        stack.enter_context(_left_as_it_was(model))
        stack.enter_context(without_cuda_graphs())  # they would hold passes without attention
        kernels = stack.enter_context(compile_only(device, workers, progress))
        for batch in _made_up(model) if batches is None else batches:
            batch = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
            if model.training:
                loss(model, batch).backward()
            else:
                with torch.no_grad():
                    loss(model, batch)
            if generate is not None:
                _generate(model, batch, generate)
    return kernels


def _processors() -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    with tqdm(desc="Compiling kernels", unit="kernel", total=0) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Within, passes through the model may leave gradients, draw random numbers and write buffers."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(x, x.clone()) for x in model.buffers()]
    training = [(module, module.training) for module in model.modules()]
    devices = {x.device for x in (*model.parameters(), *model.buffers()) if x.device.type == "cuda"}
    try:
        for p, _ in gradients:
            p.grad = None
        # The backward pass runs in this thread, as what it would launch is noted by thread.
        with torch.random.fork_rng(sorted(devices, key=str)), torch.autograd.set_multithreading_enabled(False):
            yield
    finally:
        for p, gradient in gradients:
            p.grad = gradient
        with torch.no_grad():
            for x, before in buffers:
                x.copy_(before)
        for module, mode in training:
            module.training = mode


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor:
    output = model(**batch)
    loss = getattr(output, "loss", None)
    return loss if loss is not None else sum(x.float().sum() for x in _floating(output))


def _floating(value: Any) -> Iterator[torch.Tensor]:
    """All floating-point tensors of a model's output."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for x in value.values():
            yield from _floating(x)
    elif isinstance(value, (tuple, list)):
        for x in value:
            yield from _floating(x)


def _generate(model: nn.Module, batch: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    prompt = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    training = model.training
    model.eval()
    model.generate(**prompt, **{"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, **options})
    model.train(training)


def _made_up(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """A long and a short batch of random tokens, the second row of each half as long as the first."""
    config = getattr(model, "config", None)
    if config is None or getattr(model, "main_input_name", None) != "input_ids":
        raise ValueError(f"batches: {type(model).__name__} does not read tokens; give batches that it reads.")
    config = config.get_text_config()
    longest = min(LONGEST, getattr(config, "max_position_embeddings", None) or LONGEST)
    has_labels = model.can_generate() and "labels" in inspect.signature(model.forward).parameters
    for length in dict.fromkeys((longest, min(longest, 64))):
        live = torch.arange(length) < torch.tensor([[length], [length // 2]])
        ids = torch.randint(min(4, config.vocab_size - 1), config.vocab_size, (ROWS, length))
        batch = {"input_ids": ids, "attention_mask": live.long()}
        yield batch | {"labels": ids.masked_fill(~live, -100)} if has_labels else batch
