"""Tiny models that stand in for the checkpoints which the documentation loads from the Hub."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

#: Checkpoint as the documentation names it -> (model class, tiny config).
CHECKPOINTS = {
    "facebook/bart-large": (
        transformers.BartForConditionalGeneration,
        transformers.BartConfig(
            vocab_size=99, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
            init_std=0.2,
        ),
    ),
    "meta-llama/Llama-3.2-1B": (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=99, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2,
        ),
    ),
}  # fmt: skip
LOADERS = (transformers.AutoModelForSeq2SeqLM, transformers.AutoModelForCausalLM, transformers.AutoTokenizer)


def save(folder: Path) -> dict[str, Path]:
    """Saves a model and a tokenizer for each checkpoint; returns where."""
    found = {}
    for number, (name, (cls, config)) in enumerate(CHECKPOINTS.items()):
        torch.manual_seed(0)
        found[name] = folder / str(number)
        cls(config).save_pretrained(found[name])
        _tokenizer().save_pretrained(found[name])
    return found


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["A long document about attention. A short one. Not much here."], trainer)
    words = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)


def use_instead(monkeypatch, folders: dict[str, Path]) -> None:
    """Lets `from_pretrained` of Transformers' auto classes load these folders. Other names are a KeyError."""
    for loader in LOADERS:
        load = loader.from_pretrained
        monkeypatch.setattr(loader, "from_pretrained", lambda name, load=load, **kw: load(folders[name], **kw))
