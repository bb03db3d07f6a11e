"""What the roles of Hopper's attention kernel ask of the hardware, from the kernel itself: it runs
with tests/emulator/trace.hpp before it, which notes every instruction and executes none.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections import Counter
from typing import NamedTuple

import emulator
import numpy as np
from configurations import SMS, attention_problem

from cuattn._attention.plan_sm90 import DIMS, plan_attention_sm90
from cuattn._device import runtime as device_runtime
from cuattn._device.kernel import Kernel

ARGS = 10


def sizes(kernel):
    """Warpgroups, keys, stages, dim and value_dim of a kernel."""
    names = ("kWarpgroups", "kKeys", "kStages", "kDim", "kValueDim")
    return [kernel.arguments[name] for name in names]


class Event(NamedTuple):
    """An instruction of one lane, or of the whole warp; `site` is where the kernel has it."""

    op: str
    args: tuple[int, ...]
    site: str
    lane: int


class TensorMap(NamedTuple):
    """What the host has encoded."""

    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int


class Trace(NamedTuple):
    """One block's run: each warp's instructions in their order."""

    kernel: Kernel
    warps: dict[int, list[Event]]
    maps: dict[int, TensorMap]  # by the address of their tensor
    arrays: dict[str, np.ndarray]  # q, k, v, out

    def address(self, name):
        """Where the tensor begins."""
        return emulator.address(self.arrays[name])


# TraceEvent of trace.hpp.
_EVENT = np.dtype(
    [("op", "u8"), ("file", "u8"), *((name, "i4") for name in ("line", "warp", "lane", "time"))]
    + [("args", "i8", ARGS)]
)


@functools.cache
def _text(pointer):
    return ctypes.string_at(pointer).decode().rpartition("/")[2]


class _Runtime(emulator.Runtime):
    """Notes instead of executing; dynamic shared memory begins at `base`."""

    def __init__(self, base):
        super().__init__("sm_90a", num_sms=1)  # one block, which has all rounds
        self.base, self.maps = base, {}

    def library(self, kernel, before=""):
        self.traced = super().library(kernel, "#include <trace.hpp>\n")
        self.traced.trace_data.restype = ctypes.c_void_p
        self.traced.trace_start(self.base)
        return self.traced

    def tensor_map(self, address, *fields):
        self.maps[address] = TensorMap(*fields)
        return super().tensor_map(address, *fields)

    def events(self):
        """Of each warp, in an order that is right for each of its lanes."""
        size = self.traced.trace_length() * _EVENT.itemsize
        raw = np.frombuffer(ctypes.string_at(self.traced.trace_data(), size), _EVENT).tolist()
        waiting = {(e[3], e[4]) for e in raw if _text(e[0]) == "await"}
        together = {w for w, _ in waiting if all((w, lane) in waiting for lane in range(32))}
        noted, waits = [], Counter()
        for i, (op, file, line, warp, lane, time, args) in enumerate(raw):
            event = Event(_text(op), tuple(args.tolist()), f"{_text(file)}:{line}", lane)
            wait = event.op == "await" and warp in together  # of the whole warp: lane 0 speaks
            if lane == 0 or not wait:
                noted.append((warp, time + 2 * waits[warp, lane] + wait, lane, i, event))
            waits[warp, lane] += wait
        found = {}
        for warp, *_, event in sorted(noted):
            found.setdefault(warp, []).append(event)
        return found


def trace(call, q, k, v, *offsets, base=1024, **options):
    """`call`, attention or attention_varlen of these arrays, on one block."""
    runtime = _Runtime(base)
    runtime._previous, device_runtime.emulator = device_runtime.emulator, runtime
    with runtime:
        out = emulator.empty((*q.shape[:-1], v.shape[-1]), q.dtype)
        call(q, k, v, *offsets, out=out, **options)
    (kernel,) = runtime.kernels
    assert kernel.header == "attention/forward_sm90.cuh" and kernel.grid == 1
    return Trace(kernel, runtime.events(), runtime.maps, dict(q=q, k=k, v=v, out=out))


class Tile(NamedTuple):
    """A shipped tile: the largest call for it, whether a rule changes scores, and its sizes."""

    dim: int
    value_dim: int
    modified: bool
    groups: int
    keys: int
    stages: int
    kernel: Kernel  # for float16

    def __str__(self):
        return self.kernel.name


@functools.cache
def tiles():
    """All of them."""
    found = {}
    for dim, value_dim in itertools.product(DIMS, DIMS):
        for modified in (False, True):
            problem = attention_problem("float16", dim, value_dim, modified=modified)
            kernel = plan_attention_sm90(problem, 90, SMS).kernel
            tile = Tile(dim, value_dim, modified, *sizes(kernel)[:3], kernel)
            found.setdefault(kernel.name, tile)
    return [*found.values()]


def rule(tile, heads):
    """Options that leave scores as they are, for a kernel that can change them or for the other."""
    return {"alibi_slopes": np.zeros(heads, np.float32)} if tile.modified else {}
