"""Whether a checkpoint is whole: sizes and checksums of its files, written last, or what their formats show."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from recipes.xsum.files import write_atomically

MANIFEST = "manifest.json"
STATE_FIELDS = ("state", "metrics_bytes", "processes", "config_hash", "data_hash")
CHUNK_BYTES = 2**22


def write_manifest(checkpoint: Path) -> None:
    """Write CHECKPOINT/manifest.json: `{"files": {name: {"bytes": int, "sha256": hex}}}` of all files there."""
    paths = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MANIFEST)
    with ThreadPoolExecutor() as pool:
        sums = list(pool.map(_sha256, paths))
    files = {
        path.relative_to(checkpoint).as_posix(): {"bytes": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, sums, strict=True)
    }
    write_atomically(checkpoint / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")


def damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, the first fault found; None where all are whole.

    A checkpoint without a manifest, as earlier versions wrote them, must have every part; torch's files are checked
    by their own checksums, safetensors by length.
    """
    try:
        if (checkpoint / MANIFEST).exists():
            return _compare(checkpoint, json.loads((checkpoint / MANIFEST).read_text())["files"])
        return _missing_part(checkpoint) or _first(_format_fault, sorted(checkpoint.rglob("*")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    except OSError as error:
        return f"{Path(error.filename or checkpoint).name}: {error.strerror}"


def _compare(checkpoint: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{name} has {path.stat().st_size:,d} bytes instead of {entry['bytes']:,d}"
    return _first(
        lambda name: None if _sha256(checkpoint / name) == files[name]["sha256"] else f"{name} has another checksum",
        list(files),
    )


def _first(check, items: Sequence[Any]) -> str | None:
    with ThreadPoolExecutor() as pool:
        return next((fault for fault in pool.map(check, items) if fault is not None), None)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _missing_part(checkpoint: Path) -> str | None:
    """A part that Accelerate needs, model and optimiser perhaps sharded over a folder each."""
    try:
        record = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if missing := [name for name in STATE_FIELDS if name not in record]:
            return f"state.json has no {missing[0]}"
    except FileNotFoundError:
        return "state.json is missing"
    except (ValueError, TypeError):
        return "state.json is not valid JSON"
    parts = {
        "model.safetensors": ("pytorch_model_fsdp*",),
        "optimizer.bin": ("optimizer_*",),
        **{f"random_states_{process}.pkl": () for process in range(record["processes"])},
    }
    for name, others in parts.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in (name, *others)):
            return f"{name} is missing"
    return None


def _format_fault(path: Path) -> str | None:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return None
        if path.suffix in (".bin", ".pkl", ".pt"):
            with zipfile.ZipFile(path) as archive:
                if (name := archive.testzip()) is not None:
                    return f"{path.name} has another checksum in {name}"
    except (SafetensorError, zipfile.BadZipFile) as error:
        return f"{path.name} is cut or damaged ({error})"
    return None
