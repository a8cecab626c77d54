"""Sends every call that the Hopper kernels can take to them, whether they are the faster ones or not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

from hf_flashbsa.kernels import hopper, launch

KERNELS = ("forward", "dq", "dkdv")


@contextlib.contextmanager
def every_call_on_hopper(programs: int) -> Iterator[Counter]:
    """Within, configs/hopper.json lists every call of its head dims, and `programs` programs share the tiles of a
    forward call. Counts launches by kernel and whether it was the Hopper one. Calls that it does list are launched
    with their own options, so that forward calls have two consumers and three."""
    from hf_flashbsa.kernels.hopper import launchers

    entries = {}
    for kernel in KERNELS:
        listed = [entry | {"shortest": 1, "dropout": True} for entry in hopper._entries(kernel)]
        entries[kernel] = listed + [
            entry | {"ragged": ragged, "layout": layout}
            for entry in listed
            if entry["options"].get("CONSUMERS") != 3
            for ragged in (False, True)
            for layout in (False, True)
        ]
    launched, launcher_of = Counter(), hopper.launcher_of

    def counted(kernel: str, *arguments):
        found = launcher_of(kernel, *arguments)
        launched[kernel, found is not None] += 1
        return found

    launch._kept.cache_clear()
    try:
        with (
            mock.patch.object(launchers, "_multiprocessors", lambda device: programs),
            mock.patch.object(hopper, "_entries", entries.__getitem__),
            mock.patch.object(hopper, "launcher_of", counted),
        ):
            yield launched
    finally:
        launch._kept.cache_clear()
