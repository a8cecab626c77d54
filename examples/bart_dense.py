"""Trains BART for a step with exact attention that reads its padding mask, and compares the step with eager attention.

python examples/bart_dense.py                               # a tiny BART with random weights
python examples/bart_dense.py --model facebook/bart-base
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, PreTrainedModel

import hf_flashbsa

TINY = BartConfig(
    vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, max_position_embeddings=64,
)  # fmt: skip


def load(name: str | None) -> PreTrainedModel:
    if name is not None:
        return AutoModelForSeq2SeqLM.from_pretrained(name, attn_implementation="bsa_dense")
    return BartForConditionalGeneration._from_config(copy.deepcopy(TINY), attn_implementation="bsa_dense")


def ragged_batch(lengths: list[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Documents of random tokens, padded to the longest; Transformers makes the decoder's inputs of the labels."""
    ids = torch.randint(4, 90, (len(lengths), max(lengths)), device=device)
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]
    labels = torch.randint(4, 90, (len(lengths), 8), device=device)
    return {"input_ids": ids.where(mask, 1), "attention_mask": mask.long(), "labels": labels}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the Hub, or folder, of an encoder-decoder")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = load(options.model).to("cuda" if torch.cuda.is_available() else "cpu").eval()  # no dropout, to compare
    batch = ragged_batch([40, 23, 9], model.device)
    losses = {}
    for implementation in ("eager", "bsa_dense"):
        model.set_attn_implementation(implementation)
        losses[implementation] = model(**batch).loss
    print({name: round(loss.item(), 4) for name, loss in losses.items()})
    print("computed by", set(hf_flashbsa.backends_used(model).values()))
    losses["bsa_dense"].backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    print(f"after a step: {model(**batch).loss.item():.4f}")


if __name__ == "__main__":
    main()
