"""What the wrappers of cuda_src/ptx promise, where no kernel would show it wrong."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from small_kernels import compile_with_headers, run

TYPES = {"__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}

# -- arithmetic --------------------------------------------------------------------------------

MATH = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <ptx/math.cuh>
extern "C" __global__ void k(const {type}* a, const {type}* b, const {type}* c, {result}* y) {
  const int i = threadIdx.x;
  y[i] = {call};
}"""


def call(expression, *arrays, dtype=np.float32, result="float", kind="float"):
    """An expression of a[i], b[i] and c[i]."""
    arrays = [np.ascontiguousarray(x) for x in np.broadcast_arrays(*arrays)]
    while len(arrays) < 3:
        arrays.append(np.zeros_like(arrays[0]))
    y = np.zeros(arrays[0].shape, dtype)
    source = MATH.replace("{type}", kind).replace("{result}", result)
    assert run(compile_with_headers(source.replace("{call}", expression)), *arrays, y) is None
    return y


def spread(rng, dtype=np.float32):
    """32 numbers of many sizes and both signs."""
    return (rng.normal(size=32) * 2.0 ** rng.integers(-20, 20, 32)).astype(dtype)


def test_exponential_and_reciprocal_flush_subnormals():
    tiny = np.float32(2.0**-127)  # subnormal
    x = np.resize(np.float32([0, 1, -1.5, 100, -126, -127, -140, -np.inf, np.inf]), 32)
    y = call("ptx::exp2_approx(a[i])", x)
    with np.errstate(over="ignore"):
        expected = np.where(x < -126, np.float32(0), np.exp2(x.astype(np.float64)))
    np.testing.assert_allclose(y, expected, rtol=2**-22)
    x = np.resize(np.float32([1, 3, -7, 2.0**-100, 1e30, 1.5 * 2.0**126, tiny, -tiny]), 32)
    y = call("ptx::rcp_approx(a[i])", x)
    expected = 1 / x.astype(np.float64)
    expected[np.abs(expected) < 2.0**-126] = 0
    expected[x == tiny], expected[x == -tiny] = np.inf, -np.inf
    np.testing.assert_allclose(y, expected, rtol=2**-22)


def test_multiply_add_is_rounded_once(rng):
    """Also where a product cancels but for what a second rounding would lose, and subnormals."""
    a, b, c = (spread(rng) for _ in range(3))
    b[::2] = (1 / a.astype(float)).astype(np.float32)[::2]
    c[::2] = -(a * b)[::2]
    a[:3], b[:3], c[:3] = np.float32(2.0**-70), np.float32(2.0**-70), 0
    y = call("ptx::fma_rn(a[i], b[i], c[i])", a, b, c)
    assert np.array_equal(y, (a.astype(np.longdouble) * b + c).astype(np.float32))
    nan = np.uint32(0xFFC12345).view(np.float32)
    y = call("ptx::fma_rn(a[i], b[i], c[i])", np.full(32, nan), b, c)
    assert (y.view(np.uint32) == 0x7FFFFFFF).all()


def test_multiply_add_of_float64(rng):
    """Each addend is such that the exact result is half an ulp, or more or less, beside 1."""
    a = 1 + rng.integers(0, 2**26, 32) * 2.0**-26
    b, half = np.float64(2.0**-53), np.float64(2.0**-60)
    y = call(
        "ptx::fma_rn(a[i], b[i], c[i])", a, b, 1.0, dtype=float, result="double", kind="double"
    )
    assert np.array_equal(y, np.where(a > 1, 1 + 2.0**-52, 1.0))
    y = call(
        "ptx::fma_rn(a[i], b[i], c[i])", a, half, 1.0, dtype=float, result="double", kind="double"
    )
    assert (y == 1).all()


def test_rounding_to_tf32(rng):
    """To nearest, ties away from zero: half a unit is added to the magnitude, and the rest cut."""
    x = spread(rng)
    bits = x.view(np.uint32)
    bits[::2] = bits[::2] & 0xFFFFE000 | 0x1000  # ties
    y = call("ptx::cvt_rna_tf32(a[i])", x, dtype=np.uint32, result="unsigned int")
    assert np.array_equal(y, (bits + 0x1000) & 0xFFFFE000)


@pytest.mark.parametrize("kind", TYPES)
def test_two_values_in_a_word(rng, kind):
    low, high = spread(rng) / 64, -spread(rng) / 64
    y = call(
        f"ptx::cvt_rn_x2<{kind}>(a[i], b[i])", low, high, dtype=np.uint32, result="unsigned int"
    )
    halves = y.view(TYPES[kind]).reshape(-1, 2)
    assert np.array_equal(halves[:, 0], low.astype(TYPES[kind]))
    assert np.array_equal(halves[:, 1], high.astype(TYPES[kind]))


def test_pairs_of_e4m3():
    """Every number in both halves: by an instruction, or by its bits."""
    bytes_ = np.arange(256, dtype=np.uint32)
    numbers = bytes_.astype(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    for i, pairs in enumerate((bytes_ | bytes_[::-1] << 8, bytes_[::-1] | bytes_ << 8)):
        call_ = f"[&] {{ float x[2]; ptx::cvt_f32_e4m3x2(x, a[i]); return x[{i}]; }}()"
        found = [
            call(call_, pairs[first : first + 32], dtype=np.uint32, kind="unsigned int")
            for first in range(0, 256, 32)
        ]
        np.testing.assert_array_equal(np.concatenate(found).view(np.float32), numbers)


# -- memory ------------------------------------------------------------------------------------

RELAXED = """#include <ptx/memory.cuh>
extern "C" __global__ void k(const TYPE* x, TYPE* y) {
  __shared__ TYPE s[64];
  const int t = threadIdx.x;
  s[t] = 0;
  __syncthreads();
  ptx::st_shared_relaxed(s + t, x[t]);
  TYPE seen;
  do {
    seen = ptx::ld_shared_relaxed(s + (t ^ 32));  // what the other warp writes meanwhile
  } while (seen == 0);
  y[t] = seen;
}"""


@pytest.mark.parametrize("dtype, kind", [("u4", "unsigned int"), ("u8", "unsigned long long")])
def test_relaxed_accesses_may_race(rng, dtype, kind):
    x = rng.integers(2 ** (8 * int(dtype[1]) - 1), size=64, dtype=dtype) | 1
    y = np.zeros_like(x)
    assert run(compile_with_headers(RELAXED.replace("TYPE", kind)), x, y, block=64) is None
    assert np.array_equal(y, np.roll(x, 32))


# -- blocks of a launch ------------------------------------------------------------------------

# Blocks share a counter by threes; the last one of each adds up what they wrote.
LAST = """#include <ptx/atomic.cuh>
struct alignas(4 * WORDS) Value { unsigned int word[WORDS]; };
extern "C" __global__ void k(unsigned int* counters, Value* parts, Value* y, unsigned int* lasts) {
  const int t = threadIdx.x, three = blockIdx.x / 3;
  Value value;
  for (int i = 0; i < WORDS; ++i) value.word[i] = 100000 * blockIdx.x + 10 * t + i;
  if (t < 64) parts[blockIdx.x * 64 + t] = value;
  if (t >= 64 || !ptx::arrive_is_last(counters + three, 3)) return;
  Value sum = {};
  for (int part = 3 * three; part < 3 * three + 3; ++part) {
    value = ptx::ld_global_cg(parts + part * 64 + (t ^ 33));
    for (int i = 0; i < WORDS; ++i) sum.word[i] += value.word[i];
  }
  y[three * 64 + t] = sum;
  if (t == 0) atomicAdd(lasts + three, 1u);
}"""


@pytest.mark.parametrize(("count", "block"), [("3", 64), ("3, 1, 64", 96)], ids=["all", "some"])
@pytest.mark.parametrize("words", [1, 2, 4])
def test_last_block_reads_what_all_wrote(words, count, block):
    """In two launches, between which nobody touches the counters; by all threads, or by some."""
    source = LAST.replace("WORDS", str(words)).replace("three, 3)", f"three, {count})")
    ptx = compile_with_headers(source)
    counters, lasts = np.zeros(4, np.uint32), np.zeros(4, np.uint32)
    for seed in range(2):
        parts, y = (np.zeros((n, 64, words), np.uint32) for n in (12, 4))
        assert run(ptx, counters, parts, y, lasts, grid=12, block=block, seed=seed) is None
        assert not counters.any() and (lasts == seed + 1).all()
        three, t, word = np.ogrid[:4, :64, :words]
        assert np.array_equal(y, 100000 * (9 * three + 3) + 3 * (10 * (t ^ 33) + word))


# -- clusters ----------------------------------------------------------------------------------

SEND = """#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
struct alignas(4 * WORDS) Value { unsigned int word[WORDS]; };
extern "C" __global__ void CLUSTER_DIMS(2) k(unsigned int* y) {
  __shared__ Value values[2 * 32];
  __shared__ alignas(8) unsigned long long bar;
  const int rank = ptx::cluster_ctarank(), t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(&bar, 1);
    ptx::fence_mbarrier_init();
    ptx::mbarrier_arrive_expect_tx(&bar, sizeof(values));
  }
  ptx::cluster_arrive_relaxed();
  ptx::cluster_wait();
  Value value;
  for (int i = 0; i < WORDS; ++i) value.word[i] = 1000 * rank + 10 * t + i;
  for (int to = 0; to < 2; ++to) ptx::st_async(values + 32 * rank + t, value, &bar, to);
  ptx::mbarrier_wait_cluster(&bar, 0);
  for (int i = 0; i < 2 * WORDS; ++i) {
    y[(rank * 32 + t) * 2 * WORDS + i] = values[32 * (i / WORDS) + t].word[i % WORDS];
  }
}"""


@pytest.mark.parametrize("words", [1, 2, 4])
def test_values_sent_in_a_cluster(words):
    y = np.zeros((2, 32, 2, words), np.uint32)
    source = SEND.replace("WORDS", str(words))
    assert run(compile_with_headers(source, "compute_90a"), y, grid=2) is None
    rank, t, word = np.ogrid[:2, :32, :words]
    assert np.array_equal(y, np.broadcast_to((1000 * rank + 10 * t + word).swapaxes(0, 1), y.shape))


# -- wgmma -------------------------------------------------------------------------------------

# From 1s: a b, then a b + a b. K-major operands have one panel, MN-major ones as many as it takes.
WGMMA = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <ptx/fence.cuh>
#include <ptx/smem.cuh>
#include <ptx/wgmma.cuh>
constexpr int kColumns = COLUMNS, kSpan = SWIZZLE / 2;
using T = TYPE;
static __device__ void put(T* panel, int row, int column, T value) {
  const int at = row * SWIZZLE + column * 2;
  panel[(at ^ (at >> 7 & SWIZZLE / 16 - 1) << 4) / 2] = value;
}
extern "C" __global__ void k(const T* a, const T* b, float* d) {
  T* const smem = ptx::dynamic_smem<T, 1024>();
  T* const of_b = smem + 64 * kSpan;
  const int t = threadIdx.x, row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
  constexpr int kPitchA = 16 * SWIZZLE;  // of panels with 16 steps of k
  float sum[kColumns / 2], first[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) sum[i] = 1;
#if REGISTERS
  for (int i = t; i < 16 * kColumns; i += 128) {
    const int c = i % kColumns;
    put(of_b + c / kSpan * 16 * kSpan, i / kColumns, c % kSpan, b[i]);
  }
#endif
#if REGISTERS == 2
  for (int i = t; i < 16 * 64; i += 128) {
    const int r = i / 16;
    put(smem + r / kSpan * 16 * kSpan, i % 16, r % kSpan, a[i]);
  }
#elif REGISTERS
  unsigned int r[4];
  for (int j = 0; j < 4; ++j) {
    r[j] = *reinterpret_cast<const unsigned int*>(a + (row + j % 2 * 8) * 16 + column + j / 2 * 8);
  }
#else
  for (int i = t; i < 64 * kSpan; i += 128) put(smem, i / kSpan, i % kSpan, a[i]);
  for (int i = t; i < kSpan * kColumns; i += 128) put(of_b, i / kSpan, i % kSpan, b[i]);
#endif
  ptx::fence_proxy_async();
  __syncthreads();
  const unsigned int x = ptx::wgmma_descriptor(smem, REGISTERS ? kPitchA : 16);
  const unsigned int y = ptx::wgmma_descriptor(of_b, REGISTERS ? 16 * SWIZZLE : 16);
  for (int round = 0; round < 2; ++round) {
    ptx::wgmma_fence();
#if REGISTERS == 2
    ptx::wgmma_ss_by_columns<T, kColumns, SWIZZLE, SWIZZLE>(sum, x, y, round > 0);
#elif REGISTERS
    ptx::wgmma_rs<T, kColumns, SWIZZLE>(sum, r, y - 5, round > 0, 5);
#else
#pragma unroll
    for (int step = 0; step < kSpan / 16; ++step) {
      ptx::wgmma_ss<T, kColumns, SWIZZLE>(sum, x, y - 3, round + step > 0, 2 * step, 2 * step + 3);
    }
#endif
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    for (int i = 0; i < kColumns / 2; ++i) (round == 0 ? first : sum)[i] = sum[i];
  }
  for (int i = 0; i < kColumns / 2; ++i) {
    const int at = (row + i / 2 % 2 * 8) * kColumns + i / 4 * 8 + column + i % 2;
    d[at] = first[i];
    d[64 * kColumns + at] = sum[i];
  }
}"""
CASES = [(kind, n, 128) for kind in TYPES for n in (64, 80, 96, 112, 128, 192, 256)]
CASES += [("__half", 64, 64), ("__half", 96, 32)]


def wgmma_source(kind, columns, swizzle, registers):
    source = WGMMA.replace("COLUMNS", str(columns)).replace("SWIZZLE", str(swizzle))
    return source.replace("TYPE", kind).replace("REGISTERS", str(registers))


@pytest.mark.parametrize("registers", [0, 1, 2])
@pytest.mark.parametrize("kind, columns, swizzle", CASES)
def test_wgmma(rng, kind, columns, swizzle, registers):
    depth = 16 if registers else swizzle // 2
    a, b = rng.integers(-8, 9, (64, depth)), rng.integers(-8, 9, (depth, columns))
    d = np.zeros((2, 64, columns), np.float32)
    # Bytes: NumPy's buffers do not know bfloat16.
    operands = [x.astype(TYPES[kind]).view(np.uint16) for x in (a, b if registers else b.T.copy())]
    smem = 64 * swizzle + max(columns, 16 * -(-2 * columns // swizzle)) * swizzle
    ptx = compile_with_headers(wgmma_source(kind, columns, swizzle, registers), "compute_90a")
    assert run(ptx, *operands, d, block=128, smem=smem) is None
    assert np.array_equal(d[0], a @ b) and np.array_equal(d[1], 2 * (a @ b))
