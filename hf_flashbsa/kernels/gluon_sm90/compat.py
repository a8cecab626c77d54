"""Gluon's names in each release of Triton, 3.6 to 3.9; nothing else here depends on the release."""

from __future__ import annotations

from triton._C.libtriton import ir
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

#: bar.sync of the threads of this partition; `thread_barrier` before 3.7.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier
#: TMA copies; `async_copy_global_to_shared` and `async_copy_shared_to_global` before 3.8.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def tma_reduce_add(descriptor, begin, tile, _semantic=None):
    """TMA reduce-add of a shared-memory tile to global memory, of which Gluon before 3.8 has the op but no wrapper."""
    begin = _semantic._convert_to_ir_values(begin, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, descriptor.handle, begin, tile.handle)


@builtin
def reinterpret(tile, dtype, shape, layout, _semantic=None):
    """A shared-memory tile as one of another type, shape and layout; a private method before 3.9."""
    view = getattr(tile, "reinterpret", None) or tile._reinterpret
    return view(dtype, shape, layout, _semantic=_semantic)
