"""The clock of a GPU: what is asked of CuPy, by a stand-in that notes it, and that CuPy has it."""

from __future__ import annotations

import contextlib
import math
import sys
import types

import numpy as np
import pytest
from conftest import on_a_gpu, software_arch

from bench import grids
from bench.bench_softmax import rounded
from bench.timing import ceilings, device, harness, measure

L2 = 120 << 20  # bytes


class Event:
    def __init__(self, log):
        self.log, self.stream = log, None

    def record(self, stream):
        self.stream = stream
        self.log.append("record")

    def synchronize(self):
        self.log.append("synchronize event")


class Stream(contextlib.nullcontext):
    pass


@pytest.fixture
def cupy(monkeypatch):
    log = []

    class Evicted:
        def __init__(self, shape, dtype):
            self.nbytes = shape * np.dtype(dtype).itemsize

        def max(self):
            log.append(("read", self.nbytes))

    module = types.ModuleType("cupy")
    module.log, module.zeros, module.float32, module.int64 = log, Evicted, np.float32, np.int64
    module.RawKernel = lambda code, name: lambda *arguments: log.append((name, *arguments))
    gpu = types.SimpleNamespace(id=0, synchronize=lambda: log.append("synchronize"))
    module.cuda = types.SimpleNamespace(
        Stream=lambda non_blocking: Stream(),
        Event=lambda: Event(log),
        Device=lambda: gpu,
        get_elapsed_time=lambda start, end: 2.5,
        runtime=types.SimpleNamespace(getDeviceProperties=lambda number: {"l2CacheSize": L2}),
    )
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_a_flush_reads_four_times_the_cache(cupy):
    found = device.CudaDevice()
    cupy.log.clear()
    found.flush()
    ((what, size),) = cupy.log
    assert what == "read"
    assert size >= 4 * L2


def test_a_delay_is_in_cycles_and_bounded(cupy):
    found = device.CudaDevice()
    cupy.log.clear()
    found.delay(1e-3)
    found.delay(1e3)
    cycles = [int(arguments[0]) for _, _, _, arguments in cupy.log]
    assert cycles == [int(1e-3 * device.CLOCK_HZ), int(device.LONGEST_DELAY * device.CLOCK_HZ)]


def test_time_is_between_events_on_the_stream_of_the_work(cupy):
    found = device.CudaDevice()
    start, end = found.mark(), found.mark()
    assert start.stream is end.stream is found.stream
    cupy.log.clear()
    assert found.seconds(start, end) == pytest.approx(2.5e-3)  # CUDA gives milliseconds
    assert cupy.log == ["synchronize event"]  # the second one: it must have happened


class Clock:
    """A device whose work takes as long as it says."""

    def __init__(self):
        self.now = 0.0

    def delay(self, seconds):
        self.now += seconds

    def synchronize(self):
        pass

    def mark(self):
        return self.now

    def seconds(self, start, end):
        return end - start

    def run(self, seconds):
        def way():
            self.now += seconds

        return way


def test_a_ceiling_is_the_fastest_way_that_works():
    clock = Clock()

    def broken():
        raise TypeError("no such dtype")

    ways = [("slow", clock.run(4e-3)), ("fast", clock.run(2e-3)), ("broken", broken)]
    found = ceilings._best(clock, ways, "B/s", 100, "100 B")
    assert (found["work"], found["formula"], found["unit"]) == (100, "100 B, by fast", "B/s")
    assert found["samples"] == pytest.approx([2e-3] * ceilings.ROUNDS)
    assert ceilings._best(clock, [("broken", broken)], "B/s", 100, "") is None


@pytest.fixture
def patient(monkeypatch):
    """The software device takes a thousand times longer: as few calls as show the way."""
    if software_arch():
        monkeypatch.setattr(harness, "SHORT", math.inf)
        monkeypatch.setattr(harness, "SAMPLE", 1e6)
        monkeypatch.setattr(harness, "MOST_CALLS", 2)
        monkeypatch.setattr(harness, "ROUNDS", (2, 2))
        monkeypatch.setattr(device.CudaDevice, "flush", lambda self: self._evict[:1000].max())


@on_a_gpu
@pytest.mark.parametrize(
    ("operation", "dtype", "k"),
    [
        ("softmax", "float32", ()),
        ("softmax", "bfloat16", ()),
        ("top_k", "float32", (("k", 5),)),
        ("softmax_topk", "float32", (("k", 5),)),
    ],
)
@pytest.mark.usefixtures("patient")
def test_a_cell_on_a_gpu(backend, operation, dtype, k):
    """The whole of the harness on the real thing: a short call, and every peer that is there."""
    gpu, slower = device.CudaDevice(), math.inf if software_arch() else 1
    with gpu.current():
        start = gpu.mark()
        gpu.delay(1e-3)
        assert 1e-3 <= gpu.seconds(start, gpu.mark()) < 5e-3 * slower
    grid = "paper-topk" if operation == "softmax_topk" else "small"  # with the paper's kernels
    cell = grids.Cell(operation, grid, dtype, (("rows", 32), ("cols", 1000), *k), 1)
    ours, *peers = measure.measure_cell(cell, measure.operations()[operation], gpu)["contestants"]
    assert (ours["status"], ours["clock"]) == ("ok", "graph")
    assert len(ours["cold"]) == len(ours["warm"]) >= harness.ROUNDS[0]
    assert 0 < min(ours["cold"]) < 1e-3 * slower
    assert [peer["name"] for peer in peers if peer["status"] in ("wrong", "failed")] == []


def test_the_installed_cupy_has_what_is_used():
    cupy = pytest.importorskip("cupy")
    for owner, names in {
        cupy: "RawKernel zeros random get_default_memory_pool copyto matmul",
        cupy.cuda: "Stream Event Device get_elapsed_time",
        cupy.cuda.Stream: "begin_capture end_capture synchronize",
        cupy.cuda.Event: "record synchronize",
        cupy.cuda.Device: "synchronize",
        cupy.cuda.MemoryPointer: "copy_from_device_async",
        cupy.cuda.runtime: "memGetInfo getDeviceProperties runtimeGetVersion deviceSynchronize",
        cupy.random.Generator: "standard_normal",
        cupy.get_default_memory_pool(): "free_all_blocks",
    }.items():
        missing = [name for name in names.split() if not hasattr(owner, name)]
        assert missing == [], owner


def test_bfloat16_is_rounded_to_nearest_even(rng):
    draw = rng.standard_normal(100_000, np.float32)
    draw[:4] = np.array([0x3F808000, 0x3F818000, 0x3F818001, 0xBF817FFF], np.uint32).view("f4")
    assert (rounded(draw) == draw.astype(rounded(draw).dtype)).all()


def test_the_delay_compiles():
    pytest.importorskip("cupy")
    from cupy.cuda import nvrtc

    try:
        program = nvrtc.createProgram(device.DELAY, "delay.cu", (), ())
    except RuntimeError as error:
        pytest.skip(f"no NVRTC: {error}")
    nvrtc.compileProgram(program, ("-arch=sm_90",))
    ptx = nvrtc.getPTX(program)
    assert "%clock64" in (ptx.decode() if isinstance(ptx, bytes) else ptx)
