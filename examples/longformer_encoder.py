"""Encodes long documents by a BERT-like model whose layers have Longformer's attention, and reads where it looks.

python examples/longformer_encoder.py                       # a tiny ModernBERT with random weights
python examples/longformer_encoder.py --model answerdotai/ModernBERT-base --length 8192 --window 512
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModel, ModernBertConfig, ModernBertModel

from hf_flashbsa import BlockSparseConfig, set_block_sparse

TINY = ModernBertConfig(
    vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=4096, global_attn_every_n_layers=1, pad_token_id=0, bos_token_id=1,
    eos_token_id=2, cls_token_id=1, sep_token_id=2,
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name on the Hub, or folder, of an encoder")
    parser.add_argument("--length", type=int, default=512, help="tokens of the longest document")
    parser.add_argument("--window", type=int, default=64, help="tokens that a token sees on both sides together")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    if options.model is None:
        model = ModernBertModel._from_config(TINY, attn_implementation="bsa_sparse")
    else:
        model = AutoModel.from_pretrained(options.model, attn_implementation="bsa_sparse")
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    layouts = BlockSparseConfig("longformer", block_size=32, window=options.window, num_global_tokens=1)
    set_block_sparse(model, layouts)  # in model.config: saved and loaded with the model

    length, heads = options.length, model.config.num_attention_heads
    layout = layouts.layout("encoder", 0, length, length, heads, model.device)
    print(f"{layout.density():.0%} of the blocks of {length} x {length} scores are computed")
    ids = torch.randint(4, 90, (2, length), device=model.device)
    mask = torch.ones_like(ids)
    mask[1, length // 2 :] = 0  # padding stays hidden
    batch = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with torch.no_grad():
        _, before, *_ = model(**batch).hidden_states
        ids[0, length // 2] += 1
        _, after, *_ = model(**batch).hidden_states
    moved = (before != after).any(-1).sum(-1).tolist()
    print(f"another token in the middle of a document moves {moved[0]} of its {length} states in the first layer:")
    print("those within the window, and that of the global token")


if __name__ == "__main__":
    main()
