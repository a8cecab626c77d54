"""A layer's forward and backward pass as CUDA graphs, and the memory that they read and write."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_flashbsa.integration.mask_function import MaskSpec
from hf_flashbsa.integration.padding_free.packed_mask import PackedMask
from hf_flashbsa.masks.spec import AttentionSpec

#: Documents are counted in multiples of this.
DOCUMENTS = 8


class CannotCapture(Exception):
    """Why layers run without graphs."""


class GraphCapturer:
    """Captures work on a CUDA device. The graphs of one capturer share memory, so that they are replayed in the order
    of their capture."""

    def __init__(self, device: torch.device):
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    @staticmethod
    def check(device: torch.device) -> None:
        """Raises CannotCapture for a device without graphs."""
        if device.type != "cuda":
            raise CannotCapture(f"CUDA graphs need a CUDA device, not {device.type!r}")

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Warming up and capturing, on a stream of its own. It takes no random numbers from those who come after."""
        state, current = torch.cuda.get_rng_state(self.device), torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        collects = gc.isenabled()
        gc.disable()  # a graph that is freed during a capture spoils it
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            if collects:
                gc.enable()
            current.wait_stream(self.stream)
            torch.cuda.set_rng_state(state, self.device)

    def clear(self) -> None:
        """Gives back what warming up has left, so that the graphs' memory has room."""
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Captures what `work` launches; returns a function that launches it again."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, those that load data, may pin memory meanwhile.
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            with contextlib.suppress(RuntimeError):
                graph.capture_end()
            # A capture that breaks off leaves the generator's state as one that is being captured.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            generator.graphsafe_set_state(generator.graphsafe_get_state().clone_state())
            raise
        graph.capture_end()
        return graph.replay


class LayerCall(NamedTuple):
    """Arguments of a layer, flat; `shape` says how they lie in names and tuples."""

    shape: tuple
    leaves: list

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> LayerCall:
        leaves: list = []
        lengths: list[int | None] = []
        for value in (*args, *kwargs.values()):
            if type(value) is tuple:
                leaves.extend(value)
                lengths.append(len(value))
            else:
                leaves.append(value)
                lengths.append(None)
        return cls((len(args), tuple(kwargs), tuple(lengths)), leaves)

    def arguments(self) -> tuple[tuple, dict]:
        count, names, lengths = self.shape
        leaves = iter(self.leaves)
        values = [next(leaves) if n is None else tuple(next(leaves) for _ in range(n)) for n in lengths]
        return tuple(values[:count]), dict(zip(names, values[count:], strict=True))


class StaticTensor:
    """Where graphs read a tensor that their layers are given.

    Args:
        like: such a tensor.
        side: whose tokens its rows `(1, T, ...)` are: "q" those of the stack, "k" those of the other stack; None where
            it has no row for each token.
        capacity: rows of the memory.
        first: number of the first layer that is given it. In the backward pass this layer is the last to add to
            `gradient`, where the layers' gradients come together.
    """

    def __init__(self, like: torch.Tensor, side: str | None, capacity: int | None, first: int):
        self.side, self.first = side, first
        self.tail = like.shape if side is None else like.shape[2:]
        shape = like.shape if side is None else (1, capacity, *self.tail)
        self.memory = torch.zeros(shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad)
        self.gradient = torch.zeros_like(self.memory, requires_grad=False) if like.requires_grad else None

    def load(self, x: Any, lengths: dict[str, int]) -> bool:
        """Copies a batch's tensor; False where it is of another kind."""
        shape = self.tail if self.side is None else (1, lengths[self.side], *self.tail)
        if (
            not isinstance(x, torch.Tensor)
            or x.shape != shape
            or x.dtype != self.memory.dtype
            or x.requires_grad != self.memory.requires_grad
        ):
            return False
        with torch.no_grad():
            if self.side is None:
                self.memory.copy_(x)
            else:
                fill_rows(self.memory, x)
        if self.gradient is not None:
            self.gradient.zero_()
        return True

    def total_gradient(self, index: int, lengths: dict[str, int]) -> torch.Tensor | None:
        """The sum of all layers' gradients, for the first layer."""
        if index != self.first or self.gradient is None:
            return None
        return self.gradient.detach() if self.side is None else first_rows(self.gradient, lengths[self.side])


class StaticMask:
    """Where graphs read the documents of a mask that their layers are given: `static` is that mask for them."""

    def __init__(self, like: PackedMask, capacities: dict[str, int]):
        cu_q, cu_k = _cu_seqlens(like)
        count = document_capacity(cu_q.shape[0] - 1)
        self._kind = _kind_of(like)
        self.cu_q = torch.zeros(count + 1, dtype=torch.int32, device=cu_q.device)
        self.cu_k = self.cu_q if cu_k is cu_q else torch.zeros_like(self.cu_q)
        side_k = "q" if like.rows_q is like.rows_k else "k"
        self._shape = 1, 1, capacities["q"], capacities[side_k]
        self._like = like.spec.causal, like.spec.window_size
        self.renew()

    def renew(self) -> None:
        """Forgets the tile schedules made of the mask, so that the next layer makes them anew, and its graph does."""
        spec = AttentionSpec(*self._like, cu_seqlens_q=self.cu_q, cu_seqlens_k=self.cu_k)
        self.static = MaskSpec(spec, self._shape, self.cu_q.device)

    def load(self, mask: Any, lengths: dict[str, int]) -> bool:
        """Copies a batch's documents; False where its mask is of another kind."""
        if not isinstance(mask, PackedMask) or _kind_of(mask) != self._kind:
            return False
        for memory, cu in list(zip((self.cu_q, self.cu_k), _cu_seqlens(mask), strict=True))[: self._kind[-1]]:
            if cu.shape[0] > memory.shape[0]:
                return False
            memory[: cu.shape[0]].copy_(cu)
            memory[cu.shape[0] :].copy_(cu[-1:])  # documents without tokens
        return True


def document_capacity(count: int) -> int:
    return -(-count // DOCUMENTS) * DOCUMENTS


def _cu_seqlens(mask: PackedMask) -> tuple[torch.Tensor, torch.Tensor]:
    assert mask.spec.cu_seqlens_q is not None and mask.spec.cu_seqlens_k is not None
    return mask.spec.cu_seqlens_q, mask.spec.cu_seqlens_k


def _kind_of(mask: PackedMask) -> tuple:
    """What masks that share graphs have in common. The last element is the number of their `cu_seqlens`."""
    if mask.needs_padding:
        return (None, 0)
    cu_q, cu_k = _cu_seqlens(mask)
    return mask.spec.causal, mask.spec.window_size, mask.rows_q is mask.rows_k, 1 if cu_q is cu_k else 2


def fill_rows(memory: torch.Tensor, x: torch.Tensor) -> None:
    """Writes `x` `(1, T, ...)` and zeros behind it."""
    length = x.shape[1]
    memory[:, :length].copy_(x)
    if length < memory.shape[1]:
        memory[:, length:].zero_()


def first_rows(memory: torch.Tensor, length: int) -> torch.Tensor:
    """`memory[:, :length]`, which to autograd is no view."""
    return torch.empty(0, dtype=memory.dtype, device=memory.device).set_(
        memory.untyped_storage(), memory.storage_offset(), (1, length, *memory.shape[2:]), memory.stride()
    )


class _PreviousOutput:
    """Stands for the hidden states that the layer before returned: its graph has written them where this one reads."""


PREVIOUS = _PreviousOutput()


class _Forward(nn.Module):
    """A layer's forward as that of a module, without the layer's hooks."""

    def __init__(self, layer: nn.Module, forward: Callable):
        super().__init__()
        self.layer, self.run = layer, forward

    def forward(self, *args, **kwargs):
        return self.run(*args, **kwargs)


class LayerGraphs:
    """One layer's graphs.

    Args:
        layer: the layer.
        forward: runs it.
        gradients: memory for the gradients of `parameters`, those that get one; shared with the graphs for other
            numbers of tokens.
        call: the layer's arguments: `StaticTensor`, `StaticMask`, `PREVIOUS` or constants.
    """

    replay_forward: Callable[[], None]
    replay_backward: Callable[[], None]
    output: torch.Tensor
    grad_output: torch.Tensor
    grad_hidden: torch.Tensor

    def __init__(self, layer: nn.Module, forward: Callable, gradients: list[torch.Tensor], call: LayerCall):
        self.parameters, self.gradients, self.call = trained(layer), gradients, call
        self._module = _Forward(layer, forward)
        # autograd keeps a node for each parameter, and the stream that it was made on, which a capture must not
        # meet: graphs are captured with aliases of the parameters.
        self._aliases = {
            f"layer.{name}": x.detach().requires_grad_() for name, x in layer.named_parameters() if x.requires_grad
        }
        self.inputs = [x for x in call.leaves if isinstance(x, StaticTensor) and x.gradient is not None]
        self.is_chained = PREVIOUS in call.leaves
        self.has_gradient: list[bool] = []
        self.hidden: torch.Tensor | None = None
        self._result: torch.Tensor | None = None

    def warm_up(self, previous: torch.Tensor | None) -> torch.Tensor:
        """Runs both passes, so that kernels are compiled and libraries loaded. Returns the output."""
        hidden = previous.detach().requires_grad_() if self.is_chained and previous is not None else None
        result = self._run(hidden)
        torch.autograd.grad(result, self._sources(hidden), torch.zeros_like(result), allow_unused=True)
        return result.detach()

    def capture_forward(self, capturer: GraphCapturer, previous: LayerGraphs | None) -> None:
        if self.is_chained:
            assert previous is not None
            self.hidden = previous.output.detach().requires_grad_()

        def work() -> None:
            self._result = self._run(self.hidden)

        self.replay_forward = capturer.capture(work)
        assert self._result is not None
        self.output = self._result.detach()

    def capture_backward(self, capturer: GraphCapturer, following: LayerGraphs | None) -> None:
        chained = following is not None and following.is_chained
        self.grad_output = following.grad_hidden if chained else torch.zeros_like(self.output)

        def work() -> None:
            made = list(
                torch.autograd.grad(self._result, self._sources(self.hidden), self.grad_output, allow_unused=True)
            )
            if self.is_chained:
                self.grad_hidden = made.pop(0)
            for static in self.inputs:
                if (gradient := made.pop(0)) is not None:
                    static.gradient.add_(gradient)
            self.has_gradient = [x is not None for x in made]
            pairs = [(memory, x) for memory, x in zip(self.gradients, made, strict=True) if x is not None]
            if pairs:
                torch._foreach_copy_([memory for memory, _ in pairs], [x for _, x in pairs])

        self.replay_backward = capturer.capture(work)
        self._result = None

    def _run(self, hidden: torch.Tensor | None) -> torch.Tensor:
        leaves = [_static(x, hidden) for x in self.call.leaves]
        args, kwargs = self.call._replace(leaves=leaves).arguments()
        return torch.func.functional_call(self._module, self._aliases, args, kwargs)

    def _sources(self, hidden: torch.Tensor | None) -> list[torch.Tensor]:
        """What the backward pass differentiates by."""
        return [*([] if hidden is None else [hidden]), *(x.memory for x in self.inputs), *self._aliases.values()]


def trained(layer: nn.Module) -> list[nn.Parameter]:
    """The layer's parameters that get a gradient."""
    return [x for x in layer.parameters() if x.requires_grad]


def _static(leaf: object, hidden: torch.Tensor | None) -> object:
    if leaf is PREVIOUS:
        return hidden
    if isinstance(leaf, StaticTensor):
        return leaf.memory
    return leaf.static if isinstance(leaf, StaticMask) else leaf
