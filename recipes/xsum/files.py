"""Files that are replaced whole or not at all, and one error for every way in which a library fails to write."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from recipes.xsum.errors import REMEDIES, RecipeError, WriteError

#: safetensors and tokenizers are written in Rust, whose errors end like this.
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
#: torch.save does not say why it could not write.
TORCH_ERROR = re.compile(
    r"inline_container|PytorchStreamWriter|iostream error|cannot be opened|Parent directory .* does not exist"
)
PROBE_BYTES = 2**20


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn any library's failure to write `path` into a `WriteError`; other errors pass."""
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        code = _error_number(error, path)
        if code is not None:
            raise WriteError(path, os.strerror(code), REMEDIES.get(code, WriteError(path, "").remedy)) from error
        if TORCH_ERROR.search(str(error)):
            raise WriteError(path, str(error).splitlines()[0]) from error
        raise


def _error_number(error: BaseException, path: Path) -> int | None:
    """The system's number of a failure to write, None where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := RUST_ERROR.search(str(error)):
        return int(match[1])
    if isinstance(error, RuntimeError) and TORCH_ERROR.search(str(error)):
        return _probe(path)
    for failure, _ in getattr(error, "failures", {}).values():  # torch.distributed.checkpoint: by rank
        if (code := _error_number(failure, path)) is not None:
            return code
    return None


def _probe(path: Path) -> int | None:
    """Why nothing can be written beside `path`: the number of the error that an attempt meets."""
    folder = next(parent for parent in path.absolute().parents if parent.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            rest = bytes(PROBE_BYTES)
            while rest:  # a first write may fit in part; the next one says why no more does
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A path to write to; the file there takes the place of `path` once it is on the disk, or vanishes on an error."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            yield partial
            fsync(partial)
            partial.replace(path)
        except BaseException:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            raise


def write_files(texts: Mapping[Path, str]) -> None:
    """Write text files that belong together; none replaces an earlier one before all are on the disk."""
    with ExitStack() as stack:
        partials = {path: stack.enter_context(new_file(path)) for path in texts}
        for path, partial in partials.items():
            with writing(path):
                partial.write_text(texts[path], encoding="utf-8")
                fsync(partial)


def write_atomically(path: Path, text: str) -> None:
    write_files({path: text})


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder that takes the place of `path` once it is filled and on the disk, or vanishes on an error."""
    partial, old = (path.with_name(f"{name}_{path.name}") for name in ("partial", "old"))
    with writing(path):
        for stale in (partial, old):
            if stale.exists():
                shutil.rmtree(stale)
        try:
            partial.mkdir(parents=True)
            yield partial
            sync(partial)
            if path.exists():
                path.rename(old)
            partial.rename(path)
        except BaseException:
            if old.exists() and not path.exists():
                old.rename(path)
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Wait until every file of `folder`, and the folder itself, is on the disk."""
    for path in (*folder.rglob("*"), folder):
        fsync(path)


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def read_json(path: Path, remedy: str) -> Any:
    """Parse a JSON file; raises `RecipeError` with `remedy` where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RecipeError(f"{path} is damaged: {error}; {remedy}") from error
