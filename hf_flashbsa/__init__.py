"""Attention kernels for Transformers, registered as attention implementations on import."""

from hf_flashbsa import patterns, selection
from hf_flashbsa.attention import attention, choose_backend, use_deterministic
from hf_flashbsa.config import BlockSparseConfig
from hf_flashbsa.integration.register import register
from hf_flashbsa.integration.usage import backends_used
from hf_flashbsa.layout import BlockLayout
from hf_flashbsa.spec import AttentionSpec

register()  # before what older releases of Transformers cannot import, so that its error names the remedy

from hf_flashbsa.integration.padding_free import disable_padding_free, enable_padding_free, padding_free  # noqa: E402
from hf_flashbsa.integration.sparse import configure  # noqa: E402
from hf_flashbsa.integration.stacks import LayerStack, register_stack  # noqa: E402
from hf_flashbsa.training.losses import enable_fused_loss  # noqa: E402

__all__ = [
    "AttentionSpec",
    "BlockLayout",
    "BlockSparseConfig",
    "LayerStack",
    "attention",
    "backends_used",
    "choose_backend",
    "configure",
    "disable_padding_free",
    "enable_fused_loss",
    "enable_padding_free",
    "padding_free",
    "patterns",
    "register_stack",
    "selection",
    "use_deterministic",
]
__version__ = "0.1.0"
