"""What the source of a model says of its attention: whether it dispatches, and what its mask must be."""

from __future__ import annotations

import inspect
import logging
import re
import sys

import torch

logger = logging.getLogger(__name__)

#: What the source of code that dispatches names.
_INTERFACE = re.compile(r"ALL_ATTENTION_FUNCTIONS|AttentionInterface")
#: Asks for a tensor and appends entries for further keys to it (DeepSeek-V4).
_EXTENDS_TENSORS = re.compile(r"isinstance\((\w*mask), torch\.Tensor\)[\s\S]*torch\.cat\(\s*[\[(]\1\b")

_OWN_ATTENTION: dict[type, bool] = {}
_TENSOR_MASKS: dict[type, bool] = {}


@torch.compiler.assume_constant_result
def computes_own_attention(config_class: type) -> bool:
    """Whether attention classes of this config's model add the mask to scores of their own.

    Decided from the source of the model's modeling module, as Transformers decides whether an implementation can
    be set. Where a class of the model computes a softmax and does not look at the attention interface, the model
    needs the eager mask, which those layers that do dispatch understand too.
    """
    if config_class not in _OWN_ATTENTION:
        sources = _attention_of(config_class)
        if sources is None:
            return False
        own = any("softmax" in source.lower() and not _INTERFACE.search(source) for source in sources)
        _OWN_ATTENTION[config_class] = own
        if own:
            logger.warning(
                "%s computes attention of its own; it gets Transformers' eager mask, and only those of its layers "
                "that call the attention interface are accelerated.",
                config_class.__name__.removesuffix("Config"),
            )
    return _OWN_ATTENTION[config_class]


@torch.compiler.assume_constant_result
def takes_tensor_masks(config_class: type) -> bool:
    """Whether attention classes of this config's model ask whether their mask is a tensor, to append keys to it."""
    if config_class not in _TENSOR_MASKS:
        sources = _attention_of(config_class)
        if sources is None:
            return False
        _TENSOR_MASKS[config_class] = any(_EXTENDS_TENSORS.search(source) for source in sources)
    return _TENSOR_MASKS[config_class]


def dispatches(model_class: type) -> bool:
    """Whether a model's module calls the attention interface, or has no attention class, so that its parts may."""
    source = _source(sys.modules.get(model_class.__module__))
    return bool(_INTERFACE.search(source)) or not re.search(
        r"^class \w*Attention\w*\(nn\.Module\):", source, re.MULTILINE
    )


def _attention_of(config_class: type) -> list[str] | None:
    """Sources of the attention classes that a config's model may use; None where its module is not imported yet.

    Classes that share the config's name prefix (`Gemma4Audio` of `Gemma4AudioConfig`) speak for it where there are
    any.
    """
    package = config_class.__module__.rpartition(".")[0]
    modules = [m for name, m in list(sys.modules.items()) if name.startswith(package + ".modeling_")]
    if not modules:
        return None
    classes = {}
    for module in modules:
        for block in re.split(r"^(?=class |def |@)", _source(module), flags=re.MULTILINE):
            if found := re.match(r"class (\w*Attention\w*)\(", block):
                classes[found[1]] = block
    prefix = config_class.__name__.removesuffix("Config")
    return [source for name, source in classes.items() if name.startswith(prefix)] or list(classes.values())


def _source(module) -> str:
    """The source of a module; "" where there is none, so that errors of the mask are the guard."""
    try:
        return inspect.getsource(module)
    except (OSError, TypeError):
        return ""
