"""Tiny models with strong weights, ragged batches for them, and what is checked about them in several test files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import transformers
from torch import nn

import hf_flashbsa  # noqa: F401  registers bsa_dense

SIZE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
DECODER = dict(
    SIZE, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2
)
SEQ2SEQ = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2)
BART = dict(
    SEQ2SEQ, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=256, dropout=0.0,
)  # fmt: skip
T5 = dict(SEQ2SEQ, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, dropout_rate=0.0)


@dataclasses.dataclass(frozen=True)
class Family:
    """How to make a model: its class, its config class and what differs from that class's defaults."""

    model: type
    config: type
    settings: dict
    seq2seq: bool = False


LAYER_TYPES = ["sliding_attention", "full_attention"]
WINDOW = dict(DECODER, head_dim=8, sliding_window=5)
FAMILIES = {
    "bart": Family(transformers.BartForConditionalGeneration, transformers.BartConfig, BART, True),
    "mbart": Family(transformers.MBartForConditionalGeneration, transformers.MBartConfig, BART, True),
    "marian": Family(transformers.MarianMTModel, transformers.MarianConfig, BART, True),
    "pegasus": Family(transformers.PegasusForConditionalGeneration, transformers.PegasusConfig, BART, True),
    "t5": Family(transformers.T5ForConditionalGeneration, transformers.T5Config, T5, True),
    "mt5": Family(transformers.MT5ForConditionalGeneration, transformers.MT5Config, T5, True),
    "llama": Family(transformers.LlamaForCausalLM, transformers.LlamaConfig, DECODER),
    "mistral": Family(transformers.MistralForCausalLM, transformers.MistralConfig, WINDOW),
    "qwen2": Family(
        transformers.Qwen2ForCausalLM,
        transformers.Qwen2Config,
        dict(DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": Family(transformers.Qwen3ForCausalLM, transformers.Qwen3Config, dict(DECODER, head_dim=8)),
    "gemma": Family(transformers.GemmaForCausalLM, transformers.GemmaConfig, dict(DECODER, head_dim=8)),
    "gemma2": Family(
        transformers.Gemma2ForCausalLM, transformers.Gemma2Config, dict(WINDOW, attn_logit_softcapping=2.0)
    ),
    "gemma3": Family(
        transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig, dict(WINDOW, layer_types=LAYER_TYPES)
    ),
    "gpt_oss": Family(transformers.GptOssForCausalLM, transformers.GptOssConfig, dict(WINDOW, num_local_experts=4)),
    "bert": Family(
        transformers.BertForMaskedLM,
        transformers.BertConfig,
        dict(SIZE, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
    "roberta": Family(
        transformers.RobertaForMaskedLM,
        transformers.RobertaConfig,
        dict(SIZE, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    ),
    "modernbert": Family(
        transformers.ModernBertForMaskedLM,
        transformers.ModernBertConfig,
        dict(SIZE, pad_token_id=0, local_attention=6, global_attn_every_n_layers=2),
    ),
    # These take masks from Transformers' registry and compute (part of) their attention themselves.
    "led": Family(
        transformers.LEDForConditionalGeneration, transformers.LEDConfig, dict(BART, attention_window=4), True
    ),
    "bloom": Family(
        transformers.BloomForCausalLM,
        transformers.BloomConfig,
        dict(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, hidden_dropout=0.0, attention_dropout=0.0),
    ),
    "bigbird_pegasus": Family(
        transformers.BigBirdPegasusForConditionalGeneration,
        transformers.BigBirdPegasusConfig,
        dict(BART, attention_type="original_full"),
        True,
    ),
}
OWN_ATTENTION = ("led", "bloom", "bigbird_pegasus")
DISPATCHING = tuple(name for name in FAMILIES if name not in OWN_ATTENTION)
PADDINGS = ("none", "right", "left", "holes")


def tiny(name: str, implementation: str, **changes) -> nn.Module:
    """A model of a family in training mode. Weights depend on the family only, and are strong enough to show faults.

    Args:
        name: a key of `FAMILIES`.
        implementation: "eager", "bsa_dense", ...
        changes: config settings.
    """
    family = FAMILIES[name]
    config = family.config(**{**family.settings, **changes})
    model = family.model._from_config(config, attn_implementation=implementation)
    strengthen(model)
    return model.train()


def strengthen(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.normal_(std=0.3, generator=generator)
            if parameter.ndim == 1 and parameter_name.endswith("weight"):
                parameter.add_(1.0)  # norms


def mask_of(batch: int, length: int, padding: str) -> torch.Tensor | None:
    """int64 `(batch, length)` padding mask, ragged by row; None for "none"."""
    if padding == "none":
        return None
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        dead = row * length // (batch + 1)
        if padding == "left":
            mask[row, :dead] = 0
        elif padding == "right":
            mask[row, length - dead :] = 0
        elif padding == "holes":
            mask[row, 1 : 2 * dead : 2] = 0
        else:
            raise ValueError(padding)
    return mask


def batch_for(name: str, padding: str, batch: int = 3, length: int = 13, target_length: int = 7) -> dict:
    """Inputs of a family: ragged as `padding` says on the source, with targets of another length for seq2seq."""
    generator = torch.Generator().manual_seed(1)

    def tokens(n: int) -> torch.Tensor:
        return torch.randint(3, 64, (batch, n), generator=generator)

    inputs = {"input_ids": tokens(length), "attention_mask": mask_of(batch, length, padding)}
    if FAMILIES[name].seq2seq:
        inputs["decoder_input_ids"] = tokens(target_length)
        inputs["decoder_attention_mask"] = mask_of(batch, target_length, padding)
    return {key: value for key, value in inputs.items() if value is not None}


def additive(visible: torch.Tensor) -> torch.Tensor:
    """The float mask that hides what a bool mask hides."""
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def live_logits(model: nn.Module, inputs: dict, **extra) -> torch.Tensor:
    """Logits with zeros at padding, whose values no implementation promises."""
    logits = model(**inputs, **extra).logits
    mask = inputs.get("decoder_attention_mask") if "decoder_input_ids" in inputs else inputs.get("attention_mask")
    return logits if mask is None else logits * mask[..., None]


def run(model: nn.Module, inputs: dict, **extra) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Live logits, and the gradient of a random function of them with respect to every parameter that has one."""
    model.zero_grad()
    logits = live_logits(model, inputs, use_cache=False, **extra)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (logits.float() * weights.to(logits.device)).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients


#: Largest error relative to the largest entry of a tensor, or to 1% of the largest of all gradients where that is more
#: (key biases have gradient 0 in exact arithmetic). Both sides compute in float32; seen: 3.4e-5.
TOLERANCE = 1e-4


def errors_of(result: tuple, expected: tuple) -> dict[str, float]:
    """Errors of the logits and each gradient of a result of `run`, relative to another as `TOLERANCE` has it."""
    (logits, gradients), (expected_logits, expected_gradients) = result, expected
    assert gradients.keys() == expected_gradients.keys()
    pairs = {"logits": (logits, expected_logits)}
    pairs |= {name: (gradients[name], expected_gradients[name]) for name in gradients}
    largest = max(float(g.abs().max()) for g in expected_gradients.values())
    errors = {}
    for name, (actual, wanted) in pairs.items():
        assert actual.isfinite().all(), f"{name} is not finite"
        scale = max(float(wanted.abs().max()), 1e-2 * largest)
        errors[name] = float((actual - wanted).abs().max()) / scale
    return errors


def assert_same(result: tuple, expected: tuple, tolerance: float = TOLERANCE) -> None:
    """Two results of `run` agree: logits and every gradient."""
    for name, error in errors_of(result, expected).items():
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


def assert_matches_eager(name: str, inputs: dict, device: str = "cpu") -> None:
    """bsa_dense gives the logits and gradients of eager attention on the same inputs.

    T5's in float64 on the CPU: its scores are not scaled, so that strong weights amplify the rounding of float32, by
    how much depends on the processor.
    """
    dtype = torch.float64 if device == "cpu" and name in ("t5", "mt5") else torch.float32
    inputs = {key: value.to(device) for key, value in inputs.items()}
    assert_same(*(run(tiny(name, how).to(device, dtype), inputs) for how in ("bsa_dense", "eager")))


def assert_checkpointing_repeats(
    make_model: Callable[[], nn.Module], compute: Callable[[nn.Module, dict], tuple], inputs: dict, use_reentrant: bool
) -> None:
    """With gradient checkpointing a model gives the result and the gradients that it gives without, dropout included.

    Args:
        make_model: makes the same model at each call.
        compute: `run` or another function of a model and inputs whose results `assert_same` compares.
    """
    results = []
    for checkpointing in (True, False):
        model = make_model()
        model.enable_input_require_grads()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        torch.manual_seed(0)
        results.append(compute(model, inputs))
    assert_same(*results)


def assert_dropout_is_applied(p: float = 0.25) -> None:
    """The registered function drops weights with probability `p`, rescales the rest and follows torch's generator."""
    q, k = (torch.randn(2, 4, 64, 8, generator=torch.Generator().manual_seed(i)) for i in range(2))
    values = torch.eye(64).expand(2, 4, 64, 64)
    layer = nn.Module()

    def weights(dropout: float, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        function = transformers.AttentionInterface()["bsa_dense"]
        return function(layer, q, k, values, None, dropout=dropout, is_causal=False)[0]

    full, dropped = weights(0.0, 0), weights(p, 0)
    kept = dropped != 0
    assert abs(float(kept.float().mean()) - (1 - p)) <= 5 * (p * (1 - p) / kept.numel()) ** 0.5
    torch.testing.assert_close(dropped, full * kept / (1 - p))
    assert torch.equal(weights(p, 0), dropped)
    assert not torch.equal(weights(p, 1) != 0, kept)
    by_head = kept.float().mean((0, 1, 3)), kept.float().mean((0, 2, 3)), kept.float().mean((0, 1, 2))
    assert all(((rate - (1 - p)).abs() <= 0.06).all() for rate in by_head), "some head, query or key is treated apart"


@contextlib.contextmanager
def host_never_waits():
    """Within it, an operation that makes the host wait for the GPU is an error."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
