"""Which kernels compute gradients of the arrays that a score expression looks into.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.plan_backward import score_tile
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div

WARPS = 8  # of a block of backward_elements.cuh
RANGES = 256  # blocks that there should be, ...
LEAST, MOST = 32, 1024  # ... each with so many elements


class Places(NamedTuple):
    """What the place of a reference depends on."""

    of_batch: bool
    of_head: bool
    of_distance: bool


class Plan(NamedTuple):
    """The kernels of one reference to an array, and what they have to know of each other."""

    sums: Kernel  # by distance
    elements: Kernel
    slots: int  # of a head
    log2: int  # of the rows of a tile
    range: int
    units: int  # heads of sequences, of a ragged batch heads, whose places differ ...
    unit_step: int
    shared: int  # ... and those that have the places of each
    shared_step: int  # in slots


@lru_cache(maxsize=4096)
def plan_reference(
    problem: AttentionProblem,
    places: Places,
    aligned: bool,
    element: str,
    count: int,
    compute_capability: int,
) -> Plan:
    """`problem`: with the `score` of a reference. `aligned`: sequences have no offset of their own.
    `element`: what an array of `count` elements has."""
    tile, arguments, smem = score_tile(problem, compute_capability)
    rows, acc = 16 * tile.warps, "float64" if problem.dtype == "float64" else "float32"
    slots = _slots(problem, rows)
    batches = 1 if problem.ragged else problem.batch
    grid = batches * problem.heads * slots
    sums = problem.kernel("attention_backward_score", arguments, grid, tile.warps, smem)
    own = max(LEAST, min(MOST, 1 << (ceil_div(count, RANGES) - 1).bit_length()))
    arguments = {"Acc": CTYPES[acc], "Element": CTYPES[element], "kWarps": WARPS}
    smem, grid = WARPS * own * ITEMSIZE[acc], ceil_div(count, own)
    elements = problem.kernel("attention_backward_elements", arguments, grid, WARPS, smem)
    # Distances may lie elsewhere in each sequence.
    by_batch = places.of_batch or (places.of_distance and not aligned)
    heads = problem.heads
    units, step = (heads if places.of_head else 1), (1 if places.of_head else heads)
    shared, shared_step = (1, 0) if places.of_head else (heads, 1)
    if by_batch:
        units *= batches
    else:
        shared, shared_step = shared * batches, heads if places.of_head else 1
    log2, shared_step = rows.bit_length() - 1, shared_step * slots
    return Plan(sums, elements, slots, log2, own, units, step, shared, shared_step)


def _slots(problem: AttentionProblem, rows: int) -> int:
    """Diagonals of tiles of a head: distances.cuh, first_slot and find_diagonal."""
    if not (problem.batch and problem.heads and problem.q_rows and problem.k_rows):
        return 0
    if problem.ragged:
        return (problem.q_rows + problem.k_rows) // rows + 2 * problem.batch
    return ceil_div(problem.q_rows + problem.k_rows - 2, rows) + 1
