"""What hf_flashbsa does when Transformers builds a model or switches its attention.

Two public methods of `PreTrainedModel` are wrapped. They call the original and act where its result is one of our
names, or where a config holds block layouts.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_flashbsa.integration.model_source import dispatches
from hf_flashbsa.integration.names import DENSE, SPARSE
from hf_flashbsa.integration.roles import watch_roles

logger = logging.get_logger(__name__)

_WRAPPED = "_wrapped_by_hf_flashbsa"


def watch_loading() -> None:
    """Wraps `PreTrainedModel.get_correct_attn_implementation` and `post_init`, once."""
    for name, wrap in (("get_correct_attn_implementation", _choosing), ("post_init", _built)):
        original = getattr(PreTrainedModel, name)
        if not hasattr(original, _WRAPPED):
            wrapper = functools.wraps(original)(wrap(original))
            setattr(wrapper, _WRAPPED, True)
            setattr(PreTrainedModel, name, wrapper)


def _choosing(original):
    def get_correct_attn_implementation(self, *args, **kwargs):
        name = original(self, *args, **kwargs)
        _warn_of_unused_layouts(self.config, name)
        if next(self.children(), None) is None:  # about to be built
            if name in (DENSE, SPARSE):
                _extend_tables(type(self))
        else:
            _switch_layer_configs(self, name)
            if name == SPARSE:
                _prepare_sparse(self)
        return name

    return get_correct_attn_implementation


def _built(original):
    def post_init(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self.config._attn_implementation == SPARSE:
            _prepare_sparse(self)
        return result

    return post_init


def _warn_of_unused_layouts(config, name: str) -> None:
    if getattr(config, "block_sparse", None) is not None and name != SPARSE:
        logger.warning_once(
            f"This model's config holds block layouts, but the model runs attn_implementation={name!r}, which ignores "
            f"them: outputs differ from those that it was saved with. Load it with attn_implementation={SPARSE!r}, or "
            "set config.block_sparse = None if that is meant."
        )


def _prepare_sparse(model: PreTrainedModel) -> None:
    """Raises where a model's attention cannot follow layouts; has modules note their role that do not say it."""
    own = tuple(cls for table in _tables(type(model)) for cls in table.values() if isinstance(cls, type))
    if not dispatches(type(model)) or (own and any(isinstance(module, own) for module in model.modules())):
        raise _cannot_follow(type(model).__name__)
    watch_roles(model)


def _cannot_follow(name: str) -> ValueError:
    return ValueError(
        f"bsa_sparse: {name} computes attention of its own, which cannot follow a layout; use "
        "attn_implementation='eager', or name an implementation for each part of the model, such as "
        f"{{'vision_config': 'eager', 'text_config': {SPARSE!r}}}."
    )


# Models that choose an attention class by name


class _OwnAttention:
    """The entry of our name in a table of attention classes: makes the class that Transformers would choose.

    Args:
        table: classes by the name of an implementation.
        name: ours.
    """

    def __init__(self, table: dict[str, type], name: str):
        self.table = table
        self.name = name

    def __call__(self, *args, **kwargs) -> nn.Module:
        config = args[0] if args else kwargs["config"]
        chosen = "sdpa" if "sdpa" in self.table else "eager"
        cls = self.table[chosen]
        if self.name == SPARSE:
            raise _cannot_follow(cls.__name__)
        logger.warning_once(
            f"{cls.__name__} does not call Transformers' attention interface. It keeps its own attention "
            f"({chosen!r}) instead of {self.name!r}."
        )
        # Masks and the other layers follow; the internal attribute, which leaves nested configs alone.
        config._attn_implementation_internal = chosen
        return cls(*args, **kwargs)


def _tables(cls: type) -> Iterator[dict]:
    """The tables of attention classes in the modules that define a model."""
    for module_name in {base.__module__ for base in cls.__mro__ if issubclass(base, nn.Module)}:
        for value in list(vars(sys.modules.get(module_name, object)).values()):
            if (
                isinstance(value, dict)
                and isinstance(eager := value.get("eager"), type)
                and issubclass(eager, nn.Module)
            ):
                yield value


def _extend_tables(cls: type) -> None:
    for table in _tables(cls):
        for name in (DENSE, SPARSE):
            table.setdefault(name, _OwnAttention(table, name))


# Configs that layers hold


def _switch_layer_configs(model: PreTrainedModel, name: str) -> None:
    """Switches other config objects of the model's own kind that its layers hold.

    `EncoderDecoderModel` gives its encoder a new config and leaves the old one to the layers, which
    `set_attn_implementation` does not see: masks would be of one implementation, attention of another.
    """
    for module in _own_modules(model):
        layer_config = getattr(module, "config", None)
        if layer_config is model.config or type(layer_config) is not type(model.config):
            continue
        if {name, layer_config._attn_implementation} & {DENSE, SPARSE}:
            layer_config._attn_implementation_internal = name


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    """The modules within a model, without nested models, which Transformers switches itself."""
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _own_modules(child)
