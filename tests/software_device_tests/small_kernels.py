"""Small kernels for the software device, launched without a driver: an error ends one launch only.

They are CUDA C, compiled by NVRTC to PTX, or PTX as text where an instruction has no C.
"""

from __future__ import annotations

import ctypes
import re
import struct

import numpy as np
import pytest
import software_device

if software_device.device is None:
    pytest.skip("this process has no software device", allow_module_level=True)
LIBRARY = software_device.device.library

COPY = """__global__ void copy(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}"""


class Unwritten(np.ndarray):
    """An array whose memory on the device nobody writes before the kernel."""


def unwritten(n, dtype=np.int32):
    return np.zeros(n, dtype).view(Unwritten)


class Buffer:
    """Device memory of exactly an array's bytes."""

    def __init__(self, array):
        self.array = np.ascontiguousarray(array)
        pointer = ctypes.c_void_p()
        assert LIBRARY.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(self.array.nbytes)) == 0
        self.address = pointer.value
        if not isinstance(array, Unwritten):
            assert self._copy(self.address, self.array.ctypes.data, 1) == 0

    def _copy(self, to, source, kind):
        size = ctypes.c_size_t(self.array.nbytes)
        return LIBRARY.cudaMemcpy(ctypes.c_void_p(to), ctypes.c_void_p(source), size, kind)

    def get(self):
        assert self._copy(self.array.ctypes.data, self.address, 2) == 0
        return self.array

    def free(self):
        LIBRARY.cudaFree(ctypes.c_void_p(self.address))


def compile_c(source, arch="compute_80"):
    if not source.startswith("struct"):
        source = 'extern "C" ' + source
    return compile_ptx(source, ("-arch=" + arch,))


def compile_with_headers(source, arch="compute_80"):
    """Of a kernel that includes headers of cuda_src."""
    from cuattn._device.compiler import compiler_options

    return compile_ptx(source, compiler_options(arch))


def compile_ptx(source, options):
    from cupy.cuda import nvrtc

    program = nvrtc.createProgram(source, "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise AssertionError(f"the kernel does not compile:\n{log}") from None
    ptx = nvrtc.getPTX(program)
    nvrtc.destroyProgram(program)
    return ptx if isinstance(ptx, bytes) else ptx.encode()


def ptx_kernel(body, params=".param .u64 p0", directives="", arch="sm_90a"):
    """A kernel `k` in PTX with registers of each type, %tid.x in %r0, the address p0 in %rd0."""
    return f"""
.version 8.0
.target {arch}
.address_size 64
.extern .shared .align 1024 .b8 dynamic[];
.visible .entry k({params}) {directives}
{{
.reg .pred %p<8>;
.reg .b16 %h<8>;
.reg .b32 %r<32>;
.reg .f32 %f<128>;
.reg .b64 %rd<16>;
ld.param.u64 %rd0, [p0];
mov.u32 %r0, %tid.x;
{body}
ret;
}}
""".encode()


def run(ptx, *arguments, block=32, grid=1, smem=0, seed=0):
    """Launches the only kernel; arrays are passed as Buffers and read back. The error, or None."""
    name = re.search(rb"\.entry\s+([\w$]+)", ptx).group(1)
    buffers = [Buffer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    params, previous = b"", None
    for buffer, argument in zip(buffers, arguments, strict=True):
        if callable(argument):  # a tensor map of the buffer before
            value, alignment = argument(previous), 64
        elif isinstance(buffer, Buffer):
            value, alignment, previous = struct.pack("<Q", buffer.address), 8, buffer
        else:
            value, alignment = struct.pack("<i", argument), 4
        params += b"\0" * (-len(params) % alignment) + value
    LIBRARY.softSeed(ctypes.c_uint64(seed))
    dims = [(list(np.atleast_1d(d)) + [1, 1])[:3] for d in (grid, block)]
    shape = (ctypes.c_uint32 * 7)(*dims[0], *dims[1], smem)
    message = ctypes.create_string_buffer(4000)
    sizes = [ctypes.c_size_t(n) for n in (len(params), 0, len(message))]
    LIBRARY.device_run_ptx(
        ptx + b"\0", name, shape, params, sizes[0], None, sizes[1], message, sizes[2]
    )
    for buffer, argument in zip(buffers, arguments, strict=True):
        if isinstance(buffer, Buffer):
            argument[...] = buffer.get()
            buffer.free()
    return message.value.decode() or None


def fails(message, ptx, *arguments, **launch):
    error = run(ptx, *arguments, **launch)
    assert error is not None, f"no error, but {message!r} was expected"
    assert re.search(message, error), error
    return error
