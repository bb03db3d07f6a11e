"""What `cuTensorMapEncodeTiled` is asked, and what comes of its answer: a stand-in with the
prototype of the driver's function, called as the driver's is. Needs neither a GPU nor a driver."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuattn._device import tensor_map

ROOT = Path(__file__).resolve().parents[2]

# CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t rank, void* address,
# const cuuint64_t* dims, const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t*
# element_strides, interleave, swizzle, l2_promotion, oob_fill), the last four enums: cuda.h.
POINTER, ENUM, NUMBER = ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32
LONGS, NUMBERS = ctypes.POINTER(ctypes.c_uint64), ctypes.POINTER(NUMBER)
PROTOTYPE = ctypes.CFUNCTYPE(
    *(ENUM, POINTER, ENUM, NUMBER, POINTER, LONGS, LONGS, NUMBERS, NUMBERS, ENUM, ENUM, ENUM, ENUM)
)

ADDRESS = 0x7F12_3456_7890  # needs more than 32 bits, as most do
DIMS, STRIDES, BOX = (128, 4, 2**32, 3, 2), (256, 1024, 2**39, 4096), (64, 4, 16, 1, 1)
MAP = ADDRESS, "float16", DIMS, STRIDES, BOX, 128


class Driver:
    """A driver that writes down its `calls`, and answers with `answer` and the code `code`."""

    def __init__(self):
        self.calls, self.outputs, self.code, self.wait = [], [], 0, 0
        self._function = PROTOTYPE(self._encode)
        function = ctypes.CDLL(None)._FuncPtr(ctypes.cast(self._function, POINTER).value)
        self.library = types.SimpleNamespace(cuTensorMapEncodeTiled=function)

    @staticmethod
    def answer(address):
        """128 bytes, of which any may be 0."""
        return bytes((address // 16 * 7 + i) % 256 for i in range(128))

    def _encode(self, out, dtype, rank, address, dims, strides, box, steps, *enums):
        lists = dims[:rank], strides[: rank - 1], box[:rank], steps[:rank]
        ctypes.memmove(out, self.answer(address), 128)
        time.sleep(self.wait)
        self.calls.append((dtype, rank, address, *map(tuple, lists), *enums))
        self.outputs.append(out)
        return self.code


@pytest.fixture(autouse=True)
def forgotten():
    """No map and no driver of one test is there in the next."""
    tensor_map.encode.cache_clear()
    tensor_map._encoder.cache_clear()
    yield
    tensor_map.encode.cache_clear()
    tensor_map._encoder.cache_clear()


@pytest.fixture
def driver(monkeypatch):
    found, names = Driver(), []
    monkeypatch.setattr(ctypes, "CDLL", lambda name: names.append(name) or found.library)
    yield found
    assert names in ([], ["nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"])


# ---- What is asked ----


@pytest.mark.parametrize(("dtype", "number"), [("float16", 6), ("bfloat16", 9)])
@pytest.mark.parametrize(("swizzle", "name"), [(64, 2), (128, 3)])
def test_arguments(driver, dtype, number, swizzle, name):
    tensor_map.encode(ADDRESS, dtype, DIMS, STRIDES, BOX, swizzle)
    (call,) = driver.calls
    # Neither interleaved nor filled with NaN; 2 is CU_TENSOR_MAP_L2_PROMOTION_L2_128B.
    assert call == (number, 5, ADDRESS, DIMS, STRIDES, BOX, (1,) * 5, 0, name, 2, 0)


def test_boxes_are_arguments(driver):
    """`Boxes` has what `encode` takes after an address, in this order."""
    tensor_map.encode(ADDRESS, *tensor_map.Boxes("bfloat16", DIMS, STRIDES, BOX, 64))
    assert driver.calls == [(9, 5, ADDRESS, DIMS, STRIDES, BOX, (1,) * 5, 0, 2, 2, 0)]


def test_the_largest_numbers(driver):
    address, dims, strides = 2**64 - 16, (2**32,) * 5, (2**40 - 16,) * 4
    tensor_map.encode(address, "float16", dims, strides, (256,) * 5, 128)
    assert driver.calls[0][2:6] == (address, dims, strides, (256,) * 5)


# ---- What comes back ----


def test_map(driver):
    for address in range(ADDRESS, ADDRESS + 16 * 64, 16):  # the heap puts buffers anywhere
        found = tensor_map.encode(address, *MAP[1:])
        assert type(found) is bytes and found == driver.answer(address)
    assert [out % 128 for out in driver.outputs] == [0] * 64


def test_errors(driver):
    driver.code = 1
    wrong = "CUresult 1, float16, dims=(128, 4, 4294967296, 3, 2), strides=(256, 1024, "
    for _ in range(2):  # an error is not remembered
        with pytest.raises(RuntimeError) as error:
            tensor_map.encode(*MAP)
        assert not isinstance(error.value, tensor_map.NoContext)
        assert wrong in str(error.value) and f"{ADDRESS:#x}" in str(error.value)
        assert f"box={BOX}, swizzle=128" in str(error.value)
    assert len(driver.calls) == 2
    driver.code = 0
    assert tensor_map.encode(*MAP) == driver.answer(ADDRESS)


def test_a_thread_without_a_context(driver):
    driver.code = 201  # CUDA_ERROR_INVALID_CONTEXT
    with pytest.raises(tensor_map.NoContext, match="CUresult 201"):
        tensor_map.encode(*MAP)


# ---- What is remembered ----


def test_a_map_is_encoded_once(driver):
    assert {tensor_map.encode(*MAP) for _ in range(3)} == {driver.answer(ADDRESS)}
    assert len(driver.calls) == 1


OTHERS = (ADDRESS + 16, "bfloat16", (64, *DIMS[1:]), (512, *STRIDES[1:]), (32, *BOX[1:]), 64)


@pytest.mark.parametrize("changed", range(len(MAP)))
def test_whatever_differs_is_another_map(driver, changed):
    other = (*MAP[:changed], OTHERS[changed], *MAP[changed + 1 :])
    for arguments in (MAP, other, MAP, other):
        assert tensor_map.encode(*arguments) == driver.answer(arguments[0])
    assert len(driver.calls) == 2 and driver.calls[0] != driver.calls[1]


def test_threads(driver):
    driver.wait = 0.01  # all threads are in the driver at the same time
    barrier = threading.Barrier(8)

    def work(i):
        barrier.wait()
        addresses = [ADDRESS + 16 * (8 * step + i) for step in range(4)]
        return [tensor_map.encode(a, *MAP[1:]) == driver.answer(a) for a in addresses]

    with ThreadPoolExecutor(8) as pool:
        assert all(all(right) for right in pool.map(work, range(8)))
    assert len(driver.calls) == 32


# ---- The driver's library ----


@pytest.mark.parametrize("missing", ["library", "function"])
def test_without_a_driver(monkeypatch, missing):
    def load(name):
        if missing == "library":
            raise OSError(f"{name}: cannot open shared object file")
        return types.SimpleNamespace()

    monkeypatch.setattr(ctypes, "CDLL", load)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"needs a CUDA driver.*(cuda|cuTensorMap)"):
            tensor_map.encode(*MAP)


def test_a_driver_that_comes_later(monkeypatch, driver):
    with monkeypatch.context() as patch:
        patch.setattr(ctypes, "CDLL", lambda name: types.SimpleNamespace())
        with pytest.raises(RuntimeError, match="driver"):
            tensor_map.encode(*MAP)
    assert tensor_map.encode(*MAP) == driver.answer(ADDRESS)


def libraries_opened_by(statement):
    """Names of the shared libraries that a fresh interpreter opens by ctypes."""
    script = f"""
import sys
opened = []
sys.addaudithook(lambda event, args: event == "ctypes.dlopen" and opened.append(str(args[0])))
{statement}
print(*opened)
"""
    run = [sys.executable, "-c", script]
    return subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()


def test_an_import_loads_no_driver():
    opened = libraries_opened_by("import cuattn; cuattn.attention")
    assert not any("cuda" in name for name in opened)


def test_a_load_of_the_driver_is_seen():
    first_use = "import contextlib; from cuattn._device import tensor_map\n"
    first_use += "with contextlib.suppress(RuntimeError): tensor_map._encoder()"
    assert any("cuda" in name for name in libraries_opened_by(first_use))
