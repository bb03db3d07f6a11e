"""One body, every backend: what the tests of the public API share.

Every run draws one random seed, which feeds the data (`rng`) and the emulator's schedule. pytest's
header prints it, and ``CUATTN_TEST_SEED`` sets it. ``CUATTN_REQUIRE_GPU=1`` makes a GPU case fail
where it would be skipped. The software device (`software_device.plugin`) stands for a GPU where
pytest has been started with it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import secrets
import sys
import zlib

import numpy as np
import pytest

SEED = "CUATTN_TEST_SEED"
SHARE = "CUATTN_TEST_SHARE"


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


def pytest_collection_modifyitems(config, items):
    """Bodies marked `host` have no case on a GPU, and a share leaves what the other one takes."""
    share = os.environ.get(SHARE)
    if share not in (None, "", "emulator", "device"):
        raise pytest.UsageError(f"{SHARE} must be emulator or device, but is {share}")
    dropped = [
        item
        for item in items
        if (item.get_closest_marker("host") and item.get_closest_marker("gpu"))
        or (share and is_left_to_others(item, share))
    ]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        gone = set(map(id, dropped))
        items[:] = [item for item in items if id(item) not in gone]


def is_left_to_others(item, share):
    """In a share: functions of the other one, and slow tests three times of four, by the seed.

    The software device is several times faster than the emulator, and takes seven of eight.
    """
    function = item.nodeid.partition("[")[0]
    if item.get_closest_marker("slow") and not is_drawn(4, function):
        return True
    backend = item.callspec.params.get("backend", "") if hasattr(item, "callspec") else ""
    kind, _, arch = str(backend).partition("-")
    if kind not in ("emulator", "device"):
        return False
    return share != ("emulator" if is_drawn(8, function, arch.rstrip("a")) else "device")


def is_drawn(n, *words):
    """One time in `n`."""
    return zlib.crc32(" ".join((os.environ[SEED], *words)).encode()) % n == 0


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
