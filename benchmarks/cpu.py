"""The CPU back end beside Transformers' own attention: generation and training steps of small BARTs.

    python benchmarks/cpu.py                  # all, in about ten minutes
    python benchmarks/cpu.py --only train     # what has "train" in its name

Variants take turns in one process, each on the same weights and batch, and the processor's time counts, not the
clock's, so that other work on the machine shows less. The table has the median of `--rounds` turns in ms, in brackets
as a multiple of eager's. Token numbers are random, without dropout. In ragged batches lengths are spread evenly from
an eighth of the longest on.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from transformers import BartConfig, BartForConditionalGeneration

from hf_flashbsa import padding_free
from hf_flashbsa.environment import environment

#: Names and attention implementations. Only the last one is within `padding_free`.
VARIANTS = {"eager": "eager", "sdpa": "sdpa", "bsa_dense": "bsa_dense", "padding-free": "bsa_dense"}
NEW_TOKENS, BEAMS, TARGETS = 60, 4, 64
VOCABULARY = 2000


class Task(NamedTuple):
    """What is timed: `batch` documents of up to `length` tokens, on a BART of width `hidden`."""

    name: str
    hidden: int
    batch: int
    length: int
    ragged: bool


TASKS = [
    Task(f"{kind}, hidden {hidden}, {batch} x {length}, {'ragged' if ragged else 'equal lengths'}",
         hidden, batch, length, ragged)
    for kind, sizes in (("generate", [(128, 4, 512)]), ("train", [(128, 4, 512), (256, 8, 512)]))
    for hidden, batch, length in sizes
    for ragged in (False, True)
]  # fmt: skip


def build(hidden: int) -> BartForConditionalGeneration:
    """The BART of `recipes/xsum/configs/smoke.yaml`, at its width 128, or a wider one."""
    torch.manual_seed(0)
    config = BartConfig(
        d_model=hidden, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=4 * hidden, decoder_ffn_dim=4 * hidden, max_position_embeddings=512, vocab_size=VOCABULARY,
        dropout=0.0, init_std=0.1, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def batch_of(task: Task) -> dict[str, torch.Tensor]:
    """Random tokens and the mask of the live ones; labels for training."""

    def tokens(longest: int) -> tuple[torch.Tensor, torch.Tensor]:
        lengths = torch.linspace(longest / 8, longest, task.batch).long() if task.ragged else torch.tensor([longest])
        mask = (torch.arange(longest) < lengths[:, None]).long().expand(task.batch, -1)
        return torch.randint(4, VOCABULARY, mask.shape), mask.contiguous()

    ids, mask = tokens(task.length)
    batch = {"input_ids": ids, "attention_mask": mask}
    if task.name.startswith("train"):
        labels, live = tokens(TARGETS)
        batch["labels"] = labels.masked_fill(live == 0, -100)
    return batch


def run(task: Task, model: BartForConditionalGeneration, batch: dict[str, torch.Tensor]) -> None:
    """One training step without its optimizer, or one generation."""
    if "labels" in batch:
        model.zero_grad(set_to_none=True)
        model(**batch).loss.backward()
    else:
        model.generate(**batch, num_beams=BEAMS, do_sample=False, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS)


def measure(task: Task, variants: list[str], rounds: int) -> dict[str, float]:
    """Median ms of processor time of each variant."""
    model, batch = build(task.hidden), batch_of(task)
    model.train("labels" in batch)
    seconds = {variant: [] for variant in variants}
    for turn in range(rounds + 1):
        for variant in variants:
            model.set_attn_implementation(VARIANTS[variant])
            with padding_free(model) if variant == "padding-free" else contextlib.nullcontext():
                begin = time.process_time()
                run(task, model, batch)
                if turn > 0:  # the first one warms up
                    seconds[variant].append(time.process_time() - begin)
    return {variant: 1e3 * statistics.median(times) for variant, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="part of the names of what to run")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    about = environment(torch.device("cpu"))
    console = Console(width=119)
    table = Table("ms (of eager's)", *VARIANTS, title=f"{about}, threads {args.threads}, rounds {args.rounds}")
    for task in TASKS:
        if args.only in task.name:
            ms = measure(task, list(VARIANTS), args.rounds)
            table.add_row(
                task.name, *(f"{ms[variant]:,.0f} ({ms[variant] / ms['eager']:.2f})" for variant in VARIANTS)
            )
    console.print(table)


if __name__ == "__main__":
    main()
