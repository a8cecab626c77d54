"""What a run records while it trains: counters, metrics.jsonl, training time, peak memory, the environment."""

from __future__ import annotations

import json
import os
import platform
import resource
import shlex
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_flashbsa.environment import commit, device_name, version
from recipes.xsum.files import writing
from recipes.xsum.model import IGNORED_LABEL

GIB = 2**30
COUNTERS = ("step", "examples", "source_tokens", "target_tokens", "padded_tokens", "seconds")
PACKAGES = (
    *("hf_flashbsa", "torch", "transformers", "accelerate", "datasets"),
    *("tokenizers", "triton", "flash_attn", "liger_kernel"),
)


@dataclass
class TrainingState:
    """Counters of a run over all processes, kept in every checkpoint."""

    step: int = 0
    examples: int = 0
    source_tokens: int = 0  # without padding
    target_tokens: int = 0
    padded_tokens: int = 0  # every position of the batches, source and target, padding included
    seconds: float = 0.0  # training only, over all resumes
    peak_memory_bytes: int = 0
    window_loss: float = 0.0  # summed over the target tokens since the last line of metrics.jsonl
    window_tokens: int = 0

    def counters(self) -> dict[str, int | float]:
        """Those that a line of metrics.jsonl shows as they are."""
        return {name: value for name, value in asdict(self).items() if name in COUNTERS}


class Window:
    """What this process did since the last `flush`: loss summed over target tokens, and counts."""

    def __init__(self) -> None:
        self._loss: torch.Tensor | float = 0.0
        self._counts = [0, 0, 0, 0]

    def add(self, batch: dict[str, torch.Tensor], loss: torch.Tensor) -> None:
        """Count a micro-batch, still on the CPU, and its summed loss, `()`, which stays on its device."""
        self._loss = self._loss + loss.detach().double()
        labels, mask = batch["labels"], batch["attention_mask"]
        targets = int((labels != IGNORED_LABEL).sum())
        # A decoder-only model's input holds its targets; an encoder-decoder has them beside it.
        apart = "decoder_input_ids" in batch
        sources = int(mask.sum()) - (0 if apart else targets)
        positions = mask.numel() + (labels.numel() if apart else 0)
        for index, count in enumerate((len(labels), sources, targets, positions)):
            self._counts[index] += count

    def flush(self, state: TrainingState, accelerator: Accelerator) -> None:
        """Add the windows of all processes to `state`, and begin anew. Waits for the GPU."""
        totals = torch.tensor([0.0, *self._counts], dtype=torch.float64, device=accelerator.device)
        totals[0] += self._loss
        loss, *counts = accelerator.reduce(totals, "sum").tolist()
        examples, sources, targets, positions = map(int, counts)
        state.examples += examples
        state.source_tokens += sources
        state.target_tokens += targets
        state.padded_tokens += positions
        state.window_loss += loss
        state.window_tokens += targets
        self._loss, self._counts = 0.0, [0, 0, 0, 0]


class MetricsLog:
    """metrics.jsonl: one JSON object per line, on its way to the disk once written; a line is whole or not there.

    `keep_bytes` is the file's size at the checkpoint a run resumes from; what was written later is cut off, so
    that no step stands twice.
    """

    def __init__(self, path: Path, keep_bytes: int = 0) -> None:
        self.path = path
        with writing(path):
            self._file = open(path, "ab", buffering=0)
            self._file.truncate(keep_bytes)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line. Raises `WriteError`, with the file as before, where it cannot."""
        rest, size = json.dumps(record, allow_nan=False).encode() + b"\n", self.size
        with writing(self.path):
            try:
                while rest:
                    rest = rest[self._file.write(rest) :]
            except OSError:
                self._file.truncate(size)
                raise

    def sync(self) -> None:
        """Wait until all lines are on the disk, where a checkpoint that counts them must find them."""
        with writing(self.path):
            os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        self._file.close()


class Meter:
    """Wall clock and peak memory of training, without evaluation and checkpoints.

    Peak memory is what torch's CUDA allocator handed out or, on the CPU, the process' largest resident set.
    """

    def __init__(self, device: torch.device, seconds: float = 0.0, peak_bytes: int = 0) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._seconds, self._peak = seconds, peak_bytes
        self._since: float | None = None

    def start(self) -> None:
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            torch.cuda.reset_peak_memory_stats(self._cuda)
        self._since = time.perf_counter()

    def read(self) -> tuple[float, int]:
        """`(seconds, peak bytes)` so far, all queued GPU work included."""
        if self._since is None:
            return self._seconds, self._peak
        if self._cuda is not None:
            torch.cuda.synchronize(self._cuda)
            peak = torch.cuda.max_memory_allocated(self._cuda)
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self._seconds + time.perf_counter() - self._since, max(self._peak, peak)

    def pause(self) -> bool:
        """Stop the clock; returns whether it was running."""
        running = self._since is not None
        self._seconds, self._peak = self.read()
        self._since = None
        return running


def run_environment(device: torch.device, num_processes: int) -> dict[str, Any]:
    """What a reader needs to know to repeat the run: versions, hardware, commit, command line."""
    return {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "commit": commit(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "processes": num_processes,
        "cpu_threads": torch.get_num_threads(),
    }
