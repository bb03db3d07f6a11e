"""The software device multiplies matrices: mma, ldmatrix, wgmma."""

from __future__ import annotations

import numpy as np
import pytest
from small_kernels import compile_c, fails, ptx_kernel, run


def bits_of(array, dtype):
    if dtype == "f16":
        return array.astype(np.float16).view(np.uint16)
    return (array.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


# -- matrices ----------------------------------------------------------------------------------

MATMUL = """__global__ void k(const unsigned short* a, const unsigned short* b, float* d) {
  __shared__ __align__(16) unsigned short s[16 * 16 + 16 * 8];
  const int t = threadIdx.x;
  for (int i = t; i < 256; i += 32) s[i] = a[i];
  for (int i = t; i < 128; i += 32) s[256 + i] = b[i];
  __syncwarp();
  unsigned x[4], y[2];
  const unsigned row_a = (unsigned)__cvta_generic_to_shared(s + t % 16 * 16 + t / 16 * 8);
  const unsigned row_b = (unsigned)__cvta_generic_to_shared(s + 256 + t % 16 * 8);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(row_a) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(y[0]), "=r"(y[1]) : "r"(row_b) : "memory");
  float c[4] = {1, 2, 3, 4};
  asm("mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
  for (int i = 0; i < 4; ++i) d[(t / 4 + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i] - (i + 1);
}"""


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_mma_of_16_bits(dtype):
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    d = np.zeros((16, 8), np.float32)
    source = MATMUL.replace("TYPE", dtype)
    assert run(compile_c(source), bits_of(a, dtype), bits_of(b, dtype), d) is None
    assert np.array_equal(d, a @ b)
    wrong = source.replace(".trans", "")  # no error, but another result
    assert run(compile_c(wrong), bits_of(a, dtype), bits_of(b, dtype), d) is None
    assert not np.array_equal(d, a @ b)


def test_mma_of_tf32_and_float64():
    source = """__global__ void k(const float* a, const float* b, float* d, const double* x,
                                  const double* y, double* z) {
      const int t = threadIdx.x, g = t / 4, u = t % 4;
      unsigned r[4], s[2];
      for (int j = 0; j < 4; ++j) {
        r[j] = __float_as_uint(a[(g + 8 * (j % 2)) * 8 + u + 4 * (j / 2)]) | 0xfff;
      }
      for (int j = 0; j < 2; ++j) s[j] = __float_as_uint(b[(u + 4 * j) * 8 + g]);
      float c[4] = {};
      asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
          "{%8, %9}, {%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
          : "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]), "r"(s[0]), "r"(s[1]));
      for (int i = 0; i < 4; ++i) d[(g + 8 * (i / 2)) * 8 + u * 2 + i % 2] = c[i];
      double e[2] = {};
      asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
          : "+d"(e[0]), "+d"(e[1]) : "d"(x[g * 4 + u]), "d"(y[u * 8 + g]));
      for (int i = 0; i < 2; ++i) z[g * 8 + 2 * u + i] = e[i];
    }"""
    rng = np.random.default_rng(4)
    a, b = rng.integers(-8, 9, (16, 8)), rng.integers(-8, 9, (8, 8))
    x, y = rng.integers(-99, 99, (8, 4)), rng.integers(-99, 99, (4, 8))
    d, z = np.zeros((16, 8), np.float32), np.zeros((8, 8))
    inputs = a.astype(np.float32), b.astype(np.float32), d, x.astype(float), y.astype(float), z
    assert run(compile_c(source), *inputs) is None
    assert np.array_equal(d, a @ b) and np.array_equal(z, x @ y)


def test_stmatrix_is_the_inverse_of_ldmatrix():
    body = """
shl.b32 %r1, %r0, 4;
mov.u32 %r2, dynamic;
add.u32 %r1, %r2, %r1;
mul.lo.u32 %r3, %r0, 3;
add.u32 %r4, %r3, 1000;
add.u32 %r5, %r3, 2000;
add.u32 %r6, %r3, 3000;
stmatrix.sync.aligned.m8n8.x4.TRANS.shared.b16 [%r1], {%r3, %r4, %r5, %r6};
bar.warp.sync 0xffffffff;
ldmatrix.sync.aligned.m8n8.x4.TRANS.shared.b16 {%r7, %r8, %r9, %r10}, [%r1];
mad.wide.u32 %rd1, %r0, 16, %rd0;
st.global.v4.u32 [%rd1], {%r7, %r8, %r9, %r10};
"""
    expected = 3 * np.arange(32)[:, None] + np.array([0, 1000, 2000, 3000])
    for trans in ("", "trans."):
        x = np.zeros((32, 4), np.uint32)
        assert run(ptx_kernel(body.replace("TRANS.", trans)), x, smem=512) is None
        assert np.array_equal(x, expected)


def test_ldmatrix_faults():
    load = """mov.u32 %r2, dynamic;
ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r7, %r8, %r9, %r10}, [%r2];"""
    fails("never written", ptx_kernel(load), np.zeros(1, np.int32), smem=512)
    fails(
        "misaligned: offset 1032",
        ptx_kernel(load.replace("[%r2]", "[%r2+8]")),
        np.zeros(1, np.int32),
        smem=512,
    )
    fails(
        "needs all 32 lanes of the warp, but lane 31 has exited",
        ptx_kernel(load),
        np.zeros(1, np.int32),
        smem=512,
        block=31,
    )


# -- wgmma -------------------------------------------------------------------------------------

# d (64 x 8) = a (64 x 16) * b (16 x 8) by one warpgroup; rows of 32 bytes, swizzled within 256.
WGMMA = """__global__ void k(const unsigned short* a, const unsigned short* b, float* d) {
  extern __shared__ __align__(1024) unsigned char s[];
  const int t = threadIdx.x;
  for (int i = t; i < 64 * 16 + 8 * 16; i += blockDim.x) {
    const bool of_a = i < 1024;
    const int at = of_a ? i * 2 : 2048 + (i - 1024) * 2;
    *(unsigned short*)(s + (at ^ (at >> 7 & 1) << 4)) = of_a ? a[i] : b[i - 1024];
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  const unsigned long long start = (unsigned)__cvta_generic_to_shared(s);
  const unsigned long long upper = 3ull << 62 | 16ull << 32;
  const unsigned long long x = upper | start >> 4, y = upper | (start + 2048) >> 4;
  float c[4] = {1, 1, 1, 1}, other = 0;
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %6, 0;"
               " wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, "
               "%4, %5, p, 1, 1, 0, 0; }"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "l"(x), "l"(y), "r"(1)
               : "memory");
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  /*between*/
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  asm volatile("" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) :: "memory");
  for (int i = 0; i < 4; ++i) {
    d[(t / 32 * 16 + t % 32 / 4 + 8 * (i / 2)) * 8 + t % 4 * 2 + i % 2] = c[i] - 1 + other;
  }
}"""


def wgmma_operands():
    rng = np.random.default_rng(5)
    a, b = rng.integers(-8, 9, (64, 16)), rng.integers(-8, 9, (16, 8))
    return a, b, bits_of(a, "f16"), bits_of(b.T, "f16"), np.zeros((64, 8), np.float32)


def test_wgmma():
    a, b, x, y, d = wgmma_operands()
    for seed in range(3):
        assert (
            run(compile_c(WGMMA, "compute_90a"), x, y, d, block=128, smem=4096, seed=seed) is None
        )
        assert np.array_equal(d, a @ b)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "/*between*/",
            'asm volatile("mov.f32 %0, %1;" : "=f"(other) : "f"(c[2]) : "memory");',
            r"touches an accumulator of a wgmma in flight.*mov\.f32",
        ),
        (
            "/*between*/",
            'asm volatile("add.f32 %0, %0, %0;" : "+f"(c[1]) :: "memory");',
            "touches an accumulator of a wgmma in flight.*add.f32",
        ),
        (
            "wait_group.sync.aligned 0",
            "wait_group.sync.aligned 1",
            "touches an accumulator of a wgmma in flight",
        ),
        (
            'asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");',
            "",
            "touches an accumulator of a wgmma in flight",
        ),
        (
            'asm volatile("wgmma.fence.sync.aligned;" ::: "memory");',
            "",
            "with no wgmma.fence since the kernel began",
        ),
        (
            'asm volatile("fence.proxy.async.shared::cta;" ::: "memory");',
            "",
            "with no fence.proxy.async between",
        ),
        ("__syncthreads();", "", "race in shared memory: wgmma reads|was never written"),
        (
            "/*between*/",
            "s[t] = 1;",
            "shared memory was overwritten while a wgmma reads it|race in shared memory",
        ),
        (
            "3ull << 62 | 16ull",
            "0ull << 62 | 16ull",
            "the descriptor of a, 0x[0-9a-f]+, is without a swizzle",
        ),
        ("16ull << 32", "17ull << 32", "has a stride amid a swizzle pattern"),
        (
            "upper | start >> 4",
            "upper | (start + 64) >> 4",
            "starts amid a swizzle pattern of eight rows",
        ),
        (
            "upper | start >> 4",
            "upper | (start + t / 128 + t % 32 / 31 * 256) >> 4",
            "differs in the descriptor of a",
        ),
        (
            "upper | start >> 4",
            "upper | (start + t / 64 * 256) >> 4",
            "differs in the descriptor of a from what warp",
        ),
        (
            "(start + 2048)",
            "(start + 4096)",
            "wgmma reads 16 bytes of shared memory out of bounds: offset 5120",
        ),
    ],
)
def test_wgmma_faults(old, new, message):
    assert old in WGMMA
    _, _, x, y, d = wgmma_operands()
    fails(message, compile_c(WGMMA.replace(old, new), "compute_90a"), x, y, d, block=128, smem=4096)


def test_wgmma_needs_a_warpgroup():
    _, _, x, y, d = wgmma_operands()
    message = "needs a warpgroup, here warps 0 to 3, but the block has 96 threads"
    fails(message, compile_c(WGMMA, "compute_90a"), x, y, d, block=96, smem=4096)
