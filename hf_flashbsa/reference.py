"""Deprecated: the former name of `hf_flashbsa.ops.reference`, kept for one release."""

from hf_flashbsa._deprecated import warn_of_module
from hf_flashbsa.ops.reference import reference_attention

__all__ = ["reference_attention"]

warn_of_module(__name__, reference_attention.__module__)
