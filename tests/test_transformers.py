"""bsa_dense against Transformers' eager attention: whole models, logits and every gradient."""

from __future__ import annotations

import pytest
import torch
from transformers_models import DISPATCHING, OWN_ATTENTION, PADDINGS, assert_matches_eager, batch_for


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("name", DISPATCHING)
def test_logits_and_gradients(name, padding):
    assert_matches_eager(name, batch_for(name, padding))


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_own(name):
    assert_matches_eager(name, batch_for(name, "right"))
