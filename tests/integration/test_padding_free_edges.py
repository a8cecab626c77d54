"""Padding-free models on unusual batches: documents and targets without tokens, masks of any kind, layers left out."""

from __future__ import annotations

import pytest
import torch
from packed_models import KNOWN, labelled, live_rows, losses, packed, widths
from transformers_models import FAMILIES, assert_same, tiny

SEQ2SEQ = [name for name in KNOWN if FAMILIES[name].seq2seq]


def without_tokens(name: str, documents: list[int], targets: list[int], padding: str = "right") -> dict:
    """A batch in which some rows of the source, and some of the targets, are padding only."""
    inputs = labelled(name, padding)
    inputs["attention_mask"][documents] = 0
    if "decoder_attention_mask" in inputs:
        inputs["decoder_attention_mask"][targets] = 0
        inputs["labels"][targets] = -100
    else:
        inputs["labels"][documents] = -100
    return inputs


def counted(inputs: dict) -> dict:
    """The inputs with their numbers of live tokens."""
    counts = tuple(int(v.sum()) for k, v in inputs.items() if k.endswith("attention_mask"))
    return inputs | {"num_live_tokens": counts if len(counts) == 2 else counts[0]}


@pytest.mark.parametrize("rows", [([0], [0]), ([2], [2]), ([1], [2]), ([0, 1], [1, 2])], ids=str)
@pytest.mark.parametrize("name", KNOWN)
def test_documents_without_tokens(name, rows):
    """As the padded model, in which a query without keys gives zeros. (Eager attention gives averages of padding.)"""
    inputs = without_tokens(name, *rows)
    expected = losses(tiny(name, "bsa_dense"), inputs)
    model = packed(name)
    with widths(model) as seen:
        assert_same(losses(model, inputs), expected)
    assert set(seen) == live_rows(inputs)
    inputs |= {k: v.clone() for k, v in inputs.items() if k.endswith("attention_mask")}  # not yet measured
    assert_same(losses(model, counted(inputs)), expected)


@pytest.mark.parametrize("name", ["bart", "t5", "bert", "llama", "modernbert"])
def test_a_batch_without_tokens_runs_padded(name):
    inputs = without_tokens(name, [0, 1, 2], [0])
    inputs["labels"][:] = 5
    model = packed(name)
    with widths(model) as seen:
        assert_same(losses(model, inputs), losses(tiny(name, "bsa_dense"), inputs))
    assert {rows for rows, _ in seen} == {3}


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_targets_without_tokens(name):
    inputs = labelled(name, "right")
    inputs["decoder_attention_mask"][:] = 0
    # In float64: without attention among targets mT5's gradients shrink to where float32 has 2e-4 of rounding.
    results = [losses(model.double(), inputs) for model in (packed(name), tiny(name, "bsa_dense"))]
    assert_same(*results, tolerance=1e-10)


@pytest.mark.parametrize("rows", [[0], [1, 2]], ids=str)
@pytest.mark.parametrize("name", [name for name in SEQ2SEQ if name != "mbart"])  # which cannot shift such labels
def test_labels_of_rows_that_have_none(name, rows):
    inputs = labelled(name, "right")
    inputs["labels"][rows] = -100
    inputs = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    assert_same(losses(packed(name), inputs), losses(tiny(name, "bsa_dense"), inputs))


def test_one_document_in_a_batch_of_one():
    inputs = {k: v[2:] for k, v in labelled("bart", "right").items()}
    assert_same(losses(packed("bart"), inputs), losses(tiny("bart", "eager"), inputs))


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("padding", ["right", "holes"])
@pytest.mark.parametrize("name", ["bart", "t5", "bert", "mistral"])
def test_masks_of_any_kind(name, padding, kind):
    inputs = labelled(name, padding)
    masks = {k: v.to(kind) for k, v in inputs.items() if k.endswith("attention_mask")}
    model = packed(name)
    with widths(model) as seen:
        assert_same(losses(model, inputs | masks), losses(tiny(name, "eager"), inputs))
    assert set(seen) == live_rows(inputs)


@pytest.mark.parametrize("side", ["attention_mask", "decoder_attention_mask"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_stacks_with_a_mask_of_four_dimensions_run_padded(name, side):
    inputs = labelled(name, "left")
    masks = {side: inputs[side].bool()[:, None, None]}
    assert_same(losses(packed(name), inputs | masks), losses(tiny(name, "bsa_dense"), inputs | masks))


@pytest.mark.parametrize("dropped", [0.5, 1.0])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["bart", "mbart", "marian", "pegasus"])
def test_layers_left_out(name, checkpointing, dropped):
    """LayerDrop, up to stacks none of whose layers run."""
    inputs = labelled(name, "holes")
    settings = {"encoder_layerdrop": dropped, "decoder_layerdrop": dropped}
    results = []
    for model in (packed(name, **settings), tiny(name, "eager", **settings)):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        with widths(model) as seen:
            results.append(losses(model, inputs))
        assert len(seen) < 4
    assert_same(*results)
