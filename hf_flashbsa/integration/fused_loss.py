"""The loss of a language model without its logits: projection and cross-entropy in one, by liger-kernel's operator.

The logits of a batch, one number for each target token and word of the vocabulary, are often its largest tensor.
Liger-kernel computes them in pieces, with the gradients of hidden states and weight at once. It has decoder-only
models of its own; here are the encoder-decoder ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_flashbsa.integration.hook_args import HookArgs, inherits_forward
from hf_flashbsa.integration.model_families import FAMILIES, class_path

logger = logging.get_logger(__name__)

_IGNORED = -100
_HANDLES = "_fused_loss_handles"
#: Classes whose logits are `head(states)`, plus `final_logits_bias` where they have one, and nothing else.
_KNOWN = frozenset(
    class_path(name, family.language_model) for name, family in FAMILIES.items() if family.language_model
)


def enable_fused_loss(model: nn.Module, label_smoothing: float = 0.0) -> None:
    """Lets `model(..., labels=labels)` return its loss without making logits: in training `output.logits` is None.
    `disable_fused_loss` ends that.

    Loss and gradients are those of Transformers up to rounding: the mean over all labels but -100. Where the call
    gives `num_items_in_batch`, as Transformers' `Trainer` does, the loss is the sum divided by it. Transformers' own
    loss ignores that in encoder-decoders: with N gradient accumulation steps the `Trainer`'s loss and gradients of a
    plain BART or T5 are N times too large, and those of the fused loss are right.

    Evaluation mode makes the logits too, for metrics, unless the call has `skip_logits=True`; `skip_logits=False`
    makes them in training. Both are liger-kernel's conventions, whose own integration decoder-only models run. Calls
    without labels and `generate` are not affected. In training such calls log a warning once, since they make logits:
    the `Trainer`'s `label_smoothing_factor` and `compute_loss_func` take the labels away, so use `label_smoothing`
    here instead.

    One backward pass per forward: the operator's gradients are made in the forward pass and scaled in place. The host
    waits for the device behind the decoder, where targets are counted, and once more in the backward pass. Under
    autocast `final_logits_bias` is rounded to the logits' type.

    Args:
        model: an encoder-decoder (BART, mBART, Pegasus, Marian, T5, mT5) or a decoder-only model that liger-kernel
            knows, or any module around one (adapters, `DistributedDataParallel`). Calling it again replaces
            `label_smoothing`.
        label_smoothing: share of each target that is spread evenly over the vocabulary, in training mode only, as
            dropout: the loss of an evaluation has none.

    Raises:
        ImportError: liger-kernel is not installed.
        RuntimeError: there is no GPU.
        ValueError: a model whose loss is not known, or whose head is not a plain linear layer; in a later call, a head
            that was replaced since.
    """
    _check_requirements()
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"enable_fused_loss: label_smoothing must be from 0 to below 1, got {label_smoothing}.")
    module = _language_model(model)
    _remove_hooks(module)
    enable = _enable_encoder_decoder if module.config.is_encoder_decoder else _enable_decoder_only
    setattr(module, _HANDLES, enable(module, label_smoothing))


def disable_fused_loss(model: nn.Module) -> None:
    """Ends what `enable_fused_loss` began, for all parts of the model."""
    for module in model.modules():
        _remove_hooks(module)


@contextlib.contextmanager
def fused_loss(model: nn.Module, label_smoothing: float = 0.0) -> Iterator[None]:
    """`enable_fused_loss` for the length of a `with` block, and `disable_fused_loss` at its end."""
    enable_fused_loss(model, label_smoothing)
    try:
        yield
    finally:
        disable_fused_loss(model)


def _remove_hooks(module: nn.Module) -> None:
    for handle in module.__dict__.pop(_HANDLES, ()):
        handle.remove()


def _check_requirements() -> None:
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
        f"{cls.__module__}.{cls.__qualname__}" in _KNOWN and inherits_forward(type(module), cls)
        for cls in type(module).__mro__
    )


def _liger_function(module: PreTrainedModel) -> Callable | None:
    """What applies liger-kernel to a decoder-only language model."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as functions

    is_causal = type(module).__name__.endswith("ForCausalLM") and not module.config.is_encoder_decoder
    return functions.get(module.config.model_type) if is_causal else None


def _warn_of_logits(head: nn.Module, args: tuple) -> None:
    """A pre-hook of the head: says once that training makes the logits that the fused loss was to save."""
    if not torch.compiler.is_compiling() and head.training and torch.is_grad_enabled():
        logger.warning_once(
            "enable_fused_loss: training makes logits, because the model was called without labels (or by its "
            "`forward`, past its hooks), so no memory is saved. Transformers' Trainer takes the labels away for "
            "label_smoothing_factor and compute_loss_func: leave both out, and give "
            "enable_fused_loss(model, label_smoothing=...)."
        )


def _replaced_head(model: PreTrainedModel) -> ValueError:
    head = type(model.get_output_embeddings()).__name__
    return ValueError(
        f"enable_fused_loss: the head of {type(model).__name__}, a {head}, was replaced since "
        "(resize_token_embeddings, adapters, quantisation), and the fused loss would pass it over; call "
        "enable_fused_loss again, and leave adapters off the head."
    )


# Decoder-only models


def _enable_decoder_only(model: PreTrainedModel, label_smoothing: float) -> list:
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    patched = _PatchedForward(model)
    others = ("rope", "rms_norm", "layer_norm", "swiglu", "geglu", "cross_entropy")
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=True, **dict.fromkeys(others, False))
    position = HookArgs(model, (), {}).names["labels"]

    def before_model(model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if hasattr(model.get_output_embeddings(), "base_layer"):  # an adapter's, whose weight is that of the base
            raise _replaced_head(model)
        labels = args[position] if position < len(args) else kwargs.get("labels")
        given = labels is not None or kwargs.get("shift_labels") is not None
        if not (label_smoothing and given and model.training):
            return None
        return args, {**kwargs, "label_smoothing": label_smoothing}

    return [
        patched,
        model.register_forward_pre_hook(before_model, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(_warn_of_logits),
    ]


class _PatchedForward:
    """Handle of a model whose instance liger-kernel gives another `forward`: `remove` gives back what it had."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._before = model, model.__dict__.get("forward")

    def remove(self) -> None:
        if self._before is not None:
            self._model.forward = self._before
        else:
            self._model.__dict__.pop("forward", None)


# Encoder-decoder models


def _enable_encoder_decoder(model: PreTrainedModel, label_smoothing: float) -> list:
    fused = _FusedLoss(label_smoothing)
    return [
        model.register_forward_pre_hook(fused.before_model, with_kwargs=True),
        # Within the model's forward, where autocast is on and sharded weights are whole.
        model.get_output_embeddings().register_forward_pre_hook(fused.before_head),
        model.register_forward_hook(fused.after_model, always_call=True),
    ]


@dataclasses.dataclass
class _Pending:
    """The loss of a call that is running."""

    loss_of: Callable[[nn.Linear, torch.Tensor], torch.Tensor]
    skip_logits: bool
    loss: torch.Tensor | None = None


class _FusedLoss:
    """The hooks of one model. They hide the labels from its forward, and leave its head no states to project."""

    def __init__(self, label_smoothing: float) -> None:
        self._label_smoothing = label_smoothing
        # By thread: the replicas of `DataParallel` share these hooks, and each runs in a thread of its own.
        self._pending: dict[int, _Pending] = {}

    @torch.compiler.disable
    def before_model(self, model: PreTrainedModel, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        call = HookArgs(model, args, kwargs)
        items, skip_logits = call.kwargs.pop("num_items_in_batch", None), call.kwargs.pop("skip_logits", None)
        labels = call.get("labels")
        if labels is None:
            return call.result()
        head = model.get_output_embeddings()
        if self.before_head not in getattr(head, "_fsdp_wrapped_module", head)._forward_pre_hooks.values():
            raise _replaced_head(model)
        if call.get("decoder_input_ids") is None and call.get("decoder_inputs_embeds") is None:
            call.set("decoder_input_ids", model.prepare_decoder_input_ids_from_labels(labels))
        call.set("labels", None)
        call.set("use_cache", False)
        bias = getattr(model, "final_logits_bias", None)
        smoothing = self._label_smoothing if model.training else 0.0
        self._pending[threading.get_ident()] = _Pending(
            lambda head, states: _loss(states, head.weight, labels, bias, smoothing, items),
            model.training if skip_logits is None else skip_logits,
        )
        return call.result()

    @torch.compiler.disable
    def before_head(self, head: nn.Linear, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
        pending = self._pending.get(threading.get_ident())
        if pending is None:
            _warn_of_logits(head, args)
            return None
        pending.loss = pending.loss_of(head, args[0])
        return (args[0][:, :0],) if pending.skip_logits else None

    @torch.compiler.disable
    def after_model(self, model: PreTrainedModel, args: tuple, output: Any) -> Any:
        """Also called where the forward raised: nothing may be left for the next one."""
        pending = self._pending.pop(threading.get_ident(), None)
        if pending is None or output is None:
            return None
        if isinstance(output, tuple):
            return (pending.loss, *output[1 if pending.skip_logits else 0 :])
        return dataclasses.replace(output, loss=pending.loss, logits=None if pending.skip_logits else output.logits)


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
