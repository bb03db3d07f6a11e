"""The kernel for k <= 8 where a group of lanes holds a row: scores of a router, columns.

Plain integers in, frozen dataclasses out. Instruction counts are warp instructions
per row on sm_90, start to finish.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cuattn._arrays.row_layout import OPERANDS
from cuattn._device.kernel import ITEMSIZE, Kernel, ceil_div, power_of_two
from cuattn._softmax.plan_parts import lanes_of
from cuattn._topk.problem import TopKProblem

THREADS = 128
SECTOR = 32  # bytes


class Tile(NamedTuple):
    """Elements that a lane holds at most. Masks take the registers of half of them."""

    candidate_bytes: int
    contiguous: int
    columns: int
    why: str


TILES = (
    Tile(
        8,
        32,
        16,
        "128 float32, k = 8, take 166 instructions with 32 elements in each of 4 lanes, 184 with "
        "16 in 8 and 234 with 8 in 16, as lanes of a group share one prologue and one merge; with "
        "64 in 2 it is 154, but with 199 registers. Columns: loads enough in flight",
    ),
    Tile(16, 16, 8, "twice the registers"),
)


class Rows(NamedTuple):
    """Contiguous rows that a group of lanes takes."""

    max_k: int
    max_cols: int
    lanes: int  # of a group at least
    why: str


# Longer rows are for topk_rows, which looks at most tiles of a row only once it knows k good
# elements: for k = 8 both cost the same at 384 float32, for k = 4 at 512; for k = 2 it costs 1.4
# times as much at 1024.
ROWS = (
    Rows(
        2, 1024, 2, "loads of a sector, 32 bytes; 64 float32 take 51 instructions, 58 with 4 lanes"
    ),
    Rows(4, 512, 4, "as below"),
    Rows(
        8,
        384,
        4,
        "with 2 lanes 80 in place of 87, but 4 results per lane, stored in parts of sectors",
    ),
)

# Below these, a row of top_k is spread over more lanes: what counts then is when the last one is
# done.
FEW_ROWS = 2048
FEW_WARPS = 1024


@lru_cache(maxsize=4096)
def plan_lanes(problem: TopKProblem, strided: bool) -> Kernel | None:
    """topk_lanes, or None where a warp a row is the better choice: k > 8, long rows.

    `strided`: rows lie beside each other in memory, their elements do not.
    """
    if problem.k > ROWS[-1].max_k:
        return None
    listed = power_of_two(problem.k)
    if strided:
        group, beside, fragments = _columns(problem, listed)
    else:
        found = _rows(problem, listed)
        if found is None:
            return None
        group, fragments = found
        beside = 1
    arguments = {
        "Op": problem.op,
        "kList": listed,
        "kGroup": group,
        "kStride": beside,
        "kVec": 1 if strided else problem.vec,
        "kFragments": fragments,
        "kThreads": THREADS,
    }
    grid = ceil_div(problem.layout.rows, THREADS // group)
    return Kernel("topk_lanes", arguments, grid, THREADS)


def _rows(problem: TopKProblem, listed: int) -> tuple[int, int] | None:
    """Lanes of a group and fragments of a lane for contiguous rows of one tile.

    The fewest lanes whose tile holds the row; the tile is a whole number of lists.
    """
    longest, least = next(found[1:3] for found in ROWS if problem.k <= found.max_k)
    # A row with a state is added up in an order that must not depend on the number of rows, nor on
    # where it starts; what that takes it beyond the tile, the kernel looks at in a second one.
    needed = problem.fragments if problem.softmax else problem.fragments_most
    unit = max(1, listed // problem.vec)
    most = max(unit, _tile(problem)[0] // problem.vec)
    wanted = unit if problem.layout.rows < FEW_ROWS and not problem.softmax else most
    lanes = min(least, power_of_two(needed))
    while lanes > 1 and (lanes // 2) * unit >= needed:
        lanes //= 2  # the other half would have nothing
    while lanes < 32 and lanes * wanted < needed:
        lanes *= 2
    fragments = ceil_div(ceil_div(needed, lanes), unit) * unit
    return (lanes, fragments) if fragments <= most and problem.layout.cols <= longest else None


def _columns(problem: TopKProblem, listed: int) -> tuple[int, int, int]:
    """Lanes of a row, rows beside each other, and elements of a lane, at any stride."""
    layout, most = problem.layout, max(listed, _tile(problem)[1])
    stride = layout.row_stride[OPERANDS.index("x")][-1]
    beside = lanes_of(layout)
    if not problem.softmax:  # no order of a sum to keep: no lane without a row
        beside = min(beside, power_of_two(layout.row_size[-1]))
    while (
        not problem.softmax
        and stride in (-1, 1)
        and beside * ITEMSIZE[problem.x] > SECTOR  # with fewer, parts of sectors would be wasted
        and ceil_div(layout.rows, beside) < FEW_WARPS
        and layout.cols > 32 // beside * most
    ):
        beside //= 2
    group = 32 // beside
    items = min(most, ceil_div(ceil_div(layout.cols, group), listed) * listed)
    return group, beside, items


def _tile(problem: TopKProblem) -> tuple[int, int]:
    """Elements of a tile of a lane at most: contiguous ones, in columns."""
    contiguous, columns = next(t[1:3] for t in TILES if problem.candidate_bytes == t[0])
    return (contiguous // 2, columns // 2) if problem.masked else (contiguous, columns)
