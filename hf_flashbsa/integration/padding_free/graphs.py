"""Layers of packed stacks as CUDA graphs, so that a training step does not wait for Python.

With few tokens the host takes longer to launch the kernels of a layer than the GPU to run them. The shapes of a packed
stack follow from its number of tokens alone, so that few graphs serve all batches: each is captured for a capacity,
and rows beyond a batch's tokens hold zeros and belong to no document.

The first pass of a capacity runs as without graphs and shows how the model calls its layers. Before the second one,
forward and backward pass of each layer are captured, in the order of a training step and in one memory pool: they take
the memory of one step, and the graphs of other capacities take the same. What a model does between its layers stays as
it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from hf_flashbsa.integration.names import DENSE
from hf_flashbsa.integration.padding_free.forward_pass import current_plan
from hf_flashbsa.integration.padding_free.layer_graphs import (
    PREVIOUS,
    CannotCapture,
    GraphCapturer,
    LayerCall,
    LayerGraphs,
    StaticMask,
    StaticTensor,
    document_capacity,
    fill_rows,
    first_rows,
    trained,
)
from hf_flashbsa.integration.padding_free.packed_mask import PackedMask
from hf_flashbsa.integration.padding_free.packing import Packing
from hf_flashbsa.masks.modes import is_eager
from hf_flashbsa.ops.api import is_deterministic

logger = logging.getLogger(__name__)

#: Capacities between a power of 2 and the next: an eighth of a graph's rows is idle at most.
STEPS_PER_OCTAVE = 8
#: Captures that a stack keeps. Batches that would need more run without graphs.
MAX_CAPTURES = 24
#: Where a stack holds its graphs.
GRAPHS = "_padding_free_graphs"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


#: False within `without_cuda_graphs`.
_allowed: ContextVar[bool] = ContextVar("cuda_graphs_allowed", default=True)


@contextlib.contextmanager
def without_cuda_graphs() -> Iterator[None]:
    """Within, passes neither replay graphs nor are recorded for them: what runs is not what will."""
    token = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(token)


def capacity_of(tokens: int) -> int:
    """Rows of the graphs that so many tokens run in: a multiple of 16."""
    step = max((1 << (tokens.bit_length() - 1)) // STEPS_PER_OCTAVE, 16)
    return -(-tokens // step) * step


class StackCapture:
    """All layers of a stack for one capacity: recorded first, captured later."""

    def __init__(self, stack: StackGraphs, capacities: dict[str, int]):
        self.stack, self.capacities = stack, capacities
        self.graphs: list[LayerGraphs] = []
        self._calls: list[LayerCall] = []
        #: What layers were given -> its memory. Holds the former, so that ids stay their own.
        self._static: dict[int, tuple[object, StaticTensor | StaticMask]] = {}

    @property
    def is_recorded(self) -> bool:
        return len(self._calls) == len(self.stack.layers)

    def record(self, call: LayerCall, previous: object, lengths: dict[str, int]) -> None:
        """Records how the next layer is called; `previous` is what the layer before returned, if any.

        Raises:
            CannotCapture: graphs cannot take its arguments.
        """
        index = len(self._calls)
        leaves = [PREVIOUS if x is previous and index else self._memory_of(x, index, lengths) for x in call.leaves]
        self._calls.append(call._replace(leaves=leaves))

    def _memory_of(self, x: object, index: int, lengths: dict[str, int]) -> object:
        if x is None or isinstance(x, (bool, int, float, str)):
            return x
        if id(x) in self._static:
            return self._static[id(x)][1]
        if isinstance(x, torch.Tensor):
            side = next((s for s, n in lengths.items() if x.ndim > 1 and x.shape[:2] == (1, n)), None)
            static = StaticTensor(x, side, None if side is None else self.capacities[side], index)
        elif isinstance(x, PackedMask) and not x.needs_padding:
            static = StaticMask(x, self.capacities)
        else:
            what = "a mask that packed rows cannot express" if isinstance(x, PackedMask) else type(x).__name__
            raise CannotCapture(f"layers are given {what}")
        self._static[id(x)] = (x, static)
        return static

    def begin_recording(self) -> None:
        """Forgets a pass that did not call every layer."""
        self._static.clear()
        self._calls.clear()

    def end_recording(self) -> None:
        self._static.clear()

    def run(self, capturer: GraphCapturer, gradients: list[list[torch.Tensor]]) -> None:
        """Captures the layers."""
        begin, layers = time.perf_counter(), self.stack.layers
        forwards = [layer.forward.args[1] for layer in layers]  # see `_call_layer`
        parts = zip(layers, forwards, gradients, self._calls, strict=True)
        graphs = [LayerGraphs(*part) for part in parts]
        device = capturer.device.type
        # Without autocast's cache, replays cast the weights that they find.
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with capturer.session(), torch.enable_grad(), autocast:
            output = None
            for layer in graphs:
                output = layer.warm_up(output)
            del output
            capturer.clear()
            for mask in {id(x): x for call in self._calls for x in call.leaves if isinstance(x, StaticMask)}.values():
                mask.renew()
            for layer, previous in zip(graphs, [None, *graphs], strict=False):
                layer.capture_forward(capturer, previous)
            for layer, following in zip(reversed(graphs), [None, *reversed(graphs)], strict=False):
                layer.capture_backward(capturer, following)
        self.graphs = graphs
        self.stack.counts["captured"] += 1
        rows = " and ".join(str(capacity) for capacity in self.capacities.values())
        seconds = time.perf_counter() - begin
        logger.info("padding_free: CUDA graphs of %d layers for %s tokens, %.1f s", len(graphs), rows, seconds)


class GraphPass:
    """One forward pass of a stack: records how its layers are called, or replays their graphs."""

    def __init__(self, capture: StackCapture, lengths: dict[str, int]):
        self.capture, self.lengths = capture, lengths
        self.previous: torch.Tensor | None = None
        #: The layers called so far, None once one of them ran without graphs.
        self._next: int | None = 0
        self._loaded: dict[int, object] = {}
        #: The layer whose backward pass ran last.
        self.backward_at = len(capture.stack.layers)

    def call(self, index: int, forward: Callable, args: tuple, kwargs: dict) -> Any:
        """Runs a layer."""
        if self._next is None:
            return forward(*args, **kwargs)
        try:
            if index != self._next:
                raise CannotCapture("layers are skipped")
            self._next = index + 1
            call = LayerCall.of(args, kwargs)
            if self.capture.graphs:
                return self._replay(index, call)
            self.capture.record(call, self.previous, self.lengths)
        except CannotCapture as reason:
            self._next = None
            self.capture.stack.count(str(reason))
            return forward(*args, **kwargs)
        self.previous = output = forward(*args, **kwargs)
        if not isinstance(output, torch.Tensor) or output.shape[:2] != (1, self.lengths["q"]):
            self.capture.stack.refuse(f"layers return {type(output).__name__}")
            self._next = None
        return output

    def _replay(self, index: int, call: LayerCall) -> torch.Tensor:
        layer = self.capture.graphs[index]
        inputs = []
        if call.shape != layer.call.shape:
            raise CannotCapture("layers are given other arguments than before")
        for x, leaf in zip(call.leaves, layer.call.leaves, strict=True):
            if not self._load(x, leaf):
                raise CannotCapture("layers are given other arguments than before")
            if leaf is PREVIOUS or (isinstance(leaf, StaticTensor) and leaf.gradient is not None):
                inputs.append(x)
        self.previous = _Replay.apply(self, index, *inputs, *layer.parameters)
        return self.previous

    def _load(self, x: object, leaf: object) -> bool:
        """Copies an argument to where the graph reads it, unless an earlier layer did; False where it is another."""
        if leaf is PREVIOUS:
            return x is self.previous
        if not isinstance(leaf, (StaticTensor, StaticMask)):
            return type(x) is type(leaf) and x == leaf
        if id(leaf) in self._loaded:
            return self._loaded[id(leaf)] is x
        self._loaded[id(leaf)] = x
        return leaf.load(x, self.lengths)

    def end(self) -> None:
        """Called where the stack's forward has ended."""
        if not self.capture.graphs:
            self.capture.end_recording()
        elif self._next == len(self.capture.graphs):
            self.capture.stack.counts["replayed"] += 1
        # What autograd holds holds this pass: it must not hold what autograd made.
        self.previous = self._next = None
        self._loaded.clear()

    def backward(self, index: int, grad: torch.Tensor | None) -> list[torch.Tensor | None]:
        """Replays a layer's backward pass. Returns gradients of its inputs and parameters.

        Raises:
            RuntimeError: the activations are gone.
        """
        if self.capture.stack.latest() is not self or index >= self.backward_at:
            raise RuntimeError(
                "padding_free: CUDA graphs keep the activations of one forward pass for one backward pass; "
                "give cuda_graphs=False for retain_graph=True and for several forward passes before a backward pass."
            )
        self.backward_at = index
        layer = self.capture.graphs[index]
        if grad is None:
            layer.grad_output.zero_()
        elif grad.data_ptr() != layer.grad_output.data_ptr():  # it lies there already where a layer's graph made it
            fill_rows(layer.grad_output, grad)
        for parameter, memory in zip(layer.parameters, layer.gradients, strict=True):
            # autograd keeps what it is handed. What it kept of an earlier step is added to, and must not be replaced.
            if parameter.grad is not None and parameter.grad.data_ptr() == memory.data_ptr():
                parameter.grad = parameter.grad.clone()
        layer.replay_backward()
        of_inputs: list[torch.Tensor | None] = []
        for leaf in layer.call.leaves:
            if leaf is PREVIOUS:
                of_inputs.append(first_rows(layer.grad_hidden, self.lengths["q"]))
            elif isinstance(leaf, StaticTensor) and leaf.gradient is not None:
                of_inputs.append(leaf.total_gradient(index, self.lengths))
        given = zip(layer.gradients, layer.has_gradient, strict=True)
        return of_inputs + [memory.detach() if has_gradient else None for memory, has_gradient in given]


class _Replay(torch.autograd.Function):
    """A layer's graphs as one operation."""

    @staticmethod
    def forward(ctx, graph_pass: GraphPass, index: int, *tensors):
        layer = graph_pass.capture.graphs[index]
        layer.replay_forward()
        ctx.graph_pass, ctx.index = graph_pass, index
        ctx.set_materialize_grads(False)
        return first_rows(layer.output, graph_pass.lengths["q"])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return None, None, *ctx.graph_pass.backward(ctx.index, grad)


class StackGraphs:
    """The graphs of one stack, and the use that was made of them.

    Attributes:
        counts: passes that were replayed ("replayed"), captures ("captured"), and passes that ran without graphs, by
            reason.
    """

    def __init__(self, stack: nn.Module, layers: nn.ModuleList):
        self.stack, self.layers = stack, list(layers)
        self.counts: Counter[str] = Counter()
        self._forget(None)

    def _forget(self, state: tuple | None) -> None:
        """Drops all graphs. `state` is what the next ones depend on."""
        self._state = state
        self._captures: dict[tuple, StackCapture] = {}
        self._capturer: GraphCapturer | None = None
        self._gradients: list[list[torch.Tensor]] = []
        self._why_unsupported: str | None = None
        self.latest: Callable[[], GraphPass | None] = lambda: None

    def __getstate__(self) -> dict:
        return {"stack": self.stack, "layers": self.layers, "counts": self.counts}  # copies make graphs of their own

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._forget(None)

    def install(self) -> None:
        """Puts the graphs in the place of the layers' forward."""
        setattr(self.stack, GRAPHS, self)
        for index, layer in enumerate(self.layers):
            layer.forward = functools.partial(_call_layer, index, layer.forward)

    def remove(self) -> None:
        delattr(self.stack, GRAPHS)
        for layer in self.layers:
            del layer.forward
        self._forget(None)

    def refuse(self, reason: str) -> None:
        """From now on, passes run without graphs."""
        self._why_unsupported = reason
        self.count(reason)

    def count(self, reason: str) -> None:
        if reason not in self.counts:
            logger.info("padding_free: %s runs without CUDA graphs: %s", type(self.stack).__name__, reason)
        self.counts[reason] += 1

    def begin(self, rows: Packing, memory_rows: Packing | None) -> GraphPass | None:
        """Begins a training pass over packed rows; None where it runs without graphs."""
        if not torch.is_grad_enabled() or not self.stack.training or not _allowed.get():
            return None
        lengths = {"q": rows.total} if memory_rows is None else {"q": rows.total, "k": memory_rows.total}
        device = rows.cu_seqlens.device
        try:
            if (state := self._checked_state(device)) != self._state:
                self._forget(state)
            if self._why_unsupported is not None:
                raise CannotCapture(self._why_unsupported)
            earlier = self.latest()
            if earlier is not None and earlier.backward_at > 0:
                raise CannotCapture("an earlier pass still waits for its backward pass")
            if len(lengths) > len(set(lengths.values())):
                raise CannotCapture("both stacks have as many tokens")
            capture = self._capture_of(lengths, document_capacity(rows.batch), device)
        except CannotCapture as reason:
            self.count(str(reason))
            return None
        graph_pass = GraphPass(capture, lengths)
        if capture.graphs:
            self.latest = weakref.ref(graph_pass)
        return graph_pass

    def _capture_of(self, lengths: dict[str, int], documents: int, device: torch.device) -> StackCapture:
        """The capture for such a batch, made where a pass has been recorded for it."""
        capacities = {side: capacity_of(length) for side, length in lengths.items()}
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = (*capacities.values(), documents, autocast)
        capture = self._captures.get(key)
        if capture is None:
            if len(self._captures) == MAX_CAPTURES:
                raise CannotCapture(f"batches of more than {MAX_CAPTURES} sizes")
            capture = self._captures[key] = StackCapture(self, capacities)
        elif capture.is_recorded and not capture.graphs:
            if self._capturer is None:
                self._capturer = GraphCapturer(device)
                self._gradients = [[torch.empty_like(p) for p in trained(layer)] for layer in self.layers]
            try:
                capture.run(self._capturer, self._gradients)
            except (RuntimeError, NotImplementedError) as error:
                self._why_unsupported = f"they cannot be captured ({str(error).splitlines()[0]})"
                raise CannotCapture(self._why_unsupported) from error
        if not capture.is_recorded:
            capture.begin_recording()
        return capture

    def _checked_state(self, device: torch.device) -> tuple:
        """What graphs depend on besides their inputs: where it changes, they are captured anew.

        Raises:
            CannotCapture: the stack does what graphs would leave out.
        """
        GraphCapturer.check(device)
        if not is_eager() or forward_ad._current_level >= 0:
            raise CannotCapture("a compiler, tracer or transform is active")
        if self.stack.config._attn_implementation != DENSE:
            raise CannotCapture(f"attn_implementation is {self.stack.config._attn_implementation!r}")
        state: list = [is_deterministic()]
        for layer in self.layers:
            if getattr(layer, "gradient_checkpointing", False):
                raise CannotCapture("gradient checkpointing")
            for module in layer.modules():
                state.append(module.training)
                if module is not layer and any(getattr(module, hooks) for hooks in _HOOKS):
                    raise CannotCapture(f"{type(module).__name__} has hooks")
                if module._compiled_call_impl is not None:
                    raise CannotCapture(f"{type(module).__name__} is compiled")
            for x in layer.parameters():
                if type(x) is not nn.Parameter:
                    raise CannotCapture(f"parameters are {type(x).__name__}")
                state += x.data_ptr(), x.requires_grad
        return tuple(state)


def _call_layer(index: int, forward: Callable, *args, **kwargs) -> Any:
    """Stands in the place of a layer's forward."""
    if torch.compiler.is_compiling():
        return forward(*args, **kwargs)
    plan = current_plan()
    graph_pass = None if plan is None else plan.graph_pass
    return forward(*args, **kwargs) if graph_pass is None else graph_pass.call(index, forward, args, kwargs)


def cuda_graph_counts(model: nn.Module) -> dict[str, dict[str, int]]:
    """What became of the training passes of a model's packed stacks, by the stacks' names: how many were "replayed",
    how many sizes were "captured", and how many passes ran without graphs, by reason."""
    found = ((name, module.__dict__.get(GRAPHS)) for name, module in model.named_modules())
    return {name: dict(graphs.counts) for name, graphs in found if graphs is not None}
