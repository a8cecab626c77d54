"""That kernels can be compiled ahead of time into Triton's cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import prewarm

TOOL = Path(prewarm.__file__)


def test_what_a_case_launches_is_left_in_the_cache(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(TOOL.parents[2])}
    command = [sys.executable, str(TOOL), "--cases", "3", "--share", "1/3"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.endswith("3 launches: case 1")
    kernels = sorted(path.name for path in tmp_path.glob("*/*.cubin"))
    assert kernels == ["dkdv_kernel.cubin", "dq_kernel.cubin", "forward_kernel.cubin"]
