"""Errors that a user can mend, and how every script ends with one: a line that says what to do, no traceback."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there"),
    errno.EFBIG: "raise the limit of `ulimit -f`",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR), "it is no folder: choose another"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable or choose another folder"),
}


#: How long other processes wait with an error: launchers stop all once one has ended, and the first is to print it.
RANK_0_SECONDS = 1.0


class RecipeError(Exception):
    """Something cannot work; the message says what is wrong, then what to do."""


class WriteError(RecipeError):
    """A file or folder that cannot be written; whatever it would have replaced is untouched."""

    def __init__(self, path: Path, reason: str, remedy: str = "see that the folder can be written") -> None:
        super().__init__(path, reason, remedy)  # as args, so that it can be sent between processes
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"cannot write {self.path}: {self.reason}; {self.remedy}"


class Interrupted(Exception):
    """SIGINT or SIGTERM ended the run; the message says what is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}: {message}")
        self.exit_code = 128 + signum


def run_script(action: Callable[[], None]) -> int:
    """The exit code of a script: 0, 2 after an error that the user can mend, 128 + signal number if stopped.

    The error is one line on stderr. Of several processes the first one prints it: each meets the same error.
    """
    try:
        action()
    except RecipeError as error:
        message, code = f"error: {error}", 2
    except Interrupted as stop:
        message, code = str(stop), stop.exit_code
    except KeyboardInterrupt:
        message, code = "stopped", 130
    except OSError as error:
        if error.errno is None:  # no error of the system; libraries raise such for reasons of their own
            raise
        message, code = f"error: {describe(error)}", 2
    else:
        return 0
    if os.environ.get("RANK", "0") == "0":  # torchrun's
        print(" ".join(message.splitlines()), file=sys.stderr)
    else:
        time.sleep(RANK_0_SECONDS)
    return code


def describe(error: OSError) -> str:
    """Path, reason and remedy in one line."""
    place = f"{error.filename}: " if error.filename is not None else ""
    remedy = REMEDIES.get(error.errno)
    return f"{place}{error.strerror}" + (f"; {remedy}" if remedy else "")
