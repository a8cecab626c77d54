"""The first minute of training: seconds from the start of a process to the end of its third step.

    python benchmarks/first_minute.py --out rows.jsonl      # less than two minutes on one GPU

Each run is a process of its own that makes a BART-base with random weights and trains it on batches of 32 documents,
each of another length, in bf16 autocast with fused AdamW: with `bsa_dense`, padding-free and after `warm_up`, and with
`sdpa`, padded. Each variant runs with an empty folder for Triton's compiled kernels ("cold"), then with what the first
run left there ("warm"). `bsa_dense+on_demand` is without `warm_up`, so that the first step compiles one kernel at a
time.

Every run is one JSON line: seconds from the start of the process to the end of each phase, kernels that were compiled,
and how many of them in the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

VARIANTS = ("sdpa", "bsa_dense", "bsa_dense+on_demand")
PHASES = ("imports", "model", "warm_up", "step_1", "step_3")
STEPS = 3
BASE = {
    "d_model": 768, "encoder_layers": 6, "decoder_layers": 6, "encoder_attention_heads": 12,
    "decoder_attention_heads": 12, "encoder_ffn_dim": 3072, "decoder_ffn_dim": 3072, "attention_dropout": 0.1,
}  # fmt: skip
TINY = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "vocab_size": 100,
}  # fmt: skip
#: Documents of a batch; fewest and most tokens of sources and targets, about those of news and their summaries.
ROWS, SOURCES, TARGETS = 32, (60, 1000), (10, 60)
TINY_ROWS, TINY_SOURCES, TINY_TARGETS = 2, (4, 12), (3, 6)


def train(variant: str, begin: float, tiny: bool, device_type: str) -> dict:
    """The first steps of a training run, in this process, which the parent began at `begin`, in s since 1970."""
    ends: dict[str, float] = {}

    def end(phase: str) -> None:
        ends[phase] = round(time.time() - begin, 3)

    # What is imported here takes part of the time.
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    import hf_flashbsa
    from hf_flashbsa.environment import environment

    end("imports")
    compiled = _count_compiled() if device_type == "cuda" else []
    device = torch.device(device_type)
    torch.manual_seed(0)
    ours, _, option = variant.partition("+")
    with device:
        config = BartConfig(**TINY if tiny else BASE, attn_implementation=ours)
        model = BartForConditionalGeneration(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    batches = [_batch(config.vocab_size, tiny, device) for _ in range(STEPS)]
    end("model")
    with torch.autocast(device_type, torch.bfloat16):
        if ours == "bsa_dense":
            hf_flashbsa.enable_padding_free(model)
            if option != "on_demand":
                hf_flashbsa.warm_up(model, batches[:1])
    end("warm_up")
    before = len(compiled)
    for step, batch in enumerate(batches, 1):
        with torch.autocast(device_type, torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if not loss.isfinite():  # also waits for the device
            raise RuntimeError(f"the loss of step {step} is {float(loss)}")
        end(f"step_{step}")
    found = {"seconds": ends, "compiled": len(compiled), "compiled_in_steps": len(compiled) - before}
    return {**environment(device), "variant": variant, "tiny": tiny, **found}


def _count_compiled() -> list[str]:
    """A list that gets the name of each kernel that Triton compiles from now on."""
    from triton import knobs

    names: list[str] = []

    def note(*, src, cache_hit: bool, **_) -> None:
        if not cache_hit:
            names.append(src.name)

    knobs.compilation.listener = note
    return names


def _batch(vocabulary: int, tiny: bool, device) -> dict:
    """Right-padded random tokens."""
    import torch

    rows, sources, targets = (TINY_ROWS, TINY_SOURCES, TINY_TARGETS) if tiny else (ROWS, SOURCES, TARGETS)

    def tokens(least: int, most: int):
        lengths = torch.randint(least, most + 1, (rows, 1))
        live = torch.arange(int(lengths.max())) < lengths
        return torch.randint(4, vocabulary, live.shape), live

    (ids, live), (labels, labelled) = tokens(*sources), tokens(*targets)
    batch = {"input_ids": ids, "attention_mask": live.long(), "labels": labels.masked_fill(~labelled, -100)}
    return {name: x.to(device) for name, x in batch.items()}


def run(variant: str, cache: Path, args: argparse.Namespace) -> dict:
    """The row of one process."""
    command = [sys.executable, __file__, "--device", args.device, *(["--tiny"] if args.tiny else [])]
    command += ["--only-train", variant, "--begin", repr(time.time())]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """One line a run, seconds since the process began."""
    names = "".join(f"{name:>10}" for name in (*PHASES, "kernels", "late"))
    lines = [f"{'variant':22}{'cache':8}{names}"]
    for row in rows:
        seconds = "".join(f"{row['seconds'][phase]:10.1f}" for phase in PHASES)
        compiled = f"{row['compiled']:10}{row['compiled_in_steps']:10}"
        lines.append(f"{row['variant']:22}{row['cache']:8}{seconds}{compiled}")
    return "\n".join([*lines, "", "s since the process began; kernels compiled, and late: how many of them in a step"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["sdpa", "bsa_dense"])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a model and batches that show only that all of it runs")
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--only-train", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_train:
        print(json.dumps(train(args.only_train, args.begin, args.tiny, args.device)))
        return 0
    rows = []
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("cold", "warm"):
                rows.append({**run(variant, Path(cache), args), "cache": state})
                print(f"{variant}, {state}: {rows[-1]['seconds'][f'step_{STEPS}']:.1f} s", file=sys.stderr, flush=True)
                if args.out:
                    with args.out.open("a") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
