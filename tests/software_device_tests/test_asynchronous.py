"""The software device copies asynchronously: cp.async, mbarriers, clusters."""

from __future__ import annotations

import numpy as np
import pytest
from small_kernels import compile_c, fails, ptx_kernel, run, unwritten

# -- asynchronous copies -----------------------------------------------------------------------

CP_ASYNC = """__global__ void k(const int* x, int* y, int* other) {
  __shared__ __align__(16) int s[128];
  const unsigned to = (unsigned)__cvta_generic_to_shared(s + 4 * threadIdx.x);
  const unsigned long long from = __cvta_generic_to_global(x + 4 * threadIdx.x);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(to), "l"(from), "r"(threadIdx.x == 3 ? 4 : 16) : "memory");
  asm volatile("cp.async.commit_group;" ::: "memory");
  /*between*/
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  for (int i = threadIdx.x; i < 128; i += 32) y[i] = s[i];
}"""


def test_cp_async():
    x, y, other = np.arange(1, 129, dtype=np.int32), np.zeros(128, np.int32), np.zeros(1, np.int32)
    assert run(compile_c(CP_ASYNC), x, y, other) is None
    x[13:16] = 0
    assert np.array_equal(x, y)
    words = r"reads byte \d+ of an allocation of 512 bytes, which nobody has written.*: cp\.async"
    fails(words, compile_c(CP_ASYNC), unwritten(128), y, other)


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "wait_group 0",
            "wait_group 1",
            "reads shared byte 0, to which a cp.async of warp 0 is still in flight",
        ),
        (
            'asm volatile("cp.async.commit_group;" ::: "memory");',
            "",
            "a cp.async of warp 0 is still in flight",
        ),
        (
            "/*between*/",
            "s[5] = 1;",
            "writes shared byte 20, to which a cp.async of warp 0 is still in flight",
        ),
        (
            "/*between*/",
            "((int*)x)[9] = 77;",
            "the source of a cp.async was overwritten before it landed",
        ),
        ("threadIdx.x == 3 ? 4", "threadIdx.x == 3 ? 17", "a cp.async of 17 bytes"),
        ("x + 4 *", "x + 1 + 4 *", "misaligned read of 16 bytes"),
        ("y[i] = s[i]", "y[i] = 1", None),
    ],
)
def test_cp_async_faults(old, new, message):
    assert old in CP_ASYNC
    source = CP_ASYNC.replace(old, new)
    x, y, other = np.arange(1, 129, dtype=np.int32), np.zeros(128, np.int32), np.zeros(1, np.int32)
    if message:
        fails(message, compile_c(source), x, y, other)
    else:
        source = source.replace('asm volatile("cp.async.wait_group 0;" ::: "memory");', "")
        fails(
            "exited with a cp.async in flight that it never waited for, committed",
            compile_c(source),
            x,
            y,
            other,
        )


# -- mbarriers and clusters --------------------------------------------------------------------

MBARRIER = """
mov.u32 %r1, dynamic;
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 64;
fence.mbarrier_init.release.cluster;
bar.sync 0;
setp.lt.u32 %p2, %r0, 64;
@%p2 bra producer;
wait:
mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0;
@!%p3 bra wait;
sub.u32 %r2, %r0, 64;
shl.b32 %r2, %r2, 2;
add.u32 %r3, %r1, %r2;
ld.shared.u32 %r4, [%r3+16];
cvt.u64.u32 %rd1, %r2;
add.s64 %rd1, %rd0, %rd1;
st.global.u32 [%rd1], %r4;
bra done;
producer:
shl.b32 %r2, %r0, 2;
add.u32 %r3, %r1, %r2;
st.shared.u32 [%r3+16], %r0;
mbarrier.arrive.shared::cta.b64 _, [%r1];
done:
"""


@pytest.mark.parametrize("seed", range(3))
def test_mbarrier(seed):
    x = np.zeros(64, np.int32)
    assert run(ptx_kernel(MBARRIER), x, block=128, smem=1024, seed=seed) is None
    assert np.array_equal(x, np.arange(64))


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "[%r1], 64;",
            "[%r1], 65;",
            r"deadlock.*(.|\n)*1 of 65 arrivals and 0 of 0 bytes are missing",
        ),
        ("[%r1], 64;", "[%r1], 0;", "mbarrier.init with 0 arrivals"),
        ("bar.sync 0;", "", "used before mbarrier.init|with no barrier since its mbarrier.init"),
        ("@!%p3 bra wait;", "", "race in shared memory|which was never written"),
        (
            "ld.shared.u32 %r4, [%r3+16]",
            "ld.shared.u32 %r4, [%r1+4]",
            "reads shared byte 1028, which is part of an mbarrier",
        ),
        ("[%r1], 0;\n@!", "[%r1], 2;\n@!", "an mbarrier wait for parity 2"),
        ("[%r1], 0;\n@!", "[%r1], 1;\n@!", "race in shared memory|which was never written"),
    ],
)
def test_mbarrier_faults(old, new, message):
    assert old in MBARRIER
    fails(
        message,
        ptx_kernel(MBARRIER.replace(old, new)),
        np.zeros(64, np.int32),
        block=128,
        smem=1024,
    )


CLUSTER = """__global__ void __cluster_dims__(4, 1, 1) k(int* x) {
  __shared__ __align__(16) int s[32];
  __shared__ unsigned long long bar;
  unsigned rank, to, remote_bar, done = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  const unsigned mine = (unsigned)__cvta_generic_to_shared(&bar), t = threadIdx.x;
  if (t == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(mine) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 :: "r"(mine), "r"(128) : "memory");
  }
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
  const unsigned next = (rank + 1) % 4;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to)
      : "r"((unsigned)__cvta_generic_to_shared(s + t)), "r"(next));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_bar) : "r"(mine), "r"(next));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];"
               :: "r"(to), "r"(rank * 100 + t), "r"(remote_bar) : "memory");
  /*wait*/ while (!done) {
    asm volatile("{ .reg .pred p;"
                 " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], 0;"
                 " selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(mine) : "memory");
  }
  x[blockIdx.x * 32 + t] = s[t];
}"""


def test_cluster():
    x = np.zeros((8, 32), np.int32)
    assert run(compile_c(CLUSTER, "compute_90"), x, grid=8) is None
    assert np.array_equal(x[:4], np.array([300, 0, 100, 200])[:, None] + np.arange(32))
    assert np.array_equal(x[4:], x[:4])


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"r"(128)', '"r"(124)', "mbarrier gets 128 bytes in a phase that expects 124"),
        ('"r"(128)', '"r"(132)', r"deadlock(.|\n)*0 of 1 arrivals and 4 of 132 bytes are missing"),
        ("barrier.cluster.arrive.release", "barrier.cluster.arrive.relaxed", None),
        (
            'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");',
            "",
            "with no fence.mbarrier_init since",
        ),
        ("/*wait*/", "if (0)", "is still in flight|was never written"),
        (
            "__cvta_generic_to_shared(s + t)",
            "__cvta_generic_to_shared(s + t / 2 * 2)",
            "an st.async of warp 0 is still in",
        ),
        ('"r"(next));\n  asm("mapa', '"r"(next + 9));\n  asm("mapa', "of a cluster of 4"),
        (
            'asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");',
            "",
            "barrier.cluster.wait without a barrier.cluster.arrive",
        ),
        (
            'asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");',
            "",
            "used before mbarrier.init|with no barrier since its mbarrier.init",
        ),
    ],
)
def test_cluster_faults(old, new, message):
    assert old in CLUSTER
    ptx = compile_c(CLUSTER.replace(old, new), "compute_90")
    if message:
        fails(message, ptx, np.zeros((8, 32), np.int32), grid=8)
    else:
        assert run(ptx, np.zeros((8, 32), np.int32), grid=8) is None


def test_grid_that_is_no_multiple_of_the_cluster():
    fails(
        "no multiple of its clusters of 4",
        compile_c(CLUSTER, "compute_90"),
        np.zeros((6, 32), np.int32),
        grid=6,
    )
