"""One writer per run directory: an advisory lock that the system takes back when its process ends, however it does."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from recipes.xsum.errors import RecipeError
from recipes.xsum.files import writing

LOCK_NAME = "run.lock"
#: What flock says where the file system has no locks, as Lustre mounted without them.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: How long to wait for the name of a process that has just taken the lock.
HOLDER_SECONDS = 1.0

logger = logging.getLogger(__name__)


class RunLock:
    """Exclusive right to write `folder`, held through flock(2) on FOLDER/run.lock, which names the holder.

    Linux carries such locks over NFS too. A killed process leaves the file behind but not the lock. `acquire` makes
    the folder where it is missing; `release` removes what it made if that is still empty.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_NAME
        self._descriptor: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            RecipeError: another process holds it; the message says which, where and since when.
            WriteError: the folder cannot be written.
        """
        while self._descriptor is None:
            missing = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            self._made += [folder for folder in missing if folder not in self._made]
            try:
                with writing(self.path):
                    self._try()
            except BaseException:
                self._remove_folders()
                raise

    def _try(self) -> None:
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the last holder has just removed an empty folder
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RecipeError(f"{self.folder} is being written by {self._holder()}") from None
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                logger.warning(
                    "%s lies on a file system without locks (%s): see that no other process writes it",
                    *(self.folder, error.strerror),
                )
            if not self._is_current(descriptor):
                os.close(descriptor)
                return
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        try:
            self._write_holder(descriptor)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back; nothing happens where this process does not hold it."""
        if self._descriptor is None:
            return
        with suppress(OSError):
            self.path.unlink()  # while it is locked: nobody can hold a file of that name yet
        os.close(self._descriptor)
        self._descriptor = None
        self._remove_folders()

    def _is_current(self, descriptor: int) -> bool:
        """False where the last holder removed the file between our opening and locking it."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(descriptor), self.path.stat())
        return False

    def _remove_folders(self) -> None:
        with suppress(OSError):
            for folder in self._made:
                folder.rmdir()
        self._made = []

    def _write_holder(self, descriptor: int) -> None:
        since = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)

    def _holder(self) -> str:
        """The process in the lock's file, and the remedy."""
        deadline = time.monotonic() + HOLDER_SECONDS
        while True:
            try:
                holder = json.loads(self.path.read_text(encoding="utf-8"))
                break
            except (OSError, ValueError):
                if time.monotonic() > deadline:
                    return "another process; wait until it ends, or choose another folder"
                time.sleep(0.02)
        process, host, since = (holder.get(name) for name in ("process", "host", "since"))
        return (
            f"process {process} on {host} since {since}; wait until it ends, stop it there with "
            f"`kill {process}`, or choose another folder"
        )
