"""Order between the blocks of a launch on the emulator: arrivals at counters, what they release."""

from __future__ import annotations

import emulator
import numpy as np
import pytest

BLOCKS, THREADS = 3, 64
HEAD = """
#include <ptx/atomic.cuh>
#include <ptx/memory.cuh>
#include <ptx/smem.cuh>
struct Params { float* parts; unsigned int* counters; float* out; };
__global__ void kernel(const __grid_constant__ Params p) {
  const int t = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  float* const mine = p.parts + 64 * block;
"""
# Each block writes a part, the last one adds them up.
SUM = """
  ptx::st_global(mine + t, float(10 * block + t));
  const bool last = ptx::arrive_is_last(p.counters, blocks);
  if (last) {
    float sum = 0;
    for (int i = 0; i < blocks; ++i) sum += ptx::ld_global_cg(p.parts + 64 * i + (t ^ 33));
    ptx::st_global(p.out + t, sum);
  }
"""
ARRIVES = "ptx::arrive_is_last(p.counters, blocks)"
# The same decision without an order: whether the block is the last to run.
UNORDERED = "__syncthreads_or(t == 0 && atomicAdd(p.counters + 7, 1u) == blocks - 1u)"
STORE = "ptx::st_global(mine + t, float(10 * block + t));"
READ = "ptx::ld_global_cg(p.parts + 64 * i + (t ^ 33))"
LATE = "  const bool last = ptx::arrive_is_last(p.counters, blocks);\n"
OUT = "ptx::st_global(p.out + t, sum);"


def run(body, grid=BLOCKS, *, parts=None, counters=None, **options):
    """The result, the counters in memory afterwards, and what the launch cost."""
    if parts is None:
        parts = emulator.empty((64 * (grid + 1),), np.float32)
    counters = np.zeros(8, np.uint32) if counters is None else counters
    out = emulator.empty((64,), np.float32)
    both = (parts, counters)
    cost = emulator.launch_source(
        HEAD + body + "}",
        "kernel",
        grid,
        THREADS,
        emulator.pack(parts, counters, out),
        both,
        (*both, out),
        **options,
    )
    return out, counters, cost


def sums(grid=BLOCKS):
    return sum(10 * block + (np.arange(64) ^ 33) for block in range(grid))


@pytest.mark.parametrize("seed", range(6))
def test_last_block_reads_what_all_wrote(seed):
    """On one workspace again and again: the counter is 0 after each launch."""
    parts, counters = emulator.empty((256,), np.float32), np.zeros(8, np.uint32)
    for launch in range(3):
        out, _, cost = run(SUM, parts=parts, counters=counters, seed=10 * seed + launch)
        np.testing.assert_array_equal(out, sums())
        assert not counters.any()
    assert cost.barriers == 2 * BLOCKS
    assert cost.loads_by_size == {1: 0, 2: 0, 4: 2 * BLOCKS, 8: 0, 16: 0}
    assert cost.global_bytes_read == 4 * 64 * BLOCKS


@pytest.mark.parametrize("seed", range(4))
def test_blocks_of_clusters_take_turns(seed):
    out, _, _ = run(SUM, 4, cluster=2, seed=seed)
    np.testing.assert_array_equal(out, sums(4))


@pytest.mark.parametrize("kind", ["float2", "float4"])
def test_wide_loads(kind):
    body = SUM.replace(
        READ, f"ptx::ld_global_cg(reinterpret_cast<const {kind}*>(p.parts + 64 * i) + t % 16).y"
    )
    out, _, cost = run(body)
    width = int(kind[-1])
    np.testing.assert_array_equal(out, 30 + 3 * (np.arange(64) % 16 * width + 1))
    assert cost.loads_by_size[4 * width] == 2 * BLOCKS


# The first warp arrives for both, the other one goes its own way.
WARP = SUM.replace(ARRIVES, "t < 32 && ptx::arrive_is_last(p.counters, blocks, 1, 32)")


@pytest.mark.parametrize("seed", range(4))
def test_some_threads_arrive(seed):
    out, _, cost = run(WARP.replace("t ^ 33", "t ^ 1"), seed=seed)
    np.testing.assert_array_equal(out[:32], sum(10 * b + (np.arange(32) ^ 1) for b in range(3)))
    assert cost.barriers == 0


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("t ^ 33", "t ^ 33", r"which thread \d\d of block \d wrote .* and has not released since"),
        ("t < 32", "t >= 32", "arrives at a counter, which is for the first 32 threads"),
        ("blocks, 1, 32", "blocks, 16, 32", "named barrier 16"),
        ("1, 32)", "1, t < 32 ? 32 : 64)", None),
        (
            "1, 32)",
            "1, 32) && ptx::arrive_is_last(p.counters + 1, 1, 1, 64)",
            "before there were 32",
        ),
    ],
    ids=["others wrote it", "others arrive", "no such barrier", "as before", "more of them"],
)
def test_faults_where_some_threads_arrive(old, new, error):
    assert WARP.count(old) == 1
    body = WARP.replace(old, new)
    if error is None:
        run(body.replace("t ^ 33", "t"))
        return
    with pytest.raises(emulator.EmulatorError, match=error):
        run(body)


def test_loads_of_2_bytes_do_not_compile():
    with pytest.raises(RuntimeError, match="4, 8 or 16 bytes"):
        run("ptx::ld_global_cg(reinterpret_cast<const short*>(p.parts));")


# What becomes what in SUM, and the error. The order of blocks is random, the error is not.
FAULTS = {
    "no release": (ARRIVES, UNORDERED, "wrote in the same launch and has not released since, at"),
    "plain load": ("ld_global_cg", "ld_global", "wrote in the same launch, at source"),
    "acquire at another counter": (
        ARRIVES,
        f"(ptx::arrive_is_last(p.counters + block, 1), {UNORDERED})",
        "wrote in the same launch and released at no counter where this block was the last",
    ),
    "read before the acquire": (
        LATE,
        f"if ({UNORDERED}) ptx::ld_global_cg(p.parts + 64 * ((block + 1) % blocks) + t);\n" + LATE,
        "wrote in the same launch and released at no counter where this block was the last",
    ),
    "write after the release": (
        LATE,
        LATE + STORE,
        "wrote in the same launch and has not released since",
    ),
    "write of one thread after the release": (
        LATE,
        LATE + "if (t == 63 && !last) ptx::st_global(mine + t, 1.0f);",
        r"thread 63 of block \d wrote in the same launch and has not released since",
    ),
    "part that nobody wrote": (
        "i < blocks",
        "i <= blocks",
        r"ld_global_cg of byte \d+ of .*, which nothing has written in this launch",
    ),
    "count too small": (ARRIVES, ARRIVES.replace("blocks", "blocks - 1"), "nothing has written in"),
    "count too large": (
        ARRIVES,
        ARRIVES.replace("blocks", "blocks + 1"),
        "kernel: the launch leaves a counter at 3, of arrivals of 4: it must end at 0, at source",
    ),
    "count of nothing": (ARRIVES, ARRIVES.replace("blocks", "0"), "an arrival of 0 at a counter"),
    "counts that differ": (
        ARRIVES,
        ARRIVES.replace("blocks", "blocks + (block == 1)"),
        r"an arrival of \d at a counter, but the others there are of \d",
    ),
    "arrival of one more": (
        OUT,
        OUT + "}\n{ ptx::arrive_is_last(p.counters, blocks);",
        "nothing has written in this launch",
    ),
    "threads that do not arrive": (ARRIVES, f"(t < 32 && {ARRIVES})", "exited"),
    "counter in shared memory": (
        ARRIVES,
        "ptx::arrive_is_last(ptx::static_smem<unsigned int, 1>(), blocks)",
        "out of bounds",
    ),
    "counter that is written": (
        ARRIVES,
        f"({ARRIVES} && (t != 0 || (ptx::st_global(p.counters, 0u), true)))",
        "plain write to .* after an atomic one",
    ),
    "write by the last where others wrote": (
        OUT,
        OUT + "ptx::st_global(p.parts + 64 * ((block + 1) % blocks) + t, 0.0f);",
        "is written twice",
    ),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", FAULTS)
def test_fault(fault, seed):
    old, new, message = FAULTS[fault]
    assert SUM.count(old) == 1
    with pytest.raises(emulator.EmulatorError, match=message):
        run(SUM.replace(old, new), seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_write_by_the_last_where_others_read(seed):
    """In order, but of the readers of a byte only the last is known: it is refused."""
    body = "ptx::ld_global(p.parts + 64 * blocks + t);\n" + SUM
    run(body, parts=np.ones(256, np.float32), seed=seed)
    body = body.replace(OUT, OUT + "ptx::st_global(p.parts + 64 * blocks + (t ^ 1), sum);")
    with pytest.raises(emulator.EmulatorError, match="race: writes byte .* another thread reads"):
        run(body, parts=np.ones(256, np.float32), seed=seed)


def test_counters_that_nobody_set_to_0():
    with pytest.raises(emulator.EmulatorError, match="atomic update of .* never written"):
        run(SUM, counters=emulator.empty((8,), np.uint32))


def test_stale_parts_of_an_earlier_launch():
    """They have values, but not of this launch."""
    parts = np.ones(64 * (BLOCKS + 1), np.float32)
    with pytest.raises(emulator.EmulatorError, match="nothing has written in this launch"):
        run(SUM.replace("i < blocks", "i <= blocks"), parts=parts)


ROUNDS = "if (ptx::arrive_is_last(p.counters, 3)) ptx::st_global(p.out + t, float(block));"


def test_counter_that_does_not_start_at_0_counts_as_the_instruction():
    """From 5, beyond the end, the first arrival goes back to 0; only three more make a last one."""
    out, counters, _ = run(ROUNDS, 4, counters=np.full(8, 5, np.uint32))
    assert counters[0] == 0 and (out == out[0]).all() and out[0] in range(4)
    with pytest.raises(emulator.EmulatorError, match="leaves a counter at 2, of arrivals of 3"):
        run(ROUNDS, 3, counters=np.full(8, 5, np.uint32))
    with pytest.raises(emulator.EmulatorError, match=r"where block \d was the last"):
        run(ROUNDS, 3, counters=np.full(8, 1, np.uint32))


@pytest.mark.parametrize("seed", range(3))
def test_counter_that_others_use_again(seed):
    """Two pairs of blocks at one counter: in another order a pair would see half of the other."""
    body = "ptx::arrive_is_last(p.counters, 2);"
    for begins_again in (body, f"if ({body[:-1]}) {body}"):
        with pytest.raises(emulator.EmulatorError, match=r"block \d was the last, and does not"):
            run(begins_again, 4, seed=seed)


def test_block_that_was_the_last_may_use_it_again():
    run("for (int i = 0; i < 3; ++i) ptx::arrive_is_last(p.counters + block, 1);")


@pytest.mark.parametrize("seed", range(4))
def test_block_may_arrive_for_each_of_its_parts(seed):
    """Six parts, of which a block has two, written before either arrival or between them."""
    body = """
    bool last = false;
    for (int part = 2 * block; part < 2 * block + 2; ++part) {
      ptx::st_global(p.parts + 32 * part + t % 32 + (t / 32) * 192, float(part));
      last = ptx::arrive_is_last(p.counters, 6);
    }
    float sum = 0;
    if (last) {
      for (int part = 0; part < 6; ++part) sum += ptx::ld_global_cg(p.parts + 32 * part + t % 32);
      ptx::st_global(p.out + t, sum);
    }
    """
    parts = emulator.empty((384,), np.float32)
    assert (run(body, parts=parts, seed=seed)[0] == 15).all()


@pytest.mark.parametrize("seed", range(4))
def test_order_of_two_levels(seed):
    """The last of the lasts reads what they had acquired, but nothing that is written later."""
    body = """
    ptx::st_global(mine + t, float(block));
    if (ptx::arrive_is_last(p.counters + 1 + block / 2, 2) && ptx::arrive_is_last(p.counters, 2)) {
      float sum = 0;
      for (int i = 0; i < 4; ++i) sum += ptx::ld_global_cg(p.parts + 64 * i + 63 - t);
      ptx::st_global(p.out + t, sum);
    }
    """
    assert (run(body, 4, seed=seed)[0] == 6).all()
    late = body + "else ptx::st_global(mine + t, 9.0f);"
    with pytest.raises(emulator.EmulatorError, match="has not released since"):
        run(late, 4, seed=seed)


def test_order_of_blocks_decides_nothing():
    """The bits of a sum in the order of parts are the same whoever is the last."""
    body = SUM.replace("float(10 * block + t)", "1.0f / float(3 * block + t + 1)")
    results = {run(body, 7, seed=seed)[0].tobytes() for seed in range(5)}
    assert len(results) == 1
