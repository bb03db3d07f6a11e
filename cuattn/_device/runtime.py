"""Cubin → kernel → launch, and what else the public functions need of a device.

A *runtime* is what the public functions need of a device: `address`, `device`, `signature`,
`empty`, `workspace`, `limits`, `tensor_map`, `launch`, its array module `xp`, and `recent`, what it
knows of earlier calls. `Cuda` is the real one; the test-suite's CPU emulator is another, put into
`emulator`; and that of `cuattn.compile` notes kernels and launches none.

Plans, the compiler and its cache are imported by the first call that needs them, here and in the
modules that run calls: no call on NumPy arrays does, and `import cuattn` takes half as long.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable
from functools import lru_cache
from operator import attrgetter
from types import ModuleType
from typing import Any

import numpy as np

from cuattn._arrays.interchange import INSTALL
from cuattn._device import tensor_map
from cuattn._device.host import HOST
from cuattn._device.kernel import Limits
from cuattn._device.recent import Recent
from cuattn._device.workspace import Workspace, Workspaces

# While a runtime stands here, NumPy arrays go through the kernels on it instead of through
# NumPy.
emulator: Any = None
# So they do on the runtime of a thread that is within `cuattn.compile`, before all others.
recorders: dict[int, Any] = {}


# CUfunction_attribute
LOCAL_SIZE = 3  # CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES
NUM_REGS = 4  # CU_FUNC_ATTRIBUTE_NUM_REGS
MAX_SMEM = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
PER_THREAD = 2  # cudaStreamPerThread


class Cuda:
    """Kernels on CUDA devices through CuPy, on the current stream, never waiting for it."""

    # Of an array: the number of its device, and the address of its first element.
    device: Callable[[Any], int] = staticmethod(attrgetter("data.device_id"))
    address: Callable[[Any], int] = staticmethod(attrgetter("data.ptr"))

    def __init__(self) -> None:
        import cupy

        self.xp: ModuleType = cupy
        self.recent = Recent()
        self._kernels: dict[tuple[str, str, int], Any] = {}
        self._lock = threading.RLock()
        self._current_device = cupy.cuda.runtime.getDevice
        self.workspaces = Workspaces(self._zeros, self.empty)
        self._limits: dict[int, Limits] = {}
        self.kept: list[Any] = []  # memory that graphs use

    def signature(self, array: Any) -> tuple[Any, ...]:
        """All that a call may depend on of an array, except for its address and contents."""
        memory = array.data
        return array.shape, array.strides, array.dtype, memory.device_id, memory.ptr % 16

    def on(self, device: int) -> contextlib.AbstractContextManager[Any]:
        """Context in which a device is the current one."""
        return _nowhere if self._current_device() == device else self.xp.cuda.Device(device)

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        """Uninitialised C-contiguous array on the current device."""
        return self.xp.empty(shape, dtype)

    def keeping(self) -> contextlib.AbstractContextManager[Any]:
        """Context in which all that is allocated stays where it is, if the current stream is being
        captured: the graph uses it whenever it runs."""
        if not self.xp.cuda.get_current_stream().is_capturing():
            return _nowhere
        allocate = self.xp.cuda.get_allocator()

        def malloc(size: int) -> Any:
            memory = allocate(size)
            self.kept.append(memory)
            return memory

        return self.xp.cuda.using_allocator(malloc)

    def _zeros(self, shape: tuple[int, ...], dtype: np.dtype) -> Any:
        return self.xp.zeros(shape, dtype)

    def workspace(self, function: str, counters: int, part_bytes: int) -> Workspace:
        """The workspace of the current stream; see `Workspaces.of`."""
        stream = self.xp.cuda.get_current_stream()
        key: tuple[int, ...] = (self._current_device(), stream.ptr)
        if key[1] == PER_THREAD:  # as many streams as there are threads
            key = *key, threading.get_ident()
        return self.workspaces.of(key, function, counters, part_bytes, stream.is_capturing)

    def limits(self, device: int) -> Limits:
        """Limits of a device."""
        found = self._limits.get(device)
        if found is None:
            properties = self.xp.cuda.runtime.getDeviceProperties(device)
            capability = 10 * properties["major"] + properties["minor"]
            found = self._limits[device] = Limits(capability, properties["multiProcessorCount"])
        return found

    def tensor_map(self, *array: Any) -> bytes:
        """The map of an array at an address, as `cuattn._device.tensor_map.encode`."""
        try:
            return tensor_map.encode(*array)
        except tensor_map.NoContext:
            self.xp.cuda.runtime.memGetInfo()  # the runtime's first call in a thread sets one
            return tensor_map.encode(*array)

    def launch(
        self, kernel: Any, params: bytes, reads: tuple[Any, ...], writes: tuple[Any, ...]
    ) -> None:
        """Launch a kernel (cuattn._softmax.plan.Kernel) on the current device and stream.

        `params` are the bytes of its single argument; `reads` and `writes` are the arrays it
        points to, used only by the emulator.
        """
        device = self._current_device()
        key = kernel.name, kernel.suffix, device
        function = self._kernels.get(key) or self._load(kernel, device)
        argument = np.frombuffer(params, _void(len(params)))
        function((kernel.grid,), (kernel.block,), (argument,), shared_mem=kernel.smem_bytes)

    def _load(self, kernel: Any, device: int) -> Any:
        from cuattn._device import cache, compiler

        key = kernel.name, kernel.suffix, device
        with self._lock:
            function = self._kernels.get(key)
            if function is None:
                arch = compiler.architecture(self.limits(device).compute_capability) + kernel.suffix
                source = kernel.header, kernel.name, arch, kernel.text
                path, cubin = cache.load_or_compile(*source)
                if path is not None:
                    function = self.xp.RawModule(path=str(path)).get_function(
                        compiler.kernel_symbol(cubin)
                    )
                else:
                    module = self.xp.cuda.function.Module()
                    module.load(cubin)
                    function = module.get_function(compiler.kernel_symbol(cubin))
                handle = getattr(function, "kernel", function).ptr
                if kernel.registers:
                    self._check_registers(kernel, handle)
                if kernel.smem_bytes:
                    self.xp.cuda.driver.funcSetAttribute(handle, MAX_SMEM, kernel.smem_bytes)
                self._kernels[key] = function
                if kernel.expression:
                    self._warn_of_spills(kernel, handle)
            return function

    def _warn_of_spills(self, kernel: Any, handle: Any) -> None:
        """Every other kernel is known to need no more registers than there are."""
        spilled = self.xp.cuda.driver.funcGetAttribute(LOCAL_SIZE, handle)
        if spilled:
            found = self.xp.cuda.driver.funcGetAttribute(NUM_REGS, handle)
            warnings.warn(
                f"expression {kernel.expression!r} needs more than the {found} registers of a "
                f"thread: {spilled} bytes of each lie in memory, which is slower; "
                "a shorter one may not",
                RuntimeWarning,
                stacklevel=2,
            )

    def _check_registers(self, kernel: Any, handle: Any) -> None:
        from cuattn._device import compiler

        found = self.xp.cuda.driver.funcGetAttribute(NUM_REGS, handle)
        if found < kernel.registers:
            raise RuntimeError(
                f"{kernel.name} must have at least {kernel.registers} registers per thread, but "
                f"NVRTC {compiler.version()} gave it {found}, with which it would wait for ever; "
                f"install another CUDA toolkit, or its wheels: {INSTALL}"
            )


@lru_cache
def _void(size: int) -> np.dtype:
    return np.dtype((np.void, size))


_nowhere: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_runtimes: dict[str, Cuda] = {}
_runtime_lock = threading.Lock()


def _cuda() -> Cuda:
    with _runtime_lock:  # two threads must not load the same kernels into two runtimes
        return _runtimes.get("cuda") or _runtimes.setdefault("cuda", Cuda())


def _stand_in() -> Any:
    """What NumPy arrays go through instead of through NumPy; None: nothing."""
    return recorders.get(threading.get_ident(), emulator)


def current(args: tuple[Any, ...] = ()) -> Any:
    """The runtime that has computed calls with such arguments before, if there is one."""
    if recorders or emulator is not None:
        found = _stand_in()
        if found is not None:
            return found
    return HOST if args and type(args[0]) is np.ndarray else _runtimes.get("cuda")


def keeping(runtime: Any) -> contextlib.AbstractContextManager[Any]:
    """`Cuda.keeping`; nothing on other runtimes."""
    return runtime.keeping() if isinstance(runtime, Cuda) else _nowhere


def runtime_of(array: Any) -> Any:
    """The runtime of a NumPy or CuPy array; None: NumPy itself."""
    if isinstance(array, np.ndarray):
        return _stand_in()
    return _runtimes.get("cuda") or _cuda()
