"""Documents and a tokenizer for the tests of the recipe's data."""

import json

import pytest

from recipes.xsum.config import Config
from recipes.xsum.records import load_records
from recipes.xsum.tokenizer import load_tokenizer

BART = {"model_type": "bart", "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}  # fmt: skip


def make_config(**options):
    return Config(**{"model_config": BART, "attn_implementation": "eager", "vocab_size": 600, **options})


@pytest.fixture(scope="module", name="records")
def generated_records():
    return load_records(make_config(generated_examples=40), "train")


@pytest.fixture(scope="module", name="tokenizer")
def trained_tokenizer(records):
    return load_tokenizer(make_config(), records)


def edit_vocabulary(folder, renamed):
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({renamed.get(token, token): i for token, i in vocabulary.items()}))
