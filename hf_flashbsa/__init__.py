"""Attention kernels for Transformers, registered as attention implementations on import."""

from hf_flashbsa.attention import attention, choose_backend
from hf_flashbsa.integration.register import register
from hf_flashbsa.integration.usage import backends_used
from hf_flashbsa.spec import AttentionSpec

register()  # before what older releases of Transformers cannot import, so that its error names the remedy

from hf_flashbsa.integration.padding_free import disable_padding_free, enable_padding_free, padding_free  # noqa: E402
from hf_flashbsa.integration.stacks import LayerStack, register_stack  # noqa: E402
from hf_flashbsa.training.losses import enable_fused_loss  # noqa: E402

__all__ = [
    "AttentionSpec",
    "LayerStack",
    "attention",
    "backends_used",
    "choose_backend",
    "disable_padding_free",
    "enable_fused_loss",
    "enable_padding_free",
    "padding_free",
    "register_stack",
]
__version__ = "0.1.0"
