"""wgmma on the emulator, the async proxy's fence, and setmaxnreg."""

from __future__ import annotations

import re

import emulator
import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes")

DTYPE = {"__half": np.float16, "__nv_bfloat16": ml_dtypes.bfloat16}
WIDTHS = (64, 80, 96, 112, 128, 192, 256)

HEAD = """
#include <primitives/numeric.cuh>
#include <ptx/cluster.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/fence.cuh>
#include <ptx/ldmatrix.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/setmaxnreg.cuh>
#include <ptx/smem.cuh>
#include <ptx/wgmma.cuh>
struct Params { const unsigned int* x; unsigned int* y; long long fault; };
"""


def launch(source, x, y, fault, block, grid=1, **options):
    registers = min(65536 // block // 8 * 8, 248)
    options = {"arch": "sm_90a", "smem_bytes": 32768, "registers": registers} | options
    params = emulator.pack(x, y, fault)
    return emulator.launch_source(
        HEAD + source, "kernel", grid, block, params, (x,), (y,), **options
    )


# -- products -------------------------------------------------------------------------------------

PRODUCT = """
// x: the image of shared memory, the accumulators of each thread, then the registers of a.
template <class T, int kColumns, int kSwizzle, bool kShared>
void product(const unsigned int* x, unsigned int* y, bool accumulate) {
  constexpr int kSteps = kSwizzle / 16, kStepsOfPanel = kSwizzle / 32;
  const int t = threadIdx.x, rows = blockDim.x / 2;
  constexpr int kPanels = kShared ? 2 : (2 * kColumns + kSwizzle - 1) / kSwizzle;
  const int a_bytes = kShared ? rows * kSwizzle * 2 : 0;
  const int bytes = a_bytes + kPanels * (kShared ? kColumns : kSwizzle) * kSwizzle;
  unsigned char* smem = ptx::dynamic_smem<unsigned char, 1024>();
  for (int i = t; i < bytes / 16; i += blockDim.x) {
    ptx::st_shared((uint4*)smem + i, ptx::ld_global((const uint4*)x + i));
  }
  x += bytes / 4;
  float d[kColumns / 2];
  for (int i = 0; i < kColumns / 2; ++i) {
    d[i] = __uint_as_float(ptx::ld_global(x + t * (kColumns / 2) + i));
  }
  x += blockDim.x * (kColumns / 2);
  unsigned int r[kSteps][4];
  for (int i = 0; i < 4 * kSteps; ++i) r[i / 4][i % 4] = ptx::ld_global(x + t * 4 * kSteps + i);
  ptx::fence_proxy_async();
  __syncthreads();
  const unsigned int a = ptx::wgmma_descriptor(smem + t / 128 * 64 * kSwizzle, 0);
  const unsigned int b = ptx::wgmma_descriptor(smem + a_bytes, kShared ? 16 : kSwizzle * kSwizzle);
  ptx::wgmma_fence();
  for (int i = 0; i < kSteps; ++i) {
    const int panel = i / kStepsOfPanel, inside = i % kStepsOfPanel * 32;
    const bool add = accumulate || i > 0;
    if constexpr (kShared) {
      const unsigned int a_step = (panel * rows * kSwizzle + inside) / 16;
      const unsigned int b_step = (panel * kColumns * kSwizzle + inside) / 16;
      ptx::wgmma_ss<T, kColumns, kSwizzle>(d, a, b, add, a_step, b_step);
    } else {
      ptx::wgmma_rs<T, kColumns, kSwizzle>(d, r[i], b, add, i * kSwizzle);
    }
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  y += t * (kColumns / 2);
  for (int i = 0; i < kColumns / 2; ++i) ptx::st_global(y + i, __float_as_uint(d[i]));
}
"""

# a: 64 rows, by columns in panels of kSwizzleA, b by columns in panels of kSwizzleB; 64 steps of k.
BY_COLUMNS = """
template <class T, int kColumns, int kSwizzleA, int kSwizzleB>
__device__ void product(const unsigned int* x, unsigned int* y) {
  constexpr int kPanels = (2 * kColumns + kSwizzleB - 1) / kSwizzleB;
  constexpr int kBytesA = 64 * 128, kBytes = kBytesA + kPanels * 64 * kSwizzleB;
  const int t = threadIdx.x;
  unsigned char* smem = ptx::dynamic_smem<unsigned char, 1024>();
  for (int i = t; i < kBytes / 16; i += blockDim.x) {
    ptx::st_shared((uint4*)smem + i, ptx::ld_global((const uint4*)x + i));
  }
  ptx::fence_proxy_async();
  __syncthreads();
  float d[kColumns / 2];
  const unsigned int a = ptx::wgmma_descriptor(smem, 64 * kSwizzleA);
  const unsigned int b = ptx::wgmma_descriptor(smem + kBytesA, 64 * kSwizzleB);
  ptx::wgmma_fence();
  for (int i = 0; i < 4; ++i) {
    ptx::wgmma_ss_by_columns<T, kColumns, kSwizzleA, kSwizzleB>(d, a + i * kSwizzleA, b + i * kSwizzleB, i > 0);
  }
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  for (int i = 0; i < kColumns / 2; ++i) ptx::st_global(y + t * (kColumns / 2) + i, __float_as_uint(d[i]));
}
"""  # noqa: E501


def panels(matrix, span):
    """The bytes of a matrix as TMA writes it, in panels with rows of `span` bytes."""
    rows, chunks = len(matrix), span // 16
    matrix = np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % (span // 2))))
    in_panels = matrix.reshape(rows, -1, chunks, 8).transpose(1, 0, 2, 3)
    image = np.empty_like(in_panels)
    row = np.arange(rows)[:, None]
    image[:, row, np.arange(chunks) ^ row * chunks // 8 % chunks] = in_panels
    return image.reshape(-1).view(np.uint32)


def positions(threads, columns):
    """Row and column of each thread's accumulators."""
    t, r = np.arange(threads)[:, None], np.arange(columns // 2)
    lane = t % 32
    return t // 32 * 16 + lane // 4 + 8 * (r // 2 % 2), 8 * (r // 4) + lane % 4 * 2 + r % 2


def registers_of(a):
    """The words of each thread that hold `a`, for one step after another."""
    t, step = np.arange(2 * len(a))[:, None, None], np.arange(a.shape[1] // 16)[:, None]
    j, lane = np.arange(4), t % 32
    row, k = t // 32 * 16 + lane // 4 + 8 * (j % 2), step * 16 + lane % 4 * 2 + 8 * (j // 2)
    return np.stack([a[row, k], a[row, k + 1]], -1).view(np.uint32)


def truncated(x):
    """float64 as float32, towards zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = x.astype(np.float32)
        return np.where(np.abs(nearest) > np.abs(x), np.nextafter(nearest, np.float32(0)), nearest)


def expected(a, b, d):
    """a @ b + d, truncated after each 16 products."""
    d = np.array(d, np.float32)
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):
        for first in range(0, a.shape[1], 16):
            total = d.astype(np.float64)
            for k in range(first, first + 16):
                total += a[:, k, None] * b[k]
            d = truncated(total)
    return d


def product(a, b, d, span, shared, kind):
    """a @ b, plus d unless it is None, by the kernel above: of two panels of k."""
    (rows, depth), columns = a.shape, b.shape[1]
    assert depth == span
    threads = 2 * rows
    row, column = positions(threads, columns)
    start = np.full((rows, columns), np.nan, np.float32) if d is None else d
    image = [panels(a, span), panels(b.T.copy(), span)] if shared else [panels(b, span)]
    parts = [*image, start[row, column].view(np.uint32), registers_of(a)]
    x = np.concatenate([part.reshape(-1) for part in parts])
    y = emulator.empty((threads, columns // 2), np.float32)
    calls = "".join(
        f"case {n * 256 + s}: return product<{kind}, {n}, {s}, {int(shared)}>(p.x, p.y, add);\n"
        for n in WIDTHS
        for s in (128, 64, 32)
    )
    switch = f"const bool add = p.fault & 1; switch (p.fault >> 1) {{ {calls} }}"
    body = f"__global__ void kernel(Params p) {{ {switch} }}"
    which = (columns * 256 + span) << 1 | (d is not None)
    counters = launch(PRODUCT + body, x, y, which, threads, smem_bytes=98304)
    assert counters.wgmma == threads // 32 * depth // 16
    assert counters.warp_collectives == counters.mma == 0
    result = np.empty((rows, columns), np.float32)
    result[row, column] = y
    return result


@pytest.mark.parametrize("kind", DTYPE)
@pytest.mark.parametrize("shared", [True, False], ids=["ss", "rs"])
@pytest.mark.parametrize("span", [128, 64, 32])
@pytest.mark.parametrize("columns", WIDTHS)
def test_product(columns, span, shared, kind):
    rng = np.random.default_rng()
    for groups, accumulate in ((2, False), (1, True)):
        a = rng.standard_normal((64 * groups, span)).astype(DTYPE[kind])
        b = rng.standard_normal((span, columns)).astype(DTYPE[kind])
        d = rng.standard_normal((64 * groups, columns)).astype(np.float32) if accumulate else None
        result = product(a, b, d, span, shared, kind)
        np.testing.assert_array_equal(result, expected(a, b, 0 * (a @ b) if d is None else d))


@pytest.mark.parametrize("kind", DTYPE)
@pytest.mark.parametrize("spans", [(128, 128), (128, 64), (64, 32), (32, 128)], ids=str)
@pytest.mark.parametrize("columns", [64, 96, 128])
def test_product_by_columns(columns, spans, kind):
    rng = np.random.default_rng()
    a = rng.standard_normal((64, 64)).astype(DTYPE[kind])
    b = rng.standard_normal((64, columns)).astype(DTYPE[kind])
    x = np.concatenate([panels(a.T.copy(), spans[0]), panels(b, spans[1])])
    y = emulator.empty((128, columns // 2), np.float32)
    call = f"product<{kind}, {columns}, {spans[0]}, {spans[1]}>(p.x, p.y)"
    body = f"__global__ void kernel(Params p) {{ {call}; }}"
    launch(BY_COLUMNS + body, x, y, 0, 128, smem_bytes=98304)
    result = np.empty((64, columns), np.float32)
    result[positions(128, columns)] = y
    np.testing.assert_array_equal(result, expected(a, b, np.zeros((64, columns))))


def test_special_values():
    rng = np.random.default_rng()
    for kind, tiny in (("__half", 2.0**-22), ("__nv_bfloat16", 2.0**-70)):
        a = (rng.standard_normal((64, 32)) * tiny).astype(DTYPE[kind])
        b = (rng.standard_normal((32, 64)) * tiny).astype(DTYPE[kind])
        d = (rng.standard_normal((64, 64)) * 2.0**-135).astype(np.float32)
        a[3, 5], a[4, 6], b[7, 8], b[9, 9] = np.inf, -np.inf, np.nan, np.inf
        for shared in (True, False):
            np.testing.assert_array_equal(product(a, b, d, 32, shared, kind), expected(a, b, d))


# -- rules ----------------------------------------------------------------------------------------

# 64 x 64 elements of a, then of b, of bfloat16: small integers.
RULES = """
#define SS(d, a, b, accumulate) ptx::wgmma_ss<__nv_bfloat16, 64, 128>(d, a, b, accumulate)
#define RS(d, r, b, accumulate) ptx::wgmma_rs<__nv_bfloat16, 64, 128>(d, r, b, accumulate)
#define SYNC ptx::fence_proxy_async(), __syncthreads()
template <int kAlignment>
__device__ void rule(const Params& p) {
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, fault = p.fault;
  unsigned char* smem = ptx::dynamic_smem<unsigned char, kAlignment>();
  uint4* const chunks = reinterpret_cast<uint4*>(smem);
  const auto put = [&](int i, EMU_SITE) {
    ptx::st_shared(chunks + i, ptx::ld_global(reinterpret_cast<const uint4*>(p.x) + i), site);
  };
  for (int i = t; i < 1024; i += blockDim.x) put(i);
  SYNC;
  const unsigned int a = ptx::wgmma_descriptor(smem, 16);
  const unsigned int b = ptx::wgmma_descriptor(smem + 8192, 8192);
  float d[32] = {}, e[32] = {};
  unsigned int r[4] = {0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80};
  BODY
}
__global__ void kernel(Params p) { rule<ALIGNMENT>(p); }
"""


def run(body, fault=0, *, block=128, x=None, alignment=1024, **options):
    """Runs a body after the lines above; returns the counters and what it wrote."""
    if x is None:
        integers = np.random.default_rng().integers(-4, 5, (2, 64, 64))
        x = np.concatenate([panels(m.astype(ml_dtypes.bfloat16), 128) for m in integers])
    y = emulator.empty((4096,), np.uint32)
    source = RULES.replace("BODY", body).replace("ALIGNMENT", str(alignment))
    return launch(source, x, y, fault, block, **options), y


def fails(pattern, body, fault=1, **options):
    """The kernel is fine with fault = 0, and an error that matches and is located with `fault`."""
    run(body, **options)
    for seed in range(3):
        with pytest.raises(emulator.EmulatorError, match=pattern) as caught:
            run(body, fault, seed=seed, **options)
        message = str(caught.value)
        located = r"^kernel kernel, block \(0, 0, 0\), thread \d+: .*source:\d+$"
        assert re.search(located, message), message


ONE = "ptx::wgmma_fence(); SS(d, a, b, false); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
STORE = (
    "for (int i = 0; i < 32; ++i) ptx::st_global(p.y + FIRST + 32 * t + i, __float_as_uint(d[i]));"
)


def store(array, first=0):
    """Statement that writes the accumulators `array` of 128 threads to y[first:]."""
    return STORE.replace("d[i]", f"{array}[i]").replace("FIRST", str(first))


def test_waits_for_all_but_the_newest_groups():
    """What is in flight reads as NaN, and a later group may go on with the same accumulators."""
    rng = np.random.default_rng()
    integers = rng.integers(-4, 5, (2, 64, 64))
    x = np.concatenate([panels(m.astype(ml_dtypes.bfloat16), 128) for m in integers])
    step = [integers[0][:, k : k + 16] @ integers[1][:, k : k + 16].T for k in (0, 16, 32)]
    row, column = positions(128, 64)
    body = f"""
      ptx::wgmma_fence();
      SS(d, a, b, false);
      ptx::wgmma_commit();
      SS(e, a + 2, b + 2, false);
      ptx::wgmma_commit();
      SS(e, a + 4, b + 4, true);
      ptx::wgmma_commit();
      if (fault == 0) ptx::wgmma_wait<3>();
      if (fault == 1) ptx::wgmma_wait<2>();
      if (fault == 2) ptx::wgmma_wait<1>();
      if (fault == 3) ptx::wgmma_wait<0>();
      ptx::wgmma_commit();
      {store("(t < 64 ? d : e)")}
      ptx::wgmma_wait<0>();
      if (fault < 4) return;
      {store("(t < 64 ? d : e)")}
    """
    nothing = np.full((64, 64), np.nan)
    for groups, (d, e) in enumerate(
        [(nothing, nothing), (step[0], nothing), (step[0], nothing), (step[0], step[1] + step[2])]
    ):
        _, y = run(body, groups, x=x)
        result = y[:4096].view(np.float32).reshape(128, 32)
        np.testing.assert_array_equal(result[:64], d[row, column][:64])
        np.testing.assert_array_equal(result[64:], e[row, column][64:])
    _, y = run(body, 4, x=x)
    result = y.view(np.float32).reshape(128, 32)
    np.testing.assert_array_equal(result[64:], (step[1] + step[2])[row, column][64:])


def test_fence_before_wgmma():
    fails(
        "wgmma with no wgmma_fence since the kernel began",
        "if (!fault) ptx::wgmma_fence(); SS(d, a, b, false); ptx::wgmma_commit(); "
        "ptx::wgmma_wait<0>();",
    )
    fails(
        "wgmma with no wgmma_fence since the last wgmma_wait",
        f"{ONE} if (!fault) ptx::wgmma_fence(); SS(d, a, b, true); ptx::wgmma_commit(); "
        "ptx::wgmma_wait<0>();",
    )


def test_fence_between_waits():
    """Accumulators in flight need none, unless `a` comes from registers."""
    body = """
      ptx::wgmma_fence();
      SS(d, a, b, false);
      ptx::wgmma_commit();
      SS(e, a, b, false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<1>();
      if (fault == 0) SS(e, a + 2, b + 2, true);
      if (fault == 1) RS(e, r, b, true);
      if (fault == 2) SS(d, a, b, true);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    """
    for fault in (1, 2):
        fails("no wgmma_fence since the last wgmma_wait", body, fault)


def test_registers_change_after_the_fence():
    fails(
        "the accumulators of a wgmma changed after the wgmma_fence",
        "ptx::wgmma_fence(); if (fault && t == 70) d[17] = 1; SS(d, a, b, true); "
        "ptx::wgmma_commit(); ptx::wgmma_wait<0>();",
    )
    fails(
        "the registers of a wgmma changed after the wgmma_fence",
        "ptx::wgmma_fence(); if (fault && t == 70) r[3] = 1; RS(d, r, b, false); "
        "ptx::wgmma_commit(); ptx::wgmma_wait<0>();",
    )
    run(ONE.replace("SS(", "d[3] = 1; SS("))  # not read
    run(f"{ONE} d[3] = 1; {ONE.replace('false', 'true')}")


def test_registers_change_before_the_wait():
    fails(
        "the accumulators of a wgmma were written before its wgmma_wait",
        "ptx::wgmma_fence(); SS(d, a, b, false); ptx::wgmma_commit(); "
        "if (fault && t == 70) d[31] *= 2; ptx::wgmma_wait<0>();",
    )
    fails(
        "the accumulators of a wgmma were written before its wgmma_wait",
        "ptx::wgmma_fence(); SS(d, a, b, false); if (fault && t == 70) d[0] = 2; "
        "SS(d, a, b, true); ptx::wgmma_commit(); d[0] = d[0]; ptx::wgmma_wait<0>();",
    )
    fails(
        "the registers of a wgmma changed before its wgmma_wait",
        "ptx::wgmma_fence(); RS(d, r, b, false); ptx::wgmma_commit(); "
        "if (fault && t == 70) r[3] = 2; ptx::wgmma_wait<0>();",
    )


def test_exit_with_wgmma_in_flight():
    two = "ptx::wgmma_fence(); SS(d, a, b, false); SS(d, a, b, true);"
    fails(
        "exited with 2 wgmma in flight that it never waited for, the first one not committed",
        f"{two} if (!fault) ptx::wgmma_commit(); ptx::wgmma_wait<0>();",
    )
    fails(
        "exited with 2 wgmma in flight that it never waited for, the first one committed",
        f"{two} ptx::wgmma_commit(); if (!fault) ptx::wgmma_wait<0>(); else ptx::wgmma_wait<1>();",
    )


def test_accumulators_overlap():
    body = """
      float more[64] = {};
      const auto at = [&](int i) -> float(&)[32] { return (float(&)[32])more[i]; };
      ptx::wgmma_fence();
      SS(at(0), a, b, false);
      if (fault == 1) SS(at(1), a, b, false);
      if (fault == 2) ptx::wgmma_ss<__half, 80, 128>((float(&)[40])more, a, b, false);
      if (fault == 3) SS(at(lane == 3 ? 32 : 0), a, b, false);
      if (fault == 4) SS(at(lane == 3 ? 31 : 0), a, b, false);
      SS(at(32), a, b, false);
      SS(at(0), a, b, false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
    """
    part = "wgmma to part of the accumulators, or to more, of one in flight"
    different = "lanes of a warp bring different accumulators to a wgmma in flight"
    for fault, pattern in ((1, part), (2, part), (3, different), (4, part)):
        fails(pattern, body, fault)


# -- shared memory --------------------------------------------------------------------------------


def test_overwritten_while_read():
    """Until the wait, whatever the barriers, nobody may write the operands."""
    body = """
      ptx::wgmma_fence();
      if (warp < 4) SS(d, a, b, false);
      ptx::wgmma_commit();
      __syncthreads();
      if (t == THREAD && fault) WRITE;
      __syncthreads();
      ptx::wgmma_wait<0>();
      __syncthreads();
      if (t == THREAD && !fault) WRITE;
      ptx::cp_async_wait<0>();
    """.replace("ptx::wgmma", "if (warp < 4) ptx::wgmma")
    reads = "writes shared byte {}, which a wgmma of warp {} of block rank 0 reads until its wgmma"
    for thread, write, pattern in (
        (3, "put(1)", reads.format(16, 0)),
        (130, "put(703)", reads.format(11248, "[0-3]")),
        (130, "ptx::st_shared(smem + 2065, smem[0])", reads.format(2064, 1)),
        (9, "ptx::st_shared_relaxed((int*)smem, 1)", reads.format(0, 0)),
        (
            9,
            "ptx::cp_async_16(smem + 6160, p.x, 16), ptx::cp_async_commit()",
            reads.format(6160, 3),
        ),
        (9, "atomicAdd((int*)smem + 1, 1)", reads.format(0, 0)),
    ):
        fails(pattern, body.replace("THREAD", str(thread)).replace("WRITE", write), block=160)


def test_overwritten_unnoticed():
    """Also a write that is not by a wrapper shows."""
    fails(
        "shared memory was overwritten while a wgmma reads it",
        "ptx::wgmma_fence(); SS(d, a, b, false); ptx::wgmma_commit(); "
        "if (fault && t == 0) smem[8192] ^= 1; ptx::wgmma_wait<0>();",
    )


BAR = "unsigned long long* bar = ptx::static_smem<unsigned long long, 1>(); "
# Of 160 threads, 128 of which execute ONE before: what orders the others after that, but for the
# fault; with what was done before ONE.
ORDERS = {
    "__syncthreads": ("if (!fault) __syncthreads();", ""),
    "a named barrier of all warps": (
        "if (!fault || warp != 2) ptx::named_barrier_sync(1, 160 - 32 * fault);",
        "",
    ),
    "a cluster barrier": ("if (!fault) { ptx::cluster_arrive(); ptx::cluster_wait(); }", ""),
    "one lane of each warp": (
        "if (lane == 17 && warp < 4 && !(fault && warp == 2)) ptx::mbarrier_arrive(bar); "
        "if (warp == 4) ptx::mbarrier_wait(bar, 0);",
        BAR + "if (t == 0) ptx::mbarrier_init(bar, 4 - fault); __syncthreads();",
    ),
}


@pytest.mark.parametrize("order", ORDERS)
def test_overwritten_after_the_wait(order):
    """It takes word of each warp that it has waited; one lane speaks for its warp."""
    barrier, before = ORDERS[order]
    one = ONE.replace("ptx::wgmma_wait", "ptx::named_barrier_sync(9, 160); ptx::wgmma_wait")
    warp = "2" if "each" in order or "all" in order else "[0-3]"
    fails(
        f"byte 11248, which a wgmma of warp {warp} of block rank 0 reads"
        "( until its|, with no barrier after its) wgmma_wait",
        f"{before} if (warp < 4) {{ {one} }} else ptx::named_barrier_sync(9, 160); {barrier} "
        "if (t == 140) put(703);",
        block=160,
    )


def test_word_of_a_warp_before_it_waited():
    wait = "ptx::wgmma_wait<0>();"
    arrive = "if (lane == 17) ptx::mbarrier_arrive(bar);"
    late = ONE.replace(
        wait, f"if (fault && warp == 2) {arrive} {wait} if (!fault || warp != 2) {arrive}"
    )
    fails(
        "byte 11248, which a wgmma of warp 2 of block rank 0 reads",
        BAR + "if (t == 0) ptx::mbarrier_init(bar, 4); __syncthreads(); "
        f"if (warp < 4) {{ {late} }} else ptx::mbarrier_wait(bar, 0); if (t == 131) put(703);",
        block=160,
    )


def test_reuse_of_a_tile():
    run(f"for (int i = 0; i < 3; ++i) {{ {ONE} __syncthreads(); put(t); SYNC; }}")
    run(f"{ONE} if (lane < 8) put(128 * warp + 8 * lane + lane);")  # which other warps do not read


def test_every_reader_counts():
    """Of many warps that read a tile, each must have waited before it is overwritten."""
    one = ONE.replace("ptx::wgmma_wait", "ptx::named_barrier_sync(9, 288); ptx::wgmma_wait")
    body = f"""
      {BAR} if (t == 0) ptx::mbarrier_init(bar, fault ? 7 : 8);
      __syncthreads();
      if (warp < 8) {{
        {one}
        if (warp != fault - 1 && lane == 0) ptx::mbarrier_arrive(bar);
      }} else {{
        ptx::named_barrier_sync(9, 288);
        ptx::mbarrier_wait(bar, 0);
        if (lane == 0) put(703);
      }}
    """
    for warp in range(8):
        fails(f"byte 11248, which a wgmma of warp {warp} of", body, warp + 1, block=288)


# What writes the chunk that starts at byte 1024 or the row there, and what comes after it.
WRITES = {
    "plain": "if (t == 5) put(64);",
    "in part": "if (t == 5) ptx::st_shared(smem + 1033, smem[0]);",
    "relaxed": "if (t == 5) ptx::st_shared_relaxed((int*)smem + 257, 0);",
    "a warp": "if (warp == 0) ptx::stmatrix_x4(smem + 1024 + 16 * lane, r);",
    "cp_async": "if (t == 5) { ptx::cp_async_16(smem + 1024, p.x, 16); ptx::cp_async_commit(); } "
    "ptx::cp_async_wait<0>();",
}


@pytest.mark.parametrize("write", WRITES)
def test_written_by_ordinary_instructions(write):
    """Before wgmma reads it, its writers make a fence_proxy_async, and then there is a barrier."""
    written = r"wgmma reads byte 10\d\d, which (the warp of )?thread [05] of block rank 0 w.*"
    body = WRITES[write]
    fails(
        written + "with no fence_proxy_async between",
        f"{body} if (!fault || t != 5) ptx::fence_proxy_async(); __syncthreads(); {ONE}",
    )
    fails(
        written + "with no fence_proxy_async between",
        f"if (fault) ptx::fence_proxy_async(); {body} if (!fault) ptx::fence_proxy_async(); "
        f"__syncthreads(); {ONE}",
    )
    fails(
        written + "with no fence_proxy_async between",
        f"{body} if (!fault) ptx::fence_proxy_async(); __syncthreads(); "
        f"if (fault) ptx::fence_proxy_async(); {ONE}",
    )
    fails(
        written + "with no barrier between",
        f"{body} ptx::fence_proxy_async(); if (!fault) __syncthreads(); {ONE}",
    )


def test_fence_before_an_arrival():
    """What tells of a write tells of its fence, too."""
    fence = "ptx::fence_proxy_async();"
    fails(
        r"wgmma reads byte \d+, which thread 1\d\d of .* wrote, with no fence_proxy_async between",
        BAR + "if (t == 0) ptx::mbarrier_init(bar, 32); __syncthreads(); if (warp == 4) { "
        f"put(512 + 9 * lane); if (!fault) {fence} ptx::mbarrier_arrive(bar); {fence} }} else {{ "
        f"ptx::mbarrier_wait(bar, 0); {ONE} }}",
        block=160,
    )


BULK = """
#include <ptx/cp_async_bulk.cuh>
struct BulkParams { TensorMap a, b; unsigned int* y; long long fault; };
__global__ void kernel(const __grid_constant__ BulkParams p) {
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, fault = p.fault;
  unsigned char* smem = ptx::dynamic_smem<unsigned char, 1024>();
  unsigned long long *full = ptx::static_smem<unsigned long long, 2>(), *free = full + 1;
  if (t == 0) ptx::mbarrier_init(full, 1), ptx::mbarrier_init(free, 4), ptx::fence_mbarrier_init();
  __syncthreads();
  if (warp == 4) {
    for (int i = 0; i < 2; ++i) {
      if (i > 0) ptx::named_barrier_sync(1, 160);
      if (lane == 0) {
        if (!(fault == 1 && i > 0)) ptx::mbarrier_wait(free, i ^ 1);
        ptx::mbarrier_arrive_expect_tx(full, 16384);
        ptx::cp_async_bulk_tensor_load(smem, &p.a, full, 64 * i, 0, 0, 0, 0);
        ptx::cp_async_bulk_tensor_load(smem + 8192, &p.b, full, 64 * i, 0, 0, 0, 0);
      }
    }
    return;
  }
  const unsigned int a = ptx::wgmma_descriptor(smem, 16);
  const unsigned int b = ptx::wgmma_descriptor(smem + 8192, 16);
  float d[32];
  for (int i = 0; i < 2; ++i) {
    if (!(fault == 2 && warp == 2)) ptx::mbarrier_wait(full, i);
    ptx::wgmma_fence();
    for (int k = 0; k < 4; ++k) {
      ptx::wgmma_ss<__nv_bfloat16, 64, 128>(d, a + 2 * k, b + 2 * k, i + k > 0);
    }
    ptx::wgmma_commit();
    if (i == 0) ptx::named_barrier_arrive(1, 160);
    ptx::wgmma_wait<0>();
    if (lane == 9) ptx::mbarrier_arrive(free);
  }
  for (int i = 0; i < 32; ++i) ptx::st_global(p.y + 32 * t + i, __float_as_uint(d[i]));
}
"""


def test_bulk_loads():
    """What they wrote needs no fence, but their mbarrier; and they wait until it has been read."""
    rng = np.random.default_rng()
    a, b = rng.integers(-9, 10, (2, 64, 128)).astype(ml_dtypes.bfloat16)
    maps = [
        emulator.tensor_map(
            m, (128, 64, 1, 1, 1), (256, 16384, 16384, 16384), (64, 64, 1, 1, 1), 128
        )
        for m in (a, b)
    ]

    def multiply(fault, seed):
        y = emulator.empty((128, 32), np.float32)
        emulator.launch_source(
            HEAD + BULK, "kernel", 1, 160, emulator.pack(*maps, y, fault), (a, b), (y,),
            arch="sm_90a", smem_bytes=16384, seed=seed,
        )  # fmt: skip
        return y

    row, column = positions(128, 64)
    product = a.astype(np.float32) @ b.astype(np.float32).T
    for seed in range(4):
        np.testing.assert_array_equal(multiply(0, seed), product[row, column])
        with pytest.raises(
            emulator.EmulatorError, match=r"which a wgmma of warp \d of block rank 0 read"
        ):
            multiply(1, seed)
        with pytest.raises(
            emulator.EmulatorError,
            match="wgmma reads .*(never written|a bulk load (is still in flight|wrote, without))",
        ):
            multiply(2, seed)


def test_every_lane_reads():
    fails(
        r"wgmma reads byte \d+, which thread 1\d\d of block rank 0 wrote, with no barrier between",
        BAR + "if (t == 0) ptx::mbarrier_init(bar, 32); __syncthreads(); if (warp == 4) { "
        "put(512 + 9 * lane); ptx::fence_proxy_async(); ptx::mbarrier_arrive(bar); } else { "
        f"if (!fault || lane == 0) ptx::mbarrier_wait(bar, 0); {ONE} }}",
        block=160,
    )


def test_fences_of_another_block():
    """Threads of the same number are not the same."""
    body = f"""
      const int rank = ptx::cluster_ctarank();
      if (t == 5) put(64);
      if (rank != fault) ptx::fence_proxy_async();
      ptx::cluster_arrive();
      ptx::cluster_wait();
      {ONE}
    """
    run(body, 2, grid=2, cluster=2)
    with pytest.raises(emulator.EmulatorError, match="block rank 1 wrote, with no fence_proxy"):
        run(body, 1, grid=2, cluster=2)


def test_overwritten_by_another_block():
    body = """
      const int rank = ptx::cluster_ctarank();
      unsigned long long* bar = ptx::static_smem<unsigned long long, 1>();
      if (t == 0) ptx::mbarrier_init(bar, 1), ptx::fence_mbarrier_init();
      ptx::cluster_arrive(), ptx::cluster_wait();
      ptx::wgmma_fence();
      if (rank == 0) SS(d, a, b, false);
      ptx::wgmma_commit();
      ptx::cluster_arrive(), ptx::cluster_wait();
      ptx::wgmma_wait<0>();
      if (!fault) ptx::cluster_arrive(), ptx::cluster_wait();
      if (rank == 1) {
        for (int i = 0; i < 99; ++i) __syncthreads();
        if (t == 0) ptx::st_async(chunks + 703, uint4{}, bar, 0);
      } else if (t == 0) {
        ptx::mbarrier_arrive_expect_tx(bar, 16);
        ptx::mbarrier_wait_cluster(bar, 0);
      }
    """
    run(body, grid=2, cluster=2)
    for seed in range(9):
        with pytest.raises(
            emulator.EmulatorError, match="writes .* which a wgmma of warp .* reads"
        ):
            run(body, 1, grid=2, cluster=2, seed=seed)


def test_one_tile_after_another():
    """That a thread may write one says nothing of the next."""
    one = ONE.replace("ptx::wgmma_wait", "ptx::named_barrier_sync(9, 160); ptx::wgmma_wait")
    fails(
        "byte 4096, which a wgmma of warp 2 of block rank 0 reads",
        BAR
        + f"""
        if (t == 0) ptx::mbarrier_init(bar, 4 - fault);
        __syncthreads();
        if (warp < 4) {{
          {one}
          if (warp < 4 - 2 * fault || (fault && warp == 3)) {{
            if (lane == 0) ptx::mbarrier_arrive(bar);
          }}
        }} else {{
          ptx::named_barrier_sync(9, 160);
          ptx::mbarrier_wait(bar, 0);
          if (lane == 0) for (int i = 0; i < 512; i += 64) put(i + i / 8 % 8);
        }}
        """,
        block=160,
    )


EXPECTED_EARLY = """
#include <ptx/cp_async_bulk.cuh>
struct BulkParams { TensorMap a; unsigned int* y; long long fault; };
__global__ void kernel(const __grid_constant__ BulkParams p) {
  const int t = threadIdx.x, warp = t / 32, lane = t % 32;
  unsigned char* smem = ptx::dynamic_smem<unsigned char, 1024>();
  unsigned long long *full = ptx::static_smem<unsigned long long, 2>(), *free = full + 1;
  if (t == 0) ptx::mbarrier_init(full, 1), ptx::mbarrier_init(free, 4), ptx::fence_mbarrier_init();
  __syncthreads();
  if (warp == 4) {
    for (int i = 0; i < 2 && lane == 0; ++i) {
      if (i > 0) ptx::mbarrier_wait(full, 0);
      ptx::mbarrier_arrive_expect_tx(full, 8192);
      ptx::mbarrier_wait(free, i ^ 1);
      ptx::cp_async_bulk_tensor_load(smem, &p.a, full, 0, 0, 0, 0, 0);
    }
    return;
  }
  const unsigned int a = ptx::wgmma_descriptor(smem, 16);
  float d[32];
  ptx::mbarrier_wait(full, 0);
  ptx::wgmma_fence();
  ptx::wgmma_ss<__nv_bfloat16, 64, 128>(d, a, a, false);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  if (lane == 9) ptx::mbarrier_arrive(free);
  ptx::mbarrier_wait(full, 1);
  if (t == 100) ptx::st_shared(smem, (unsigned char)1);
}
"""


def test_bytes_expected_before_the_tile_is_free():
    """Whoever has waited for a bulk load comes after all that was before the load."""
    a, y = np.zeros((64, 64), ml_dtypes.bfloat16), emulator.empty((1,), np.uint32)
    of_a = emulator.tensor_map(a, (64, 64, 1, 1, 1), 4 * (128,), (64, 64, 1, 1, 1), 128)
    emulator.launch_source(
        HEAD + EXPECTED_EARLY, "kernel", 1, 160, emulator.pack(of_a, y, 0), (a,), (y,),
        arch="sm_90a", smem_bytes=8192,
    )  # fmt: skip


def test_copy_has_not_landed():
    fails(
        "wgmma reads shared byte 1024 of a cp.async that has not landed",
        "if (t == 5) ptx::cp_async_16(smem + 1024, p.x, 16); ptx::cp_async_commit(); "
        f"if (!fault) ptx::cp_async_wait<0>(); SYNC; {ONE} ptx::cp_async_wait<0>();",
    )


def test_reads_what_was_never_written():
    fails(
        "wgmma reads shared byte 16384, which was never written",
        ONE.replace("b,", "b + 512 * fault,"),
    )


def test_barriers_in_the_operands():
    fails(
        "wgmma reads shared byte 1024, which is part of an mbarrier",
        "if (fault && t == 0) ptx::mbarrier_init((unsigned long long*)(smem + 1024), 1); "
        f"SYNC; {ONE}",
    )


# -- descriptors ----------------------------------------------------------------------------------


def test_descriptors():
    direct = (
        "ptx::wgmma_fence(); emu::wgmma(false, 64, d, nullptr, a, b, "
        "ptx::kWgmmaUpper<128> ^ fault, false, {__builtin_FILE(), __builtin_LINE()}); "
        "ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    )
    rs = ONE.replace("SS(d, a", "RS(d, r")
    wide = (
        "for (int i = 1024 + t; i < 2048; i += 128) ptx::st_shared(chunks + i, uint4{}); SYNC; "
        "float f[64]; const unsigned int c = ptx::wgmma_descriptor(smem, 8192 + 512 * fault); "
        "ptx::wgmma_fence(); ptx::wgmma_rs<__half, 128, 128>(f, r, c, false); "
        "ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
    )
    of = "the descriptor of {}, 0x[0-9a-f]{{16}}, "
    columns, pattern = "starts amid the columns of a step", "starts amid a swizzle pattern"
    for body, fault, message in (
        (ONE.replace("a,", "a + fault,"), 1, of.format("a") + columns),
        (ONE.replace("a,", "a + fault,"), 8, of.format("a") + pattern),
        (ONE.replace("b,", "b + fault,"), 3, of.format("b") + columns),
        (ONE.replace("b,", "b + fault,"), 32, of.format("b") + pattern),
        (rs.replace("b,", "b + fault,"), 2, of.format("b") + columns),
        (rs.replace("b,", "b + fault,"), 8, of.format("b") + pattern),
        (ONE.replace("a,", "a + fault,"), 1 << 14, of.format("a") + "sets bits that must be 0"),
        (ONE.replace("b,", "b ^ fault,"), 1 << 31, of.format("b") + "sets bits that must be 0"),
        (direct, 1 << 14, of.format("a") + "sets bits that must be 0"),
        (direct, 1 << 20, of.format("a") + "sets bits that must be 0"),
        (direct, 1 << 29, of.format("a") + "sets bits that must be 0"),
        (direct, 1 << 17, of.format("a") + "has a base offset"),
        (direct, 1 << 30, of.format("a") + "is without a swizzle"),
        (direct, 1, of.format("a") + "has a stride amid a swizzle pattern"),
        (wide, 1, of.format("b") + "has a pitch of panels amid a swizzle pattern"),
    ):
        fails(message, body, fault)


def test_stride():
    """Eight rows may be further apart than they take up."""
    integers = np.random.default_rng().integers(-4, 5, (2, 64, 64))
    x = np.zeros((2, 8, 2, 256), np.uint32)
    x[:, :, 0] = [panels(m.astype(ml_dtypes.bfloat16), 128).reshape(8, 256) for m in integers]
    row, column = positions(128, 64)
    _, y = run(
        "for (int i = 1024 + t; i < 2048; i += 128) put(i); SYNC; ptx::wgmma_fence(); "
        "emu::wgmma(false, 64, d, nullptr, a, ptx::wgmma_descriptor(smem + 16384, 16), "
        "128 | 1u << 30, false, {__builtin_FILE(), 0}); ptx::wgmma_commit(); ptx::wgmma_wait<0>();"
        + store("d"),
        x=x.reshape(-1),
    )  # fmt: skip
    product = integers[0][:, :16] @ integers[1][:, :16].T
    np.testing.assert_array_equal(y.view(np.float32).reshape(128, 32), product[row, column])


def test_out_of_bounds():
    outside = "wgmma reads 16 bytes of shared memory out of bounds: offset {}; there are {} bytes"
    fails(outside.format(16384, 16384), ONE.replace("b,", "b + 64 * fault,"), smem_bytes=16384)
    fails(outside.format(16384, 16392), ONE.replace("b,", "b + 64 * fault,"), smem_bytes=16392)
    fails(outside.format(-1024, 32768), ONE.replace("a,", "fault ? 0 : a,"))


def test_alignment_of_shared_memory():
    run(ONE, alignment=1024)
    with pytest.raises(emulator.EmulatorError, match="but dynamic_smem was asked for less"):
        run(ONE, alignment=512)


def test_making_a_descriptor():
    fails(
        "bytes of shared memory misaligned: offset 8",
        "ptx::wgmma_descriptor(smem + 8 * fault, 16);",
    )
    fails("to the block's shared memory", "ptx::wgmma_descriptor(fault ? (void*)&p : smem, 16);")
    for pitch in (8, 1 << 18):
        fails(f"a pitch of {pitch} bytes", "ptx::wgmma_descriptor(smem, fault);", pitch)


# -- warpgroups -----------------------------------------------------------------------------------


def test_warps_of_a_group_differ():
    differs = (
        "wgmma_[rs]s, number 0 of its warp, differs in {} from what warp [0-3] .* executed there: "
    )
    for body, what in (
        (ONE.replace("b,", "b + (fault && warp == 2 ? 2 : 0),"), "the descriptor of b"),
        (ONE.replace("a,", "a + (fault && warp == 1 ? 2 : 0),"), "the descriptor of a"),
        (ONE.replace("false", "fault && warp == 3"), "accumulate"),
        (f"if (fault && warp == 1) {{ {ONE} }} else {{\n{ONE} }}", "the call"),
        (ONE.replace("SS(", "if (fault && warp == 1) RS(d, r, b, false); else SS("), "the call"),
        (
            "ptx::wgmma_fence(); emu::wgmma(fault && warp == 1, 64, d, nullptr, a, b, "
            "ptx::kWgmmaUpper<128>, false, {__builtin_FILE(), 7}); ptx::wgmma_commit(); "
            "ptx::wgmma_wait<0>();",
            "the type",
        ),
        (
            "ptx::wgmma_fence(); emu::wgmma(false, fault && warp == 1 ? 48 : 64, d, nullptr, a, b, "
            "ptx::kWgmmaUpper<128>, false, {__builtin_FILE(), 7}); ptx::wgmma_commit(); "
            "ptx::wgmma_wait<0>();",
            "the number of columns or registers",
        ),
    ):
        fails(differs.format(what), body)
    with pytest.raises(emulator.EmulatorError, match=differs.format("the call")):
        run(
            "ptx::wgmma_fence(); emu::wgmma(false, 64, d, nullptr, a, b, ptx::kWgmmaUpper<128>, "
            'false, {warp == 2 ? "x" : "y", 7}); ptx::wgmma_commit(); ptx::wgmma_wait<0>();'
        )


def test_lanes_of_a_warp_differ():
    differs = "wgmma of a lane that differs in {} from lane 0"
    fails(
        differs.format("the descriptor of a"), ONE.replace("a,", "a + (fault && t == 70 ? 2 : 0),")
    )
    fails(differs.format("accumulate"), ONE.replace("false", "fault && t == 70"))
    fails("exited|has exited", f"if (fault && t == 70) return; {ONE}")
    fails(
        "two warp collectives",
        ONE.replace("SS", "if (fault && lane == 3) SS(d, a, b, true);\n else SS"),
    )


def test_warps_of_a_group_execute_as_many():
    fails(
        "exited without a wgmma_ss that warp [013] of its warpgroup executed|"
        "wgmma_ss, but warp 2 of its warpgroup has exited without it",
        f"{ONE} if (fault && warp == 2) return; {ONE}",
    )


def test_groups_do_not_wait_for_each_other():
    run(f"if (warp >= 4) {{ {ONE} }} {ONE}", block=256)


def test_whole_warpgroups():
    for block, call, name in (
        (96, "wgmma_fence()", "wgmma_fence"),
        (96, "wgmma_commit()", "wgmma_commit"),
        (96, "wgmma_wait<0>()", "wgmma_wait"),
        (224, "wgmma_ss<__half, 64, 128>(d, a, b, false)", "wgmma_ss"),
        (224, "wgmma_rs<__half, 64, 128>(d, r, b, false)", "wgmma_rs"),
        (224, "setmaxnreg_dec<24>()", "setmaxnreg_dec"),
    ):
        first = block // 128 * 4
        here = f"here warps {first} to {first + 3}, but the block has {block} threads"
        with pytest.raises(emulator.EmulatorError, match=f"{name} needs a warpgroup, {here}"):
            run(f"if (warp >= {first}) ptx::{call};", block=block)


NOTHING = np.zeros(1, np.uint32), np.zeros(1, np.uint32)


def test_architectures():
    for call in (
        "wgmma_fence()",
        "wgmma_commit()",
        "wgmma_wait<0>()",
        "wgmma_ss<__half, 64, 128>(d, 0, 0, false)",
        "wgmma_rs<__half, 64, 128>(d, r, 0, false)",
        "wgmma_descriptor(&d, 0)",
        "setmaxnreg_dec<24>()",
        "setmaxnreg_inc<240>()",
    ):
        source = f"__global__ void kernel(Params p) {{ float d[32]; unsigned r[4]; ptx::{call}; }}"
        for arch in ("sm_90", "sm_80", "sm_100a"):
            name = re.match(r"\w+", call)[0]
            message = f"{name} needs sm_90a, but this is {arch.rstrip('a')}"
            with pytest.raises(emulator.EmulatorError, match=message):
                launch(source, *NOTHING, 0, 128, arch=arch)
    source = "__global__ void kernel(Params p) { ptx::fence_proxy_async(); }"
    launch(source, *NOTHING, 0, 32, arch="sm_90")
    with pytest.raises(emulator.EmulatorError, match="needs sm_90, but this is sm_80"):
        launch(source, *NOTHING, 0, 32, arch="sm_80")


# -- registers ------------------------------------------------------------------------------------


def test_registers():
    """A pool of what the launch gave each warp; taking waits for others to give back."""
    roles = "if (warp < 4) ptx::setmaxnreg_dec<{}>(); else ptx::setmaxnreg_inc<{}>();"
    for block, dec, inc in ((256, 24, 256), (384, 24, 240), (384, 40, 232), (512, 32, 160)):
        for seed in range(3):
            run(roles.format(dec, inc), block=block, seed=seed)
    for block, dec, inc in ((384, 24, 248), (384, 40, 240), (512, 40, 160)):
        with pytest.raises(emulator.EmulatorError, match="deadlock: .* wait in setmaxnreg_inc at"):
            run(roles.format(dec, inc), block=block)
    run(roles.format(24, 240), block=384, grid=2, cluster=2)
    run(roles.format(24, 176), block=384, registers=128)
    with pytest.raises(emulator.EmulatorError, match="deadlock: .* wait in setmaxnreg_inc at"):
        run(roles.format(24, 184), block=384, registers=128)
    with pytest.raises(emulator.EmulatorError, match="bad registers: .* registers=176 on sm_90a"):
        run(roles.format(24, 240), block=384, registers=176)
    run(
        "if (warp < 4) { ptx::setmaxnreg_dec<96>(); ptx::setmaxnreg_dec<24>(); "
        "ptx::setmaxnreg_inc<80>(); } else { ptx::setmaxnreg_inc<192>(); "
        "ptx::setmaxnreg_inc<240>(); ptx::setmaxnreg_dec<184>(); }",
        block=384,
    )


def test_registers_go_the_right_way():
    one = "switch (fault) {{ {} default: ptx::setmaxnreg_dec<24>(); }}"
    for call, message in (
        ("setmaxnreg_dec<168>", "setmaxnreg_dec to 168 registers per thread, but its warp has 168"),
        ("setmaxnreg_dec<176>", "setmaxnreg_dec to 176 registers per thread, but its warp has 168"),
        ("setmaxnreg_inc<168>", "setmaxnreg_inc to 168 registers per thread, but its warp has 168"),
        ("setmaxnreg_inc<160>", "setmaxnreg_inc to 160 registers per thread, but its warp has 168"),
    ):
        fails(message, one.format(f"case 1: ptx::{call}(); break;"), block=384)
    fails(
        "setmaxnreg_inc to 24 registers per thread, but its warp has 24",
        "ptx::setmaxnreg_dec<24>(); if (fault) ptx::setmaxnreg_inc<24>();",
        block=384,
    )


def test_warps_of_a_group_take_as_many_registers():
    fails(
        "setmaxnreg_dec, number 0 of its warp, differs in the call",
        "if (fault && warp == 2) ptx::setmaxnreg_dec<32>();\nelse ptx::setmaxnreg_dec<24>();",
    )
    fails(
        "exited without a setmaxnreg_dec|setmaxnreg_dec, but warp 2 of its warpgroup has exited",
        "if (!fault || warp != 2) ptx::setmaxnreg_dec<24>();",
    )
    fails("exited|has exited", "if (!fault || t != 70) ptx::setmaxnreg_dec<24>();")
