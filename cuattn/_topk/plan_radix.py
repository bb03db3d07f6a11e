"""Which kernels select any number of elements of rows by radix, and how they share a workspace; and
the kernel that merges selections.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._arrays.row_layout import OPERANDS
from cuattn._device.kernel import CTYPES, Kernel, ceil_div
from cuattn._device.params import RADIX_GEOMETRY
from cuattn._topk.problem import TopKProblem

COUNTS = 2048 + 64  # of a row's histogram: bins, and groups of 32 of them
WALK_THREADS = 256  # of topk_histogram and topk_filter
SELECT_THREADS = 1024  # one block has a row: all the loads in flight that an SM takes
SORT_THREADS = 512  # at most; a thread has two pairs of the longest run
THREADS = 256  # of kernels with a thread for each element
STORE_ITEMS = 16  # results of a thread of topk_store
ITEMS = 16  # elements per thread of topk_histogram in registers, and as many in flight
FILTER_ITEMS = 8  # of topk_filter, which writes some of them: 16 would halve the threads of an SM


class Run(NamedTuple):
    """Candidates that one block sorts."""

    candidates: int
    why: str


RUNS = (
    Run(512, "256 threads with a pair each: k from 257 on"),
    Run(1024, "512 threads with a pair each"),
    Run(
        2048,
        "two pairs per thread, 32 KB of 16-byte candidates; longer lists are merged from these",
    ),
)

WAVES = 4  # blocks per multiprocessor that a split aims at, of a tile each at least
MAX_SPLITS = 1024
MAX_SLICE = 1 << 31  # columns of a slice, which a block counts in 32 bits
MAX_WORKSPACE = 512 << 20  # bytes, unless a single row takes more


@dataclass(frozen=True)
class RadixLaunch:
    """One launch, and its RADIX_GEOMETRY (_device/params.py)."""

    kernel: Kernel
    geometry: bytes


@dataclass(frozen=True)
class RadixPlan:
    """Launches of one call, in order; rows go through the workspace in groups of `group_rows`.

    Parameters of a launch (_device/params.py): those of the selection (TOPK), RADIX_WORKSPACE,
    `geometry`. The workspace is both read and written (atomics).
    """

    launches: tuple[RadixLaunch, ...]
    workspace_bytes: int
    group_rows: int


@lru_cache(maxsize=4096)
def plan_radix(problem: TopKProblem, num_sms: int) -> RadixPlan:
    """Kernels for any k >= 1 of rows of at least one column; every element is read twice, or once
    where a row is short enough to be sorted.

    SoftmaxTopK takes the state of each row from `stat` and `stat_l`, and stores none; a k beyond
    the row is filled up there.
    """
    rows, cols = problem.layout.rows, problem.layout.cols
    if cols <= RUNS[-1].candidates:
        kernel = _sort(problem, "kWholeRow", cols, rows)
        return RadixPlan((RadixLaunch(kernel, _Workspace(problem, 1).geometry()),), 0, rows)
    per_row = _Workspace(problem, 1).bytes
    groups = ceil_div(rows, max(1, MAX_WORKSPACE // per_row))
    group_rows = ceil_div(rows, groups)
    workspace = _Workspace(problem, group_rows)
    launches: list[RadixLaunch] = []
    for first_row in range(0, rows, group_rows):
        these = min(group_rows, rows - first_row)
        launches += _group(problem, workspace, first_row, these, num_sms)
    return RadixPlan(tuple(launches), workspace.bytes, group_rows)


@lru_cache(maxsize=4096)
def plan_topk_state_merge(acc: str, value: str, rows: int, k: int) -> Kernel:
    """Kernel that merges two lists of k >= 1 elements by `value`, and a state, of each row."""
    arguments = {"Acc": CTYPES[acc], "Value": CTYPES[value], "kThreads": THREADS}
    return Kernel("topk_state_merge", arguments, ceil_div(rows * k, THREADS), THREADS)


class _Workspace:
    """Where things lie: histograms, counters, buffer and list of `rows` neighbouring rows.

    When the buffer has served, sorting goes back and forth between it and the list.
    """

    def __init__(self, problem: TopKProblem, rows: int) -> None:
        size = problem.candidate_bytes
        self.wanted = min(problem.k, problem.layout.cols)
        self.counters = rows * COUNTS * (4 if problem.narrow else 8)
        self.cleared = self.buffer = self.counters + rows * 16
        self.list = self.buffer + ceil_div(rows * problem.layout.cols * size, 16) * 16
        self.bytes = self.list + ceil_div(rows * self.wanted * size, 16) * 16

    def geometry(
        self,
        first_row: int = 0,
        splits: int = 1,
        slice_: int = 0,
        run: int = 0,
        source: int = 0,
        target: int = 0,
    ) -> bytes:
        """RadixParams from `first_row` on."""
        return RADIX_GEOMETRY.pack(
            first_row=first_row,
            splits=splits,
            slice=slice_,
            wanted=self.wanted,
            counters=self.counters,
            buffer=self.buffer,
            list=self.list,
            cleared=self.cleared,
            run=run,
            source=source,
            target=target,
        )


def _group(
    problem: TopKProblem, workspace: _Workspace, first_row: int, rows: int, num_sms: int
) -> Iterator[RadixLaunch]:
    """Launches for neighbouring rows."""
    op = problem.op
    vec = problem.vec if problem.layout.col_stride[OPERANDS.index("x")] == (1,) else 1
    items = ITEMS if problem.narrow and vec > 1 else ITEMS // 2
    fragments = max(1, items // vec)
    splits, slice_ = _slices(problem, rows, num_sms, WALK_THREADS * vec * fragments)
    walk = {"Op": op, "kThreads": WALK_THREADS, "kVec": vec}
    histogram = {**walk, "kFragments": fragments}
    fragments = max(1, min(FILTER_ITEMS, 64 // problem.candidate_bytes) // vec)
    filter_ = {**walk, "kFragments": fragments}

    def launch(
        template: str, arguments: Mapping[str, object], grid: int, block: int, **place: int
    ) -> RadixLaunch:
        kernel = Kernel(template, arguments, grid, block)
        return RadixLaunch(
            kernel, workspace.geometry(first_row, splits=splits, slice_=slice_, **place)
        )

    clear = {"Params": problem.params, "kThreads": THREADS}
    yield launch("topk_clear", clear, ceil_div(workspace.cleared, 16 * THREADS), THREADS)
    yield launch("topk_histogram", histogram, rows * splits, WALK_THREADS)
    yield launch("topk_filter", filter_, rows * splits, WALK_THREADS)
    select = {"Op": op, "kThreads": SELECT_THREADS}
    yield launch("topk_select", select, rows, SELECT_THREADS)

    # Sort: whole lists, or runs and then pairs of them, from one half of the workspace to the other
    source, target, wanted = workspace.list, workspace.buffer, workspace.wanted
    run = RUNS[-1].candidates
    if wanted <= run:
        kernel = _sort(problem, "kWholeList", wanted, rows)
        yield RadixLaunch(kernel, workspace.geometry(first_row, source=source))
        return
    kernel = _sort(problem, "kPartOfList", run, rows * ceil_div(wanted, run))
    yield RadixLaunch(kernel, workspace.geometry(first_row, source=source, target=target))
    merge = {
        "Candidate": problem.candidate,
        "Params": problem.params,
        "kThreads": THREADS,
    }
    while run < wanted:
        source, target = target, source
        blocks = rows * ceil_div(wanted, THREADS)
        yield launch(
            "topk_merge_runs", merge, blocks, THREADS, run=run, source=source, target=target
        )
        run *= 2
    blocks = rows * ceil_div(problem.k, STORE_ITEMS * THREADS)
    store = {"Op": op, "kThreads": THREADS, "kItems": STORE_ITEMS}
    yield launch("topk_store", store, blocks, THREADS, source=target)


def _sort(problem: TopKProblem, what: str, most: int, grid: int) -> Kernel:
    """topk_sort of runs of up to `most` candidates."""
    run = next(run.candidates for run in RUNS if most <= run.candidates)
    threads = min(SORT_THREADS, run // 2)
    arguments = {"Op": problem.op, "kWhat": what, "kThreads": threads, "kRun": run}
    return Kernel("topk_sort", arguments, grid, threads)


def _slices(problem: TopKProblem, rows: int, num_sms: int, tile: int) -> tuple[int, int]:
    """Slices of a row and columns of each, in tiles of a block."""
    cols = problem.fragments_most * problem.vec
    tiles = ceil_div(cols, tile)
    splits = max(1, min(ceil_div(WAVES * num_sms, rows), tiles, MAX_SPLITS))
    splits = max(splits, ceil_div(cols, MAX_SLICE - tile))
    slice_ = ceil_div(tiles, splits) * tile
    return ceil_div(cols, slice_), slice_
