"""A mask that becomes a tensor when a model computes on it instead of handing it to its attention layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from hf_flashbsa.masks.spec import AttentionSpec

logger = logging.get_logger(__name__)


def visible_entries(spec: AttentionSpec, shape: tuple[int, int, int, int], device: torch.device) -> torch.Tensor:
    """bool `(B, H or 1, Q, K)`, True where a query sees a key: what `sdpa_mask` of Transformers makes.

    Args:
        spec: with neither layout nor cumulative lengths.
        shape: `(B, 1, Q, K)`.
    """
    batch, _, len_q, len_k = shape
    offset = len_k - len_q if spec.query_offset is None else spec.query_offset
    query = torch.arange(len_q, device=device)[:, None] + offset
    key = torch.arange(len_k, device=device)
    visible = torch.ones(batch, 1, len_q, len_k, dtype=torch.bool, device=device)
    left, right = spec.window_size
    right = 0 if spec.causal else right
    if right is not None:
        visible = visible & (key <= query + right)
    if left is not None:
        visible = visible & (key >= query - left)
    if spec.segment_ids_k is not None:
        ids_k = spec.segment_ids_k[:, None, None, :]
        ids_q = 0 if spec.segment_ids_q is None else spec.segment_ids_q[:, None, :, None]
        visible = visible & (ids_k >= 0) & (ids_k == ids_q)
    return visible if spec.mask is None else visible & spec.mask


class TensorOnDemand:
    """Base of objects that stand for a bool `(B, 1, Q, K)` mask, and turn into it where a tensor is needed.

    Operators, methods of tensors and functions of torch act on `as_tensor()`. Added to floating-point scores or a
    bias, the mask is 0 where visible and the dtype's lowest number elsewhere, as Transformers' eager mask is.
    Operations that would write to the mask raise `NotImplementedError`: it is shared by all layers.
    """

    def as_tensor(self) -> torch.Tensor:
        """bool `(B, H or 1, Q, K)`, True where visible."""
        raise NotImplementedError

    def as_additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The same as numbers to add to scores."""
        hidden = ~self.as_tensor()
        return torch.zeros((), dtype=dtype, device=hidden.device).masked_fill(hidden, torch.finfo(dtype).min)

    @classmethod
    def __torch_function__(cls, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], TensorOnDemand) and func in _WRITES:
            name = func.__name__
            raise NotImplementedError(
                f"A model writes to its attention mask ({name}), which its layers share; load it with "
                "attn_implementation='sdpa' or 'eager'."
            )
        if not torch.compiler.is_compiling():
            name = getattr(func, "__name__", func)
            logger.warning_once(
                f"hf_flashbsa: a model computes on its attention mask ({name}), so that it became a "
                "(batch, 1, queries, keys) tensor. Results are right; attention reads that tensor, which takes memory."
            )
        others = [x for x in args if isinstance(x, torch.Tensor) and x.is_floating_point()]
        if others and func in _ADDITIONS:
            return func(*tree_map_only(TensorOnDemand, lambda x: x.as_additive(others[0].dtype), args), **kwargs)
        args, kwargs = tree_map_only(TensorOnDemand, lambda x: x.as_tensor(), (args, kwargs))
        return func(*args, **kwargs)

    def __getattr__(self, name: str):
        attribute = None if name.startswith("_") else getattr(torch.Tensor, name, None)
        if attribute is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}, and neither have tensors.")
        if not callable(attribute):
            return getattr(self.as_tensor(), name)
        return lambda *args, **kwargs: self.__torch_function__(attribute, (), (self, *args), kwargs)

    # Answered without the tensor.
    requires_grad = False

    def dim(self) -> int:
        return len(self.shape)

    def size(self, dim: int | None = None):
        return torch.Size(self.shape) if dim is None else self.shape[dim]

    def is_floating_point(self) -> bool:
        return False

    def bool(self):
        return self

    __hash__ = object.__hash__


_COMPARABLE = (torch.Tensor, TensorOnDemand, bool, int, float)
# Functions, not their names, which torch.compile does not know.
_ADDITIONS = frozenset(
    [torch.add] + [getattr(torch.Tensor, name) for name in ("add", "add_", "__add__", "__radd__", "__iadd__")]
)
_WRITES = frozenset(
    [torch.Tensor.__setitem__]
    + [getattr(torch.Tensor, name) for name in dir(torch.Tensor) if name.endswith("_") and not name.endswith("__")]
)
_OPERATORS = """add radd sub rsub mul rmul truediv and rand or ror xor rxor invert eq ne lt le gt ge setitem""".split()


def _operator(name: str) -> Callable:
    of_tensors = getattr(torch.Tensor, name)

    def operator(self, *others):
        if name in ("__eq__", "__ne__") and not isinstance(others[0], _COMPARABLE):
            return NotImplemented
        return self.__torch_function__(of_tensors, (), (self, *others))

    operator.__name__ = name
    return operator


for _name in _OPERATORS:
    setattr(TensorOnDemand, f"__{_name}__", _operator(f"__{_name}__"))
