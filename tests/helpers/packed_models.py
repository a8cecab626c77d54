"""Padding-free models and what is compared about them: loss, gradients, and how many tokens the layers see."""

from __future__ import annotations

import contextlib

import torch
from torch import nn
from transformers_models import FAMILIES, batch_for, tiny

from hf_flashbsa import enable_padding_free
from hf_flashbsa.integration.padding_free import layer_stacks

#: Families whose layer stacks are declared.
KNOWN = (
    "bart", "mbart", "pegasus", "marian", "t5", "mt5", "bert", "roberta", "modernbert",
    "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3",
)  # fmt: skip
CAUSAL = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3", "gpt_oss")


def labelled(name: str, padding: str, **sizes) -> dict:
    """`batch_for` with labels: none where padding is, or where padding would predict."""
    inputs = batch_for(name, padding, **sizes)
    target = "decoder_input_ids" if FAMILIES[name].seq2seq else "input_ids"
    mask = inputs.get("decoder_attention_mask" if FAMILIES[name].seq2seq else "attention_mask")
    labels = torch.randint(3, 64, inputs[target].shape, generator=torch.Generator().manual_seed(3))
    if mask is not None:
        live = mask.bool()
        if name in CAUSAL:
            live = live & nn.functional.pad(live[:, :-1], (1, 0))
        labels = labels.masked_fill(~live, -100)
    return inputs | {"labels": labels}


def losses(model: nn.Module, inputs: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradient of every parameter that has one."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def packed(name: str, **changes) -> nn.Module:
    """`tiny(name, "bsa_dense")`, padding-free."""
    model = tiny(name, "bsa_dense", **changes)
    enable_padding_free(model)
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return [
        layer
        for module in model.modules()
        if (stack := layer_stacks.declared_stack(module)) is not None
        for layer in module.get_submodule(stack.layers)
    ]


@contextlib.contextmanager
def widths(model: nn.Module):
    """Collects `(rows, tokens)` of the hidden states that each call of a layer returns."""
    seen = []

    def note(layer, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen.append(tuple(hidden.shape[:2]))

    handles = [layer.register_forward_hook(note) for layer in layers_of(model)]
    yield seen
    for handle in handles:
        handle.remove()


def live_rows(inputs: dict) -> set[tuple[int, int]]:
    """What `widths` should be: one row with the live tokens of each mask."""
    return {(1, int(v.sum())) for k, v in inputs.items() if k.endswith("attention_mask")}
