"""Which classes of Transformers run a stack of layers, and what padding-free execution must know of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from hf_flashbsa.integration.bias_alignment import in_wide_rows
from hf_flashbsa.integration.hook_args import HookArgs, inherits_forward
from hf_flashbsa.integration.model_families import FAMILIES, class_path
from hf_flashbsa.integration.padding_free.packing import Packing


@dataclasses.dataclass(frozen=True)
class LayerStack:
    """A class whose forward embeds tokens, runs layers over them and returns hidden states `(B, S, d)`.

    Its forward takes a padding mask `(B, S)` as `attention_mask`, and states of another stack, if any, as
    `encoder_hidden_states` with `encoder_attention_mask`. Its layers take the hidden states first and those same
    names.

    Args:
        layers: path of the `ModuleList` of layers.
        per_token: arguments of the layers, besides the hidden states, with an entry for each token:
            `(B or 1, S, ...)` tensors, or tuples of them.
        shared: tensor arguments of the layers that stay as they are.
        restores_at: path of the module within the class whose output is padded again, for classes that use the
            hidden states themselves behind the last layer (poolers); "" is the end of the class's forward.
        makes_cache: whether a module of the class makes a key-value cache when `use_cache` is not given.
        bias_by_distance: whether `position_bias`, if the layers add one, depends on the distance of query and key
            alone, so that it may be read by place in each document.
        prepare: called with a layer, its arguments and the batch's `Packing` before each packed layer.
    """

    layers: str = "layers"
    per_token: tuple[str, ...] = ("position_embeddings", "position_ids")
    shared: tuple[str, ...] = ()
    restores_at: str = ""
    makes_cache: Callable[[nn.Module], bool] = lambda stack: bool(stack.config.use_cache)
    bias_by_distance: bool = False
    prepare: Callable[[nn.Module, HookArgs, Packing], None] | None = None


def _t5_bias(block: nn.Module, call: HookArgs, packing: Packing) -> None:
    """Gives a block the bias that it would compute from the lengths of its inputs: that of the padded batch.

    The first block learns the self-attention's bias. The cross-attention's is zero; without it each block would
    write it out for all packed queries and keys.
    """
    attention = block.layer[0].SelfAttention
    device = attention.q.weight.device
    none = torch.zeros(1, 1, 1, 1, device=device)
    if call.get("position_bias") is None:
        learned = attention.has_relative_attention_bias
        bias = attention.compute_bias(packing.length, packing.length, device=device) if learned else none
        call.set("position_bias", in_wide_rows(bias))  # here already, so that the one it is made of is freed
    if call.get("encoder_hidden_states") is not None and call.get("encoder_decoder_position_bias") is None:
        call.set("encoder_decoder_position_bias", none)


#: How the layers of a family are called, see model_families.py.
_LAYERS = {
    "seq2seq": LayerStack(per_token=()),
    "bert": LayerStack(
        layers="encoder.layer",
        per_token=(),
        restores_at="encoder",
        makes_cache=lambda stack: stack.config.is_decoder and stack.config.use_cache,
    ),
    "t5": LayerStack(
        layers="block",
        per_token=(),
        shared=("position_bias", "encoder_decoder_position_bias"),
        bias_by_distance=True,
        prepare=_t5_bias,
    ),
    "rotary": LayerStack(),
}

#: Classes that declare their stack, by "module.name": those of Transformers and those of `register_layer_stack`.
_STACKS: dict[str, LayerStack] = {
    class_path(name, stack): _LAYERS[family.layers] for name, family in FAMILIES.items() for stack in family.stacks
}


def register_layer_stack(cls: type[nn.Module], stack: LayerStack) -> None:
    """Declares the layer stack of a model class, so that `padding_free` can run it.

    ```python
    register_layer_stack(MyDecoder, LayerStack(layers="blocks", per_token=("rotary",)))
    ```

    Args:
        cls: the class whose forward runs the layers. Subclasses are covered as long as they inherit that forward.
        stack: see `LayerStack`.
    """
    _STACKS[_key(cls)] = stack


def declared_stack(module: nn.Module) -> LayerStack | None:
    """The declaration of the module's class, or of the base class whose forward it runs."""
    for cls in type(module).__mro__:
        if _key(cls) in _STACKS and inherits_forward(type(module), cls):
            return _STACKS[_key(cls)]
    return None


def stack_of(module: nn.Module) -> LayerStack:
    """`declared_stack` of a module that has one."""
    declared = declared_stack(module)
    assert declared is not None
    return declared


def declared_classes() -> list[str]:
    return sorted(key.rpartition(".")[2] for key in _STACKS)


def _key(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
