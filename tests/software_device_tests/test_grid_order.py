"""Order between the blocks of a launch: what is a release or an acquire there, and what not."""

from __future__ import annotations

import numpy as np
import pytest
from small_kernels import compile_c, fails, run

BLOCKS = 3
# Each block writes a part, and the last one adds them up.
SUM = """__global__ void k(unsigned* counters, float* parts, float* y) {
  const int t = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  __shared__ unsigned before;
  parts[64 * block + t] = 10 * block + t;
  __syncthreads();
  if (t == 0) {
    unsigned old;
    asm volatile("fence.acq_rel.gpu; // first" ::: "memory");
    asm volatile("atom.relaxed.gpu.global.inc.u32 %0, [%1], %2;"
                 : "=r"(old) : "l"(counters), "r"(blocks - 1) : "memory");
    asm volatile("fence.acq_rel.gpu; // second" ::: "memory");
    before = old;
  }
  __syncthreads();
  if (before == blocks - 1) {
    float sum = 0, part;
    for (int i = 0; i < blocks; ++i) {
      asm volatile("ld.global.cg.f32 %0, [%1];"
                   : "=f"(part) : "l"(parts + 64 * i + (t ^ 33)) : "memory");
      sum += part;
    }
    y[t] = sum;
  }
}"""
FIRST, SECOND = (f"fence.acq_rel.gpu; // {which}" for which in ("first", "second"))
ATOM, LOAD = "atom.relaxed.gpu.global", "ld.global.cg.f32"
WRITE = "parts[64 * block + t] = 10 * block + t;\n"
RELEASED = (
    r"which block \(\d, 0, 0\) wrote in this launch and released, but this warp has not acquired"
)
UNRELEASED = r"which block \(\d, 0, 0\) wrote in this launch and has not released since"


def changed(*changes):
    source = SUM
    for old, new in changes:
        assert source.count(old) == 1
        source = source.replace(old, new)
    return compile_c(source)


def arrays():
    return np.zeros(8, np.uint32), np.zeros(64 * BLOCKS, np.float32), np.zeros(64, np.float32)


ORDERED = {
    "fences": [],
    "atomic": [(FIRST, ""), (SECOND, ""), (ATOM, "atom.acq_rel.gpu.global")],
    "generic address": [(ATOM, "atom.acq_rel.gpu"), (FIRST, ""), (SECOND, "")],
    "fence and acquire": [(SECOND, ""), (ATOM, "atom.acquire.gpu.global")],
    "release and fence": [(FIRST, ""), (ATOM, "atom.release.sys.global")],
    "other fences": [(FIRST, "fence.sc.sys;"), (SECOND, "membar.gl;")],
    "one-way fences": [(FIRST, "fence.release.gpu;"), (SECOND, "fence.acquire.gpu;")],
    "plain load": [(LOAD, "ld.global.f32")],
    "relaxed load": [(LOAD, "ld.relaxed.gpu.global.f32")],
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ORDERED)
def test_ordered(name, seed):
    counters, parts, y = arrays()
    assert (
        run(changed(*ORDERED[name]), counters, parts, y, grid=BLOCKS, block=64, seed=seed) is None
    )
    np.testing.assert_array_equal(y, 30 + 3 * (np.arange(64) ^ 33))
    assert not counters.any()


UNORDERED = {
    "no release": ([(FIRST, "")], UNRELEASED),
    "no acquire": ([(SECOND, "")], RELEASED),
    "fence of the block": ([(FIRST, "fence.acq_rel.cta;")], UNRELEASED),
    "fence that only acquires": ([(FIRST, "fence.acquire.gpu;")], UNRELEASED),
    "fence that only releases": ([(SECOND, "fence.release.gpu;")], RELEASED),
    "atomic of the block": ([(ATOM, "atom.relaxed.cta.global")], UNRELEASED),
    "atomic that only acquires": ([(FIRST, ""), (ATOM, "atom.acquire.gpu.global")], UNRELEASED),
    "atomic that only releases": ([(SECOND, ""), (ATOM, "atom.release.gpu.global")], RELEASED),
    "no barrier before": ([(WRITE + "  __syncthreads();", WRITE)], UNRELEASED),
    "write after the release": (
        [("before = old;", "before = old; parts[64 * block] = 1;")],
        UNRELEASED,
    ),
    "write after an atomic that releases": (
        [
            (FIRST, ""),
            (SECOND, ""),
            (ATOM, "atom.acq_rel.gpu.global"),
            ("before = old;", "before = old; parts[64 * block] = 1;"),
        ],
        UNRELEASED,
    ),
    "write of two blocks": (
        [("parts[64 * block + t] =", "y[t] = parts[64 * block + t] =")],
        "writes byte .*" + RELEASED,
    ),
    "read-only load": ([(LOAD, "ld.global.nc.f32")], "wrote in this launch, as read-only memory"),
    "copy before the acquire": (
        [
            (SECOND, ""),
            (
                "float sum = 0, part;",
                "float sum = 0, part; __shared__ int4 s;\n"
                'asm volatile("cp.async.cg.shared.global [%0], [%1], 16; cp.async.wait_all;" ::'
                ' "r"((unsigned)__cvta_generic_to_shared(&s)),'
                ' "l"(parts + 64 * ((block + 1) % blocks)) : "memory");',
            ),
        ],
        RELEASED + ".*cp.async",
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", UNORDERED)
def test_unordered(name, seed):
    changes, message = UNORDERED[name]
    fails(message, changed(*changes), *arrays(), grid=BLOCKS, block=64, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_release_at_another_address(seed):
    """The blocks count at one address, without an order, and release at one of their own."""
    atom = 'asm volatile("atom.relaxed.gpu'
    own = atom.replace("relaxed", "acq_rel").replace("gpu", 'gpu.global.inc.u32 %0, [%1], 9;"')
    own += ' : "=r"(old) : "l"(counters + 1 + block) : "memory");\n    '
    ptx = changed((atom, own + atom), (FIRST, ""), (SECOND, ""))
    fails(RELEASED, ptx, *arrays(), grid=BLOCKS, block=64, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_what_was_acquired_is_released(seed):
    """Blocks in pairs, then the last ones of the pairs: the very last reads what all four wrote."""
    source = """static __device__ bool last(unsigned* counter) {
      __shared__ unsigned old;
      __syncthreads();
      if (threadIdx.x == 0) {
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], 1;"
                     : "=r"(old) : "l"(counter) : "memory");
      }
      __syncthreads();
      return old == 1;
    }
    extern "C" __global__ void k(unsigned* counters, float* parts, float* y) {
      const int t = threadIdx.x, block = blockIdx.x;
      parts[64 * block + t] = block;
      if (!last(counters + 1 + block / 2) || !last(counters)) return;
      const volatile float* part = parts + 63 - t;
      y[t] = part[0] + part[64] + part[128] + part[192];
    }"""
    counters, y = np.zeros(8, np.uint32), np.zeros(64, np.float32)
    ptx = compile_c("struct Nothing {};" + source)
    assert run(ptx, counters, np.zeros(256, np.float32), y, grid=4, block=64, seed=seed) is None
    assert (y == 6).all()
