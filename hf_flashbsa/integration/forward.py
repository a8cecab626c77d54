"""Deprecated: the former name of `hf_flashbsa.integration.attention_function`, kept for one release."""

from hf_flashbsa._deprecated import warn_of_module
from hf_flashbsa.integration.attention_function import bsa_dense_forward, bsa_sparse_forward

__all__ = ["bsa_dense_forward", "bsa_sparse_forward"]

warn_of_module(__name__, bsa_dense_forward.__module__)
