"""Finds models that take their mask from Transformers' registry but compute attention themselves."""

from __future__ import annotations

import inspect
import logging
import re
import sys

import torch

logger = logging.getLogger(__name__)

_OWN_ATTENTION: dict[type, bool] = {}


@torch.compiler.assume_constant_result
def computes_own_attention(config_class: type) -> bool:
    """Whether attention classes of this config's model add the mask to scores of their own.

    Decided from the source of the model's modeling module, as Transformers decides whether an implementation can
    be set. Where a class of the model computes a softmax and does not look at the attention interface, the model
    needs the eager mask, which those layers that do dispatch understand too. Classes that share the config's
    name prefix (`Gemma4Audio` of `Gemma4AudioConfig`) speak for it where there are any.
    """
    if config_class not in _OWN_ATTENTION:
        package = config_class.__module__.rpartition(".")[0]
        modules = [m for name, m in list(sys.modules.items()) if name.startswith(package + ".modeling_")]
        if not modules:  # nothing to read yet
            return False
        prefix = config_class.__name__.removesuffix("Config")
        attention = _attention_classes(modules)
        own = [source for name, source in attention.items() if name.startswith(prefix)] or attention.values()
        _OWN_ATTENTION[config_class] = any(
            "softmax" in source.lower() and "ALL_ATTENTION_FUNCTIONS" not in source for source in own
        )
        if _OWN_ATTENTION[config_class]:
            logger.warning(
                "%s computes attention of its own; it gets Transformers' eager mask, and only those of its layers "
                "that call the attention interface are accelerated.",
                prefix,
            )
    return _OWN_ATTENTION[config_class]


def _attention_classes(modules: list) -> dict[str, str]:
    """Name and source of each top-level class that has "Attention" in its name."""
    classes = {}
    for module in modules:
        try:
            source = inspect.getsource(module)
        except (OSError, TypeError):  # without source the errors of MaskSpec are the guard
            continue
        for block in re.split(r"^(?=class |def |@)", source, flags=re.MULTILINE):
            if found := re.match(r"class (\w*Attention\w*)\(", block):
                classes[found[1]] = block
    return classes
