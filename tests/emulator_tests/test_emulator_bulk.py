"""The Tensor Memory Accelerator on the emulator: boxes of tensor maps, and their mbarriers."""

from __future__ import annotations

import re

import emulator
import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

HEAD = """
#include <ptx/cluster.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/cp_async_bulk.cuh>
#include <ptx/fence.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>
struct Params {
  TensorMap in, out;
  const unsigned int* x;
  unsigned int* y;
  int c[8];
  long long fault;
};
__global__ void kernel(const __grid_constant__ Params p) {
  const int t = threadIdx.x;
  const int fault = p.fault;
"""

# The tensor of most tests: 64 rows of 64 elements, of which a box takes 8 rows, 1024 bytes.
DIMS, STRIDES, BOX = (64, 64, 1, 1, 1), (128, 8192, 8192, 8192), (64, 8, 1, 1, 1)


def tensor(dtype=np.float16):
    return np.arange(64 * 64).reshape(64, 64).astype(dtype)


def run(
    body,
    fault=0,
    *,
    x=None,
    y=None,
    maps=None,
    c=(),
    block=64,
    smem_bytes=16384,
    reads=None,
    writes=None,
    grid=1,
    **options,
):
    """Runs a kernel body on x, read, and y, written; returns the counters and y.

    `maps` are p.in, of x, and p.out, of y; `c` are up to 8 integers.
    """
    x = tensor() if x is None else x
    y = emulator.empty((64, 64), np.float16) if y is None else y
    if maps is None:
        maps = [emulator.tensor_map(a, DIMS, STRIDES, BOX, 128) for a in (x, y)]
    c = [np.int32(i) for i in (*c, *[0] * (8 - len(c)))]
    counters = emulator.launch_source(
        HEAD + body + "\n}\n",
        "kernel",
        grid,
        block,
        emulator.pack(*maps, x, y, *c, fault),
        (x,) if reads is None else reads,
        (y,) if writes is None else writes,
        smem_bytes=smem_bytes,
        **options,
    )
    return counters, y


def fails(pattern, body, fault=1, **options):
    """The kernel is fine with fault = 0, and an error that matches and is located with `fault`."""
    run(body, **options)
    with pytest.raises(emulator.EmulatorError, match=pattern) as caught:
        run(body, fault, **options)
    message = str(caught.value)
    assert re.search(r"^kernel kernel, block \(\d, 0, 0\), thread \d+: .*source:\d+", message), (
        message
    )
    return message


# -- a model of boxes -----------------------------------------------------------------------------


def map_of(view, box, swizzle):
    """The tensor map of a 5-D array, whose dimensions are outermost first."""
    return emulator.tensor_map(view, view.shape[::-1], view.strides[-2::-1], box, swizzle)


def overlap(view, box, c):
    """Of a box at the coordinates c: the slices of the box, and of the array, that are in both."""
    pairs = [
        (slice(max(-i, 0), max(min(n, size - i), 0)), slice(max(i, 0), max(min(i + n, size), 0)))
        for i, n, size in zip(c, box, view.shape[::-1], strict=True)
    ]
    pairs = [(slice(0), slice(0)) if a.start >= a.stop else (a, b) for a, b in pairs]
    return tuple(a for a, _ in pairs[::-1]), tuple(b for _, b in pairs[::-1])


def box_of(view, box, c):
    """The elements of a box, zeros outside of the array."""
    of_box, of_view = overlap(view, box, c)
    result = np.zeros(box[::-1], view.dtype)
    result[of_box] = view[of_view]
    return result


def swizzled(data, swizzle):
    """Bytes as they lie in shared memory from a multiple of 1024 on."""
    address = np.arange(len(data))
    mask = {0: 0, 32: 1, 64: 3, 128: 7}[swizzle]
    result = np.empty_like(data)
    result[address ^ (address >> 7 & mask) << 4] = data
    return result


def random_view(rng, dtype, repeat=True):
    """A 5-D array with dimensions in any order but the innermost, holes, and repeated elements."""
    item = np.dtype(dtype).itemsize
    shape = rng.integers(1, 8, 5)
    shape[4] = rng.integers(1, 100)
    outer = shape + rng.integers(0, 3, 5)
    outer[4] = -(-shape[4] * item // 16) * 16 // item + rng.integers(0, 3) * 16 // item
    raw = rng.integers(0, 256, int(outer.prod()) * item + 64, np.uint8)
    start = int(rng.integers(0, 2)) * 16
    base = raw[start : start + int(outer.prod()) * item].view(dtype).reshape(outer)
    view = base[tuple(slice(n) for n in shape)].transpose(*rng.permutation(4), 4)
    if repeat and rng.integers(3) == 0:
        view = np.broadcast_to(view[:, :1], view.shape)
    return view


def random_box(rng, dtype, swizzle):
    item = np.dtype(dtype).itemsize
    box = [int(n) for n in rng.integers(1, 6, 5)]
    box[0] = (swizzle or 16 * int(rng.integers(1, 12))) // item
    return tuple(box)


def random_place(rng, view, box):
    """Coordinates of a box: within the array, across an edge, or outside of it."""
    return tuple(
        int(rng.integers(-n - 1, size + 2) if rng.integers(2) else rng.integers(0, size))
        for n, size in zip(box, view.shape[::-1], strict=True)
    )


def sectors(view, box, c):
    """What a box touches, if sectors are shared by rows that follow each other."""
    rows = view[overlap(view, box, c)[1]]
    count, last = 0, None
    if rows.size:
        start = emulator.address(rows)
        for index in np.ndindex(rows.shape[:-1]):
            first = start + sum(i * n for i, n in zip(index, rows.strides, strict=False))
            end = first + rows.shape[-1] * rows.itemsize - 1
            count += end // 32 - first // 32 + (first // 32 != last)
            last = end // 32
    return count


DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

LOAD_AND_SHOW = """
unsigned char* s = ptx::dynamic_smem<unsigned char, 1024>();
unsigned long long* bar = ptx::static_smem<unsigned long long, 1>();
if (t == 0) {
  ptx::prefetch_tensormap(&p.in);
  ptx::mbarrier_init(bar, 1);
  ptx::fence_mbarrier_init();
}
__syncthreads();
if (t == 0) {
  ptx::mbarrier_arrive_expect_tx(bar, p.c[5]);
  ptx::cp_async_bulk_tensor_load(s + p.c[6], &p.in, bar, p.c[0], p.c[1], p.c[2], p.c[3], p.c[4]);
}
ptx::mbarrier_wait(bar, 0);
for (int i = t; i < p.c[5] / 16; i += 64) {
  ptx::st_global((uint4*)p.y + i, ptx::ld_shared((const uint4*)(s + p.c[6]) + i));
}
"""


def load(view, box, c, swizzle, offset=0, **options):
    """The bytes that a box leaves in shared memory, and the counters."""
    size = int(np.prod(box)) * view.itemsize
    y = emulator.empty((size,), np.uint8)
    maps = [map_of(view, box, swizzle), bytes(128)]
    counters, _ = run(
        LOAD_AND_SHOW,
        x=view,
        y=y,
        maps=maps,
        c=(*c, size, offset),
        smem_bytes=offset + size,
        **options,
    )
    return y, counters


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_load(dtype, swizzle, rng):
    for seed in range(12):
        view = random_view(rng, DTYPES[dtype])
        box = random_box(rng, DTYPES[dtype], swizzle)
        c = random_place(rng, view, box)
        offset = int(rng.integers(0, 5)) * (8 * swizzle or 128)
        y, counters = load(view, box, c, swizzle, offset, seed=seed)
        bytes_of_box = box_of(view, box, c).reshape(-1).view(np.uint8)
        base = np.concatenate([np.zeros(offset, np.uint8), bytes_of_box])
        np.testing.assert_array_equal(y, swizzled(base, swizzle)[offset:])
        inside = view[overlap(view, box, c)[1]]
        assert counters.bulk_bytes == y.nbytes
        assert counters.global_bytes_read == inside.size * view.itemsize
        assert counters.global_sectors_read == sectors(view, box, c)
        assert counters.global_requests == (inside.size > 0) + -(-y.nbytes // 16 // 32)
        assert sum(counters.loads_by_size.values()) == 0


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("axis", range(5))
def test_load_across_each_edge(axis, side, swizzle, rng):
    """A box partly and wholly outside on one dimension."""
    row = swizzle // 2 or 24
    view = rng.standard_normal((4, 5, 6, 12, row + 8)).astype(np.float16)
    box = (row, 8, 3, 2, 2)
    for by in (1, box[axis] - 1, box[axis], box[axis] + 3, 2**31 - 300):
        c = [1, 2, 1, 1, 1]
        c[axis] = -by if side < 0 else view.shape[4 - axis] - box[axis] + by
        y, _ = load(view, box, c, swizzle)
        expected = swizzled(box_of(view, box, c).reshape(-1).view(np.uint8), swizzle)
        np.testing.assert_array_equal(y, expected)
        assert expected.any() == (by < box[axis])


def test_panels_of_a_head(rng):
    """A (B, S, H, D) array as panels of 64 columns, whether these divide D or not."""
    for dim in (128, 80):
        array = rng.standard_normal((2, 50, 3, dim)).astype(np.float16)
        view = array.transpose(0, 2, 1, 3)[:, :, None]  # batch, head, 1, row, column
        for panel in range(0, dim, 64):
            y, counters = load(view, (64, 32, 1, 1, 1), (panel, 40, 0, 2, 1), 128)
            expected = np.zeros((32, 64), np.float16)
            part = array[1, 40:, 2, panel : panel + 64]
            expected[:10, : part.shape[1]] = part
            np.testing.assert_array_equal(y, swizzled(expected.reshape(-1).view(np.uint8), 128))
            assert counters.global_bytes_read == part.size * 2


# -- tensor maps ----------------------------------------------------------------------------------

MAP_RULES = {
    "dtype": ("dtype must be one of", {"dtype": "float64"}),
    "rank": ("5 dims", {"dims": DIMS[:4]}),
    "rank of the box": ("5 dims", {"box": BOX[:4]}),
    "number of strides": ("5 dims", {"strides": STRIDES[:3]}),
    "address": ("address must be a multiple of 16", {"address": 8 + 2**44}),
    "no elements": ("dims must be", {"dims": (64, 0, 1, 1, 1)}),
    "too many elements": ("dims must be", {"dims": (64, 2**32 + 1, 1, 1, 1)}),
    "stride of 8": ("strides must be", {"strides": (128, 8, 16, 16)}),
    "negative stride": ("strides must be", {"strides": (-128, 16, 16, 16)}),
    "long stride": ("strides must be", {"strides": (128, 2**40, 16, 16)}),
    "empty box": ("box must be", {"box": (64, 0, 1, 1, 1)}),
    "long box": ("box must be", {"box": (64, 257, 1, 1, 1)}),
    "rows of the box": ("multiple of 16 bytes", {"box": (12, 8, 1, 1, 1), "swizzle": 0}),
    "swizzle": ("swizzle must be", {"swizzle": 16}),
    "rows beyond the swizzle": ("as long as the swizzle", {"swizzle": 64}),
    "rows short of the swizzle": ("as long as the swizzle", {"box": (32, 8, 1, 1, 1)}),
}


@pytest.mark.parametrize("rule", MAP_RULES)
def test_tensor_map_rule(rule):
    fine = {
        "address": 2**44,
        "dtype": "float16",
        "dims": DIMS,
        "strides": STRIDES,
        "box": BOX,
        "swizzle": 128,
    }
    make = emulator.Runtime.tensor_map
    assert len(make(**fine)) == 128
    pattern, change = MAP_RULES[rule]
    with pytest.raises(emulator.EmulatorError, match=f"tensor map: .*{pattern}"):
        make(**fine | change)


def test_tensor_map_limits():
    dims, strides = (2**32,) * 5, (2**40 - 16, 0, 0, 0)
    largest = emulator.Runtime.tensor_map(0, "float32", dims, strides, (256,) * 5, 0)
    with pytest.raises(emulator.EmulatorError, match=f"a box of {2**42} bytes .* is not within"):
        run(START + INIT + BEGIN, maps=[largest, bytes(128)])


# -- rules of loads -------------------------------------------------------------------------------

START = """
unsigned char* s = ptx::dynamic_smem<unsigned char, 1024>();
unsigned long long* bar = ptx::static_smem<unsigned long long, 4>();
"""
INIT = """
if (t == 0) {
  for (int i = 0; i < 4; ++i) ptx::mbarrier_init(bar + i, i < 2 ? 1 : 2);
  ptx::fence_mbarrier_init();
}
__syncthreads();
"""
LOAD = "ptx::cp_async_bulk_tensor_load(s, &p.in, bar, 0, 0, 0, 0, 0);"
EXPECT = "ptx::mbarrier_arrive_expect_tx(bar, 1024);"
BEGIN = f"if (t == 0) {{ {EXPECT} {LOAD} }}\n"
AGAIN = BEGIN.replace("(bar,", "(bar + 1,").replace(" bar,", " bar + 1,")
WAIT = "ptx::mbarrier_wait(bar, 0);\n"
WAIT_AGAIN = "ptx::mbarrier_wait(bar + 1, 0);\n"
READ = "ptx::ld_shared((const uint4*)s + t);\n"
WRITE = "ptx::st_shared((uint4*)s + t, uint4{1, 2, 3, 4});\n"
FENCE = "ptx::fence_proxy_async();\n"
BARRIER = "__syncthreads();\n"
NOT_LANDED = "a bulk load is still in flight"
NOT_WAITED = NOT_LANDED + "|without having waited on its mbarrier|never written"
NO_FENCE = "with no fence_proxy_async between"


def good(code):
    return f"if (!fault) {{ {code} }}\n"


def bad(code):
    return f"if (fault) {{ {code} }}\n"


LOAD_RULES = {
    "read before the wait": (NOT_LANDED, BEGIN + BARRIER + bad(READ) + WAIT),
    "write before the wait": ("writes shared .*" + NOT_LANDED, BEGIN + BARRIER + bad(WRITE) + WAIT),
    "relaxed read before the wait": (
        NOT_LANDED,
        BEGIN + BARRIER + bad("ptx::ld_shared_relaxed((const unsigned int*)s + t);") + WAIT,
    ),
    "atomic before the wait": (
        NOT_LANDED,
        BEGIN + BARRIER + bad("atomicAdd((unsigned int*)s, 1u);") + WAIT,
    ),
    "ldmatrix before the wait": (
        NOT_LANDED,
        "unsigned int r[4];\n"
        + BEGIN
        + BARRIER
        + bad("ptx::ldmatrix_x4(r, (const uint4*)s + t);")
        + WAIT,
    ),
    "cp.async before the wait": (
        NOT_LANDED,
        BEGIN
        + BARRIER
        + bad("ptx::cp_async_16(s + 16 * t, p.x, 16);")
        + "ptx::cp_async_commit();\nptx::cp_async_wait<0>();\n"
        + WAIT,
    ),
    "bulk load before the wait": (
        "a bulk load writes shared byte .*" + NOT_LANDED,
        BEGIN + good(WAIT) + BARRIER + AGAIN + WAIT_AGAIN,
    ),
    "read with no wait": (
        NOT_WAITED,
        BEGIN + "if (!fault || t < 32) ptx::mbarrier_wait(bar, 0);\n" + READ,
    ),
    "write with no wait": (
        NOT_WAITED + "|a bulk load writes byte .*wrote, with no barrier between",
        BEGIN + "if (!fault || t < 32) ptx::mbarrier_wait(bar, 0);\n" + WRITE,
    ),
    "bulk load with no wait": (
        NOT_WAITED,
        BEGIN
        + "if (t == 40 || (t == 0 && !fault)) ptx::mbarrier_wait(bar, 0);\n"
        + AGAIN
        + WAIT_AGAIN,
    ),
    "read after another waited, with no barrier": (
        NOT_WAITED,
        BEGIN + "if (t == 5) ptx::mbarrier_wait(bar, 0);\n" + good(BARRIER) + READ,
    ),
    "wait for another mbarrier": (
        NOT_WAITED,
        BEGIN
        + "if (t == 0) ptx::mbarrier_arrive(bar + 1);\nptx::mbarrier_wait(bar + fault, 0);\n"
        + READ
        + good(WAIT_AGAIN),
    ),
    "loaded again with no barrier after the readers": (
        "a bulk load writes byte .*reads, with no barrier between|" + NOT_WAITED,
        BEGIN + WAIT + READ + FENCE + good(BARRIER) + AGAIN + WAIT_AGAIN,
    ),
    "loaded again with no fence after the readers": (
        "a bulk load writes byte .*reads, " + NO_FENCE,
        BEGIN + WAIT + READ + good(FENCE) + BARRIER + AGAIN + WAIT_AGAIN,
    ),
    "loaded again, one reader with no fence": (
        "a bulk load writes byte 640, which thread 40 .*reads, " + NO_FENCE,
        BEGIN
        + WAIT
        + READ
        + "if (!fault || t != 40) ptx::fence_proxy_async();\n"
        + BARRIER
        + AGAIN
        + WAIT_AGAIN,
    ),
    "loaded again, with the fence before the read": (
        NO_FENCE,
        BEGIN + WAIT + bad(FENCE) + READ + good(FENCE) + BARRIER + AGAIN + WAIT_AGAIN,
    ),
    "loaded again, with the fence after the barrier": (
        NO_FENCE,
        BEGIN + WAIT + READ + good(FENCE) + BARRIER + bad(FENCE) + AGAIN + WAIT_AGAIN,
    ),
    "loaded again with no fence after ldmatrix": (
        "a bulk load writes byte .*the warp of thread .*reads, " + NO_FENCE,
        "unsigned int r[4];\n"
        + BEGIN
        + WAIT
        + "ptx::ldmatrix_x4(r, (const uint4*)s + t);\n"
        + good(FENCE)
        + BARRIER
        + AGAIN
        + WAIT_AGAIN,
    ),
    "written before, with no barrier": (
        "a bulk load writes byte .*wrote, with no barrier between|" + NOT_WAITED,
        WRITE + FENCE + good(BARRIER) + BEGIN + WAIT,
    ),
    "written before, with no fence": (
        "a bulk load writes byte .*wrote, " + NO_FENCE,
        WRITE + good(FENCE) + BARRIER + BEGIN + WAIT,
    ),
    "the last byte written before by itself, with no fence": (
        "a bulk load writes byte 1023, .*wrote, " + NO_FENCE,
        "if (t == 0) ptx::st_shared(s + 1023, (unsigned char)1);\n" + good(FENCE) + BEGIN + WAIT,
    ),
    "written relaxed before, with no fence": (
        "writes relaxed or atomically, " + NO_FENCE,
        "if (t == 0) ptx::st_shared((unsigned int*)s, 1u);\n"
        + FENCE
        + BARRIER
        + "ptx::st_shared_relaxed((unsigned int*)s, 2u);\n"
        + good(FENCE)
        + BARRIER
        + BEGIN
        + WAIT,
    ),
    "read relaxed before, with no fence": (
        "reads relaxed, " + NO_FENCE,
        "if (t == 0) ptx::st_shared((unsigned int*)s, 1u);\n"
        + FENCE
        + BARRIER
        + "ptx::ld_shared_relaxed((unsigned int*)s);\n"
        + good(FENCE)
        + BARRIER
        + BEGIN
        + WAIT,
    ),
    "over a cp.async": (
        "a bulk load writes shared byte 512 of a cp.async that has not landed",
        "if (t == 0) ptx::cp_async_16(s + 512, p.x, 16);\nptx::cp_async_commit();\n"
        + good("ptx::cp_async_wait<0>();")
        + FENCE
        + BEGIN
        + WAIT
        + "ptx::cp_async_wait<0>();",
    ),
    "over an mbarrier": (
        "a bulk load writes shared byte 1016, which is part of an mbarrier",
        "if (t == 0) ptx::mbarrier_init((unsigned long long*)(s + 1024 - 8 * fault), 1);\n"
        + BEGIN
        + WAIT,
    ),
    "misaligned": (
        "a box misaligned: at offset 128 .* a multiple of 1024",
        BEGIN.replace("(s,", "(s + 128 * fault,") + WAIT,
    ),
    "beyond dynamic shared memory": (
        "a box of 1024 bytes at offset 15488 is not within dynamic shared memory, which has 16384",
        BEGIN.replace("(s,", "(s + 15360 + 128 * fault,") + WAIT,
    ),
    "before dynamic shared memory": (
        "a box of 1024 bytes at offset -1024 is not within",
        BEGIN.replace("(s,", "(s - 1024 * fault,") + WAIT,
    ),
    "static shared memory": (
        "is not within dynamic shared memory",
        "unsigned char* z = ptx::static_smem<unsigned char, 4096>();\n"
        + BEGIN.replace("(s,", "(fault ? z : s,")
        + WAIT,
    ),
    "a map that the kernel copied": (
        "not in the launch's parameters, or a copy",
        "TensorMap copy = p.in;\n" + BEGIN.replace("&p.in", "fault ? &copy : &p.in") + WAIT,
    ),
    "a map that the kernel assigned": (
        "not in the launch's parameters, or a copy",
        "TensorMap copy;\ncopy = p.in;\n" + BEGIN.replace("&p.in", "fault ? &copy : &p.in") + WAIT,
    ),
    "a map in a copy of the parameters": (
        "not in the launch's parameters, or a copy",
        "const Params copy = p;\n" + BEGIN.replace("&p.in", "fault ? &copy.in : &p.in") + WAIT,
    ),
    "a map in global memory": (
        "not in the launch's parameters",
        BEGIN.replace("&p.in", "fault ? (const TensorMap*)p.x : &p.in") + WAIT,
    ),
    "a map in shared memory": (
        "not in the launch's parameters",
        BEGIN.replace("&p.in", "fault ? (const TensorMap*)s : &p.in") + WAIT,
    ),
    "a null map": (
        "not in the launch's parameters",
        BEGIN.replace("&p.in", "fault ? nullptr : &p.in") + WAIT,
    ),
    "a misaligned map": (
        "not in the launch's parameters",
        BEGIN.replace("&p.in", "(const TensorMap*)((const char*)&p.in + 64 * fault)") + WAIT,
    ),
    "exit with no wait": ("block exited with 1024 bytes of .* bulk loads", BEGIN + good(WAIT)),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", LOAD_RULES)
def test_load_rule(rule, seed):
    pattern, body = LOAD_RULES[rule]
    fails(pattern, START + INIT + body, seed=seed)


def test_each_byte_of_a_box_counts():
    """One byte was written with no fence, or is not written."""
    body = START + INIT + "if (t == 40) ptx::st_shared(s + p.c[0], (unsigned char)1);\n"
    for byte in range(1024):
        with pytest.raises(emulator.EmulatorError, match=f"byte {byte}, .*{NO_FENCE}"):
            run(body + BARRIER + BEGIN + WAIT, c=(byte,))
    run(body + BARRIER + BEGIN + WAIT, c=(1024,))
    write = "for (int i = t; i < 1024; i += 64) {\n"
    write += "if (i != p.c[0]) ptx::st_shared(s + i, (unsigned char)1);\n}\n" + FENCE + BARRIER
    for byte in range(1024):
        with pytest.raises(emulator.EmulatorError, match=f"byte {byte}, which was never written"):
            run(START + write + PUT + WAIT_READ, c=(byte,))


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
def test_alignment_of_a_box(swizzle):
    period = 8 * swizzle or 128
    box = (swizzle // 2 or 40, 8, 1, 1, 1)
    size = 16 * box[0]
    x = tensor()
    maps = [emulator.tensor_map(x, DIMS, STRIDES, box, swizzle), bytes(128)]
    body = BEGIN.replace("1024", str(size)).replace("(s,", "(s + p.c[0],") + WAIT
    for offset in (period, 3 * period):
        run(START + INIT + body, x=x, maps=maps, c=(offset,))
    for offset in (16, period // 2, period + 16):
        with pytest.raises(emulator.EmulatorError, match=f"misaligned: .* multiple of {period}"):
            run(START + INIT + body, x=x, maps=maps, c=(offset,))
    smaller = START.replace("1024", str(period // 2))
    with pytest.raises(emulator.EmulatorError, match=f"dynamic_smem was asked for {period // 2}"):
        run(smaller + INIT + body, x=x, maps=maps)
    run(START.replace("1024", str(period)) + INIT + body, x=x, maps=maps)


MAKE = "if (t == 0) ptx::mbarrier_init(bar, 1);\n"
MBARRIER_OF_A_LOAD = {
    "fence": (
        "no fence_mbarrier_init since its init",
        "if (t == 0) ptx::mbarrier_init(bar, 1);\n"
        "if (t == 0 && !fault) ptx::fence_mbarrier_init();\n" + BARRIER,
    ),
    "fence of the thread that made it": (
        "no fence_mbarrier_init since its init",
        "if (t == 0) ptx::mbarrier_init(bar, 1);\n"
        "if (t == (fault ? 1 : 0)) ptx::fence_mbarrier_init();\n" + BARRIER,
    ),
    "fence after the init": (
        "no fence_mbarrier_init since its init",
        "if (t == 0 && fault) ptx::fence_mbarrier_init();\n"
        + MAKE
        + "if (t == 0 && !fault) ptx::fence_mbarrier_init();\n"
        + BARRIER,
    ),
    "fence before the barrier": (
        "no barrier since its fence_mbarrier_init|no fence_mbarrier_init since",
        MAKE
        + "if (t == 0 && !fault) ptx::fence_mbarrier_init();\n"
        + BARRIER
        + "if (t == 0 && fault) ptx::fence_mbarrier_init();\n",
    ),
    "barrier": (
        "no barrier since its mbarrier_init|before mbarrier_init",
        "if (t == 0) {\nptx::mbarrier_init(bar, 1);\nptx::fence_mbarrier_init();\n}\n"
        + good(BARRIER),
    ),
    "init": (
        "before mbarrier_init",
        "if (t == 0 && !fault) ptx::mbarrier_init(bar, 1);\n"
        "if (t == 0) ptx::fence_mbarrier_init();\n" + BARRIER,
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("missing", MBARRIER_OF_A_LOAD)
def test_mbarrier_of_a_load(missing, seed):
    """Thread 40 loads: it must know that the mbarrier is ready."""
    pattern, init = MBARRIER_OF_A_LOAD[missing]
    start = START.replace("long, 4>", "long, 1>")
    fails(pattern, start + init + BEGIN.replace("t == 0", "t == 40") + WAIT, seed=seed)


def test_the_thread_that_made_the_mbarrier_loads():
    start = START + "if (t == 0) {\nptx::mbarrier_init(bar, 1);\n"
    fails(
        "no fence_mbarrier_init",
        start + good("ptx::fence_mbarrier_init();") + EXPECT + LOAD + WAIT + "}\n",
    )


def test_out_of_the_launchs_buffers():
    """A map of more rows than the array has."""
    for dims, place, pattern in [
        ((64, 65, 1, 1, 1), (0, 60), "out of bounds: 8192 bytes past the start of reads"),
        ((72, 64, 1, 1, 1), (8, 56), "out of bounds: 8080 bytes past the start of reads"),
        ((64, 64, 2, 1, 1), (0, 56, 1), "out of bounds: 15360 bytes past the start of reads"),
    ]:
        maps = [emulator.tensor_map(x := tensor(), dims, STRIDES, BOX, 128), bytes(128)]
        body = START + INIT + BEGIN.replace("bar, 0, 0", "bar, p.c[0], p.c[1]")
        body = body.replace("c[1], 0", "c[1], p.c[2]") + WAIT
        run(body, x=x, maps=maps)
        with pytest.raises(emulator.EmulatorError, match=pattern):
            run(body, x=x, maps=maps, c=place)


def test_elements_that_are_not_of_the_view():
    x = tensor()
    body = START + INIT + BEGIN + WAIT
    run(body, x=x, reads=(x[:8],))
    with pytest.raises(emulator.EmulatorError, match="out of bounds"):
        run(body, x=x, reads=(x[:7],))
    with pytest.raises(emulator.EmulatorError, match="belongs to no element"):
        run(body, x=x, reads=(x[:, :63],))
    with pytest.raises(emulator.EmulatorError, match="belongs to no element"):
        run(body, x=x, reads=(x[:3], x[4:]))


# Loads from y, by p.out.
FROM_Y = BEGIN.replace("&p.in", "&p.out")
SOURCE_RULES = {
    "never written": ("which was never written", "empty", "w", bad(FROM_Y) + bad(WAIT)),
    "never written and only read": ("which was never written", "empty", "r", bad(FROM_Y)),
    "only written": ("only writes", "zeros", "w", bad(FROM_Y) + bad(WAIT)),
    "not in the launch": ("out of bounds", "zeros", "", bad(FROM_Y) + bad(WAIT)),
    "written by another thread": (
        "thread 40 of block 0 wrote in the same launch",
        "zeros",
        "rw",
        "if (t == 40) ptx::st_global(p.y + 255 + !fault, 1u);\n" + BARRIER + FROM_Y + WAIT,
    ),
    "written by itself": (
        "thread 0 of block 0 wrote in the same launch",
        "zeros",
        "rw",
        "if (t == 0) ptx::st_global(p.y + 255 + !fault, 1u);\n" + FROM_Y + WAIT,
    ),
    "updated atomically": (
        "wrote in the same launch",
        "zeros",
        "rw",
        "if (t == 0) atomicAdd(p.y + 255 + !fault, 1u);\n" + FROM_Y + WAIT,
    ),
    "overwritten by itself": (
        "the source of a bulk load was overwritten before it landed",
        "zeros",
        "rw",
        FROM_Y
        + "if (t == 0 && fault) ptx::st_global(p.y + 255, 1u);\n"
        + BARRIER
        + WAIT
        + "if (t == 0 && !fault) ptx::st_global(p.y + 255, 1u);\n",
    ),
    "overwritten by another thread after a barrier": (
        "the source of a bulk load was overwritten before it landed",
        "zeros",
        "rw",
        FROM_Y
        + BARRIER
        + "if (t == 40) ptx::st_global(p.y + 255 + !fault, 1u);\n"
        + BARRIER
        + WAIT,
    ),
    "overwritten by another thread with no barrier": (
        "race: writes byte .* of reads.*another thread reads|wrote in the same launch",
        "zeros",
        "rw",
        FROM_Y + WAIT + good(BARRIER) + "if (t == 40) ptx::st_global(p.y + 255, 1u);\n",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", SOURCE_RULES)
def test_source_rule(rule, seed):
    pattern, kind, access, body = SOURCE_RULES[rule]
    for fault in (0, 1):
        x = tensor()
        y = {"empty": emulator.empty, "zeros": np.zeros}[kind]((64, 64), np.float16)
        options = {
            "reads": (x, y) if "r" in access else (x,),
            "writes": (y,) if "w" in access else (),
        }
        if fault == 0:
            run(START + INIT + body, 0, x=x, y=y, seed=seed, **options)
            continue
        with pytest.raises(emulator.EmulatorError, match=pattern):
            run(START + INIT + body, 1, x=x, y=y, seed=seed, **options)


def test_two_loads_on_one_mbarrier(rng):
    """Both boxes land with the phase, which needs the bytes of both."""
    x = rng.standard_normal((64, 64)).astype(np.float16)
    y = emulator.empty((16, 64), np.float16)
    body = """
    if (t == 0) {
      ptx::mbarrier_arrive_expect_tx(bar + 2, 1024);
      ptx::cp_async_bulk_tensor_load(s, &p.in, bar + 2, 0, 5, 0, 0, 0);
    }
    if (t == 40) {
      ptx::cp_async_bulk_tensor_load(s + 1024, &p.in, bar + 2, 0, 50, 0, 0, 0);
      ptx::mbarrier_arrive_expect_tx(bar + 2, 1024 + 16 * fault);
    }
    ptx::mbarrier_wait(bar + 2, 0);
    for (int i = t; i < 128; i += 64) ptx::st_global((uint4*)p.y + i, ptx::ld_shared((const uint4*)s + i));
    """  # noqa: E501
    maps = [emulator.tensor_map(x, DIMS, STRIDES, BOX, 128), bytes(128)]
    for seed in range(4):
        y = emulator.empty((16, 64), np.float16)
        run(START + INIT + body, x=x, y=y, maps=maps, seed=seed)
        boxes = np.concatenate([x[5:13], x[50:58]]).reshape(-1).view(np.uint8)
        np.testing.assert_array_equal(y.reshape(-1).view(np.uint8), swizzled(boxes, 128))
    fails("0 of 2 arrivals and 16 of 2064 bytes are missing", START + INIT + body)


@pytest.mark.parametrize("what", ["load", "store", "commit", "wait_read", "prefetch", "arrive"])
def test_bulk_copies_need_sm_90(what):
    call = {
        "load": "ptx::cp_async_bulk_tensor_load(nullptr, &p.in, nullptr, 0, 0, 0, 0, 0);",
        "store": "ptx::cp_async_bulk_tensor_store(&p.out, nullptr, 0, 0, 0, 0, 0);",
        "commit": "ptx::cp_async_bulk_commit();",
        "wait_read": "ptx::cp_async_bulk_wait_read<0>();",
        "prefetch": "ptx::prefetch_tensormap(&p.in);",
        "arrive": "ptx::mbarrier_arrive(nullptr);",
    }[what]
    with pytest.raises(emulator.EmulatorError, match="needs sm_90, but this is sm_80"):
        run(call, arch="sm_80")


def test_prefetch_tensormap():
    fails("hold no tensor map", "ptx::prefetch_tensormap(fault ? &p.out : &p.in);",
          maps=[emulator.tensor_map(tensor(), DIMS, STRIDES, BOX, 128), bytes(128)])  # fmt: skip
    run("ptx::prefetch_tensormap(&p.out);")


# -- rules of mbarriers ---------------------------------------------------------------------------

MBARRIER_RULES = {
    "bytes that never come": (
        r"deadlock: threads 0-63 of block \(0, 0, 0\) wait in mbarrier_wait at source:\d+ \(of the "
        r"mbarrier at shared offset \d+ 0 of 1 arrivals and 16 of 1040 bytes are missing\)",
        BEGIN.replace("1024", "1024 + 16 * fault") + WAIT,
    ),
    "a load that never comes": (
        "0 of 1 arrivals and 1024 of 1024 bytes are missing",
        f"if (t == 0) {EXPECT}\nif (t == 0 && !fault) {LOAD}\n" + WAIT,
    ),
    "an arrival that never comes": (
        "1 of 2 arrivals and 0 of 0 bytes are missing",
        "if (t == 0 || (t == 40 && !fault)) ptx::mbarrier_arrive(bar + 2);\n"
        "ptx::mbarrier_wait(bar + 2, 0);",
    ),
    "an arrival and bytes that never come": (
        "1 of 2 arrivals and 7 of 7 bytes are missing",
        "if (t == 0) ptx::mbarrier_arrive_expect_tx(bar + 2, 7 * fault);\n"
        "if (t == 40 && !fault) ptx::mbarrier_arrive(bar + 2);\nptx::mbarrier_wait(bar + 2, 0);",
    ),
    "two mbarriers that never complete": (
        "threads 0-31 .*32 of 32 bytes are missing.*threads 32-63 .* 0 of 0 bytes are missing",
        "if (t == 0) ptx::mbarrier_arrive_expect_tx(bar, 32 * fault);\n"
        "if (t == 0 && !fault) ptx::mbarrier_arrive(bar + 1);\n"
        "ptx::mbarrier_wait(bar + t / 32, 0);",
    ),
    "too few bytes expected": (
        "gets 1024 bytes in a phase that expects 1008",
        BEGIN.replace("1024", "1024 - 16 * fault") + WAIT,
    ),
    "too few bytes expected after the load": (
        "gets 1024 bytes in a phase that expects 1008",
        f"if (t == 0) {{ {LOAD} {EXPECT} }}\n".replace("1024", "1024 - 16 * fault") + WAIT,
    ),
    "a second load that is not expected": (
        "gets 2048 bytes in a phase that expects 1024",
        BEGIN + "if (fault && t == 0)" + LOAD.replace("(s,", "(s + 1024,") + BARRIER + WAIT,
    ),
    "no bytes expected": (
        "gets 1024 bytes in a phase that expects 0",
        BEGIN.replace(EXPECT, f"if (fault) ptx::mbarrier_arrive(bar); else {EXPECT}")
        + BARRIER
        + WAIT,
    ),
    "more bytes than an mbarrier counts": (
        r"expects 1048576 bytes; the limit is 2\^20 - 1",
        "if (t < 2) ptx::mbarrier_arrive_expect_tx(bar + 2, (1 << 19) - !fault);",
    ),
    "fewer bytes than none": (
        "expect_tx of -1 bytes",
        "if (t == 0) ptx::mbarrier_arrive_expect_tx(bar, -fault);",
    ),
    "more arrivals": (
        "more arrivals at an mbarrier than the 1 of its phase",
        "if (t == 0 || (t == 40 && fault)) ptx::mbarrier_arrive(bar);",
    ),
    "a wait for the wrong phase": (
        "still in flight",
        BEGIN + BARRIER + "ptx::mbarrier_wait(bar, fault);\n" + READ,
    ),
    "a second wait of the same parity": (
        "mbarrier_wait for parity 0, but after its last wait the thread's next .* of parity 1",
        BEGIN + WAIT + BARRIER + "if (t == 0) ptx::mbarrier_arrive(bar);\n"
        "ptx::mbarrier_wait(bar, !fault);",
    ),
    "a third wait of the same parity": (
        "mbarrier_wait for parity 1, but after its last wait the thread's next .* of parity 0",
        "if (t == 0) ptx::mbarrier_arrive(bar);\n"
        + WAIT
        + BARRIER
        + "if (t == 0) ptx::mbarrier_arrive(bar);\nptx::mbarrier_wait(bar, 1);\n"
        + BARRIER
        + "if (t == 0) ptx::mbarrier_arrive(bar);\nptx::mbarrier_wait(bar, fault);\n",
    ),
    "two waits for the phase before the first": (
        "mbarrier_wait for parity 1, but .* parity 0",
        "ptx::mbarrier_wait(bar, 1);\n" + BARRIER + "if (t == 0) ptx::mbarrier_arrive(bar);\n"
        "ptx::mbarrier_wait(bar, fault);",
    ),
    "a wait for the phase before the first, too late": (
        "too late: the mbarrier has completed 1 phases, and the thread waits for the one before",
        BEGIN + "if (t < 32) ptx::mbarrier_wait(bar, 0);\n" + BARRIER + "if (t >= 32) "
        "ptx::mbarrier_wait(bar, fault);\n",
    ),
    "a first wait after two phases": (
        "too late: the mbarrier has completed 2 phases",
        BEGIN
        + "if (t == 0 || !fault) ptx::mbarrier_wait(bar, 0);\n"
        + BARRIER
        + "if (t == 0) { ptx::mbarrier_arrive(bar); ptx::mbarrier_wait(bar, 1); }\n"
        + BARRIER
        + "if (t == 40 && fault) ptx::mbarrier_wait(bar, 0);\n",
    ),
    "a wait after two phases more": (
        "too late: the mbarrier has completed 3 phases",
        BEGIN
        + WAIT
        + BARRIER
        + "if (t == 0) { ptx::mbarrier_arrive(bar); ptx::mbarrier_wait(bar, 1); }\n"
        + "if (t == 0 && fault) { ptx::mbarrier_arrive(bar); ptx::mbarrier_wait(bar, 0); }\n"
        + BARRIER
        + "if (t == 40) ptx::mbarrier_wait(bar, 1);\n",
    ),
    "parity 2": (
        "parity 2",
        "if (t == 0) ptx::mbarrier_arrive(bar);\nptx::mbarrier_wait(bar, 2 * fault);",
    ),
    "an arrival releases what came before": (
        "race in shared memory|never written",
        "if (t == 0) ptx::st_shared(s, (unsigned char)1);\nif (t == 0) ptx::mbarrier_arrive(bar);\n"
        "if (t == 40) {\n" + good(WAIT) + "ptx::ld_shared(s);\n}",
    ),
    "an arrival releases nothing that comes later": (
        "race in shared memory|never written",
        "if (t == 0 && fault) ptx::mbarrier_arrive(bar);\n"
        "if (t == 0) ptx::st_shared(s, (unsigned char)1);\n"
        "if (t == 0 && !fault) ptx::mbarrier_arrive(bar);\n"
        "if (t == 40) ptx::mbarrier_wait(bar, 0);\nif (t == 40) ptx::ld_shared(s);\n",
    ),
    "a passed wait for the phase before the first acquires nothing": (
        "race in shared memory|never written",
        "if (t == 0) ptx::st_shared(s, (unsigned char)1);\nif (t == 0) ptx::mbarrier_arrive(bar);\n"
        "if (t == 40) ptx::mbarrier_wait(bar, fault);\nif (t == 40) ptx::ld_shared(s);\n",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", MBARRIER_RULES)
def test_mbarrier_rule(rule, seed):
    pattern, body = MBARRIER_RULES[rule]
    fails(pattern, START + INIT + body, seed=seed)


@pytest.mark.parametrize("seed", range(10))
def test_overtaken_while_it_waits(seed):
    body = """
    if (t == 40) ptx::mbarrier_wait(bar, 0);
    if (t == 0) {
      ptx::mbarrier_arrive(bar);
      ptx::mbarrier_wait(bar, 0);
      if (fault) ptx::mbarrier_arrive(bar);
      if (fault) ptx::mbarrier_wait(bar, 1);
    }
    """
    fails("too late: the mbarrier has completed 2 phases", START + INIT + body, seed=seed)


@pytest.mark.parametrize(
    ("threads", "sync"),
    [(64, "__syncthreads()"), (32, "__syncwarp()"), (32, "__ballot_sync(0xffffffff, 1)")],
)
def test_a_wait_that_some_orders_make_too_late(threads, sync):
    """Thread 1 waits for a phase, and thread 0 completes the next one."""
    body = f"""
    if (t == 40) ptx::mbarrier_arrive(bar + 1);
    if (t < {threads}) {{
      if (t == 0) ptx::mbarrier_arrive(bar);
      if (t < 2) ptx::mbarrier_wait(bar, 0);
      if (t == 0) ptx::mbarrier_wait(bar + 1, 0);  // lets others go first
      if (!fault) {sync};
      if (t == 0) ptx::mbarrier_arrive(bar);
      if (t < 2) ptx::mbarrier_wait(bar, 1);
    }}
    """
    for seed in range(10):
        fails("may come too late|comes too late", START + INIT + body, seed=seed)


def test_what_a_cluster_sends_takes_a_wait_for_the_cluster():
    body = """
    const int rank = ptx::cluster_ctarank();
    if (t == 0) ptx::mbarrier_arrive_expect_tx(bar, 8);
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (t < 2) ptx::st_async((float*)s + rank, 1.0f, bar, t);
    if (fault) ptx::mbarrier_wait(bar, 0);
    else ptx::mbarrier_wait_cluster(bar, 0);
    """
    fails("it takes mbarrier_wait_cluster", START + INIT + body, grid=2, cluster=2)
    own = body.replace("t < 2", "t == rank").replace("bar, 8", "bar, 4")
    run(START + INIT + own, 1, grid=2, cluster=2)


# -- a ring ---------------------------------------------------------------------------------------

RING = """
unsigned char* s = ptx::dynamic_smem<unsigned char, 1024>();
unsigned long long* full = ptx::static_smem<unsigned long long, 4>();
unsigned long long* unused = full + 2;
if (t == 0) {
  for (int i = 0; i < 2; ++i) {
    ptx::mbarrier_init(full + i, 1);
    ptx::mbarrier_init(unused + i, 2);
  }
  ptx::fence_mbarrier_init();
}
__syncthreads();
const int lane = t % 32, warp = t / 32;
for (int i = 0; i < 20; ++i) {
  const int slot = i % 2, parity = i / 2 % 2;
  const int broken = i == 9 ? fault : 0;
  if (warp == 0) {
    if (lane != 0) break;
    if (broken != 1) ptx::mbarrier_wait(unused + slot, parity ^ 1);
    ptx::mbarrier_arrive_expect_tx(full + slot, 1024);
    ptx::cp_async_bulk_tensor_load(s + slot * 1024, &p.in, full + slot, 0, 8 * i, 0, 0, 0);
  } else {
    if (broken != 2 || t != 40) ptx::mbarrier_wait(full + slot, parity ^ (broken == 3));
    if (broken == 4 && t == 32) ptx::mbarrier_arrive(unused + slot);
    const int chunk = 32 * warp - 32 + lane;
    const uint4 x = ptx::ld_shared((const uint4*)(s + slot * 1024) + chunk);
    if (broken != 5) ptx::fence_proxy_async();
    if (broken != 6) __syncwarp();
    if (lane == 0 && (t != 32 || (broken != 4 && broken != 7))) ptx::mbarrier_arrive(unused + slot);
    if (broken == 8) ptx::ld_shared((const uint4*)(s + slot * 1024) + chunk);
    ptx::st_global((uint4*)p.y + 64 * i + chunk, x);
  }
}
"""
RING_FAULTS = {
    "no wait for the consumers": (1, "a bulk load writes|more arrivals|for parity|gets 2048 bytes"),
    "a lane does not wait": (2, NOT_WAITED + "|for parity|too late|reads, with no barrier"),
    "the wrong parity": (3, "mbarrier_wait for parity"),
    "done before the read": (4, "a bulk load writes byte .*reads, with no barrier|" + NOT_WAITED),
    "no fence after the read": (5, NO_FENCE),
    "no __syncwarp after the read": (6, "a bulk load writes byte .*reads, with no|" + NOT_WAITED),
    "never done": (7, "deadlock.*1 of 2 arrivals and 0 of 0 bytes are missing"),
    "read when done": (8, "a bulk load writes byte .*reads, with no|" + NOT_WAITED + "|too late"),
}


def ring(rng, fault=0, seed=0):
    x = rng.standard_normal((160, 64)).astype(np.float16)
    y = emulator.empty(x.shape, x.dtype)
    maps = [emulator.tensor_map(x, (64, 160, 1, 1, 1), STRIDES, BOX, 128), bytes(128)]
    counters, _ = run(RING, fault, x=x, y=y, maps=maps, block=96, smem_bytes=2048, seed=seed)
    expected = [swizzled(tile.reshape(-1).view(np.uint8), 128) for tile in x.reshape(20, 8, 64)]
    np.testing.assert_array_equal(y.reshape(-1).view(np.uint8), np.concatenate(expected))
    assert counters.bulk_bytes == counters.global_bytes_read == x.nbytes
    assert counters.mbarrier_waits == 20 * 65


@pytest.mark.parametrize("seed", range(12))
def test_ring(seed, rng):
    ring(rng, seed=seed)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("broken", RING_FAULTS)
def test_broken_ring(broken, seed, rng):
    fault, pattern = RING_FAULTS[broken]
    with pytest.raises(emulator.EmulatorError, match=pattern):
        ring(rng, fault, seed)


# -- stores ---------------------------------------------------------------------------------------

FILL_AND_STORE = """
unsigned char* s = ptx::dynamic_smem<unsigned char, 1024>();
for (int i = t; i < p.c[5] / 16; i += 64) {
  ptx::st_shared((uint4*)(s + p.c[6]) + i, ptx::ld_global((const uint4*)p.x + i));
}
ptx::fence_proxy_async();
__syncthreads();
if (t == 40) {
  ptx::cp_async_bulk_tensor_store(&p.out, s + p.c[6], p.c[0], p.c[1], p.c[2], p.c[3], p.c[4]);
  ptx::cp_async_bulk_commit();
  ptx::cp_async_bulk_wait_read<0>();
}
"""


def in_chunks(view):
    """`view` with the columns that a store writes: rows end on boundaries of 16 bytes."""
    width = -(-view.shape[-1] * view.itemsize // 16) * 16 // view.itemsize
    return np.lib.stride_tricks.as_strided(view, (*view.shape[:-1], width), view.strides)


@pytest.mark.parametrize("swizzle", [0, 32, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_store(dtype, swizzle, rng):
    for seed in range(12):
        inner = random_view(rng, DTYPES[dtype], repeat=False)
        box = random_box(rng, DTYPES[dtype], swizzle)
        column, *rest = random_place(rng, inner, box)
        c = (column * inner.itemsize // 16 * 16 // inner.itemsize, *rest)
        view = in_chunks(inner)
        offset = int(rng.integers(0, 5)) * (8 * swizzle or 128)
        x = rng.integers(0, 256, int(np.prod(box)) * view.itemsize, np.uint8)
        before, base_before = view.copy(), inner.base.copy()
        maps = [bytes(128), map_of(inner, box, swizzle)]
        counters, _ = run(
            FILL_AND_STORE,
            x=x,
            y=inner,
            writes=(inner.base,),
            maps=maps,
            c=(*c, x.size, offset),
            smem_bytes=offset + x.size,
            seed=seed,
        )
        address = swizzled(np.arange(offset + x.size), swizzle)[offset:] - offset
        data = np.empty_like(x)
        data[address] = x
        inside, of_view = overlap(view, box, c)
        expected = before.copy()
        expected[of_view] = data.view(view.dtype).reshape(box[::-1])[inside]
        np.testing.assert_array_equal(view.view(np.uint8), expected.view(np.uint8))
        view[...] = before
        np.testing.assert_array_equal(inner.base, base_before)  # nothing else was written
        size = expected[of_view].size
        assert counters.global_bytes_written == size * view.itemsize
        assert counters.global_sectors_written == sectors(view, box, c)
        assert counters.global_requests == (size > 0) + -(-x.size // 16 // 32)


PUT = """if (t == 0) {
ptx::cp_async_bulk_tensor_store(&p.out, s, 0, 0, 0, 0, 0);
ptx::cp_async_bulk_commit();
}
"""
PUT_AGAIN = PUT.replace("s, 0, 0", "s + 1024, 0, 8")
READY = WRITE + FENCE + BARRIER
WAIT_READ = "if (t == 0) ptx::cp_async_bulk_wait_read<0>();\n"
YET_TO_READ = "of a box that a bulk store of thread 0 has yet to read"
STORE_RULES = {
    "no fence": (
        "a bulk store reads byte 0, which thread 0 .*wrote, " + NO_FENCE,
        WRITE + good(FENCE) + BARRIER + PUT + WAIT_READ,
    ),
    "one writer with no fence": (
        "a bulk store reads byte 640, which thread 40 .*wrote, " + NO_FENCE,
        WRITE + "if (!fault || t != 40) ptx::fence_proxy_async();\n" + BARRIER + PUT + WAIT_READ,
    ),
    "its own bytes with no fence": (
        "a bulk store reads byte 1008, which thread 0 .*wrote, " + NO_FENCE,
        READY
        + "if (t == 0) ptx::st_shared((uint4*)s + 63, uint4{});\n"
        + good(FENCE)
        + PUT
        + WAIT_READ,
    ),
    "the fence before the write": (
        NO_FENCE,
        bad(FENCE) + WRITE + good(FENCE) + BARRIER + PUT + WAIT_READ,
    ),
    "the fence after the barrier": (
        NO_FENCE,
        WRITE + good(FENCE) + BARRIER + bad(FENCE) + PUT + WAIT_READ,
    ),
    "no barrier": (
        "a bulk store reads byte .*wrote, with no barrier|never written|" + YET_TO_READ,
        WRITE + FENCE + good(BARRIER) + PUT + WAIT_READ,
    ),
    "after stmatrix with no fence": (
        "a bulk store reads byte .*the warp of thread .*wrote, " + NO_FENCE,
        "const unsigned int r[4] = {};\nptx::stmatrix_x4((uint4*)s + t, r);\n"
        + good(FENCE)
        + BARRIER
        + PUT
        + WAIT_READ,
    ),
    "written relaxed with no fence": (
        "a bulk store reads byte .*writes relaxed or atomically, " + NO_FENCE,
        READY
        + "ptx::st_shared_relaxed((unsigned int*)s, 2u);\n"
        + good(FENCE)
        + BARRIER
        + PUT
        + WAIT_READ,
    ),
    "never written": (
        "a bulk store reads shared byte 1008, which was never written",
        "if (!fault || t < 63)" + READY + PUT + WAIT_READ,
    ),
    "of a cp.async in flight": (
        "a bulk store reads shared byte 16 of a cp.async that has not landed",
        READY
        + "if (t == 0) ptx::cp_async_16(s + 16, p.x, 16);\nptx::cp_async_commit();\n"
        + good("ptx::cp_async_wait<0>();")
        + FENCE
        + PUT
        + WAIT_READ
        + "ptx::cp_async_wait<0>();",
    ),
    "of a load in flight": (
        "a bulk store reads shared byte 0, to which " + NOT_WAITED,
        INIT + BEGIN + good(WAIT) + PUT + WAIT_READ + bad(WAIT),
    ),
    "of a load with no wait": (
        NOT_WAITED,
        INIT + BEGIN + "if (t == 40 || !fault) ptx::mbarrier_wait(bar, 0);\n" + PUT + WAIT_READ,
    ),
    "an mbarrier": (
        "a bulk store reads shared byte 1016, which is part of an mbarrier",
        READY
        + "if (t == 0) ptx::mbarrier_init((unsigned long long*)(s + 1024 - 8 * fault), 1);\n"
        + PUT
        + WAIT_READ,
    ),
    "overwritten by itself": (
        "writes shared byte 0 " + YET_TO_READ,
        READY
        + PUT
        + "if (t == 0 && fault) ptx::st_shared(s, (unsigned char)1);\n"
        + WAIT_READ
        + "if (t == 0) ptx::st_shared(s, (unsigned char)1);\n",
    ),
    "overwritten by another thread": (
        "writes shared byte 1023 " + YET_TO_READ,
        READY
        + PUT
        + good(WAIT_READ)
        + BARRIER
        + "if (t == 40) ptx::st_shared(s + 1023, (unsigned char)1);\n"
        + BARRIER
        + bad(WAIT_READ),
    ),
    "overwritten relaxed": (
        "writes shared byte 0 " + YET_TO_READ,
        READY + PUT + BARRIER + bad("ptx::st_shared_relaxed((unsigned int*)s, 1u);") + WAIT_READ,
    ),
    "overwritten atomically": (
        "writes shared byte 0 " + YET_TO_READ,
        READY + PUT + "if (t == 0 && fault) atomicAdd((unsigned int*)s, 1u);\n" + WAIT_READ,
    ),
    "overwritten by stmatrix": (
        "writes shared byte .* " + YET_TO_READ,
        "const unsigned int r[4] = {};\n"
        + READY
        + PUT
        + BARRIER
        + bad("ptx::stmatrix_x4((uint4*)s + t, r);")
        + WAIT_READ,
    ),
    "overwritten by cp.async": (
        "writes shared byte .* " + YET_TO_READ,
        READY
        + PUT
        + "if (t == 0 && fault) ptx::cp_async_16(s + 512, p.x, 16);\n"
        + "ptx::cp_async_commit();\nptx::cp_async_wait<0>();\n"
        + WAIT_READ,
    ),
    "overwritten by a load": (
        "a bulk load writes shared byte 0 " + YET_TO_READ,
        INIT + READY + PUT + good(WAIT_READ) + BEGIN + WAIT + bad(WAIT_READ),
    ),
    "overwritten by a load of another thread": (
        "a bulk load writes byte 0, which thread 0 .*reads, with no barrier between|"
        f"{YET_TO_READ}|{NOT_WAITED}",
        INIT + READY + PUT + WAIT_READ + good(BARRIER) + BEGIN.replace("t == 0", "t == 40") + WAIT,
    ),
    "made an mbarrier": (
        "writes shared byte 0 " + YET_TO_READ,
        READY
        + PUT
        + "if (t == 0) ptx::mbarrier_init((unsigned long long*)(s + 1024 - 1024 * fault), 1);\n"
        + WAIT_READ,
    ),
    "overwritten with no barrier after the wait": (
        "race in shared memory: writes byte .*thread 0 .*reads, with no barrier|"
        "a bulk store reads byte .*wrote, with no barrier|" + YET_TO_READ,
        READY + PUT + WAIT_READ + good(BARRIER) + WRITE,
    ),
    "overwritten with the barrier before the wait": (
        "race in shared memory: writes byte .*thread 0 .*reads, with no barrier|" + YET_TO_READ,
        READY + PUT + good(WAIT_READ) + BARRIER + bad(WAIT_READ) + WRITE,
    ),
    "the wait of another thread": (
        YET_TO_READ,
        READY
        + PUT
        + "if (t == 40) ptx::cp_async_bulk_commit();\n"
        + "if (t == 40 || !fault) ptx::cp_async_bulk_wait_read<0>();\n"
        + BARRIER
        + WRITE
        + WAIT_READ,
    ),
    "a wait for too few groups": (
        "writes shared byte 1024 " + YET_TO_READ,
        READY
        + WRITE.replace("+ t", "+ 64 + t")
        + FENCE
        + BARRIER
        + PUT
        + PUT_AGAIN
        + "if (t == 0) ptx::cp_async_bulk_wait_read<1>();\n"
        + good(WAIT_READ)
        + "if (t == 0) ptx::st_shared(s, (unsigned char)1);\n"
        + "if (t == 0) ptx::st_shared(s + 1024, (unsigned char)1);\n"
        + bad(WAIT_READ),
    ),
    "a wait for a group that it is not in": (
        YET_TO_READ,
        READY
        + PUT.replace("ptx::cp_async_bulk_commit();", "if (!fault) ptx::cp_async_bulk_commit();")
        + WAIT_READ
        + "if (t == 0) ptx::st_shared(s, (unsigned char)1);\n"
        + "ptx::cp_async_bulk_commit();\n"
        + WAIT_READ,
    ),
    "an empty group counts": (
        YET_TO_READ,
        READY
        + PUT
        + "if (t == 0 && !fault) ptx::cp_async_bulk_commit();\n"
        + "if (t == 0) ptx::cp_async_bulk_wait_read<1>();\n"
        + "if (t == 0) ptx::st_shared(s, (unsigned char)1);\n"
        + WAIT_READ,
    ),
    "exit with no wait": (
        "exited with a bulk store that it never waited for with cp_async_bulk_wait_read",
        READY + PUT + good(WAIT_READ),
    ),
    "exit after a wait for too few": (
        "exited with a bulk store that it never waited for with cp_async_bulk_wait_read",
        READY + PUT + bad("ptx::cp_async_bulk_wait_read<1>();") + good(WAIT_READ),
    ),
    "exit with no commit": (
        "exited with a bulk store that it never committed",
        READY
        + PUT.replace("ptx::cp_async_bulk_commit();", "if (!fault) ptx::cp_async_bulk_commit();")
        + WAIT_READ,
    ),
    "the commit of another thread": (
        "exited with a bulk store that it never committed",
        READY
        + PUT.replace("ptx::cp_async_bulk_commit();", "")
        + "if (t == fault) ptx::cp_async_bulk_commit();\n"
        + WAIT_READ,
    ),
    "misaligned": (
        "a box misaligned: at offset 512",
        READY
        + WRITE.replace("+ t", "+ 64 + t")
        + FENCE
        + BARRIER
        + PUT.replace("out, s", "out, s + 512 * fault")
        + WAIT_READ,
    ),
    "beyond dynamic shared memory": (
        "not within dynamic shared memory",
        READY + PUT.replace("out, s", "out, s + 16384 * fault") + WAIT_READ,
    ),
    "from within a chunk on": (
        "a bulk store from column 4 on",
        READY + PUT.replace("s, 0,", "s, 4 * fault,") + WAIT_READ,
    ),
    "a map that the kernel copied": (
        "not in the launch's parameters, or a copy",
        "TensorMap copy = p.out;\n"
        + READY
        + PUT.replace("&p.out", "fault ? &copy : &p.out")
        + WAIT_READ,
    ),
    "read-only": (
        "128 bytes written, but reads.* is read-only",
        READY + PUT.replace("&p.out", "fault ? &p.in : &p.out") + WAIT_READ,
    ),
    "written twice by stores": (
        "byte 1024 of writes.* is written twice: first by thread 0 of block 0",
        READY
        + PUT
        + PUT.replace("0, 0, 0, 0, 0", "0, 8 * !fault + 8 * fault, 0, 0, 0")
        + bad(PUT.replace("0, 0, 0, 0, 0", "0, 8, 0, 0, 0"))
        + WAIT_READ,
    ),
    "written before by itself": (
        "byte 1020 of writes.* is written twice: first by thread 0 of block 0",
        READY + "if (t == 0) ptx::st_global(p.y + 256 - fault, 1u);\n" + PUT + WAIT_READ,
    ),
    "written after by itself": (
        "byte 1020 of writes.* is written twice: first by thread 0 of block 0",
        READY + PUT + WAIT_READ + "if (t == 0) ptx::st_global(p.y + 256 - fault, 1u);\n",
    ),
    "written after by another thread": (
        "is written twice: first by thread",
        READY + PUT + WAIT_READ + "if (t == 40) ptx::st_global(p.y + 256 - fault, 1u);\n",
    ),
    "read after by itself": (
        "reads byte 0 of writes.*, which thread 0 of block 0 wrote in the same launch",
        READY + PUT + WAIT_READ + "if (t == 0 && fault) ptx::ld_global(p.y);\n",
    ),
    "updated after": (
        "atomic update of byte .*another thread wrote",
        READY + PUT + WAIT_READ + "if (t == 0 && fault) atomicAdd(p.y, 1u);\n",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", STORE_RULES)
def test_store_rule(rule, seed):
    pattern, body = STORE_RULES[rule]
    y = np.zeros((64, 64), np.float16) if rule == "updated after" else None
    reads = {} if y is None else {"reads": (y,)}
    fails(pattern, START + body, y=y, seed=seed, **reads)


def test_store_races_with_readers():
    y = np.zeros((64, 64), np.float16)
    body = "if (t == 40) ptx::ld_global(p.y + 3);\n" + good(BARRIER) + PUT + WAIT_READ
    fails(
        "race: writes byte .* another thread reads|wrote in the same launch",
        START + READY + body,
        y=y,
        reads=(y,),
    )


def test_store_of_what_is_outside_needs_no_values():
    """Only the elements inside of the tensor have been written; nobody may write the others."""
    y = emulator.empty((64, 64), np.float16)
    body = (
        "if (t < 24) ptx::st_shared((uint4*)s + t, uint4{1, 2, 3, 4});\n"
        + FENCE
        + BARRIER
        + PUT.replace("s, 0, 0", "s, 0, 61 - fault % 2")
        + "if (t == 0 && fault == 2) ptx::st_shared(s + 1000, (unsigned char)1);\n"
        + WAIT_READ
    )
    fails("a bulk store reads shared byte 384, which was never written", START + body, y=y)
    with pytest.raises(emulator.EmulatorError, match="writes shared byte 1000 " + YET_TO_READ):
        run(START + body, 2)


def test_store_of_a_part_of_each_row():
    """Of 24 columns only: of each row three chunks, wherever the swizzle puts them."""
    y = np.zeros((64, 64), np.float16)
    maps = [bytes(128), emulator.tensor_map(y, (24, *DIMS[1:]), STRIDES, BOX, 128)]
    write = "if ((t % 8 ^ t / 8) < 3 && (!fault || t != 25)) " + WRITE
    fails(
        "a bulk store reads shared byte 400, which was never written",
        START + write + FENCE + BARRIER + PUT + WAIT_READ,
        y=y,
        maps=maps,
    )
    expected = np.zeros((64, 64), np.float16)
    expected.view(np.uint32)[:8, :12] = np.tile([1, 2, 3, 4], 3)
    np.testing.assert_array_equal(y, expected)


def test_store_of_a_part_of_a_chunk():
    """Of 20 columns: each row is written up to column 24, whoever that belongs to."""
    y = np.full((64, 64), 5, np.float16)
    width = (20, *DIMS[1:])
    maps = [bytes(128), emulator.tensor_map(y, width, STRIDES, BOX, 128)]
    run(START + READY + PUT + WAIT_READ, y=y, maps=maps)
    expected = np.full((64, 64), 5, np.float16)
    expected.view(np.uint32)[:8, :12] = np.tile([1, 2, 3, 4], 3)
    np.testing.assert_array_equal(y, expected)
    out_of_view = "48 bytes written out of bounds: byte 40 of writes.* belongs to no element"
    with pytest.raises(emulator.EmulatorError, match=out_of_view):
        run(START + READY + PUT + WAIT_READ, y=y, maps=maps, writes=(y[:, :20],))
    row = emulator.empty((20,), np.float16)
    maps[1] = emulator.tensor_map(row, (20, 1, 1, 1, 1), STRIDES, BOX, 128)
    with pytest.raises(emulator.EmulatorError, match="48 bytes written out of bounds: .* 40 bytes"):
        run(START + READY + PUT + WAIT_READ, y=row, maps=maps)
    unwritten = "if ((t % 8 ^ t / 8) < (t / 8 == 3 ? 2 : 3)) " + WRITE
    maps[1] = emulator.tensor_map(y, width, STRIDES, BOX, 128)
    with pytest.raises(emulator.EmulatorError, match="reads shared byte 400, which was never"):
        run(START + unwritten + FENCE + BARRIER + PUT + WAIT_READ, y=y, maps=maps)


def test_what_a_load_brought_is_stored_with_no_fence(rng):
    """From the async proxy to the async proxy: through the box, and over it again."""
    x = rng.standard_normal((64, 64)).astype(np.float16)
    y = emulator.empty((64, 64), np.float16)
    body = """
    if (t == 0) {
      for (int i = 0; i < 8; ++i) {
        ptx::mbarrier_arrive_expect_tx(bar, 1024);
        ptx::cp_async_bulk_tensor_load(s, &p.in, bar, 0, 8 * i, 0, 0, 0);
        ptx::mbarrier_wait(bar, i % 2);
        ptx::cp_async_bulk_tensor_store(&p.out, s, 0, 56 - 8 * i, 0, 0, 0);
        ptx::cp_async_bulk_commit();
        ptx::cp_async_bulk_wait_read<0>();
      }
    }
    """
    counters, _ = run(START + INIT + body, x=x, y=y)
    np.testing.assert_array_equal(y, x.reshape(8, 8, 64)[::-1].reshape(64, 64))
    assert counters.bulk_bytes == counters.global_bytes_written == x.nbytes


def test_readers_of_a_box_that_is_stored():
    run(START + READY + PUT + READ + BARRIER + WAIT_READ + BARRIER + READ)


@pytest.mark.parametrize("seed", range(6))
def test_stores_of_a_ring(seed, rng):
    """Tiles are loaded by one warp, negated by another, and stored; two slots each way."""
    x = rng.standard_normal((100, 64)).astype(np.float16)
    y = emulator.empty(x.shape, x.dtype)
    maps = [emulator.tensor_map(a, (64, 100, 1, 1, 1), STRIDES, BOX, 128) for a in (x, y)]
    body = """
    for (int i = 0; i < 13; ++i) {
      const int slot = i % 2, parity = i / 2 % 2;
      if (t < 32) {
        if (t != 0) break;
        ptx::mbarrier_wait(bar + 2 + slot, parity ^ 1);
        ptx::mbarrier_arrive_expect_tx(bar + slot, 1024);
        ptx::cp_async_bulk_tensor_load(s + slot * 1024, &p.in, bar + slot, 0, 8 * i, 0, 0, 0);
      } else {
        ptx::mbarrier_wait(bar + slot, parity);
        const uint4* from = (const uint4*)(s + slot * 1024);
        uint4* to = (uint4*)(s + 2048 + slot * 1024);
        if (t == 32 && fault != 1) ptx::cp_async_bulk_wait_read<1>();
        if (t == 32 && fault == 1) ptx::cp_async_bulk_wait_read<2>();
        __syncwarp();
        for (int chunk = t - 32; chunk < 64; chunk += 32) {
          const uint4 v = ptx::ld_shared(from + chunk);
          const unsigned int sign = 0x80008000;
          ptx::st_shared(to + chunk, uint4{v.x ^ sign, v.y ^ sign, v.z ^ sign, v.w ^ sign});
        }
        if (fault != 2 || t != 50) ptx::fence_proxy_async();
        __syncwarp();
        if (t == 32) {
          ptx::cp_async_bulk_tensor_store(&p.out, to, 0, 8 * i, 0, 0, 0);
          ptx::cp_async_bulk_commit();
        }
        if (t % 32 < 2) ptx::mbarrier_arrive(bar + 2 + slot);
      }
    }
    if (t == 32) ptx::cp_async_bulk_wait_read<0>();
    """
    run(START + INIT + body, x=x, y=y, maps=maps, smem_bytes=4096, seed=seed)
    np.testing.assert_array_equal(y, -x)
    for fault, pattern in [(1, YET_TO_READ.replace("0", "32")), (2, NO_FENCE)]:
        with pytest.raises(emulator.EmulatorError, match=pattern):
            run(START + INIT + body, fault, x=x, maps=maps, y=y, smem_bytes=4096, seed=seed)


# -- dynamic shared memory ------------------------------------------------------------------------


def test_dynamic_smem_is_aligned():
    body = """
    unsigned char* s = ptx::dynamic_smem<unsigned char, 1024>();
    ptx::st_global(p.y + 64 * blockIdx.x + t, (unsigned int)((unsigned long long)s % 1024));
    """
    y = emulator.empty((4, 64), np.uint32)
    assert not run(body, y=y, maps=[bytes(128)] * 2, grid=4, cluster=4)[1].any()


def test_dynamic_smem_has_one_alignment():
    with pytest.raises(RuntimeError, match="a power of two up to 1024"):
        run("ptx::dynamic_smem<unsigned char, 2048>();")
    with pytest.raises(RuntimeError, match="a power of two up to 1024"):
        run("ptx::dynamic_smem<unsigned char, 96>();")
    body = "ptx::dynamic_smem<unsigned char, 1024>();\nif (fault) ptx::dynamic_smem<float>();"
    run(body)
    with pytest.raises(emulator.EmulatorError, match="two alignments, 1024 and 128"):
        run(body, 1)
