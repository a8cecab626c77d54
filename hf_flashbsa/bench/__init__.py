"""Measures attention beside other implementations, and tunes the kernels: `python -m hf_flashbsa bench`, `tune`."""
