"""The emulator itself: every rule it enforces fails a broken kernel and passes its correct twin."""

from __future__ import annotations

import re

import emulator
import numpy as np
import pytest

import cuattn

HEAD = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <ptx/cluster.cuh>
#include <ptx/elect.cuh>
#include <ptx/math.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/memory.cuh>
#include <ptx/named_barrier.cuh>
#include <ptx/smem.cuh>
struct Params { float* x; float* y; long long fault; };
__global__ void kernel(const __grid_constant__ Params p) {
  const int t = threadIdx.x;
  const int fault = p.fault;
"""


def run(body, fault=0, *, x=None, y=None, block=64, grid=1, **options):
    """Runs a kernel body on x (64 floats, read) and y (64 floats, written); returns both."""
    x = np.arange(64, dtype=np.float32) if x is None else x
    y = emulator.empty((64,), np.float32) if y is None else y
    counters = emulator.launch_source(
        HEAD + body + "\n}\n",
        "kernel",
        grid,
        block,
        emulator.pack(x, y, fault),
        (x,),
        (y,),
        **options,
    )
    return counters, y


def fails(pattern, body, fault=1, **options):
    """The kernel is fine with fault = 0, and an error that matches and is located with `fault`."""
    run(body, **options)
    with pytest.raises(emulator.EmulatorError, match=pattern) as caught:
        run(body, fault, **options)
    message = str(caught.value)
    assert re.search(r"^kernel kernel, block \(\d, 0, 0\), thread \d+: ", message), message
    return message


# -- block barriers and deadlock -----------------------------------------------------------------


def test_barrier_after_exit():
    fails("exited", "if (fault && t == 5) return;\n__syncthreads();")


def test_barrier_from_two_places():
    body = """
    if (fault && t < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
    """
    message = fails("__syncthreads from two places", body)
    assert re.search(r"source:\d+", message)


def test_deadlock_says_who_waits_where():
    body = "if (fault && t == 40) __syncthreads(); else __syncwarp();\n__syncthreads();"
    message = fails("deadlock|two places", body)
    assert "__syncthreads" in message


def test_barrier_values():
    body = """
    const int any = __syncthreads_or(t == 9), all = __syncthreads_and(t < 64);
    const int count = __syncthreads_count(t % 3 == 0);
    ptx::st_global(p.y + t, float(any + 10 * all + 100 * count));
    """
    counters, y = run(body)
    assert (y == 1 + 10 + 2200).all()
    assert counters.barriers == 3


# -- warp collectives ----------------------------------------------------------------------------

COLLECTIVES = {
    "own mask": ("not in its own mask", "__syncwarp(fault ? 0xfffffffeu : ~0u);"),
    "masks": ("different masks", "__syncwarp(fault && t % 2 ? 0xfffffffeu : ~0u);"),
    "sites": (
        "two warp collectives",
        "float v = t;\nif (fault && t % 32 < 16)\nv = __shfl_xor_sync(~0u, v, 1);\n"
        "else\nv = __shfl_xor_sync(~0u, v, 1);",
    ),
    "exit": ("exited", "if (fault && t == 3) return;\n__syncwarp();"),
    "source not in mask": (
        "not in the mask",
        "if (t < 16) __shfl_sync(0xffff, 1.0f, fault ? 20 : 5);",
    ),
    "source out of range": (
        "lane 8 of a segment of 8",
        "__shfl_sync(~0u, 1.0f, fault ? 8 : 7, 8);",
    ),
    "width": ("power of two", "__shfl_xor_sync(~0u, 1.0f, 1, fault ? 12 : 16);"),
    "offset": ("lane offset", "__shfl_xor_sync(~0u, 1.0f, fault ? 32 : 16);"),
}


@pytest.mark.parametrize("rule", COLLECTIVES)
def test_collective(rule):
    fails(*COLLECTIVES[rule])


def test_mask_of_a_partial_warp():
    body = "__syncwarp(t < 32 || fault ? ~0u : 0xffff);"
    fails("lanes that do not exist", body, block=48)


def test_two_halves_of_a_warp_apart():
    body = """
    float v = t;
    if (t % 32 < 16) v = __shfl_xor_sync(0x0000ffff, v, 1);
    else v = __shfl_xor_sync(0xffff0000, v, 2);
    ptx::st_global(p.y + t, v);
    """
    lanes = np.arange(64)
    np.testing.assert_array_equal(run(body)[1], np.where(lanes % 32 < 16, lanes ^ 1, lanes ^ 2))


@pytest.mark.parametrize("kind", ["float", "double", "int", "long long"])
def test_shuffle_values(kind):
    body = """
    const KIND v = static_cast<KIND>(t) * 3 - 40;
    int i = 0;
    auto put = [&](KIND r) { ptx::st_global(p.y + 32 * i++ + t, float(r)); };
    put(__shfl_sync(~0u, v, 7));
    put(__shfl_sync(~0u, v, t % 8, 8));
    put(__shfl_up_sync(~0u, v, 3));
    put(__shfl_up_sync(~0u, v, 3, 8));
    put(__shfl_down_sync(~0u, v, 5));
    put(__shfl_down_sync(~0u, v, 5, 16));
    put(__shfl_xor_sync(~0u, v, 13));
    put(__shfl_xor_sync(~0u, v, 9, 8));
    """.replace("KIND", kind)
    lane = np.arange(32)
    segment = lane // 8 * 8
    source = [
        np.full(32, 7),
        segment + lane % 8,
        np.where(lane < 3, lane, lane - 3),
        np.where(lane % 8 < 3, lane, lane - 3),
        np.where(lane + 5 > 31, lane, lane + 5),
        np.where(lane % 16 + 5 > 15, lane, lane + 5),
        lane ^ 13,
        np.where((lane ^ 9) >= segment + 8, lane, lane ^ 9),  # only later segments are closed
    ]
    y = emulator.empty((8, 32), np.float32)
    run(body, y=y, block=32)
    np.testing.assert_array_equal(y, np.array(source) * 3 - 40)


def test_votes_and_reductions():
    body = """
    const int v = (t * 37) % 64 - 30;
    float r[6] = {float(__popc(__ballot_sync(~0u, v > 0))), float(__any_sync(~0u, v == 99)),
                  float(__all_sync(~0u, v < 99)), float(__reduce_max_sync(~0u, v)),
                  float(__reduce_min_sync(~0u, v)), float(__reduce_add_sync(~0u, v))};
    if (t == 0) for (int i = 0; i < 6; ++i) ptx::st_global(p.y + i, r[i]);
    """
    counters, y = run(body, block=32)
    v = np.arange(32) * 37 % 64 - 30
    np.testing.assert_array_equal(y[:6], [(v > 0).sum(), 0, 1, v.max(), v.min(), v.sum()])
    assert counters.warp_collectives == 6


ELECT = "ptx::st_global(p.y + t, float(ptx::elect_one() + 10 * ptx::elect_one()));"


def test_elect_one():
    """One lane of a warp, always the same, and any but the first."""
    elected = set()
    for seed in range(8):
        y = run(ELECT, seed=seed)[1].reshape(2, 32)
        assert ((y == 0) | (y == 11)).all() and ((y == 11).sum(axis=1) == 1).all()
        elected.update(y.argmax(axis=1))
    assert 0 not in elected and len(elected) > 4
    with pytest.raises(emulator.EmulatorError, match="elect_one needs sm_90"):
        run(ELECT, arch="sm_80")


def test_elect_one_takes_the_whole_warp():
    fails("exited", "if (fault && t == 40) return;\nptx::elect_one();")
    fails("deadlock|two warp collectives", "if (fault && t % 2) __syncwarp();\nptx::elect_one();")


@pytest.mark.parametrize(
    "call",
    [
        "ptx::elect_one()",
        *(f"__shfl{how}_sync(~0u, t, 1)" for how in ("", "_up", "_down", "_xor")),
        *(f"__{vote}_sync(~0u, t == 3)" for vote in ("ballot", "any", "all")),
        *(f"__reduce_{op}_sync(~0u, t)" for op in ("max", "min", "add")),
    ],
)
def test_only_syncwarp_orders_accesses(call):
    body = f"""
    float* s = ptx::static_smem<float, 64>();
    ptx::st_shared(s + t, 1.0f);
    if (fault) {call}; else __syncwarp();
    ptx::ld_shared(s + (t ^ 1));
    """
    fails("race in shared memory: reads byte .*wrote|never written", body)


# -- global memory -------------------------------------------------------------------------------

GLOBAL = {
    "read past the end": ("4 bytes past|256 bytes past", "ptx::ld_global(p.x + t + fault);"),
    "read before": ("4 bytes before reads", "ptx::ld_global(p.x + t - fault);"),
    "null": ("null pointer", "ptx::ld_global(fault ? (float*)nullptr : p.x);"),
    "read-only": ("is read-only", "ptx::st_global((fault ? p.x : p.y) + t, 1.0f);"),
    "misaligned": (
        "misaligned",
        "if (t < 16) ptx::ld_global(reinterpret_cast<float2*>(p.x + 2 * t + fault));",
    ),
    "poison": (
        "never written",
        "if (!fault) ptx::st_global(p.y + t, 1.0f);\nptx::ld_global(p.y + t);",
    ),
    "written twice": ("written twice", "ptx::st_global(p.y + (fault ? t / 2 : t), 1.0f);"),
    "read of another's": (
        "same launch|never written|race",
        "ptx::st_global(p.y + t, 1.0f);\nptx::ld_global(p.y + (t ^ fault));",
    ),
    "raw pointer": ("other than through", "if (fault) p.y[t] = 1.0f;"),
}


@pytest.mark.parametrize("rule", GLOBAL)
def test_global_memory(rule):
    fails(*GLOBAL[rule])


def test_write_only_buffer_of_the_caller():
    body = "if (fault) ptx::ld_global(p.y + t);"
    fails("only writes", body, y=np.zeros(64, np.float32))


def test_gap_of_a_view():
    base = np.arange(256, dtype=np.float32).reshape(8, 32)
    body = "ptx::ld_global(p.x + t / 8 * 32 + t % 8 + (fault && t == 15));"
    fails("belongs to no element", body, x=base[:, :8])


def test_packed_operands_share_an_allocation():
    qkv = np.arange(192, dtype=np.float32).reshape(64, 3)
    body = "ptx::st_global(p.y + 3 * t, ptx::ld_global(p.x + 3 * t));"
    run(body, x=qkv[:, 0], y=qkv[:, 2])
    np.testing.assert_array_equal(qkv[:, 2], qkv[:, 0])
    with pytest.raises(emulator.EmulatorError, match="read-only"):
        run("ptx::st_global(p.x + 3 * t, 1.0f);", x=qkv[:, 0], y=qkv[:, 2])


def test_workspace_between_launches():
    workspace = emulator.empty((64,), np.float32)
    run("if (t < 32) ptx::st_global(p.y + t, float(t));", y=workspace)
    run("if (t < 32) ptx::ld_global(p.x + t);", x=workspace)
    with pytest.raises(emulator.EmulatorError, match="never written"):
        run("ptx::ld_global(p.x + t);", x=workspace)


def test_in_place_needs_an_order():
    body = """
    const float v = ptx::ld_global(p.x + (t ^ 33));
    if (!fault) __syncthreads();
    ptx::st_global(p.x + t, v);
    """

    def launch(fault):
        x = np.arange(64, dtype=np.float32)
        source = HEAD + body + "}"
        emulator.launch_source(source, "kernel", 1, 64, emulator.pack(x, x, fault), (x,), (x,))
        return x

    np.testing.assert_array_equal(launch(0), np.arange(64) ^ 33)
    with pytest.raises(emulator.EmulatorError, match="race|same launch"):
        launch(1)


def test_atomics():
    body = """
    atomicAdd(p.y, 1.0f);
    atomicMax(reinterpret_cast<int*>(p.y) + 1, t);
    int* s = ptx::static_smem<int, 1>();
    if (t == 0) ptx::st_shared(s, 0);
    __syncthreads();
    atomicAdd(s, t);
    if (!fault) __syncthreads();
    if (t == 0) ptx::st_global(p.y + 2, float(ptx::ld_shared(s)));
    """

    def launch(fault):
        y = np.zeros(64, np.float32)
        source = HEAD + body + "}"
        params = emulator.pack(y, y, fault)
        emulator.launch_source(source, "kernel", 4, 64, params, (y,), (y,))

    with pytest.raises(emulator.EmulatorError, match="written twice"):
        launch(0)  # four blocks store y[2]
    y = np.zeros(64, np.float32)
    source = HEAD + body + "}"
    emulator.launch_source(source, "kernel", 1, 64, emulator.pack(y, y, 0), (y,), (y,))
    assert y[0] == 64 and y.view(np.int32)[1] == 63 and y[2] == 63 * 32
    with pytest.raises(emulator.EmulatorError, match="race"):
        launch(1)


# -- shared memory -------------------------------------------------------------------------------

ARRAY = "float* s = ptx::static_smem<float, 64>();\nptx::st_shared(s + t, float(t));\n"
SHARED = {
    "past the end": ("out of bounds", ARRAY + "ptx::st_shared(s + t + 64 * fault, 1.0f);"),
    "misaligned": (
        "misaligned",
        ARRAY + "__syncthreads();\nif (t < 31) ptx::ld_shared((float2*)(s + 2 * t + fault));",
    ),
    "never written": (
        "never written",
        "float* s = ptx::static_smem<float, 64>();\n"
        "if (!fault || t) ptx::st_shared(s + t, 1.0f);\nptx::ld_shared(s + t);",
    ),
    "read after write": (
        "race in shared memory",
        ARRAY + "__syncthreads();\nptx::st_shared(s + t, 1.0f);\nif (!fault) __syncthreads();\n"
        "ptx::ld_shared(s + 63 - t);",
    ),
    "write after read": (
        "race in shared memory",
        ARRAY + "__syncthreads();\nptx::ld_shared(s + 63 - t);\nif (!fault) __syncthreads();\n"
        "ptx::st_shared(s + t, 1.0f);",
    ),
    "write after write": (
        "race in shared memory",
        ARRAY + "if (!fault) __syncthreads();\nptx::st_shared(s + 63 - t, 1.0f);",
    ),
    "warp": (
        "race in shared memory",
        ARRAY + "__syncwarp();\nptx::st_shared(s + t, 1.0f);\nif (!fault) __syncwarp();\n"
        "ptx::ld_shared(s + (t ^ 1));",
    ),
    "pair of lanes": (
        "race in shared memory",
        ARRAY + "const unsigned pair = 3u << t % 32 / 2 * 2;\n__syncwarp(pair);\n"
        "ptx::st_shared(s + t, 1.0f);\n__syncwarp(pair);\nptx::ld_shared(s + (t ^ 1));\n"
        "__syncwarp(pair);\nif (fault) ptx::st_shared(s + (t ^ 2), 1.0f);",
    ),
    "broadcast then write": (
        "race in shared memory",
        ARRAY + "__syncthreads();\nptx::ld_shared(s);\nif (!fault) __syncthreads();\n"
        "else __syncwarp();\nif (t == 0) ptx::st_shared(s, 1.0f);",
    ),
    "static limit": (
        "48 KiB",
        "if (fault) ptx::static_smem<float, 13000>(); else ptx::static_smem<float, 12000>();",
    ),
}


@pytest.mark.parametrize("rule", SHARED)
def test_shared_memory(rule):
    fails(*SHARED[rule])


@pytest.mark.parametrize("seed", range(5))
def test_deleted_barrier_fails_whatever_the_schedule(seed):
    fails(*SHARED["write after read"], seed=seed)


def test_dynamic_shared_memory():
    body = """
    float* s = ptx::dynamic_smem<float>();
    float* other = ptx::static_smem<float, 64>();
    ptx::st_shared(s + t + (fault ? 1 : 0), float(t));
    ptx::st_shared(other + t, 1.0f);
    ptx::st_global(p.y + t, float(reinterpret_cast<unsigned long long>(s) % 128));
    """
    fails("out of bounds", body, smem_bytes=256)
    assert not run(body, smem_bytes=256)[1].any()
    with pytest.raises(emulator.EmulatorError, match="limit is 166912"):
        run(body, smem_bytes=163 * 1024, arch="sm_80")
    run(body, smem_bytes=226 * 1024)
    with pytest.raises(emulator.EmulatorError, match="bad smem_bytes"):
        run(body, smem_bytes=228 * 1024)


def test_shared_memory_starts_anew_in_every_block():
    body = """
    float* s = ptx::static_smem<float, 1>();
    if (t == 0 && blockIdx.x == 0) ptx::st_shared(s, 1.0f);
    __syncthreads();
    if (blockIdx.x == 0 || fault) ptx::ld_shared(s);
    """
    fails("never written", body, grid=2)


def test_named_barrier():
    body = """
    float* s = ptx::static_smem<float, 32>();
    if (t < 32) {
      ptx::st_shared(s + t, float(t));
      if (fault != 1) ptx::named_barrier_arrive(1, fault == 2 ? 96 : 64);
    } else {
      if (fault != 1) ptx::named_barrier_sync(1, 64);
      ptx::ld_shared(s + 63 - t);
    }
    """
    for fault, pattern in [(1, "race|never written"), (2, "multiple of 32 and at most")]:
        fails(pattern, body, fault)


# -- clusters and mbarriers ----------------------------------------------------------------------

EXCHANGE = """
  unsigned long long* bar = ptx::static_smem<unsigned long long, 1>();
  float* slot = ptx::static_smem<float, 2, 1>();
  const int rank = ptx::cluster_ctarank();
  if (t == 0) {
    if (fault != 1) ptx::mbarrier_init(bar, 1);
    if (fault == 8) ptx::mbarrier_init(bar, 1);
    if (fault != 2) ptx::fence_mbarrier_init();
    if (fault != 1) ptx::mbarrier_arrive_expect_tx(bar, fault == 4 ? 12 : fault == 5 ? 6 : 8);
    if (fault == 6) ptx::mbarrier_arrive_expect_tx(bar, 8);
  }
  if (fault == 14 && t == 7 && rank == 1) return;
  if (fault != 3) {
    if (fault != 12) ptx::cluster_arrive();
    if (fault == 13) ptx::cluster_arrive();
    if (fault != 16) ptx::cluster_wait();
  }
  if (fault == 10 && rank == 1) return;
  if (t < 2) ptx::st_async(slot + rank, float(rank + 1), bar, t);
  if (fault == 15) ptx::ld_shared(slot);
  if (fault == 17) ptx::ld_shared(reinterpret_cast<float*>(bar));
  if (fault != 7 && (fault != 9 || t < 32)) ptx::mbarrier_wait_cluster(bar, fault == 11);
  ptx::st_global(p.y + 2 * rank + t % 2 + 4 * (t / 2), ptx::ld_shared(slot + t % 2));
"""
CLUSTER = {
    1: "before mbarrier_init",
    2: "no fence_mbarrier_init",
    3: "no cluster barrier|no barrier since|before mbarrier_init",
    4: "deadlock.*mbarrier_wait",
    5: "gets 8 bytes in a phase that expects 6",
    6: "more arrivals",
    7: "in flight|never written",
    8: "live mbarrier",
    9: "without having waited|in flight|never written",
    10: "block exited",
    11: "in flight|never written|without having waited",
    12: "cluster_wait without a cluster_arrive",
    13: "two cluster_arrives",
    14: "cluster_arrive|exited",
    15: "in flight|never written|without having waited",
    16: "no cluster barrier|no barrier since|before mbarrier_init|without its cluster_wait",
    17: "part of an mbarrier",
}


@pytest.mark.parametrize("fault", CLUSTER)
def test_cluster(fault):
    y = emulator.empty((128,), np.float32)
    with pytest.raises(emulator.EmulatorError, match=CLUSTER[fault]) as caught:
        run(EXCHANGE, fault, y=y, grid=2, cluster=2)
    assert "kernel kernel, block (" in str(caught.value)


@pytest.mark.parametrize("seed", range(4))
def test_cluster_exchange(seed):
    y = emulator.empty((128,), np.float32)
    counters, _ = run(EXCHANGE, y=y, grid=2, cluster=2, seed=seed)
    np.testing.assert_array_equal(y, np.tile([1, 2], 64))
    assert (counters.cluster_barriers, counters.st_async_bytes) == (1, 16)
    assert counters.mbarrier_waits == 128


def test_clusters_need_sm_90():
    with pytest.raises(emulator.EmulatorError, match="bad cluster"):
        run(EXCHANGE, grid=2, cluster=2, arch="sm_80")
    with pytest.raises(emulator.EmulatorError, match="needs sm_90, but this is sm_80"):
        run(EXCHANGE, arch="sm_80")


def test_full_cluster_of_full_blocks():
    body = """
    float* s = ptx::static_smem<float, 1024>();
    ptx::st_shared(s + t, float(t));
    ptx::cluster_arrive();
    ptx::cluster_wait();
    if (t < 64 && blockIdx.x == 7) ptx::st_global(p.y + t, ptx::ld_shared(s + 1023 - t));
    """
    np.testing.assert_array_equal(run(body, block=1024, grid=8, cluster=8)[1], 1023 - np.arange(64))


RELAXED_HEAD = """
  unsigned long long* bar = ptx::static_smem<unsigned long long, 1>();
  float* s = ptx::static_smem<float, 64, 1>();
  const int rank = ptx::cluster_ctarank();
"""
RELAXED = (
    "if (fault) ptx::cluster_arrive_relaxed(); else ptx::cluster_arrive();\nptx::cluster_wait();\n"
)
SEND = """
  if (t == 0) ptx::mbarrier_init(bar, 1), ptx::fence_mbarrier_init();
  if (t == 0) ptx::mbarrier_arrive_expect_tx(bar, 8);
  {}
  if (t < 2) ptx::st_async(s + rank, float(rank + 1), bar, t);
  ptx::mbarrier_wait_cluster(bar, 0);
  ptx::st_global(p.y + 2 * rank + t % 2 + 4 * (t / 2), ptx::ld_shared(s + t % 2));
"""
STORE, LOAD = "ptx::st_shared(s + t, float(t));\n", "ptx::ld_shared(s + t);\n"
RELAXED_RULES = {
    "written by others before": (
        "race in shared memory: writes byte .*wrote, with no barrier",
        SEND.format(STORE + RELAXED),
    ),
    "read by others before": (
        "race in shared memory: writes byte .*reads, with no barrier",
        SEND.format(STORE + "ptx::cluster_arrive();\nptx::cluster_wait();\n" + LOAD + RELAXED),
    ),
    "within the block": (
        "race in shared memory: reads byte .*wrote, with no barrier",
        STORE + RELAXED + "ptx::st_global(p.y + 64 * rank + t, ptx::ld_shared(s + 63 - t));",
    ),
    "in a part of a warp": (
        "cluster_arrive of some lanes of a warp and cluster_arrive_relaxed of others",
        "if (fault && t > 8) ptx::cluster_arrive_relaxed(); else ptx::cluster_arrive();\n"
        "ptx::cluster_wait();",
    ),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("rule", RELAXED_RULES)
def test_relaxed_arrival_releases_nothing(rule, seed):
    pattern, body = RELAXED_RULES[rule]
    y = emulator.empty((128,), np.float32)
    fails(pattern, RELAXED_HEAD + body, y=y, grid=2, cluster=2, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_relaxed_arrival(seed):
    """An mbarrier has been released by its fence, anything else by the next arrival."""
    y = emulator.empty((128,), np.float32)
    relaxed = "ptx::cluster_arrive_relaxed();\nptx::cluster_wait();\n"
    counters, _ = run(RELAXED_HEAD + SEND.format(relaxed), y=y, grid=2, cluster=2, seed=seed)
    np.testing.assert_array_equal(y, np.tile([1, 2], 64))
    assert counters.cluster_barriers == 1
    run(
        RELAXED_HEAD + SEND.format(STORE + relaxed + relaxed.replace("_relaxed", "")),
        y=y, grid=2, cluster=2, seed=seed,
    )  # fmt: skip
    unfenced = SEND.replace(", ptx::fence_mbarrier_init()", "").format(relaxed)
    with pytest.raises(emulator.EmulatorError, match="no fence_mbarrier_init|no barrier since"):
        run(RELAXED_HEAD + unfenced, y=y, grid=2, cluster=2, seed=seed)
    with pytest.raises(emulator.EmulatorError, match="cluster_arrive needs sm_90"):
        run(relaxed, arch="sm_80")


# -- counters ------------------------------------------------------------------------------------


def test_counters_of_a_coalesced_copy():
    body = """
    const int i = blockIdx.x * 64 + t;
    ptx::st_global((float4*)p.y + i, ptx::ld_global((const float4*)p.x + i));
    """
    x, y = np.ones(1024, np.float32), emulator.empty((1024,), np.float32)
    counters, _ = run(body, x=x, y=y, grid=4)
    assert counters.global_bytes_read == counters.global_bytes_written == 4096
    assert counters.global_sectors_read == counters.global_sectors_written == 128
    assert counters.global_requests == 16
    assert counters.loads_by_size == counters.stores_by_size == {1: 0, 2: 0, 4: 0, 8: 0, 16: 8}
    assert (counters + counters).global_requests == 32
    assert (counters + counters).loads_by_size[16] == 16


def test_counters_of_misaligned_rows():
    base = np.ones(72, np.float32)
    counters, _ = run("ptx::ld_global(p.x + t);", x=base[1:65])
    assert counters.global_sectors_read == 5 + 5  # 4 sectors of data, over 5 boundaries, a warp
    counters, _ = run("ptx::ld_global(p.x + 8 * t);", x=np.ones(512, np.float32))
    assert counters.global_sectors_read == 64


def test_counters_tell_iterations_apart():
    body = "for (int i = 0; i <= t % 3; ++i) ptx::ld_global(p.x + t);"
    assert run(body, block=32)[0].global_requests == 3


def test_counters_tell_calls_of_a_helper_apart():
    """On a GPU each is code of its own, whatever the emulator's compiler inlines."""
    body = """
    const auto load = [&](int i) __attribute__((noinline)) { return ptx::ld_global(p.x + i); };
    float v = 0;
    if (t % 2) {
      v = load(t);
    } else {
      v = load(t) + load(t + 1);
    }
    """
    assert run(body, block=32)[0].global_requests == 3


@pytest.mark.parametrize(
    "access, wavefronts, ideal",
    [
        ("ptx::st_shared(s + t, 1.0f);", 1, 1),
        ("ptx::st_shared(s + 32 * t, 1.0f);", 32, 1),
        ("ptx::st_shared(s + 2 * t, 1.0f);", 2, 1),
        ("ptx::st_shared(s + 33 * t, 1.0f);", 1, 1),
        ("ptx::st_shared((float2*)s + t, float2{1, 1});", 2, 2),
        ("ptx::st_shared((float4*)s + t, float4{1, 1, 1, 1});", 4, 4),
        ("ptx::st_shared((float4*)s + 8 * t, float4{1, 1, 1, 1});", 32, 4),
        ("if (t == 0) ptx::st_shared(s, 1.0f);\n__syncwarp();\nptx::ld_shared(s);", 2, 2),
    ],
)
def test_bank_conflicts(access, wavefronts, ideal):
    counters, _ = run("float* s = ptx::static_smem<float, 1100>();\n" + access, block=32)
    assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (wavefronts, ideal)


# -- arithmetic ----------------------------------------------------------------------------------

CONVERT = """
struct Pointers { const void* x; void* y; };
template <class In, class Out>
__global__ void convert(const __grid_constant__ Pointers p) {
  const long long i = blockIdx.x * 256ll + threadIdx.x;
  const In x = ptx::ld_global(static_cast<const In*>(p.x) + i);
  ptx::st_global(static_cast<Out*>(p.y) + i, FUNCTION(x));
}
"""


def convert(function, in_type, x, out_type, dtype):
    y = emulator.empty(x.shape, dtype)
    head = HEAD[: HEAD.index("struct Params")]
    emulator.launch_source(
        head + CONVERT.replace("FUNCTION", function),
        f"convert<{in_type}, {out_type}>",
        x.size // 256,
        256,
        emulator.pack(x, y),
        (x,),
        (y,),
    )
    return y


def assert_same(got, expected):
    nan = np.isnan(expected.astype(np.float64))
    np.testing.assert_array_equal(np.isnan(got.astype(np.float64)), nan)
    bits = f"u{got.itemsize}"
    np.testing.assert_array_equal(got.view(bits)[~nan], expected.view(bits)[~nan])


SIXTEEN = {"float16": ("__half", "half"), "bfloat16": ("__nv_bfloat16", "bfloat16")}


# NaN and overflow are what these tests are about.
quietly = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


def dtype_16(name):
    return (
        np.dtype(np.float16)
        if name == "float16"
        else np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    )


@quietly
@pytest.mark.parametrize("name", SIXTEEN)
def test_16_bits_to_float(name):
    dtype, (cuda, short) = dtype_16(name), SIXTEEN[name]
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    got = convert(
        f"__{short}2float" if short == "half" else "__bfloat162float", cuda, x, "float", np.float32
    )
    assert_same(got, x.astype(np.float32))


@quietly
@pytest.mark.parametrize("wide", ["float32", "float64"])
@pytest.mark.parametrize("name", SIXTEEN)
def test_rounding_to_16_bits(name, wide):
    dtype, (cuda, short) = dtype_16(name), SIXTEEN[name]
    rng = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32).astype(wide)
    halfway = (every[:-1] + every[1:]) / 2  # ties, subnormal and at the overflow threshold
    x = np.concatenate([every, halfway, np.nextafter(halfway, every.dtype.type(0))])
    x = np.concatenate([x, np.ldexp(rng.standard_normal(2**16), rng.integers(-140, 140, 2**16))])
    x = x[: x.size // 256 * 256].astype(wide)
    if wide == "float32":
        function = "__float2half_rn" if short == "half" else "__float2bfloat16_rn"
        expected = x.astype(dtype)
    else:
        function = f"__double2{short}"
        expected = round_once(x, dtype)
    got = convert(function, "float" if wide == "float32" else "double", x, cuda, dtype)
    assert_same(got, expected)


def round_once(x, dtype):
    """float64 to 16 bits: NumPy's float16 rounds once, ml_dtypes goes through float32."""
    if dtype == np.float16:
        return x.astype(dtype)
    # Round to odd in float32 first, which keeps the second rounding right.
    single = x.astype(np.float32)
    bits = single.view(np.uint32).copy()
    inexact = (single.astype(np.float64) != x) & ~np.isnan(x) & ~np.isinf(x)
    away = inexact & (np.abs(single.astype(np.float64)) > np.abs(x))
    bits[away] -= 1
    bits[inexact] |= 1
    return bits.view(np.float32).astype(dtype)


def test_only_approximations_flush_subnormals():
    tiny = np.float32(1e-40)
    x = np.full(64, tiny)
    _, y = run("ptx::st_global(p.y + t, ptx::ld_global(p.x + t) * 2.0f);", x=x)
    assert (y == tiny * np.float32(2)).all()
    _, y = run("ptx::st_global(p.y + t, ptx::exp2_approx(-126.0f - t % 2));")
    np.testing.assert_array_equal(y, np.where(np.arange(64) % 2, 0, np.float32(2.0**-126)))
    _, y = run("ptx::st_global(p.y + t, ptx::rcp_approx(ldexpf(1.0f, 126 + t % 2)));")
    np.testing.assert_array_equal(y, np.where(np.arange(64) % 2, 0, np.float32(2.0**-126)))
    _, y = run("ptx::st_global(p.y + t, ptx::rcp_approx(ptx::ld_global(p.x + t)));", x=-x)
    assert (y == -np.inf).all()


def test_exponentials_are_counted():
    body = """
    const float e = ptx::exp2_approx(ptx::ld_global(p.x + t) - 1);
    ptx::st_global(p.y + t, e + float(ptx::exp_f64(0)));
    """
    counters, y = run(body)
    assert counters.exps == 128
    np.testing.assert_array_equal(y[:6], 2.0 ** np.arange(-1, 5) + 1)
    _, y = run("ptx::st_global(p.y + t, ptx::exp2_approx(-__int_as_float(0x7f800000)));")
    assert not y.any()


def test_bit_functions():
    body = """
    const unsigned a = 0x12345678, b = 0x9abcdef0;
    const unsigned r[8] = {__funnelshift_r(a, b, 8), __funnelshift_l(a, b, 8),
                           __byte_perm(a, b, 0x5140), unsigned(__clz(a)), unsigned(__ffs(a)),
                           unsigned(__popc(a)), __brev(a), __byte_perm(a, b, 0x000c)};
    if (t < 8) ptx::st_global(reinterpret_cast<unsigned*>(p.y) + t, r[t]);
    """
    expected = [0xF0123456, 0xBCDEF012, 0xDE56F078, 3, 4, 13, 0x1E6A2C48, 0x787878FF]
    assert [hex(v) for v in run(body)[1].view(np.uint32)[:8]] == [hex(v) for v in expected]


# -- launching -----------------------------------------------------------------------------------


def test_parameter_size_is_checked():
    with pytest.raises(emulator.EmulatorError, match="kernel kernel: .* 24 bytes, but 16"):
        emulator.launch_source(HEAD + "}", "kernel", 1, 32, bytes(16))


@pytest.mark.parametrize("bad", [{"block": 1025}, {"grid": 0}, {"grid": 3, "cluster": 2}])
def test_launch_limits(bad):
    with pytest.raises(emulator.EmulatorError, match=f"bad {list(bad)[-1]}"):
        run("", **bad)


def test_compile_error_names_the_kernel():
    with pytest.raises(RuntimeError, match="kernel kernel does not compile"):
        run("undeclared();")


def test_stack_overflow_is_an_error():
    body = (
        "volatile char big[100000];\nfor (int i = 99999; i >= 0; --i) big[fault ? i : 99999] = 1;"
    )
    with pytest.raises(emulator.EmulatorError, match="stack overflow|other than through"):
        run(body, 1)


def test_equal_seeds_run_alike():
    body = "if (t == 0) ptx::st_global(p.y + int(atomicAdd(p.x, 1.0f)), float(blockIdx.x));"

    def order(seed):
        x, y = np.zeros(64, np.float32), emulator.empty((64,), np.float32)
        params = emulator.pack(x, y, 0)
        source = HEAD + body + "}"
        emulator.launch_source(source, "kernel", 64, 32, params, (x,), (x, y), seed=seed)
        return y.tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(2)) == list(range(64))


def test_activate_puts_the_runtime_in_place():
    from cuattn._device import runtime as device_runtime

    before = device_runtime.emulator
    with emulator.activate("sm_80", num_sms=108) as runtime:
        assert device_runtime.emulator is runtime
        assert runtime.xp is np
        assert tuple(runtime.limits(0)) == (80, 108)
        emulator.activate("sm_90a")
        assert device_runtime.emulator.arch == "sm_90a"
        emulator.deactivate()
        assert device_runtime.emulator is runtime
    assert device_runtime.emulator is before


def test_architectures_share_kernels():
    """Shipped kernels ask for the architecture in ptx/ only, so that one library serves all."""
    libraries = []
    for arch in ("sm_80", "sm_90a"):
        with emulator.activate(arch) as runtime:
            cuattn.softmax(np.ones((1, 3), np.float32))
            libraries += map(runtime.library, runtime.kernels)
    assert len(libraries) == 2 and libraries[0] is libraries[1]
    asks = "#if __CUDA_ARCH__ >= 900\n#endif\n__global__ void asks(int) {}\n"
    with pytest.raises(RuntimeError, match="__CUDA_ARCH__"):
        emulator.build.kernel_library(asks, "asks")
    assert emulator.build.kernel_library(asks, "asks", 900).emu_params_size() == 4


def test_addresses_are_aligned_as_on_a_device():
    x = np.zeros((4, 33), np.float32)
    assert emulator.address(x) % 512 == 0
    assert emulator.address(x[1:, 1:]) - emulator.address(x) == 34 * 4
    assert emulator.address(x.T[::-1]) - emulator.address(x) == 32 * 4
