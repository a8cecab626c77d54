"""The comparison with eager attention notices mistakes: each is planted on purpose, and the comparison must fail."""

from __future__ import annotations

import pytest
import torch
from eager_comparisons import (
    assert_cross_attention_matches,
    assert_encoder_matches,
    assert_positions_match,
    assert_rewritten_masks_match,
    assert_window_of_zero_matches,
)
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers_models import assert_dropout_is_applied, assert_matches_eager, assert_same, batch_for
from unusual_models import COMPUTING, LATER_KEYS, NARROW, SHARED_CLASSES, WIDE, assert_matches_the_oracle

from hf_flashbsa import BlockSparseConfig
from hf_flashbsa.integration import sparse_layers
from hf_flashbsa.integration.mask_function import MaskSpec
from hf_flashbsa.masks.spec import AttentionSpec

EXACT = AttentionInterface()["bsa_dense"]


def _spec(mask: MaskSpec, **changes) -> MaskSpec:
    """The mask with some fields of its spec changed."""
    names = ("causal", "window_size", "query_offset", "segment_ids_q", "segment_ids_k")
    fields = {name: getattr(mask.spec, name) for name in names} | changes
    return MaskSpec(AttentionSpec(**fields), mask.shape, mask.device)


def padding_ignored(module, query, key, value, mask, **kwargs):
    return EXACT(module, query, key, value, _spec(mask, segment_ids_k=None), **kwargs)


def mask_dropped(module, query, key, value, mask, **kwargs):
    return EXACT(module, query, key, value, None, **kwargs)


def causality_dropped(module, query, key, value, mask, **kwargs):
    return EXACT(module, query, key, value, _spec(mask, causal=False), **kwargs)


def window_dropped(module, query, key, value, mask, **kwargs):
    return EXACT(module, query, key, value, _spec(mask, window_size=(None, None)), **kwargs)


def window_off_by_one(module, query, key, value, mask, **kwargs):
    left, right = mask.spec.window_size
    shifted = (None if left is None else left + 1, right)
    return EXACT(module, query, key, value, _spec(mask, window_size=shifted), **kwargs)


def alignment_off_by_one(module, query, key, value, mask, **kwargs):
    offset = mask.spec.query_offset
    return EXACT(module, query, key, value, _spec(mask, query_offset=None if offset is None else offset - 1), **kwargs)


def scale_wrong(module, query, key, value, mask, scaling, **kwargs):
    return EXACT(module, query, key, value, mask, scaling=1.01 * scaling, **kwargs)


def softcap_dropped(module, query, key, value, mask, softcap=None, **kwargs):
    return EXACT(module, query, key, value, mask, **kwargs)


def position_bias_dropped(module, query, key, value, mask, position_bias=None, **kwargs):
    return EXACT(module, query, key, value, mask, **kwargs)


def position_bias_without_gradient(module, query, key, value, mask, position_bias, **kwargs):
    return EXACT(module, query, key, value, mask, position_bias=position_bias.detach(), **kwargs)


def sinks_dropped(module, query, key, value, mask, s_aux=None, **kwargs):
    return EXACT(module, query, key, value, mask, **kwargs)


def sinks_without_gradient(module, query, key, value, mask, s_aux, **kwargs):
    return EXACT(module, query, key, value, mask, s_aux=s_aux.detach(), **kwargs)


def dropout_ignored(module, query, key, value, mask, dropout=0.0, **kwargs):
    return EXACT(module, query, key, value, mask, **kwargs)


def dropout_without_rescaling(module, query, key, value, mask, dropout=0.0, **kwargs):
    out, weights = EXACT(module, query, key, value, mask, dropout=dropout, **kwargs)
    return out * (1.0 - dropout), weights


def dropout_of_whole_keys(module, query, key, value, mask, dropout=0.0, **kwargs):
    return EXACT(module, query, key, torch.nn.functional.dropout(value, dropout), mask, **kwargs)


def key_heads_interleaved(module, query, key, value, mask, **kwargs):
    group = query.shape[1] // key.shape[1]
    return EXACT(module, query, key.repeat(1, group, 1, 1), value.repeat(1, group, 1, 1), mask, **kwargs)


def cross_queries_unpadded_with_the_key_mask(module, query, key, value, mask, **kwargs):
    """What Transformers' flash_attention_2 does: it slices the queries' padding from the end of the keys' padding."""
    out, weights = EXACT(module, query, key, value, mask, **kwargs)
    live = mask.spec.segment_ids_k
    if live is not None and query.shape[2] not in (1, key.shape[2]):
        out = out * (live[:, -query.shape[2] :] >= 0)[:, :, None, None]
    return out, weights


def positions_taken_for_documents(module, query, key, value, mask, position_ids=None, **kwargs):
    """A document begins at the lowest position of its row, whatever the mask says."""
    ids = (position_ids == position_ids.amin(-1, keepdim=True)).cumsum(-1, dtype=torch.int32)
    dead = mask.spec.segment_ids_k is not None and mask.spec.segment_ids_k < 0
    ids_k = ids if dead is False else ids.masked_fill(dead, -1)
    return EXACT(module, query, key, value, _spec(mask, segment_ids_q=ids, segment_ids_k=ids_k), **kwargs)


def queries_on_padding_zeroed(module, query, key, value, mask, **kwargs):
    ids = mask.spec.segment_ids_k
    return EXACT(module, query, key, value, _spec(mask, segment_ids_q=ids, segment_ids_k=ids), **kwargs)


def causality_guessed(module, query, key, value, mask, **kwargs):
    """sdpa's rule: a module that says nothing is causal."""
    return EXACT(module, query, key, value, mask, **{"is_causal": getattr(module, "is_causal", True)} | kwargs)


def window_of_zero_obeyed(module, query, key, value, mask, **kwargs):
    window = (module.config.sliding_window, None)
    return EXACT(module, query, key, value, _spec(mask, window_size=window), **kwargs)


def masks_of_the_last_batch():
    """A mask is read when it is met first, and again where its version counter says that it was written."""
    known = WeakTensorKeyDictionary()

    def fault(module, query, key, value, mask, **kwargs):
        version, _ = known.get(mask, (None, None))
        if version != mask._version:
            known[mask] = mask._version, mask.clone()
        return EXACT(module, query, key, value, known[mask][1], **kwargs)

    return fault


FAULTS = [
    (padding_ignored, "bart", "right"),
    (padding_ignored, "bert", "left"),
    (padding_ignored, "llama", "holes"),
    (mask_dropped, "t5", "right"),
    (causality_dropped, "bart", "none"),
    (causality_dropped, "t5", "none"),
    (causality_dropped, "llama", "none"),
    (window_dropped, "mistral", "none"),
    (window_dropped, "modernbert", "none"),
    (window_off_by_one, "mistral", "none"),
    (window_off_by_one, "gemma2", "none"),
    (alignment_off_by_one, "llama", "none"),
    (scale_wrong, "bart", "none"),
    (scale_wrong, "t5", "none"),
    (scale_wrong, "llama", "none"),
    (softcap_dropped, "gemma2", "none"),
    (position_bias_dropped, "t5", "none"),
    (position_bias_without_gradient, "t5", "none"),
    (sinks_dropped, "gpt_oss", "none"),
    (sinks_without_gradient, "gpt_oss", "none"),
    (key_heads_interleaved, "llama", "none"),
    (cross_queries_unpadded_with_the_key_mask, "bart", "right"),
    (cross_queries_unpadded_with_the_key_mask, "pegasus", "right"),
]


@pytest.fixture
def plant(monkeypatch):
    def plant(fault) -> None:
        monkeypatch.setitem(AttentionInterface._global_mapping, "bsa_dense", fault)

    return plant


@pytest.mark.parametrize(("fault", "name", "padding"), FAULTS)
def test_the_comparison_notices(plant, fault, name, padding):
    inputs = batch_for(name, padding)
    assert_matches_eager(name, inputs)
    plant(fault)
    with pytest.raises(AssertionError):
        assert_matches_eager(name, inputs)


#: A fault, a comparison of `eager_comparisons` and its arguments.
OTHERS = [
    (positions_taken_for_documents, assert_positions_match, ("llama", "right", "zeros")),
    (positions_taken_for_documents, assert_positions_match, ("llama", "left", "descending")),
    (positions_taken_for_documents, assert_encoder_matches, ("t5gemma", "right", "documents")),
    (queries_on_padding_zeroed, assert_encoder_matches, ("t5gemma", "left", "clamped")),
    (queries_on_padding_zeroed, assert_encoder_matches, ("modernbert", "left", "clamped")),
    (causality_guessed, assert_cross_attention_matches, ()),
    (window_of_zero_obeyed, assert_window_of_zero_matches, ()),
]


@pytest.mark.parametrize(("fault", "comparison", "arguments"), OTHERS)
def test_comparisons_of_special_inputs_notice(plant, fault, comparison, arguments):
    comparison(*arguments)
    plant(fault)
    with pytest.raises(AssertionError):
        comparison(*arguments)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_the_comparison_of_rewritten_masks_notices(plant, kind):
    plant(masks_of_the_last_batch())
    assert_rewritten_masks_match("bert", kind, torch.Tensor.copy_)
    with pytest.raises(AssertionError):
        assert_rewritten_masks_match("bert", kind, lambda mask, values: mask.data.copy_(values))


@pytest.mark.parametrize("fault", [dropout_ignored, dropout_without_rescaling, dropout_of_whole_keys])
def test_the_dropout_statistics_notice(plant, fault):
    assert_dropout_is_applied()
    plant(fault)
    with pytest.raises(AssertionError):
        assert_dropout_is_applied()


# Faults of what surrounds the attention function: (object, attribute, what stands there instead), and a comparison.


def bias_without_its_mask(mask, dtype):
    return torch.zeros(mask.shape, dtype=dtype)


def bool_mask_added_as_numbers(mask, dtype):
    return mask.as_tensor().to(dtype)


def tensor_that_shows_all(mask):
    return torch.ones(mask.shape, dtype=torch.bool)


def layout_cut_at_the_diagonal(*arguments, original=BlockSparseConfig.layout):
    *place, causal = arguments
    return original(*place)


def every_layer_taken_for_cross_attention(*arguments):
    return "cross"


def assert_shows_later_keys() -> None:
    case = LATER_KEYS["gemma3"]
    assert_same(case.run(case.make("bsa_sparse", WIDE)), case.run(case.make("eager")))


def assert_roles() -> None:
    assert_matches_the_oracle(SHARED_CLASSES["blip2"], NARROW)


SURROUNDING = [
    (MaskSpec, "as_additive", bias_without_its_mask, COMPUTING["beit masked"].assert_matches_eager),
    (MaskSpec, "as_additive", bool_mask_added_as_numbers, COMPUTING["beit masked"].assert_matches_eager),
    (MaskSpec, "as_tensor", tensor_that_shows_all, COMPUTING["doge"].assert_matches_eager),
    (MaskSpec, "as_tensor", tensor_that_shows_all, COMPUTING["t5gemma2"].assert_matches_eager),
    (BlockSparseConfig, "layout", layout_cut_at_the_diagonal, assert_shows_later_keys),
    (sparse_layers, "role_of", every_layer_taken_for_cross_attention, assert_roles),
]


@pytest.mark.parametrize(("owner", "name", "fault", "compare"), SURROUNDING)
def test_comparisons_of_unusual_models_notice(monkeypatch, owner, name, fault, compare):
    compare()
    monkeypatch.setattr(owner, name, fault)
    with pytest.raises(AssertionError):
        compare()
