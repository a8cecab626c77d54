"""Registration with Transformers, and the check that it is new enough."""

from __future__ import annotations

import transformers
from packaging.version import Version

#: Name of the exact attention. It must not contain "flash": Transformers loads a FlashAttention build for such names.
DENSE = "bsa_dense"
OLDEST = "5.17"


def register() -> None:
    """Makes `attn_implementation="bsa_dense"` known to Transformers, with its mask function.

    Raises:
        ImportError: Transformers is older than 5.17.
    """
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"hf_flashbsa needs transformers>={OLDEST} and found {transformers.__version__}; "
            f"run: pip install -U 'transformers>={OLDEST}'"
        )
    # Older releases may lack what these import.
    from hf_flashbsa.integration.forward import bsa_dense_forward
    from hf_flashbsa.integration.mask import bsa_mask

    transformers.AttentionInterface.register(DENSE, bsa_dense_forward)
    transformers.AttentionMaskInterface.register(DENSE, bsa_mask)
