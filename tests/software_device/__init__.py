"""A CUDA device in software, under real CuPy: README.md beside this file says how to use it.

``install()`` must run before ``import cupy``. Afterwards `device` is what tests ask beside CUDA.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

__all__ = ["Device", "Unavailable", "device", "install"]


class Unavailable(RuntimeError):
    """The software device cannot be had here; the message says why, and what to install."""


class Device:
    """What the device's library answers beside CUDA."""

    def __init__(self, library):
        self.library = library
        library.softLastMessage.restype = ctypes.c_char_p

    def _check(self, code):
        if code:
            raise RuntimeError(f"software device: {self.message()}")

    def _number(self, function, *arguments):
        value = ctypes.c_uint64()
        self._check(function(*arguments, ctypes.byref(value)))
        return value.value

    def seed(self, value):
        """Decide the order in which queued work will run, and the threads of a kernel."""
        self._check(self.library.softSeedQueue(ctypes.c_uint64(value)))
        if hasattr(self.library, "softSeed"):  # of the interpreter
            self.library.softSeed(ctypes.c_uint64(value))

    def flush(self):
        """Run what is queued; raise what fails. It does not count as a synchronisation."""
        self._check(self.library.softFlush())

    def reset(self):
        """Drop what is queued and end all captures."""
        self._check(self.library.softReset())

    def message(self):
        """Of this thread's last failure."""
        return self.library.softLastMessage().decode(errors="replace")

    def synchronisations(self):
        """How often the host has waited for the device, in whatever function."""
        return self._number(self.library.softSynchronisations)

    def calls(self, entry_point):
        """How often a function of CUDA was called, as ``cudaMalloc``."""
        return self._number(self.library.softCalls, entry_point.encode())

    def param_bytes(self, kernel):
        """Bytes of parameters that a kernel (a CUfunction) declares."""
        return self._number(self.library.softParamBytes, ctypes.c_void_p(kernel))

    @contextlib.contextmanager
    def counters(self):
        """Count what the launches of a block cost: a `counters.Counters`, filled at its end.

        What is queued before runs before, and what the block has queued at its end.
        """
        from software_device import counters

        self.flush()
        with counters.counting(self.library) as found:
            yield found
            self.flush()

    def stats(self):
        """Instructions of warps and of lanes that ran so far, and the seconds they took."""
        warps, lanes, seconds = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_double()
        self._check(self.library.softStats(*map(ctypes.byref, (warps, lanes, seconds))))
        return warps.value, lanes.value, seconds.value


device: Device | None = None  # None: not installed in this process


def install():
    """Build what is missing, and put the software device under CuPy. Does nothing if it is there.

    Raises
    ------
    Unavailable
        No compiler, no NVRTC, no sources of CuPy, not Linux.
    RuntimeError
        CuPy has been imported before.
    """
    global device
    if device is not None:
        return device
    from cuattn._device.directories import cache_directory
    from software_device import build, patches

    patches.check_first()
    module, library = build.cupy_runtime(), build.device_library()  # what it lacks shows at once
    checked = os.environ.get(patches.PTX) or cache_directory()
    kernels = build.cache_dir() / "kernels"  # cubins of a GPU have no PTX behind them
    for variable, value in {
        build.CACHE: build.cache_dir(),  # for the processes that this one starts
        patches.PTX: checked,
        "CUPY_ACCELERATORS": "",  # CUB has a CUDA runtime of its own, which sees no device
        "CUPY_CACHE_DIR": kernels / "cupy",
        "CUATTN_CACHE_DIR": kernels / "cuattn",
    }.items():
        os.environ[variable] = str(value)
    found = Device(build.load(library))
    patches.replace_runtime(module)
    patches.patch(found)
    device = found
    return found


@contextlib.contextmanager
def no_synchronisation():
    """A block in which the host must not wait for the device."""
    before = device.synchronisations()
    yield
    waited = device.synchronisations() - before
    assert waited == 0, f"the host waited for the device {waited} times"
