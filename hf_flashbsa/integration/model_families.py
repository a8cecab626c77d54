"""The model families of Transformers that are known by name, and the classes in which their layers and losses are."""

from __future__ import annotations

from typing import NamedTuple


class Family(NamedTuple):
    """Classes of `transformers.models.<name>.modeling_<name>`.

    Args:
        layers: how a stack's layers are called, see `integration.stacks`.
        stacks: classes whose forward runs a stack of layers.
        language_model: the encoder-decoder model whose logits are a plain projection, if it is one.
    """

    layers: str
    stacks: tuple[str, ...]
    language_model: str | None = None


FAMILIES: dict[str, Family] = {
    "bart": Family("seq2seq", ("BartEncoder", "BartDecoder"), "BartForConditionalGeneration"),
    "bert": Family("bert", ("BertModel",)),
    "gemma": Family("rotary", ("GemmaModel",)),
    "gemma2": Family("rotary", ("Gemma2Model",)),
    "gemma3": Family("rotary", ("Gemma3TextModel",)),
    "llama": Family("rotary", ("LlamaModel",)),
    "marian": Family("seq2seq", ("MarianEncoder", "MarianDecoder"), "MarianMTModel"),
    "mbart": Family("seq2seq", ("MBartEncoder", "MBartDecoder"), "MBartForConditionalGeneration"),
    "mistral": Family("rotary", ("MistralModel",)),
    "modernbert": Family("rotary", ("ModernBertModel",)),
    "mt5": Family("t5", ("MT5Stack",), "MT5ForConditionalGeneration"),
    "pegasus": Family("seq2seq", ("PegasusEncoder", "PegasusDecoder"), "PegasusForConditionalGeneration"),
    "qwen2": Family("rotary", ("Qwen2Model",)),
    "qwen3": Family("rotary", ("Qwen3Model",)),
    "roberta": Family("bert", ("RobertaModel",)),
    "t5": Family("t5", ("T5Stack",), "T5ForConditionalGeneration"),
}


def class_path(family: str, name: str) -> str:
    """Module and name of a family's class, as `f"{cls.__module__}.{cls.__qualname__}"` gives them."""
    return f"transformers.models.{family}.modeling_{family}.{name}"
