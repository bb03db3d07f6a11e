"""Faults planted in the wrappers of cuda_src/ptx: an error names each, or the result is wrong."""

from __future__ import annotations

import re

import numpy as np
import pytest
from small_kernels import compile_with_headers, run
from test_wrappers import LAST, RELAXED, SEND, wgmma_source

from cuattn._device.compiler import source_directory

TILES = """#include <cuda_fp16.h>
#include <ptx/ldmatrix.cuh>
#include <ptx/mma.cuh>
extern "C" __global__ void k(const unsigned short* a, const unsigned short* b, float* d) {
  __shared__ alignas(16) unsigned short s[16 * 16], of_b[16 * 16];
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) s[i] = a[i], of_b[i] = b[i];
  __syncwarp();
  unsigned int x[4], y[4];
  ptx::ldmatrix_x4(x, s + t % 16 * 16 + t / 16 * 8);
  ptx::ldmatrix_x4_trans(y, of_b + t % 16 * 16 + t / 16 * 8);
  float c[4] = {1, 1, 1, 1};
  ptx::mma_m16n8k16<__half>(c, x, y[0], y[1]);
  __syncwarp();
  for (int i = t; i < 256; i += 32) s[i] = a[i] ^ 0x8000;  // negated
  __syncwarp();
  ptx::ldmatrix_x4(x, s + t % 16 * 16 + t / 16 * 8);
  ptx::mma_m16n8k16<__half>(c, x, y[0], y[1]);  // a b - a b
  ptx::mma_m16n8k16<__half>(c, x, y[0], y[1]);
  for (int i = 0; i < 4; ++i) d[(t / 4 + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i];
}"""
STORES = """#include <ptx/memory.cuh>
extern "C" __global__ void k(int* y) {
  __shared__ int s[32];
  const int t = threadIdx.x;
  s[t] = t;
  s[t] = ptx::ld_shared_relaxed(s + t) + 1;
  y[t] = ptx::ld_shared_relaxed(s + t);
}"""
ARRIVALS = """#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
extern "C" __global__ void k(int* y) {
  __shared__ int s[32];
  __shared__ alignas(8) unsigned long long bar;
  const int t = threadIdx.x;
  if (t == 0) ptx::mbarrier_init(&bar, 32);
  __syncthreads();
  if (t < 32) {
    ptx::st_shared(s + t, t);
    ptx::mbarrier_arrive(&bar);
  } else {
    ptx::mbarrier_wait(&bar, 0);
    y[t - 32] = ptx::ld_shared(s + t - 32);
  }
}"""
COPY = """#include <ptx/cp_async.cuh>
extern "C" __global__ void k(const int* x, int* y) {
  __shared__ alignas(16) int s[128];
  const int t = threadIdx.x;
  ptx::cp_async_16(s + 4 * t, x + 4 * t, 16);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) y[4 * t + i] = s[4 * t + i];
}"""
REGISTERS = """#include <ptx/setmaxnreg.cuh>
extern "C" __global__ void __launch_bounds__(384, 1) k(int* y) {
  if (threadIdx.x < 128) {
    ptx::setmaxnreg_dec<24>();
  } else {
    ptx::setmaxnreg_inc<240>();
    y[threadIdx.x - 128] = threadIdx.x;
  }
}"""
BARRIERS = """#include <ptx/named_barrier.cuh>
extern "C" __global__ void k(int* y) {
  __shared__ int s[32];
  const int t = threadIdx.x;
  if (t < 32) {
    s[t] = t;
    ptx::named_barrier_arrive(1, 64);
  } else {
    ptx::named_barrier_sync(1, 64);
    y[t - 32] = s[t - 32];
  }
}"""
MAP = """#include <ptx/cp_async_bulk.cuh>
extern "C" __global__ void k(const __grid_constant__ TensorMap map) {
  ptx::prefetch_tensormap(&map);
}"""


def run_tiles(ptx):
    rng = np.random.default_rng(6)
    a, b = (rng.integers(-8, 9, (16, 16)).astype(np.float16) for _ in range(2))
    d = np.zeros((16, 8), np.float32)
    error = run(ptx, a.view(np.uint16), b.view(np.uint16), d)
    return error, np.array_equal(d, 1 - a.astype(int) @ b[:, :8].astype(int))


def run_wgmma(ptx):
    rng = np.random.default_rng(7)
    a, b = rng.integers(-8, 9, (64, 64)), rng.integers(-8, 9, (64, 64))
    d = np.zeros((2, 64, 64), np.float32)
    operands = [x.astype(np.float16).view(np.uint16) for x in (a, b.T.copy())]
    error = run(ptx, *operands, d, block=128, smem=128 * 128)
    return error, np.array_equal(d[1], 2 * (a @ b))


def numbered(count, first=0, **launch):
    """Runs a kernel that writes first, first + 1, ..."""

    def run_it(ptx):
        y = np.zeros(count, np.int32)
        error = run(ptx, y, **launch)
        return error, np.array_equal(y, first + np.arange(count))

    return run_it


def run_send(ptx):
    y = np.zeros((2, 32, 2), np.uint32)
    error = run(ptx, y, grid=2)
    rank, t = np.ogrid[:2, :32]
    return error, np.array_equal(y, np.broadcast_to((1000 * rank + 10 * t).T, y.shape))


def run_relaxed(ptx):
    x = np.arange(1, 65, dtype=np.uint32)
    y = np.zeros_like(x)
    error = run(ptx, x, y, block=64)
    return error, np.array_equal(y, np.roll(x, 32))


def run_last(ptx):
    counters, parts, y, lasts = (np.zeros(n, np.uint32) for n in (1, 3 * 64, 64, 1))
    error = run(ptx, counters, parts, y, lasts, grid=3, block=64)
    return error, np.array_equal(y, 300000 + 30 * (np.arange(64) ^ 33)) and counters[0] == 0


def run_copy(ptx):
    x, y = np.arange(128, dtype=np.int32), np.zeros(128, np.int32)
    return run(ptx, x, y), np.array_equal(x, y)


# Source, architecture, and how it is run.
SOURCES = {
    "tiles": (TILES, "compute_80", run_tiles),
    "send": (SEND.replace("WORDS", "1"), "compute_90a", run_send),
    "relaxed": (RELAXED.replace("TYPE", "unsigned int"), "compute_80", run_relaxed),
    "last": (LAST.replace("WORDS", "1"), "compute_80", run_last),
    "arrivals": (ARRIVALS, "compute_90a", numbered(32, block=64)),
    "stores": (STORES, "compute_80", numbered(32, 1)),
    "copy": (COPY, "compute_80", run_copy),
    "registers": (REGISTERS, "compute_90a", numbered(256, 128, block=384)),
    "barriers": (BARRIERS, "compute_80", numbered(32, block=64)),
    "wgmma": (wgmma_source("__half", 64, 128, 0), "compute_90a", run_wgmma),
}
RACE = "race in shared memory"
UNORDERED = RACE + "|which was never written"
WRONG = None
LOAD = '"ld.relaxed.cta.shared.u32 %0, [%1];" : "=r"(bits) : "r"(address)'
# Header, what is there, what is planted, and the error; WRONG: a wrong result.
FAULTS = [
    ("tiles", "ldmatrix", ".x4.trans.shared", ".x4.shared", WRONG),
    ("tiles", "mma", "{%4, %5, %6, %7}, {%8, %9}", "{%4, %6, %5, %7}, {%8, %9}", WRONG),
    ("tiles", "mma", '"+f"(d[0])', '"=f"(d[0])', WRONG),
    ("tiles", "mma", '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WRONG),
    # The compiler drops the first store, which nothing reads then.
    (
        "stores",
        "memory",
        f'asm volatile({LOAD} : "memory")',
        f"asm({LOAD})",
        "reads shared byte [0-9]+, which was never written",
    ),
    ("send", "mbarrier", "parity.acquire.cluster", "parity.acquire.cta", RACE),
    ("send", "mbarrier", "parity.acquire.cluster", "parity.relaxed.cluster", RACE),
    ("send", "cluster", "mapa(mbarrier, cta_rank)", "mapa(mbarrier, 0)", "but its mbarrier is"),
    ("relaxed", "memory", "ld.relaxed.cta.shared.u32", "ld.shared.u32", RACE),
    ("relaxed", "memory", "st.relaxed.cta.shared.u32", "st.shared.u32", RACE),
    ("last", "atomic", "atom.acq_rel.gpu", "atom.release.gpu", "but this warp has not acquired it"),
    ("last", "atomic", "atom.acq_rel.gpu", "atom.acq_rel.cta", "and has not released since"),
    ("last", "atomic", "  __syncthreads();\n", "\n", "and has not released since"),
    ("last", "atomic", "ld.global.cg.u32", "ld.global.nc.u32", "as read-only memory"),
    ("last", "atomic", "inc.u32", "add.u32", WRONG),
    ("last", "atomic", '"r"(count - 1)', '"r"(count)', WRONG),
    ("last", "atomic", "__syncthreads_or(last) != 0", "last", WRONG),
    ("arrivals", "mbarrier", "arrive.shared", "arrive.relaxed.cta.shared", RACE),
    ("arrivals", "mbarrier", "try_wait.parity.shared", "try_wait.parity.relaxed.cta.shared", RACE),
    (
        "copy",
        "cp_async",
        "__cvta_generic_to_shared(smem_ptr)",
        "reinterpret_cast<unsigned long long>(smem_ptr)",
        "a shared address 0x4[0-9a-f]+ of no block of the cluster",
    ),
    ("copy", "cp_async", '"n"(kPending)', '"n"(kPending + 1)', "is still in flight"),
    ("registers", "setmaxnreg", "setmaxnreg.dec.sync.aligned.u32 %0;", "", "deadlock"),
    (
        "registers",
        "setmaxnreg",
        "setmaxnreg.inc",
        "setmaxnreg.dec",
        "setmaxnreg.dec to 240 registers per thread, but its warp has 168",
    ),
    ("barriers", "named_barrier", "barrier.cta.sync", "barrier.cta.arrive", UNORDERED),
    (
        "wgmma",
        "fence",
        "fence.proxy.async.shared::cta",
        "fence.proxy.async.global",
        "with no fence.proxy.async between",
    ),
    ("wgmma", "smem", "__align__(kAlignment)", "__align__(128)", "starts amid a swizzle pattern"),
    ("wgmma", "wgmma", "p, 1, 1, 0, 0;", "1, 1, 1, 0, 0;", WRONG),
]


def planted(source, header, old, new):
    """The kernel with a copy of the header in which `old` has become `new`."""
    text = (source_directory() / "ptx" / f"{header}.cuh").read_text().replace("#pragma once", "")
    include = f"#include <ptx/{header}.cuh>\n"
    assert old in text and include in source
    return source.replace(include, text.replace(old, new))


@pytest.mark.parametrize("name", SOURCES)
def test_without_a_fault(name):
    source, arch, run_it = SOURCES[name]
    assert run_it(compile_with_headers(source, arch)) == (None, True)


@pytest.mark.parametrize("name, header, old, new, message", FAULTS)
def test_planted(name, header, old, new, message):
    source, arch, run_it = SOURCES[name]
    error, right = run_it(compile_with_headers(planted(source, header, old, new), arch))
    if message is WRONG:
        assert error is None and not right
    else:
        assert error is not None and re.search(message, error), error


def test_prefetch_of_what_is_no_tensor_map():
    error = run(compile_with_headers(MAP, "compute_90a"), lambda _: bytes(128))
    assert "no tensor map is at that address" in error
