"""Measures attention beside other implementations, and tunes the kernels: `hf-flashbsa bench`, `tune`."""
