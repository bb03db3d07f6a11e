"""What launches on the software device cost: ``with device.counters() as counted: ...``

The numbers have the names and meanings of `emulator.Counters` (tests/emulator). Beside them stands
how often every PTX instruction ran; PTX is what NVRTC made, before ptxas.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
from typing import NamedTuple

_SIZES = (1, 2, 4, 8, 16)


class Executed(NamedTuple):
    """How often an instruction ran: for a warp, and for each of its lanes."""

    warps: int = 0
    lanes: int = 0

    def __add__(self, other):
        return Executed(self.warps + other.warps, self.lanes + other.lanes)


def _sizes():
    return dataclasses.field(default_factory=lambda: dict.fromkeys(_SIZES, 0))


@dataclasses.dataclass
class Counters:
    """What launches cost. Sectors are 32 bytes and counted once per warp instruction."""

    global_bytes_read: int = 0  # requested by the threads
    global_bytes_written: int = 0
    global_sectors_read: int = 0
    global_sectors_written: int = 0
    global_requests: int = 0  # loads and stores by warp, not atomics
    loads_by_size: dict[int, int] = _sizes()
    stores_by_size: dict[int, int] = _sizes()
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0  # without bank conflicts
    exps: int = 0  # ex2, by thread; a float64 has none
    barriers: int = 0  # of a block
    named_barriers: int = 0
    warp_collectives: int = 0  # shuffles, votes, matches and reductions, not bar.warp.sync
    mma: int = 0  # by warp, of any shape
    wgmma: int = 0  # by warp
    ldmatrix: int = 0  # ldmatrix and stmatrix by warp
    cluster_barriers: int = 0
    mbarrier_waits: int = 0  # by thread
    st_async_bytes: int = 0
    bulk_bytes: int = 0  # of boxes loaded, with the zeros outside of their tensors
    warp_instructions: int = 0
    lane_instructions: int = 0
    opcodes: dict[str, Executed] = dataclasses.field(default_factory=dict)

    @property
    def kinds(self):
        """`opcodes` by `kind`."""
        found = collections.defaultdict(Executed)
        for opcode, executed in self.opcodes.items():
            found[kind(opcode)] += executed
        return dict(found)


# Words of an opcode -> kind: the first line whose words it has. The names are those of
# bench/compiled/instructions.py for SASS; `move` and `parameter` are mostly no instructions there.
_KINDS = (
    ("async_copy", "cp st.async prefetch prefetchu"),
    ("tensor", "mma wgmma"),
    ("shuffle", "shfl vote match redux elect activemask"),
    ("barrier", "bar barrier mbarrier fence membar setmaxnreg"),
    ("parameter", "ld.param st.param ld.const"),
    ("local", "ld.local st.local"),
    ("shared_load", "ld.shared ldmatrix"),
    ("shared_store", "st.shared stmatrix atom.shared red.shared"),
    ("global_load", "ld ldu"),
    ("global_store", "st atom red"),
    ("conversion", "cvt"),
    ("mufu", "ex2 lg2 sin cos tanh rsqrt rcp.approx sqrt.approx div.approx div.full"),
    ("branch", "bra brx call ret exit trap nanosleep"),
    ("move", "mov cvta mapa"),
    ("float64", "f64"),
    ("float", "f32 f16 bf16 f16x2 bf16x2"),
    ("integer", "b8 b16 b32 b64 u8 u16 u32 u64 s8 s16 s32 s64 pred"),
)
_KINDS = tuple((name, [set(words.split(".")) for words in line.split()]) for name, line in _KINDS)


def kind(opcode):
    """What an instruction does, in a word; "other" where no word tells."""
    # Of "shared::cta", the space; of "cvt.f64.f32", all words.
    words = {word.partition("::")[0] for word in opcode.split(".")}
    return next((name for name, line in _KINDS if any(each <= words for each in line)), "other")


class _CCounters(ctypes.Structure):
    _fields_ = [
        (
            field.name,
            ctypes.c_uint64 * len(_SIZES) if field.name.endswith("_by_size") else ctypes.c_uint64,
        )
        for field in dataclasses.fields(Counters)
        if field.name != "opcodes"
    ]


def _totals(library):
    """All numbers since the library was loaded, flat."""
    numbers = _CCounters()
    library.softCounters(ctypes.byref(numbers))
    found = collections.Counter()
    for name, _ in _CCounters._fields_:
        value = getattr(numbers, name)
        sizes = value if name.endswith("_by_size") else (value,)
        found.update({(name, size): n for size, n in zip(_SIZES, sizes, strict=False)})
    library.softOpcodes.restype = ctypes.c_char_p
    for line in library.softOpcodes().decode().splitlines():
        opcode, warps, lanes = line.split()
        found.update({(opcode, "warps"): int(warps), (opcode, "lanes"): int(lanes)})
    return found


@contextlib.contextmanager
def counting(library):
    """Count what runs in a block; it may stand in another one."""
    result, before = Counters(), _totals(library)
    was_on = library.softCounting(1)
    try:
        yield result
    finally:
        library.softCounting(was_on)
        _fill(result, _totals(library) - before)


def _fill(result, numbers):
    for (name, key), value in numbers.items():
        if key in ("warps", "lanes"):
            executed = result.opcodes.get(name, Executed())
            result.opcodes[name] = executed._replace(**{key: value})
        elif name.endswith("_by_size"):
            getattr(result, name)[key] = value
        else:
            setattr(result, name, value)
