"""The emulator's count of what a warp executes: `Counters.cost`."""

from __future__ import annotations

import dataclasses
import importlib.util

import emulator
import numpy as np
import pytest
from test_emulator import run

import cuattn


def cost(body, fault=0, **options):
    """Cost of one warp that runs a kernel body, which may write p.y + t."""
    return run(body, fault, **{"block": 32, "profile": True, **options})[0].cost


LOOP = """
float v = t;
for (int i = 0; i < fault; ++i) v = v * 1.5f + i;
ptx::st_global(p.y + t, v);
"""


def test_a_loop_costs_linearly():
    costs = np.array([cost(LOOP, n) for n in (100, 200, 300, 1000)])
    step = costs[1] - costs[0]
    assert step > 100  # bytes of code in 100 iterations
    np.testing.assert_array_equal(costs - costs[0], [0, step, 2 * step, 9 * step])


def test_cost_is_of_warps_not_of_threads():
    one = cost(LOOP, 10)
    assert cost(LOOP, 10, block=1) == one
    assert cost(LOOP, 10, block=33) == cost(LOOP, 10, block=64) == 2 * one
    # Each lane has a number of iterations of its own.
    body = LOOP.replace("i < fault", "i < (fault < 0 ? 100 * t : fault)")
    assert cost(body, -1) == pytest.approx(cost(body, 3100), rel=0.05)


# 100 iterations, so that the conditions themselves cost next to nothing.
BRANCHES = """
float v = t;
const int n = fault > 1000 ? 0 : 100;
if (fault == 0 || t == fault || (fault == -1 && t % 2)) {
  for (int i = 0; i < n; ++i) v = v * 1.5f + i;
} else if (SECOND) {
  for (int i = 0; i < n; ++i) v = i - v / (v + 2.0f);
}
ptx::st_global(p.y + t, v);
"""


def test_divergent_branches_cost_their_sum():
    body = BRANCHES.replace("SECOND", "fault > -3")
    all_first, all_second, neither = cost(body, 0), cost(body, -2), cost(body, -3)
    assert min(all_first, all_second) > 5 * neither
    both = all_first + all_second - neither
    assert [cost(body, 5), cost(body, -1)] == pytest.approx([both, both], rel=0.05)


def test_a_branch_of_one_lane_costs_as_much_as_of_all():
    body = BRANCHES.replace("SECOND", "false")
    everyone, one, nobody = cost(body, 0), cost(body, 7), cost(body, -2)
    assert one == pytest.approx(everyone, rel=0.05)
    assert everyone > 5 * nobody


def test_lanes_run_together_only_until_they_meet():
    """Lane i takes its turn in iteration i; the others wait for it, or go on."""
    body = """
    float v = t;
    for (int i = 0; i < 32; ++i) {
      if (t == i) for (int j = 0; j < fault % 1000; ++j) v = v * 1.5f + j;
      if (fault > 1000) __syncwarp();
    }
    ptx::st_global(p.y + t, v);
    """
    turn = (cost(body, 200) - cost(body, 100)) / 100
    assert cost(body, 1200) - cost(body, 1100) == pytest.approx(32 * 100 * turn)


def test_cost_repeats_whatever_the_schedule():
    body = """
    float v = t;
    for (int i = 0; i < t % 7; ++i) v = v * 1.5f + i;
    __syncthreads();
    if (t % 3) v = v * v + ptx::ld_global(p.x + t);
    if (t % 4) v += __shfl_sync(0xeeeeeeee, v, 3, 4);
    ptx::st_global(p.y + t, __reduce_max_sync(~0u, t) + v);
    """
    assert len({cost(body, block=64, seed=seed) for seed in (0, 0, 1, 2, 3)}) == 1


def test_a_launch_that_failed_leaves_nothing_behind():
    body = "for (int i = 0; i < 50; ++i) __syncwarp(i == 49 && fault && t == 5 ? 1u : ~0u);"
    before = cost(body)
    with pytest.raises(emulator.EmulatorError, match="not in its own mask"):
        cost(body, 1)
    assert cost(body) == before


def test_without_a_profile_there_is_no_cost_and_nothing_else_changes():
    plain, y = run(LOOP, 10)
    profiled, y_profiled = run(LOOP, 10, profile=True)
    assert plain.cost == 0 < profiled.cost
    assert dataclasses.replace(profiled, cost=0) == plain
    np.testing.assert_array_equal(y, y_profiled)


def test_profile_of_the_public_api():
    x = np.random.default_rng(0).standard_normal((64, 1000), dtype=np.float32)
    results, totals = [], []
    for profile in (False, True):
        with emulator.activate(profile=profile) as runtime:
            results.append(cuattn.softmax(x))
            totals.append(runtime.total())
            runtime.clear()
            cuattn.softmax(np.concatenate([x, x]))
            assert runtime.total().cost == 2 * totals[-1].cost
    np.testing.assert_array_equal(*results)
    assert totals[0].cost == 0 < totals[1].cost
    assert dataclasses.replace(totals[1], cost=0) == totals[0]


def test_a_compiler_without_coverage_is_named():
    with pytest.raises(RuntimeError, match="profile=True needs a compiler.* false has none"):
        emulator.build.coverage_flags(("false",))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="no ziglang")
def test_the_compiler_of_the_ziglang_wheel():
    """All of it in one test: the first use of that compiler takes minutes."""
    compiler = emulator.build.zig_compiler()
    body = """
    __syncthreads();
    ptx::st_global(p.y + t, __shfl_xor_sync(~0u, ptx::ld_global(p.x + t), 1));
    """
    _, y = run(body, compiler=compiler)
    np.testing.assert_array_equal(y, np.arange(64) ^ 1)
    costs = [cost(LOOP, n, compiler=compiler) for n in (10, 1000, 2000)]
    assert costs[2] - costs[1] == pytest.approx(costs[1] - costs[0], rel=0.05)
    assert cost(LOOP, 10, compiler=compiler, profile=False) == 0
