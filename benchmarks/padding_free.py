"""Padding-free training steps beside Transformers' own attention: time, memory, largest batch, ledger.

    python benchmarks/padding_free.py --tokenizer DIR --documents train.jsonl.gz --out rows.jsonl

runs all that is claimed about padding-free training on one GPU and ends with a table of the claims. With --model it
runs parts for one model. Models are made from configs, in fp32 under bf16 autocast, with the dropout of their configs.
Token numbers are random, lengths those of real documents and summaries. A variant is an attention implementation and
options:

    bsa_dense+padding_free     layers skip the padding
    bsa_dense+full_rows        as many tokens in rows without padding: what padding-free could reach at best
    flash_attention_2+grouped  the same examples, sorted by length before they are cut into batches
    ...+fused_ce               projection and cross-entropy in one (needs liger-kernel)
    ...+checkpointing          gradient checkpointing
    ...+cuda_graphs            layers replay CUDA graphs (with padding_free)

bsa_sparse has Longformer's layout (window 512, 128 global tokens) in encoder and decoder.

Transformers' flash_attention_2 skips cross-attention for part of a right-padded batch: it does less work than the
others. fa2_repaired is the same without that fault. Every measurement is one JSON line, written as soon as it is made;
one that fails, for want of memory or time, is a line with its error.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from padding_free_tables import claims, measurements
from rich.console import Console
from transformers import PreTrainedModel
from xsum_workload import MODELS, Batches, Pair, build, read_lengths

from hf_flashbsa import BlockSparseConfig, enable_fused_loss, padding_free, set_block_sparse
from hf_flashbsa.bench.report import append
from hf_flashbsa.environment import environment
from hf_flashbsa.training.largest_batch import GIB, largest_batch
from hf_flashbsa.training.ledger import measure_step
from recipes.xsum.flash_attention_2 import REPAIRED

FA2, DENSE, PACKED = "flash_attention_2", "bsa_dense", "bsa_dense+padding_free"
GRAPHS = f"{PACKED}+cuda_graphs"
FUSED, SPARSE = f"{PACKED}+fused_ce", "bsa_sparse"
STEPS = ["sdpa", FA2, REPAIRED, DENSE, PACKED, FUSED, "bsa_dense+full_rows", "bsa_dense+grouped", f"{FA2}+grouped"]
STEPS += [f"{SPARSE}+padding_free"]
LARGEST = ["eager", "sdpa", FA2, DENSE, SPARSE, PACKED, f"{SPARSE}+padding_free", FUSED, f"{FUSED}+checkpointing"]
LAYOUT = BlockSparseConfig("longformer", window=512, num_global_tokens=128)
TRAIN = ["sdpa", FA2, DENSE, PACKED, GRAPHS]
#: What is claimed: models, parts, their variants, and each one's share of the time.
CLAIMED = (
    ("bart-large", "steps", STEPS, 0.42),
    ("bart-large", "largest", LARGEST, 0.26),
    ("bart-large", "ledger", [FA2, DENSE, PACKED, FUSED], 0.08),
    ("llama-1b", "ledger", [DENSE, PACKED], 0.08),
    ("t5-base", "steps", [DENSE, PACKED], 0.16),
)
DEFAULTS = {"steps": STEPS, "train": TRAIN, "largest": LARGEST, "ledger": [DENSE, PACKED]}
OPTIONS = {"padding_free", "full_rows", "grouped", "fused_ce", "checkpointing", "cuda_graphs"}
LEDGER_BATCH = {"bart-large": 32, "t5-base": 32, "llama-1b": 8}  # so that double fits; Llama's logits are large


class OutOfTime(Exception):
    """A part of the run has used its seconds."""


def free() -> None:
    """Gives back the memory of what is no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Bench:
    """One model, its batches, and where results go."""

    def __init__(self, name: str, lengths: list[Pair], rows: list[dict], args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        torch.manual_seed(args.seed)
        self.model = build(name, args.tiny, self.device)
        set_block_sparse(self.model, LAYOUT)  # which bsa_sparse alone reads
        self.batches = Batches(self.model, lengths, args.source_length)
        self.about = {**environment(self.device), "model": name, "tiny": args.tiny}
        if args.commit:
            self.about["commit"] = args.commit
        self.rows = rows
        self.deadline = math.inf

    def run(self, part: str, variants: list[str], seconds: float) -> None:
        self.deadline = time.perf_counter() + seconds
        # There is no way back from a fused loss: those variants come last.
        getattr(self, part)(sorted(variants, key=lambda variant: "fused_ce" in variant))

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
        if "fused_ce" in options:
            enable_fused_loss(self.model)
        with contextlib.ExitStack() as stack:
            if "padding_free" in options:
                stack.enter_context(padding_free(self.model, cuda_graphs="cuda_graphs" in options))
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
        begin = time.perf_counter()
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
        free()
        row = {**self.about, **row, "took_s": round(time.perf_counter() - begin, 1)}
        append(self.args.out, row)
        self.rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k == "model" or k not in self.about}), flush=True)
        return row

    # Parts

    def steps(self, variants: list[str]) -> None:
        for variant in variants:
            for size in self.args.batches:
                row = {"part": "steps", "variant": variant, "batch": size}
                self.record(row, lambda s=size, v=variant: self.time(s, v))

    def train(self, variants: list[str]) -> None:
        """Whole training steps, the optimizer's included."""
        optimizer = self.adamw()
        for variant in variants:
            for size in self.args.batches:
                row = {"part": "train", "variant": variant, "batch": size}
                self.record(row, lambda s=size, v=variant: self.time(s, v, optimizer))

    def time(self, size: int, variant: str, optimizer: torch.optim.Optimizer | None = None) -> dict:
        """Milliseconds of forward and backward, and the optimizer's if there is one: the mean over a window of batches
        of each one's median; its peak."""
        with self.using(variant) as options:
            batches = self.batches.window(size, self.args.window, options)
            # Every length once: kernels are compiled and chosen by shape. CUDA graphs are captured the second time.
            for batch in batches * (3 if "cuda_graphs" in options else 1):
                self.forward_backward(batch)
                if optimizer is not None:
                    optimizer.step()
            self.synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            times: list[list[float]] = [[] for _ in batches]
            for _ in range(self.args.repeats):
                for batch, spent in zip(batches, times, strict=True):
                    self.synchronize()
                    begin = time.perf_counter()
                    self.forward_backward(batch)
                    if optimizer is not None:
                        optimizer.step()
                    self.synchronize()
                    spent.append(1e3 * (time.perf_counter() - begin))
        ms = statistics.mean(statistics.median(spent) for spent in times)
        positions = sum(batch[name].numel() for batch in batches for name in ("input_ids", "labels"))
        live = sum(int(batch["attention_mask"].sum() + (batch["labels"] != -100).sum()) for batch in batches)
        peak = reserved = None
        if self.device.type == "cuda":
            peak = round(torch.cuda.max_memory_allocated(self.device) / GIB, 2)
            # What CUDA graphs hold on to between their replays counts as reserved only.
            reserved = round(torch.cuda.max_memory_reserved(self.device) / GIB, 2)
        return {
            "ms": round(ms, 2),
            "examples_per_s": round(1e3 * size / ms, 1),
            "peak_gib": peak,
            "reserved_gib": reserved,
            "live_share": round(live / positions, 3),
        }

    def ledger(self, variants: list[str]) -> None:
        optimizer = self.adamw()
        for variant in variants:
            size = self.args.ledger_batch or LEDGER_BATCH[self.about["model"]]
            row = {"part": "ledger", "variant": variant, "batch": size}
            self.record(row, lambda v=variant, s=size: self.account(v, s, optimizer))

    def account(self, variant: str, size: int, optimizer: torch.optim.Optimizer) -> dict:
        """The ledger of a step, and its prediction for double the batch beside the measured one."""
        if time.perf_counter() > self.deadline:
            raise OutOfTime
        with self.using(variant) as options:
            one = self.batches.batch(self.batches.pairs(size), options)
            ledgers = [
                measure_step(
                    self.model, {**batch, "use_cache": False}, optimizer=optimizer, autocast_dtype=torch.bfloat16
                )
                for batch in (one, self.batches.twice(one))
            ]
        predicted = ledgers[0].scaled(2)
        total, guess = (ledger.peak or ledger.tracked for ledger in (ledgers[1], predicted))
        return {
            "bytes": dict(ledgers[0].parts),
            "moment": ledgers[0].moment,
            "peak_gib": ledgers[0].peak and round(ledgers[0].peak / GIB, 3),
            "explained": ledgers[0].explained and round(ledgers[0].explained, 4),
            "explained_double": ledgers[1].explained and round(ledgers[1].explained, 4),
            "double_predicted_over_measured": round(guess / total, 4),
        }

    def largest(self, variants: list[str]) -> None:
        optimizer = self.adamw()
        with self.using("sdpa") as options:
            # Makes the optimizer's state: a step that runs out of memory would leave half of it behind.
            self.forward_backward(self.batches.batch(self.batches.pairs(1), options))
            optimizer.step()
        for variant in variants:
            start, within = (1 if self.args.tiny else 16), None
            for budget in self.args.budgets:
                if within:  # a size that surely fits, as memory is a fixed part and one that grows with the batch
                    start = int(start * budget / within)
                row = {"part": "largest", "variant": variant, "budget_gib": budget}
                row = self.record(row, lambda v=variant, b=budget, s=start: self.search(v, b, s, optimizer))
                if row.get("batch"):
                    start, within = row["batch"], budget

    def search(self, variant: str, budget: float, start: int, optimizer: torch.optim.Optimizer) -> dict:
        limit = 8 if self.args.tiny else 1 << 16
        tries = 0
        with self.using(variant) as options:

            def step(size: int) -> int:
                nonlocal tries
                tries += 1
                pairs = self.batches.pairs(size)
                self.forward_backward(self.batches.batch(pairs, options))
                optimizer.step()
                return sum(pair.source + pair.target for pair in pairs)

            judge = None if self.device.type == "cuda" else (lambda run: (run(), 0))  # nothing to judge by elsewhere
            found = largest_batch(
                step,
                budget,
                start=min(start, limit),
                limit=limit,
                resolution=self.args.resolution,
                model=self.model,
                device=self.device,
                progress=False,
                measure=judge,
            )
        return {"batch": found.batch, "tokens": found.tokens, "peak_gib": round(found.peak_gib, 2), "tries": tries}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tokenizer", type=Path, required=True, help="folder with vocab.json and merges.txt of a byte-level BPE")
    add("--documents", type=Path, required=True, help="JSON lines, gzipped, with document and summary")
    add("--out", type=Path, default=Path("padding_free.jsonl"), help="rows are appended here")
    add("--model", choices=MODELS, help="default: what is claimed, of all models")
    add("--parts", nargs="+", choices=DEFAULTS, default=list(DEFAULTS))
    add("--variants", nargs="+", metavar="VARIANT", help="for all parts; default: each part's own")
    add("--seconds", type=float, default=300.0, help="for the whole run; what does not fit becomes an error row")
    add("--batches", type=int, nargs="+", default=[32, 128], help="batch sizes of the part steps")
    add("--window", type=int, default=6, help="different batches that a step time is taken over")
    add("--repeats", type=int, default=2, help="times each of them is run, after a first time that does not count")
    add("--ledger-batch", type=int, help=f"default: {LEDGER_BATCH}")
    add("--budgets", type=float, nargs="+", default=[24, 40, 80], help="GiB, ascending")
    add("--resolution", type=float, default=0.02, help="of the largest batch, as a share of it")
    add("--source-length", type=int, default=1024, help="longer documents are cut")
    add("--examples", type=int, default=2048, help="that lengths are read of")
    add("--device", default="cuda")
    add("--commit", help="label of the code in the rows; default: what git says")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="models of two narrow layers, to try the script out")
    return parser.parse_args()


def main() -> None:
    args = parse()
    begin = time.perf_counter()
    jobs = [job for job in CLAIMED if job[1] in args.parts]
    if args.model:
        jobs = [(args.model, part, DEFAULTS[part], 1.0) for part in args.parts]
    lengths = read_lengths(args.tokenizer, args.documents, args.examples, args.source_length, args.seed)
    rows: list[dict] = []
    try:
        for i, (name, part, variants, share) in enumerate(jobs):
            bench = None  # the last model, before the next one is made
            free()
            bench = Bench(name, lengths, rows, args)
            left = args.seconds - (time.perf_counter() - begin)
            bench.run(part, args.variants or variants, left * share / sum(job[3] for job in jobs[i:]))
    finally:
        Console(width=150).print(*measurements(rows), *claims(rows))


if __name__ == "__main__":
    main()
