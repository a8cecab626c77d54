"""Block layouts of the literature.

Every pattern is a function `(num_queries, num_keys, block_size=128, *, parameters, causal, num_heads)` that returns a
`BlockLayout` on the CPU. Only the number of blocks matters: a layout serves all lengths that fill as many blocks.

- Query `i` stands at key `i`. Parameters named after tokens are exact to the token, those named after blocks count
  blocks of the layout.
- `causal=True` drops the blocks above the diagonal, but leaves what lies above the diagonal *within* the blocks on it
  open. A causal layout is used together with `causal=True` of the attention call.
- `num_heads` exists where the source lets heads differ; the default of 1 makes one grid for all heads.
- Patterns without `causal` have no diagonal, and suit cross-attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from hf_flashbsa.masks.block_layout import BlockLayout
from hf_flashbsa.masks.patterns._parameters import check_parameters, unknown
from hf_flashbsa.masks.patterns.bigbird import bigbird
from hf_flashbsa.masks.patterns.butterfly import butterfly
from hf_flashbsa.masks.patterns.deepspeed import deepspeed_fixed, deepspeed_variable
from hf_flashbsa.masks.patterns.elementary import all_blocks, global_columns
from hf_flashbsa.masks.patterns.longformer import longformer
from hf_flashbsa.masks.patterns.mask_function import from_mask_function
from hf_flashbsa.masks.patterns.sliding_window import dilated, local
from hf_flashbsa.masks.patterns.sparse_transformer import openai_fixed, openai_strided

__all__ = [
    "PATTERNS",
    "all_blocks",
    "bigbird",
    "butterfly",
    "deepspeed_fixed",
    "deepspeed_variable",
    "dilated",
    "from_mask",
    "from_mask_function",
    "global_columns",
    "has_diagonal",
    "has_tile_masks",
    "local",
    "longformer",
    "make_layout",
    "openai_fixed",
    "openai_strided",
]

from_mask = BlockLayout.from_mask

#: Patterns by name, as configs call them.
PATTERNS: dict[str, Callable[..., BlockLayout]] = {
    function.__name__: function
    for function in (
        all_blocks,
        bigbird,
        butterfly,
        deepspeed_fixed,
        deepspeed_variable,
        dilated,
        global_columns,
        local,
        longformer,
        openai_fixed,
        openai_strided,
    )
}


def has_tile_masks(pattern: str) -> bool:
    """Whether layouts of a pattern may have partial blocks."""
    return pattern not in ("all_blocks", "bigbird", "butterfly", "deepspeed_fixed", "deepspeed_variable")


def has_diagonal(pattern: str) -> bool:
    """Whether a pattern relates queries and keys by position, which cross-attention cannot."""
    return "causal" in inspect.signature(PATTERNS[pattern]).parameters


def make_layout(
    pattern: str,
    num_queries: int,
    num_keys: int,
    block_size: int = 128,
    *,
    causal: bool = False,
    num_heads: int = 1,
    **parameters: Any,
) -> BlockLayout:
    """The layout of a pattern by name; `causal` and `num_heads` reach the patterns that know them.

    Raises:
        ValueError: an unknown pattern or parameter, a missing one, or a value out of its range or of a wrong type.
    """
    if pattern not in PATTERNS:
        raise ValueError(unknown("pattern", pattern, PATTERNS))
    function = PATTERNS[pattern]
    check_parameters(pattern, function, parameters)
    sizes = {"causal": causal, "num_heads": num_heads}
    known = inspect.signature(function).parameters
    sizes = {name: value for name, value in sizes.items() if name in known}
    return function(num_queries, num_keys, block_size, **sizes, **parameters)
