"""What the NumPy path is made of: blocks that stay in a core's cache, threads, and 16 bits.

The public functions run here on NumPy arrays. What is computed in is the accumulator of the
kernels: float32 for 16 bits and float32, float64 for float64. Whatever decides how a row is added
up is a property of that row: its bits depend neither on the number of rows nor on that of threads.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

BLOCK = 1 << 16  # elements that are worked on at a time: with their scratch they fit into L2
THREADED = 1 << 20  # elements of a call from which on threads share it
Slices = tuple[slice, ...]
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, ("f2", "f4", "f8"))

quiet = np.errstate(all="ignore")


# ---- Blocks ----


def pieces(shape: tuple[int, ...], size: int) -> Iterator[Slices]:
    """Slices that cut an array of this shape into pieces of at most `size` elements."""
    sliced = len(shape)
    whole = 1
    while sliced and whole * shape[sliced - 1] <= size:
        sliced -= 1
        whole *= shape[sliced]
    tail = (slice(None),) * (len(shape) - sliced)
    if not sliced:
        yield tail
        return
    step = max(size // max(whole, 1), 1)
    ends = range(0, shape[sliced - 1], step)
    outer = itertools.product(*(range(n) for n in shape[: sliced - 1]))
    for index in outer:
        for begin in ends:
            yield (*(slice(i, i + 1) for i in index), slice(begin, begin + step), *tail)


# ---- Threads ----


@functools.cache
def thread_limit() -> int:
    """Threads of a call: ``OMP_NUM_THREADS`` (its first number), else the CPUs of this process."""
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if given.isdecimal() and int(given):
        return int(given)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_here = threading.local()  # shares: a thread of the pool, which must not wait for the pool
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """The threads of a process are not in its forks."""
    global _pool, _lock
    _pool, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def each(function: Callable[..., None], blocks: Iterable[tuple[Any, ...]], elements: int) -> None:
    """``function(*block)`` of each block; by threads where the call has many `elements`.

    NumPy drops the GIL where it computes. What a block writes no other block reads or writes.
    """
    global _pool

    def run(block: tuple[Any, ...]) -> None:
        _here.shares = True
        with np.errstate(all="ignore"):
            function(*block)

    if elements < THREADED or thread_limit() == 1 or getattr(_here, "shares", False):
        with np.errstate(all="ignore"):
            for block in blocks:
                function(*block)
        return
    with _lock:
        if _pool is None:
            from concurrent.futures import ThreadPoolExecutor

            _pool = ThreadPoolExecutor(thread_limit(), "cuattn")
        futures = [_pool.submit(run, block) for block in blocks]
    for future in futures:
        future.result()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Uninitialised memory of this thread, the same at every call with this name."""
    dtype = np.dtype(dtype)
    size = dtype.itemsize * math.prod(shape)
    found = getattr(_here, name, None)
    if found is None or found.size < size:
        found = np.empty(size, np.uint8)
        setattr(_here, name, found)
    return found[:size].view(dtype).reshape(shape)


# ---- Conversions ----


def accumulator(x: np.dtype, acc: np.dtype) -> np.dtype:
    """What is computed in: `acc`, or float64 where x may have more digits than float32."""
    return acc if x == FLOAT32 or x.itemsize < 3 else FLOAT64


@functools.cache
def _halves() -> np.ndarray:
    """Every float16 as float32, in the order of their bits."""
    return np.arange(1 << 16, dtype=np.uint16).view(FLOAT16).astype(FLOAT32)


def widen(x: np.ndarray, out: np.ndarray) -> None:
    """`x` of any dtype into `out`, float32 or float64 of the same shape: exactly from 16 bits."""
    if x.ndim and x.dtype == FLOAT16 and out.dtype == FLOAT32:
        np.take(_halves(), x.view(np.uint16), out=out, mode="clip")  # NumPy converts one by one
    else:
        np.copyto(out, x, casting="unsafe")


def narrow(x: np.ndarray, out: np.ndarray) -> None:
    """`x`, float32 or float64, into `out` of any float dtype, rounded to nearest even."""
    if not x.ndim or x.dtype != FLOAT32 or out.dtype != FLOAT16:
        np.copyto(out, x, casting="unsafe")
    elif x.size > BLOCK and x.flags.c_contiguous and out.flags.c_contiguous:
        x, out = x.reshape(-1), out.reshape(-1)
        for i in range(0, x.size, BLOCK):  # its scratch stays in the cache
            narrow(x[i : i + BLOCK], out[i : i + BLOCK])
    else:
        np.copyto(out.view(np.uint16), _to_half(x), casting="unsafe")


def _to_half(x: np.ndarray) -> np.ndarray:
    """The bits of the float16 nearest to each float32.

    NumPy converts one by one, and takes 30 times as long for a subnormal result.
    """
    word = np.uint32
    bits = x.view(word)
    size, half, near = (scratch(name, x.shape, word) for name in ("size", "half", "near"))
    positive = bits.max(initial=0) < 0x477FF000  # and less than 65520, which becomes infinite
    np.bitwise_and(bits, word(0x7FFFFFFF), out=size)
    small = size < word(0x38800000)  # below 2**-14 float16 is subnormal: in units of 2**-24,
    np.minimum(size, word(0x3F800000), out=near)
    np.add(near.view(FLOAT32), np.float32(0.5), out=near.view(FLOAT32))  # as float32 at 1/2
    np.subtract(near, word(0x3F000000), out=near)
    np.right_shift(size, word(13), out=half)  # others: half a unit, less one if that is even
    np.bitwise_and(half, word(1), out=half)
    np.add(half, size, out=half)
    np.add(half, word(0xFFF), out=half)
    np.subtract(half, word(112 << 23), out=half)  # the bias of exponents is 15, not 127
    np.right_shift(half, word(13), out=half)
    if not positive:
        np.copyto(half, word(0x7C00), where=size >= word(0x477FF000))
        np.copyto(half, word(0x7E00), where=size > word(0x7F800000))  # NaN
    np.copyto(half, near, where=small)
    if not positive:
        np.right_shift(bits, word(16), out=near)
        np.bitwise_and(near, word(0x8000), out=near)
        np.bitwise_or(half, near, out=half)
    return half
