"""Plans of selections cover every row, and stay inside the limits of every device.

Pure Python: sizes in, launches out. Plans of single kernels: test_lanes.py, test_radix.py.
"""

from __future__ import annotations

import pytest
from configurations import SMS, selection, topk_problems

from cuattn._device.params import softmax_geometry
from cuattn._topk import plan as topk_plan
from cuattn._topk import plan_radix
from cuattn._topk.problem import TopKProblem

CAPABILITIES = (75, 80, 90, 120)
SMEM = 48 * 1024
PROBLEMS = list(topk_problems())


def check_launch(kernel, capability):
    assert 1 <= kernel.grid < 2**31
    assert 0 < kernel.block <= 1024 and kernel.block % 32 == 0
    assert 1 <= kernel.cluster <= 8 and kernel.grid % kernel.cluster == 0
    assert kernel.cluster == 1 or capability >= 90


def check_lists(problem, plan, kernels):
    """topk_rows: blocks for all rows, a tile for each part; the queues fit."""
    rows, cols = problem.layout.rows, problem.layout.cols
    sizes = kernels[0].arguments
    warps_per_row, rows_per_block = sizes["kWarpsPerRow"], sizes["kRowsPerBlock"]
    per_lane, vec, fragments = sizes["kPerLane"], sizes["kVec"], sizes["kFragments"]
    warps, cluster = warps_per_row * rows_per_block, sizes["kClusterSize"]
    assert vec == (problem.vec if problem.layout.col_stride[0] == (1,) else 1)
    tile = 32 * vec * fragments
    geometry = softmax_geometry(len(problem.layout.row_size), 1).unpack(plan.geometry)
    splits, parts = geometry["splits"], geometry["parts"]
    assert kernels[0].block == 32 * warps and kernels[0].cluster == cluster
    assert kernels[0].grid == -(-rows // rows_per_block) * splits
    assert 32 * per_lane >= problem.k
    assert (parts - 1) * tile < cols  # each has a first tile
    if problem.softmax:  # lane p % 32 of one warp merges part p
        assert splits > cluster or 32 % (warps_per_row * splits) == 0
    if splits > cluster:
        assert (splits - 1) * warps_per_row < parts
    batch = 1 if per_lane < 4 else 2
    assert vec * fragments + batch >= per_lane
    queues = warps * 32 * (vec * fragments + batch) * problem.candidate_bytes
    assert queues + 32 * 8 <= SMEM
    if splits == cluster:
        assert len(kernels) == 1 and plan.workspace_bytes == 0
        return
    assert cluster == 1 and kernels[1].template == "topk_merge"
    merge_warps = kernels[1].arguments["kWarps"]
    assert (kernels[1].grid, kernels[1].block) == (rows, 32 * merge_warps)
    assert kernels[1].arguments["kPerLane"] == per_lane
    assert merge_warps * 32 * per_lane * problem.candidate_bytes <= SMEM
    lists = rows * splits * problem.k * problem.candidate_bytes
    assert plan.lists_offset % 16 == 0
    assert plan.lists_offset >= rows * parts * problem.state_bytes
    assert plan.workspace_bytes == plan.lists_offset + lists


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("num_sms", [1, 16, SMS])
def test_every_plan_covers(capability, num_sms):
    headers = set()
    for problem in PROBLEMS:
        plan = topk_plan.plan_topk(problem, capability, num_sms)
        kernels = [kernel for kernel, _ in plan.launches]
        headers |= {kernel.header for kernel in kernels}
        for kernel in kernels:
            check_launch(kernel, capability)
        assert plan.radix == (problem.k > topk_plan.MAX_LIST)
        if kernels[0].header == "topk/rows.cuh":
            check_lists(problem, plan, kernels)
    assert {"topk/lanes.cuh", "topk/rows.cuh", "topk/filter.cuh", "topk/sort.cuh"} <= headers


# rows, columns, k, compute capability: kernels, and what stands behind the op of the first.
@pytest.mark.parametrize(
    ("rows", "cols", "k", "capability", "templates", "shape"),
    [
        (10**5, 5000, 5, 80, ["topk_rows"], (1, 8, 1, 4, 4, 1)),
        (64, 5000, 50, 80, ["topk_rows"], (8, 1, 2, 4, 4, 1)),
        (64, 5000, 100, 90, ["topk_rows"], (8, 1, 4, 4, 4, 2)),
        (1, 50_257, 5, 90, ["topk_rows"], (8, 1, 1, 4, 4, 8)),
        (1, 50_257, 256, 80, ["topk_rows", "topk_merge"], (8, 1, 8, 4, 4, 1)),
        (1, 10**7, 5, 90, ["topk_rows", "topk_merge"], (8, 1, 1, 4, 4, 1)),
        (4000, 100_000, 5, 90, ["topk_rows"], (1, 8, 1, 4, 4, 1)),
        (10, 100_000, 5, 90, ["topk_rows"], (8, 1, 1, 4, 4, 8)),
        (5, 600, 9, 90, ["topk_rows"], (1, 8, 1, 4, 4, 1)),
    ],
)
def test_regimes(rows, cols, k, capability, templates, shape):
    problem = TopKProblem("float32", selection(rows, cols), k)
    plan = topk_plan.plan_topk(problem, capability, SMS)
    assert [kernel.template for kernel, _ in plan.launches] == templates
    _, *sizes = plan.launches[0][0].arguments.values()
    assert tuple(sizes) == shape


def test_a_row_beyond_32_bits_has_wide_candidates():
    for cols, narrow in ((2**32 - 2, True), (2**32 - 1, False)):
        problem = TopKProblem("float32", selection(1, cols), 5)
        assert problem.narrow is narrow
        assert problem.op.arguments["Candidate_"] == f"{'Narrow' if narrow else 'Wide'}Candidate"
        check_lists(problem, plan := _plan_topk_of(problem), [k for k, _ in plan.launches])


def _plan_topk_of(problem):
    topk_plan.plan_topk.cache_clear()
    return topk_plan.plan_topk(problem, 90, SMS)


def test_few_long_columns_are_split():
    """A lane would walk over millions of elements alone."""
    many = TopKProblem("float32", selection(10**5, 10**4, axis=0), 5)
    few = TopKProblem("float32", selection(10**6, 2, axis=0), 5)
    for problem, header in ((many, "topk/lanes.cuh"), (few, "topk/rows.cuh")):
        plan = topk_plan.plan_topk(problem, 90, SMS)
        assert plan.launches[0][0].header == header
    assert plan.launches[0][0].grid > SMS // 2


def test_lists_have_a_reason():
    mosts = [most for most, _, why in topk_plan.LISTS if why]
    assert mosts == [32, 64, 128, 256] and topk_plan.MAX_LIST == 256
    assert all(32 * per_lane == most for most, per_lane, _ in topk_plan.LISTS)
    assert plan_radix.RUNS[-1][0] >= topk_plan.MAX_LIST
