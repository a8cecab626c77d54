"""Attention kernels for Transformers, registered as attention implementations on import."""

from hf_flashbsa import patterns, selection
from hf_flashbsa._deprecated import renamed
from hf_flashbsa.integration.backend_log import backends_used
from hf_flashbsa.integration.block_sparse_config import BlockSparseConfig
from hf_flashbsa.integration.register import register
from hf_flashbsa.kernels.backends import choose_backend
from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.spec import AttentionSpec
from hf_flashbsa.ops.api import attention, use_deterministic
from hf_flashbsa.ops.reference import reference_attention

register()  # before what older releases of Transformers cannot import, so that its error names the remedy

from hf_flashbsa.integration.fused_loss import disable_fused_loss, enable_fused_loss, fused_loss  # noqa: E402
from hf_flashbsa.integration.padding_free.graphs import cuda_graph_counts  # noqa: E402
from hf_flashbsa.integration.padding_free.hooks import disable_padding_free, enable_padding_free, padding_free  # noqa: E402
from hf_flashbsa.integration.padding_free.layer_stacks import LayerStack, register_layer_stack  # noqa: E402
from hf_flashbsa.integration.sparse_layers import set_block_sparse  # noqa: E402
from hf_flashbsa.integration.warm_up import WarmUp, warm_up  # noqa: E402

configure = renamed("configure", set_block_sparse)
register_stack = renamed("register_stack", register_layer_stack)

__all__ = [
    "AttentionSpec",
    "BlockLayout",
    "BlockSparseConfig",
    "LayerStack",
    "WarmUp",
    "attention",
    "backends_used",
    "choose_backend",
    "cuda_graph_counts",
    "disable_fused_loss",
    "disable_padding_free",
    "enable_fused_loss",
    "enable_padding_free",
    "fused_loss",
    "padding_free",
    "patterns",
    "reference_attention",
    "register_layer_stack",
    "selection",
    "set_block_sparse",
    "use_deterministic",
    "warm_up",
]
__version__ = "0.1.0"
