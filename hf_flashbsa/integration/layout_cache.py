"""Layouts that were made for rules of a `BlockSparseConfig`, and how compiled graphs get theirs.

torch.compile reads attributes and guards them by name, and calls the functions that tell the names instead of tracing
them: so it takes objects from here as constants. A layout for each number of blocks would make a graph for each. Where
something traces, a layout is the output of an op, `hf_flashbsa::block_layout`, that makes it when the graph runs: one
graph, or exported program, serves all lengths.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch

from hf_flashbsa.kernels.block_tables import pack_block_masks
from hf_flashbsa.masks.block_layout import BlockLayout, TracedLayout
from hf_flashbsa.masks.modes import is_eager, ordinary_tensors
from hf_flashbsa.masks.patterns import has_diagonal, has_tile_masks, make_layout
from hf_flashbsa.masks.patterns._builders import join_at_diagonal


class Pattern(NamedTuple):
    """A pattern by name, with its parameters, for some number of blocks.

    `form` is "causal", "bidirectional", or "joined": causal below the diagonal and bidirectional above it.
    """

    name: str
    block_size: int
    parameters: tuple[tuple[str, object], ...]
    form: str
    num_heads: int

    @property
    def has_tile_masks(self) -> bool:
        return has_tile_masks(self.name) or (self.form == "joined" and has_diagonal(self.name))

    def layout(self, rows: int, columns: int) -> BlockLayout:
        """The layout of `rows` by `columns` blocks, on the CPU."""
        if self.form == "joined":
            parts = [self._replace(form=form).layout(rows, columns) for form in ("causal", "bidirectional")]
            return join_at_diagonal(*parts) if has_diagonal(self.name) else parts[1]
        size, causal = self.block_size, self.form == "causal"
        return make_layout(
            self.name, rows * size, columns * size, size, causal=causal, num_heads=self.num_heads,
            **dict(self.parameters),
        )  # fmt: skip


def layout_of(pattern: Pattern, rows: int, columns: int, device: torch.device) -> BlockLayout:
    """The layout of `rows` by `columns` blocks on `device`, made once for equal arguments."""
    if is_eager():
        return getattr(MADE, _name_of_layout(pattern, rows, columns, device))
    return _traced_layout(pattern, rows, columns, device)


# Objects by name


class _Made:
    """Holds what was made, as attributes."""


MADE = _Made()
_NAMES: dict[tuple | str, str] = {}
_NUMBERS = itertools.count()


def name_of(key: tuple | str, make: Callable[[], object]) -> str:
    """Which attribute of `MADE` is `make()`, called once for equal keys. Call it in a function that torch.compile
    takes for constant."""
    if key not in _NAMES:
        with ordinary_tensors():
            made = make()
        name = f"made_{next(_NUMBERS)}"  # which no other thread has
        setattr(MADE, name, made)
        _NAMES.setdefault(key, name)
    return _NAMES[key]


def _name_of_layout(pattern: Pattern, rows: int, columns: int, device: torch.device) -> str:
    def made() -> BlockLayout:
        if device.type != "cpu":
            return getattr(MADE, _name_of_layout(pattern, rows, columns, torch.device("cpu"))).to(device)
        layout = pattern.layout(rows, columns)
        for side in ("q", "k"):
            layout.lists(side)
        return layout

    return name_of((pattern, rows, columns, device), made)


# Layouts where something traces


def _traced_layout(pattern: Pattern, rows: int, columns: int, device: torch.device) -> BlockLayout:
    text, heads = _text_and_heads(*pattern)
    if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
        # To torch.jit.trace sizes are tensors, and ints are constants.
        sizes = torch.stack([torch.as_tensor(rows), torch.as_tensor(columns)])
        grid, masks = torch.ops.hf_flashbsa.block_layout_of_sizes(sizes, text, heads, str(device))
    else:
        grid, masks = torch.ops.hf_flashbsa.block_layout(text, rows, columns, heads, str(device))
    return TracedLayout(grid, pattern.block_size, packed_masks=masks if pattern.has_tile_masks else None)


@torch.compiler.assume_constant_result
def _text_and_heads(*pattern) -> tuple[str, int]:
    """A pattern, given by its fields, as text, and how many heads its grids have."""
    with ordinary_tensors():
        return repr(pattern), Pattern(*pattern).layout(1, 1).grid.shape[1]


def _pattern_of(text: str) -> Pattern:
    return Pattern(*ast.literal_eval(text))


def _shapes(pattern: Pattern, rows: int, columns: int, heads: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of a grid and of packed tile masks that hold those of any layout.

    The number of tile masks depends on values, which a graph cannot wait for: no pattern has more than two different
    ones for each row and each column of blocks, and there is room for twice as many. A grid has a row and a column to
    spare, since tracers make graphs of their own for dimensions of 1.
    """
    room = (8 if pattern.form == "joined" else 4) * (rows + columns) * heads if pattern.has_tile_masks else 0
    return (1, heads, rows + 1, columns + 1), (room, pattern.block_size, pattern.block_size // 32)


@torch.library.custom_op("hf_flashbsa::block_layout", mutates_args=())
def _block_layout(pattern: str, rows: int, columns: int, heads: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Grid and packed tile masks of a layout, filled up to `_shapes`."""
    known = _pattern_of(pattern)
    layout = getattr(MADE, _name_of_layout(known, rows, columns, torch.device(device)))
    grid, masks = (layout.grid.new_zeros(shape) for shape in _shapes(known, rows, columns, heads))
    grid[:, :, :rows, :columns] = layout.grid
    if layout.tile_masks is not None:
        own = pack_block_masks(layout.tile_masks)
        if own.shape[0] > masks.shape[0]:
            raise RuntimeError(
                f"{known.name}: {own.shape[0]} different partial blocks, more than the {masks.shape[0]} that a traced "
                "graph has room for; run this model without torch.compile or torch.export."
            )
        masks[: own.shape[0]] = own
    return grid, masks


@_block_layout.register_fake
def _(pattern, rows, columns, heads, device):
    shapes = _shapes(_pattern_of(pattern), rows, columns, heads)
    return tuple(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes)


@torch.library.custom_op("hf_flashbsa::block_layout_of_sizes", mutates_args=())
def _block_layout_of_sizes(
    sizes: torch.Tensor, pattern: str, heads: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`block_layout` of `(rows, columns)` in a tensor on the CPU."""
    return _block_layout(pattern, *sizes.tolist(), heads, device)
