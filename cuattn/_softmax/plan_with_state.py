"""The kernel for parts of rows whose states are known: elements by themselves."""

from __future__ import annotations

from cuattn._device.kernel import CTYPES, Kernel, ceil_div, power_of_two
from cuattn._softmax.plan_parts import Parts, geometry, lanes_of
from cuattn._softmax.problem import SoftmaxProblem

THREADS = 128
FRAGMENTS = 4  # of 16 bytes that a thread has in flight,
ITEMS = 8  # or elements, where these are no neighbours


def plan_with_state(problem: SoftmaxProblem) -> tuple[Kernel, bytes]:
    """softmax_with_state, and its parameters from `rows` on."""
    layout, threads = problem.layout, THREADS
    if problem.rows_are_vectors:
        # First 8 lanes a row, which move 128 bytes at once, then what each of them has in flight.
        count, needed = problem.vec, problem.fragments_most
        places = min(8, power_of_two(needed))
        places = max(places, min(threads, power_of_two(ceil_div(needed, FRAGMENTS))))
        fragments = min(FRAGMENTS, power_of_two(ceil_div(needed, places)))
        rows = threads // places
    else:
        count, needed, fragments, rows = 1, layout.cols, ITEMS, lanes_of(layout)
        if needed <= 32 // rows * fragments:
            threads = 32
    splits = max(1, ceil_div(needed, threads // rows * fragments))
    arguments = {
        "Op": problem.op,
        "Stat": CTYPES[str(problem.state)],
        "kThreads": threads,
        "kRows": rows,
        "kCount": count,
        "kFragments": fragments,
    }
    grid = ceil_div(layout.rows, rows) * splits
    return Kernel("softmax_with_state", arguments, grid, threads), geometry(
        layout, Parts(1, 0, splits)
    )
