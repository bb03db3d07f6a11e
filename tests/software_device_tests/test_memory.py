"""The software device accesses memory: each planted fault is named by its error."""

from __future__ import annotations

import re

import numpy as np
import pytest
from small_kernels import COPY, compile_c, fails, run, unwritten

# -- global memory -----------------------------------------------------------------------------


def test_copy():
    x, y = np.arange(100, dtype=np.float32), np.zeros(100, np.float32)
    assert run(compile_c(COPY), x, y, 100, grid=4) is None
    assert np.array_equal(x, y)


def test_out_of_bounds_by_one():
    x, y = np.arange(100, dtype=np.float32), np.zeros(101, np.float32)
    error = fails("out of bounds: read of 4 bytes", compile_c(COPY), x, y, 101, grid=4)
    # Kernel, block, thread, line, instruction.
    assert re.search(
        r"kernel copy, block \(3, 0, 0\), thread 4, line \d+: ld\.global\S+\s+%f", error
    ), error
    assert "in no allocation, 0 bytes past the end of one of 400 bytes" in error


def test_null_pointer():
    source = "__global__ void k(float* y, unsigned long long p) { *(float*)p = 1; }"
    ptx = compile_c(source)
    assert "through a null pointer" in fails(
        "write of 4 bytes", ptx, np.zeros(1, np.float32), 0, 0, block=1
    )


def test_misaligned_vector():
    source = "__global__ void k(float* x) { float4 v = *(float4*)(x + 1); x[0] = v.x + v.w; }"
    fails(
        r"misaligned read of 16 bytes.*thread 0, line \d+: ld\.global",
        compile_c(source),
        np.zeros(8, np.float32),
    )


def test_local_memory_of_each_lane():
    source = """__global__ void k(int* y, int n) {
      int a[32];
      for (int i = 0; i < n; ++i) a[i * 7 % 32] = i * (threadIdx.x + 1);
      y[threadIdx.x] = a[threadIdx.x];
    }"""
    y = np.zeros(32, np.int32)
    assert run(compile_c(source), y, 32) is None
    place = {i * 7 % 32: i for i in range(32)}
    assert np.array_equal(y, [place[t] * (t + 1) for t in range(32)])


def test_local_memory_that_a_thread_has_not_written():
    source = """__global__ void k(int* x, int n, int i) {
      int a[8];
      for (int j = 0; j < n - blockIdx.x; ++j) a[j] = j;
      x[threadIdx.x] = a[i];
    }"""
    assert run(compile_c(source), np.zeros(32, np.int32), 4, 2, grid=2) is None
    message = r"reads byte 12 of its local memory, which it has not written: .*block \(1, 0, 0\)"
    fails(message, compile_c(source), np.zeros(32, np.int32), 4, 3, grid=2)


def test_atomics_give_each_thread_its_own():
    source = """__global__ void k(unsigned* counter, unsigned* order) {
      order[atomicAdd(counter, 1u)] = 1;
    }"""
    counter, order = np.zeros(1, np.uint32), np.zeros(4 * 96, np.uint32)
    assert run(compile_c(source), counter, order, grid=4, block=96) is None
    assert counter[0] == 384 and order.all()


# -- global memory that nobody has written ------------------------------------------------------


def test_a_read_of_what_nobody_wrote():
    x = unwritten(100, np.float32)
    error = fails(
        "reads byte [0-9]+ of an allocation of 400 bytes, which nobody has written",
        compile_c(COPY),
        x,
        np.zeros(100, np.float32),
        100,
        grid=4,
    )
    assert re.search(r"kernel copy, block \(\d, 0, 0\), thread \d+, line \d+: ld\.global", error)


@pytest.mark.parametrize("count", [127, 128])
def test_what_a_kernel_writes_is_known_to_the_byte(count):
    source = """__global__ void k(unsigned char* x, unsigned char* y, int count) {
      const int t = threadIdx.x;
      if (t < count) x[t] = t;
      __syncthreads();
      if (t < 16) ((long long*)y)[t] = ((long long*)x)[15 - t];
    }"""
    x, y = unwritten(128, np.uint8), unwritten(128, np.uint8)
    if count == 127:
        fails(
            "reads byte 127 of an allocation of 128 bytes",
            compile_c(source),
            x,
            y,
            count,
            block=128,
        )
    else:
        assert run(compile_c(source), x, y, count, block=128) is None
        assert np.array_equal(y, np.arange(128).reshape(16, 8)[::-1].ravel())


def test_an_atomic_reads_what_it_updates():
    source = "__global__ void k(int* x) { atomicAdd(x + 1, 1); }"
    fails(r"reads byte 4 of an allocation of 8.*: (atom|red)\.", compile_c(source), unwritten(2))


def test_what_cupy_computes_of_it_is_written():
    """CuPy's kernels are forgiven, and an array of the pool has more bytes than its elements."""
    source = """__global__ void cupy_double(int* x) { x[threadIdx.x] *= 2; }"""
    assert run(compile_c(source), unwritten(32)) is None


def test_a_constant_is_not_written():
    source = """__constant__ int c[4] = {1, 2, 3, 4};
    extern "C" __global__ void k(int* x) {
      int* p = (int*)c;
      asm volatile("" : "+l"(p));
      *p = x[0];
    }"""
    fails(r"writes constant memory: kernel k, .*: st\.", compile_c(source), np.ones(1, np.int32))


# -- shared memory -----------------------------------------------------------------------------

REVERSE = """__global__ void k(int* x) {
  __shared__ int s[128];
  s[threadIdx.x] = x[threadIdx.x];
  %s
  x[threadIdx.x] = s[blockDim.x - 1 - threadIdx.x];
}"""


@pytest.mark.parametrize("seed", range(4))
def test_barrier(seed):
    x = np.arange(128, dtype=np.int32)
    assert run(compile_c(REVERSE % "__syncthreads();"), x, block=128, seed=seed) is None
    assert np.array_equal(x, np.arange(128)[::-1])


@pytest.mark.parametrize("seed", range(4))
def test_missing_barrier(seed):
    x = np.arange(128, dtype=np.int32)
    message = "race in shared memory: |reads shared byte [0-9]+, which was never written"
    fails(message, compile_c(REVERSE % ""), x, block=128, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_missing_barrier_before_the_next_write(seed):
    source = """__global__ void k(int* x) {
      __shared__ int s[128];
      for (int i = 0; i < 4; ++i) {
        s[threadIdx.x] = x[threadIdx.x] + i;
        __syncthreads();
        x[threadIdx.x] = s[threadIdx.x ^ 64];
      }
    }"""
    fails(
        "race in shared memory: ",
        compile_c(source),
        np.arange(128, dtype=np.int32),
        block=128,
        seed=seed,
    )


def test_shared_memory_out_of_bounds_by_one():
    source = """__global__ void k(int* x) {
      extern __shared__ int s[];
      s[threadIdx.x + x[0]] = 1;
    }"""
    ptx = compile_c(source)
    assert run(ptx, np.zeros(1, np.int32), smem=128) is None
    fails(
        r"4 bytes of shared memory out of bounds: offset 144; .* 128 from 16 on.*thread 31",
        ptx,
        np.ones(1, np.int32),
        smem=128,
    )


def test_never_written():
    source = """__global__ void k(int* x) {
      __shared__ int s[64];
      if (threadIdx.x != 5) s[threadIdx.x] = 1;
      __syncwarp();
      x[threadIdx.x] = s[x[threadIdx.x]];
    }"""
    fails(
        "reads shared byte 24, which was never written",
        compile_c(source),
        np.arange(32, dtype=np.int32),
    )


def test_strong_accesses_do_not_race():
    source = """__global__ void k(int* x) {
      __shared__ int s;
      if (threadIdx.x == 0) s = 0;
      __syncthreads();
      atomicAdd(&s, 1);
      __syncthreads();
      x[threadIdx.x] = s;
    }"""
    x = np.zeros(128, np.int32)
    assert run(compile_c(source), x, block=128) is None
    assert np.array_equal(x, np.full(128, 128))


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_a_word_do_not_race(seed):
    source = """__global__ void k(unsigned char* x) {
      __shared__ volatile unsigned char s[128];
      const int at = threadIdx.x % 32 * 4 + threadIdx.x / 32;  // the four warps share each word
      s[at] = x[at];
      for (int i = 0; i < 20; ++i) s[at] = s[at] + 1;
      x[at] = s[at];
    }"""
    x = np.arange(128, dtype=np.uint8)
    assert run(compile_c(source), x, block=128, seed=seed) is None
    assert np.array_equal(x, np.arange(128) + 20)
    crossed = source.replace("s[at] + 1", "s[at ^ 1] + 1")
    fails("race|was never written", compile_c(crossed), x, block=128, seed=seed)


LANES = """__global__ void k(int* x) {
  __shared__ int s[32];
  const int t = threadIdx.x;
  s[t] = x[t];
  /*first*/ __syncwarp();
  const int sum = s[t ^ 1] + s[0];
  /*second*/ __syncwarp();
  if (t == 0) s[t] = 5;
  x[t] = sum + (t == 0 ? s[t] : 0);
}"""
FIRST, SECOND = "/*first*/ __syncwarp();", "/*second*/ __syncwarp();"
PAIRS = "__syncwarp(3u << t / 2 * 2);"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        (FIRST, "", r"reads byte \d+, which lane \d+ of its warp wrote, with no __"),
        # Shuffles and votes wait for the lanes of their mask, and order no accesses.
        (FIRST, "x[t] = __shfl_sync(~0u, t, 1);", "lane [0-9]+ of its warp wrote"),
        (FIRST, "x[t] = __any_sync(~0u, x[t]);", "lane [0-9]+ of its warp wrote"),
        (SECOND, "", "writes byte .*, which lanes of its warp read, with no __"),
        (FIRST, PAIRS, "reads byte .*, which lane 0 of its warp wrote"),
        (SECOND, PAIRS, "writes byte .*, which lanes of its warp read"),
        (SECOND, "__syncthreads();", None),
        (SECOND, f"{PAIRS} __syncwarp();", None),
    ],
)  # fmt: skip
def test_lanes_of_a_warp(old, new, message):
    assert old in LANES
    x = np.arange(1, 33, dtype=np.int32)
    ptx = compile_c(LANES.replace(old, new) if old else LANES)
    if message:
        fails(message, ptx, x)
    else:
        assert run(ptx, x) is None
        t = np.arange(32)
        assert np.array_equal(x, (t ^ 1) + 2 + 5 * (t == 0))


@pytest.mark.parametrize("kind", ["short", "unsigned char"])
def test_lanes_that_share_a_word(kind):
    source = f"""__global__ void k({kind}* x) {{
      __shared__ {kind} s[32];
      const int t = threadIdx.x;
      s[t] = x[t];
      s[t] = s[t] + 1;
      /*sync*/ __syncwarp();
      x[t] = s[t ^ 1];
    }}"""
    dtype = np.int16 if kind == "short" else np.uint8
    x = np.arange(32, dtype=dtype)
    assert run(compile_c(source), x) is None
    assert np.array_equal(x, (np.arange(32) ^ 1) + 1)
    unordered = compile_c(source.replace("/*sync*/ __syncwarp();", ""))
    fails("which lane 1 of its warp wrote, with no __syncwarp", unordered, x)
