"""The memory layout of additive biases: what T5's embedding makes of one, and what kernels get."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from transformers_models import batch_for, tiny

from hf_flashbsa import attention, padding_free
from hf_flashbsa.integration import attention_function
from hf_flashbsa.integration import bias_alignment as module
from hf_flashbsa.integration.bias_alignment import in_wide_rows


def heads_last(queries: int = 5, keys: int = 7, heads: int = 4, dtype=torch.float32) -> torch.Tensor:
    """`(1, H, Q, K)` as T5 makes it."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(queries, keys, heads, generator=g).to(dtype).permute(2, 0, 1).unsqueeze(0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("keys", [1, 7, 16, 24])
def test_values_stay_and_rows_begin_at_multiples_of_16_bytes(keys, dtype):
    given = heads_last(keys=keys, dtype=dtype)
    made = in_wide_rows(given)
    assert torch.equal(made, given) and made.dtype == dtype
    assert made.stride(3) == 1
    assert [stride * made.element_size() % 16 for stride in made.stride()[1:3]] == [0, 0]
    assert in_wide_rows(made) is made


def test_what_is_expanded_stays_so():
    row = torch.randn(2, 1, 1, 7)
    made = in_wide_rows(row.expand(2, 4, 5, 7))
    assert torch.equal(made, row.expand(2, 4, 5, 7)) and made.stride()[1:] == (0, 0, 1)
    assert made.untyped_storage().nbytes() == 2 * 8 * 4


@pytest.mark.parametrize("given", [heads_last(queries=1), torch.zeros(1, 4, 5, 1).expand(1, 4, 5, 7)])
def test_what_would_gain_nothing_is_left_alone(given):
    assert in_wide_rows(given) is given


def test_gradients_pass():
    weight = torch.randn(5, 7, 4, requires_grad=True)
    out = torch.randn(1, 4, 5, 7)
    in_wide_rows(weight.permute(2, 0, 1).unsqueeze(0)).backward(out)
    assert torch.equal(weight.grad, out[0].permute(1, 2, 0))


@pytest.mark.parametrize("packed", [False, True])
def test_the_layers_of_t5_share_a_copy_of_each_stack(packed):
    model, batch = tiny("t5", "bsa_dense"), batch_for("t5", "right")
    seen = []

    def noted(*args, bias, **kwargs):
        seen.append(bias)
        return attention(*args, bias=bias, **kwargs)

    with (
        mock.patch.object(attention_function, "attention", noted),
        mock.patch.object(module, "_copied", wraps=module._copied) as copied,
    ):
        if packed:
            with padding_free(model):
                model(**batch).logits.sum().backward()
        else:
            model(**batch).logits.sum().backward()
    biases = [x for x in seen if x is not None]
    assert len(biases) == 4 and len(set(map(id, biases))) == 2  # two layers of the encoder, two of the decoder
    assert all(x.stride(3) == 1 and x.stride(2) * x.element_size() % 16 == 0 for x in biases)
    assert copied.call_count == 2
