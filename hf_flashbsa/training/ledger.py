"""Where the memory of a training step goes, part by part.

A dispatch mode sees every tensor that the step makes, and a weak reference to its storage tells when it is freed, so
the bytes alive are known at every moment, on every device. Saved-tensor hooks tell which of them autograd keeps for
the backward pass, and hooks on the modules tell for which part of the model. The ledger shows the moment at which
most bytes are alive. On CUDA it is held against the allocator's own peak of a step that nothing observes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
WEIGHTS = "weights"  # with buffers
WEIGHT_COPIES = "weight copies"  # what autocast casts parameters to, kept until the backward pass
GRADIENTS = "gradients"
OPTIMIZER = "optimizer state"
OPTIMIZER_WORKSPACE = "optimizer workspace"
LIBRARIES = "cuBLAS workspaces"
INPUTS = "inputs"
ATTENTION = "attention"
MASKS = "attention masks"
MLP = "mlp"
NORMS = "norms"
EMBEDDINGS = "embeddings"
LOGITS = "logits and loss"
OTHER = "other"
WORKSPACE = "workspace"
#: All parts, in the order of tables and plots. What autograd has saved is found from attention to other; workspace
#: is alive and not saved: gradients on their way, temporaries, the layer that checkpointing computes again.
PARTS = (
    WEIGHTS, WEIGHT_COPIES, GRADIENTS, OPTIMIZER, OPTIMIZER_WORKSPACE, LIBRARIES, INPUTS, ATTENTION, MASKS, MLP,
    NORMS, EMBEDDINGS, LOGITS, OTHER, WORKSPACE,
)  # fmt: skip
#: Parts whose size does not depend on the batch.
FIXED = frozenset({WEIGHTS, WEIGHT_COPIES, GRADIENTS, OPTIMIZER, OPTIMIZER_WORKSPACE, LIBRARIES})
#: For each of these factors of the batch, the moment that would be the peak is kept. `Ledger.scaled` is exact for
#: them and a lower bound for others.
FACTORS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)

#: What the modules of each part, or their classes, are called; the first that fits counts.
_NAMES = {
    ATTENTION: re.compile(r"attention|attn", re.IGNORECASE),
    EMBEDDINGS: re.compile(r"embed", re.IGNORECASE),
    LOGITS: re.compile(r"lm_?head|^head$|score|classifier|predictions", re.IGNORECASE),
    MLP: re.compile(r"mlp|ffn|feed_?forward|layerff|^fc\d|intermediate|output|activation|^act", re.IGNORECASE),
}


@dataclasses.dataclass(frozen=True)
class Ledger:
    """Bytes alive at the peak of one training step.

    Attributes:
        parts: bytes by part, in the order of `PARTS`; parts without any are left out.
        moment: "forward", "backward" or "optimizer step".
        peak: the CUDA allocator's peak in bytes; None on other devices.
        moments: for each of `FACTORS` the bytes by part at the moment that is the peak of a batch so scaled.
    """

    parts: Mapping[str, int]
    moment: str
    peak: int | None
    moments: tuple[tuple[str, Mapping[str, int]], ...] = dataclasses.field(repr=False)

    @property
    def tracked(self) -> int:
        """Bytes of all parts together."""
        return sum(self.parts.values())

    @property
    def explained(self) -> float | None:
        """Share of the allocator's peak that the parts add up to; None without an allocator's peak.

        The rest is scratch memory inside operations, the allocator's rounding, and whatever else lies on the device.
        """
        return None if self.peak is None else self.tracked / self.peak

    def scaled(self, factor: float) -> Ledger:
        """The ledger predicted for `factor` times the batch at equal lengths.

        Activations, inputs and workspace scale; weights, gradients, optimizer and the unexplained rest do not. The
        peak may fall on another moment of the step. What the rows of a batch share, as T5's position bias
        `(1, H, S, S)`, is scaled too: where it matters, the prediction is too high.

        Raises:
            ValueError: `factor` is not positive.
        """
        if not factor > 0:
            raise ValueError(f"factor: {factor} is not positive.")
        moments = tuple((moment, _scale(parts, factor)) for moment, parts in self.moments)
        moment, parts = max(moments, key=lambda item: sum(item[1].values()))
        peak = None if self.peak is None else sum(parts.values()) + self.peak - self.tracked
        return Ledger(parts, moment, peak, moments)

    def table(self) -> str:
        """Markdown table: part, GiB, share of the peak."""
        total = self.peak or self.tracked
        lines = [f"| part (peak in {self.moment}) | GiB | share |", "|---|---:|---:|"]
        rows = list(self.parts.items())
        if self.peak is not None:
            rows += [("unexplained", self.peak - self.tracked), ("allocator's peak", self.peak)]
        else:
            rows.append(("all parts", self.tracked))
        lines += [f"| {name} | {size / GIB:.3f} | {size / total:.1%} |" for name, size in rows]
        return "\n".join(lines)

    def plot(self, path: str | Path, label: str = "") -> None:
        """Draws the parts as one stacked bar; the file's ending chooses the format. Needs matplotlib."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 2.6), layout="constrained")
        axes = figure.subplots()
        left = 0.0
        for name, size in self.parts.items():
            colour = colormaps["tab20"](PARTS.index(name))
            axes.barh(0, size / GIB, left=left, label=f"{name} {size / GIB:.2f}", color=colour)
            left += size / GIB
        if self.peak is not None:
            axes.axvline(self.peak / GIB, color="black", linestyle="--", label=f"allocator {self.peak / GIB:.2f}")
        axes.set_yticks([0], [label])
        axes.set(xlabel="GiB", title=f"Memory at the peak of a training step ({self.moment})")
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        figure.savefig(path)


def measure_step(
    model: nn.Module,
    batch: Any,
    *,
    compute_loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    autocast_dtype: torch.dtype | None = None,
    update: bool = True,
) -> Ledger:
    """Runs training steps and tells where the memory of one goes.

    A step is forward, backward, and with an optimizer its step, then gradients are set to None. The steps are real:
    with an optimizer the weights change. Two run (three where the optimizer has no state yet): one on CUDA for the
    allocator's peak, one observed. All hooks are gone afterwards, also where a step raises.

    A saved tensor belongs to the part of the module that was running when it was saved first:

    1. The module's class name contains "norm": norms.
    2. It or a module around it is named as attention is: attention; but what has the 4-D attention mask's lengths
       and one copy for all heads: attention masks, like the mask itself.
    3. Likewise embeddings, and heads (lm_head, classifier, ...): embeddings; logits and loss, where also belongs
       what `model` itself runs, and what runs outside of it.
    4. Likewise feed-forward layers (mlp, ffn, fc1, intermediate, ...): mlp.
    5. Anything else, as dropout and residuals of a layer: other.

    Args:
        model: an eager model on one device, not compiled, not sharded.
        batch: the model's inputs, on its device.
        compute_loss: `(model, batch) -> loss`, a scalar; the default is `model(**batch).loss`.
        optimizer: if given, its state is counted and its step is part of the step.
        autocast_dtype: runs the forward pass under autocast to this dtype.
        update: False counts the optimizer's state as it is and leaves out its step, so that the weights stay.

    Raises:
        ValueError: the model has no parameters, or parameters on several devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        raise ValueError(f"model: its parameters lie on {len(devices)} devices; give a model on one device.")
    device = devices.pop()
    compute_loss = compute_loss or (lambda model, batch: model(**batch).loss)

    def step() -> None:
        with torch.autocast(device.type, dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = compute_loss(model, batch)
        loss.backward()
        del loss
        if optimizer is not None and update:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    model.zero_grad(set_to_none=True)
    try:
        if optimizer is not None and update and not optimizer.state:
            step()
        peak = _allocator_peak(step, device) if device.type == "cuda" else None
        with _observed(model, batch, optimizer, device) as account:
            step()
    finally:
        model.zero_grad(set_to_none=True)
    moments = account.moments
    if device.type == "cuda" and (size := _cublas_workspaces(device)):
        moments = [(moment, {**parts, LIBRARIES: size}) for moment, parts in moments]
    moment, parts = moments[FACTORS.index(1.0)]
    return Ledger(parts, moment, peak, tuple(moments))


def _allocator_peak(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def _cublas_workspaces(device: torch.device) -> int:
    """Bytes of the allocator that cuBLAS holds for its products. Frees them; the next product takes them again."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated(device)


def _scale(parts: Mapping[str, int], factor: float) -> dict[str, int]:
    return {name: size if name in FIXED else round(size * factor) for name, size in parts.items()}


class _Account:
    """Bytes alive by part, and their snapshots at the peaks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._alive: dict[int, tuple[weakref.ref, str, int]] = {}  # by the storage's address: reference, part, bytes
        self._sizes: Counter[str] = Counter()
        self._totals = [0, 0]  # bytes that scale with the batch, and bytes that do not
        self._peaks = [-1.0] * len(FACTORS)
        self.moments: list[tuple[str, dict[str, int]]] = [("forward", {})] * len(FACTORS)
        self.optimizing = False

    def part(self, tensor: torch.Tensor) -> str | None:
        """The part that a tensor's storage is counted in, None where it is not counted."""
        found = self._alive.get(tensor.untyped_storage()._cdata)
        return None if found is None else found[1]

    def count(self, tensor: torch.Tensor, part: str) -> None:
        """Counts a tensor's storage in a part, or moves it there."""
        if tensor.device != self._device or tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if size == 0:
            return
        if key in self._alive:
            self._forget(key)
        reference = weakref.ref(storage, lambda _: self._forget(key))
        self._alive[key] = (reference, part, size)
        self._sizes[part] += size
        self._totals[part in FIXED] += size
        scaling, fixed = self._totals
        for i, factor in enumerate(FACTORS):
            if factor * scaling + fixed > self._peaks[i]:
                self._peaks[i] = factor * scaling + fixed
                self.moments[i] = (self._moment(), {name: self._sizes[name] for name in PARTS if self._sizes[name]})

    def stop(self) -> None:
        """Forgets all storages, and with them the weak references and their callbacks."""
        self._alive.clear()

    def _forget(self, key: int) -> None:
        if key not in self._alive:  # stopped
            return
        _, part, size = self._alive.pop(key)
        self._sizes[part] -= size
        self._totals[part in FIXED] -= size

    def _moment(self) -> str:
        if self.optimizing:
            return "optimizer step"
        return "forward" if torch._C._current_graph_task_id() == -1 else "backward"


class _EveryTensor(TorchDispatchMode):
    """Counts what operations make as workspace, until it turns out to be something else."""

    def __init__(self, account: _Account) -> None:
        super().__init__()
        self._account = account

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        account = self._account
        part = OPTIMIZER_WORKSPACE if account.optimizing else WORKSPACE
        if func is torch.ops.aten._to_copy.default and account.part(args[0]) == WEIGHTS:
            part = WEIGHT_COPIES
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and account.part(tensor) is None:
                account.count(tensor, part)
        return out


class _Running:
    """Which modules are running, and hence which part a tensor saved now belongs to."""

    def __init__(self, model: nn.Module, account: _Account) -> None:
        self._account = account
        self._stack: list[tuple[nn.Module, str]] = []  # with the part of what each saves itself
        self._mask: torch.Tensor | None = None
        self._parts = {module: _part_of(model, name) for name, module in model.named_modules()}

    def hook(self, handles: contextlib.ExitStack) -> None:
        for module in self._parts:
            for handle in (
                module.register_forward_pre_hook(self._enter, with_kwargs=True),
                module.register_forward_hook(self._leave, always_call=True),
            ):
                handles.callback(handle.remove)

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._stack.append((module, self._parts[module]))
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            self._mask = mask
            if self._account.part(mask) == WORKSPACE:
                self._account.count(mask, MASKS)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        # A forward that raises may leave modules on the stack whose hooks did not run.
        while self._stack and self._stack.pop()[0] is not module:
            pass
        if not self._stack:
            self._mask = None

    def part_saving(self, tensor: torch.Tensor) -> str:
        part = self._stack[-1][1] if self._stack else LOGITS
        return MASKS if part == ATTENTION and self._is_mask(tensor) else part

    def _is_mask(self, tensor: torch.Tensor) -> bool:
        mask = self._mask
        if mask is None or tensor.ndim != 4:
            return False
        if tensor.untyped_storage()._cdata == mask.untyped_storage()._cdata:
            return True
        for_all_heads = tensor.shape[1] == 1 or tensor.stride(1) == 0
        return for_all_heads and tensor.shape[-2:] == mask.shape[-2:]


def _part_of(model: nn.Module, name: str) -> str:
    """The part of the module called `name` within `model`; see `measure_step` for the rule."""
    if not name:
        return LOGITS
    if "norm" in type(model.get_submodule(name)).__name__.lower():
        return NORMS
    names = name.split(".")
    around = [type(model.get_submodule(".".join(names[: i + 1]))).__name__ for i in range(len(names))]
    for part, pattern in _NAMES.items():
        if any(pattern.search(text) for text in (*names, *around)):
            return part
    return OTHER


@contextlib.contextmanager
def _observed(
    model: nn.Module, batch: Any, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> Iterator[_Account]:
    """Accounts for all that happens within the block."""
    account = _Account(device)
    running = _Running(model, account)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if account.part(tensor) in (None, WORKSPACE):
            account.count(tensor, running.part_saving(tensor))
        return tensor

    def optimizing(value: bool) -> Callable:
        def hook(*_: object) -> None:
            account.optimizing = value

        return hook

    for tensor in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
        if isinstance(tensor, torch.Tensor):
            account.count(tensor, INPUTS)
    for tensor in (*model.parameters(), *model.buffers()):
        account.count(tensor, WEIGHTS)
    with contextlib.ExitStack() as handles:
        handles.callback(account.stop)
        if optimizer is not None:
            for tensor in tree_leaves(list(optimizer.state.values())):
                if isinstance(tensor, torch.Tensor):
                    account.count(tensor, OPTIMIZER)
            handles.callback(optimizer.register_step_pre_hook(optimizing(True)).remove)
            handles.callback(optimizer.register_step_post_hook(optimizing(False)).remove)
        for parameter in model.parameters():
            if parameter.requires_grad:
                handle = parameter.register_post_accumulate_grad_hook(lambda p: account.count(p.grad, GRADIENTS))
                handles.callback(handle.remove)
        running.hook(handles)
        handles.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
        handles.enter_context(_EveryTensor(account))
        yield account
