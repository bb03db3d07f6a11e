"""Arrays of NumPy, CuPy and other libraries: where they are, and taking them without a copy."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from typing import Any

import numpy as np

INSTALL = "pip install 'cuattn[cuda13x]' (or cuda12x)"

# DLDeviceType of dlpack.h: the kinds whose memory the CPU reads, and those of CUDA devices.
HOST = (1, 3)  # kDLCPU, kDLCUDAHost: pinned memory
CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
LEGACY_STREAM = 1  # cudaStreamLegacy: the default stream, whose handle is also 0


def is_cupy(value: Any) -> bool:
    """Whether `value` is a CuPy array."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(value, cupy.ndarray)


def on_host(value: Any) -> bool | None:
    """Whether an array of any library is on the host (else on a CUDA device); None: no array.

    A NumPy scalar is an array on the host.
    """
    if is_cupy(value):
        return False
    if isinstance(value, (np.ndarray, np.generic)):
        return True
    if hasattr(type(value), "__dlpack_device__"):  # whatever else the class has: the class of a
        kind = _dlpack_kind(value)  # tensor on the host has the interface, too
        return True if kind in HOST else False if kind in CUDA else None
    return False if hasattr(type(value), "__cuda_array_interface__") else None


def adopt(value: Any) -> Any:
    """What `on_host` knows as an array, as one of NumPy or CuPy, without a copy.

    Raises BufferError, TypeError or ValueError if the library that it comes from refuses.
    """
    if isinstance(value, np.ndarray) or is_cupy(value):
        return value
    if isinstance(value, np.generic):
        return np.asarray(value)
    dlpack = hasattr(type(value), "__dlpack_device__")
    if dlpack and _dlpack_kind(value) in HOST:
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError) as refusal:
            bfloat16 = None  # of which NumPy's DLPack does not know
            with contextlib.suppress(RuntimeError):
                bfloat16 = _bfloat16(value)
            if bfloat16 is None:
                raise BufferError(str(refusal)) from refusal
            return bfloat16
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"cuattn needs CuPy for arrays on a GPU: {INSTALL}") from error
    return cupy.from_dlpack(value) if dlpack else _of_interface(cupy, value)


def _dlpack_kind(value: Any) -> int | None:
    """DLDeviceType of an array; None where it has none, as one that lies on several devices."""
    try:
        return int(value.__dlpack_device__()[0])
    except Exception:  # whatever a library raises where an array is not in one place
        return None


def is_read_only(value: Any) -> bool:
    """Whether an array of a CUDA device says so. CuPy, which has no such arrays, does not ask."""
    if is_cupy(value) or not hasattr(type(value), "__cuda_array_interface__"):
        return False
    return bool(value.__cuda_array_interface__["data"][1])


# ---- __cuda_array_interface__ ----


class _Unordered:
    """An array as its interface shows it, but for its stream. It keeps the memory alive."""

    def __init__(self, value: Any, interface: dict[str, Any]) -> None:
        self.value = value
        self.__cuda_array_interface__ = {**interface, "stream": None}


def _of_interface(cupy: Any, value: Any) -> Any:
    """A CuPy array of one that has no DLPack.

    The current stream waits for the stream of the array. CuPy alone would wait on the host, which
    is not allowed while a graph is captured.
    https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html#synchronization
    """
    interface = value.__cuda_array_interface__
    array = cupy.asarray(_Unordered(value, interface))
    stream = interface.get("stream")
    if stream is not None:
        with cupy.cuda.Device(array.data.device_id):
            current = cupy.cuda.get_current_stream().ptr
            if stream != (current or LEGACY_STREAM):
                event = cupy.cuda.Event(disable_timing=True)
                cupy.cuda.runtime.eventRecord(event.ptr, stream)
                cupy.cuda.runtime.streamWaitEvent(current, event.ptr)
    return array


# ---- bfloat16 ----


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),  # in elements; null: C order
        ("byte_offset", ctypes.c_uint64),
    )


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned of dlpack.h; bit 0 of its flags: read-only."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


class _Words:
    """The elements of a capsule as 16-bit words. The capsule stays as it is, so that the memory is
    given back when the last array that looks at it goes."""

    def __init__(self, capsule: Any, tensor: _Tensor, read_only: bool) -> None:
        self.capsule = capsule
        shape = tuple(tensor.shape[: tensor.ndim])
        strides = tuple(2 * s for s in tensor.strides[: tensor.ndim]) if tensor.strides else None
        self.__array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(np.uint16).str,
            "data": ((tensor.data or 0) + tensor.byte_offset, read_only),
            "strides": strides,
            "version": 3,
        }


_is_capsule = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_address_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _bfloat16(value: Any) -> np.ndarray | None:
    """An array on the host whose library calls its elements bfloat16; None if it does not."""
    try:
        capsule = value.__dlpack__(max_version=(1, 0))
    except TypeError:  # a library from before versions
        capsule = value.__dlpack__()
    if _is_capsule(capsule, b"dltensor_versioned"):
        managed = _Versioned.from_address(_address_of(capsule, b"dltensor_versioned"))
        tensor, read_only = managed.tensor, bool(managed.flags & 1)
    else:  # a DLManagedTensor, which begins with its DLTensor; for NumPy, too, read-only
        tensor, read_only = _Tensor.from_address(_address_of(capsule, b"dltensor")), True
    if (tensor.code, tensor.bits, tensor.lanes) != (4, 16, 1):  # kDLBfloat
        return None
    try:
        import ml_dtypes
    except ImportError as error:
        raise BufferError("bfloat16 needs ml_dtypes: pip install 'cuattn[bf16]'") from error
    words = _Words(capsule, tensor, read_only)
    shape = words.__array_interface__["shape"]
    if 0 in shape:  # the address may be null
        return np.empty(shape, ml_dtypes.bfloat16)
    return np.asarray(words).view(ml_dtypes.bfloat16)
