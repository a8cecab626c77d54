"""Launches repeated from a plan: which calls share one, and what their kernels get."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from noted_launches import Kernel, addressed
from triton import knobs, runtime
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import LazyDict
from triton.runtime import _allocation
from triton.tools.tensor_descriptor import TensorDescriptor

from hf_flashbsa.kernels import launch_cache, tuning
from hf_flashbsa.kernels.backends import take_forward
from hf_flashbsa.kernels.launch_cache import MAX_DESCRIPTORS, MAX_LAUNCHES, Recorder, launch_cached


def record(recorder: Recorder, body, params: tuple) -> None:
    with recorder:
        body(recorder, recorder.inputs, recorder.outputs, params)


def replay(body, inputs: tuple, outputs: tuple, params: tuple) -> None:
    """Launches as back ends do: from the cache, or by `body`."""
    recorder = launch_cached(body, inputs, outputs, params)
    if recorder is not None:
        record(recorder, body, params)


@contextmanager
def pretended_gpu(current: int = 0):
    """Within, tensors lie on GPU 0 for `launch_cached`, and the current device is `current`, with stream 7."""
    driver = SimpleNamespace(get_current_device=lambda: current, get_current_stream=lambda device: 7)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch_cache, "driver", SimpleNamespace(active=driver)))
        stack.enter_context(mock.patch.object(torch.Tensor, "get_device", lambda self: 0))
        yield


@pytest.fixture(autouse=True)
def gpu():
    launch_cache._launches_of.cache_clear()
    launch_cache._described.cache_clear()
    with pretended_gpu():
        yield
    launch_cache._launches_of.cache_clear()


@pytest.fixture
def kernel():
    return Kernel()


def caller(kernel: Kernel):
    """`body` of a call that launches `kernel` once, with two tensors."""

    def body(run, inputs, outputs, params):
        (x, *_), (y, *_) = inputs, outputs
        run(kernel, (x.shape[0], 2), x, (y, 5, None), params[0], SIZE=x.shape[-1], num_warps=4)

    return body


def test_a_repeated_call_is_launched_without_asking_triton(kernel):
    body, tensors = caller(kernel), [torch.zeros(3, 8) for _ in range(8)]
    for x, y in itertools.pairwise(tensors):
        replay(body, (x,), (y,), (0.5,))
    assert kernel.asked == 1
    assert kernel.launches == [
        ("kernel", (3, 2, 1), 7, (x.data_ptr(), (y.data_ptr(), 5, None), 0.5, 8))
        for x, y in itertools.pairwise(tensors)
    ]


def test_one_tensor_in_two_places_is_told_apart_later(kernel):
    body, x, y = caller(kernel), torch.zeros(3, 8), torch.zeros(3, 8)
    replay(body, (x,), (x,), (1,))
    replay(body, (x,), (y,), (1,))
    assert kernel.asked == 1
    assert [arguments[:2] for *_, arguments in kernel.launches] == [
        (x.data_ptr(), (x.data_ptr(), 5, None)),
        (x.data_ptr(), (y.data_ptr(), 5, None)),
    ]


def test_descriptors_are_made_anew(kernel):
    def body(run, inputs, outputs, params):
        run(kernel, (1,), TensorDescriptor.from_tensor(inputs[0], [2, 8]), tuple(outputs), 1, SIZE=8, num_warps=4)

    tensors = [torch.zeros(4, 8) for _ in range(4)]
    for x, y in (tensors[:2], tensors[2:]):
        replay(body, (x,), (y,), ())
    assert kernel.asked == 1
    assert [arguments[:2] for *_, arguments in kernel.launches] == [
        (("descriptor", x.data_ptr(), (4, 8), (8, 1), (2, 8)), (y.data_ptr(),)) for x, y in (tensors[:2], tensors[2:])
    ]


@pytest.mark.parametrize("scratch", [0, 32], ids=["", "scratch memory"])
def test_what_is_launched_without_triton_s_launcher(scratch, monkeypatch):
    """The function in C gets what `CudaLauncher` would pass on; kernels that need scratch memory keep that."""
    passed, allocated = [], []
    launcher = object.__new__(CudaLauncher)  # its constructor wants a compiled kernel and a driver
    vars(launcher).update(
        launch=lambda *arguments: passed.append(arguments),
        num_ctas=1, global_scratch_size=scratch, global_scratch_align=16, profile_scratch_size=0,
        profile_scratch_align=1, launch_cooperative_grid=False, launch_pdl=True, arg_annotations=["some"],
        kernel_signature=b"signature",
    )  # fmt: skip
    through_triton = []
    monkeypatch.setattr(CudaLauncher, "__call__", _noting(CudaLauncher.__call__, through_triton))

    def allocate(*arguments):
        allocated.append(arguments)
        return SPACE

    monkeypatch.setattr(_allocation, "_allocator", SimpleNamespace(get=lambda: allocate))
    kernel, tensors = Kernel(launcher), [torch.zeros(3, 8) for _ in range(4)]
    body = caller(kernel)
    for x, y in (tensors[:2], tensors[:2], tensors[2:]):
        replay(body, (x,), (y,), (0.5,))
    assert kernel.asked == 1
    first, again, other = map(addressed, passed)
    assert first == again
    address = {a.data_ptr(): b.data_ptr() for a, b in zip(tensors[:2], tensors[2:], strict=True)}
    assert other == replaced(first, address) != first
    assert allocated == [(32 * 6, 16, 7)] * (3 if scratch else 0)
    # Without scratch memory: the first launch, and the one that shows what to pass.
    assert len(through_triton) == (3 if scratch else 2)


class Utilities:
    """What Triton's driver gives its launchers: here, encoding a descriptor counts and gives its arguments."""

    def __init__(self):
        self.encoded = 0

    def fill_tma_descriptor(self, *arguments):
        self.encoded += 1
        return "encoded", arguments

    fill_tma_descriptor_tiled = fill_tma_descriptor  # since Triton 3.7


@pytest.fixture
def utilities(monkeypatch) -> Utilities:
    made = Utilities()
    monkeypatch.setattr(runtime.driver, "_active", SimpleNamespace(utils=made))
    return made


#: What the compiler says of a kernel's argument that is a descriptor, or None where it reads it from memory.
ENCODED = {"swizzle": 3, "elem_size": 4, "elem_type": 7, "block_size": [2, 8], "fp4_padded": False}


def launcher_of_descriptors(metadata: dict | None, passed: list) -> CudaLauncher:
    """Triton's launcher of a kernel with a descriptor and a tuple, which notes what the function in C gets."""
    launcher = object.__new__(CudaLauncher)
    signature = {"first": "tensordesc<fp32[2, 8]>", "pair": ("*fp32",), "number": "i32", "SIZE": "constexpr"}
    vars(launcher).update(
        launch=wrap_handle_tensordesc(lambda *arguments: passed.append(arguments), signature, [metadata]),
        num_ctas=1, global_scratch_size=0, global_scratch_align=1, profile_scratch_size=0, profile_scratch_align=1,
        launch_cooperative_grid=False, launch_pdl=False, arg_annotations=["some"], kernel_signature=b"signature",
    )  # fmt: skip
    return launcher


def launch_described(run, inputs, outputs, params) -> None:
    (kernel,) = params
    run(kernel, (1,), TensorDescriptor.from_tensor(inputs[0], [2, 8]), tuple(outputs), 5, SIZE=8, num_warps=4)


@pytest.mark.parametrize("metadata", [ENCODED, None], ids=["encoded", "in memory"])
def test_descriptors_are_encoded_once_for_each_address(metadata, utilities):
    """The function in C gets what Triton's own launcher would pass it."""
    passed, wanted, counts = [], [], []
    kernel, asked = (Kernel(launcher_of_descriptors(metadata, calls)) for calls in (passed, wanted))
    calls = [((torch.zeros(4, 8),), (torch.zeros(4, 8),)) for _ in range(3)]
    replay(launch_described, *calls[0], (kernel,))
    for _ in range(2):
        before = utilities.encoded
        for tensors in calls:
            replay(launch_described, *tensors, (kernel,))
        counts.append(utilities.encoded - before)
    for tensors in (calls[0], *calls, *calls):
        record(Recorder(*tensors), launch_described, (asked,))
    assert counts == ([0, 0] if metadata is None else [3, 0])
    assert kernel.asked == 1
    assert addressed(passed) == addressed(wanted)


def test_no_more_descriptors_than_a_bound_are_kept(utilities):
    kernel, y = Kernel(launcher_of_descriptors(ENCODED, [])), torch.zeros(1)
    space = torch.zeros(4 * MAX_DESCRIPTORS + 400)
    for start in range(0, 4 * (MAX_DESCRIPTORS + 20), 4):
        replay(launch_described, (space[start:][:32].view(4, 8),), (y,), (kernel,))
    assert kernel.asked == 1
    assert launch_cache._described.cache_info().currsize == MAX_DESCRIPTORS


def test_a_launcher_that_is_not_known_gets_descriptors(utilities):
    """Triton's own would get them so too, and encode them."""
    passed: list = []
    launcher = launcher_of_descriptors(ENCODED, passed)
    launcher.launch = lambda *arguments: passed.append(arguments)
    kernel, x, y = Kernel(launcher), torch.zeros(4, 8), torch.zeros(1)
    for _ in range(2):
        replay(launch_described, (x,), (y,), (kernel,))
    first, again = map(addressed, passed)
    assert first == again and "descriptor" in repr(first)
    assert (kernel.asked, utilities.encoded) == (1, 0)


def _noting(function, calls: list):
    def noted(*arguments):
        calls.append(arguments)
        return function(*arguments)

    return noted


def replaced(argument, values: dict):
    if isinstance(argument, (tuple, list)):
        return type(argument)(replaced(x, values) for x in argument)
    return values.get(argument, argument)


@contextmanager
def other_device():
    with (
        mock.patch.object(torch.Tensor, "get_device", lambda self: 1),
        mock.patch.object(launch_cache.driver.active, "get_current_device", lambda: 1),
    ):
        yield


SPACE = torch.zeros(4096)
PLAIN = {"x": SPACE[:64].view(8, 8), "y": SPACE[64:128].view(8, 8), "params": (16,), "within": None}
#: Calls that must not share a plan with PLAIN.
DIFFERENT = {
    "shape": {"x": SPACE[:56].view(7, 8)},
    "strides": {"x": SPACE[:128].view(8, 16)[:, :8]},
    "order": {"x": SPACE[:64].view(8, 8).t()},
    "a size of 1": {"x": SPACE[:8].view(1, 8)},
    "dtype": {"x": SPACE[:64].view(8, 8).view(torch.int32)},
    "half as wide": {"x": SPACE[:32].view(torch.bfloat16).view(8, 8)},
    "address": {"x": SPACE[1:65].view(8, 8)},
    "address of the output": {"y": SPACE[66:130].view(8, 8)},
    "no output": {"y": None},
    "one tensor more": {"more": SPACE[:1]},
    "number": {"params": (17,)},
    "number of 1": {"params": (1,)},
    "number beyond 32 bits": {"params": (1 << 33,)},
    "device": {"within": other_device},
    "override": {"within": lambda: tuning.override("forward", tuning.Config(64, 64, 4, 2))},
    "debug": {"within": lambda: mock.patch.object(knobs.runtime, "debug", True)},
    "instrumentation": {"within": lambda: mock.patch.object(knobs.compilation, "instrumentation_mode", "proton")},
}


@pytest.mark.parametrize("change", DIFFERENT.values(), ids=DIFFERENT)
def test_what_tells_calls_apart(change, kernel):
    body = caller(kernel)

    def call(x, y, params, within, more=None):
        with ExitStack() as stack:
            if within is not None:
                stack.enter_context(within())
            replay(body, (x,) if more is None else (x, more), (y,), params)

    for options in (PLAIN, PLAIN | change, PLAIN, PLAIN | change):
        call(**options)
    assert kernel.asked == 2


def test_addresses_that_are_equal_modulo_16_share_a_plan(kernel):
    body = caller(kernel)
    for start in (0, 4, 400):
        replay(body, (SPACE[start:][:64].view(8, 8),), (PLAIN["y"],), (16,))
    assert kernel.asked == 1


def test_bool_goes_to_triton_as_bytes(kernel):
    seen = []

    def body(run, inputs, outputs, params):
        seen.append(outputs[0].dtype)
        caller(kernel)(run, inputs, outputs, params)

    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    for x in mask:
        replay(body, (PLAIN["x"],), (x,), (1,))
    assert seen == [torch.uint8]
    assert [arguments[1][0] for *_, arguments in kernel.launches] == [x.data_ptr() for x in mask]


def test_no_more_than_a_bound_is_kept(kernel):
    body = caller(kernel)
    for number in range(MAX_LAUNCHES + 20):
        replay(body, (PLAIN["x"],), (PLAIN["y"],), (number,))
    assert launch_cache._launches_of.cache_info().currsize == MAX_LAUNCHES
    replay(body, (PLAIN["x"],), (PLAIN["y"],), (MAX_LAUNCHES + 19,))
    assert kernel.asked == MAX_LAUNCHES + 20
    replay(body, (PLAIN["x"],), (PLAIN["y"],), (0,))
    assert kernel.asked == MAX_LAUNCHES + 21


def test_plans_keep_no_memory_alive(kernel):
    memory = [np.zeros((8, 8)) for _ in range(2)]
    freed = [weakref.ref(array) for array in memory]
    replay(caller(kernel), *((torch.from_numpy(array),) for array in memory), (1,))
    del memory
    gc.collect()
    assert [array() for array in freed] == [None, None]


@pytest.mark.parametrize("names", [("enter",), ("exit",), ("enter", "exit")], ids=" and ".join)
def test_triton_hooks_see_repeated_launches(names, kernel):
    body, seen = caller(kernel), []
    replay(body, (PLAIN["x"],), (PLAIN["y"],), (1,))
    with ExitStack() as stack:
        for name in names:
            chain = stack.enter_context(mock.patch.object(knobs.runtime, f"launch_{name}_hook", knobs.HookChain()))
            chain.add(lambda metadata, name=name: seen.append((name, metadata.get())))
        replay(body, (PLAIN["x"],), (PLAIN["y"],), (1,))
    assert kernel.asked == 1
    assert seen == [(name, {"name": "kernel", "function": "function of kernel", "stream": 7}) for name in names]


def test_the_function_in_c_calls_triton_hooks(utilities):
    passed: list = []
    kernel, tensors = Kernel(launcher_of_descriptors(ENCODED, passed)), ((torch.zeros(4, 8),), (torch.zeros(1),))
    replay(launch_described, *tensors, (kernel,))
    chain = knobs.HookChain()
    chain.add(print)
    for hook in (None, chain, None):
        with mock.patch.object(knobs.runtime, "launch_enter_hook", hook):
            replay(launch_described, *tensors, (kernel,))
    assert kernel.asked == 1
    _, before, during, after = passed
    assert before == after != during
    told = [x for x, y in zip(during, before, strict=True) if x != y]
    assert [x.get() if isinstance(x, LazyDict) else x for x in told] == [
        {"name": "kernel", "function": "function of kernel", "stream": 7},
        chain,
    ]


def test_launches_from_the_cache_say_what_ran(kernel):
    def launch() -> None:
        recorder = launch_cached("forward", (PLAIN["x"],), (PLAIN["y"],), (1,))
        if recorder is not None:
            with recorder:
                caller(kernel)(recorder, recorder.inputs, recorder.outputs, (1,))
                recorder.ran = "gluon_sm90"

    for _ in range(2):
        launch()
        assert take_forward() == "gluon_sm90"
    assert kernel.asked == 1


def test_an_inspected_compilation_is_not_kept(kernel):
    with mock.patch.object(knobs.runtime, "add_stages_inspection_hook", lambda: ("key", "hash")):
        for _ in range(3):
            replay(caller(kernel), (PLAIN["x"],), (PLAIN["y"],), (1,))
    assert kernel.asked == 3


def test_the_interpreter_and_unknown_releases_of_triton_keep_nothing(kernel, monkeypatch):
    body = caller(kernel)
    with mock.patch.object(torch.Tensor, "get_device", lambda self: -1):
        for _ in range(2):
            replay(body, (PLAIN["x"],), (PLAIN["y"],), (1,))
    monkeypatch.setattr(launch_cache, "_caches", False)
    for _ in range(2):
        replay(body, (PLAIN["x"],), (PLAIN["y"],), (1,))
    assert kernel.asked == 4
    assert launch_cache._launches_of.cache_info().currsize == 0


def test_the_device_of_the_tensors_becomes_the_current_one(kernel):
    entered = []

    @contextmanager
    def device(index):
        entered.append(index)
        with pretended_gpu(current=index):
            yield

    with pretended_gpu(current=1), mock.patch.object(torch.cuda, "device", device):
        replay(caller(kernel), (PLAIN["x"],), (PLAIN["y"],), (1,))
    assert entered == [0]
    assert kernel.asked == 1


def test_a_tensor_that_was_not_handed_over_is_an_error(kernel):
    def body(run, inputs, outputs, params):
        run(kernel, (1,), inputs[0], (outputs[0][1:], 1), 2, SIZE=8, num_warps=4)

    with pytest.raises(LookupError, match="`launch_cached` was not given"):
        replay(body, (PLAIN["x"],), (PLAIN["y"],), (1,))


def test_threads_do_not_mix_their_addresses(kernel):
    body = caller(kernel)
    pairs = [[(torch.zeros(3, 8), torch.zeros(3, 8)) for _ in range(50)] for _ in range(8)]
    barrier = threading.Barrier(len(pairs))

    def work(mine):
        barrier.wait()
        for x, y in mine:
            replay(body, (x,), (y,), (1,))

    threads = [threading.Thread(target=work, args=(mine,)) for mine in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    got = {(first, second) for *_, (first, (second, _, _), _, _) in kernel.launches}
    assert len(kernel.launches) == 400
    assert got == {(x.data_ptr(), y.data_ptr()) for x, y in itertools.chain(*pairs)}
    assert kernel.asked <= len(pairs)
