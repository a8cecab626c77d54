"""Deprecated: the former name of `hf_flashbsa.integration.mask_function`, kept for one release."""

from hf_flashbsa._deprecated import warn_of_module
from hf_flashbsa.integration.mask_function import bsa_mask

__all__ = ["bsa_mask"]

warn_of_module(__name__, bsa_mask.__module__)
