"""Memory of the software device: planted faults, each named by its error or a wrong result."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import numpy as np
import pytest
from driver_kernels import (
    SEEDS,
    CUDARuntimeError,
    cupy,
    device,
    exact,
    kernels,
    pairs,
    runtime,
    zeros,
)


def test_a_write_beyond_the_end(kernels, exact):
    x = zeros(100)
    kernels.fill((2,), (50,), (x, 1, np.float32(1)))
    with pytest.raises(CUDARuntimeError, match=r"(?s)fill, block \(1, 0, 0\), thread 49\b.*st\."):
        x.get()
    kernels.fill((2,), (50,), (x, 0, np.float32(2)))  # the device is usable
    assert (x.get() == 2).all()


def test_a_write_before_the_start(kernels, exact):
    x = zeros(100)
    kernels.fill((2,), (50,), (x, -1, np.float32(1)))
    with pytest.raises(CUDARuntimeError, match=r"block \(0, 0, 0\), thread 0\b"):
        runtime.deviceSynchronize()


@pytest.mark.parametrize("again", [False, True])
def test_use_after_free(kernels, exact, again):
    x = zeros(64)
    address, memory = x.data.ptr, cupy.cuda.UnownedMemory(x.data.ptr, x.nbytes, None)
    del x
    # An address is not given out again, so that the fault cannot hide in another array.
    others = [zeros(64) for _ in range(20)] if again else []
    assert address not in [other.data.ptr for other in others]
    stale = cupy.ndarray((64,), cupy.float32, cupy.cuda.MemoryPointer(memory, 0))
    kernels.fill((1,), (64,), (stale, 0, np.float32(1)))
    words = r"write of 4 bytes .* allocation of 256 bytes that has been freed.*: kernel fill, block"
    with pytest.raises(CUDARuntimeError, match=words):
        runtime.deviceSynchronize()


def test_a_copy_from_freed_memory(exact):
    x = zeros(64)
    address = x.data.ptr
    del x
    with pytest.raises(CUDARuntimeError, match="256 bytes at .* is in an allocation .* freed"):
        runtime.memcpy(np.empty(64, np.float32).ctypes.data, address, 256, 2)


def test_a_copy_beyond_the_end(exact):
    x, y = zeros(64), zeros(65)
    with pytest.raises(CUDARuntimeError, match="4 bytes beyond the end of an allocation of 256"):
        runtime.memcpyAsync(y.data.ptr, x.data.ptr, 260, 3, 0)
    with pytest.raises(CUDARuntimeError, match="the destination of 257 bytes"):
        runtime.memsetAsync(x.data.ptr, 0, 257, 0)


def test_a_double_free():
    address = runtime.malloc(64)
    runtime.free(address)
    with pytest.raises(CUDARuntimeError, match="cannot be freed: it is in an allocation of 64"):
        runtime.free(address)
    with pytest.raises(CUDARuntimeError, match="cannot be freed: it is inside"):
        runtime.free((inside := runtime.malloc(64)) + 8)
    runtime.free(inside)


def test_what_nobody_wrote_is_nan(exact):
    assert np.isnan(cupy.empty(100, cupy.float32).get()).all()


def test_a_copy_of_what_nobody_wrote(kernels, exact):
    """What is known of each byte goes along with it; the host may look at all."""
    x, y, z = cupy.empty(64, cupy.float32), zeros(64), cupy.empty(32, cupy.float32)
    kernels.fill((1,), (32,), (x, 3, np.float32(1)))
    runtime.memcpyAsync(y.data.ptr + 4, x.data.ptr, 140, 3, 0)
    kernels.add_one((1,), (32,), (y[4:], z))
    assert (z.get() == 2).all()
    kernels.add_one((1,), (32,), (y[3:], z))
    words = "reads byte 12 of an allocation of 256 bytes, which nobody has written: kernel add_one"
    with pytest.raises(CUDARuntimeError, match=words):
        runtime.deviceSynchronize()
    runtime.memsetAsync(y.data.ptr + 4, 0, 12, 0)
    kernels.add_one((1,), (32,), (y[1:], z))
    assert (z.get()[:3] == 1).all()


def test_out_of_memory():
    with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
        cupy.empty(1 << 40, cupy.uint8)


def test_memory_in_the_order_of_a_stream(kernels):
    """Where another stream does not wait for it, it may not be there yet, or no longer."""
    outcomes = set()
    for seed in SEEDS:
        device.seed(seed)
        ours, other = pairs(2)
        address = runtime.mallocAsync(128, ours.ptr)
        memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 128, None), 0)
        array = cupy.ndarray((32,), cupy.float32, memory)
        with other:
            kernels.fill((1,), (32,), (array, 0, np.float32(1)))
        runtime.freeAsync(address, ours.ptr)
        try:
            runtime.deviceSynchronize()
            outcomes.add("right")
        except CUDARuntimeError:
            outcomes.add("error")
    assert outcomes == {"right", "error"}


def test_a_pool_in_the_order_of_streams(kernels):
    pool = cupy.cuda.MemoryAsyncPool()
    before = pool.used_bytes()
    with cupy.cuda.using_allocator(pool.malloc):
        x = zeros(100)
        assert pool.used_bytes() == before + 512  # CuPy rounds up
        kernels.fill((1,), (100,), (x, 0, np.float32(1)))
        assert (x.get() == 1).all()
        del x
    runtime.deviceSynchronize()
    assert pool.used_bytes() == before
