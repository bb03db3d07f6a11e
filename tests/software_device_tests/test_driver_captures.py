"""Captures and graphs on the software device: what is forbidden, and what is replayed."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from driver_kernels import (
    SEEDS,
    SOURCE,
    CUDADriverError,
    CUDARuntimeError,
    Stream,
    add_one,
    cupy,
    device,
    kernels,
    pairs,
    runtime,
    zeros,
)

BUFFER = np.zeros(2, np.uint64)
COPY = BUFFER.ctypes.data, BUFFER.ctypes.data + 8, 8  # to, from, bytes


@contextlib.contextmanager
def captured(stream, mode=None):
    stream.begin_capture(*(() if mode is None else (mode,)))
    with stream:
        yield
    with contextlib.suppress(CUDARuntimeError):
        stream.end_capture()


def test_a_graph_is_replayed(kernels):
    (stream,), a = pairs(1), zeros()
    with stream:
        stream.begin_capture()
        add_one(kernels, a, a)
        add_one(kernels, a, a)
        graph = stream.end_capture()
    assert (a.get() == 0).all()  # nothing has run
    for _ in range(3):
        graph.launch(stream)
    assert (a.get(stream=stream) == 6).all()


def test_memory_of_a_graph(kernels):
    (stream,), out = pairs(1), zeros()
    with stream, cupy.cuda.using_allocator(cupy.cuda.malloc_async):
        stream.begin_capture()
        temporary = cupy.empty(32, cupy.float32)
        kernels.fill((1,), (32,), (temporary, 0, np.float32(1)))
        add_one(kernels, temporary, out)
        address = temporary.data.ptr
        del temporary
        graph = stream.end_capture()
    for _ in range(2):
        graph.launch(stream)
        assert (out.get(stream=stream) == 2).all()
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(address, 128, None), 0)
    kernels.fill((1,), (32,), (cupy.ndarray((32,), np.float32, memory), 0, np.float32(1)))
    with pytest.raises(CUDARuntimeError, match="fill, block"):
        runtime.deviceSynchronize()


@pytest.mark.parametrize("joins", [False, True])
def test_a_fork_inside_a_capture(kernels, joins):
    found = set()
    for seed in SEEDS:
        (one, two), a, b = pairs(2), zeros(), zeros()
        with one:
            one.begin_capture()
            add_one(kernels, a, a)
            fork = one.record()
        two.wait_event(fork)
        with two:
            add_one(kernels, a, b)
            join = two.record()
        if not joins:
            with pytest.raises(CUDARuntimeError, match="StreamCaptureUnjoined"):
                one.end_capture()
            continue
        one.wait_event(join)
        with one:
            add_one(kernels, b, a)
            graph = one.end_capture()
        device.seed(seed)
        graph.launch(one)
        found.add(a.get(stream=one)[0])
    assert found == ({3} if joins else set())


def test_a_missing_edge_inside_a_graph(kernels):
    """The two branches may run in any order."""
    (one, two), a, found = pairs(2), zeros(), set()
    one.begin_capture()
    two.wait_event(one.record())
    with one:
        kernels.fill((1,), (32,), (a, 0, np.float32(1)))
    with two:
        kernels.fill((1,), (32,), (a, 0, np.float32(2)))
    one.wait_event(two.record())
    graph = one.end_capture()
    for seed in SEEDS:
        device.seed(seed)
        graph.launch(one)
        found.add(a.get(stream=one)[0])
    assert found == {1, 2}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda one, two, past: one.synchronize(), "cudaStreamSynchronize of a stream that is"),
        (lambda one, two, past: runtime.deviceSynchronize(), "cudaDeviceSynchronize is not allo"),
        (lambda one, two, past: one.wait_event(past), "recorded outside the capture"),
        (lambda one, two, past: runtime.memcpy(*COPY, 1), "cudaMemcpy is not allowed while a str"),
        (lambda one, two, past: one.record().synchronize(), "event that was recorded in a capture"),
    ],
)
def test_what_a_capture_forbids(kernels, call, words):
    one, two = Stream(), Stream()
    past, a = two.record(), zeros()
    with one:
        one.begin_capture()
        add_one(kernels, a, a)
    with pytest.raises((CUDARuntimeError, CUDADriverError), match=words), one:
        call(one, two, past)
    with pytest.raises(CUDARuntimeError, match="Invalidated.*" + words):
        one.end_capture()
    with one:
        add_one(kernels, a, a)  # the stream is usable
    assert (a.get() == 1).all()


@pytest.mark.parametrize("non_blocking", [False, True])
def test_the_legacy_stream_during_a_capture(kernels, non_blocking):
    stream, a, b = Stream(non_blocking=non_blocking), zeros(), zeros()
    with captured(stream):
        add_one(kernels, a, a)
        with Stream.null:
            if non_blocking:
                add_one(kernels, a, b)
            else:
                with pytest.raises(CUDADriverError, match="STREAM_CAPTURE_IMPLICIT"):
                    add_one(kernels, a, b)
    assert b.get()[0] == non_blocking


@pytest.mark.parametrize("mode", ["global", "thread_local", "relaxed"])
def test_an_allocation_during_a_capture(mode):
    modes = {"global": 0, "thread_local": 1, "relaxed": 2}
    (stream,) = pairs(1)
    with captured(stream, modes[mode]):
        if mode == "relaxed":
            runtime.free(runtime.malloc(8))
        else:
            with pytest.raises(CUDARuntimeError, match="cudaMalloc is not allowed"):
                runtime.malloc(8)


def test_the_end_of_a_capture_in_another_stream():
    one, two = pairs(2)
    one.begin_capture()
    two.wait_event(one.record())
    with pytest.raises(CUDARuntimeError, match="Unmatched"):
        two.end_capture()
    with pytest.raises(CUDARuntimeError, match="Invalidated"):
        one.end_capture()
    with pytest.raises(CUDARuntimeError, match="not being captured"):
        one.end_capture()


def test_a_graph_whose_module_is_gone(kernels):
    (stream,), a = pairs(1), zeros()
    with stream:
        module = cupy.cuda.function.Module()

        module.load(cupy.cuda.compiler.compile_using_nvrtc(SOURCE, ())[0])
        function = module.get_function("add_one")
        stream.begin_capture()
        function((1,), (32,), (a, a))
        graph = stream.end_capture()
    del function, module
    graph.launch(stream)
    with pytest.raises(CUDARuntimeError, match="kernel add_one, whose module has been unloaded"):
        stream.synchronize()


def test_an_event_of_a_capture_that_is_over():
    one, two = pairs(2)
    one.begin_capture()
    event = one.record()
    one.end_capture()
    with pytest.raises(CUDARuntimeError, match="a capture that is over"):
        two.wait_event(event)
