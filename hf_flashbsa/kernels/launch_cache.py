"""Kernel launches that cost the host little: what was launched before is launched again, with other addresses.

At every launch Triton inspects all arguments to find the kernel that it compiled for such arguments, which takes
several times as long as the launch itself. Its answer, like all arguments but the addresses, follows from what
`_signature` lists. The layers of a model make the same call over and over: what a call launched is kept by its
signature and repeated.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
from collections.abc import Callable, Hashable, Iterator
from operator import itemgetter

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, make_tensordesc_arg
from triton.compiler import CompiledKernel
from triton.runtime import driver

from hf_flashbsa.kernels import tuning
from hf_flashbsa.kernels.backends import is_launching, note_forward

Tensors = tuple[torch.Tensor | None, ...]

logger = logging.getLogger(__name__)

#: Calls whose launches are kept. A training step needs about ten for each shape of its batches.
MAX_LAUNCHES = 256
#: Descriptors kept. A layer needs fifteen, and the next training step the same ones: torch's allocator gives the same
#: addresses again.
MAX_DESCRIPTORS = 8192
#: Releases of Triton whose `JITFunction.run` launches a compiled kernel as `Launches.run` does, whose `CudaLauncher`
#: does no more than `_call_of` says and copies what it gets, and whose Gluon the Hopper kernels are written in.
KNOWN_TRITON = ("3.6", "3.7")


def is_known_triton() -> bool:
    """Whether this release is one that was tested for what Triton does not promise to keep."""
    return ".".join(triton.__version__.split(".")[:2]) in KNOWN_TRITON


_caches = is_known_triton()
if not _caches:
    known = " and ".join(KNOWN_TRITON)
    logger.info("every launch goes through Triton's JIT: launches are repeated with %s only", known)


class Recorder:
    """Launches kernels the ordinary way, `recorder(kernel, grid, *arguments, **options)`, and remembers how.

    Its `with` block is for the launches of one call. `inputs` and `outputs` are aliases of the call's tensors: one
    tensor may stand in two places, and Triton wants bytes where torch has bool. `ran` names the kernels that computed
    a forward pass. Within `launches_nothing` it compiles what it would launch, and fills the outputs with zeros.
    """

    def __init__(self, inputs: Tensors, outputs: Tensors, keep: Callable[[Launches], None] | None = None) -> None:
        tensors = [
            None if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x.detach()
            for x in (*inputs, *outputs)
        ]
        self.tensors = tensors
        self.inputs, self.outputs = tensors[: len(inputs)], tensors[len(inputs) :]
        self.launched: list[tuple] = []
        self.ran: str | None = None
        self._keep, self._device = keep, inputs[0].get_device()
        self._device_guard = contextlib.nullcontext()

    def __enter__(self) -> Recorder:
        if self._device >= 0 and self._device != driver.active.get_current_device():  # where Triton launches
            self._device_guard = torch.cuda.device(self._device)
        self._device_guard.__enter__()
        return self

    def __call__(self, kernel, grid: tuple[int, ...], *arguments, **options) -> None:
        options["enable_fp_fusion"] = True  # Triton 3.10 will not fuse products and sums unless told to
        if not is_launching():
            kernel.warmup(*arguments, grid=grid, **options)
            return
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter gives None
            arguments += tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        self.launched.append((compiled, (*grid, 1, 1)[:3], arguments))

    def __exit__(self, kind, *exception) -> None:
        self._device_guard.__exit__(kind, *exception)
        if kind is not None:
            return
        if self.ran is not None:
            note_forward(self.ran)
        if not is_launching():
            for x in self.outputs:
                if x is not None:
                    x.zero_()
        elif self._keep is not None and all(isinstance(compiled, CompiledKernel) for compiled, _, _ in self.launched):
            self._keep(Launches(self))


#: Placeholders for what is known at launch: the stream, the metadata that Triton gives hooks, and the hooks.
_STREAM, _METADATA, _ENTER, _LEAVE = _RUNTIME = tuple(object() for _ in range(4))


class Launches:
    """What a `Recorder` launched, without the tensors.

    Arguments are picked from one list of values: the tensors' addresses, what `_RUNTIME` stands for, then the
    constants. Descriptors, and tuples of more than constants, have their places among the constants and are filled in
    for each run.
    """

    def __init__(self, recorder: Recorder):
        self._ran = recorder.ran
        changing = (*recorder.tensors, *_RUNTIME)
        places = {id(x): place for place, x in enumerate(changing) if x is not None}
        self._metadata = places[id(_METADATA)]
        self._constants: list = []
        self._descriptors: list[tuple[int, _Redescribed, int]] = []
        self._tuples: list[tuple[int, Callable]] = []

        def place_of(argument) -> int:
            if id(argument) in places:
                return places[id(argument)]
            if isinstance(argument, torch.Tensor):
                raise LookupError(
                    "a kernel got a tensor that `launch_cached` was not given; give it, or the view of it."
                )
            place = places[id(argument)] = len(changing) + len(self._constants)
            self._constants.append(argument if _is_constant(argument) else None)
            if hasattr(argument, "base"):
                self._descriptors.append((place, _Redescribed(argument), place_of(argument.base)))
            elif not _is_constant(argument):
                self._tuples.append((place, _picker(tuple(map(place_of, argument)))))  # after those that it holds
            return place

        # All calls are alive until each has its places, which go by identity.
        calls = [_call_of(*launched) for launched in recorder.launched]
        self._calls = [
            (kernel, grid, function, _picker(tuple(map(place_of, arguments))))
            for (kernel, grid, _), (function, arguments) in zip(recorder.launched, calls, strict=True)
        ]

    def run(self, addresses: list[int | None], device: int) -> None:
        """Launches on the current stream of `device`, which must be the current device."""
        stream = driver.active.get_current_stream(device)
        enter, leave = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
        values = [*addresses, stream, None, enter, leave, *self._constants]
        for place, like, base in self._descriptors:
            values[place] = _described(like, values[base])
        for place, pick in self._tuples:
            values[place] = pick(values)
        for kernel, grid, function, pick in self._calls:
            if enter is not None or leave is not None:  # a kernel may have its arguments told too; none here does
                values[self._metadata] = kernel.launch_metadata(grid, stream)
            function(*pick(values))
        if self._ran is not None:
            note_forward(self._ran)


def _is_constant(argument) -> bool:
    if isinstance(argument, tuple):
        return all(map(_is_constant, argument))
    return not (isinstance(argument, torch.Tensor) or hasattr(argument, "base") or argument in _RUNTIME)


def _call_of(kernel: CompiledKernel, grid: tuple[int, ...], arguments: tuple) -> tuple[Callable, tuple]:
    """A function that launches `kernel`, and its arguments, with `_RUNTIME` for what is known when it is called.

    Unless the kernel wants scratch memory, `CudaLauncher` only adds to its arguments what is the same each time and
    passes them to its `launch`. A copy with another `launch` tells what they are.
    """
    arguments = (*grid, _STREAM, kernel.function, kernel.packed_metadata, _METADATA, _ENTER, _LEAVE, *arguments)
    run = kernel.run
    adds_more = not isinstance(run, CudaLauncher) or getattr(run, "gsan_enabled", False)  # a sanitizer of Triton 3.8
    if adds_more or run.global_scratch_size or run.profile_scratch_size:
        return run, arguments
    called: list[tuple] = []
    probe = copy.copy(run)
    probe.launch = lambda *passed: called.append(passed)
    probe(*arguments)
    # For a kernel with descriptors, `launch` is a closure that encodes them and calls the function in C. Should a
    # release have another one, it is called with descriptors in Triton's form.
    wrapper = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
    if not {"launcher", "tensordesc_meta"} <= wrapper.keys():
        return run.launch, called[0]
    return wrapper["launcher"], _encoded(called[0], iter(wrapper["tensordesc_meta"]))


def _encoded(arguments: tuple, metadata: Iterator[dict | None]) -> tuple:
    """What Triton makes of `arguments` for the function in C, but for `_Encoded` instead of encoded descriptors."""
    made: list = []
    for x in arguments:
        if isinstance(x, tuple):
            made.append(_encoded(x, metadata))
        elif hasattr(x, "base"):
            of = next(metadata)
            first, *sizes = _tensordesc_arg(x, of)
            made += first if of is None else _Encoded(x, of), *sizes
        else:
            made.append(x)
    return tuple(made)


#: Arguments of `make_tensordesc_arg` beyond the descriptor and its metadata, which Triton 3.8 added and ignores.
_IGNORED = (None,) * (len(inspect.signature(make_tensordesc_arg).parameters) - 2)


def _tensordesc_arg(descriptor, metadata: dict | None) -> list:
    return make_tensordesc_arg(descriptor, metadata, *_IGNORED)


def _picker(places: tuple[int, ...]) -> Callable:
    """Gives the values at `places` of a list, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


class _Address(int):
    """What stands for a tensor in a descriptor."""

    def data_ptr(self) -> int:
        return self


class _Encoded:
    """Stands for `descriptor` as the GPU reads it. `metadata` is what Triton knows of the kernel's argument."""

    def __init__(self, descriptor, metadata: dict):
        self.base, self.descriptor, self.metadata = descriptor.base, descriptor, metadata


class _Redescribed:
    """Makes descriptors, in Triton's form or encoded, like `like` but of what begins at another address."""

    def __init__(self, like):
        self._metadata = None
        if isinstance(like, _Encoded):
            like, self._metadata = like.descriptor, like.metadata
        self._class = type(like)
        self._fields = {name: value for name, value in vars(like).items() if name != "base"}

    def at(self, address: int):
        made = object.__new__(self._class)  # the checks of its constructor hold for the address too
        made.__dict__ = {**self._fields, "base": _Address(address)}
        return made if self._metadata is None else _tensordesc_arg(made, self._metadata)[0]


@functools.lru_cache(MAX_DESCRIPTORS)
def _described(like: _Redescribed, address: int):
    """Kept, because nothing else decides what it is, and launches copy it."""
    return like.at(address)


def _hook(hook):
    """An empty chain of hooks is as good as none, and costs more."""
    return hook if getattr(hook, "calls", True) else None


def launch_cached(kind: Hashable, inputs: Tensors, outputs: Tensors, scalars: tuple) -> Recorder | None:
    """Launches once more what a call like this one launched before. Where there was none, the `Recorder` to launch by:

    ```python
    recorder = launch_cached(...)
    if recorder is not None:
        with recorder:
            recorder(kernel, grid, *arguments, **options)
    ```

    The block launches kernels and does nothing else to the device. Their arguments are numbers, None, tensors of
    `recorder.inputs` and `recorder.outputs`, tuples of those, and TMA descriptors of whole tensors. All of it follows
    from `kind`, `configs`, `scalars`, and the tensors' shapes, strides, dtypes, device and addresses modulo 16.

    Args:
        kind: which block it is.
        inputs: all on the device to run on. None stands for no tensor.
        outputs: what the caller made for the kernels to fill. Their shapes, strides, dtypes and device must be the
            same whenever inputs and `scalars` are alike.
        scalars: hashable numbers and strings, each always of the same type, or None.
    """
    device = inputs[0].get_device()
    if device < 0 or not _caches:  # on the CPU, Triton's interpreter
        return Recorder(inputs, outputs)
    addresses = [None if x is None else x.data_ptr() for x in (*inputs, *outputs)]
    hook = knobs.runtime.add_stages_inspection_hook
    settings = tuning.overrides(), knobs.runtime.debug, knobs.compilation.instrumentation_mode, hook
    known = _launches_of((kind, scalars, settings, device, *_signature(inputs, addresses)))
    if not known:
        return Recorder(inputs, outputs, known.append if hook is None else None)
    if device == driver.active.get_current_device():  # where Triton launches
        known[0].run(addresses, device)
    else:
        with torch.cuda.device(device):
            known[0].run(addresses, device)
    return None


def _signature(inputs: Tensors, addresses: list[int | None]) -> list:
    """All of the tensors that Triton's choice of a kernel and our launchers' arguments depend on."""
    features = [None if address is None else address % 16 for address in addresses]
    for x in inputs:
        if x is not None:
            features += x.dtype, x.shape, x.stride()
    return features


@functools.lru_cache(MAX_LAUNCHES)
def _launches_of(signature: tuple) -> list[Launches]:
    """Holds what calls of a signature launch, once that is known."""
    return []
