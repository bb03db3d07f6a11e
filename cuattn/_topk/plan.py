"""Which kernels select the k best elements of rows, and why: template arguments, grids, parameters.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._arrays.row_layout import OPERANDS
from cuattn._device.kernel import Kernel, ceil_div
from cuattn._softmax.plan_parts import Parts, geometry
from cuattn._topk import plan_lanes, plan_radix
from cuattn._topk.problem import TopKProblem

# enum TopKOutput; "state" is what merges.
OUTPUTS = {"prob": 0, "log_prob": 1, "logit": 2, "state": 3}


class List(NamedTuple):
    """A sorted list of candidates that a warp keeps in registers."""

    max_k: int
    per_lane: int  # candidates
    why: str


LISTS = (
    List(32, 1, "one per lane: a batch of 32 is merged with 5 exchanges"),
    List(64, 2, "two per lane"),
    List(128, 4, "four per lane; from here on batches are of 64, to merge half as often"),
    List(256, 8, "eight per lane are 16 registers; beyond that a histogram is cheaper than a list"),
)
MAX_LIST = LISTS[-1].max_k

WARPS = 8  # of a block
ITEMS = 16  # elements per thread in registers, and as many in flight
MAX_SMEM = 48 * 1024  # static shared memory
MAX_COLUMNS = 4096  # columns of that length go to lanes only where they occupy the chip
ROWS_PER_SM = 16  # rows that keep a multiprocessor busy with a warp each
CLUSTER_COLS = 1 << 19  # longest row of a cluster: 8 blocks, below 64 K elements each
STATE_WARPS = 32  # of a row in a cluster that keeps a state: lane p % 32 of one warp merges part p
PART_TILES = 2  # of a warp: to merge a state costs 50 instructions, a tile takes 200
MAX_PARTS = 2048
WAVES = 2  # blocks per multiprocessor that a split aims at
MAX_SPLITS = 1024


@dataclass(frozen=True)
class TopKPlan:
    """Launches of one call, in order, each with the end of its parameters.

    Parameters of a launch (_device/params.py): those of the rows (SOFTMAX_HEAD and `geometry`),
    TOPK; by radix also RADIX_WORKSPACE and what comes with the kernel.
    """

    launches: tuple[tuple[Kernel, bytes], ...]
    workspace_bytes: int
    geometry: bytes
    lists_offset: int = 0  # where in the workspace the lists begin, behind the states
    radix: bool = False  # in SoftmaxTopK the state of the rows is an input


@lru_cache(maxsize=4096)
def plan_topk(problem: TopKProblem, compute_capability: int, num_sms: int) -> TopKPlan:
    """Kernels of one call on a device, by k and by the length of rows."""
    if problem.k > MAX_LIST:
        radix = plan_radix.plan_radix(problem, num_sms)
        launches = tuple((launch.kernel, launch.geometry) for launch in radix.launches)
        return TopKPlan(launches, radix.workspace_bytes, geometry(problem.layout), radix=True)
    strided = problem.layout.col_stride[OPERANDS.index("x")] != (1,)
    kernel = plan_lanes.plan_lanes(problem, strided)
    # A few lanes would walk for long. Which kernel adds up a row must not depend on the grid.
    long = strided and problem.layout.cols > MAX_COLUMNS
    if kernel is not None and not (long and (problem.softmax or kernel.grid < num_sms)):
        return TopKPlan(((kernel, b""),), 0, geometry(problem.layout))
    return plan_lists(problem, compute_capability, num_sms)


def plan_lists(problem: TopKProblem, compute_capability: int, num_sms: int) -> TopKPlan:
    """topk_rows: every element is read once."""
    per_lane = next(found.per_lane for found in LISTS if problem.k <= found.max_k)
    vec = problem.vec if problem.layout.col_stride[OPERANDS.index("x")] == (1,) else 1
    fragments = max(1, min(ITEMS, 128 // problem.candidate_bytes) // vec)
    queue_bytes = 32 * (vec * fragments + 2) * problem.candidate_bytes
    warps = WARPS if WARPS * queue_bytes <= MAX_SMEM else WARPS // 2

    rows, cols = problem.layout.rows, problem.layout.cols
    most = cols
    if vec > 1:
        cols, most = problem.fragments * vec, problem.fragments_most * vec
    warp_tile = 32 * vec * fragments
    parts = _parts(ceil_div(cols, warp_tile), warps)
    cluster, splits, warps_per_row, rows_per_block = 1, 1, 1, warps
    if rows < ROWS_PER_SM * num_sms and cols > 2 * warp_tile:
        warps_per_row, rows_per_block = warps, 1
        blocks = ceil_div(most, warps * warp_tile)  # that have a tile for each warp
        if compute_capability >= 90 and cols <= CLUSTER_COLS:
            largest = min(8, warps, STATE_WARPS // warps if problem.softmax else 8)
            while cluster < largest and 2 * cluster * rows <= num_sms and 2 * cluster <= blocks:
                cluster *= 2
            splits = cluster
        else:
            splits = max(1, min(WAVES * num_sms // rows, blocks // 2, MAX_SPLITS))
            splits = min(splits, ceil_div(parts, warps))

    arguments = {
        "Op": problem.op,
        "kWarpsPerRow": warps_per_row,
        "kRowsPerBlock": rows_per_block,
        "kPerLane": per_lane,
        "kVec": vec,
        "kFragments": fragments,
        "kClusterSize": cluster,
    }
    grid = ceil_div(rows, rows_per_block) * splits
    first = Kernel("topk_rows", arguments, grid, 32 * warps, cluster)
    kernels, states, workspace = [first], 0, 0
    if splits > cluster:
        arguments = {"Op": problem.op, "kWarps": WARPS, "kPerLane": per_lane}
        kernels.append(Kernel("topk_merge", arguments, rows, 32 * WARPS))
        states = ceil_div(rows * parts * problem.state_bytes, 16) * 16
        workspace = states + rows * splits * problem.k * problem.candidate_bytes
    return TopKPlan(
        tuple((kernel, b"") for kernel in kernels),
        workspace,
        geometry(problem.layout, Parts(parts, 0, splits)),
        states,
    )


def _parts(tiles: int, warps: int) -> int:
    """Parts of a row, from its length alone.

    A part for each warp of a block, where there are as many tiles; then of PART_TILES tiles.
    """
    return min(tiles, MAX_PARTS, max(warps, tiles // PART_TILES // warps * warps))
