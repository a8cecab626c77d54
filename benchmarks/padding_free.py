"""Padding-free training steps beside Transformers' own attention: time, memory, largest batch, ledger.

    python benchmarks/padding_free.py --tokenizer DIR --data train.jsonl.gz --out rows.jsonl

Models are made from configs, in fp32 under bf16 autocast, with the dropout of their configs. Token numbers are random,
lengths those of real documents and summaries. A variant is an attention implementation and options:

    bsa_dense+padding_free     layers skip the padding
    bsa_dense+full_rows        as many tokens in rows without padding: what padding-free could reach at best
    flash_attention_2+grouped  the same examples, sorted by length before they are cut into batches
    ...+checkpointing          gradient checkpointing

Transformers' flash_attention_2 skips cross-attention for part of a right-padded batch: it does less work than the
others. Every measurement is one JSON line; one that fails, for want of memory or time, is a line with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_flashbsa import padding_free
from hf_flashbsa.bench.environment import environment
from hf_flashbsa.bench.report import append
from hf_flashbsa.training.largest_batch import GIB, LargestBatch, largest_batch
from hf_flashbsa.training.ledger import measure_step

MODELS = {
    "bart-large": (BartForConditionalGeneration, BartConfig()),
    "t5-base": (
        T5ForConditionalGeneration,
        T5Config(d_model=768, d_ff=3072, num_layers=12, num_heads=12, decoder_start_token_id=0),
    ),
    "llama-1b": (
        LlamaForCausalLM,
        LlamaConfig(
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
        ),
    ),
}
TINY = {
    "bart-large": {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 64,
                   "decoder_ffn_dim": 64, "encoder_attention_heads": 2, "decoder_attention_heads": 2},
    "t5-base": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2},
    "llama-1b": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1, "head_dim": 16},
}  # fmt: skip
STEPS = ["sdpa", "flash_attention_2", "bsa_dense", "bsa_dense+padding_free", "bsa_dense+full_rows",
         "flash_attention_2+grouped"]  # fmt: skip
LARGEST = ["eager", "sdpa", "flash_attention_2", "bsa_dense", "bsa_dense+padding_free",
           "bsa_dense+padding_free+checkpointing"]  # fmt: skip
LEDGER = ["flash_attention_2", "bsa_dense", "bsa_dense+padding_free"]
OPTIONS = {"padding_free", "full_rows", "grouped", "checkpointing"}


class Pair(NamedTuple):
    """Tokens of one example."""

    source: int
    target: int


class OutOfTime(Exception):
    """A part of the run has used its seconds."""


def read_lengths(tokenizer: Path, data: Path, examples: int, longest: int, seed: int) -> list[Pair]:
    """Lengths of documents and summaries with their two special tokens, shuffled; documents are cut at `longest`."""
    encoder = ByteLevelBPETokenizer.from_file(str(tokenizer / "vocab.json"), str(tokenizer / "merges.txt"))
    with gzip.open(data, "rt") as file:
        records = [json.loads(line) for _, line in zip(range(examples), file, strict=False)]
    sources, targets = (
        [len(encoding) + 2 for encoding in encoder.encode_batch([record[name] for record in records])]
        for name in ("document", "summary")
    )
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    return [Pair(min(sources[i], longest), min(targets[i], longest)) for i in order]


class Bench:
    """One model, its data, and where results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.pool = read_lengths(args.tokenizer, args.data, args.examples, args.source_length, args.seed)
        cls, config = MODELS[args.model]
        if args.tiny:
            config.update({**TINY[args.model], "vocab_size": 1000})
        torch.manual_seed(args.seed)
        with self.device:
            self.model: PreTrainedModel = cls(config)
        self.model.train()
        self.encoder_decoder = config.is_encoder_decoder
        self.about = {**environment(self.device), "model": args.model, "tiny": args.tiny}
        self.rows: list[dict] = []
        self.deadline = math.inf

    # Batches

    def ids(self, lengths: list[int], width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Random token numbers `(B, width)` and the mask of the live ones, right-padded."""
        ids = torch.randint(4, self.model.config.vocab_size, (len(lengths), width), device=self.device)
        mask = torch.arange(width, device=self.device) < torch.tensor(lengths, device=self.device)[:, None]
        return ids, mask.long()

    def batch(self, pairs: list[Pair], options: set[str]) -> dict:
        """The model's inputs for some examples."""
        if not self.encoder_decoder:
            pairs = [Pair(pair.source + pair.target, 0) for pair in pairs]
        sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
        if "full_rows" in options:
            rows = math.ceil(sum(sources) / self.args.source_length)
            sources = [math.ceil(sum(sources) / rows)] * rows
            targets = [math.ceil(sum(targets) / rows)] * rows
        ids, mask = self.ids(sources, max(sources))
        batch = {"input_ids": ids, "attention_mask": mask}
        labels, live = self.ids(targets, max(targets)) if self.encoder_decoder else (ids, mask)
        batch["labels"] = labels.masked_fill(live == 0, -100)
        if "padding_free" in options:
            counts = (sum(sources), sum(targets))
            batch["num_live_tokens"] = counts if self.encoder_decoder else counts[0]
        return batch

    def window(self, size: int, options: set[str]) -> list[dict]:
        """Batches of `size` from the same examples for every variant, sorted by length where it says so."""
        count = size * self.args.window
        pairs = [self.pool[i % len(self.pool)] for i in range(count)]
        if "grouped" in options:
            pairs.sort(reverse=True)
        return [self.batch(pairs[i : i + size], options) for i in range(0, count, size)]

    # Running

    @contextlib.contextmanager
    def using(self, variant: str) -> Iterator[set[str]]:
        """The model set up as a variant says; yields its options."""
        implementation, *given = variant.split("+")
        options = set(given)
        if unknown := options - OPTIONS:
            raise ValueError(f"variant {variant!r}: unknown {sorted(unknown)}; known: {sorted(OPTIONS)}.")
        for part in self.model.modules():
            # Transformers 5.17 does not tell the stacks of T5, which hold copies of the config.
            if isinstance(part, PreTrainedModel):
                part.set_attn_implementation(implementation)
        # Renamed after Transformers 5.17; the old name warns.
        kind = "activation" if hasattr(self.model, "activation_checkpointing_enable") else "gradient"
        with contextlib.ExitStack() as stack:
            if "padding_free" in options:
                stack.enter_context(padding_free(self.model))
            if "checkpointing" in options:
                getattr(self.model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
                stack.callback(getattr(self.model, f"{kind}_checkpointing_disable"))
            yield options

    def forward_backward(self, batch: dict) -> None:
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def adamw(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.device.type == "cuda")

    def record(self, row: dict, work: Callable[[], dict]) -> dict:
        """Writes down what `work` returns, or why it did not."""
        try:
            row = {**row, **work()}
        except OutOfTime:
            row["error"] = "out of time: raise --seconds"
        except Exception as error:  # one variant that fails must not take the others' results with it
            first = (str(error).strip() or "no message").splitlines()[0]
            row["error"] = (
                "out of memory" if isinstance(error, torch.OutOfMemoryError) else f"{type(error).__name__}: {first}"
            )
        self.model.zero_grad(set_to_none=True)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        append(self.args.out, {**self.about, **row})
        self.rows.append(row)
        print(json.dumps(row), flush=True)
        return row

    # Parts

    def steps(self) -> None:
        for size in self.args.batches:
            for variant in self.args.steps_variants:
                self.record(
                    {"part": "steps", "variant": variant, "batch": size}, lambda s=size, v=variant: self.time(s, v)
                )

    def time(self, size: int, variant: str) -> dict:
        """Milliseconds of forward and backward, the mean over a window of batches of each one's median; its peak."""
        with self.using(variant) as options:
            batches = self.window(size, options)
            for batch in batches[:2]:
                self.forward_backward(batch)
            self.synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            times: list[list[float]] = [[] for _ in batches]
            for _ in range(self.args.repeats):
                for batch, spent in zip(batches, times, strict=True):
                    self.synchronize()
                    begin = time.perf_counter()
                    self.forward_backward(batch)
                    self.synchronize()
                    spent.append(1e3 * (time.perf_counter() - begin))
        ms = statistics.mean(statistics.median(spent) for spent in times)
        positions = sum(batch[name].numel() for batch in batches for name in ("input_ids", "labels"))
        live = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
        peak = torch.cuda.max_memory_allocated(self.device) / GIB if self.device.type == "cuda" else None
        return {
            "ms": round(ms, 2),
            "examples_per_s": round(1e3 * size / ms, 1),
            "peak_gib": peak and round(peak, 2),
            "live_share": round(live / positions, 3),
        }

    def ledger(self) -> None:
        optimizer = self.adamw()
        for variant in self.args.ledger_variants:
            row = {"part": "ledger", "variant": variant, "batch": self.args.ledger_batch}
            self.record(row, lambda v=variant: self.account(v, optimizer))

    def account(self, variant: str, optimizer: torch.optim.Optimizer) -> dict:
        """The ledger of a step, and its prediction for double the batch beside the measured one."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        with self.using(variant) as options:
            one = self.batch(self.pool[: self.args.ledger_batch], options)
            # Twice the same examples, so that lengths and with them padding stay as they are.
            two = {name: torch.cat([x, x]) for name, x in one.items() if isinstance(x, torch.Tensor)}
            if hint := one.get("num_live_tokens"):
                two["num_live_tokens"] = tuple(2 * x for x in hint) if self.encoder_decoder else 2 * hint
            ledgers = [
                measure_step(
                    self.model, {**batch, "use_cache": False}, optimizer=optimizer, autocast_dtype=torch.bfloat16
                )
                for batch in (one, two)
            ]
        predicted = ledgers[0].scaled(2)
        total, guess = (ledger.peak or ledger.tracked for ledger in (ledgers[1], predicted))
        print(ledgers[0].table())
        return {
            "bytes": dict(ledgers[0].parts),
            "moment": ledgers[0].moment,
            "peak_gib": ledgers[0].peak and round(ledgers[0].peak / GIB, 3),
            "explained": ledgers[0].explained and round(ledgers[0].explained, 4),
            "explained_double": ledgers[1].explained and round(ledgers[1].explained, 4),
            "double_predicted_over_measured": round(guess / total, 4),
        }

    def largest(self) -> None:
        optimizer = self.adamw()
        with self.using("sdpa") as options:
            # Makes the optimizer's state: a step that runs out of memory would leave half of it behind.
            self.forward_backward(self.batch(self.pool[:1], options))
            optimizer.step()
        for variant in self.args.largest_variants:
            start = 1 if self.args.tiny else 16
            for budget in self.args.budgets:
                row = {"part": "largest", "variant": variant, "budget_gib": budget}
                row = self.record(row, lambda v=variant, b=budget, s=start: self.search(v, b, s, optimizer))
                start = max(start, row.get("batch", 0))

    def search(self, variant: str, budget: float, start: int, optimizer: torch.optim.Optimizer) -> dict:
        with self.using(variant) as options:

            def step(size: int) -> int:
                pairs = [self.pool[i % len(self.pool)] for i in range(size)]
                self.forward_backward(self.batch(pairs, options))
                optimizer.step()
                return sum(pair.source + pair.target for pair in pairs)

            judge = None if self.device.type == "cuda" else (lambda run: (run(), 0))  # nothing to judge by elsewhere
            found: LargestBatch = largest_batch(
                step,
                budget,
                start=start,
                limit=8 if self.args.tiny else 1 << 16,
                resolution=self.args.resolution,
                model=self.model,
                device=self.device,
                progress=False,
                measure=judge,
            )
        return {"batch": found.batch, "tokens": found.tokens, "peak_gib": round(found.peak_gib, 2)}

    def tables(self) -> Iterator[Table]:
        """One table for each part that ran."""
        for part in dict.fromkeys(row["part"] for row in self.rows):
            rows = [row for row in self.rows if row["part"] == part]
            fields = {name: None for row in rows for name in row if name not in ("part", "bytes")}
            table = Table(title=f"{part}: {self.args.model} on {self.about['gpu']}")
            for name in fields:
                table.add_column(name, no_wrap=name == "variant", max_width=50)
            for row in rows:
                table.add_row(*("" if row.get(name) is None else str(row[name]) for name in fields))
            yield table


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="folder with vocab.json and merges.txt of a byte-level BPE")
    add("--data", type=Path, required=True, help="JSON lines, gzipped, with document and summary")
    add("--out", type=Path, default=Path("padding_free.jsonl"), help="rows are appended here")
    add("--model", choices=MODELS, default="bart-large")
    add("--parts", nargs="+", choices=("steps", "ledger", "largest"), default=["steps", "ledger", "largest"])
    add("--seconds", type=float, default=110.0, help="for each part; what does not fit becomes an error row")
    add("--batches", type=int, nargs="+", default=[32, 128], help="batch sizes of the part steps")
    add("--window", type=int, default=8, help="different batches that a step time is taken over")
    add("--repeats", type=int, default=2, help="times each of them is run, after a warm-up")
    add("--steps-variants", nargs="+", default=STEPS, metavar="VARIANT")
    add("--largest-variants", nargs="+", default=LARGEST, metavar="VARIANT")
    add("--ledger-variants", nargs="+", default=LEDGER, metavar="VARIANT")
    add("--ledger-batch", type=int, default=32)
    add("--budgets", type=float, nargs="+", default=[24, 40, 80], help="GiB, ascending")
    add("--resolution", type=float, default=0.02, help="of the largest batch, as a share of it")
    add("--source-length", type=int, default=1024, help="longer documents are cut")
    add("--examples", type=int, default=2048, help="that lengths are read of")
    add("--device", default="cuda")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="a model of two narrow layers, to try the script out")
    return parser.parse_args()


def main() -> None:
    args = parse()
    bench = Bench(args)
    try:
        for part in args.parts:
            bench.deadline = time.perf_counter() + args.seconds
            getattr(bench, part)()
    finally:
        Console(width=160).print(*bench.tables())


if __name__ == "__main__":
    main()
