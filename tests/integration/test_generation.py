"""Generation: tokens are those of eager attention, and a token takes no more operations than with sdpa."""

from __future__ import annotations

import functools
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_flashbsa.kernels.triton import backend as triton_backend
from hf_flashbsa.ops import lowering

SYNC = "aten._local_scalar_dense.default"


@functools.cache
def bart(layers: int = 2) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=64, d_model=32, encoder_layers=layers, decoder_layers=layers, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=64, init_std=0.5,
    )  # fmt: skip
    return _without_end(BartForConditionalGeneration(config))


@functools.cache
def llama(layers: int = 2, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    return _without_end(LlamaForCausalLM(config))


def _without_end(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose texts are as long as asked for."""
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 1
    return model.eval()


def batch(left: bool, rows: int = 2) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 64, (rows, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if rows > 1:
        mask[1, slice(0, 4) if left else slice(5, 9)] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: PreTrainedModel, implementation: str, inputs: dict, count: int = 12, **options) -> torch.Tensor:
    model.set_attn_implementation(implementation)
    torch.manual_seed(0)
    return model.generate(**inputs, min_new_tokens=count, max_new_tokens=count, **options)


class Counted(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operations_of_a_token(model: PreTrainedModel, implementation: str, inputs: dict, **options) -> Counter[str]:
    """Operations of four more tokens."""
    counts = []
    for count in (4, 8):
        with Counted() as counted:
            generate(model, implementation, inputs, count, do_sample=False, **options)
        counts.append(counted.counts)
    counts[1].subtract(counts[0])
    return counts[1]


STATIC = {"cache_implementation": "static", "disable_compile": True}
DECODED = {
    "beams, padded": (bart, batch(left=False), {"num_beams": 4}),
    "padded": (llama, batch(left=True), {}),
    "unpadded": (llama, batch(left=True, rows=1), {}),
    "static cache, padded": (llama, batch(left=True), STATIC),
}
decoded = pytest.mark.parametrize(("make", "inputs", "options"), DECODED.values(), ids=DECODED)


@decoded
def test_a_token_takes_no_more_operations_than_with_sdpa(make, inputs, options, monkeypatch):
    """Nor does the host wait for the device. On a GPU each would be a launch."""
    monkeypatch.setattr(lowering, "resolve_backend", lambda backend, q: "triton")
    monkeypatch.setattr(triton_backend, "forward", lambda q, k, v, out, lse, plan: out.zero_())
    ours, theirs = (operations_of_a_token(make(), name, inputs, **options) for name in ("bsa_dense", "sdpa"))
    assert ours.total() <= theirs.total(), (ours - theirs, theirs - ours)
    assert ours[SYNC] <= theirs[SYNC]


WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 8},
    "beam sampling": {"do_sample": True, "num_beams": 2},
    "static cache": {"do_sample": False, **STATIC},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("make", [bart, llama], ids=["bart", "llama"])
def test_tokens_are_those_of_eager_attention(make, options):
    inputs, options = batch(left=make is llama), {**options, "no_repeat_ngram_size": 1}
    want = generate(make(), "eager", inputs, **options)
    assert torch.equal(generate(make(), "bsa_dense", inputs, **options), want)
    assert len(want.unique()) > 6


@pytest.mark.parametrize("options", [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3}, {}], ids=str)
def test_tokens_of_prompts_in_chunks_and_of_candidates(options):
    """Several queries behind cached keys: a part of the prompt, or tokens guessed by the text or another model."""
    inputs = batch(left=True, rows=2 if "prefill_chunk_size" in options else 1)
    options = options or {"assistant_model": llama(1, 3)}
    want = generate(llama(), "eager", inputs, do_sample=False, **options)
    if "assistant_model" in options:
        options["assistant_model"].set_attn_implementation("bsa_dense")
    assert torch.equal(generate(llama(), "bsa_dense", inputs, do_sample=False, **options), want)


def test_tokens_of_the_triton_kernels(monkeypatch):
    """Padded beams, decoded without tile schedules."""
    monkeypatch.setattr(lowering, "resolve_backend", lambda backend, q: "triton")
    model, inputs = bart(1), batch(left=False)
    options = {"do_sample": False, "num_beams": 2}
    want = generate(model, "eager", inputs, 2, **options)
    assert torch.equal(generate(model, "bsa_dense", inputs, 2, **options), want)


def test_tokens_of_a_compiled_model_with_a_static_cache(monkeypatch):
    """One graph, whose kernels read the position of the query from the device."""
    monkeypatch.setattr(lowering, "resolve_backend", lambda backend, q: "triton")
    model, inputs = llama(1), batch(left=True)
    want = generate(model, "eager", inputs, 3, do_sample=False)
    model.set_attn_implementation("bsa_dense")
    torch._dynamo.reset()
    monkeypatch.setattr(model, "forward", torch.compile(model.forward, backend="eager", fullgraph=True))
    assert torch.equal(generate(model, "bsa_dense", inputs, 3, do_sample=False, **STATIC), want)
