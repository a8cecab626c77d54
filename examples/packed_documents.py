"""Attention over documents packed in one row: `attention()` with cumulative lengths, and a model by `position_ids`.

python examples/packed_documents.py                         # a tiny Llama with random weights
python examples/packed_documents.py --model meta-llama/Llama-3.2-1B
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_flashbsa import AttentionSpec, attention

TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1,
)  # fmt: skip
LENGTHS = (30, 17, 5)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the Hub, or folder, of a decoder-only model")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)

    ends = torch.tensor((0, *LENGTHS), device=device).cumsum(0).int()
    q, k, v = torch.randn(3, 1, 4, sum(LENGTHS), 64, device=device)
    spec = AttentionSpec(causal=True, cu_seqlens_q=ends, cu_seqlens_k=ends)  # once for all layers of a model
    packed = attention(q, k, v, spec)
    alone = [attention(*part, causal=True) for part in zip(*(x.split(LENGTHS, 2) for x in (q, k, v)), strict=True)]
    print(f"attention, packed and one by one: differ by {(packed - torch.cat(alone, 2)).abs().max():.1e}")

    if options.model is None:
        model = LlamaForCausalLM._from_config(TINY, attn_implementation="bsa_dense")
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, attn_implementation="bsa_dense")
    model.to(device).eval()
    documents = [torch.randint(4, 90, (1, length), device=device) for length in LENGTHS]
    # Positions that begin anew divide a row into documents, where there is neither a mask nor a cache.
    places = torch.cat([torch.arange(length, device=device) for length in LENGTHS])[None]
    with torch.no_grad():
        row = model(input_ids=torch.cat(documents, 1), position_ids=places, use_cache=False).logits
        one_by_one = [model(input_ids=ids, use_cache=False).logits for ids in documents]
    print(f"logits, packed and one by one: differ by {(row - torch.cat(one_by_one, 1)).abs().max():.1e}")


if __name__ == "__main__":
    main()
