"""Kernel launches that cost the host little: what was launched before is launched again, with other addresses.

At every launch Triton inspects all arguments to find the kernel that it compiled for such arguments, which takes
several times as long as the launch itself. Its answer, like all arguments but the addresses, follows from what
`_signature` lists. The layers of a model make the same call over and over: what a call launched is kept by its
signature and repeated.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from operator import itemgetter

import torch
import triton
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime import driver

from hf_flashbsa.kernels import tuning

Tensors = tuple[torch.Tensor | None, ...]

logger = logging.getLogger(__name__)

#: Plans kept. A training step needs about ten for each shape of its batches.
MAX_PLANS = 256
#: Releases of Triton whose `JITFunction.run` launches a compiled kernel as `Plan.run` does, whose `CudaLauncher` does
#: no more than `_call_of` says, and whose Gluon the Hopper kernels are written in.
KNOWN_TRITON = ("3.6", "3.7")


def is_known_triton() -> bool:
    """Whether this release is one that was tested for what Triton does not promise to keep."""
    return ".".join(triton.__version__.split(".")[:2]) in KNOWN_TRITON


_repeats = is_known_triton()
if not _repeats:
    known = " and ".join(KNOWN_TRITON)
    logger.info("every launch goes through Triton's JIT: launches are repeated with %s only", known)


class Launcher:
    """Launches kernels the ordinary way, `launcher(kernel, grid, *arguments, **options)`, and remembers how."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor | None] = []
        self.launched: list[tuple] = []

    def record(self, body: Callable, inputs: Tensors, outputs: Tensors, params: tuple) -> None:
        # Aliases, because one tensor may stand in two places. Triton wants bytes where torch has bool.
        self.tensors = [
            None if x is None else x.view(torch.uint8) if x.dtype == torch.bool else x.detach()
            for x in (*inputs, *outputs)
        ]
        body(self, self.tensors[: len(inputs)], self.tensors[len(inputs) :], params)

    def __call__(self, kernel, grid: tuple[int, ...], *arguments, **options) -> None:
        compiled = kernel[grid](*arguments, **options)
        if isinstance(compiled, CompiledKernel):  # the interpreter gives None
            arguments += tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        self.launched.append((compiled, (*grid, 1, 1)[:3], arguments))


#: What stands for the stream until it is known.
_STREAM = object()


class Plan:
    """What a `Launcher` launched, without the tensors.

    Arguments are picked from one list of values: the tensors' addresses, the stream, then the constants. Tuples and
    descriptors that hold addresses have their places among the constants and are made anew for each run.
    """

    def __init__(self, launcher: Launcher):
        places = {id(x): place for place, x in enumerate(launcher.tensors) if x is not None}
        places[id(_STREAM)] = len(launcher.tensors)
        first_constant = len(launcher.tensors) + 1
        changing = set(places.values())
        self._constants: list = []
        self._made: list[tuple[int, Callable]] = []

        def place_of(argument) -> int:
            if id(argument) in places:
                return places[id(argument)]
            if isinstance(argument, torch.Tensor):
                raise LookupError("a kernel got a tensor that `replay` was not given; give it, or the view of it.")
            place = places[id(argument)] = first_constant + len(self._constants)
            self._constants.append(argument)
            if hasattr(argument, "base"):  # a TMA descriptor, which Triton's launcher encodes anew from its address
                changing.add(place)
                self._constants[-1] = None
                self._made.append((place, _Redescribed(argument, place_of(argument.base))))
            if isinstance(argument, tuple):
                parts = tuple(map(place_of, argument))
                if not changing.isdisjoint(parts):
                    changing.add(place)
                    self._constants[place - first_constant] = None
                    self._made.append((place, _picker(parts)))
            return place

        # All calls are alive until each has its places, which go by identity.
        calls = [_call_of(*launched) for launched in launcher.launched]
        self._calls = [(function, _picker(tuple(map(place_of, arguments)))) for function, arguments in calls]
        self._launches = [
            (compiled, grid, _picker(tuple(map(place_of, arguments))))
            for compiled, grid, arguments in launcher.launched
        ]

    def run(self, addresses: list[int | None], device: int) -> None:
        """Launches on the current stream of `device`, which must be the current device."""
        stream = driver.active.get_current_stream(device)
        enter, leave = _hook(knobs.runtime.launch_enter_hook), _hook(knobs.runtime.launch_exit_hook)
        values = [*addresses, stream, *self._constants]
        for place, make in self._made:
            values[place] = make(values)
        if enter is None and leave is None:
            for function, pick in self._calls:
                function(*pick(values))
            return
        for kernel, grid, pick in self._launches:
            arguments = pick(values)
            metadata = kernel.launch_metadata(grid, stream, *arguments)
            kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, metadata, enter, leave, *arguments)


def _call_of(kernel: CompiledKernel, grid: tuple[int, ...], arguments: tuple) -> tuple[Callable, tuple]:
    """A function that launches `kernel` without hooks, and its arguments, with `_STREAM` for the stream.

    Unless the kernel wants scratch memory, `CudaLauncher` only adds to its arguments what is the same each time and
    passes them to its `launch`. A copy with another `launch` tells what they are.
    """
    arguments = (*grid, _STREAM, kernel.function, kernel.packed_metadata, None, None, None, *arguments)
    run = kernel.run
    if not isinstance(run, CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
        return run, arguments
    called: list[tuple] = []
    probe = copy.copy(run)
    probe.launch = lambda *passed: called.append(passed)
    probe(*arguments)
    return run.launch, called[0]


def _picker(places: tuple[int, ...]) -> Callable:
    """Gives the values at `places` of a list, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return lambda values: tuple(values[place] for place in places)


class _Address(int):
    """What stands for a tensor in a descriptor."""

    def data_ptr(self) -> int:
        return self


class _Redescribed:
    """Makes descriptors like `like`, of what begins at the address in `place`."""

    def __init__(self, like, place: int):
        self._class, self._place = type(like), place
        self._fields = {name: value for name, value in vars(like).items() if name != "base"}

    def __call__(self, values: list):
        made = object.__new__(self._class)  # the checks of its constructor hold for the address too
        made.__dict__ = {**self._fields, "base": _Address(values[self._place])}
        return made


def _hook(hook):
    """An empty chain of hooks is as good as none, and costs more."""
    return hook if getattr(hook, "calls", True) else None


def replay(body: Callable, inputs: Tensors, outputs: Tensors, params: tuple) -> None:
    """`body(launch, inputs, outputs, params)`; on a GPU, what it launched for a call like this one, once more.

    Args:
        body: launches kernels by `launch(kernel, grid, *arguments, **options)` and does nothing else to the device.
            Arguments are numbers, None, tensors, tuples of those, and TMA descriptors of whole tensors. All it does
            follows from `tuning`, `params`, and the tensors' shapes, strides, dtypes, device and addresses modulo 16.
            It gets the tensors as aliases, those of bool as uint8, and hands no others to kernels.
        inputs: all on the device to run on. None stands for no tensor.
        outputs: what the caller made for the kernels to fill. Their shapes, strides, dtypes and device must be the
            same whenever inputs and `params` are alike.
        params: hashable numbers and strings, each always of the same type.
    """
    device = inputs[0].get_device()
    if device >= 0 and device != driver.active.get_current_device():  # where Triton launches
        with torch.cuda.device(device):
            return replay(body, inputs, outputs, params)
    if device < 0 or not _repeats:  # on the CPU, Triton's interpreter
        return Launcher().record(body, inputs, outputs, params)
    addresses = [None if x is None else x.data_ptr() for x in (*inputs, *outputs)]
    hook = knobs.runtime.add_stages_inspection_hook
    settings = tuning.overrides(), knobs.runtime.debug, knobs.compilation.instrumentation_mode, hook
    kept = _kept((body, params, settings, device, *_signature(inputs, addresses)))
    if kept:
        return kept[0].run(addresses, device)
    launcher = Launcher()
    launcher.record(body, inputs, outputs, params)
    if hook is None and all(isinstance(compiled, CompiledKernel) for compiled, _, _ in launcher.launched):
        kept.append(Plan(launcher))


def _signature(inputs: Tensors, addresses: list[int | None]) -> list:
    """All of the tensors that Triton's choice of a kernel and our launchers' arguments depend on."""
    features = [None if address is None else address % 16 for address in addresses]
    for x in inputs:
        if x is not None:
            features += x.dtype, x.shape, x.stride()
    return features


@functools.lru_cache(MAX_PLANS)
def _kept(signature: tuple) -> list[Plan]:
    """Holds the plan for a signature once it is known."""
    return []
