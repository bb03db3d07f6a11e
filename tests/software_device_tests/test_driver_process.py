"""The software device in processes of its own: the command, the plugin, and what cannot be had."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import software_device

ROOT = Path(__file__).resolve().parents[2]
if software_device.device is None:
    pytest.skip("this process has no software device", allow_module_level=True)


def run(*arguments, **environment):
    command = [sys.executable, ROOT / "tests/software_device", *arguments]
    given = {**os.environ, **environment}
    given.pop("PYTEST_ADDOPTS", None)
    given.pop("PYTEST_PLUGINS", None)
    return subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True)


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_a_script_with_arguments(script):
    path = script("import sys, cupy\nprint(cupy.arange(3).sum(), sys.argv[1:], __name__)\n")
    assert run(path, "a", "-b").stdout == "3 ['a', '-b'] __main__\n"


def test_a_module():
    done = run("-m", "cuattn", "--info")
    assert done.returncode == 0, done.stderr
    assert "software device" in done.stdout


def test_the_host_cannot_use_a_device_pointer(script):
    path = script("import cupy, ctypes\nctypes.string_at(cupy.zeros(9).data.ptr, 1)\n")
    assert run(path).returncode == -signal.SIGSEGV


def test_launch_blocking(script):
    path = script(
        "import cupy\n"
        "cupy.cuda.set_allocator(None)\n"
        "code = 'extern \"C\" __global__ void k(int* p) { p[1] = 1; }'\n"
        "cupy.RawKernel(code, 'k')((1,), (1,), (cupy.empty(1, 'i4'),))\n"
    )
    assert run(path).returncode == 0  # nobody has waited for it
    done = run(path, CUDA_LAUNCH_BLOCKING="1")
    assert "cupy.RawKernel" in done.stderr and "out of bounds" in done.stderr


def test_two_devices(script):
    path = script(
        "import cupy, cuattn\n"
        "with cupy.cuda.Device(1):\n"
        "    x = cupy.ones((2, 4), cupy.float32)\n"
        "    stream = cupy.cuda.Stream()\n"
        "y = cuattn.softmax(x)\n"
        "print(y.device.id, cupy.cuda.Device().id, float(y[0, 0]))\n"
        "kernel = cupy.RawKernel('extern \"C\" __global__ void k() {}', 'k')\n"
        "try:\n"
        "    kernel((1,), (1,), (), stream=stream)\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    lines = run(path, SOFTWARE_DEVICE_DEVICES="2").stdout.splitlines()
    assert lines[0] == "1 0 0.25"
    assert "device 0 is current" in lines[1] and "the stream belongs to device 1" in lines[1]


TESTS = """
import cupy, pytest
KERNEL = cupy.RawKernel('extern "C" __global__ void k(int* p, int i) { p[i] = 1; }', "k")

@pytest.mark.gpu
@pytest.mark.parametrize("i", [0, 1])
def test_kernel(i):
    with cupy.cuda.using_allocator(None):
        test_kernel.array = cupy.empty(1, "i4")
    KERNEL((1,), (1,), (test_kernel.array, cupy.int32(i)))

@pytest.mark.gpu
def test_the_device_is_usable():
    assert cupy.ones(3).sum() == 3

@pytest.mark.gpu
def test_a_capture_is_left_open():
    test_kernel.stream = cupy.cuda.Stream()
    test_kernel.stream.begin_capture()
    raise AssertionError

@pytest.mark.gpu
def test_and_ended():
    assert cupy.ones(3).sum() == 3
"""


def test_an_error_belongs_to_its_test(script):
    path = script(TESTS, "test_it.py")
    done = run("-m", "pytest", "-c", ROOT / "setup.cfg", "--rootdir", ROOT, "-rf", "-q", path)
    assert "2 failed, 3 passed" in done.stdout, done.stdout + done.stderr
    assert "test_kernel[1]" in done.stdout and "out of bounds: write of 4 bytes" in done.stdout


def test_where_it_cannot_be_had(script, tmp_path):
    nothing = {"SOFTWARE_DEVICE_CACHE": str(tmp_path / "cache"), "CXX": "/no/such/compiler"}
    done = run(script(""), **nothing)
    assert done.returncode == 1
    assert "no software device: the software device needs a C++17 compiler" in done.stderr
    path = script(TESTS, "test_it.py")
    command = [sys.executable, "-m", "pytest", "-p", "software_device.plugin", "-rs", "-q", path]
    folders = os.pathsep.join([str(ROOT / "tests"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for required, words in (("0", "skipped"), ("1", "CUATTN_REQUIRE_GPU=1, but there is no")):
        environment = {
            **os.environ,
            **nothing,
            "PYTHONPATH": folders,
            "CUATTN_REQUIRE_GPU": required,
        }
        environment.pop("PYTEST_PLUGINS", None)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert words in done.stdout + done.stderr


def test_after_cupy(script):
    path = script(
        "import sys\nsys.path[:0] = ['tests', '.']\nimport cupy, software_device\n"
        "try:\n    software_device.install()\n"
        "except RuntimeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True)
    assert "must be installed before cupy is imported" in done.stdout
