"""Trains Llama on a padded batch of documents whose padding no layer computes.

python examples/llama_padding_free.py                       # a tiny Llama with random weights
python examples/llama_padding_free.py --model meta-llama/Llama-3.2-1B
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_flashbsa

TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
LENGTHS = (48, 20, 12, 5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the Hub, or folder, of a decoder-only model")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model is None:
        model = LlamaForCausalLM._from_config(TINY, attn_implementation="bsa_dense")
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="bsa_dense")
    model.to("cuda" if torch.cuda.is_available() else "cpu").train()

    ids = torch.randint(4, 90, (len(LENGTHS), max(LENGTHS)), device=model.device)
    live = torch.arange(max(LENGTHS), device=model.device) < torch.tensor(LENGTHS, device=model.device)[:, None]
    # With the number of live tokens, which a collator knows, no layer waits for the GPU.
    batch = {"input_ids": ids, "attention_mask": live.long(), "labels": ids.where(live, -100)}
    rows = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: rows.append(output.shape[:2]))

    padded = model(**batch).loss
    hf_flashbsa.enable_padding_free(model)
    loss = model(**batch, num_live_tokens=sum(LENGTHS)).loss
    print(f"loss padded {padded.item():.4f}, padding-free {loss.item():.4f}")
    print(f"an MLP computes {rows[1].numel()} instead of {rows[0].numel()} tokens")
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=1e-3).step()
    print(f"after a step: {model(**batch, num_live_tokens=sum(LENGTHS)).loss.item():.4f}")


if __name__ == "__main__":
    main()
