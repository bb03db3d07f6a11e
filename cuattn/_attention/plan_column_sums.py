"""Which kernel adds up the probabilities of each key, and why: tiles, grid.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.plan import OPS, whole
from cuattn._attention.plan_backward import Launch, key_grid
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel

SLOTS = 2  # of the ring of Q
WAVES = 2  # of blocks: some have fewer queries than others


class Tile(NamedTuple):
    """What a block computes at a time; of a table the first that fits is taken."""

    max_dim: int  # of heads
    warps: int
    row_tiles: int  # of 16 keys of a warp
    queries: int
    why: str  # shared memory, and what else counts


TILES = {
    "half": (
        Tile(64, 4, 2, 64, "32 KiB: two row tiles halve the reads of Q from shared memory"),
        Tile(128, 4, 2, 64, "64 KiB"),
        Tile(256, 4, 2, 32, "96 KiB"),
    ),
    "half rule": (
        Tile(64, 8, 1, 32, "24 KiB: half the scores per thread, to leave room for addresses"),
        Tile(128, 8, 1, 32, "48 KiB"),
        Tile(256, 8, 1, 16, "80 KiB"),
    ),
    "float32": (  # and tf32
        Tile(64, 4, 2, 32, "48 KiB: a loaded query feeds four keys of a lane"),
        Tile(128, 4, 2, 32, "96 KiB"),
        Tile(256, 4, 1, 16, "96 KiB"),
    ),
    "float32 rule": (
        Tile(128, 4, 1, 32, "64 KiB, 32 for 64 columns: half the scores per thread"),
        Tile(256, 4, 1, 16, "96 KiB"),
    ),
    "float64": (
        Tile(64, 4, 1, 32, "64 KiB"),
        Tile(128, 4, 1, 16, "96 KiB"),
        Tile(256, 2, 1, 8, "96 KiB"),
    ),
}


class ColumnSumsPlan(NamedTuple):
    """The launch of a call, and the problem whose key heads are what a block has of query heads."""

    launch: Launch
    problem: AttentionProblem


@lru_cache(maxsize=4096)
def plan_column_sums(problem: AttentionProblem, num_sms: int) -> ColumnSumsPlan:
    """How one call runs; `vector`: q and k can be read 16 bytes at a time.

    A block has all query heads that share its keys, or fewer where blocks are: each has sums of its
    own, so no bit depends on that.
    """
    rule = problem.modified or problem.masked or not problem.vector
    name = problem.dtype if problem.dtype in TILES else "half"
    table = TILES.get(f"{name} rule" if rule else name, TILES[name])
    dim = whole(problem.head_dim)
    tile = next(tile for tile in table if dim <= tile.max_dim)
    keys = 16 * tile.warps * tile.row_tiles
    arguments = {
        "Op": OPS[problem.op],
        "kWarps": tile.warps,
        "kMTiles": tile.row_tiles,
        "kQueries": tile.queries,
        "kDim": dim,
        "kVector": problem.vector,
        "kModified": problem.modified,
        "Bias": "NoBias" if problem.bias is None else CTYPES[problem.bias],
        "kMasked": problem.masked,
    }
    smem = (keys + SLOTS * tile.queries) * dim * ITEMSIZE[problem.dtype]
    smem += SLOTS * tile.queries * (8 if problem.dtype == "float64" else 4)
    group = problem.heads // problem.kv_heads
    for together in (n for n in range(group, 0, -1) if group % n == 0):
        problem = replace(problem, kv_heads=problem.heads // together)
        key_blocks, units, heads_in_l2 = key_grid(problem, keys)
        if units * key_blocks >= WAVES * num_sms:
            break
    kernel = Kernel(
        "attention_column_sums", arguments, units * key_blocks, 32 * tile.warps, smem_bytes=smem
    )
    return ColumnSumsPlan(Launch(kernel, key_blocks, heads_in_l2), problem)
