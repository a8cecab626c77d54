"""Time of a generated token with bsa_dense beside sdpa, and whether tokens equal eager attention's.

    python benchmarks/generation.py --out rows.jsonl

makes models from configs with random weights, so that it needs no network, and takes two minutes on an H200:

    bart-large   `generate` of 32 documents as long as XSum's, padded on the right, 4 beams, 64 tokens, bfloat16
    llama-1b     decoded tokens, batch 1 and 8, behind 2,048 and 32,768 cached ones, unpadded and padded on the left
    tokens       small models in float32: beam search, greedy search and padded rows, compared with eager attention

Implementations take turns, round by round. Every measurement is one JSON line, written as soon as it is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from xsum_workload import build

import hf_flashbsa  # noqa: F401  registers the implementations
from hf_flashbsa.environment import environment

IMPLEMENTATIONS = ("sdpa", "bsa_dense")


class Clock(LogitsProcessor):
    """Notes when `generate` has the scores of each token. A search waits for the device before it goes on."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.times.append(time.perf_counter())
        return scores

    def milliseconds(self) -> float:
        """The median of a token, without the first, which waits for the prompt."""
        gaps = [b - a for a, b in zip(self.times[1:], self.times[2:], strict=False)]
        return 1e3 * statistics.median(gaps)


def document_lengths(count: int, longest: int) -> list[int]:
    """Token counts that spread as XSum's documents do: half of them below 400, some cut off at `longest`."""
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0))
    return (400 * (0.65 * normal).exp()).long().clamp(8, longest).tolist()


def padded_ids(lengths: list[int], vocabulary: int, left: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """Random `input_ids` and the `attention_mask` of rows of these lengths."""
    longest = max(lengths)
    ids = torch.randint(4, vocabulary, (len(lengths), longest), generator=torch.Generator().manual_seed(1))
    place = torch.arange(longest)
    live = torch.stack([place >= longest - n if left else place < n for n in lengths])
    return {"input_ids": ids.masked_fill(~live, 1).to(device), "attention_mask": live.long().to(device)}


class Bench:
    """Where to measure, and where results go."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device, self.smoke = args, torch.device(args.device), args.smoke
        self.of_run = environment(self.device)
        if args.commit is not None:
            self.of_run["commit"] = args.commit

    def model(self, name: str, dtype: torch.dtype, tiny: bool) -> PreTrainedModel:
        torch.manual_seed(0)
        model = build(name, tiny, self.device).eval().to(dtype)
        model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
        model.generation_config.pad_token_id = 1
        return model

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def record(self, **row) -> None:
        print(json.dumps(row), flush=True)
        with self.args.out.open("a") as file:
            file.write(json.dumps({**row, **self.of_run}) + "\n")

    def in_turns(self, model: PreTrainedModel, measure: Callable[[], dict[str, float]], /, **row) -> None:
        """Records medians of `measure()` over rounds, of which the first warms up, for each implementation."""
        measured: dict[str, list[dict[str, float]]] = {name: [] for name in self.args.implementations}
        for _ in range(1 + self.args.rounds):
            for name, results in measured.items():
                model.set_attn_implementation(name)
                results.append(measure())
        for name, (_, *results) in measured.items():
            medians = {key: round(statistics.median(r[key] for r in results), 3) for key in results[0]}
            self.record(implementation=name, **row, **medians, rounds=len(results))

    @torch.inference_mode()
    def bart(self) -> None:
        documents, beams, tokens, longest = (4, 2, 4, 40) if self.smoke else (32, 4, 64, 1024)
        model = self.model("bart-large", torch.bfloat16, self.smoke)
        batch = padded_ids(document_lengths(documents, longest), model.config.vocab_size, False, self.device)
        options = dict(num_beams=beams, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)

        def measure() -> dict[str, float]:
            clock = Clock()
            self.synchronize()
            begin = time.perf_counter()
            model.generate(**batch, **options, logits_processor=LogitsProcessorList([clock]))
            self.synchronize()
            return {"ms_per_token": clock.milliseconds(), "ms": 1e3 * (time.perf_counter() - begin)}

        self.in_turns(
            model, measure, part="generate", model="bart-large", batch=documents, beams=beams, new_tokens=tokens
        )

    @torch.inference_mode()
    def llama(self) -> None:
        model = self.model("llama-1b", torch.bfloat16, self.smoke)
        contexts, tokens = ((6, 20), 4) if self.smoke else ((2048, 32768), 32)
        for context in contexts:
            for batch, padded in ((1, False), (8, False), (8, True)):
                cache = self.filled_cache(model, batch, context)
                mask = None
                if padded:
                    lengths = [context - row * context // 16 for row in range(batch)]
                    mask = padded_ids(lengths, 1000, True, self.device)["attention_mask"]
                    mask = torch.nn.functional.pad(mask, (0, tokens), value=1)

                def measure(cache=cache, mask=mask, batch=batch, context=context) -> dict[str, float]:
                    return {"ms_per_token": self.decode(model, cache, mask, batch, context, tokens)}

                row = dict(batch=batch, context=context, padded=padded, new_tokens=tokens)
                self.in_turns(model, measure, part="decode", model="llama-1b", **row)

    def filled_cache(self, model: PreTrainedModel, batch: int, context: int) -> DynamicCache:
        """Random keys and values of `context` tokens, as a prompt leaves them."""
        config, cache = model.config, DynamicCache()
        shape = batch, config.num_key_value_heads, context, config.head_dim
        for layer in range(config.num_hidden_layers):
            cache.update(*(torch.randn(shape, dtype=model.dtype, device=self.device) for _ in range(2)), layer)
        return cache

    def decode(
        self,
        model: PreTrainedModel,
        cache: DynamicCache,
        mask: torch.Tensor | None,
        batch: int,
        context: int,
        tokens: int,
    ) -> float:
        """Median milliseconds of a greedy token behind `context` cached ones, which are all that it leaves there."""
        ids, times = torch.full((batch, 1), 5, device=self.device), []
        for step in range(tokens):
            self.synchronize()
            begin = time.perf_counter()
            live = None if mask is None else mask[:, : context + step + 1]
            positions = torch.full((batch, 1), context + step, device=self.device)
            logits = model(ids, attention_mask=live, position_ids=positions, past_key_values=cache).logits
            ids = logits[:, -1:].argmax(-1)
            self.synchronize()
            times.append(1e3 * (time.perf_counter() - begin))
        cache.crop(-tokens)
        return statistics.median(times)

    @torch.inference_mode()
    def tokens(self) -> None:
        """Tokens of small models in float32, which must be those of eager attention."""
        for name, left in (("bart-large", False), ("llama-1b", True)):
            model = self.model(name, torch.float32, tiny=True)
            batch = padded_ids([37, 5, 64, 20], model.config.vocab_size, left, self.device)
            for beams in (1, 4):

                def generate(implementation: str, model=model, batch=batch, beams=beams) -> list[list[int]]:
                    model.set_attn_implementation(implementation)
                    options = dict(num_beams=beams, do_sample=False, min_new_tokens=16, max_new_tokens=16)
                    return model.generate(**batch, **options).tolist()

                want = generate("eager")
                for implementation in self.args.implementations:
                    equal = generate(implementation) == want
                    self.record(part="tokens", model=name, implementation=implementation, beams=beams, equal=equal)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="JSON lines to append to")
    add("--device", default="cuda")
    add("--rounds", type=int, default=3, help="measured rounds, behind one that warms up")
    add("--implementations", nargs="+", default=list(IMPLEMENTATIONS))
    add("--parts", nargs="+", choices=("tokens", "bart", "llama"), default=["tokens", "bart", "llama"])
    add("--commit", help="of the code that runs, for the rows")
    add("--smoke", action="store_true", help="tiny models and few tokens, to see that it runs")
    bench = Bench(parser.parse_args(arguments))
    for part in bench.args.parts:
        getattr(bench, part)()


if __name__ == "__main__":
    main()
