"""Kernels that models ask Triton for, by the keys under which it compiles them, on a machine that needs no GPU.

    PYTHONPATH=. python tests/tools/kernel_keys.py bart-padding-free llama/portable --lengths 300,200 301,77

prints as a JSON line for each model which kernels `warm_up` would compile for the first batch, of 2 rows of up to so
many source and target tokens, and which steps on all batches ask for. Kernels are for Hopper GPUs, of a model with
"/portable" the portable ones for sm_80. With "/compiled", the former are compiled, and steps ask for what is missing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from aot import _Driver
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

import hf_flashbsa
from hf_flashbsa.integration import warm_up
from hf_flashbsa.kernels import backends, tuning

ROWS, VOCABULARY = 2, 99


def bart(**changes) -> BartForConditionalGeneration:
    sizes = {
        "vocab_size": VOCABULARY, "d_model": 128, "encoder_layers": 1, "decoder_layers": 1,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 1024, "attention_dropout": 0.1,
    }  # fmt: skip
    return BartForConditionalGeneration(BartConfig(**sizes | changes, attn_implementation="bsa_dense"))


def bart_padding_free() -> BartForConditionalGeneration:
    model = bart()
    hf_flashbsa.enable_padding_free(model)
    return model


def bart_sparse() -> BartForConditionalGeneration:
    model = bart()
    layout = hf_flashbsa.BlockSparseConfig("longformer", window=256, num_global_tokens=128)
    hf_flashbsa.set_block_sparse(model, layout)
    model.set_attn_implementation("bsa_sparse")
    return model


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=256, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            num_key_value_heads=2, attn_implementation="bsa_dense",
        )
    )  # fmt: skip


MODELS = {
    "bart": bart,
    "bart-eval": lambda: bart().eval(),
    "bart-padding-free": bart_padding_free,
    "bart-sparse": bart_sparse,
    "llama": llama,
    "llama-eval": lambda: llama().eval(),
}


def batch_of(model, source: int, target: int, seed: int) -> dict[str, torch.Tensor]:
    """Right-padded rows, the first one as long as the batch."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.randint(length // 2, length, (ROWS,), generator=generator)
        lengths[0] = length
        live = torch.arange(length) < lengths[:, None]
        return torch.randint(4, VOCABULARY, live.shape, generator=generator), live

    ids, live = tokens(source)
    labels, labelled = tokens(target) if model.config.is_encoder_decoder else (ids, live)
    return {"input_ids": ids, "attention_mask": live.long(), "labels": labels.masked_fill(~labelled, -100)}


@contextlib.contextmanager
def without_gpu(arch: int, hopper: bool) -> Iterator[None]:
    """Within, attention on the CPU is computed by Triton kernels for `sm_<arch>`, as far as compiling them goes."""
    importlib.import_module("hf_flashbsa.kernels.triton.backend")  # Triton's interpreter is chosen on import
    active = driver._active
    driver.set_active(_Driver(arch))
    try:
        with (
            mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}),
            mock.patch.object(tuning, "architecture", lambda device: f"sm_{arch}"),
            mock.patch.object(tuning, "is_hopper", lambda device: hopper),
            mock.patch.object(backends, "choose_backend", lambda device, dtype: backends.Backend("triton")),
            mock.patch.object(CompiledKernel, "_init_handles", lambda kernel: None),
        ):
            yield
    finally:
        driver._active = active


@contextlib.contextmanager
def asked_for() -> Iterator[dict[str, str]]:
    """Within, Triton compiles and launches nothing. Yields the names of kernels that it was asked for and had not
    compiled, by key."""
    found: dict[str, str] = {}

    def note(*, key: str, fn, **_) -> bool:
        found[hashlib.sha256(key.encode()).hexdigest()[:16]] = fn.name.rpartition(".")[2]
        return True  # Triton goes no further

    with (
        mock.patch.object(knobs.runtime, "jit_cache_hook", note),
        mock.patch.object(CompiledKernel, "run", lambda *arguments: None),
    ):
        yield found


def warm(model, batch: dict[str, torch.Tensor]):
    with torch.autocast("cpu", torch.bfloat16):
        return warm_up._compile(model, [batch], warm_up._loss, None, 2, lambda done, total: None)


def train(model, batch: dict[str, torch.Tensor]) -> None:
    """A step as a user's, in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch).loss
    if model.training:
        loss.backward()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help=f"one of {', '.join(MODELS)}")
    parser.add_argument("--lengths", nargs="+", default=["300,260"], help="most source and target tokens of batches")
    options = parser.parse_args(arguments)
    for case in options.model:
        name, _, variant = case.partition("/")
        model = MODELS[name]()
        lengths = [tuple(map(int, pair.split(","))) for pair in options.lengths]
        batches = [batch_of(model, *pair, seed) for seed, pair in enumerate(lengths)]
        with without_gpu(90 if variant == "" else 80, variant == ""):
            if variant == "compiled":
                kernels = warm(model, batches[0])
                result = {"kernels": kernels.total, "compiled": kernels.compiled}
            else:
                with asked_for() as warmed:
                    warm(model, batches[0])
                result = {"warmed": warmed}
            with asked_for() as launched:
                for batch in batches:
                    train(model, batch)
        print(json.dumps({"model": case, **result, "launched": launched}), flush=True)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    sys.exit(main())
