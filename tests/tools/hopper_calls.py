"""Sends every call that the Hopper kernels can take to them, whether they are the faster ones or not."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

from hf_flashbsa.kernels import launch_cache, tuning
from hf_flashbsa.kernels.gluon_sm90 import dispatch

#: Kernels of a call that has to repeat bit by bit, and of one that need not.
KERNELS = ("forward", "dq", "dkdv")
FUSED_KERNELS = ("forward", "fused_backward")


@contextlib.contextmanager
def every_call_on_hopper(programs: int, choice: int = 0) -> Iterator[Counter]:
    """Within, configs/gluon_sm90.json lists every call of its head dims, and `programs` programs share the tiles of a
    forward call. Where the file has several options for a kernel and head dim, `choice` goes round them. Counts
    launches by kernel and whether it was the Hopper one."""

    entries = {}
    for kernel in {*KERNELS, *FUSED_KERNELS}:
        listed = {}
        for entry in dispatch._entries(kernel):
            options = listed.setdefault(entry["head_dim"], [])
            if entry["options"] not in options:
                options.append(entry["options"])
        entries[kernel] = [
            {"head_dim": head_dim, "min_seqlen": 1, "options": options[choice % len(options)]}
            for head_dim, options in listed.items()
        ]
    launched, select_launcher = Counter(), dispatch.select_launcher

    def counted(kernel: str, *arguments):
        found = select_launcher(kernel, *arguments)
        launched[kernel, found is not None] += 1
        return found

    launch_cache._launches_of.cache_clear()
    try:
        with (
            mock.patch.object(tuning, "multiprocessors", lambda device: programs),
            mock.patch.object(dispatch, "_entries", entries.__getitem__),
            mock.patch.object(dispatch, "select_launcher", counted),
        ):
            yield launched
    finally:
        launch_cache._launches_of.cache_clear()
