"""Tensor maps, through which TMA sees an array: `cuTensorMapEncodeTiled` of the CUDA driver.

https://docs.nvidia.com/cuda/cuda-driver-api/group__CUDA__TENSOR__MEMORY.html
"""

from __future__ import annotations

import ctypes
import struct
import sys
from functools import lru_cache
from typing import Any, NamedTuple

RANK = 5
BYTES = 128  # of a CUtensorMap
ALIGNMENT = 16  # of addresses and strides

# CUtensorMapDataType, CUtensorMapSwizzle, CUtensorMapL2promotion
DTYPES = {"float16": 6, "bfloat16": 9}
SWIZZLES = {64: 2, 128: 3}
L2_PROMOTION_128B = 2

SIZES = struct.Struct(f"{2 * RANK - 1}Q{2 * RANK}I")  # dims, strides, box, steps of its elements
INVALID_CONTEXT = 201  # CUresult


class NoContext(RuntimeError):
    """The calling thread has not used its device so far, so that the driver knows of none."""


class Boxes(NamedTuple):
    """An array and the boxes it is moved in; dimensions from the innermost on."""

    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # bytes; of all dimensions but the innermost, which is dense
    box: tuple[int, ...]
    swizzle: int  # bytes of a row of the box in shared memory


@lru_cache(maxsize=1)
def _encoder() -> Any:
    """`cuTensorMapEncodeTiled`, of the driver that CuPy has already loaded."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        function = ctypes.CDLL(name).cuTensorMapEncodeTiled
    except (OSError, AttributeError) as error:
        raise RuntimeError(f"cuattn needs a CUDA driver of version 12 or newer: {error}") from error
    pointer, number = ctypes.c_void_p, ctypes.c_int
    function.argtypes = [pointer, number, ctypes.c_uint32, *[pointer] * 5, *[number] * 4]
    function.restype = ctypes.c_int
    return function


@lru_cache(maxsize=4096)
def encode(
    address: int,
    dtype: str,
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
) -> bytes:
    """The map of an array at an address; see `Boxes`.

    Raises
    ------
    NoContext
        In a thread of its own, before the first launch there.
    RuntimeError
        The driver refuses the map; the message has its error code.
    """
    memory = ctypes.create_string_buffer(3 * BYTES)
    start = -ctypes.addressof(memory) % BYTES  # the driver writes to a multiple of 64
    SIZES.pack_into(memory, start + BYTES, *dims, *strides, *box, *(1,) * RANK)
    output = ctypes.addressof(memory) + start
    dims_at = output + BYTES
    strides_at = dims_at + 8 * RANK
    box_at = strides_at + 8 * (RANK - 1)
    code = _encoder()(
        output,
        DTYPES[dtype],
        RANK,
        address,
        dims_at,
        strides_at,
        box_at,
        box_at + 4 * RANK,
        0,  # not interleaved
        SWIZZLES[swizzle],
        L2_PROMOTION_128B,
        0,  # zeros outside of the array
    )
    if code != 0:
        raise (NoContext if code == INVALID_CONTEXT else RuntimeError)(
            f"cuTensorMapEncodeTiled refuses the array at {address:#x}: CUresult {code}, {dtype}, "
            f"dims={dims}, strides={strides}, box={box}, swizzle={swizzle}"
        )
    return memory.raw[start : start + BYTES]
