"""Registration with Transformers, and the check that it is new enough."""

from __future__ import annotations

import transformers
from packaging.version import Version

from hf_flashbsa.integration.names import DENSE, SPARSE

OLDEST = "5.17"


def register() -> None:
    """Makes `attn_implementation="bsa_dense"` and `"bsa_sparse"` known to Transformers, with their mask functions.

    Raises:
        ImportError: Transformers is older than 5.17.
    """
    if Version(transformers.__version__).release < Version(OLDEST).release:
        raise ImportError(
            f"hf_flashbsa needs transformers>={OLDEST} and found {transformers.__version__}; "
            f"run: pip install -U 'transformers>={OLDEST}'"
        )
    # Older releases may lack what these import.
    from hf_flashbsa.integration.attention_function import bsa_dense_forward, bsa_sparse_forward
    from hf_flashbsa.integration.loading import watch_loading
    from hf_flashbsa.integration.mask_function import bsa_mask
    from hf_flashbsa.integration.sparse_layers import bsa_sparse_mask

    transformers.AttentionInterface.register(DENSE, bsa_dense_forward)
    transformers.AttentionMaskInterface.register(DENSE, bsa_mask)
    transformers.AttentionInterface.register(SPARSE, bsa_sparse_forward)
    transformers.AttentionMaskInterface.register(SPARSE, bsa_sparse_mask)
    watch_loading()
