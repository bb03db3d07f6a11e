"""One body, every backend: what the tests of the public API share.

Every run draws one random seed, which feeds the data (`rng`) and the emulator's schedule. pytest's
header prints it, and ``CUATTN_TEST_SEED`` sets it. ``CUATTN_REQUIRE_GPU=1`` makes a GPU case fail
where it would be skipped. The software device (`software_device.plugin`) stands for a GPU where
pytest has been started with it.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import os
import secrets
import sys
import zlib

import numpy as np
import pytest

SEED = "CUATTN_TEST_SEED"
SHARE = "CUATTN_TEST_SHARE"
DRAWN = 6  # of so many cases of a function marked `drawn`, CI runs one


def software_arch():
    """``sm_80``, of the software device; None where it does not stand for a GPU."""
    plugin = sys.modules.get("software_device.plugin")
    return plugin.arch if plugin is not None and plugin.reason is None else None


GPU_NAME = f"device-{software_arch()}" if software_arch() else "gpu"
GPU = pytest.param(GPU_NAME, marks=pytest.mark.gpu)  # the backend
# Before NumPy 2.3 the sum of a row may have other bits beside other rows.
rows_alone = pytest.mark.skipif(
    np.lib.NumpyVersion(np.__version__) < "2.3.0", reason="NumPy adds up rows alone since 2.3"
)
on_a_gpu = pytest.mark.parametrize("backend", [GPU], indirect=True)


def pytest_configure(config):
    os.environ.setdefault(SEED, str(secrets.randbits(32)))  # inherited by the xdist workers
    if software_arch() == "sm_90":  # CI runs it first
        import shared_ptx

        shared_ptx.leave_for_sm_80()


def pytest_collection_modifyitems(config, items):
    """Bodies marked `host` have no case on a GPU, and a share leaves what the other one takes."""
    share = os.environ.get(SHARE)
    if share not in (None, "", "emulator", "device"):
        raise pytest.UsageError(f"{SHARE} must be emulator or device, but is {share}")
    functions = {}
    for item in items:
        functions.setdefault(function_of(item), []).append(item)
    dropped = [
        item for item in items if item.get_closest_marker("host") and item.get_closest_marker("gpu")
    ]
    if share:
        for cases in functions.values():
            dropped += left_to_others(cases, share)
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(map(id, dropped))
        items[:] = [item for item in items if id(item) not in gone]


def pytest_collection_finish(session):
    """The garbage collector need not look at thousands of items again and again."""
    gc.collect()
    gc.freeze()


def left_to_others(items, share):
    """Those of a function's items that run in the other share, or not this time.

    The software device is several times faster than the emulator, and takes 31 functions of 32. Of
    several cases that both architectures have, each runs for one of them.
    """
    function = function_of(items[0])
    if items[0].get_closest_marker("slow") and not is_drawn(4, function):
        return items
    cases = sorted({case_of(item) for item in items}, key=drawn_number)
    if items[0].get_closest_marker("drawn"):
        cases = cases[::DRAWN]
    both = len(cases) > 1 and {"sm_80", "sm_90"} <= {arch_of(item) for item in items}
    on_devices = any(on_a_device(item) and not item.get_closest_marker("host") for item in items)
    emulated = {arch_of(item) for item in items if backend_of(item).startswith("emulator")}

    def stays(item):
        arch, case = arch_of(item), case_of(item)
        if case not in cases or (both and arch == ("sm_80", "sm_90")[cases.index(case) % 2]):
            return False
        if not arch:
            return share == "device" or not on_a_device(item)
        emulator = arch in emulated and (not on_devices or is_drawn(32, function, arch))
        return share == ("emulator" if emulator else "device")

    return [item for item in items if not stays(item)]


def on_a_device(item):
    return item.get_closest_marker("gpu") is not None


def function_of(item):
    return item.nodeid.partition("[")[0]


def backend_of(item):
    """``emulator-sm_90a``; empty for a test without a backend."""
    return str(item.callspec.params.get("backend", "")) if hasattr(item, "callspec") else ""


def arch_of(item):
    """``sm_90``; empty where there is none, or none that is known."""
    return backend_of(item).partition("-")[2].rstrip("a")


def case_of(item):
    """What a test is called, whatever its backend."""
    return item.nodeid.replace(backend_of(item), "")


def is_drawn(n, *words):
    """One time in `n`."""
    return drawn_number(*words) % n == 0


def drawn_number(*words):
    return zlib.crc32(" ".join((os.environ[SEED], *words)).encode())


class NumpyBackend:
    """NumPy arrays in, NumPy arrays out: `cuattn.reference`, or the kernels on the emulator."""

    xp, on_device = np, False

    def __init__(self, name, arch=None, runtime=None):
        self.name, self.arch, self.runtime = name, arch, runtime

    def asarray(self, a):
        """`a` on the backend: the same shape, strides and alignment, and what lies between."""
        return a

    def asnumpy(self, a):
        return a

    def ran(self):
        """Whether kernels have run, where that is known: nothing may fall back in silence."""
        return self.runtime is None or len(self.runtime.counters) > 0


class CupyBackend(NumpyBackend):
    """CuPy arrays on the current device."""

    on_device = True

    def __init__(self):
        self.xp = pytest.importorskip("cupy")
        major, minor = divmod(int(self.xp.cuda.Device().compute_capability), 10)
        super().__init__(GPU_NAME, f"sm_{major}{minor}")

    def asarray(self, a):
        if a.size == 0:
            made = np.uint8 if a.itemsize == 1 else a.dtype  # float8 is none that CuPy makes
            return self.xp.empty(a.shape, made).view(a.dtype)
        low, high = np.lib.array_utils.byte_bounds(a)
        between = np.frombuffer((ctypes.c_uint8 * (high - low)).from_address(low), np.uint8)
        pad = low % 256  # the device allocates in multiples of 256 bytes
        memory = self.xp.zeros(pad + high - low, np.uint8)
        memory[pad:] = self.xp.asarray(between)
        start = memory.data + pad + a.__array_interface__["data"][0] - low
        return self.xp.ndarray(a.shape, a.dtype, start, a.strides)

    def asnumpy(self, a):
        return self.xp.asnumpy(a)


@functools.cache
def why_no_gpu():
    """The reason why the GPU cases cannot run here, or None."""
    try:
        import cupy

        return None if cupy.cuda.runtime.getDeviceCount() else "no CUDA device"
    except Exception as error:  # no CuPy, no driver, no device: each its own class
        return f"{type(error).__name__}: {error}"


@pytest.fixture(
    params=[
        "numpy",
        "emulator-sm_80",
        "emulator-sm_90a",
        GPU,
    ]
)
def backend(request):
    """Where the public functions run; `numpy` is the dispatch to `cuattn.reference`."""
    kind, _, arch = request.param.partition("-")
    if kind == "numpy":
        yield NumpyBackend("numpy")
    elif kind == "emulator":
        import emulator

        with emulator.activate(arch=arch, seed=int(os.environ[SEED])) as runtime:
            yield NumpyBackend(request.param, arch, runtime)
    elif (reason := why_no_gpu()) is None:
        yield CupyBackend()
    elif os.environ.get("CUATTN_REQUIRE_GPU") == "1":
        pytest.fail(f"CUATTN_REQUIRE_GPU=1, but {reason}")
    else:
        pytest.skip(reason)


@pytest.fixture
def rng(request):
    """A generator of its own for each test, from the seed of the run."""
    return np.random.default_rng([int(os.environ[SEED]), zlib.crc32(request.node.nodeid.encode())])
