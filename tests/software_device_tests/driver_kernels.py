"""Small kernels for the tests of the software device's driver, and what those tests share."""

from __future__ import annotations

import pytest
import software_device

device = software_device.device
if device is None:
    pytest.skip("this process has no software device", allow_module_level=True)

import cupy  # noqa: E402
from cupy.cuda import Event, Stream, driver, runtime  # noqa: E402, F401
from cupy_backends.cuda.api.driver import CUDADriverError  # noqa: E402, F401
from cupy_backends.cuda.api.runtime import CUDARuntimeError  # noqa: E402, F401

SEEDS = range(40)
SOURCE = r"""
extern "C" __global__ void fill(float* p, int first, float value) {
  p[blockIdx.x * blockDim.x + threadIdx.x + first] = value;
}
extern "C" __global__ void add_one(const float* from, float* to) {
  to[threadIdx.x] = from[threadIdx.x] + 1;
}
extern "C" __global__ void __launch_bounds__(64) bounded(float* p) { p[threadIdx.x] = 1; }
extern "C" __global__ void dynamic(float* p, int last) {
  extern __shared__ float s[];
  s[last] = 7;
  __syncthreads();
  p[threadIdx.x] = s[last];
}
extern "C" __global__ void both(float* p) {
  extern __shared__ float s[];
  __shared__ float t[256];
  t[threadIdx.x] = s[threadIdx.x] = threadIdx.x;
  __syncthreads();
  p[threadIdx.x] = s[31 - threadIdx.x] + t[31 - threadIdx.x];
}
extern "C" __global__ void many_registers(float* p) {
  float a[80];
  for (int i = 0; i < 80; ++i) a[i] = p[i];
  __syncthreads();
  for (int i = 0; i < 80; ++i) p[i] = 2 * a[79 - i] - a[i];
}
"""
SM90 = r"""
extern "C" __global__ void __cluster_dims__(16) cluster(float* p) { p[blockIdx.x] = 1; }
extern "C" __global__ void __block_size__((32, 2, 1)) exact(float* p) { p[threadIdx.x] = 1; }
"""


def zeros(n=32):
    array = cupy.zeros(n, cupy.float32)
    cupy.cuda.runtime.deviceSynchronize()
    return array


def add_one(kernels, a, b):
    kernels.add_one((1,), (32,), (a, b))


def pairs(n):
    """Non-blocking streams."""

    return [Stream(non_blocking=True) for _ in range(n)]


@pytest.fixture
def kernels():
    module = cupy.RawModule(code=SOURCE)

    class Kernels:
        def __getattr__(self, name):
            return module.get_function(name)

    return Kernels()


@pytest.fixture
def exact():
    """Allocations of their own: CuPy's pool would round them up, and keep them."""
    with cupy.cuda.using_allocator(None):
        yield
