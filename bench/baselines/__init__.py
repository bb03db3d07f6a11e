"""The ladder of Milakov & Gimelshein (arXiv:1805.02867) as plain CUDA C, to measure cuattn against.

CuPy arrays run on the current device and stream, without waiting for it; NumPy arrays run on the
emulator in ``tests/emulator``. Arrays are C-contiguous float32 matrices; a row is one softmax.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench import inside  # also makes `import emulator` find tests/emulator

__all__ = [
    "MAX_K",
    "Emulated",
    "TopK",
    "emulated",
    "naive_softmax",
    "online_softmax",
    "online_softmax_topk",
    "safe_softmax",
    "safe_softmax_topk",
]

INCLUDE = Path(__file__).resolve().parent.parent  # of <baselines/...>
THREADS = 256  # kThreads of baselines/primitives/row.cuh
MAX_K = 10  # a list is registers, and merging two compiles to k * k steps


class TopK(NamedTuple):
    """The k largest probabilities of each row, largest first, and their columns (int32)."""

    values: Any
    indices: Any


@dataclasses.dataclass
class Emulated:
    """The emulated device: its architecture, the seed of its schedule, and what ran there."""

    arch: str = "sm_90"
    seed: int = 0
    counters: list[Any] = dataclasses.field(default_factory=list)  # Counters, one per launch


_device = Emulated()


@contextlib.contextmanager
def emulated(arch: str = "sm_90", seed: int = 0) -> Iterator[Emulated]:
    """Where NumPy arrays run while the context lasts; counts what that costs."""
    global _device
    previous, _device = _device, Emulated(arch, seed)
    try:
        yield _device
    finally:
        _device = previous


# ---- The baselines ----


def naive_softmax(x: Any) -> Any:
    """Algorithm 1: no maximum is subtracted, so that large elements overflow."""
    return _softmax("naive_softmax", x)


def safe_softmax(x: Any) -> Any:
    """Algorithm 2: a pass for the maximum, a pass for the sum, a pass that writes."""
    return _softmax("safe_softmax", x)


def online_softmax(x: Any) -> Any:
    """Algorithm 3: a pass for maximum and sum together, a pass that writes."""
    return _softmax("online_softmax", x)


def safe_softmax_topk(x: Any, k: int) -> TopK:
    """Algorithm 2, and then a kernel that reads its result for the k largest of each row."""
    k = _checked_k(x, k)
    return _topk("topk", safe_softmax(x), k)


def online_softmax_topk(x: Any, k: int) -> TopK:
    """Algorithm 4: maximum, sum and the k largest elements, all in one pass."""
    k = _checked_k(x, k)
    return _topk("online_softmax_topk", x, k)


def _softmax(name: str, x: Any) -> Any:
    _check(x)
    y = _empty(x, x.shape, np.float32)
    _launch(name, name, x, y)
    return y


def _topk(name: str, x: Any, k: int) -> TopK:
    shape = (x.shape[0], k)
    result = TopK(_empty(x, shape, np.float32), _empty(x, shape, np.int32))
    _launch(name, f"{name}<{k}>", x, *result)
    return result


def _check(x: Any) -> None:
    cupy = sys.modules.get("cupy")
    if not isinstance(x, np.ndarray) and not (cupy and isinstance(x, cupy.ndarray)):
        raise TypeError(f"x must be a NumPy or CuPy array, but it is {type(x).__name__}")
    if x.dtype != np.float32:
        raise TypeError(f"x must be float32, but it is {x.dtype}")
    if x.ndim != 2 or not x.flags.c_contiguous:
        raise ValueError(f"x must be a C-contiguous matrix, but its shape is {x.shape}")


def _checked_k(x: Any, k: int) -> int:
    _check(x)
    k = operator.index(k)
    if not 1 <= k <= min(x.shape[1], MAX_K):
        raise ValueError(f"k must be 1 to {MAX_K} and at most {x.shape[1]} columns, but it is {k}")
    if x.shape[1] >= 2**31:
        raise ValueError(f"x must have fewer than 2**31 columns, but it has {x.shape[1]}")
    return k


# ---- Launching ----


def _empty(x: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array where `x` is."""
    if isinstance(x, np.ndarray):
        import emulator

        return emulator.empty(shape, dtype)
    import cupy

    return cupy.empty(shape, dtype)


def _launch(file: str, name: str, x: Any, y: Any, index: Any = None) -> None:
    """Run kernel `name` of ``baselines/<file>.cuh``, one block per row."""
    rows, cols = x.shape
    if rows == 0:
        return
    header, on_host = f"baselines/{file}.cuh", isinstance(x, np.ndarray)
    arrays = (x, y, index)
    addresses = [0 if array is None else _address(array, on_host) for array in arrays]
    params = np.array([*addresses, cols], np.uint64)  # RowParams of baselines/primitives/row.cuh
    if on_host:
        import emulator

        counters = emulator.launch_source(
            f"#include <{header}>",
            name,
            rows,
            THREADS,
            params.tobytes(),
            (x,),
            arrays[1:],
            arch=_device.arch,
            seed=_device.seed,
            include_dirs=(INCLUDE,),
        )
        _device.counters.append(counters)
    else:
        import cupy

        function = _gpu_function(header, name, cupy.cuda.runtime.getDevice())
        function((rows,), (THREADS,), (params.view(f"V{params.nbytes}"),))


def _address(array: Any, on_host: bool) -> int:
    if on_host:
        import emulator

        return emulator.address(array)
    return array.data.ptr


@functools.cache
def _gpu_function(header: str, name: str, device: int) -> Any:
    """The kernel, compiled for the current device and loaded there."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(device)
    arch = inside.architecture(10 * properties["major"] + properties["minor"])
    cubin, _ = inside.compile_kernel(header, name, arch, options=(f"-I{INCLUDE}",))
    module = cupy.cuda.function.Module()
    module.load(cubin)
    return module.get_function(inside.kernel_symbol(cubin))
