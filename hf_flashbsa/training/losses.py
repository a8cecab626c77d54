"""The loss of a language model without its logits: projection and cross-entropy in one, by liger-kernel's operator.

The logits of a batch, one number for each target token and word of the vocabulary, are often its largest tensor.
Liger-kernel computes them in pieces, with the gradients of hidden states and weight at once. It has decoder-only
models of its own; here are the encoder-decoder ones.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_flashbsa.integration.stacks import Call

_IGNORED = -100
_HANDLES = "_fused_loss_handles"
#: Classes whose logits are `head(states)`, plus `final_logits_bias` where they have one, and nothing else.
_KNOWN = frozenset(
    f"transformers.models.{family}.modeling_{family}.{name}"
    for family, name in {
        "bart": "BartForConditionalGeneration",
        "marian": "MarianMTModel",
        "mbart": "MBartForConditionalGeneration",
        "mt5": "MT5ForConditionalGeneration",
        "pegasus": "PegasusForConditionalGeneration",
        "t5": "T5ForConditionalGeneration",
    }.items()
)


def enable_fused_loss(model: nn.Module, label_smoothing: float = 0.0) -> None:
    """Lets `model(..., labels=labels)` return its loss without making logits (`output.logits` is None).

    Loss and gradients are those of Transformers up to rounding: the mean over all labels but -100. As decoder-only
    models do, encoder-decoders take `num_items_in_batch` too: the loss is then the sum, divided by it. Calls without
    labels and `generate` are not affected. One backward pass per forward: the operator's gradients are made in the
    forward pass and scaled in place. The host waits for the device behind the decoder, where targets are counted, and
    once more in the backward pass.

    Under autocast `final_logits_bias` is rounded to the logits' type. Decoder-only models run liger-kernel's own
    integration, which leaves out the logits in training mode only.

    Args:
        model: an encoder-decoder (BART, mBART, Pegasus, Marian, T5, mT5) or a decoder-only model that liger-kernel
            knows, or any module around one (adapters, `DistributedDataParallel`). Calling it again replaces
            `label_smoothing`.
        label_smoothing: share of each target that is spread evenly over the vocabulary, in training mode only, as
            dropout: the loss of an evaluation has none.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: there is no GPU.
        ValueError: a model whose loss is not known, or whose head is not a plain linear layer.
    """
    _check_environment()
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"enable_fused_loss: label_smoothing must be from 0 to below 1, got {label_smoothing}.")
    module = _language_model(model)
    for handle in module.__dict__.pop(_HANDLES, ()):
        handle.remove()
    enable = _enable_encoder_decoder if module.config.is_encoder_decoder else _enable_decoder_only
    setattr(module, _HANDLES, enable(module, label_smoothing))


def _check_environment() -> None:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("enable_fused_loss needs liger-kernel: pip install --no-deps 'liger-kernel>=0.8.5'")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            "enable_fused_loss: liger-kernel's operators are Triton kernels and need a GPU; without one leave it "
            "out, the loss is the same."
        )


def _language_model(model: nn.Module) -> PreTrainedModel:
    """The part of `model` that has the loss."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (_is_known(module) or _liger_function(module)):
            head = module.get_output_embeddings()
            if type(head) is not nn.Linear:
                raise ValueError(
                    f"enable_fused_loss: the head of {type(module).__name__} is a {type(head).__name__}, not a plain "
                    "nn.Linear whose weight alone makes the logits; leave adapters and quantisation off the head."
                )
            return module
    known = ", ".join(sorted(key.rpartition(".")[2] for key in _KNOWN))
    raise ValueError(
        f"enable_fused_loss: {type(model).__name__} is not known; known are {known}, and the decoder-only models of "
        "liger-kernel (Llama, Mistral, Qwen, Gemma, ...). Leave it out for this model."
    )


def _is_known(module: nn.Module) -> bool:
    return any(
        f"{cls.__module__}.{cls.__qualname__}" in _KNOWN and type(module).forward is cls.forward
        for cls in type(module).__mro__
    )


def _liger_function(module: PreTrainedModel) -> Callable | None:
    """What applies liger-kernel to a decoder-only language model."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as functions

    is_causal = type(module).__name__.endswith("ForCausalLM") and not module.config.is_encoder_decoder
    return functions.get(module.config.model_type) if is_causal else None


# Decoder-only models


def _enable_decoder_only(model: PreTrainedModel, label_smoothing: float) -> list:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    others = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "cross_entropy")
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, **dict.fromkeys(others, False))
    if not label_smoothing:
        return []

    def smooth(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        given = kwargs.get("labels") is not None and model.training
        return args, {**kwargs, "label_smoothing": label_smoothing} if given else kwargs

    return [model.register_forward_pre_hook(smooth, with_kwargs=True)]


# Encoder-decoder models


def _enable_encoder_decoder(model: PreTrainedModel, label_smoothing: float) -> list:
    fused = _FusedLoss(label_smoothing)
    return [
        model.register_forward_pre_hook(fused.before_model, with_kwargs=True),
        # Within the model's forward, where autocast is on and sharded weights are whole.
        model.get_output_embeddings().register_forward_pre_hook(fused.before_head),
        model.register_forward_hook(fused.after_model, always_call=True),
    ]


class _FusedLoss:
    """The hooks of one model. They hide the labels from its forward, and leave its head no states to project."""

    def __init__(self, label_smoothing: float) -> None:
        self._label_smoothing = label_smoothing
        self._loss_of: Callable[[nn.Linear, torch.Tensor], torch.Tensor] | None = None
        self._loss: torch.Tensor | None = None

    @torch.compiler.disable
    def before_model(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = Call(model, args, kwargs)
        items = call.kwargs.pop("num_items_in_batch", None)
        labels = call.get("labels")
        if labels is None:
            return call.result()
        if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
            call.set("decoder_input_ids", model.prepare_decoder_input_ids_from_labels(labels))
        call.set("labels", None)
        call.set("use_cache", False)
        bias = getattr(model, "final_logits_bias", None)
        smoothing = self._label_smoothing if model.training else 0.0
        self._loss_of = lambda head, states: _loss(states, head.weight, labels, bias, smoothing, items)
        return call.result()

    @torch.compiler.disable
    def before_head(self, head: nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        if self._loss_of is None:
            return None
        self._loss = self._loss_of(head, args[0])
        return (args[0][:, :0],)

    @torch.compiler.disable
    def after_model(self, model: PreTrainedModel, args: tuple, output: Any) -> Any:
        """Also called where the forward raised: nothing may be left for the next one."""
        loss, self._loss, self._loss_of = self._loss, None, None
        if loss is None or output is None:
            return None
        if isinstance(output, tuple):
            return (loss, *output[1:])
        return dataclasses.replace(output, loss=loss, logits=None)


def _loss(
    states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
    label_smoothing: float,
    items: int | torch.Tensor | None,
) -> torch.Tensor:
    """Cross-entropy over the labels `(B, T)` that are not -100; float32, `()`.

    Args:
        states: `(B, T, d)`.
        weight, bias: the head's, `(V, d)`, and frozen `(1, V)`.
        label_smoothing: share of the target spread over the vocabulary.
        items: divides the sum; None = the number of labels.
    """
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    rows = (labels.flatten() != _IGNORED).nonzero()[:, 0]
    states = states.flatten(0, 1).index_select(0, rows.to(states.device))
    targets = labels.flatten()[rows].to(states.device)
    count, vocabulary = len(rows), len(weight)
    if count == 0:
        return states.sum().float() / (count if items is None else items)
    if torch.is_grad_enabled() and weight.requires_grad and not states.requires_grad:
        states.requires_grad_()  # the operator makes the weight's gradient only along with theirs
    if bias is not None:
        bias = bias[0]
        if torch.is_autocast_enabled(states.device.type):
            bias = bias.to(torch.get_autocast_dtype(states.device.type))
    # The operator's default cuts the logits down to the size of the states: few rows at a time, and the weight read
    # anew for each piece. This way a piece of logits is as large as the weight's gradient.
    pieces = max(1, vocabulary // count)
    summed = LigerFusedLinearCrossEntropyFunction.apply(
        states, weight, targets, bias, None, _IGNORED, 0.0, label_smoothing, "sum", None, False, torch.float32, False,
        False, False, None, None, pieces,
    )[0]  # fmt: skip
    return summed / (count if items is None else items)
