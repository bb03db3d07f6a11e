"""The workspaces of streams: none is ever too small, gone while a graph may use it, or made amid a
capture."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_jit import compiled, gpus  # noqa: F401 - fixtures

from cuattn._device.runtime import PER_THREAD, Cuda
from cuattn._device.workspace import LEAST, Workspaces


@pytest.fixture
def workspaces():
    return Workspaces(np.zeros, np.empty, least=(4, 64))


def of(workspaces, stream, counters, part_bytes, capturing=False):
    return workspaces.of(stream, "some", counters, part_bytes, lambda: capturing)


def test_sizes(workspaces):
    found = of(workspaces, 0, 3, 10)
    assert (found.counters.size, found.parts.size) == (4, 64)
    assert found.counters.dtype == np.uint32 and not found.counters.any()
    assert of(workspaces, 0, 4, 64) is found
    assert LEAST[1] == 8 << 20


def test_growth(workspaces):
    """What has room stays, as what it holds does; the rest is replaced, and lives on."""
    first = of(workspaces, 0, 1, 1)
    parts = of(workspaces, 0, 1, 65)
    assert parts.counters is first.counters and parts.parts.size == 128
    counters = of(workspaces, 0, 5, 1)
    assert counters.parts is parts.parts and counters.counters.size == 8
    assert not counters.counters.any()
    kept = [weakref.ref(array) for array in (*first, *parts, *counters)]
    del first, parts, counters
    gc.collect()
    assert all(one() is not None for one in kept)


def test_growth_byte_by_byte(workspaces):
    """As of caches that are one key longer in each step: in all hardly more than the last one."""
    made = {id(found.parts): found.parts for n in range(1, 10_000, 7)
            for found in [of(workspaces, 0, 1, n)]}  # fmt: skip
    assert sum(parts.size for parts in made.values()) < 4 * 10_000


def test_streams(workspaces):
    """No two share one: their launches run side by side."""
    one, other = of(workspaces, (0, 1), 1, 1), of(workspaces, (0, 2), 1, 1)
    assert one.counters is not other.counters and one.parts is not other.parts
    assert of(workspaces, (0, 1), 1, 1) is one


def test_capture(workspaces):
    """Memory is neither made nor cleared where that would happen at each replay."""
    words = "some must run once on this stream before it is captured"
    with pytest.raises(RuntimeError, match=words):
        of(workspaces, 0, 1, 1, capturing=True)
    found = of(workspaces, 0, 1, 1)
    assert of(workspaces, 0, 4, 64, capturing=True) is found
    for sizes in ((5, 1), (1, 65)):
        with pytest.raises(RuntimeError, match=words):
            of(workspaces, 0, *sizes, capturing=True)
    with pytest.raises(RuntimeError, match=words):
        of(workspaces, 1, 1, 1, capturing=True)
    assert of(workspaces, 0, 1, 1) is found


def test_threads():
    """Each makes the same workspace, of which there is one."""
    barrier = threading.Barrier(8)

    def slowly(shape, dtype):
        time.sleep(0.01)  # long enough for another thread to come in between
        made.append(shape)
        return np.zeros(shape, dtype)

    made = []
    workspaces = Workspaces(slowly, slowly, least=(1, 1))

    def work(_):
        barrier.wait()
        return of(workspaces, 0, 4, 4)

    with ThreadPoolExecutor(8) as pool:
        found = set(map(id, pool.map(work, range(8))))
    assert len(found) == 1 and len(made) == 2


def test_the_streams_of_a_runtime(gpus):  # noqa: F811
    """Of each device, and of each thread where all of them have one pointer."""
    runtime, stream = Cuda(), gpus.cuda.get_current_stream()

    def of_thread(pointer):
        stream.ptr = pointer
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(runtime.workspace, "some", 1, 1).result()
        return runtime.workspace("some", 1, 1), other

    for pointer in (0, 1, 1 << 40):
        one, other = of_thread(pointer)
        assert one is other
    one, other = of_thread(PER_THREAD)
    assert one is not other
    assert len(runtime.workspaces.all) == 5
    with runtime.on(1):
        assert runtime.workspace("some", 1, 1) is not one
