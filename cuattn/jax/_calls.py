"""One call of a function of cuattn in a traced program: what is static of it, and running it."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback

from cuattn._arrays.interchange import HOST
from cuattn._attention import attention, backward
from cuattn._softmax import backward as softmax_backward
from cuattn._softmax import logsumexp, softmax
from cuattn._topk import topk

Arrays = dict[str, Any]
Spec = tuple[tuple[int, ...], Any]  # shape and dtype


class Call(NamedTuple):
    """What is static of a call."""

    function: str  # a key of FUNCTIONS
    options: tuple[tuple[str, Any], ...]
    results: tuple[Spec, ...]

    def having(self, **options: Any) -> Call:
        """The call with other options."""
        return self._replace(options=tuple((dict(self.options) | options).items()))


# What computes arrays of NumPy and CuPy, and which of its arguments are given by position.
GRADIENT = "grad", "y"
FUNCTIONS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "softmax": (softmax.softmax, ("x",)),
    "log_softmax": (softmax.log_softmax, ("x",)),
    "softmax_backward": (softmax_backward.softmax_backward, GRADIENT),
    "log_softmax_backward": (softmax_backward.log_softmax_backward, GRADIENT),
    "logsumexp": (logsumexp.logsumexp, ("x",)),
    "top_k": (topk.top_k, ("x", "k")),
    "softmax_topk": (topk.softmax_topk, ("x", "k")),
    "attention": (attention.attention, ("q", "k", "v")),
    "attention_backward": (backward.attention_backward, ("grad", "q", "k", "v", "y", "lse")),
}


def launch(call: Call, arrays: Arrays) -> list[Any]:
    """The results of a call, computed when the program comes to it.

    Without 64 bits in JAX an int64 comes as two words of 32 bits, the low one first.
    """
    narrow = not jax.config.jax_enable_x64
    words = [narrow and dtype == np.int64 for _, dtype in call.results]
    outs = [
        jax.ShapeDtypeStruct((*shape, 2) if two else shape, np.int32 if two else dtype)
        for two, (shape, dtype) in zip(words, call.results, strict=True)
    ]
    found = buffer_callback(functools.partial(_run, call), outs)(**arrays)
    found = varying(dict(enumerate(found)), arrays).values()
    return [array[..., 0] if two else array for two, array in zip(words, found, strict=True)]


def varying(arrays: dict[Any, Any], like: dict[Any, Any]) -> dict[Any, Any]:
    """Arrays that in `jax.shard_map` may differ from device to device where one of `like` does.

    JAX does not know that of what a callback returns. And an array that all devices share has the
    sum of their gradients. A choice between an array and itself is as varying as what decides it.
    """
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return arrays
    decides = [array.ravel()[0] == 0 for array in like.values() if array.size]
    decision = functools.reduce(jnp.logical_or, decides, jnp.zeros((), bool))
    return {name: jnp.where(decision, array, array) for name, array in arrays.items()}


def _run(call: Call, context: Any, outs: Sequence[Any], **buffers: Any) -> None:
    """The callback: the function, from and into buffers of XLA."""
    function, places = FUNCTIONS[call.function]
    with _current(context, outs[0]):
        given = dict(call.options) | {name: _view(buffer) for name, buffer in buffers.items()}
        out = [
            view if view.dtype == dtype else view.view(dtype)[..., 0]
            for view, (_, dtype) in zip(map(_view, outs), call.results, strict=True)
        ]
        first = [given.pop(name) for name in places]
        if call.function != "attention_backward":
            function(*first, **given, out=out[0] if len(out) == 1 else tuple(out))
            return
        large = 3 + given["return_dbias"]  # which `out` has
        found = function(*first, **given, out=tuple(out[:large]))
        for target in out[large:]:
            target[...] = found.dalibi_slopes


def _view(buffer: Any) -> Any:
    """A buffer as an array of NumPy or CuPy, on the same memory."""
    kind, device = buffer.__dlpack_device__()
    if kind in HOST:
        return np.asarray(buffer)
    import cupy

    if 0 in buffer.shape:  # it may have no address
        return cupy.empty(buffer.shape, buffer.dtype)
    # Its DLPack says of inputs that they are read-only, its interface has no bfloat16.
    address, _ = buffer.__cuda_array_interface__["data"]
    size = math.prod(buffer.shape) * buffer.dtype.itemsize
    memory = cupy.cuda.UnownedMemory(address, size, buffer, device)
    return cupy.ndarray(buffer.shape, buffer.dtype, cupy.cuda.MemoryPointer(memory, 0))


@contextlib.contextmanager
def _current(context: Any, buffer: Any) -> Iterator[None]:
    """XLA's stream of this execution, on the device of a buffer, as CuPy's current one."""
    kind, device = buffer.__dlpack_device__()
    if kind in HOST:
        yield
        return
    import cupy

    with cupy.cuda.Device(device), cupy.cuda.Stream.from_external(_Stream(context.stream)):
        yield


class _Stream:
    """A stream, as CUDA's protocol for streams shows one."""

    def __init__(self, address: int) -> None:
        self.address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.address
