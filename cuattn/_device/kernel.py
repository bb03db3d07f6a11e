"""A kernel with its template arguments, one launch of it, and the limits that plans depend on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

CTYPES = {
    "float16": "__half",
    "bfloat16": "__nv_bfloat16",
    "float32": "float",
    "float64": "double",
    "int8": "signed char",
    "uint8": "unsigned char",
    "int16": "short",
    "uint16": "unsigned short",
    "int32": "int",
    "uint32": "unsigned int",
    "int64": "long long",
    "uint64": "unsigned long long",
}
ITEMSIZE = {
    name: 8 if "64" in name else 4 if "32" in name else 2 if "16" in name else 1 for name in CTYPES
}


class Limits(NamedTuple):
    """What plans depend on: compute capability (90 for sm_90) and number of multiprocessors."""

    compute_capability: int
    num_sms: int


@dataclass(frozen=True)
class Instance:
    """A C++ template with its arguments, by the names and in the order of the template's head."""

    template: str
    arguments: Mapping[str, object] = field(hash=False)

    @cached_property
    def name(self) -> str:
        """Name expression."""
        values = self.arguments.values()
        words = (str(v).lower() if isinstance(v, bool) else str(v) for v in values)
        return f"{self.template}<{', '.join(words)}>"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Kernel(Instance):
    """One launch: `grid` blocks of `block` threads; `cluster` neighbours form a cluster.

    `smem_bytes` of dynamic shared memory per block. `suffix` "a": for one architecture only, whose
    target is called so. `registers`: what a thread starts with at least, or the kernel would hang.
    `text`: C++ that follows the header and defines types among the template's arguments;
    `expression`: what a caller wrote for it.
    """

    grid: int
    block: int
    cluster: int = 1
    smem_bytes: int = 0
    suffix: str = ""
    registers: int = 0
    text: str = ""
    expression: str = ""

    @property
    def header(self) -> str:
        """The kernel's file in cuda_src, which has its name."""
        return self.template.replace("_", "/", 1) + ".cuh"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()
