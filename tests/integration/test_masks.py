"""The mask object: what it says equals what Transformers' own mask says, for every kind of mask."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AttentionInterface, DynamicCache, StaticCache, masking_utils
from transformers_models import DECODER, PADDINGS, mask_of

from hf_flashbsa import AttentionSpec
from hf_flashbsa.integration.mask_function import MaskSpec, Structure, bsa_mask, recognise
from hf_flashbsa.integration.model_source import computes_own_attention
from hf_flashbsa.ops.reference import reference_attention

BATCH, LENGTH = 4, 11
CREATORS = {
    "causal": masking_utils.create_causal_mask,
    "window": masking_utils.create_sliding_window_causal_mask,
    "chunked": masking_utils.create_chunked_causal_mask,
    "bidirectional": masking_utils.create_bidirectional_mask,
    "bidirectional window": masking_utils.create_bidirectional_sliding_window_mask,
}
CAUSAL = ("causal", "window", "chunked")
#: Name -> (cache class or None, tokens that it holds before the call).
CACHES = {"none": (None, 0), "empty": (DynamicCache, 0), "dynamic": (DynamicCache, 6), "static": (StaticCache, 6)}
PACKED = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3]] * 2 + [[0, 0, 1, 2, 0, 1, 2, 3, 4, 5, 0]] * 2)


def config_for(implementation: str) -> transformers.LlamaConfig:
    config = transformers.LlamaConfig(**DECODER, sliding_window=3, attention_chunk_size=4)
    config._attn_implementation = implementation
    return config


def filled_cache(kind: str, config) -> DynamicCache | StaticCache | None:
    cls, seen = CACHES[kind]
    if cls is None:
        return None
    cache = StaticCache(config, max_cache_len=24) if cls is StaticCache else cls(config=config)
    if seen:
        for layer in range(config.num_hidden_layers):
            cache.update(torch.zeros(BATCH, 2, seen, 8), torch.zeros(BATCH, 2, seen, 8), layer)
    return cache


def create(implementation: str, kind: str, padding: str = "none", cache: str = "none", **kwargs):
    """A mask as a model of `implementation` makes it."""
    config = config_for(implementation)
    if cache != "none" and kind in ("window", "bidirectional window"):
        config.layer_types = ["sliding_attention"] * 2
    if kind in CAUSAL:
        kwargs.setdefault("past_key_values", filled_cache(cache, config))
    return CREATORS[kind](
        config=config,
        inputs_embeds=torch.zeros(BATCH, LENGTH, 8),
        attention_mask=mask_of(BATCH, LENGTH + CACHES[cache][1], padding),
        **kwargs,
    )


def visible(mask: MaskSpec | torch.Tensor | None) -> torch.Tensor:
    """bool `(B, 1, Q, K)` that a mask stands for, whoever made it."""
    if mask is None:
        return torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool)
    if isinstance(mask, torch.Tensor):
        return mask == 0.0
    batch, _, len_q, len_k = mask.shape
    values = torch.eye(len_k).expand(batch, 1, len_k, len_k)
    out, _ = reference_attention(torch.zeros(batch, 1, len_q, 1), torch.zeros(batch, 1, len_k, 1), values, mask.spec)
    return out > 0


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(
    ("kind", "cache"), [(kind, cache) for kind in CREATORS for cache in (CACHES if kind in CAUSAL else ["none"])]
)
def test_recognised_masks_equal_the_general_evaluation(kind, cache, padding):
    ours = create("bsa_dense", kind, padding, cache)
    assert ours.spec.mask is None, "the structure of the mask was not recognised"
    assert torch.equal(visible(ours), visible(create("eager", kind, padding, cache)))


@pytest.mark.parametrize("kind", CAUSAL)
def test_packed_positions(kind):
    ours = create("bsa_dense", kind, position_ids=PACKED)
    assert torch.equal(visible(ours), visible(create("eager", kind, position_ids=PACKED)))
    if kind != "chunked":  # chunks of packed documents count positions, not distances: evaluated
        assert ours.spec.mask is None and ours.packed


def _divisible(batch_idx, head_idx, q_idx, kv_idx):
    return (q_idx + kv_idx) % 3 == 0


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("combination", ["or_mask_function", "and_mask_function"])
@pytest.mark.parametrize("kind", CREATORS)
def test_functions_of_the_user_are_evaluated(kind, combination, padding):
    ours = create("bsa_dense", kind, padding, **{combination: _divisible})
    assert ours.spec.mask is not None
    assert torch.equal(visible(ours), visible(create("eager", kind, padding, **{combination: _divisible})))


def test_bidirectional_blocks_are_evaluated():
    blocks = torch.tensor([[-1, -1, 0, 0, 0, -1, 1, 1, -1, -1, -1]] * BATCH)
    ours = create("bsa_dense", "causal", "left", block_sequence_ids=blocks)
    assert torch.equal(visible(ours), visible(create("eager", "causal", "left", block_sequence_ids=blocks)))


def test_functions_of_the_same_name_are_not_trusted():
    def sliding_window_overlay(sliding_window):
        def inner_mask(batch_idx, head_idx, q_idx, kv_idx):
            return kv_idx > q_idx + sliding_window

        return inner_mask

    assert recognise(sliding_window_overlay(3)) is None
    assert recognise(masking_utils.sliding_window_overlay(3)) is not None


@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional"])
def test_offsets_that_are_tensors(kind):
    functions = {
        "causal": masking_utils.causal_mask_function,
        "window": masking_utils.sliding_window_causal_mask_function(3),
        "bidirectional": masking_utils.bidirectional_mask_function,
    }
    call = dict(batch_size=BATCH, q_length=4, kv_length=9, mask_function=functions[kind])
    call["attention_mask"] = mask_of(BATCH, 12, "left").bool()
    tensors = bsa_mask(**call, q_offset=torch.tensor(5), kv_offset=torch.tensor(2))
    assert torch.equal(visible(tensors), visible(masking_utils.eager_mask(**call, q_offset=5, kv_offset=2)))


def test_a_static_cache_may_count_on_after_the_mask_was_made():
    config = config_for("bsa_dense")
    cache = filled_cache("static", config)
    mask = create("bsa_dense", "causal", past_key_values=cache)
    before = visible(mask)
    cache.update(torch.zeros(BATCH, 2, LENGTH, 8), torch.zeros(BATCH, 2, LENGTH, 8), 0)
    assert torch.equal(visible(mask), before)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("extra", [{}, {"position_ids": PACKED}, {"and_mask_function": _divisible}])
def test_slices(padding, extra):
    mask = create("bsa_dense", "window", padding, **extra)
    whole = visible(mask)
    assert torch.equal(visible(mask[:, :, -4:, :]), whole[:, :, -4:])
    assert torch.equal(visible(mask[:, :, 2:9, 1:]), whole[:, :, 2:9, 1:])
    assert mask[:, :, 2:9, 1:].shape == (BATCH, 1, 7, LENGTH - 1)
    for index in (0, (slice(None), slice(None), slice(0, 9, 2)), (slice(None), slice(None), None), (slice(None), 0)):
        assert torch.equal(mask[index], whole[index]), "other parts are tensors"


def test_it_looks_like_a_mask_and_survives_copies():
    mask = create("bsa_dense", "window", "left")
    assert (mask.shape, mask.ndim, mask.dtype, mask.device.type) == ((BATCH, 1, LENGTH, LENGTH), 4, torch.bool, "cpu")
    assert mask.contiguous() is mask and mask.to("cpu") is mask and mask.to(torch.float16) is mask
    for copied in (copy.deepcopy(mask), pickle.loads(pickle.dumps(mask)), copy.copy(mask)):
        assert torch.equal(visible(copied), visible(mask))
    elsewhere = mask.to("meta", non_blocking=True)
    assert elsewhere.device.type == elsewhere.spec.segment_ids_k.device.type == "meta"
    assert mask.to("meta") is elsewhere, "one copy per device serves all layers"


@pytest.mark.parametrize("kind", ["causal", "window", "bidirectional"])
def test_a_mask_comes_back_unchanged_where_a_model_makes_its_masks(kind):
    mask = create("bsa_dense", "bidirectional", "right")
    again = CREATORS[kind](
        config=config_for("bsa_dense"),
        inputs_embeds=torch.zeros(BATCH, LENGTH, 8),
        attention_mask=mask,
        past_key_values=None,
    )
    assert again is mask


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("kind", CREATORS)
def test_a_model_may_compute_on_it(kind, padding):
    mask, eager = create("bsa_dense", kind, padding), create("eager", kind, padding)
    shown = visible(eager)
    lowest = torch.finfo(torch.float32).min
    scores = torch.randn(BATCH, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))
    added = torch.where(shown, scores, lowest)
    in_place = scores.clone()
    in_place += mask
    for total in (scores + mask, mask + scores, torch.add(mask, scores), in_place):
        assert total.dtype == torch.float32 and torch.equal(torch.where(shown, total, lowest), added)
        assert (total[~shown.expand_as(total)] < lowest / 2).all(), "hidden scores are the lowest"
    expected = {
        "where": (torch.where(mask, scores, 7.0), torch.where(shown, scores, 7.0)),
        "masked_fill": (scores.masked_fill(~mask, -1.0), scores.masked_fill(~shown, -1.0)),
        "cat": (torch.cat([mask, mask[:, :, :, :3]], dim=-1), torch.cat([shown, shown[..., :3]], dim=-1)),
        "repeat": (mask.repeat(1, 4, 1, 1), shown.repeat(1, 4, 1, 1)),
        "expand": (mask.expand(-1, 4, -1, -1), shown.expand(-1, 4, -1, -1)),
        "reshape": (mask.reshape(-1, LENGTH), shown.reshape(-1, LENGTH)),
        "any": (mask.any(-1), shown.any(-1)),
        "compare": (mask == 0, ~shown),
        "and": (shown & mask, shown),
        "or": (mask | ~shown, torch.ones_like(shown)),
        "multiply": (scores * mask, scores * shown),
        "float": (mask.float(), shown.float()),
        "transpose": (mask.mT, shown.mT),
    }
    for name, (ours, wanted) in expected.items():
        assert type(ours) is torch.Tensor and torch.equal(ours, wanted), name
    assert mask.size() == shown.size() and mask.size(-1) == LENGTH and mask.dim() == 4
    assert mask is not None and mask != "other" and len({mask, mask}) == 1


def test_nobody_writes_to_the_mask_that_layers_share():
    mask = create("bsa_dense", "causal")
    with pytest.raises(NotImplementedError, match="writes to its attention mask .*attn_implementation='sdpa'"):
        mask[:, :, 0] = True
    with pytest.raises(NotImplementedError, match="writes to its attention mask"):
        mask.masked_fill_(~mask, True)
    with pytest.raises(AttributeError, match="no attribute 'no_such_method'"):
        mask.no_such_method()


def test_compiled_models_may_compute_on_it():
    mask = create("bsa_dense", "window", "left")
    scores = torch.randn(BATCH, 4, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0))

    def compute(scores):
        joined = torch.cat([mask, mask[:, :, :, :3]], dim=-1)
        return scores + mask, torch.where(mask, scores, 0.0), joined, mask.repeat(1, 4, 1, 1)

    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    for ours, eager in zip(compiled(scores), compute(scores), strict=True):
        assert torch.equal(ours, eager)


def test_functions_of_torch_get_a_tensor():
    mask = create("bsa_dense", "causal", "right")
    q, k, v = (torch.randn(BATCH, 2, LENGTH, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    function = torch.nn.functional.scaled_dot_product_attention
    assert torch.equal(function(q, k, v, attn_mask=mask), function(q, k, v, attn_mask=mask.as_tensor()))


#: Positions that are not those of one document, read as documents or not: what eager attention makes of them counts.
POSITIONS = {
    "documents": PACKED,
    "zeros": torch.zeros(BATCH, LENGTH, dtype=torch.int64),
    "pairs": (torch.arange(LENGTH) // 2).expand(BATCH, -1),
    "descending": torch.arange(LENGTH).flip(0).expand(BATCH, -1),
    "one row for all": PACKED[:1],
    "with a gap": torch.arange(LENGTH)[None] + 3 * (torch.arange(LENGTH)[None] > 4),
}


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize(
    ("padding", "cache"),
    [("none", "none"), ("none", "empty"), ("left", "none"), ("right", "none"), ("left", "static")],
)
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_positions_divide_where_there_is_neither_a_mask_nor_a_cache(kind, padding, cache, positions):
    ours, eager = (
        create(how, kind, padding, cache, position_ids=POSITIONS[positions]) for how in ("bsa_dense", "eager")
    )
    assert torch.equal(visible(ours), visible(eager))
    undivided = visible(create("eager", kind, padding, cache))
    assert torch.equal(visible(ours), undivided) == ((padding, cache) != ("none", "none"))


@pytest.mark.parametrize("kind", ["bidirectional", "bidirectional window"])
def test_positions_never_divide_bidirectional_masks(kind):
    given = {"position_ids": PACKED} if kind == "bidirectional" else {}
    assert torch.equal(visible(create("bsa_dense", kind, **given)), visible(create("eager", kind)))


@pytest.mark.parametrize("size", [0, -1])
def test_windows_and_chunks_of_no_size_are_none(size):
    window, chunked = masking_utils.sliding_window_overlay, masking_utils.chunked_overlay
    both = masking_utils.sliding_window_bidirectional_overlay
    assert recognise(window(size)) == recognise(chunked(0, torch.zeros(1))) == recognise(both(-1)) == Structure()
    causal = bsa_mask(BATCH, LENGTH, LENGTH, mask_function=masking_utils.sliding_window_causal_mask_function(size))
    assert torch.equal(visible(causal), visible(create("eager", "causal")))
    alone = visible(bsa_mask(BATCH, LENGTH, LENGTH, mask_function=both(0)))  # 0 on each side: the own token
    assert torch.equal(alone, torch.eye(LENGTH, dtype=torch.bool).expand_as(alone))


@pytest.mark.parametrize("kind", CREATORS)
def test_the_host_never_waits_for_the_device(kind):
    """Fake tensors have no values: whatever reads one raises."""
    forward = AttentionInterface()["bsa_dense"]
    with FakeTensorMode():
        layer = torch.nn.Linear(1, 1)
        offset = torch.zeros((), dtype=torch.int64)
        with pytest.raises(DataDependentOutputException):
            offset.item()
        q, k, positions = (
            torch.zeros(BATCH, 4, LENGTH, 8),
            torch.zeros(BATCH, 2, LENGTH, 8),
            torch.zeros(BATCH, LENGTH, dtype=torch.int64),
        )
        for padding in (None, torch.ones(BATCH, LENGTH + 1, dtype=torch.bool)):
            function = {
                "causal": masking_utils.causal_mask_function,
                "window": masking_utils.sliding_window_causal_mask_function(3),
                "chunked": masking_utils.chunked_causal_mask_function(4, torch.zeros(BATCH, dtype=torch.int64)),
                "bidirectional": masking_utils.bidirectional_mask_function,
                "bidirectional window": masking_utils.sliding_window_bidirectional_mask_function(3),
            }[kind]
            for structure in (function, masking_utils.and_masks(function, _divisible)):
                for where in ({}, dict(q_offset=offset, kv_offset=offset)):
                    mask = bsa_mask(BATCH, LENGTH, LENGTH, mask_function=structure, attention_mask=padding, **where)
                    out, _ = forward(layer, q, k, k, mask, scaling=1.0, position_ids=positions)
                    assert out.shape == (BATCH, LENGTH, 4, 8)


def test_models_that_compute_their_own_attention_are_found():
    own = [transformers.LEDModel, transformers.BloomModel, transformers.BigBirdPegasusModel, transformers.MptModel]
    dispatching = [transformers.BartModel, transformers.T5Model, transformers.LlamaModel, transformers.Gemma3TextModel]
    assert all(computes_own_attention(model.config_class) for model in own)
    assert not any(computes_own_attention(model.config_class) for model in dispatching)


def test_a_model_without_source_is_taken_to_dispatch():
    class HandMadeConfig(transformers.PreTrainedConfig):
        pass

    assert not computes_own_attention(HandMadeConfig)


def test_models_with_their_own_attention_get_the_eager_mask(caplog):
    call = dict(batch_size=BATCH, q_length=5, kv_length=5, attention_mask=mask_of(BATCH, 5, "left").bool())
    config = transformers.GPTNeoModel.config_class()  # no other test asks about it
    mask = bsa_mask(**call, config=config, dtype=torch.float32)
    assert torch.equal(mask, masking_utils.eager_mask(**call, dtype=torch.float32))
    bsa_mask(**call, config=config, dtype=torch.float32)
    assert [r.message for r in caplog.records if "GPTNeo" in r.message] == caplog.messages[:1], "one line, once"


def test_a_spec_is_not_changed_by_what_is_derived_from_it():
    mask = create("bsa_dense", "causal", "right")
    before = mask.spec.segment_ids_k.clone()
    mask.packed_by(torch.tensor([0, 4, LENGTH]), torch.tensor([0, 4, LENGTH]), dense=True)
    assert isinstance(mask.spec, AttentionSpec) and mask.spec.segment_ids_q is None
    assert torch.equal(mask.spec.segment_ids_k, before)
