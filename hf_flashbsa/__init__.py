"""Attention kernels for Transformers, registered as attention implementations on import."""

from hf_flashbsa.attention import attention, choose_backend
from hf_flashbsa.spec import AttentionSpec

__all__ = ["AttentionSpec", "attention", "choose_backend"]
__version__ = "0.1.0"
