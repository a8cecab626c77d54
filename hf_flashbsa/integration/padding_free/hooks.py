"""Padding-free execution: the layers of a model see one row of live tokens instead of a padded batch.

Hooks on the model's own modules do it. Before a stack's forward the padding masks are measured; before each of its
layers whatever is still padded is packed; behind the stack its hidden states are restored, with zeros at padding. So
embeddings, heads, losses, labels and the data pipeline stay as they are, and norms, projections, feed-forward layers
and dropout run on live tokens only. A layer's packing travels with its attention mask, so that layers may be skipped,
or computed again by gradient checkpointing.

The number of live tokens sizes the packed tensors. Reading it waits for the device, once in a forward of the model
for all its masks together, unless the caller gives it as `num_live_tokens`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_flashbsa.integration.hook_args import HookArgs, takes
from hf_flashbsa.integration.mask_function import MaskSpec
from hf_flashbsa.integration.names import DENSE, SPARSE
from hf_flashbsa.integration.padding_free.forward_pass import ForwardPass, current_pass, current_plan, enter, leave
from hf_flashbsa.integration.padding_free.graphs import GRAPHS, GraphPass, StackGraphs
from hf_flashbsa.integration.padding_free.layer_stacks import LayerStack, declared_classes, declared_stack, stack_of
from hf_flashbsa.integration.padding_free.live_tokens import HINT, is_padding, measure, packing_of
from hf_flashbsa.integration.padding_free.packed_mask import PackedMask
from hf_flashbsa.integration.padding_free.packing import Packing

_HANDLES = "_padding_free_handles"


def enable_padding_free(model: nn.Module, cuda_graphs: bool = False) -> None:
    """Lets the layers of a model skip padding, until `disable_padding_free`.

    Loss and gradients are those of the padded model up to rounding; dropout draws other numbers. Hidden states and
    logits at padding have no meaning: hidden states are zero there.

    A forward is packed where its 2-D `attention_mask` (or `decoder_attention_mask`) has padding, on any side or
    between tokens, and where no key-value cache is in play: neither a cache that is given nor `use_cache=True`. Where
    `use_cache` is left to the config, models in training mode make no cache, and models in evaluation mode follow the
    config and stay padded where it asks for a cache. Generation with a cache is not affected.

    Encoder-decoder models that get `labels` and no `decoder_attention_mask` treat what lies behind a row's last
    label as padding of the targets.

    To avoid the wait for the device, pass `num_live_tokens` to the model: the sum of its attention mask, or for
    encoder-decoder models the pair of sums of `attention_mask` and `decoder_attention_mask` (or of the target tokens
    up to each row's last label). The masks must then have no dead tokens between live ones. The device checks both.

    Args:
        model: a model with `attn_implementation="bsa_dense"` or `"bsa_sparse"`, or any module around one (heads,
            adapters, `DistributedDataParallel`). Already enabled parts stay as they are. Call it before the first
            forward of a compiled model.
        cuda_graphs: whether training passes replay CUDA graphs of the layers, so that small batches do not wait for
            Python. They are captured for a few numbers of tokens, each at its second batch. Loss and gradients are
            the same; dropout draws other numbers. A backward pass must follow each forward pass before the next one.
            Passes that graphs cannot serve run without, which is logged once with the reason; see
            `cuda_graph_counts`.

    Raises:
        ValueError: no part of the model declares a layer stack (see `register_layer_stack`), or it uses another
            attention implementation.
    """
    _install(model, cuda_graphs)


def disable_padding_free(model: nn.Module) -> None:
    """Ends what `enable_padding_free` began, for all parts of the model."""
    _remove(list(model.modules()))


@contextlib.contextmanager
def padding_free(model: nn.Module, cuda_graphs: bool = False) -> Iterator[None]:
    """`enable_padding_free` for the length of a `with` block; parts that were enabled before stay so.

    Under gradient checkpointing the backward pass belongs inside the block.
    """
    installed = _install(model, cuda_graphs)
    try:
        yield
    finally:
        _remove(installed)


def _install(model: nn.Module, cuda_graphs: bool) -> list[nn.Module]:
    """Adds the hooks where they are missing. Returns the modules that got some."""
    stacks = {name: module for name, module in model.named_modules() if declared_stack(module) is not None}
    if not stacks:
        raise ValueError(_unknown(model))
    for stack in stacks.values():
        _check_implementation(stack)
    installed: list[nn.Module] = []
    for name, module in model.named_modules():
        if hasattr(module, _HANDLES):
            continue
        if name in stacks:
            declared = stack_of(module)
            added = {layer: [_before(layer, _enter_layer)] for layer in module.get_submodule(declared.layers)}
            if declared.restores_at:
                end = module.get_submodule(declared.restores_at)
                added[end] = [end.register_forward_hook(_restore)]
            added[module] = [_before(module, _enter_stack), module.register_forward_hook(_leave, always_call=True)]
            if cuda_graphs:
                graphs = StackGraphs(module, module.get_submodule(declared.layers))
                graphs.install()
                added[module].append(graphs)
        elif takes(module, "attention_mask") and any(_is_inside(stack, name) for stack in stacks):
            # Before the hooks of others: a fused loss takes away the labels.
            ends = module.register_forward_hook(_leave, always_call=True)
            added = {module: [_before(module, _enter_model, prepend=True), ends]}
        else:
            continue
        for hooked, handles in added.items():
            setattr(hooked, _HANDLES, handles)
        installed += added
    return installed


def _before(module: nn.Module, hook: Callable, prepend: bool = False) -> RemovableHandle:
    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=prepend)


def _remove(modules: list[nn.Module]) -> None:
    for module in modules:
        for handle in module.__dict__.pop(_HANDLES, ()):
            handle.remove()


def _is_inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _check_implementation(stack: nn.Module) -> None:
    implementation = stack.config._attn_implementation
    if implementation not in (DENSE, SPARSE):
        raise ValueError(
            f"padding_free: {type(stack).__name__} runs attn_implementation={implementation!r}, which cannot attend "
            f"within packed rows; load the model with attn_implementation={DENSE!r} or {SPARSE!r}."
        )


def _unknown(model: nn.Module) -> str:
    """The error for a model without declared stacks, naming a class that looks like one."""
    name = type(model).__name__
    looks = next(
        (
            (type(module).__name__, child_name)
            for module in model.modules()
            for child_name, child in module.named_children()
            if isinstance(child, nn.ModuleList) and len({type(layer) for layer in child}) == 1
        ),
        (name, "layers"),
    )
    return (
        f"padding_free: {name} has no layer stack that is known ({', '.join(declared_classes())}). Declare its own: "
        f"hf_flashbsa.register_layer_stack({looks[0]}, hf_flashbsa.LayerStack(layers={looks[1]!r})), see LayerStack."
    )


# Models


@torch.compiler.disable
def _enter_model(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of the modules around stacks: measures their padding masks together."""
    call = HookArgs(module, args, kwargs)
    _measure(enter(module), module, call, cached=_has_cache(call) or bool(call.get("use_cache")))
    return call.result()


def _has_cache(call: HookArgs) -> bool:
    """Whether a key-value cache is given, by any of the names that Transformers has had for it."""
    return any(call.get(name) is not None for name in ("cache", "past_key_values", "cache_params"))


def _measure(forward: ForwardPass, module: nn.Module, call: HookArgs, cached: bool) -> None:
    """Measures the padding masks of a call, unless a cache rules out packing."""
    totals = call.kwargs.pop(HINT, None)
    if cached:
        return
    if takes(module, "decoder_attention_mask") and call.get("decoder_attention_mask") is None:
        labels = call.get("labels")
        targets = call.get("decoder_input_ids")
        if labels is not None and labels.ndim == 2 and (targets is None or targets.shape == labels.shape):
            call.set("decoder_attention_mask", _live_targets(labels))
    names = ("attention_mask", "decoder_attention_mask", "encoder_attention_mask")
    measure(forward, [mask for name in names if is_padding(mask := call.get(name))], totals)


def _live_targets(labels: torch.Tensor) -> torch.Tensor:
    """int64 `(B, T)`, 1 up to a row's last label: behind it no target token can change the loss."""
    return (labels != -100).flip(1).cumsum(1).flip(1).clamp(max=1)


# Stacks and layers


@dataclasses.dataclass(eq=False)
class _Plan:
    """How one forward of a stack is packed.

    Args:
        stack: the module.
        rows: how its own tokens are packed; None where it runs padded.
        graph_pass: how its layers run as CUDA graphs; None where they do not.
    """

    stack: nn.Module
    rows: Packing | None = None
    graph_pass: GraphPass | None = None
    _packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = dataclasses.field(default_factory=dict)

    def pack_per_token(self, x: torch.Tensor, rows: Packing) -> torch.Tensor:
        """A tensor with an entry for each token, packed; kept for the next layer unless gradients flow through it."""
        if x.requires_grad:
            return rows.pack(x)
        if id(x) not in self._packed:
            self._packed[id(x)] = (x, rows.pack(x))  # holds x, so that its id stays its own
        return self._packed[id(x)][1]


@torch.compiler.disable
def _enter_stack(stack: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook of a stack: decides how it is packed, and packs the other stack's states for all layers."""
    call = HookArgs(stack, args, kwargs)
    _check_implementation(stack)
    plan = _Plan(stack)
    forward = enter(stack, plan)
    cached = _uses_cache(stack, call)
    _measure(forward, stack, call, cached)
    tokens = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
    if cached or tokens is None:
        return call.result()
    mask, memory, memory_mask = (
        call.get(name) for name in ("attention_mask", "encoder_hidden_states", "encoder_attention_mask")
    )
    if any(m is not None and not is_padding(m) for m in (mask, memory_mask)):  # it belongs to the padded batch
        return call.result()
    rows = packing_of(forward, mask, tokens.device)
    memory_rows = None if memory is None else packing_of(forward, memory_mask, tokens.device)
    packings = [r for r in (rows, memory_rows) if r is not None]
    graphs = stack.__dict__.get(GRAPHS)
    for_graphs = graphs is not None and stack.training and torch.is_grad_enabled()
    if not (packings or for_graphs) or any(r.total == 0 for r in packings):  # nothing to skip, or nothing left
        return call.result()
    # Where one side is packed, the other is too: layers project both with one batch size.
    rows = rows or Packing.full(tokens.shape[0], tokens.shape[1], tokens.device)
    if not rows.is_padded(tokens):
        raise ValueError(
            f"padding_free: attention_mask is {tuple(mask.shape)} for tokens {tuple(tokens.shape[:2])}; "
            "give a mask with an entry for each token."
        )
    if memory is not None:
        memory_rows = memory_rows or Packing.full(memory.shape[0], memory.shape[1], tokens.device)
        call.set("encoder_hidden_states", _pack_states(forward, memory, memory_rows))
        call.set("encoder_attention_mask", PackedMask.of_cross_attention(rows, memory_rows, tokens.device))
    if takes(stack, "use_cache"):
        call.set("use_cache", False)
    plan.rows = rows
    if graphs is not None:
        plan.graph_pass = graphs.begin(rows, memory_rows)
    return call.result()


def _uses_cache(stack: nn.Module, call: HookArgs) -> bool:
    if _has_cache(call):
        return True
    if not takes(stack, "use_cache"):
        return False
    asked = call.get("use_cache")
    return not stack.training and stack_of(stack).makes_cache(stack) if asked is None else bool(asked)


def _pack_states(forward: ForwardPass, states: torch.Tensor, rows: Packing) -> torch.Tensor:
    made_of, version, packed = forward.packed_states.get(states, (None, None, None))
    return packed if made_of is rows and version == states._version else rows.pack(states)


@torch.compiler.disable
def _enter_layer(layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Forward pre-hook of a layer: packs what is still padded."""
    call = HookArgs(layer, args, kwargs)
    mask = call.get("attention_mask")
    # The mask remembers the plan for the second forward of gradient checkpointing, when the stack has been left.
    plan = mask.derived("plan", (), current_plan) if isinstance(mask, MaskSpec) else current_plan()
    if plan is None or plan.rows is None:
        return None
    if not isinstance(mask, MaskSpec):
        what = "no attention_mask" if mask is None else "an attention_mask that its model computed on"
        raise ValueError(f"padding_free: {type(layer).__name__} got {what}; its stack cannot be packed.")
    rows, declared = plan.rows, stack_of(plan.stack)
    states = next(iter(call.names))
    _check_per_token(layer, call, rows, declared, states)
    hidden = call.get(states)
    if not rows.is_packed(hidden):
        if not rows.is_padded(hidden):
            raise ValueError(
                f"padding_free: {type(layer).__name__} got {tuple(hidden.shape)}, neither padded nor packed."
            )
        call.set(states, rows.pack(hidden))
    packed = mask.derived("packed", (), lambda: PackedMask.of_self_attention(mask, rows, declared.bias_by_distance))
    call.set("attention_mask", packed)
    for name in declared.per_token:
        value = call.get(name)
        if isinstance(value, (tuple, list)):
            call.set(name, type(value)(plan.pack_per_token(x, rows) for x in value))
        elif value is not None:
            call.set(name, plan.pack_per_token(value, rows))
    if declared.prepare is not None:
        declared.prepare(layer, call, rows)
    return call.result()


def _check_per_token(layer: nn.Module, call: HookArgs, rows: Packing, declared: LayerStack, states: str) -> None:
    """Raises where an argument that looks like one entry for each token is not declared to be one."""
    known = {states, "encoder_hidden_states", *declared.per_token, *declared.shared}
    for name, value in call.items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        for x in values:
            if (
                name not in known
                and isinstance(x, torch.Tensor)
                and x.ndim >= 2
                and x.shape[0] in (1, rows.batch)
                and x.shape[1] == rows.length
            ):
                raise ValueError(
                    f"padding_free: argument {name!r} of {type(layer).__name__}, {tuple(x.shape)}, seems to hold an "
                    "entry for each token; name it in LayerStack.per_token, or in LayerStack.shared if it does not."
                )


def _restored(value: Any, rows: Packing, done: dict[int, tuple]) -> Any:
    """The output of a stack with all that has an entry for each token padded again.

    That is `(1, T, ...)`, hidden states, and `(T, ...)`, the flattened tokens of a router, wherever they lie in tuples
    and dicts. `done` keeps equal tensors one tensor, and holds what it saw, so that ids stay their own.
    """
    if isinstance(value, torch.Tensor):
        if id(value) not in done:
            done[id(value)] = (value, _restored_tensor(value, rows))
        return done[id(value)][1]
    if isinstance(value, dict):
        for key in list(value):
            value[key] = _restored(value[key], rows, done)
        return value
    if isinstance(value, (tuple, list)):
        restored = [_restored(x, rows, done) for x in value]
        return type(value)(*restored) if hasattr(value, "_fields") else type(value)(restored)
    return value


def _restored_tensor(x: torch.Tensor, rows: Packing) -> torch.Tensor:
    if x.ndim < 2 or rows.is_padded(x):
        return x
    if not rows.is_packed(x):
        return rows.unpack(x[None]).flatten(0, 1) if x.shape[0] == rows.total else x
    padded = rows.unpack(x)
    forward = current_pass()
    if padded.requires_grad and forward is not None:
        forward.packed_states[padded] = (rows, padded._version, x)
    return padded


@torch.compiler.disable
def _restore(module: nn.Module, args: tuple, output: Any) -> Any:
    plan = current_plan()
    return output if plan is None or plan.rows is None else _restored(output, plan.rows, {})


@torch.compiler.disable
def _leave(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of stacks and of the modules around them, also called where their forward raised."""
    plan = leave(module)
    if plan is None or plan.rows is None:
        return None
    if plan.graph_pass is not None:
        plan.graph_pass.end()
    return _restored(output, plan.rows, {})
