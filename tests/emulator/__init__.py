"""Runs the kernels of ``cuda_src/`` on the CPU, strictly: what hardware might forgive is an error.

``activate()`` makes NumPy arrays given to the public API run through the real kernels, compiled
as C++, one fiber per CUDA thread. ``launch_source()`` runs a kernel from a string.

A ``cp.async`` takes its source at once and lands as late as allowed, when its thread waits for it;
until then no thread may touch its destination. ``ldmatrix``, ``stmatrix`` and ``mma`` need all 32
lanes and order no memory accesses: rows are read or written by all lanes together, so a
``__syncwarp`` belongs between that and a lane's own access to the same bytes. An ``mma`` in float32
adds the exact products and the accumulator in float64 and truncates the sum, as tensor cores
truncate; of tf32 operands it ignores the low 13 bits. In float64 it is one fma after another.

A bulk load lands when a thread waits for its phase of an mbarrier, and a bulk store reads its box
when its thread waits for that. Until then nothing may read or write the box of the load, nor write
the box of the store. The thread that starts either must come after every earlier access to the
bytes: by a barrier and, if the access was an ordinary instruction, also by a ``fence_proxy_async``
of the accessing thread before that barrier. A thread waits for the phases of an mbarrier one after
another, for each before the following one completes.
Tensor maps are in a format of the emulator's own (`Runtime.tensor_map`); only members of the
launch's parameters count.

A ``wgmma`` is multiplied when its warp waits for it, each warp on its own. Until then its operands
may not change, its accumulators hold a NaN, and nothing may write the shared memory that it reads.
Afterwards a thread that is synchronised with one lane of each reading warp may. It comes after what
was done with the bytes before, as a bulk copy does. ``setmaxnreg`` assumes a launch with all
registers that its threads can have.

With ``profile=True`` either counts ``Counters.cost``, a relative number of executed instructions:
the bytes of CPU code of each basic block, as often as the warp runs it. Between two points where
all lanes meet (a collective of the whole warp, a barrier of the block, the end) that is as often as
the lane that runs it most; lanes that run it in different iterations of a loop without meeting
count as if together. It compares inputs of one kernel under one compiler: it is no SASS, and an
instruction that the emulator implements by a call, an exponential or a shuffle, costs that call.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import struct
import weakref

import numpy as np

from cuattn._device.kernel import Limits
from cuattn._device.recent import Recent
from cuattn._device.workspace import Workspace, Workspaces

from . import build

_REGISTERS = 65536  # a multiprocessor
_SMEM_LIMITS = {"sm_80": 163, "sm_90": 227, "sm_90a": 227}  # KiB a block, static and dynamic
_SIZES = (1, 2, 4, 8, 16)


class EmulatorError(RuntimeError):
    """A kernel broke a rule; the message names the kernel, block, thread and call site."""


@dataclasses.dataclass
class Counters:
    """What launches cost. Sectors are 32 bytes and counted once per warp instruction."""

    global_bytes_read: int = 0  # requested by the threads
    global_bytes_written: int = 0
    global_sectors_read: int = 0
    global_sectors_written: int = 0
    global_requests: int = 0  # warp-level loads and stores
    loads_by_size: dict[int, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(_SIZES, 0)
    )
    stores_by_size: dict[int, int] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(_SIZES, 0)
    )
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0  # without bank conflicts
    exps: int = 0  # exponentials, by thread
    barriers: int = 0  # of a block
    warp_collectives: int = 0  # shuffles, votes and reductions, not __syncwarp
    mma: int = 0  # by warp, of any shape
    wgmma: int = 0  # by warp
    ldmatrix: int = 0  # ldmatrix and stmatrix by warp, four matrices each
    cluster_barriers: int = 0
    mbarrier_waits: int = 0  # by thread
    st_async_bytes: int = 0
    bulk_bytes: int = 0  # of boxes loaded, with the zeros outside of their tensors
    cost: int = 0  # bytes of code that warps ran; only with profile=True

    def __add__(self, other):
        total = Counters()
        for field in dataclasses.fields(self):
            a, b = getattr(self, field.name), getattr(other, field.name)
            both = {size: a[size] + b[size] for size in _SIZES} if isinstance(a, dict) else a + b
            setattr(total, field.name, both)
        return total


def _counter_fields():
    for field in dataclasses.fields(Counters):
        many = field.name.endswith("_by_size")
        yield field.name, ctypes.c_uint64 * len(_SIZES) if many else ctypes.c_uint64


class _CCounters(ctypes.Structure):
    _fields_ = list(_counter_fields())

    def to_python(self):
        values = {name: getattr(self, name) for name, _ in self._fields_}
        for name in ("loads_by_size", "stores_by_size"):
            values[name] = dict(zip(_SIZES, values[name], strict=True))
        return Counters(**values)


class _CRegion(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("host", ctypes.c_void_p),
        ("access", ctypes.c_void_p),
        ("written", ctypes.c_void_p),
        ("label", ctypes.c_char_p),
        ("uniform_access", ctypes.c_uint64),
    ]


class _CLaunch(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("params", ctypes.c_void_p),
        ("params_size", ctypes.c_uint64),
        ("regions", ctypes.POINTER(_CRegion)),
        ("num_regions", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32),
        ("cluster", ctypes.c_uint32),
        ("arch", ctypes.c_uint32),
        ("dynamic_smem", ctypes.c_uint64),
        ("smem_limit", ctypes.c_uint64),
        ("registers", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("counters", ctypes.POINTER(_CCounters)),
        ("error", ctypes.c_char_p),
        ("error_size", ctypes.c_uint64),
    ]


# -- device memory -------------------------------------------------------------------------------


@dataclasses.dataclass
class _Allocation:
    """An array that owns its memory, at an address that only the wrappers of ptx/ can use."""

    address: int
    low: int  # host address
    written: np.ndarray | None  # per byte, for arrays from `empty`
    owner: weakref.ref


_allocations: dict[int, _Allocation] = {}
_next_address = 1 << 44


def _owner(array):
    """The array whose memory `array` shows."""
    owner, base = array, array.base
    while base is not None:
        if isinstance(base, np.ndarray):
            owner = base
        base = getattr(base, "base", None)
    low, high = np.lib.array_utils.byte_bounds(array)
    bounds = np.lib.array_utils.byte_bounds(owner)
    return owner if array.size == 0 or bounds[0] <= low <= high <= bounds[1] else array


def _allocation(array, written=None):
    global _next_address
    owner = _owner(array)
    found = _allocations.get(id(owner))
    if found is not None and found.owner() is owner:
        return found
    low, high = np.lib.array_utils.byte_bounds(owner)
    key = id(owner)
    forget = weakref.ref(owner, lambda _: _allocations.pop(key, None))
    allocation = _Allocation(_next_address, low, written, forget)
    _allocations[key] = allocation
    # Aligned as the device's allocator aligns, and far from the next one.
    _next_address += -(-(max(high - low, 1) + 4096) // 4096) * 4096
    return allocation


def _host_address(array):
    return array.__array_interface__["data"][0]


def address(array):
    """The device address of `array`, aligned with respect to its owner as on a device."""
    allocation = _allocation(array)
    return allocation.address + _host_address(array) - allocation.low


def empty(shape, dtype):
    """A C-contiguous array of NaN bytes; kernels may not read what none has written."""
    array = np.empty(shape, dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF
    _allocation(array, written=np.zeros(array.nbytes, np.uint8))
    return array


def pack(*fields):
    """The bytes of a struct: arrays become pointers, ints ``long long``; the rest stays.

    That is NumPy scalars, and tensor maps as bytes.
    """
    data, widest = b"", 1
    for field in fields:
        if isinstance(field, np.ndarray):
            field = np.uint64(address(field))
        elif isinstance(field, int) and not isinstance(field, bool):
            field = np.int64(field)
        raw = field if isinstance(field, bytes) else field.tobytes()
        data += b"\0" * (-len(data) % len(raw)) + raw
        widest = max(widest, len(raw))
    return data + b"\0" * (-len(data) % widest)


_ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
_MAP_MAGIC = 0x70616D726F736E65  # as in runtime/bulk.cpp


def _encode_tensor_map(address, dtype, dims, strides, box, swizzle):
    """The 128 bytes of a TensorMap: ``cuTensorMapEncodeTiled``, but in the emulator's format.

    `dims` and `box` are of 5 dimensions, innermost first; `strides` are the bytes of all but the
    innermost. Rows of a swizzled box take up the swizzle's span: else their layout is unknown.
    """
    item = _ITEM_BYTES.get(dtype, 0)
    row = box[0] * item
    rules = {
        f"dtype must be one of {', '.join(_ITEM_BYTES)}": item,
        "5 dims, 5 sizes of a box and 4 strides": (len(dims), len(box), len(strides)) == (5, 5, 4),
        "address must be a multiple of 16": address % 16 == 0,
        "dims must be 1 to 2**32": all(1 <= n <= 2**32 for n in dims),
        "strides must be multiples of 16 below 2**40": all(
            0 <= n < 2**40 and n % 16 == 0 for n in strides
        ),
        "box must be 1 to 256": all(1 <= n <= 256 for n in box),
        "rows of the box must be a multiple of 16 bytes": row % 16 == 0,
        "swizzle must be 0, 32, 64 or 128 bytes": swizzle in (0, 32, 64, 128),
        "rows of the box must be as long as the swizzle": swizzle in (0, row),
    }
    for rule, kept in rules.items():
        if not kept:
            raise EmulatorError(
                f"tensor map: {rule}: address=0x{address:x}, dtype={dtype}, dims={tuple(dims)}, "
                f"strides={tuple(strides)}, box={tuple(box)}, swizzle={swizzle}"
            )
    return struct.pack(
        "<11Q8H3Q", _MAP_MAGIC, address, *dims, *strides, *box, item, swizzle, *4 * [0]
    )


def tensor_map(array, dims, strides, box, swizzle=0):
    """`Runtime.tensor_map` of the memory from the first element of `array` on."""
    return _encode_tensor_map(address(array), array.dtype.name, dims, strides, box, swizzle)


def _view_bytes(array):
    """`array` without its repeated elements."""
    index = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in array.strides)
    return array[index] if array.ndim else array


def _regions(reads, writes):
    """One region per allocation: what a launch may access, and what keeps its memory alive."""
    views = {}
    for bit, name, arrays in ((1, "reads", reads), (2, "writes", writes)):
        for i, array in enumerate(arrays):
            if array is not None and array.size:
                allocation = _allocation(array)
                views.setdefault(allocation.address, (allocation, []))[1].append(
                    (bit, f"{name}[{i}]", _view_bytes(array))
                )
    regions, keep = [], []
    for allocation, group in views.values():
        extents = [np.lib.array_utils.byte_bounds(array) for _, _, array in group]
        low, high = min(e[0] for e in extents), max(e[1] for e in extents)
        start = low - allocation.low
        dense = all(
            e == (low, high) and a.nbytes == high - low
            for e, (*_, a) in zip(extents, group, strict=True)
        )
        access, uniform = None, 0
        if dense:
            for bit, _, _ in group:
                uniform |= bit
        else:
            access = np.zeros(high - low, np.uint8)
            for bit, _, array in group:
                offset = _host_address(array) - low
                part = np.lib.stride_tricks.as_strided(
                    access[offset:], (*array.shape, array.itemsize), (*array.strides, 1)
                )
                part |= bit
        written = None
        if allocation.written is not None:
            written = allocation.written[start : start + high - low]
            # The host may have written, too: an element that is no longer poison.
            owner = allocation.owner()
            elements = owner.reshape(-1).view(np.uint8).reshape(-1, owner.itemsize)
            by_host = np.repeat((elements != 0xFF).any(axis=1), owner.itemsize)
            np.maximum(written, by_host[start : start + high - low], out=written)
        label = "+".join(name for _, name, _ in group).encode()
        keep.append((access, written, label))
        regions.append(
            _CRegion(
                allocation.address + start,
                high - low,
                low,
                None if access is None else access.ctypes.data,
                None if written is None else written.ctypes.data,
                label,
                uniform,
            )
        )
    return regions, keep


# -- launching -----------------------------------------------------------------------------------


def _check_launch(name, arch, grid, block, cluster, smem_bytes, registers):
    """What the driver refuses."""
    limit = 1024 * _SMEM_LIMITS.get(arch, 99)
    problems = {
        "block": not 1 <= block <= 1024,
        "grid": any(
            not 1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)
        ),
        "cluster": not 1 <= cluster <= 8 or grid[0] % cluster or (cluster > 1 and arch < "sm_90"),
        "smem_bytes": not 0 <= smem_bytes <= limit,
        "registers": not 0 <= registers * block <= _REGISTERS,
    }
    for what, wrong in problems.items():
        if wrong:
            raise EmulatorError(
                f"kernel {name}: bad {what}: grid={tuple(grid)}, block={block}, cluster={cluster}, "
                f"smem_bytes={smem_bytes}, registers={registers} on {arch}"
            )
    return limit


def _launch(
    library,
    runtime,
    name,
    grid,
    block,
    params,
    reads,
    writes,
    cluster,
    smem_bytes,
    registers,
    arch,
    seed,
):
    limit = _check_launch(name, arch, grid, block, cluster, smem_bytes, registers)
    expected = library.emu_params_size()
    if expected != len(params):
        raise EmulatorError(
            f"kernel {name}: its parameter struct has {expected} bytes, but {len(params)} came"
        )
    image = np.zeros(len(params) + 128, np.uint8)
    image = image[-_host_address(image) % 128 :]  # aligned for tensor maps
    image[: len(params)] = np.frombuffer(params, np.uint8)
    regions, keep = _regions(reads, writes)
    counters, error = _CCounters(), ctypes.create_string_buffer(4096)
    launch = _CLaunch(
        name.encode(),
        ctypes.cast(library.emu_call, ctypes.c_void_p),
        _host_address(image),
        len(params),
        (_CRegion * max(len(regions), 1))(*regions),
        len(regions),
        (ctypes.c_uint32 * 3)(*grid),
        block,
        cluster,
        _arch_number(arch) + arch.endswith("a"),
        smem_bytes,
        limit,
        registers,
        seed & (2**64 - 1),
        ctypes.pointer(counters),
        ctypes.cast(error, ctypes.c_char_p),
        len(error),
    )
    failed = runtime.emu_launch(ctypes.byref(launch))
    del keep
    if failed:
        raise EmulatorError(error.value.decode(errors="replace"))
    return counters.to_python()


def _grid(grid):
    """Three sizes from one, two or three."""
    return (*((grid,) if isinstance(grid, int) else grid), 1, 1)[:3]


def _arch_number(arch):
    """900 for "sm_90" and "sm_90a"."""
    return 10 * int(arch.removeprefix("sm_").rstrip("af"))


class Runtime:
    """What ``cuattn._device.runtime`` launches on while the emulator is active."""

    xp = np

    def __init__(self, arch="sm_90", num_sms=132, seed=None, profile=False):
        self.arch, self.num_sms, self.profile = arch, num_sms, profile
        self._seed = 0 if seed is None else seed
        self._launches = itertools.count()
        self._previous = None
        self.recent = Recent()
        self.capturing = False  # whether calls are recorded for later: no new workspace then
        self.workspaces = Workspaces(np.zeros, empty, least=(1, 1))
        self.clear()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        from cuattn._device import runtime as device_runtime

        device_runtime.emulator = self._previous

    address = staticmethod(address)
    tensor_map = staticmethod(_encode_tensor_map)

    def device(self, array):
        """All arrays lie on the one emulated device."""
        return 0

    def signature(self, array):
        """All that a call may depend on of an array, except for its address and contents."""
        writeable = array.flags.writeable
        return array.shape, array.strides, array.dtype, writeable, address(array) % 16

    def limits(self, device):
        """What plans depend on."""
        return Limits(_arch_number(self.arch) // 10, self.num_sms)

    def on(self, device):
        """Context in which a device is the current one."""
        return contextlib.nullcontext()

    def empty(self, shape, dtype):
        """Poisoned memory, see `emulator.empty`."""
        return empty(shape, dtype)

    def workspace(self, function, counters, part_bytes):
        """Exactly what was asked for, of one stream."""
        found = self.workspaces.of(0, function, counters, part_bytes, lambda: self.capturing)
        return Workspace(found.counters[:counters], found.parts[:part_bytes])

    def library(self, kernel, before=""):
        """`kernel` compiled, with the text `before` in front of it."""
        source = f"{before}#include <{kernel.header}>\n{getattr(kernel, 'text', '')}"
        return build.kernel_library(source, kernel.name, profile=self.profile)

    def launch(self, kernel, params, reads, writes):
        """Runs `kernel` on `params`, its parameter struct's bytes; skips None among the arrays."""
        counters = _launch(
            self.library(kernel),
            build.runtime_library(),
            kernel.name,
            _grid(kernel.grid),
            kernel.block,
            params,
            reads,
            writes,
            kernel.cluster,
            getattr(kernel, "smem_bytes", 0),
            getattr(kernel, "registers", 0),
            self.arch.removesuffix("a") + getattr(kernel, "suffix", ""),
            self._seed + (next(self._launches) << 32),
        )
        self.counters.append(counters)
        self.kernels.append(kernel)

    def total(self):
        """The sum of `counters`."""
        return sum(self.counters, Counters())

    def clear(self):
        """Forgets the launches so far."""
        self.counters, self.kernels = [], []


def activate(arch="sm_90", num_sms=132, seed=None, profile=False):
    """Makes the public API run NumPy arrays on the emulator; also a context manager."""
    from cuattn._device import runtime as device_runtime

    runtime = Runtime(arch, num_sms, seed, profile)
    runtime._previous = device_runtime.emulator
    device_runtime.emulator = runtime
    return runtime


def deactivate():
    """Undoes the last `activate`."""
    from cuattn._device import runtime as device_runtime

    if device_runtime.emulator is not None:
        device_runtime.emulator = device_runtime.emulator._previous


def launch_source(
    source,
    name,
    grid,
    block,
    params,
    reads=(),
    writes=(),
    cluster=1,
    smem_bytes=0,
    registers=0,
    arch="sm_90",
    seed=0,
    compiler=None,
    include_dirs=(),
    profile=False,
):
    """Runs the kernel `name` of the CUDA C text `source`; returns its `Counters`.

    `params` is the struct's bytes, see `pack`; `registers` is what a thread starts with, which only
    setmaxnreg asks for. Call sites in `source` are named "source:<line>".
    """
    text = f'#line 1 "source"\n{source}\n'
    library = build.kernel_library(
        text, name, _arch_number(arch), compiler, tuple(include_dirs), profile
    )
    runtime = build.runtime_library(compiler)
    return _launch(
        library,
        runtime,
        name,
        _grid(grid),
        block,
        params,
        reads,
        writes,
        cluster,
        smem_bytes,
        registers,
        arch,
        seed,
    )
