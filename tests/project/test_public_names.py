"""The public names: what there is, what is deprecated, and switches that can be undone."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys

import pytest
import torch
from transformers_models import tiny

import hf_flashbsa
from hf_flashbsa import BlockSparseConfig, LayerStack, attention, use_deterministic
from hf_flashbsa._deprecated import renamed
from hf_flashbsa.integration.padding_free import layer_stacks
from hf_flashbsa.ops import api


def test_no_public_name_shadows_a_module():
    """`import hf_flashbsa.x as m` would give the object instead."""
    for name in hf_flashbsa.__all__:
        public = getattr(hf_flashbsa, name)
        try:
            module = importlib.import_module(f"hf_flashbsa.{name}")
        except ModuleNotFoundError:
            continue
        assert public is module


def test_patterns_and_selections_can_be_imported_by_their_public_paths():
    from hf_flashbsa.patterns import PATTERNS, make_layout
    from hf_flashbsa.selection import SELECTIONS, top_k_blocks

    assert make_layout is hf_flashbsa.patterns.make_layout and top_k_blocks is hf_flashbsa.selection.top_k_blocks
    assert all(getattr(hf_flashbsa.patterns, name) is function for name, function in PATTERNS.items())
    assert all(getattr(hf_flashbsa.selection, name) is function for name, function in SELECTIONS.items())


@pytest.mark.parametrize("name", ["configure", "register_stack"])
def test_former_names_work_and_warn_once(name, monkeypatch):
    monkeypatch.setattr(layer_stacks, "_STACKS", dict(layer_stacks._STACKS))
    model, config = tiny("llama", "bsa_sparse"), BlockSparseConfig("local", window=3)
    arguments = (model, config) if name == "configure" else (torch.nn.Identity, LayerStack())
    new = {"configure": "set_block_sparse", "register_stack": "register_layer_stack"}[name]
    former = renamed(name, getattr(hf_flashbsa, new))  # as in a process that has not warned yet
    with pytest.warns(FutureWarning, match=f"hf_flashbsa.{name} is now hf_flashbsa.{new}") as seen:
        former(*arguments)
        former(*arguments)
    assert len(seen) == 1 and seen[0].filename == __file__
    assert getattr(hf_flashbsa, name).__name__ == name
    if name == "configure":
        assert model.config.block_sparse == config.to_dict()
    else:
        assert layer_stacks.declared_stack(torch.nn.Identity()) == LayerStack()


@pytest.fixture
def default_determinism():
    yield
    use_deterministic(True)


def test_determinism_may_be_given_up_for_a_block(default_determinism):
    with use_deterministic(False):
        assert not api.is_deterministic()
        with use_deterministic(True):
            assert api.is_deterministic()
        assert not api.is_deterministic()
    assert api.is_deterministic()
    use_deterministic(False)
    assert not api.is_deterministic()


def test_masking_keywords_are_the_fields_of_a_spec_in_their_order():
    """`attention` hands them over by position."""
    fields = [field.name for field in dataclasses.fields(hf_flashbsa.AttentionSpec)]
    parameters = list(inspect.signature(attention).parameters)
    assert parameters[4 : 4 + len(fields)] == fields


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("integration.forward", "integration.attention_function", "bsa_dense_forward"),
        ("integration.mask", "integration.mask_function", "bsa_mask"),
        ("reference", "ops.reference", "reference_attention"),
    ],
)
def test_former_modules_warn(old, new, name):
    sys.modules.pop(f"hf_flashbsa.{old}", None)
    with pytest.warns(FutureWarning, match=rf"hf_flashbsa\.{old} is now hf_flashbsa\.{new}; "):
        former = importlib.import_module(f"hf_flashbsa.{old}")
    assert getattr(former, name) is getattr(importlib.import_module(f"hf_flashbsa.{new}"), name)
