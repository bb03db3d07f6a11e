"""The software device runs warps: divergence, barriers, warp instructions."""

from __future__ import annotations

import re

import numpy as np
import pytest
from small_kernels import compile_c, fails, ptx_kernel, run

# -- barriers ----------------------------------------------------------------------------------


def test_count_and_or():
    source = """__global__ void k(int* x) {
      const int t = threadIdx.x;
      x[t] = __syncthreads_count(t % 3 == 0) + 1000 * __syncthreads_and(t >= 0)
             + 10000 * __syncthreads_or(t == 70) + 100000 * __syncthreads_and(t != 70);
    }"""
    x = np.zeros(96, np.int32)
    assert run(compile_c(source), x, block=96) is None
    assert np.array_equal(x, np.full(96, 11032))


def test_named_barriers():
    body = """
setp.lt.u32 %p1, %r0, 32;
shl.b32 %r1, %r0, 2;
@%p1 bra producer;
sub.u32 %r2, %r1, 128;
mov.u32 %r3, dynamic;
add.u32 %r3, %r3, %r2;
barrier.cta.sync.aligned 1, 64;
ld.shared.u32 %r4, [%r3];
cvt.u64.u32 %rd1, %r2;
add.s64 %rd1, %rd0, %rd1;
st.global.u32 [%rd1], %r4;
bra done;
producer:
mov.u32 %r3, dynamic;
add.u32 %r3, %r3, %r1;
st.shared.u32 [%r3], %r0;
PRODUCER
done:
"""
    arrive = "barrier.cta.arrive.aligned 1, 64;"
    for seed in range(4):
        x = np.zeros(32, np.int32)
        assert (
            run(ptx_kernel(body.replace("PRODUCER", arrive)), x, block=64, smem=128, seed=seed)
            is None
        )
        assert np.array_equal(x, np.arange(32))
    error = fails("deadlock", ptx_kernel(body.replace("PRODUCER", "")), x, block=64, smem=128)
    assert re.search(
        r"warp 1: kernel k, .*barrier\.cta\.sync\.aligned 1, 64; \(barrier 1: 32 of 64 threads",
        error,
    )
    wrong = ptx_kernel(body.replace("PRODUCER", "barrier.cta.arrive.aligned 1, 32;"))
    fails("barrier 1 for|deadlock", wrong, x, block=64, smem=128)
    fails("must be a multiple of 32", ptx_kernel("bar.sync 1, 48;"), x, block=64)
    fails("barrier 16: they are numbered 0 to 15", ptx_kernel("bar.sync 16;"), x, block=64)


def test_deadlock_names_every_warp():
    body = """setp.lt.u32 %p1, %r0, 32; @%p1 bra one; bar.sync 1, 96; bra done;
      one: bar.sync 2, 96; done:"""
    error = fails("deadlock: every warp waits", ptx_kernel(body), np.zeros(1, np.int32), block=96)
    assert (
        "warp 0: kernel k" in error
        and "bar.sync 2, 96; (barrier 2: 32 of 96 threads have arrived)" in error
    )
    assert "warp 1: " in error and "warp 2: " in error and "barrier 1: 64 of 96" in error


def test_barrier_in_divergent_code():
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 bar.sync 0;"
    fails(
        "exited without executing it|divergent lanes",
        ptx_kernel(body),
        np.zeros(1, np.int32),
        block=32,
    )


def test_exited_threads_are_not_waited_for():
    body = "setp.ge.u32 %p1, %r0, 64; @%p1 ret; bar.sync 0;"
    assert run(ptx_kernel(body), np.zeros(1, np.int32), block=96) is None


# -- warp instructions -------------------------------------------------------------------------


def test_shuffles():
    source = """__global__ void k(int* x) {
      const int t = threadIdx.x;
      x[t] = __shfl_xor_sync(~0u, t, 5) + 100 * __shfl_up_sync(~0u, t, 3, 8)
             + 10000 * __shfl_down_sync(~0u, t, 2) + 1000000 * __shfl_sync(~0u, t, 9, 16);
    }"""
    x = np.zeros(32, np.int32)
    assert run(compile_c(source), x) is None
    t = np.arange(32)
    up, down = np.where(t % 8 >= 3, t - 3, t), np.where(t < 30, t + 2, t)
    assert np.array_equal(x, (t ^ 5) + 100 * up + 10000 * down + 1000000 * (t // 16 * 16 + 9))


def test_votes_matches_and_reductions():
    source = """__global__ void k(int* x) {
      const int t = threadIdx.x;
      int all;
      x[t] = __ballot_sync(~0u, t % 5 == 0);
      x[32 + t] = __match_any_sync(~0u, t % 7);
      x[64 + t] = __reduce_add_sync(~0u, t) + 1000 * __reduce_max_sync(~0u, t ^ 13)
                  + 100000 * __any_sync(~0u, t == 3);
      x[96 + t] = __match_all_sync(~0u, t / 32, &all) == ~0u && all;
    }"""
    x = np.zeros(128, np.int32)
    assert run(compile_c(source), x) is None
    t = np.arange(32)

    def bits(hit):
        return int(np.sum(hit.astype(np.uint64) << t.astype(np.uint64)))

    assert np.all(x[:32].view(np.uint32) == bits(t % 5 == 0))
    assert np.array_equal(x[32:64].view(np.uint32), [bits(t % 7 == u % 7) for u in t])
    assert np.all(x[64:96] == 496 + 31000 + 100000) and np.all(x[96:] == 1)


def test_groups_of_one_mask_each():
    source = """__global__ void k(int* x) {
      const unsigned mask = threadIdx.x % 2 ? 0xaaaaaaaau : 0x55555555u;
      x[threadIdx.x] = __reduce_add_sync(mask, threadIdx.x);
    }"""
    x = np.zeros(32, np.int32)
    assert run(compile_c(source), x) is None
    assert np.array_equal(x, np.where(np.arange(32) % 2, 256, 240))


def test_missing_participant_of_a_shuffle():
    body = """
setp.lt.u32 %p1, %r0, 31;
@%p1 shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffffffff;
"""
    error = fails(
        "waits for lane 31, which exited without executing it",
        ptx_kernel(body),
        np.zeros(1, np.int32),
    )
    assert "shfl.sync.bfly.b32 %r1" in error


def test_divergent_participants_of_a_shuffle():
    body = """
setp.lt.u32 %p1, %r0, 16;
@%p1 bra low;
shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xffffffff;
bra done;
low:
shfl.sync.bfly.b32 %r1, %r0, 2, 31, 0xffffffff;
done:
"""
    fails(
        r"divergent lanes: a warp instruction waits for lane \d+, which waits at line",
        ptx_kernel(body),
        np.zeros(1, np.int32),
    )


def test_mask_without_the_lane_itself():
    fails(
        "lane 16 is not in its own mask 0x0000ffff",
        ptx_kernel("vote.sync.any.pred %p1, %p0, 0xffff;"),
        np.zeros(1, np.int32),
    )


def test_shuffle_from_outside_of_the_mask():
    body = """setp.lt.u32 %p1, %r0, 16; @!%p1 bra done;
      shfl.sync.idx.b32 %r1, %r0, 20, 31, 0xffff; done:"""
    fails(
        "shuffle reads lane 20, which is not in the mask", ptx_kernel(body), np.zeros(1, np.int32)
    )


def test_elect():
    body = """
elect.sync %r1|%p1, 0xffffffff;
selp.u32 %r2, 1, 0, %p1;
mad.wide.u32 %rd1, %r0, 4, %rd0;
st.global.u32 [%rd1], %r2;
"""
    x = np.zeros(32, np.int32)
    assert run(ptx_kernel(body), x) is None
    assert x.sum() == 1


def test_lanes_that_spin_on_others_of_their_warp():
    source = """__global__ void k(volatile int* x) {
      if (threadIdx.x == 0) { while (x[1] == 0) {} x[0] = 7; }
      else if (threadIdx.x == 9) { x[1] = 1; }
    }"""
    x = np.zeros(2, np.int32)
    assert run(compile_c(source), x) is None
    assert x[0] == 7


# -- registers ---------------------------------------------------------------------------------

GIVE_AND_TAKE = """
setp.lt.u32 %p1, %r0, 128;
@%p1 bra producer;
setmaxnreg.inc.sync.aligned.u32 232;
bra done;
producer:
setmaxnreg.dec.sync.aligned.u32 24;
done:
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("", "", None),
        ("u32 232", "u32 240", r"deadlock(.|\n)*has 128 registers per thread, and \d+ are free"),
        ("u32 24;", "u32 136;", "setmaxnreg.dec to 136 registers per thread, but its warp has 128"),
        ("u32 232", "u32 120", "setmaxnreg.inc to 120 registers per thread, but its warp has 128"),
        ("u32 24;", "u32 28;", "takes a multiple of 8 from 24 to 256"),
        ("producer:\n", "producer:\nsetp.lt.u32 %p2, %r0, 32; @%p2 bra done;\n",
         "without what warp [123] of its warpgroup executed|warp 0 of its warpgroup has exited"),
        ("done:", "setmaxnreg.dec.sync.aligned.u32 24;\ndone:", "no barrier since that of warp"),
        ("done:", "bar.sync 0;\nsetmaxnreg.dec.sync.aligned.u32 24;\ndone:", None),
    ],
)  # fmt: skip
def test_registers_of_a_block(old, new, message):
    body, limits = GIVE_AND_TAKE.replace(old, new), ".maxntid 256, 1, 1\n.minnctapersm 2"
    for seed in range(4):
        x = np.zeros(1, np.int32)
        if message:
            fails(message, ptx_kernel(body, directives=limits), x, block=256, seed=seed)
        else:
            assert run(ptx_kernel(body, directives=limits), x, block=256, seed=seed) is None


def test_registers_of_no_known_number():
    words = "setmaxnreg in a kernel with neither __launch_bounds__ nor __maxnreg__"
    fails(words, ptx_kernel(GIVE_AND_TAKE), np.zeros(1, np.int32), block=256)
