"""Attention kernels for Transformers, registered as attention implementations on import."""

from hf_flashbsa.attention import attention, choose_backend
from hf_flashbsa.integration.register import register
from hf_flashbsa.integration.usage import backends_used
from hf_flashbsa.spec import AttentionSpec

__all__ = ["AttentionSpec", "attention", "backends_used", "choose_backend"]
__version__ = "0.1.0"

register()
