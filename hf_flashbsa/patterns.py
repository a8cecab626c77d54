"""Block layouts of the literature: public names of `hf_flashbsa.masks.patterns`."""

from hf_flashbsa.masks.patterns import *  # noqa: F403
from hf_flashbsa.masks.patterns import __all__  # noqa: F401
