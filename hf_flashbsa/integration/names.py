"""Names of the attention implementations. They must not contain "flash": Transformers loads a FlashAttention build for
such."""

from __future__ import annotations

#: Exact attention.
DENSE = "bsa_dense"
#: Block-sparse attention, for models with a `BlockSparseConfig`.
SPARSE = "bsa_sparse"
