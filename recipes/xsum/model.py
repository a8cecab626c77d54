"""The model of a run: its Transformers config, its weights, its attention layers, its loss."""

from __future__ import annotations

import logging
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import is_flash_attn_2_available

import hf_flashbsa
from recipes.xsum.config import Config, ConfigError, first_line, suggest
from recipes.xsum.flash_attention_2 import MISSING, REPAIRED
from recipes.xsum.tokenizer import vocabulary_size

logger = logging.getLogger(__name__)

IGNORED_LABEL = -100  # a position of the labels where no token is predicted
# What the model families of Transformers call the two kinds of dropout.
DROPOUT_NAMES = ("dropout", "activation_dropout", "dropout_rate", "resid_pdrop", "embd_pdrop")
ATTENTION_DROPOUT_NAMES = ("attention_dropout", "attn_pdrop")
#: Families of encoders from which Transformers makes language models too; causal only where their config says so.
ENCODERS = {*MODEL_FOR_MASKED_LM_MAPPING_NAMES, "bert-generation", "xlnet"}
#: Fields of a Transformers config that count or measure something.
SIZES = re.compile(r"(^|_)(layers?|heads|dim|size|positions|d_model|d_ff|d_kv|n_embd|n_head|n_layer|n_positions)$")


def check_attention(config: Config, device: torch.device) -> None:
    """Raise `ConfigError` where `config.attn_implementation` is unknown or cannot run on `device`, and where
    `block_sparse` means nothing."""
    name = config.attn_implementation
    known = ["eager", *(key for key in sorted(ALL_ATTENTION_FUNCTIONS.valid_keys()) if not key.startswith("paged|"))]
    if name not in known:
        raise ConfigError(f"unknown attn_implementation {name!r}; known here: {', '.join(known)}")
    is_flash = name == REPAIRED or "flash_attention" in name
    needs_cuda = "require_cuda: true" if config.require_cuda else name if is_flash else None
    if needs_cuda and device.type != "cuda":
        raise ConfigError(
            f"{needs_cuda} needs a CUDA device, but this run would be on {device.type}; "
            "use a GPU machine, or attn_implementation: bsa_dense or sdpa with require_cuda: false"
        )
    if name in ("flash_attention_2", REPAIRED) and not is_flash_attn_2_available():
        raise ConfigError(MISSING.format(name))
    block_layouts(config)


def block_layouts(config: Config) -> hf_flashbsa.BlockSparseConfig | None:
    """`block_sparse` as the library's config; None where there is none.

    Raises `ConfigError` for what the library does not accept.
    """
    if config.block_sparse is None:
        return None
    try:
        return hf_flashbsa.BlockSparseConfig.from_dict(config.block_sparse)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"block_sparse: {first_line(error)}") from error


def apply_layouts(config: Config, model: PreTrainedModel) -> None:
    """Give `model` the layouts of `block_sparse`, or number its layers for those that its own config holds.

    Raises `ConfigError` where bsa_sparse finds neither.
    """
    if config.attn_implementation != "bsa_sparse":
        return
    try:
        layouts = block_layouts(config) or hf_flashbsa.BlockSparseConfig.of(model.config)
    except ValueError as error:
        raise ConfigError(f"{config.model} holds no block layouts: give block_sparse") from error
    hf_flashbsa.set_block_sparse(model, layouts)


def transformers_config(config: Config) -> PreTrainedConfig:
    """The Transformers config of `model` or `model_config`, before a tokenizer is known.

    Raises `ConfigError` for a model that cannot be found, an unknown model type, and unknown or unfit fields.
    """
    if config.model is not None:
        try:
            return AutoConfig.from_pretrained(config.model)
        except Exception as error:  # each family reads its own fields, with its own kinds of error
            inner = Path(config.model) / "model"
            hint = f"; did you mean {inner}?" if (inner / "config.json").is_file() else ""
            raise ConfigError(f"cannot load model {config.model!r}: {first_line(error)}{hint}") from error
    values = dict(config.model_config)
    kind = str(values.pop("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ConfigError(f"unknown model_type {kind!r}{suggest(kind, CONFIG_MAPPING)}")
    try:
        default = CONFIG_MAPPING[kind]()
    except Exception as error:  # models made of others, such as encoder-decoder
        raise ConfigError(f"model_type {kind!r} cannot be made from fields alone: {first_line(error)}") from error
    valid = {*default.to_dict(), *default.attribute_map}
    for name, value in values.items():
        if name not in valid:
            raise ConfigError(f"{kind} has no model_config field {name!r}{suggest(str(name), valid)}")
        if isinstance(value, (int, float)) and value < 0 and SIZES.search(name):
            raise ConfigError(f"model_config: {name} must not be negative, got {value}")
    try:
        return CONFIG_MAPPING[kind](**values)
    except Exception as error:  # each family validates its own fields, with its own kinds of error
        raise ConfigError(f"model_config does not make a {kind} config: {first_line(error)}") from error


def architecture_of(model_config: PreTrainedConfig) -> str:
    """ "seq2seq" for encoder-decoders, "causal" for decoder-only language models.

    Raises `ConfigError` for all others. Transformers makes language models of encoders too, whose tokens see the ones
    that they are to predict.
    """
    kind, usable = model_config.model_type, "use an encoder-decoder (bart, t5) or a decoder-only model (llama, gpt2)"
    seq2seq = model_config.is_encoder_decoder
    is_encoder = kind in ENCODERS or getattr(model_config, "use_bidirectional_attention", None) is True
    is_causal = getattr(model_config, "is_decoder", False) or getattr(model_config, "causal", False)
    if is_encoder and not is_causal and not seq2seq:
        raise ConfigError(f"{kind} is an encoder, whose tokens see the ones that they are to predict; {usable}")
    if type(model_config) not in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if seq2seq else MODEL_FOR_CAUSAL_LM_MAPPING):
        raise ConfigError(f"{kind} writes no text from text, so it cannot be trained here; {usable}")
    if not hasattr(model_config, "vocab_size"):
        raise ConfigError(f"{kind} is made of several models, each with its own config; {usable}")
    return "seq2seq" if seq2seq else "causal"


def check_prompt(config: Config, architecture: str) -> None:
    """Raise `ConfigError` where `prompt_template` is given and an encoder-decoder would not read it."""
    if architecture == "seq2seq" and config.prompt_template != Config.prompt_template:
        raise ConfigError(
            f"prompt_template {config.prompt_template!r} is for decoder-only models, and this one is an "
            "encoder-decoder, which reads the bare document; leave prompt_template out"
        )


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model in float32 on the CPU. From scratch, torch's generator alone decides the weights.

    Raises `ConfigError` where model, tokenizer and lengths do not fit together.
    """
    model_config = transformers_config(config)
    if config.model_config is not None:
        _adopt_tokenizer(model_config, config.model_config, tokenizer)
    _set_dropout(model_config, "dropout", config.dropout, DROPOUT_NAMES)
    _set_dropout(model_config, "attention_dropout", config.attention_dropout, ATTENTION_DROPOUT_NAMES)
    _check_lengths(config, model_config)
    check_vocabulary(tokenizer, model_config)
    if config.model is not None and config.tokenizer is not None:
        _check_end_token(config, tokenizer, model_config)
    model = load_weights(config, model_config)
    apply_layouts(config, model)
    if config.gradient_checkpointing:
        # Renamed after Transformers 5.17; the old name warns.
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    return model


def load_weights(config: Config, model_config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of `config.model`, or random ones where that is None; float32, on the CPU.

    Raises `ConfigError` where they cannot be loaded or made.
    """
    auto = AutoModelForSeq2SeqLM if architecture_of(model_config) == "seq2seq" else AutoModelForCausalLM
    # A saved model does not say how it attends.
    options = {"attn_implementation": config.attn_implementation, "dtype": torch.float32}
    try:
        if config.model is None:
            return auto.from_config(model_config, **options)
        return auto.from_pretrained(config.model, config=model_config, **options)
    except Exception as error:  # damaged files, sizes that do not fit: each with its own kind of error
        what = config.model or model_config.model_type
        raise ConfigError(
            f"cannot build {what} with attn_implementation {config.attn_implementation}: {first_line(error)}"
        ) from error


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
    """Raise `ConfigError` where the model has no embedding for an id of the tokenizer."""
    size = vocabulary_size(tokenizer)
    if size > model_config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {size} entries, but the model's vocab_size is {model_config.vocab_size}; "
            "use the model's own tokenizer (tokenizer: none) or a larger vocab_size"
        )


def _check_end_token(config: Config, tokenizer: PreTrainedTokenizerBase, model_config: PreTrainedConfig) -> None:
    """Tell by the end token a tokenizer that belongs to another model.

    An encoder-decoder's is fixed by its pre-training. Decoder-only models are trained on with those of their chat
    versions too, so that a difference is only logged.
    """
    ends = getattr(model_config, "eos_token_id", None)
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if ends == [None] or tokenizer.eos_token_id in ends:
        return
    message = (
        f"tokenizer {config.tokenizer!r} ends a text with id {tokenizer.eos_token_id}, but model {config.model!r} "
        f"with {' or '.join(map(str, ends))}: it looks like another model's; leave tokenizer out for the model's own"
    )
    if model_config.is_encoder_decoder:
        raise ConfigError(message)
    logger.warning(message)


def _adopt_tokenizer(model_config: PreTrainedConfig, given: dict, tokenizer: PreTrainedTokenizerBase) -> None:
    """Take vocabulary size and special tokens from the tokenizer, except those that the user gave."""
    # Families start the decoder with the end token (BART) or with padding (T5, Pegasus).
    starts_with_eos = getattr(model_config, "decoder_start_token_id", None) == model_config.eos_token_id
    values = {
        "vocab_size": vocabulary_size(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if model_config.is_encoder_decoder:
        values["decoder_start_token_id"] = tokenizer.eos_token_id if starts_with_eos else tokenizer.pad_token_id
    if getattr(model_config, "forced_eos_token_id", None) is not None:
        values["forced_eos_token_id"] = tokenizer.eos_token_id
    for name, value in values.items():
        if name not in given:
            setattr(model_config, name, value)


def _set_dropout(model_config: PreTrainedConfig, option: str, value: float | None, names: tuple[str, ...]) -> None:
    if value is None:
        return
    present = [name for name in names if hasattr(model_config, name)]
    if not present:
        raise ConfigError(f"{model_config.model_type} has no {option} of its own to override; set {option}: none")
    for name in present:
        setattr(model_config, name, value)


def _check_lengths(config: Config, model_config: PreTrainedConfig) -> None:
    """Raise `ConfigError` where documents or summaries, given or written, outgrow the model's positions."""
    positions = getattr(model_config, "max_position_embeddings", None)  # none: relative ones, as T5's
    written = 0 if config.rouge == "never" else config.max_new_tokens
    source, target = config.max_source_length, config.max_target_length
    if model_config.is_encoder_decoder:
        needs = {
            f"max_source_length {source}": (source, "max_encoder_position_embeddings"),  # LED's
            f"max_target_length {target}": (target, "max_decoder_position_embeddings"),
            f"max_new_tokens {written}": (written, "max_decoder_position_embeddings"),
        }
    else:
        needs = {
            f"max_source_length {source} and max_target_length {target}": (source + target, ""),
            f"max_source_length {source} and max_new_tokens {written}": (source + written, ""),
        }
    for options, (length, name) in needs.items():
        limit = getattr(model_config, name, positions)
        if limit is not None and length > limit:
            field = name if hasattr(model_config, name) else "max_position_embeddings"
            raise ConfigError(f"{options}: {length} positions needed, but the model has {limit} ({field}); lower it")


def build_optimizer(config: Config, model: torch.nn.Module) -> torch.optim.AdamW:
    """AdamW; matrices decay, vectors (biases and norms) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, config.learning_rate, tuple(config.adam_betas), fused=True)


def prepare(
    accelerator: Accelerator, model: PreTrainedModel, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`, and what FSDP2 needs to train an encoder-decoder and to generate with it."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    # Accelerate shards input and output embedding apart from the rest, but BART's encoder and decoder hold the same
    # weight once more, and a weight belongs to one group. Out of its sight they all stay in the root's group.
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    model, optimizer = accelerator.prepare(model, optimizer)
    del model.get_input_embeddings, model.get_output_embeddings
    register_fsdp_forward_method(model, "generate")  # it calls the encoder without the model's own forward
    return model, optimizer


def attention_layers(model: torch.nn.Module) -> int:
    """Number of attention layers; an encoder-decoder counts encoder, decoder and cross-attention each."""

    def is_attention(module: torch.nn.Module) -> bool:
        return type(module).__name__.endswith("Attention")

    # T5 and BERT wrap the layer that attends in others whose names end the same way: count the innermost.
    return sum(
        is_attention(module) and not any(is_attention(inner) for inner in module.modules() if inner is not module)
        for module in model.modules()
    )


def attention_record(model: torch.nn.Module, implementation: str) -> dict[str, Any]:
    """What attends: the implementation's name, layers by back end that ran (ours alone tells), number of layers. Where
    stacks have CUDA graphs, also how many of their passes replayed them, and why others did not.

    Raises `RuntimeError` where one of our implementations did not run in every attention layer.
    """
    layers = attention_layers(model)
    if not implementation.startswith("bsa_"):
        return {"implementation": implementation, "backends": {}, "layers": layers}
    backends = Counter(hf_flashbsa.backends_used(model).values())
    if backends.total() != layers:
        raise RuntimeError(
            f"{implementation} ran in {backends.total()} of {layers} attention layers; "
            "the others would attend some other way unnoticed"
        )
    record = {"implementation": implementation, "backends": dict(sorted(backends.items())), "layers": layers}
    if graphs := hf_flashbsa.cuda_graph_counts(model):
        record["cuda_graphs"] = graphs
    return record


def training_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """The loss that training descends: `summed_loss`, with or without logits as `config` says."""
    if config.fused_linear_cross_entropy:
        return model(**batch, use_cache=False, num_items_in_batch=1).loss
    return summed_loss(model, batch, config.label_smoothing)


def summed_loss(model: torch.nn.Module, batch: dict[str, torch.Tensor], smoothing: float) -> torch.Tensor:
    """Label-smoothed cross-entropy summed over the target tokens of a batch; float32, `()`.

    `batch` holds the model's inputs and `labels`, `(B, T)`, with -100 where no token is predicted. A share
    `smoothing` of each target is spread evenly over the vocabulary, as in Transformers' `LabelSmoother`.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = model(**inputs, use_cache=False).logits
    if "decoder_input_ids" not in batch:  # decoder-only: each position predicts the next token
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(
        logits.flatten(0, 1).float(),
        labels.flatten(),
        ignore_index=IGNORED_LABEL,
        label_smoothing=smoothing,
        reduction="sum",
    )
