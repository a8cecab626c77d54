"""Tensors `(B, H, S, D)` that are read and written by pieces of a call."""

from __future__ import annotations

import torch

from hf_flashbsa.kernels.torch.pieces import Place


class Source:
    """A tensor to read from, in `dtype`.

    Args:
        whole: whether a single piece reads all of it.
    """

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, whole: bool):
        self._x = x if x.dtype == dtype else x.to(dtype)
        self._whole = whole
        self._rows: torch.Tensor | None = None

    def take(self, place: Place) -> torch.Tensor:
        """`(n, H, m, D)`: a view, or a copy where the rows lie apart."""
        if self._whole:
            return self._x
        if place.index is None:
            return self._x[place.rows, :, place.extent]
        if self._rows is None:
            self._rows = self._x.transpose(1, 2).flatten(0, 1)
        return self._rows.index_select(0, place.index).unflatten(0, (-1, place.length)).transpose(1, 2)


class Target:
    """A tensor to write to. What is never written is `fill`.

    Args:
        dtype: of sums.
        whole: whether a single piece writes all of it, which needs no sums.
    """

    def __init__(self, x: torch.Tensor, dtype: torch.dtype, whole: bool, fill: float = 0.0):
        self._x, self._whole = x, whole
        if not whole:
            batch, heads, length, dim = x.shape
            self._rows = torch.full((batch * length, heads, dim), fill, dtype=dtype, device=x.device)
            self._buffer = self._rows.unflatten(0, (batch, length)).transpose(1, 2)

    def put(self, place: Place, values: torch.Tensor) -> None:
        """Writes `(n, H, m, D)` where nothing has been written."""
        if self._whole:
            self._x.copy_(values)
        elif place.index is None:
            self._buffer[place.rows, :, place.extent] = values
        else:
            self._rows.index_copy_(0, *self._live(place, values))

    def add(self, place: Place, values: torch.Tensor) -> None:
        """Adds `(n, H, m, D)`."""
        if self._whole:
            self._x.copy_(values)
        elif place.index is None:
            self._buffer[place.rows, :, place.extent] += values
        else:
            index, rows = self._live(place, values)  # no row is there twice
            self._rows.index_copy_(0, index, rows.add_(self._rows.index_select(0, index)))

    def finish(self) -> None:
        """To be called once, at the end."""
        if not self._whole:
            self._x.copy_(self._buffer)

    @staticmethod
    def _live(place: Place, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`(T,)` and `(T, H, D)`: where what goes."""
        rows = values.transpose(1, 2).flatten(0, 1)
        if place.live is None:
            return place.index, rows.clone()
        live = place.live.flatten()
        return place.index[live], rows[live]
