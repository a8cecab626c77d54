"""Which role an attention module has: self-attention of an encoder or of a decoder, or cross-attention.

Most modules say so by `is_causal`, `is_decoder`, `is_cross_attention` or the name of their class. Where one class
serves self- and cross-attention and its instances do not say which (Moonshine, BLIP-2's Q-Former, SAM's decoder), a
forward pre-hook notes what each call attends to.
"""

from __future__ import annotations

import functools
import inspect
from typing import NamedTuple

import torch
from torch import nn

#: Arguments by which attention modules take the states of another stack.
_OTHER_STATES = ("encoder_hidden_states", "key_value_states", "cross_attention_states", "context")
#: Attribute of a module: whether its last call attended to the states of another stack.
_CROSSES = "_bsa_attends_to_other_states"


class _Inputs(NamedTuple):
    """Where a class's forward takes the states of another stack, as `(name, position)`.

    `queries` is given for classes that always take keys: other states are any but the queries themselves.
    """

    states: tuple[str, int]
    queries: tuple[str, int] | None = None


@functools.cache
def _inputs_of(cls: type) -> _Inputs | None:
    """None for classes that attend to nothing but their own input."""
    names = list(inspect.signature(cls.forward).parameters)[1:]
    for name in _OTHER_STATES:
        if name in names:
            return _Inputs((name, names.index(name)))
    if len(names) > 1 and names[0].startswith("quer") and names[1].startswith("key"):
        return _Inputs((names[1], 1), (names[0], 0))
    return None


@torch.compiler.assume_constant_result
def _takes_other_states(cls: type) -> bool:
    return _inputs_of(cls) is not None


def watch_roles(model: nn.Module) -> None:
    """Has those attention modules of a model note their role that do not say it. Idempotent."""
    for module in model.modules():
        watched = any(getattr(hook, "func", None) is _note for hook in module._forward_pre_hooks.values())
        if not watched and _is_ambiguous(module):
            hook = functools.partial(_note, inputs=_inputs_of(type(module)))
            module.register_forward_pre_hook(hook, with_kwargs=True)


def _is_ambiguous(module: nn.Module) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names or _inputs_of(type(module)) is None:
        return False
    says = isinstance(_attribute(module, "is_decoder"), bool)
    return not says and _says_cross(module) is None


def _note(module: nn.Module, args: tuple, kwargs: dict, inputs: _Inputs) -> None:
    def given(argument: tuple[str, int]):
        name, position = argument
        return args[position] if position < len(args) else kwargs.get(name)

    states = given(inputs.states)
    crosses = states is not None and (inputs.queries is None or states is not given(inputs.queries))
    if _attribute(module, _CROSSES) is not crosses:  # once, which torch.compile need not guard again
        setattr(module, _CROSSES, crosses)


def _says_cross(module: nn.Module) -> bool | None:
    """Whether a module is cross-attention, where its attributes or its class's name say so."""
    said = _attribute(module, "is_cross_attention")
    if isinstance(said, bool):
        return said
    return True if "CrossAttention" in type(module).__name__ else None


def _attribute(module: nn.Module, name: str):
    """None where there is none; modules take microseconds to miss an attribute."""
    return getattr(module, name) if name in module.__dict__ or hasattr(type(module), name) else None


def role_of(module: nn.Module, is_causal: bool | None, mask_is_causal: bool | None = None) -> str:
    """The role of an attention module, as `BlockSparseConfig` names it.

    Modules that take the states of another stack are cross-attention, causal ones a decoder's, others an encoder's.

    Args:
        is_causal: that of the call, if it says so; else the module's own counts.
        mask_is_causal: whether the call's mask is causal, where the host knows. It counts where neither says so.

    Raises:
        ValueError: the module does not say it, and nobody watches it.
    """
    crosses = _attribute(module, _CROSSES)
    crosses = _says_cross(module) if crosses is None else crosses
    if crosses:
        return "cross"
    name = type(module).__name__
    own, is_decoder = _attribute(module, "is_causal"), _attribute(module, "is_decoder")
    causal = next((said for said in (is_causal, own, mask_is_causal) if said is not None), None)
    if causal is None:
        raise ValueError(
            f"bsa_sparse: {name} does not say whether it is an encoder's, a decoder's or cross-attention; set "
            "`is_causal` and `is_decoder` on the module, or use attn_implementation='bsa_dense'."
        )
    if causal or (own and is_decoder):
        return "decoder"
    if is_decoder is not None:
        return "cross" if is_decoder and crosses is None else "encoder"
    if crosses is None and _takes_other_states(type(module)):
        raise ValueError(
            f"bsa_sparse: {name} serves self- and cross-attention, and this module has not noted which it is. Call "
            "hf_flashbsa.set_block_sparse(model, BlockSparseConfig.of(model.config)) after loading the model."
        )
    return "encoder"
