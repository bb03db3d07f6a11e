"""Cubin → kernel → launch, on devices that only keep a diary: needs neither CuPy nor a GPU."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import cuattn
from cuattn._arrays import interchange
from cuattn._arrays.inputs import as_array
from cuattn._device import cache, compiler, tensor_map
from cuattn._device import runtime as device_runtime
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.params import SOFTMAX_HEAD

KERNEL = Kernel("some", {"T": "float", "k": 1}, grid=3, block=64)
OTHER = Kernel("some", {"T": "float", "k": 2}, grid=5, block=32, cluster=1)


class Namespace:
    """Attributes; to ask for any other is a failure, so that nothing can synchronise unseen."""

    def __init__(self, name, **attributes):
        self.__dict__.update(attributes, name=name)

    def __getattr__(self, attribute):
        raise AssertionError(f"{self.name}.{attribute} is none of cuattn's business")


class Gpus(Namespace):
    """A module `cupy` on two devices: number 0 is an sm_80, number 1 an sm_90.

    `launches` holds (device, symbol, grid, block, args), `smem` their shared memory, `loads`
    (device, file or bytes), `attributes` (device, function, attribute, value), `asked` (device,
    function, attribute), all of which are `registers`, or `spilled` bytes, and `visits` the devices
    that were switched to.
    """

    def __init__(self):
        self.launches, self.loads, self.visits, self.allocations = [], [], [], []
        self.smem, self.attributes, self.asked = [], [], []
        self.registers = self.spilled = 0
        gpus, here, memory = self, threading.local(), iter(range(1 << 20, 1 << 40, 1 << 12))

        def current():
            return getattr(here, "device", 0)

        class ndarray:
            def __init__(self, shape, dtype, device=None):
                like = np.empty(shape, dtype)
                self.shape, self.strides, self.dtype = like.shape, like.strides, like.dtype
                self.ndim, self.size, self.itemsize = like.ndim, like.size, like.itemsize
                device = current() if device is None else device
                self.data = Namespace("data", device_id=device, ptr=next(memory))

        class Device:
            def __init__(self, device):
                self.device = device

            def __enter__(self):
                self.before, here.device = current(), self.device
                gpus.visits.append(self.device)

            def __exit__(self, *error):
                here.device = self.before

        class Function:
            def __init__(self, symbol):
                self.symbol, self.device, self.ptr = symbol, current(), f"handle of {symbol}"

            def __call__(self, grid, block, args, *, shared_mem):  # no stream: the current one
                assert self.device == current()
                gpus.launches.append((current(), self.symbol, grid, block, args))
                gpus.smem.append(shared_mem)

        class RawModule:
            def __init__(self, *, path):
                time.sleep(0.02)  # long enough for another thread to come in between
                gpus.loads.append((current(), path))

            def get_function(self, symbol):  # of CuPy's two kinds the one that wraps the other
                kernel = Function(symbol)
                kernel.kernel, kernel.ptr = Namespace("kernel", ptr=kernel.ptr), None
                return kernel

        class Module:
            def load(self, cubin):
                gpus.loads.append((current(), cubin))

            def get_function(self, symbol):
                return Function(symbol)

        def properties(device):
            return {"major": 8 + device, "minor": 0, "multiProcessorCount": 108 + 24 * device}

        def empty(shape, dtype):
            gpus.allocations.append(current())
            return ndarray(shape, dtype)

        def set_attribute(*given):
            gpus.attributes.append((current(), *given))

        def get_attribute(attribute, handle):
            gpus.asked.append((current(), handle, attribute))
            return gpus.spilled if attribute == 3 else gpus.registers

        stream = Namespace("stream", ptr=0, is_capturing=lambda: False)
        runtime = Namespace("runtime", getDevice=current, getDeviceProperties=properties)
        function = Namespace("function", Module=Module)
        driver = Namespace("driver", funcSetAttribute=set_attribute, funcGetAttribute=get_attribute)
        cuda = Namespace("cuda", runtime=runtime, Device=Device, function=function, driver=driver,
                         get_current_stream=lambda: stream)  # fmt: skip
        makers = {"empty": empty, "zeros": empty}
        super().__init__("cupy", ndarray=ndarray, RawModule=RawModule, cuda=cuda, **makers)


@pytest.fixture
def gpus(monkeypatch):
    found = Gpus()
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(device_runtime, "emulator", None)
    device_runtime._runtimes.clear()
    yield found
    device_runtime._runtimes.clear()


@pytest.fixture
def compiled(monkeypatch):
    """(header, name, arch, text) of what was asked for; files are named after it."""
    asked = []

    def load_or_compile(*kernel):
        asked.append(kernel)
        return Path("cache", kernel[1]), kernel[1].encode()

    monkeypatch.setattr(compiler, "architecture", lambda capability: f"sm_{capability}")
    monkeypatch.setattr(cache, "load_or_compile", load_or_compile)
    monkeypatch.setattr(compiler, "kernel_symbol", lambda cubin: f"_Z{cubin.decode()}")
    return asked


@pytest.fixture
def runtime(gpus, compiled):
    return device_runtime.Cuda()


def launch(runtime, kernel=KERNEL, params=b"params"):
    runtime.launch(kernel, params, (), ())


# ---- Launch ----


def test_launch(runtime, gpus, compiled):
    params = bytes(range(256)) * 3 + b"\0"
    launch(runtime, params=params)
    ((device, symbol, grid, block, args),) = gpus.launches
    assert (device, symbol, grid, block) == (0, "_Zsome<float, 1>", (3,), (64,))
    assert gpus.loads == [(0, str(Path("cache", KERNEL.name)))]
    assert compiled == [(KERNEL.header, KERNEL.name, "sm_80", "")]
    # CuPy passes the bytes of an array of one element by value, whatever their number.
    (argument,) = args
    assert type(argument) is np.ndarray and argument.shape == (1,)
    assert argument.dtype.kind == "V" and argument.dtype.itemsize == len(params)
    assert argument.tobytes() == params


def test_kernels_are_loaded_once(runtime, gpus, compiled):
    for kernel in (KERNEL, OTHER, KERNEL, OTHER):
        launch(runtime, kernel)
    assert [symbol for _, symbol, *_ in gpus.launches] == [
        "_Zsome<float, 1>",
        "_Zsome<float, 2>",
    ] * 2
    assert len(gpus.loads) == len(compiled) == 2


def test_kernels_are_loaded_once_a_device(runtime, gpus, compiled):
    for device in (0, 1, 0, 1):
        with runtime.on(device):
            launch(runtime)
    assert [device for device, *_ in gpus.launches] == [0, 1, 0, 1]
    assert [device for device, _ in gpus.loads] == [0, 1]
    assert [arch for _, _, arch, _ in compiled] == ["sm_80", "sm_90"]


@pytest.mark.parametrize("in_a_file", [True, False])
def test_shared_memory_is_asked_for_once_a_device(runtime, gpus, compiled, monkeypatch, in_a_file):
    if not in_a_file:
        monkeypatch.setattr(cache, "load_or_compile", lambda *kernel: (None, kernel[1].encode()))
    large = dataclasses.replace(OTHER, smem_bytes=70_000)
    for device in (0, 1, 0):
        with runtime.on(device):
            launch(runtime, large)
            launch(runtime)
    assert gpus.smem == [70_000, 0] * 3
    # 8 is CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of the driver's CUfunction_attribute.
    handle = "handle of _Zsome<float, 2>"
    assert gpus.attributes == [(0, handle, 8, 70_000), (1, handle, 8, 70_000)]


@pytest.mark.parametrize("in_a_file", [True, False])
def test_registers_are_checked_once_a_device(runtime, gpus, compiled, monkeypatch, in_a_file):
    """With fewer than planned setmaxnreg would wait for ever."""
    if not in_a_file:
        monkeypatch.setattr(cache, "load_or_compile", lambda *kernel: (None, kernel[1].encode()))
    monkeypatch.setattr(compiler, "version", lambda: "12.3")
    own = dataclasses.replace(OTHER, registers=168)
    gpus.registers = 160
    words = r"some<float, 2> must have at least 168 registers .* NVRTC 12\.3 .* 160.*pip install"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            launch(runtime, own)
    assert not gpus.launches
    gpus.asked.clear()
    gpus.registers = 168
    for device in (0, 1, 0):
        with runtime.on(device):
            launch(runtime, own)
            launch(runtime, KERNEL)  # which may have any number
    # 4 is CU_FUNC_ATTRIBUTE_NUM_REGS of the driver's CUfunction_attribute.
    handle = "handle of _Zsome<float, 2>"
    assert gpus.asked == [(0, handle, 4), (1, handle, 4)]
    assert len(gpus.launches) == 6


def test_a_score_that_spills_warns(runtime, gpus, compiled):
    """When it is loaded, and then no more; what has no expression is not asked about."""
    own = dataclasses.replace(OTHER, text="struct Own {};", expression="s + 1")
    gpus.registers, gpus.spilled = 255, 48
    launch(runtime, KERNEL)
    with pytest.warns(RuntimeWarning, match=r"expression 's \+ 1' .* 255 registers .* 48 bytes"):
        launch(runtime, own)
    launch(runtime, own)
    assert compiled[1] == (OTHER.header, OTHER.name, "sm_80", "struct Own {};")
    # 3 is CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES of the driver's CUfunction_attribute.
    assert gpus.asked == [(0, "handle of _Zsome<float, 2>", i) for i in (3, 4)]
    gpus.spilled = 0
    with runtime.on(1):
        launch(runtime, own)
    assert len(gpus.launches) == 4


def test_a_kernel_of_one_architecture(runtime, gpus, compiled):
    own = dataclasses.replace(KERNEL, suffix="a")
    with runtime.on(1):
        for kernel in (KERNEL, own, KERNEL, own):
            launch(runtime, kernel)
    assert compiled == [(KERNEL.header, KERNEL.name, arch, "") for arch in ("sm_90", "sm_90a")]
    assert len(gpus.loads) == 2 and len(gpus.launches) == 4
    assert len(runtime._kernels) == len(set(runtime._kernels.values())) == 2


def test_threads_load_once(runtime, gpus, compiled):
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        with runtime.on(i % 2):
            launch(runtime)
            launch(runtime, OTHER)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert sorted((device, Path(path).name) for device, path in gpus.loads) == [
        (device, kernel.name) for device in (0, 1) for kernel in (KERNEL, OTHER)
    ]
    assert len(compiled) == 4 and len(gpus.launches) == 16


def test_a_cache_that_cannot_be_written(runtime, gpus, monkeypatch):
    monkeypatch.setattr(cache, "load_or_compile", lambda *kernel: (None, b"cubin"))
    for _ in range(2):
        launch(runtime)
    assert gpus.loads == [(0, b"cubin")]
    assert [launch[:2] for launch in gpus.launches] == [(0, "_Zcubin")] * 2


def test_a_kernel_that_failed_is_tried_again(runtime, gpus, compiled, monkeypatch):
    def fails(*kernel):
        raise compiler.CompileError("no")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "load_or_compile", fails)
        with pytest.raises(compiler.CompileError):
            launch(runtime)
    launch(runtime)
    assert len(gpus.launches) == len(gpus.loads) == 1


# ---- Tensor maps ----


def test_tensor_map(runtime, monkeypatch):
    monkeypatch.setattr(tensor_map, "encode", lambda *array: repr(array).encode())
    array = (1 << 40, "float16", (64, 1, 2, 3, 4), (128, 128, 256, 768), (64, 1, 64, 1, 1), 128)
    assert runtime.tensor_map(*array) == repr(array).encode()


def test_tensor_map_in_a_new_thread(runtime, gpus, monkeypatch):
    """The driver knows no device there before the runtime's first call, if all memory is there."""
    here = threading.local()

    def encode(*array):
        if not hasattr(here, "context"):
            raise tensor_map.NoContext("201")
        return bytes(array)

    def first_call():
        here.context = True

    monkeypatch.setattr(tensor_map, "encode", encode)
    gpus.cuda.runtime.memGetInfo = first_call
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(runtime.tensor_map, range(32))) == [bytes([i]) for i in range(32)]


@pytest.mark.parametrize("error", [RuntimeError, tensor_map.NoContext])
def test_tensor_map_that_fails(runtime, gpus, monkeypatch, error):
    def encode(*array):
        tries.append(array)
        raise error("no")

    tries = []
    monkeypatch.setattr(tensor_map, "encode", encode)
    gpus.cuda.runtime.memGetInfo = lambda: None
    with pytest.raises(error):
        runtime.tensor_map(1, 2)
    assert tries == [(1, 2)] * (2 if error is tensor_map.NoContext else 1)


# ---- Devices ----


def test_no_switch_to_where_one_is(runtime, gpus):
    with runtime.on(0):
        pass
    assert gpus.visits == []


def test_limits(runtime, gpus, monkeypatch):
    assert runtime.limits(0) == Limits(compute_capability=80, num_sms=108)
    assert runtime.limits(1) == (90, 132)
    del gpus.cuda.runtime.getDeviceProperties  # a slow call, which is made once a device
    assert runtime.limits(1) == (90, 132)


def test_limits_of_two_digit_majors(runtime, gpus):
    properties = {"major": 12, "minor": 1, "multiProcessorCount": 48}
    gpus.cuda.runtime.getDeviceProperties = lambda device: properties
    assert runtime.limits(0) == (121, 48)


@pytest.mark.parametrize("device", [0, 1])
def test_a_call_runs_where_its_array_is(device, gpus, compiled):
    x = gpus.ndarray((64, 300_000), "float32", device)  # two launches and a workspace
    y = cuattn.softmax(x)
    assert isinstance(y, gpus.ndarray) and (y.shape, y.dtype) == (x.shape, x.dtype)
    assert y.data.device_id == device
    assert gpus.visits == [1] * device * 2 and gpus.cuda.runtime.getDevice() == 0  # plan, launch
    assert {arch for _, _, arch, _ in compiled} == {f"sm_{80 + 10 * device}"}
    assert gpus.allocations == [device] * 2
    assert [launch[0] for launch in gpus.launches] == [device] * 2
    for *_, (argument,) in gpus.launches:
        head = SOFTMAX_HEAD.unpack(argument.tobytes())
        assert (head["x"], head["out"], head["scale_value"]) == (x.data.ptr, y.data.ptr, 1.0)


def test_clusters_where_the_device_has_them(gpus, compiled):
    for device in (0, 1):
        cuattn.softmax(gpus.ndarray((64, 20_000), "float32", device))
    assert [grid for _, _, grid, *_ in gpus.launches] == [(64,), (128,)]


def test_the_current_device_comes_back(gpus, compiled, monkeypatch):
    def fails(*kernel):
        raise compiler.CompileError("no")

    monkeypatch.setattr(cache, "load_or_compile", fails)
    with pytest.raises(compiler.CompileError):
        cuattn.softmax(gpus.ndarray((2, 3), "float32", 1))
    assert gpus.visits == [1, 1] and gpus.cuda.runtime.getDevice() == 0


CALLS_OF_TWO = {
    "y": lambda a, b: cuattn.softmax_backward(a, b),
    "out": lambda a, b: cuattn.softmax(a, out=b),
    "where": lambda a, b: cuattn.softmax(a, where=b),
    "scale": lambda a, b: cuattn.softmax(a, scale=b),
}


@pytest.mark.parametrize("name", CALLS_OF_TWO)
def test_arrays_on_two_devices(name, gpus, compiled):
    one, other = (gpus.ndarray((2, 3), "float32", device) for device in (1, 0))
    with pytest.raises(ValueError, match=rf"{name} must be on device 1"):
        CALLS_OF_TWO[name](one, other)
    assert gpus.launches == gpus.allocations == gpus.visits == compiled == []


@pytest.mark.parametrize("name", CALLS_OF_TWO)
def test_arrays_of_two_libraries(name, gpus, compiled):
    with pytest.raises(TypeError, match=name):
        CALLS_OF_TWO[name](gpus.ndarray((2, 3), "float32"), np.zeros((2, 3), np.float32))
    assert gpus.launches == gpus.allocations == gpus.visits == compiled == []


# ---- Arrays of other libraries ----


class Dlpack:
    """An array of another library, on a device of this kind."""

    kind = 2  # kDLCUDA

    def __dlpack_device__(self):
        return self.kind, 1

    def __dlpack__(self, **options):
        raise AssertionError("cupy.from_dlpack asks, not cuattn")


class Managed(Dlpack):
    kind = 13  # kDLCUDAManaged


class Interface:
    """An array of a library without DLPack."""

    def __init__(self, stream=None, read_only=False):
        self.__cuda_array_interface__ = {"data": (1 << 40, read_only), "stream": stream}


Interface.__cuda_array_interface__ = None  # the class has it, too


class Both(Dlpack, Interface):
    pass


@pytest.mark.parametrize("kind", [Dlpack, Managed, Both])
def test_foreign_arrays_are_taken_without_a_copy(kind, gpus, compiled):
    foreign, ours, calls = kind(), gpus.ndarray((4, 5), "float32", 1), []
    gpus.from_dlpack = lambda array: calls.append(array) or ours
    y = cuattn.softmax(foreign)
    assert isinstance(y, gpus.ndarray) and y.data.device_id == 1
    assert calls == [foreign]
    assert SOFTMAX_HEAD.unpack(gpus.launches[0][4][0].tobytes())["x"] == ours.data.ptr


@pytest.mark.parametrize(
    ("theirs", "current", "waits"),
    [(None, 7, False), (7, 7, False), (1, 0, False), (8, 7, True), (1, 7, True), (2, 0, True)],
)
def test_the_stream_of_an_interface(theirs, current, waits, gpus, compiled):
    """The current stream waits for it, on the device of the array; the host never does."""
    foreign, ours, calls = Interface(theirs), gpus.ndarray((4, 5), "float32", 1), []

    def asarray(array):
        assert array.__cuda_array_interface__ == {"data": (1 << 40, False), "stream": None}
        owners.append(array)
        return ours

    def event(disable_timing):
        assert disable_timing and gpus.cuda.runtime.getDevice() == 1
        return Namespace("event", ptr="event")

    owners = []
    gpus.asarray, gpus.cuda.Event = asarray, event
    gpus.cuda.get_current_stream = lambda: Namespace("stream", ptr=current)
    gpus.cuda.runtime.eventRecord = lambda *given: calls.append(("record", *given))
    gpus.cuda.runtime.streamWaitEvent = lambda *given: calls.append(("wait", *given))
    cuattn.softmax(foreign)
    ordered = [("record", "event", theirs), ("wait", current, "event")]
    assert calls == (ordered if waits else [])
    assert owners[0].value is foreign  # or its memory would be freed too early
    assert SOFTMAX_HEAD.unpack(gpus.launches[0][4][0].tobytes())["x"] == ours.data.ptr


def test_a_foreign_out_that_is_read_only(gpus, compiled):
    x, ours = gpus.ndarray((4, 5), "float32"), gpus.ndarray((4, 5), "float32")
    x.flags = ours.flags = types.SimpleNamespace()  # without `writeable`, as CuPy's
    gpus.asarray = lambda array: ours
    assert cuattn.softmax(x, out=Interface()) is ours
    with pytest.raises(ValueError, match="^out must be writeable, but it is read-only"):
        cuattn.softmax(x, out=Interface(read_only=True))


def test_one_number_of_the_host_beside_arrays_of_a_device(gpus, compiled):
    """A mask that is one False, and one weight: placed on the device of x, once all is checked."""
    x, placed = gpus.ndarray((4, 5), "float32", 1), []

    def full(shape, value, dtype):
        assert gpus.cuda.runtime.getDevice() == 1
        placed.append((shape, value, dtype, gpus.ndarray(shape, dtype)))
        return placed[-1][3]

    gpus.full = full
    cuattn.softmax(x, where=np.False_)
    cuattn.logsumexp(x, b=np.float32(3), where=False)
    cuattn.softmax_topk(x, 2, where=np.array(False))
    assert [p[:3] for p in placed] == [
        ((), False, np.bool_),
        ((), 3, np.float32),
        ((), False, np.bool_),
        ((), False, np.bool_),
    ]
    where, weight = (placed[i][3].data.ptr for i in (0, 1))
    heads = [SOFTMAX_HEAD.unpack(launch[4][0].tobytes()) for launch in gpus.launches[:2]]
    assert heads[0]["where"] == where and heads[1]["where"] == placed[2][3].data.ptr
    assert heads[1]["weight"] == weight
    wrong = gpus.ndarray((7,), "float32", 1)
    for call, argument in ((cuattn.softmax, "scale"), (cuattn.logsumexp, "b")):
        with pytest.raises(ValueError, match=f"^{argument} must"):
            call(x, where=False, **{argument: wrong})
    with pytest.raises(ValueError, match="^k must"):
        cuattn.softmax_topk(x, 6, where=False)
    assert len(placed) == 4


def test_cupy_arrays_are_taken_as_they_are(gpus):
    x = gpus.ndarray((4, 5), "float32")
    assert interchange.adopt(x) is x and as_array("x", x) is x


@pytest.mark.parametrize("value", [None, 1.0, [1.0, 2.0], "text", object(), Dlpack])
def test_no_arrays(value, gpus):
    with pytest.raises(TypeError):
        cuattn.softmax(value)


def test_what_makes_an_array_of_it(gpus):
    """What goes with the other arrays of the call; of the first one either, where there is CuPy."""
    for x, makes in ((gpus.ndarray((2, 3), "float32"), "cupy"), (np.ones((2, 3)), "numpy")):
        with pytest.raises(TypeError, match=rf"; convert it with {makes}\.asarray\(scale\)$"):
            cuattn.softmax(x, scale=[1.0])
    with pytest.raises(TypeError, match=r"; convert it with numpy\.asarray\(x\) or cupy\.asarray"):
        cuattn.softmax([1.0])


@pytest.mark.parametrize("kind", [Dlpack, Interface])
def test_without_cupy(kind, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy.*pip install 'cuattn\[cuda13x\]'"):
        cuattn.softmax(kind())


# ---- Runtimes ----


def test_runtime_of(gpus, monkeypatch):
    runtime = device_runtime.runtime_of(gpus.ndarray((), "float32"))
    assert isinstance(runtime, device_runtime.Cuda) and runtime.xp is gpus
    assert device_runtime.runtime_of(gpus.ndarray((2,), "int8")) is runtime
    assert device_runtime.runtime_of(np.zeros(2)) is None
    monkeypatch.setattr(device_runtime, "emulator", "emulator")
    assert device_runtime.runtime_of(np.zeros(2)) == "emulator"
    assert device_runtime.runtime_of(gpus.ndarray((2,), "int8")) is runtime


def test_runtime_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert device_runtime.runtime_of(np.zeros(2)) is None


def test_threads_share_one_runtime(gpus, monkeypatch):
    """Else each would load the kernels of its own."""

    class Slow(device_runtime.Cuda):
        def __init__(self):
            time.sleep(0.02)
            super().__init__()

    monkeypatch.setattr(device_runtime, "Cuda", Slow)
    x, barrier = gpus.ndarray((2,), "float32"), threading.Barrier(8)

    def work(_):
        barrier.wait()
        return device_runtime.runtime_of(x)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(work, range(8)))) == 1
