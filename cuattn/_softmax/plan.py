"""From sizes and device limits to kernels: template arguments, grids and the bytes of their
parameters.

Plain integers in, frozen dataclasses out; nothing here knows an array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div, power_of_two
from cuattn._softmax.plan_parts import Parts, geometry, lanes_of, parts_of_row
from cuattn._softmax.plan_with_state import plan_with_state
from cuattn._softmax.problem import SoftmaxProblem

# Register words (4 bytes) that a thread may hold of a row. 32 leave room for two blocks of 512
# threads per SM, so that one loads while the other stores; 64 are the most that compile without
# spills, for rows that fit in no other way.
WORDS = 32
MAX_WORDS = 64


class Resident(NamedTuple):
    """How whole blocks hold a row in registers."""

    threads: int
    words: int  # of a thread
    cluster: int  # blocks that share the row
    capability: int  # at least
    why: str  # with the longest row


RESIDENT = (
    Resident(128, WORDS, 1, 0, "4 K float32: short rows want many blocks per SM"),
    Resident(256, WORDS, 1, 0, "8 K"),
    Resident(512, WORDS, 1, 0, "16 K: two such blocks fill the registers of an SM"),
    Resident(512, WORDS, 2, 90, "32 K: two blocks per SM overlap load and store; one would not"),
    Resident(512, MAX_WORDS, 1, 0, "32 K without clusters: one block per SM, but one read"),
    Resident(512, WORDS, 4, 90, "64 K"),
    Resident(512, WORDS, 8, 90, "128 K: 8 blocks are the largest portable cluster"),
    Resident(512, MAX_WORDS, 8, 90, "256 K: the last row that is read once"),
)


class Strided(NamedTuple):
    """How a block walks along the columns of a few neighbouring rows."""

    threads: int
    items: int  # elements that a thread holds
    why: str


STRIDED = (
    Strided(32, 8, "a warp: 8 columns of 32 rows, or 256 of one"),
    Strided(128, 16, "64 columns of 32 rows"),
    Strided(512, 16, "256 columns of 32 rows; beyond that all but the first 256 are read twice"),
)


class Segments(NamedTuple):
    """How a block takes ragged rows, by twice their mean length."""

    warps: int  # of a block
    why: str


# A row that is longer than what a warp holds is shared by 8 warps, or by fewer that take several
# shares each.
SEGMENTS = (
    Segments(1, "a warp holds 256 columns, or 8 of 32 rows"),
    Segments(4, "1024: half the warps that share a longer row"),
    Segments(8, "all of them; beyond 2048 all but the first tile of each is read twice"),
)
SEGMENT_WORDS = 8  # register words of row elements that a thread holds

SPLIT_THREADS = 256
MERGE_ROWS = 4  # warps, one per row, in a block of softmax_merge
STATE_MERGE_THREADS = 128


@dataclass(frozen=True)
class SoftmaxPlan:
    """Launches of one call, in order; all take the same parameters: SOFTMAX_HEAD, then
    `geometry` (_device/params.py)."""

    kernels: tuple[Kernel, ...]
    workspace_bytes: int
    geometry: bytes


@lru_cache(maxsize=4096)
def plan_softmax(problem: SoftmaxProblem, compute_capability: int, num_sms: int) -> SoftmaxPlan:
    """Kernels for one call on a device: compute capability (90 for sm_90), multiprocessors."""
    if problem.offsets is not None:
        return _plan_segments(problem)
    if problem.state is not None:
        kernel, fixed = plan_with_state(problem)
        return SoftmaxPlan((kernel,), 0, fixed)
    if not problem.rows_are_vectors:
        return _plan_strided(problem, num_sms)
    if problem.reduces:
        return _plan_split(problem, num_sms)
    resident = _plan_resident(problem, compute_capability, num_sms)
    return resident or _plan_split(problem, num_sms)


@lru_cache(maxsize=4096)
def plan_state_merge(acc: str, n: int, logits: bool = False) -> Kernel:
    """Kernel that merges `n` pairs of states."""
    arguments = {"Acc": CTYPES[acc], "kLogits": logits, "kThreads": STATE_MERGE_THREADS}
    grid = ceil_div(n, STATE_MERGE_THREADS)
    return Kernel("softmax_state_merge", arguments, grid, STATE_MERGE_THREADS)


def _plan_resident(
    problem: SoftmaxProblem, compute_capability: int, num_sms: int
) -> SoftmaxPlan | None:
    """softmax_rows, where a row fits into the registers of a warp, a block or a cluster.

    The threads of a row, and so the order of its sum, depend on its length alone; where it starts
    at any element, they hold a fragment more.
    """
    threads, rows_per_block, fragments, cluster = 0, 1, 0, 1
    if problem.fragments <= _warp_fragments(problem) * 32:
        threads, rows_per_block, fragments = _part_of_a_warp(problem)
    else:
        for threads, words, cluster, capability, _ in RESIDENT:
            wide = problem.masked or problem.acc == "float64" or ITEMSIZE[problem.x] == 8
            if words == MAX_WORDS and wide:
                continue  # masks and 8-byte elements take the registers that 64 words leave
            fragments = words // problem.words // problem.vec
            if (
                compute_capability >= capability
                and problem.fragments <= threads * fragments * cluster
            ):
                break
        else:
            return None
        if problem.fragments_most > threads * fragments * cluster:
            if words == MAX_WORDS and problem.result == "log_prob":
                return None  # the one that would spill
            fragments += 1
        # Few rows: smaller blocks in larger clusters hold as much, on more SMs.
        blocks = problem.layout.rows * cluster
        while compute_capability >= 90 and 2 * blocks <= num_sms and threads > 128 and cluster < 8:
            threads, cluster, blocks = threads // 2, 2 * cluster, 2 * blocks
    arguments = {
        "Op": problem.op,
        "kThreadsPerRow": threads,
        "kRowsPerBlock": rows_per_block,
        "kFragments": fragments,
        "kClusterSize": cluster,
    }
    grid = ceil_div(problem.layout.rows, rows_per_block) * cluster
    kernel = Kernel("softmax_rows", arguments, grid, threads * rows_per_block, cluster)
    return SoftmaxPlan((kernel,), 0, geometry(problem.layout))


def _warp_fragments(problem: SoftmaxProblem) -> int:
    """Most fragments a lane holds of a row of one warp: 32 words, but 64 elements of 16 bits."""
    return max(
        1,
        WORDS
        * (2 if problem.vec == 8 and not problem.masked else 1)
        // problem.words
        // problem.vec,
    )


def _part_of_a_warp(problem: SoftmaxProblem) -> tuple[int, int, int]:
    """For rows of at most a warp: threads per row, rows per block of 128 threads, fragments per
    thread.

    8 lanes move 128 bytes with one instruction, which is what a coalesced access wants. So lanes
    grow to 8 first, then fragments per lane to 4, to have loads in flight, then lanes to 32, then
    fragments.
    """
    needed = problem.fragments
    threads = min(8, power_of_two(needed))
    threads = max(
        threads, min(32, power_of_two(ceil_div(needed, min(4, _warp_fragments(problem)))))
    )
    fragments = power_of_two(ceil_div(needed, threads))
    return threads, 128 // threads, fragments + (problem.fragments_most > threads * fragments)


def _plan_split(problem: SoftmaxProblem, num_sms: int) -> SoftmaxPlan:
    """softmax_split: reductions, and rows that are too long for softmax_rows."""
    layout = problem.layout
    most = max(1, WORDS // problem.words // problem.vec)
    if problem.reduces and problem.fragments <= 32 * most:
        threads, rows_per_block, fragments = _part_of_a_warp(problem)
        fragments = min(fragments, most)
    else:
        threads, rows_per_block, fragments = SPLIT_THREADS, 1, most
        if problem.fragments <= 128 * most:
            threads = 128
    groups = ceil_div(layout.rows, rows_per_block)
    parts = Parts(1, layout.cols + problem.vec)
    if rows_per_block == 1:
        parts = parts_of_row(problem.fragments * problem.vec, threads * problem.vec * fragments)
        parts = parts.of(problem.fragments_most * problem.vec).shared_by(groups, num_sms)

    def kernel(phase: str) -> Kernel:
        arguments = {
            "Op": problem.op,
            "kPass": phase,
            "kThreadsPerRow": threads,
            "kRowsPerBlock": rows_per_block,
            "kFragments": fragments,
        }
        grid = groups * parts.splits
        return Kernel("softmax_split", arguments, grid, threads * rows_per_block)

    if parts.splits == 1 and problem.reduces:
        return SoftmaxPlan((kernel("kFused"),), 0, geometry(layout, parts))
    return _in_two_passes(problem, kernel, parts)


def _plan_strided(problem: SoftmaxProblem, num_sms: int) -> SoftmaxPlan:
    """softmax_strided: layouts in which the elements of a row are not neighbours."""
    layout = problem.layout
    lanes = lanes_of(layout)
    for threads, items, _ in STRIDED:
        items = max(1, items // problem.words)
        masked_entropy = problem.masked and problem.result == "entropy"
        if problem.acc == "float64" or problem.weighted or masked_entropy:
            threads = min(threads, 256)  # they take more than 128 registers
        if layout.cols <= threads // lanes * items:
            break
    groups = ceil_div(layout.rows, lanes)
    parts = parts_of_row(layout.cols, threads // lanes * items).shared_by(groups, num_sms)

    def kernel(phase: str) -> Kernel:
        sizes = {"kLanes": lanes, "kThreads": threads, "kItems": items}
        arguments = {"Op": problem.op, "kPass": phase, **sizes}
        return Kernel("softmax_strided", arguments, groups * parts.splits, threads)

    # A reduction's parts are merged in the order of softmax_merge.
    if (parts.parts if problem.reduces else parts.splits) == 1:
        return SoftmaxPlan((kernel("kFused"),), 0, geometry(layout, parts))
    return _in_two_passes(problem, kernel, parts)


def _plan_segments(problem: SoftmaxProblem) -> SoftmaxPlan:
    """softmax_segments: ragged rows."""
    layout = problem.layout
    lanes = 1 if layout.rows == problem.segments else lanes_of(layout)
    items = max(1, SEGMENT_WORDS // problem.words)
    # A segment of twice the mean length still is read once.
    cols = 2 * ceil_div(layout.cols, max(1, problem.segments))
    for warps, _ in SEGMENTS:
        if cols <= warps * (32 // lanes) * items:
            break
    sizes = {"kLanes": lanes, "kWarps": warps, "kItems": items}
    arguments = {"Op": problem.op, "Offset": CTYPES[str(problem.offsets)], **sizes}
    kernel = Kernel("softmax_segments", arguments, ceil_div(layout.rows, lanes), 32 * warps)
    return SoftmaxPlan((kernel,), 0, geometry(layout, segments=problem.segments))


def _in_two_passes(
    problem: SoftmaxProblem, kernel: Callable[[str], Kernel], parts: Parts
) -> SoftmaxPlan:
    workspace = problem.layout.rows * parts.parts * problem.state_bytes
    fixed = geometry(problem.layout, parts)
    if not problem.reduces:
        return SoftmaxPlan((kernel("kReduce"), kernel("kNormalize")), workspace, fixed)
    arguments = {"Op": problem.op, "kRowsPerBlock": MERGE_ROWS}
    grid = ceil_div(problem.layout.rows, MERGE_ROWS)
    merge = Kernel("softmax_merge", arguments, grid, 32 * MERGE_ROWS)
    return SoftmaxPlan((kernel("kReduce"), merge), workspace, fixed)
