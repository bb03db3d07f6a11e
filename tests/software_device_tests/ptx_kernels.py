"""Small PTX kernels on NumPy arrays, run by the software device with neither CuPy nor NVRTC."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import pytest
import software_device

if software_device.device is None:
    pytest.skip("this process has no software device", allow_module_level=True)
BLOCK = 128
HEAD = ".version 8.5\n.target sm_90a\n.address_size 64\n"


class DeviceError(RuntimeError):
    """What the device says of a module or a launch."""


@functools.cache
def library():
    library = software_device.device.library
    library.device_address.restype = ctypes.c_uint64
    return library


def call(function, *arguments):
    error = ctypes.create_string_buffer(4000)
    if function(*arguments, error, ctypes.c_size_t(len(error))):
        raise DeviceError(error.value.decode())


def check_opcode(opcode):
    call(library().device_check_opcode, opcode.encode())


def check_module(ptx):
    call(library().device_check_ptx, (HEAD + ptx).encode())


class Memory:
    """Arrays side by side in one piece of host memory; what a kernel writes is seen in `arrays`."""

    def __init__(self, arrays):
        offsets = np.cumsum([0] + [(a.nbytes + 63) // 64 * 64 for a in arrays])
        self.bytes = np.zeros(int(offsets[-1]) + 64, np.uint8)
        start = -self.bytes.ctypes.data % 64
        self.base, self.size = self.bytes.ctypes.data + start, int(offsets[-1])
        self.arrays, self.addresses = [], []
        for array, offset in zip(arrays, offsets[:-1], strict=True):
            piece = self.bytes[start + offset :][: array.nbytes].view(array.dtype)
            piece[...] = array.ravel()
            self.arrays.append(piece)
            self.addresses.append(
                library().device_address(ctypes.c_void_p(self.base + int(offset)))
            )


def launch(ptx, memory, parameters=None, *, kernel="kernel", grid=1, block=32, shared=0):
    """Runs a kernel whose parameters are addresses of `memory`, or the bytes `parameters`."""
    if parameters is None:
        parameters = np.array(memory.addresses, np.uint64).tobytes()
    call(
        library().device_run_ptx,
        (HEAD + ptx).encode(),
        kernel.encode(),
        (ctypes.c_uint32 * 7)(grid, 1, 1, block, 1, 1, shared),
        parameters,
        ctypes.c_size_t(len(parameters)),
        ctypes.c_void_p(memory.base),
        ctypes.c_size_t(memory.size),
    )


def elementwise(body, inputs, outputs, *, registers=""):
    """Runs `body` once an element: %x0, %x1, ... are read from `inputs`, %y0, ... written.

    `outputs` are dtypes. Registers have the size of their dtype, 16 bits at least.
    """
    inputs = np.broadcast_arrays(*inputs)
    count = inputs[0].size
    memory = Memory(
        [np.ascontiguousarray(a) for a in inputs] + [np.zeros(count, dtype) for dtype in outputs]
    )
    names = [f"%x{k}" for k in range(len(inputs))] + [f"%y{k}" for k in range(len(outputs))]
    lines, ends = [], []
    for k, (name, array) in enumerate(zip(names, memory.arrays, strict=True)):
        size = array.itemsize
        lines += [
            f".reg .b{8 * max(size, 2)} {name};",
            f"ld.param.u64 %a{k}, [p{k}];",
            f"mad.wide.u32 %a{k}, %i, {size}, %a{k};",
        ]
        if k < len(inputs):
            lines.append(f"ld.global.b{8 * size} {name}, [%a{k}];")
        else:
            ends.append(f"st.global.b{8 * size} [%a{k}], {name};")
    parameters = ", ".join(f".param .u64 p{k}" for k in range(len(names)))
    ptx = f"""
.visible .entry kernel({parameters})
{{
  .reg .pred %p<8>;
  .reg .b16 %h<8>;
  .reg .b32 %r<8>, %i, %t;
  .reg .b64 %a<{len(names)}>, %d<8>;
  {registers}
  mov.u32 %i, %tid.x;
  mov.u32 %t, %ctaid.x;
  mad.lo.u32 %i, %t, {BLOCK}, %i;
  setp.ge.u32 %p7, %i, {count};
  @%p7 bra END;
  {chr(10).join(lines)}
  {body}
  {chr(10).join(ends)}
END:
  ret;
}}
"""
    launch(ptx, memory, grid=-(-count // BLOCK), block=BLOCK)
    results = [a.copy() for a in memory.arrays[len(inputs) :]]
    return results[0] if len(results) == 1 else results
