"""Errors and limits of launches on the software device."""

# ruff: noqa: F401, F811  (fixtures)

from __future__ import annotations

import re

import numpy as np
import pytest
from driver_kernels import (
    SM90,
    SOURCE,
    CUDADriverError,
    CUDARuntimeError,
    cupy,
    device,
    driver,
    exact,
    kernels,
    pairs,
    runtime,
    zeros,
)

# -- errors --


def test_an_error_ends_what_is_queued_and_nothing_else(kernels, exact):
    x, y, (one, two) = zeros(), zeros(), pairs(2)
    with one:
        kernels.fill((1,), (32,), (x, 1, np.float32(1)))
        kernels.fill((1,), (32,), (y, 0, np.float32(1)))
    with pytest.raises(CUDARuntimeError, match="cudaErrorLaunchFailure.*fill, block") as error:
        one.synchronize()
    assert "1 operations queued were dropped" in str(error.value)
    assert (y.get() == 0).all()
    with two:
        kernels.fill((1,), (32,), (y, 0, np.float32(3)))
    two.synchronize()
    assert (y.get() == 3).all()


def test_an_error_where_none_can_be_raised_comes_later(kernels, exact):
    """CuPy frees in destructors, which swallow exceptions."""
    x = zeros()
    kernels.fill((1,), (32,), (x, 1, np.float32(1)))
    runtime.free(runtime.malloc(8))  # waits for the device
    with pytest.raises((CUDADriverError, CUDARuntimeError), match="thread 31"):
        kernels.fill((1,), (32,), (x, 0, np.float32(2)))
    assert 2 not in x.get()


def test_what_the_device_cannot_run_says_so():
    x = cupy.arange(6, dtype=cupy.float32)
    for call in (
        lambda: cupy.sort(x),
        lambda: cupy.argsort(x),
        lambda: x.reshape(2, 3) @ x.reshape(3, 2),
        lambda: cupy.random.rand(3),
        lambda: cupy.random.RandomState(1),
        lambda: cupy.random.Generator(cupy.random.XORWOW(1)),
        lambda: runtime.hostRegister(0, 8, 0),
    ):
        with pytest.raises((NotImplementedError, ImportError, RuntimeError), match="software dev"):
            call()
    assert cupy.random.default_rng(1).standard_normal(4, dtype=np.float32).shape == (4,)
    assert x.reshape(2, 3).sum(axis=1).get().tolist() == [3, 12]


# -- launches --


@pytest.mark.parametrize(
    ("grid", "block", "words"),
    [
        ((1,), (1025,), "blockDim.x is 1025"),
        ((1,), (1, 1, 65), "blockDim.z is 65"),
        ((1,), (64, 32), "2048 threads in a block, but 1024"),
        ((1, 65536), (1,), "gridDim.y is 65536"),
        ((1, 1, 65536), (1,), "gridDim.z is 65536"),
    ],
)
def test_limits_of_a_launch(kernels, grid, block, words):
    with pytest.raises(CUDADriverError, match=f"_INVALID_VALUE: launch of kernel fill: {words}"):
        kernels.fill(grid, block, (zeros(), 0, np.float32(1)))


def test_no_blocks_and_no_threads(kernels):
    """CuPy makes a 1 of a 0 where it launches a kernel by its object."""
    kernel = kernels.fill.kernel.ptr
    with pytest.raises(CUDADriverError, match="_INVALID_VALUE: .*gridDim.x is 0"):
        driver.launchKernel(kernel, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0)
    with pytest.raises(CUDADriverError, match="_INVALID_VALUE: .*blockDim.y is 0"):
        driver.launchKernel(kernel, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0)


def test_launch_bounds(kernels):
    kernels.bounded((1,), (64,), (zeros(64),))
    with pytest.raises(CUDADriverError, match="65 threads .* 64 are the most that its __launch"):
        kernels.bounded((1,), (65,), (zeros(65),))


def test_registers_of_a_launch():
    """What ptxas says in its log is in the cubin."""
    from cupy.cuda import nvrtc

    arch = f"-arch=sm_{cupy.cuda.Device().compute_capability}"
    program = nvrtc.createProgram(SOURCE, "x.cu", (), ())
    nvrtc.compileProgram(program, (arch, "--ptxas-options=-v"))
    log = nvrtc.getProgramLog(program)
    used = re.search(r"(?s)entry function 'many_registers'.*?Used (\d+) registers", log).group(1)
    module, x = cupy.cuda.function.Module(), zeros(80)
    module.load(nvrtc.getCUBIN(program))
    kernel = module.get_function("many_registers")
    assert driver.funcGetAttribute(driver.CU_FUNC_ATTRIBUTE_NUM_REGS, kernel.ptr) == int(used) > 64
    kernel((1,), (512,), (x,))
    with pytest.raises(CUDADriverError, match=f"_OUT_OF_RES.*: 1024 threads .* with {used} regis"):
        kernel((1,), (1024,), (x,))


@pytest.fixture
def sm90():
    if int(cupy.cuda.Device().compute_capability) < 90:
        pytest.skip("clusters need sm_90")
    return cupy.RawModule(code=SM90)


def test_clusters(sm90):
    kernel, x = sm90.get_function("cluster"), zeros()
    with pytest.raises(CUDADriverError, match="INVALID_CLUSTER_SIZE.*clusters of 16 blocks, but 8"):
        kernel((32,), (1,), (x,))
    driver.funcSetAttribute(kernel.kernel.ptr, 14, 1)  # ..._NON_PORTABLE_CLUSTER_SIZE_ALLOWED
    kernel((32,), (1,), (x,))
    assert (x.get() == 1).all()
    with pytest.raises(CUDADriverError, match="INVALID_CLUSTER_SIZE.*gridDim.x is 24"):
        kernel((24,), (1,), (x,))


def test_a_block_of_the_size_that_the_kernel_is_compiled_for(sm90):
    kernel, x = sm90.get_function("exact"), zeros()
    kernel((1,), (32, 2), (x,))
    with pytest.raises(CUDADriverError, match=r"blockDim.y is 1, but the kernel .* for 2"):
        kernel((1,), (32,), (x,))


def test_code_of_another_architecture(tmp_path):
    from cupy.cuda import nvrtc

    other = "80" if cupy.cuda.Device().compute_capability == "90" else "90"
    program = nvrtc.createProgram(SOURCE, "x.cu", (), ())
    nvrtc.compileProgram(program, (f"-arch=sm_{other}",))
    path = tmp_path / "other.cubin"
    path.write_bytes(nvrtc.getCUBIN(program))
    with pytest.raises(CUDADriverError, match=f"NO_BINARY_FOR_GPU: code for sm_{other} on a dev"):
        cupy.RawModule(path=str(path)).get_function("fill").kernel  # noqa: B018


def test_dynamic_shared_memory_needs_its_opt_in(kernels):
    x, last = zeros(), np.int32((50 << 10) // 4 - 1)
    with pytest.raises(CUDADriverError, match="51200 bytes of dynamic .* but 49152 are allowed"):
        kernels.dynamic((1,), (32,), (x, last), shared_mem=50 << 10)
    kernel = kernels.dynamic
    kernel.max_dynamic_shared_size_bytes = 50 << 10
    kernel((1,), (32,), (x, last), shared_mem=50 << 10)
    assert (x.get() == 7).all()
    with pytest.raises(CUDADriverError, match="but a block has"):
        kernel.max_dynamic_shared_size_bytes = 1 << 20


def test_static_shared_memory_counts(kernels):
    kernel, x, all_of_it = kernels.both, zeros(), 48 << 10
    kernel((1,), (32,), (x,), shared_mem=all_of_it - 1024)
    with pytest.raises(CUDADriverError, match="49152 bytes .* beside 1024 of static, but 48128"):
        kernel((1,), (32,), (x,), shared_mem=all_of_it)
    kernel.max_dynamic_shared_size_bytes = all_of_it  # 48 KiB, but beside the static memory
    kernel((1,), (32,), (x,), shared_mem=all_of_it)
    runtime.deviceSynchronize()


def test_a_write_beyond_dynamic_shared_memory(kernels):
    kernels.dynamic((1,), (32,), (zeros(), np.int32(1 << 12)), shared_mem=1024)
    with pytest.raises(CUDARuntimeError, match=r"(?s)dynamic, block \(0, 0, 0\), thread"):
        runtime.deviceSynchronize()


@pytest.mark.parametrize("more", [-4, 4])
def test_a_struct_of_another_size(monkeypatch, more):
    import cuattn
    from cuattn._device.runtime import Cuda

    launch = Cuda.launch
    monkeypatch.setattr(
        Cuda,
        "launch",
        lambda self, kernel, params, *rest: launch(
            self, kernel, params[:more] if more < 0 else params + b"\0" * more, *rest
        ),
    )
    with pytest.raises(RuntimeError, match="softmax_rows.* declares .* bytes of parameters, but"):
        cuattn.softmax(cupy.ones((4, 8), cupy.float32))


def test_a_cubin_without_ptx(tmp_path):

    program = cupy.cuda.nvrtc.createProgram(SOURCE, "x.cu", (), ())
    cupy.cuda.nvrtc.compileProgram(program, (f"-arch=sm_{cupy.cuda.Device().compute_capability}",))
    cubin = cupy.cuda.nvrtc.getCUBIN(program)
    whole, bare = tmp_path / "whole.cubin", tmp_path / "bare.cubin"
    whole.write_bytes(cubin)
    bare.write_bytes(cubin[: cubin.index(b"\0SOFTPTX\0")])
    assert cupy.RawModule(path=str(whole)).get_function("fill").kernel
    with pytest.raises(CUDADriverError, match="a cubin without PTX"):
        cupy.RawModule(path=str(bare)).get_function("fill").kernel  # noqa: B018
