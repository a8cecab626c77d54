"""Tiny models whose attention is unusual, each with inputs: tables of classes, masks that are computed on, image
blocks, roles that one class shares. `tiny` of `transformers_models` has the usual ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import sparse_models  # noqa: F401  registers "sparse_oracle"
import torch
import transformers as t
from torch import nn
from transformers_models import assert_same, errors_of, mask_of, strengthen

from hf_flashbsa import BlockSparseConfig, set_block_sparse

SIZES = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
TEXT = dict(SIZES, vocab_size=64, num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
VISION = dict(SIZES, image_size=16, patch_size=4)
GEMMA = dict(TEXT, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"])
#: Probabilities of dropout under the names that configs have for them.
CALM = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
IMAGE, BATCH, LENGTH = 60, 3, 13


def _noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(length: int = LENGTH, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 59, (BATCH, length), generator=torch.Generator().manual_seed(seed))


def _text(length: int = LENGTH, padding: str = "right") -> dict:
    return dict(input_ids=_tokens(length), attention_mask=mask_of(BATCH, length, padding))


def _pixels(size: int = 16) -> dict:
    return dict(pixel_values=_noise(BATCH, 3, size, size))


@dataclasses.dataclass(frozen=True)
class Model:
    """A model class, a maker of its config, a maker of its inputs, and the output that is compared.

    `live` names the input mask that says which rows of the output count; None for all. `dtype` is float64 where
    strong weights amplify the rounding of float32, of eager attention too, beyond what tests allow.
    """

    cls: type
    config: Callable[[], object]
    inputs: Callable[[], dict]
    output: str = "last_hidden_state"
    live: str | None = None
    dtype: torch.dtype = torch.float32

    def make(self, implementation: str, rules: BlockSparseConfig | None = None) -> nn.Module:
        model = self.cls._from_config(self.config(), attn_implementation=implementation)
        strengthen(model)
        if rules is not None:
            set_block_sparse(model, rules)
        return model.to(self.dtype).train()

    def run(self, model: nn.Module, **extra) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The live output, and the gradient of a random function of it for every parameter that has one."""
        model.zero_grad()
        inputs = {k: x.to(self.dtype) if x.is_floating_point() else x for k, x in self.inputs().items()} | extra
        out = getattr(model(**inputs), self.output)
        if self.live is not None:
            out = out * inputs[self.live][..., None]
        (out * _noise(*out.shape, seed=2)).sum().backward()
        return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def assert_matches_eager(self) -> None:
        assert_same(self.run(self.make("bsa_dense")), self.run(self.make("eager")))


# Attention classes chosen from a table by name


def _falcon() -> t.FalconConfig:
    return t.FalconConfig(**TEXT, hidden_dropout=0.0, attention_dropout=0.0)


def _sam(cls: type) -> object:
    return cls(**VISION, output_channels=8, window_size=2, global_attn_indexes=[1], mlp_dim=32)


LOGITS = dict(output="logits", live="attention_mask")
TABLES = {
    "falcon": Model(t.FalconForCausalLM, _falcon, _text, **LOGITS),
    "gptj": Model(
        t.GPTJForCausalLM,
        lambda: t.GPTJConfig(
            vocab_size=64, n_embd=32, n_layer=2, n_head=4, rotary_dim=8, resid_pdrop=0.0, embd_pdrop=0.0,
            attn_pdrop=0.0,
        ),
        _text,
        **LOGITS,
    ),
    "gpt_neo": Model(
        t.GPTNeoForCausalLM,
        lambda: t.GPTNeoConfig(
            vocab_size=64, hidden_size=32, num_layers=2, num_heads=4, window_size=4, embed_dropout=0.0,
            attention_types=[[["global", "local"], 1]], resid_dropout=0.0, attention_dropout=0.0,
        ),
        _text,
        **LOGITS,
    ),
    "git": Model(
        t.GitForCausalLM,
        lambda: t.GitConfig(**SIZES, **CALM, vocab_size=64, vision_config=VISION, eos_token_id=2, bos_token_id=1),
        lambda: _text() | _pixels(),
        output="logits",
    ),
    "bark": Model(
        t.BarkSemanticModel,
        lambda: t.BarkSemanticConfig(
            hidden_size=32, num_layers=2, num_heads=4, input_vocab_size=64, output_vocab_size=64
        ),
        _text,
        **LOGITS,
    ),
    "data2vec vision": Model(
        t.Data2VecVisionModel,
        lambda: t.Data2VecVisionConfig(**VISION, **CALM, drop_path_rate=0.0, use_relative_position_bias=True),
        _pixels,
    ),
    "sam": Model(t.SamVisionModel, lambda: _sam(t.SamVisionConfig), _pixels),
    "sam hq": Model(t.SamHQVisionModel, lambda: _sam(t.SamHQVisionConfig), _pixels),
}  # fmt: skip


# Masks that models compute on


def _t5gemma2() -> t.T5Gemma2Config:
    text = dict(GEMMA, dropout_rate=0.0)
    encoder = dict(text_config=text, vision_config=VISION, mm_tokens_per_image=4)
    return t.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=60, eoi_token_index=61)


def _patches() -> dict:
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 8:] = 0
    shapes = torch.tensor([[4, 4], [2, 4]])
    return dict(pixel_values=_noise(2, 16, 48), pixel_attention_mask=mask, spatial_shapes=shapes)


#: Sizes of DeepSeek's attention: few keys are selected, all layers have plain feed-forward parts where they can.
DEEPSEEK = dict(
    TEXT, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    index_topk=4, index_head_dim=16, index_n_heads=2, moe_intermediate_size=16, n_routed_experts=4, n_group=1,
    topk_group=1, num_experts_per_tok=2, first_k_dense_replace=2,
)  # fmt: skip


def _deepseek_v4() -> t.DeepseekV4Config:
    layers = ["compressed_sparse_attention", "heavily_compressed_attention"]
    sizes = {name: DEEPSEEK[name] for name in ("q_lora_rank", "index_topk", "index_head_dim", "index_n_heads")}
    return t.DeepseekV4Config(
        **dict(TEXT, num_key_value_heads=1), **sizes, head_dim=16, qk_rope_head_dim=8, sliding_window=5,
        layer_types=layers, mlp_layer_types=["hash_moe"] * 2, n_routed_experts=4, num_experts_per_tok=2,
        compress_rates=dict(zip(layers, (4, 8), strict=True)), o_groups=2, o_lora_rank=16, moe_intermediate_size=16,
    )  # fmt: skip


COMPUTING = {
    "deepseek v3.2": Model(t.DeepseekV32ForCausalLM, lambda: t.DeepseekV32Config(**DEEPSEEK), _text, **LOGITS),
    "glm dsa": Model(t.GlmMoeDsaForCausalLM, lambda: t.GlmMoeDsaConfig(**DEEPSEEK), _text, **LOGITS),
    "deepseek v4": Model(t.DeepseekV4ForCausalLM, _deepseek_v4, _text, **LOGITS),
    "beit": Model(
        t.BeitModel,
        lambda: t.BeitConfig(**VISION, **CALM, drop_path_rate=0.0, use_relative_position_bias=True),
        _pixels,
    ),
    "beit shared bias": Model(
        t.BeitModel,
        lambda: t.BeitConfig(**VISION, **CALM, drop_path_rate=0.0, use_shared_relative_position_bias=True),
        _pixels,
    ),
    "beit masked": Model(
        t.BeitModel,
        lambda: t.BeitConfig(**VISION, **CALM, drop_path_rate=0.0, use_relative_position_bias=True),
        lambda: _pixels() | dict(attention_mask=mask_of(BATCH, 17, "holes")),
        live="attention_mask",
    ),
    "siglip2": Model(
        t.Siglip2VisionModel,
        lambda: t.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=4),
        _patches,
        output="pooler_output",
    ),
    "t5gemma2": Model(
        t.T5Gemma2ForConditionalGeneration, _t5gemma2, lambda: _text() | dict(decoder_input_ids=_tokens(7)), "logits"
    ),
    "doge": Model(t.DogeForCausalLM, lambda: t.DogeConfig(**TEXT, keep_window_size=6), _text, **LOGITS),
}


# Masks that show later keys to a decoder


def _gemma3() -> t.Gemma3Config:
    return t.Gemma3Config(
        text_config=dict(GEMMA, sliding_window=70, query_pre_attn_scalar=8),
        vision_config=dict(VISION, image_size=32),
        mm_tokens_per_image=64,
        image_token_id=IMAGE,
        boi_token_index=61,
        eoi_token_index=62,
    )


def _image_in_text() -> dict:
    inputs = _text(150)
    inputs["input_ids"][:, 20:84] = IMAGE
    return inputs | dict(token_type_ids=(inputs["input_ids"] == IMAGE).long(), **_pixels(32))


def _paligemma() -> t.PaliGemmaConfig:
    text = dict(TEXT, head_dim=8, model_type="gemma")
    vision = dict(VISION, image_size=32, projection_dim=32, model_type="siglip_vision_model")
    return t.PaliGemmaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, projection_dim=32)


def _prefix() -> dict:
    inputs = _text(150)
    inputs["input_ids"][:, :64] = IMAGE
    types = torch.zeros(BATCH, 150, dtype=torch.int64)
    types[:, 90:] = 1  # the suffix is causal
    return inputs | dict(token_type_ids=types, **_pixels(32))


LATER_KEYS = {
    "gemma3": Model(t.Gemma3ForConditionalGeneration, _gemma3, _image_in_text, **LOGITS),
    "paligemma": Model(t.PaliGemmaForConditionalGeneration, _paligemma, _prefix, **LOGITS, dtype=torch.float64),
}


# Classes that serve self- and cross-attention


def _former(cls: type) -> object:
    return cls(**SIZES, **CALM, vocab_size=64, encoder_hidden_size=32, cross_attention_frequency=1, pad_token_id=0)


def _queries() -> dict:
    return dict(query_embeds=_noise(BATCH, 150, 32), encoder_hidden_states=_noise(BATCH, 150, 32, seed=6))


def _moonshine() -> t.MoonshineConfig:
    return t.MoonshineConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, encoder_num_hidden_layers=2, decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4, decoder_num_attention_heads=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip


SHARED_CLASSES = {
    "moonshine": Model(
        t.MoonshineForConditionalGeneration,
        _moonshine,
        lambda: dict(input_values=_noise(BATCH, 60000), decoder_input_ids=_tokens(154)),
        "logits",
    ),
    "blip2": Model(t.Blip2QFormerModel, lambda: _former(t.Blip2QFormerConfig), _queries),
    "instructblip": Model(
        t.InstructBlipQFormerModel,
        lambda: _former(t.InstructBlipQFormerConfig),
        lambda: _queries() | dict(input_ids=_tokens(30)),
    ),
}

#: Which role an attention module has, by its path in the models above.
_ROLES = (
    ("cross", r"encoder_attn|crossattention"),
    ("decoder", r"decoder.*self_attn|language_model.*self_attn"),
    ("encoder", r"encoder.*self_attn|attention\.(attention|self)|vision.*self_attn"),
)


def with_oracle(model: nn.Module, rules: BlockSparseConfig) -> nn.Module:
    """Tells a model with attention "sparse_oracle" (`sparse_models`) which rule each of its modules has."""
    for path, module in model.named_modules():
        found = re.search(r"(?:layers?|block)\.(\d+)\.", path)
        if found and re.search(r"(attn|attention\.attention|attention\.self)$", path):
            role = next(role for role, pattern in _ROLES if re.search(pattern, path))
            if role == "decoder" and not module.is_causal:
                role = "encoder"  # PaliGemma's text model says that it is bidirectional
            module.oracle_rule = role, rules.rule(role, int(found[1]))
    return model


#: Rules for the models above, in blocks of 32: all that a mask shows, and each block with its neighbours.
WIDE = BlockSparseConfig("local", 32, window=4096)
COLUMNS = {"pattern": "global_columns", "num_global_tokens": 50}
NARROW = BlockSparseConfig("local", 32, window=1, roles={"cross": COLUMNS})


def assert_matches_the_oracle(case: Model, rules: BlockSparseConfig) -> None:
    """bsa_sparse gives the outputs and gradients of eager attention under the masks that the layouts stand for."""
    expected = case.run(with_oracle(case.make("sparse_oracle"), rules))
    assert_same(case.run(case.make("bsa_sparse", rules)), expected)
    dense = case.run(case.make("bsa_dense"))
    assert errors_of(dense, expected)["logits"] > 0.05, "the layouts should matter"
