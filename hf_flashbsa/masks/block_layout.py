"""Which blocks of the score matrix are visited.

A `BlockLayout` is one grid of blocks. Everything that a kernel walks over, the lists of key blocks by block row and
of query blocks by block column, is derived from that grid, so the two passes of a training step cannot disagree.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from hf_flashbsa.masks.modes import is_eager, may_keep

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch.nn.attention.flex_attention import BlockMask

#: Entries of the grid: a block that is not visited, one whose every entry is visible, and the first partial one.
EMPTY, FULL, PARTIAL = 0, 1, 2


class BlockLists(NamedTuple):
    """The blocks that each block row (or column) visits, full ones first. int32 and contiguous.

    `index[..., :full]` are the full blocks, `index[..., full:total]` the partial ones, each ascending; what follows is
    a valid index that nobody should visit. `full` and `total` are `(B or 1, H or 1, R)`, `index` has a fourth
    dimension: as many entries as the longest list where they were made on the CPU, else as there are blocks.
    """

    full: torch.Tensor
    total: torch.Tensor
    index: torch.Tensor


def check_block_size(block_size: int) -> None:
    """Raises ValueError for a block size that no kernel tile divides."""
    if not isinstance(block_size, int) or block_size < 32 or block_size & (block_size - 1):
        raise ValueError(f"block_size: no kernel tile divides {block_size!r}; give a power of two >= 32, such as 128.")


@dataclasses.dataclass(frozen=True, eq=False)
class BlockLayout:
    """Which blocks of scores are visited, per head or shared by heads, per batch row or shared by them.

    Block row `r` holds queries `[r * block_size, (r + 1) * block_size)`, counted from the first query of a sequence;
    block columns hold keys likewise. Sequences may end inside a block, entries beyond are ignored; a shorter packed
    document uses the top left corner of the grid. A score is visible where the layout *and* the `AttentionSpec` of
    the call (causality, window, lengths) say so.

    Layouts are immutable: do not write to their tensors.

    Args:
        grid: int32 `(B or 1, H or 1, query blocks, key blocks)`: 0 not visited, 1 every entry visible, `i >= 2` the
            entries of `tile_masks[i - 2]`.
        block_size: queries and keys of a block, a power of two >= 32.
        tile_masks: bool `(U, block_size, block_size)`, the distinct masks of partial blocks, True where visible.

    Raises:
        ValueError: a block size that no kernel tile divides; wrong dtypes or shapes; a grid on the CPU with entries
            that have no meaning (grids on a GPU are not read back).
    """

    grid: torch.Tensor
    block_size: int = 128
    tile_masks: torch.Tensor | None = None
    _cache: dict = dataclasses.field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        grid, masks, size = self.grid, self.tile_masks, self.block_size
        if grid.dtype != torch.int32 or grid.ndim != 4 or grid.numel() == 0:
            raise ValueError(
                f"grid: {grid.dtype} {tuple(grid.shape)}; give int32 (B or 1, H or 1, query blocks, key blocks), or a "
                "bool mask to from_block_mask or from_mask."
            )
        if masks is not None and (masks.dtype != torch.bool or masks.ndim != 3 or masks.shape[1:] != (size, size)):
            raise ValueError(f"tile_masks: {masks.dtype} {tuple(masks.shape)}; give bool (U, {size}, {size}).")
        if masks is not None and masks.device != grid.device:
            raise ValueError(f"tile_masks are on {masks.device}, the grid is on {grid.device}; give one device.")
        if _can_read(grid):
            lowest, highest = torch.aminmax(grid)
            count = 0 if masks is None else len(masks)
            if lowest < EMPTY or highest >= PARTIAL + count:
                raise ValueError(
                    f"grid: entries are {lowest} to {highest}; with {count} tile masks give 0 to {count + 1}."
                )

    @classmethod
    def from_block_mask(cls, visited: torch.Tensor, block_size: int = 128) -> BlockLayout:
        """The layout that visits whole blocks.

        Args:
            visited: bool `(query blocks, key blocks)`, with up to two leading dimensions `(B or 1, H or 1)`.
        """
        return cls(_four_dimensions("visited", visited).to(torch.int32), block_size)

    @classmethod
    def from_mask(cls, mask: torch.Tensor, block_size: int = 128) -> BlockLayout:
        """The layout that shows exactly the entries of a mask. Waits for the device.

        Args:
            mask: bool `(Sq, Sk)`, True where visible, with up to two leading dimensions `(B or 1, H or 1)`.
        """
        check_block_size(block_size)
        mask = _four_dimensions("mask", mask)
        batch, heads, *lengths = mask.shape
        rows, columns = (-(-length // block_size) for length in lengths)
        missing_q, missing_k = rows * block_size - lengths[0], columns * block_size - lengths[1]
        blocks = F.pad(mask, (0, missing_k, 0, missing_q))
        blocks = blocks.view(batch, heads, rows, block_size, columns, block_size).transpose(3, 4)
        seen = blocks.sum((-2, -1))
        inside_q, inside_k = (torch.full((n,), block_size, device=mask.device) for n in (rows, columns))
        inside_q[-1:] -= missing_q
        inside_k[-1:] -= missing_k
        full = seen == inside_q[:, None] * inside_k
        partial = (seen > 0) & ~full
        return cls.from_blocks(full, partial, blocks[partial], block_size)

    @classmethod
    def from_blocks(
        cls, full: torch.Tensor, partial: torch.Tensor, entries: torch.Tensor, block_size: int
    ) -> BlockLayout:
        """A layout from its full blocks, its partial blocks and the entries of the latter. Waits for the device.

        Args:
            full, partial: bool `(B or 1, H or 1, query blocks, key blocks)`.
            entries: bool `(n, block_size, block_size)`, one mask for each partial block in row-major order. Equal
                ones are stored once, in an order that depends on nothing but their values.
        """
        grid = full.to(torch.int32)
        if len(entries) == 0:
            return cls(grid, block_size)
        masks, which = distinct_masks(entries)
        grid[partial] = which.to(torch.int32) + PARTIAL
        return cls(grid, block_size, masks)

    @property
    def device(self) -> torch.device:
        return self.grid.device

    def lists(self, side: str) -> BlockLists:
        """The blocks to visit, made once. Layouts on a GPU are not waited for.

        Args:
            side: "q" for the key blocks of each block row, "k" for the query blocks of each block column.
        """
        if side not in ("q", "k"):
            raise ValueError(f"side: {side!r}; give 'q' or 'k'.")
        return self._memoize(side, lambda: self._build_lists(side))

    def _memoize(self, name: object, make: Callable[[], Any]) -> Any:
        """`make()`, once."""
        if name in self._cache:
            return self._cache[name]
        made = make()
        if may_keep():
            self._cache[name] = made
        return made

    def _build_lists(self, side: str) -> BlockLists:
        grid = self.grid if side == "q" else self.grid.transpose(-2, -1).contiguous()
        # Full blocks sort before partial ones, those before empty ones; a stable sort keeps each group ascending.
        kind = torch.where(grid == EMPTY, PARTIAL + 1, grid.clamp(max=PARTIAL)).to(torch.uint8)
        full = (kind == FULL).sum(-1, dtype=torch.int32)
        total = (kind <= PARTIAL).sum(-1, dtype=torch.int32)
        index = torch.argsort(kind, dim=-1, stable=True).to(torch.int32)
        if _can_read(grid):
            index = index[..., : max(1, int(total.max()))]
        used = torch.arange(index.shape[-1], device=grid.device) < total[..., None]
        return BlockLists(full, total, (index * used).contiguous())

    def to(self, device: torch.device | str) -> BlockLayout:
        """This layout and its lists on another device, moved once and without waiting."""
        device = torch.device(device)
        if device == self.device:
            return self

        def moved() -> BlockLayout:
            masks = None if self.tile_masks is None else self.tile_masks.to(device, non_blocking=True)
            layout = BlockLayout(self.grid.to(device, non_blocking=True), self.block_size, masks)
            for side in ("q", "k"):
                layout._cache[side] = BlockLists(*(x.to(device, non_blocking=True) for x in self.lists(side)))
            return layout

        return self._memoize(device, moved)

    def to_mask(self, len_q: int, len_k: int) -> torch.Tensor:
        """bool `(B or 1, H or 1, len_q, len_k)`, True where the layout shows an entry."""
        batch, heads, rows, columns = self.grid.shape
        size = self.block_size
        if len_q > rows * size or len_k > columns * size:
            raise ValueError(f"to_mask: ({len_q}, {len_k}) exceeds the layout's ({rows * size}, {columns * size}).")
        constant = torch.zeros(2, size, size, dtype=torch.bool, device=self.device)
        constant[FULL] = True
        kinds = constant if self.tile_masks is None else torch.cat([constant, self.tile_masks])
        blocks = kinds[self.grid.long()].transpose(3, 4)
        return blocks.reshape(batch, heads, rows * size, columns * size)[:, :, :len_q, :len_k]

    def to_flex(self) -> BlockMask:
        """FlexAttention's `BlockMask` of the same blocks and entries, for lengths that fill the grid."""
        from torch.nn.attention.flex_attention import BlockMask

        grid, masks, size = self.grid, self.tile_masks, self.block_size
        step_b, step_h = (int(n > 1) for n in grid.shape[:2])

        def visible(b, h, q, k):
            kind = grid[b * step_b, h * step_h, q // size, k // size]
            if masks is None:
                return kind == FULL
            return (kind == FULL) | ((kind >= PARTIAL) & masks[(kind - PARTIAL).clamp(min=0), q % size, k % size])

        def index_lists(which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            order = torch.argsort((~which).to(torch.uint8), dim=-1, stable=True)
            return which.sum(-1, dtype=torch.int32), order.to(torch.int32).contiguous()

        return BlockMask.from_kv_blocks(
            *index_lists(grid >= PARTIAL),
            *index_lists(grid == FULL),
            BLOCK_SIZE=size,
            mask_mod=visible,
            seq_lengths=(grid.shape[2] * size, grid.shape[3] * size),
        )

    @classmethod
    def from_flex(cls, block_mask: BlockMask) -> BlockLayout:
        """The layout of FlexAttention's `BlockMask`. Waits for the device.

        The mask function is called on partial blocks only, with index tensors `(n, 1 or block, 1 or block)` in
        place of numbers.

        Raises:
            ValueError: blocks that are not square.
        """
        size, other = block_mask.BLOCK_SIZE
        if size != other:
            raise ValueError(f"block_mask: blocks are {size} x {other}; make it with one BLOCK_SIZE for both sides.")
        check_block_size(size)
        len_q, len_k = block_mask.seq_lengths
        columns = -(-len_k // size)

        def visited(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
            used = torch.arange(index.shape[-1], device=index.device) < count[..., None]
            grid = torch.zeros(*count.shape, columns + 1, dtype=torch.bool, device=index.device)
            return grid.scatter_(-1, torch.where(used, index, columns).long(), True)[..., :columns]

        partial = visited(block_mask.kv_num_blocks, block_mask.kv_indices)
        full = torch.zeros_like(partial)
        if block_mask.full_kv_num_blocks is not None:
            full = visited(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
        b, h, r, c = (x[:, None, None] for x in partial.nonzero(as_tuple=True))
        within = torch.arange(size, device=partial.device)
        # Functions may look up what exists for real positions only.
        q = (r * size + within[:, None]).clamp(max=len_q - 1)
        k = (c * size + within).clamp(max=len_k - 1)
        entries = block_mask.mask_mod(b, h, q, k).expand(len(b), size, size)
        return cls.from_blocks(full, partial, entries, size)

    def to_json(self) -> str:
        """This layout as compact JSON text."""
        masks = None if self.tile_masks is None else _pack(self.tile_masks)
        return json.dumps({"block_size": self.block_size, "grid": _pack(self.grid), "tile_masks": masks})

    @classmethod
    def from_json(cls, text: str) -> BlockLayout:
        """The layout that `to_json` wrote, on the CPU."""
        fields = json.loads(text)
        masks = None if fields["tile_masks"] is None else _unpack(fields["tile_masks"], torch.bool)
        return cls(_unpack(fields["grid"], torch.int32), fields["block_size"], masks)

    def equals(self, other: BlockLayout) -> bool:
        """Whether both layouts hold equal tensors."""
        if self.block_size != other.block_size or (self.tile_masks is None) != (other.tile_masks is None):
            return False
        same_masks = self.tile_masks is None or torch.equal(self.tile_masks, other.tile_masks)
        return same_masks and torch.equal(self.grid, other.grid)

    def density(self, causal: bool = False) -> float:
        """Visited blocks over all blocks, a mean over heads and batch rows. Waits for the device.

        Args:
            causal: count only blocks on and below the diagonal, visited and all.
        """
        visited = self.grid != EMPTY
        counted = torch.ones_like(visited)
        if causal:
            visited, counted = visited.tril(), counted.tril()
        return float(visited.sum() / counted.sum())

    def draw(self, ax: Axes | None = None, head: int = 0, batch: int = 0) -> Axes:
        """A picture of the blocks of one head: white not visited, dark full, light partial.

        Args:
            ax: matplotlib axes to draw on; default: a new figure.
            head: which head, and `batch`: which batch row, of a layout that has several.

        Returns:
            the axes.
        """
        import matplotlib.pyplot as plt
        from matplotlib.colors import ListedColormap

        if ax is None:
            ax = plt.figure(figsize=(4, 4), layout="constrained").gca()
        kind = self.grid[batch, head].clamp(max=PARTIAL).cpu()
        colours = ListedColormap(["white", "#1f4e79", "#9dc3e6"])
        ax.imshow(kind.tolist(), cmap=colours, vmin=EMPTY, vmax=PARTIAL, interpolation="nearest")
        ax.set(xlabel="key block", ylabel="query block", title=f"density {float((kind != EMPTY).float().mean()):.2f}")
        return ax

    def __repr__(self) -> str:
        batch, heads, rows, columns = self.grid.shape
        masks = 0 if self.tile_masks is None else len(self.tile_masks)
        return (
            f"BlockLayout({rows} x {columns} blocks of {self.block_size}, heads={heads}, batch={batch}, "
            f"tile_masks={masks}, device={self.device})"
        )


@dataclasses.dataclass(frozen=True, eq=False)
class TracedLayout(BlockLayout):
    """A layout that a traced graph makes for the lengths of its call, to run and for nothing else.

    Args:
        packed_masks: int32 `(U, block_size, block_size // 32)`, the tile masks as kernels read them, filled up with
            unused ones.
    """

    packed_masks: torch.Tensor | None = None


def distinct_masks(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The distinct ones of bool masks `(n, block, block)` in a fixed order, and which of them each is, `(n,)`."""
    words = masks.flatten(1).contiguous().view(torch.int64)
    words, which = torch.unique(words, dim=0, return_inverse=True)
    return words.view(torch.bool).view(-1, *masks.shape[1:]), which


def _can_read(grid: torch.Tensor) -> bool:
    """Whether values may decide what happens next: that waits for a GPU, and is impossible where something traces."""
    return grid.device.type == "cpu" and is_eager()


def _four_dimensions(name: str, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype != torch.bool or not 2 <= mask.ndim <= 4 or mask.numel() == 0:
        raise ValueError(f"{name}: {mask.dtype} {tuple(mask.shape)}; give bool, ([B or 1, [H or 1,]] rows, columns).")
    return mask[(None,) * (4 - mask.ndim)]


def _pack(tensor: torch.Tensor) -> dict:
    packed = base64.b64encode(zlib.compress(tensor.cpu().contiguous().numpy().tobytes(), 9))
    return {"shape": list(tensor.shape), "data": packed.decode("ascii")}


def _unpack(packed: dict, dtype: torch.dtype) -> torch.Tensor:
    data = bytearray(zlib.decompress(base64.b64decode(packed["data"])))
    return torch.frombuffer(data, dtype=dtype).view(packed["shape"])
