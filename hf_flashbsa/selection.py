"""Block layouts chosen by queries and keys: public names of `hf_flashbsa.masks.selection`."""

from hf_flashbsa.masks.selection import *  # noqa: F403
from hf_flashbsa.masks.selection import __all__  # noqa: F401
