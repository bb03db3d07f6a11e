"""Which kernel computes an attention call, and why: tiles, grid, parameters.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div

UNBOUNDED = 2**40  # AttentionParams::kUnbounded
MAX_SCALE = 2**127  # its product with log2 e is finite in float32

MERGE_THREADS = 256

# The multiplication of each dtype; float32 has one of its own with precision="tf32".
OPS = {
    "float16": "HalfOp<__half>",
    "bfloat16": "HalfOp<__nv_bfloat16>",
    "tf32": "Tf32Op",
    "float32": "FloatOp",
    "float64": "DoubleOp",
}

# Columns of `out` that a block has at most: its accumulators are registers, and so are addresses of
# masks, biases and single elements ("rule").
VALUE_DIM = {"float64": 128}
VALUE_DIM_RULE = {"float64": 64}
MAX_VALUE_DIM, MAX_VALUE_DIM_RULE = 256, 128

# Columns of K that are in shared memory at a time, of heads that are wider than WHOLE_DIM.
WHOLE_DIM = 256
PART_DIM = {"float64": 128}


class Tile(NamedTuple):
    """What a block computes at a time; of a table the first that fits is taken."""

    max_dim: int  # of heads
    smem_kib: int  # that a block may have
    warps: int
    row_tiles: int  # of 16 rows of a warp
    keys: int
    slots: int  # of the ring of K and V
    why: str  # shared memory, and what else counts


WIDE = "160 KiB; 64 rows and 64 keys are as large, but read K and V twice as often"
HALF_TILES = (
    Tile(
        64, 99, 4, 2, 48, 3, "34 KiB: two blocks an SM by registers; two row tiles halve the reads"
    ),
    Tile(128, 99, 8, 1, 64, 3, "80 KiB; two row tiles would need more registers than there are"),
    Tile(224, 163, 8, 1, 32, 3, "98 KiB"),
    Tile(224, 99, 4, 1, 32, 3, "70 KiB: half the rows"),
    Tile(256, 163, 8, 1, 48, 2, "112 KiB: 128 registers of accumulators, and here fewer addresses"),
    Tile(256, 99, 4, 1, 48, 2, "80 KiB: half the rows"),
    Tile(512, 163, 8, 1, 32, 2, WIDE),
    Tile(512, 99, 4, 1, 32, 2, "96 KiB: half the rows"),
)
HALF_RULE_TILES = (
    Tile(
        64, 99, 4, 2, 32, 3, "28 KiB: half the scores per thread, to leave room for their addresses"
    ),
    Tile(128, 99, 8, 1, 32, 3, "56 KiB"),
    Tile(256, 163, 8, 1, 32, 2, "96 KiB"),
    Tile(256, 99, 4, 1, 32, 2, "64 KiB"),
    Tile(512, 163, 8, 1, 32, 2, WIDE),
    Tile(512, 99, 4, 1, 32, 2, "96 KiB: half the rows"),
)
TF32_TILES = (
    Tile(64, 99, 4, 2, 32, 3, "56 KiB"),
    Tile(128, 99, 8, 1, 32, 2, "96 KiB"),
    Tile(256, 99, 4, 1, 16, 2, "96 KiB"),
    Tile(512, 163, 4, 1, 16, 2, "160 KiB"),
    Tile(512, 99, 2, 1, 16, 2, "96 KiB: half the rows"),
)
FLOAT_TILES = (
    Tile(64, 99, 4, 2, 32, 2, "48 KiB: a loaded key feeds four rows of a lane"),
    Tile(128, 99, 8, 1, 16, 2, "80 KiB"),
    Tile(256, 99, 4, 1, 16, 2, "96 KiB"),
    Tile(512, 163, 4, 1, 16, 2, "160 KiB"),
    Tile(512, 99, 2, 1, 16, 2, "96 KiB: half the rows"),
)
FLOAT_BLOCKED_TILES = (
    Tile(64, 99, 4, 2, 16, 2, "40 KiB: half the scores per thread, to leave room for a list"),
    *FLOAT_TILES[1:],
)
DOUBLE_TILES = (
    Tile(128, 99, 4, 1, 16, 2, "96 KiB; 48 for 64 columns"),
    Tile(256, 163, 2, 1, 16, 2, "128 KiB"),
    Tile(256, 99, 1, 1, 16, 2, "96 KiB"),
    Tile(512, 163, 2, 1, 16, 2, "160 KiB"),
    Tile(512, 99, 1, 1, 16, 2, "96 KiB: half the rows"),
)


@dataclass(frozen=True)
class AttentionPlan:
    """The kernel of a call and what its parameters say of the grid."""

    kernel: Kernel
    row_blocks: int
    heads_in_l2: int


@lru_cache(maxsize=4096)
def plan_attention(problem: AttentionProblem, compute_capability: int) -> AttentionPlan:
    """Kernel of one call on a device of this compute capability (80 for sm_80)."""
    rule = problem.modified or problem.masked or not problem.vector
    most = VALUE_DIM.get(problem.op, MAX_VALUE_DIM)
    if rule:
        most = VALUE_DIM_RULE.get(problem.op, MAX_VALUE_DIM_RULE)
    part_dim = part_of(problem.op, problem.head_dim)
    dim = part_dim * max(1, ceil_div(problem.head_dim, part_dim))
    value_dim = min(whole(problem.value_dim), most)
    kib = 99 if compute_capability in (86, 89, 120, 121) else 163
    tables: dict[str, tuple[Tile, ...]]
    tables = {"tf32": TF32_TILES, "float32": FLOAT_TILES, "float64": DOUBLE_TILES}
    halves: tuple[Tile, ...] = HALF_RULE_TILES if rule else HALF_TILES
    if problem.blocked:  # a list takes registers, too: no two row tiles where much else does
        tables["float32"] = FLOAT_BLOCKED_TILES[not problem.vector :]
        halves = HALF_RULE_TILES[problem.modified :]
    table = tables.get(problem.op, halves)
    most_rows = 1 if problem.score or problem.mask else 2  # an expression needs registers
    tile = next(
        t
        for t in table
        if max(dim, value_dim) <= t.max_dim and kib >= t.smem_kib and t.row_tiles <= most_rows
    )
    rows = 16 * tile.warps * tile.row_tiles

    item = ITEMSIZE[problem.dtype]
    slot = tile.keys * max(part_dim, value_dim)
    smem = max(rows * dim + tile.slots * slot, rows * value_dim) * item
    arguments = {
        "Op": OPS[problem.op],
        "kWarps": tile.warps,
        "kMTiles": tile.row_tiles,
        "kKeys": tile.keys,
        "kDim": dim,
        "kPartDim": part_dim,
        "kValueDim": value_dim,
        "kSlots": tile.slots,
        "kVector": problem.vector,
        "kModified": problem.modified,
        "Bias": "NoBias" if problem.bias is None else CTYPES[problem.bias],
        "kMasked": problem.masked,
        "Tiles": problem.tiles,
    }
    row_blocks, units, heads_in_l2 = problem.grid(rows)
    grid = units * row_blocks * max(1, ceil_div(problem.value_dim, value_dim))
    kernel = problem.kernel("attention_forward", arguments, grid, tile.warps, smem)
    return AttentionPlan(kernel, row_blocks, heads_in_l2)


@lru_cache(maxsize=4096)
def plan_attention_merge(dtype: str, acc: str, rows: int, columns: int, vector: bool) -> Kernel:
    """Kernel that merges results over parts of the keys; `rows` of `columns` elements."""
    vec = 16 // ITEMSIZE[dtype] if vector else 1
    threads = rows * max(1, ceil_div(columns, vec))
    types = {"T": CTYPES[dtype], "Acc": CTYPES[acc]}
    arguments = {**types, "kVec": vec, "kThreads": MERGE_THREADS}
    grid = ceil_div(threads, MERGE_THREADS)
    return Kernel("attention_merge", arguments, grid, MERGE_THREADS)


def part_of(op: str, head_dim: int) -> int:
    """Columns of a part of K, of parts as alike as can be."""
    most = WHOLE_DIM if head_dim <= WHOLE_DIM else PART_DIM.get(op, WHOLE_DIM)
    return whole(ceil_div(head_dim, max(1, ceil_div(head_dim, most))))


def whole(columns: int) -> int:
    """Columns of a tile: whole groups of 4 chunks of 16 bytes for every dtype."""
    return max(32, ceil_div(columns, 32) * 32)
