"""Which kernels compute the gradients of attention: tiles, columns of a block, grids.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeVar

from cuattn._attention.plan import OPS, whole
from cuattn._attention.plan_sm90 import Schedule
from cuattn._attention.problem import L2_BYTES, AttentionProblem
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div

ROWS = 16  # queries of a block of backward_rows.cuh
SUM_WARPS = 8


class Tile(NamedTuple):
    """What a block computes at a time; of a table the first that fits is taken."""

    max_dim: int  # of heads
    smem_kib: int  # that a block may have
    warps: int
    row_tiles: int  # of 16 rows of a warp
    loop: int  # rows of a tile of the ring
    slots: int  # of the ring
    columns: int  # of dq, or of dk and dv, that a block has at most
    both: bool = True  # whether blocks have dk and dv together


class BiasTile(NamedTuple):
    """What a block of backward_bias.cuh computes at a time."""

    max_dim: int
    smem_kib: int
    warps: int
    keys: int


AnyTile = TypeVar("AnyTile", Tile, BiasTile)

# Accumulators of dk and dv are registers: (D + D_v) / 2 of a thread for 16 keys of its warp, twice
# as many of float64. Where these are too many, blocks have dk or dv, and then columns of it.
KV_TILES = {
    "half": (
        Tile(64, 99, 4, 2, 16, 4, 64),
        Tile(128, 99, 8, 1, 32, 2, 128),
        Tile(256, 163, 4, 1, 32, 2, 256, False),
        Tile(256, 99, 4, 1, 16, 1, 256, False),
    ),
    "half rule": (
        Tile(64, 99, 8, 1, 32, 2, 64),
        Tile(128, 99, 8, 1, 16, 2, 128),
        Tile(256, 99, 4, 1, 16, 1, 128, False),
    ),
    "tf32": (
        Tile(64, 99, 4, 1, 16, 2, 64),
        Tile(128, 99, 4, 1, 16, 2, 128, False),
        Tile(256, 99, 2, 1, 16, 1, 128, False),
    ),
    "float32": (
        Tile(64, 99, 4, 1, 16, 2, 64),
        Tile(128, 99, 4, 1, 16, 2, 128, False),
        Tile(256, 99, 2, 1, 16, 1, 128, False),
    ),
    "float64": (
        Tile(64, 99, 4, 1, 16, 2, 64, False),
        Tile(128, 99, 2, 1, 16, 1, 64, False),
        Tile(256, 99, 1, 1, 8, 1, 64, False),
    ),
}
Q_TILES = {
    "half": (
        Tile(64, 99, 4, 2, 32, 2, 64),
        Tile(128, 163, 8, 1, 64, 2, 128),
        Tile(128, 99, 8, 1, 32, 2, 128),
        Tile(256, 163, 4, 1, 32, 2, 256),
        Tile(256, 99, 4, 1, 16, 1, 256),
    ),
    "half rule": (
        Tile(64, 99, 8, 1, 32, 2, 64),
        Tile(128, 99, 8, 1, 32, 2, 128),
        Tile(256, 99, 4, 1, 16, 1, 128),
    ),
    "tf32": (
        Tile(64, 99, 4, 1, 32, 2, 64),
        Tile(128, 99, 4, 1, 16, 2, 128),
        Tile(256, 99, 2, 1, 16, 1, 128),
    ),
    "float32": (
        Tile(64, 99, 4, 1, 16, 2, 64),
        Tile(128, 99, 4, 1, 16, 2, 128),
        Tile(256, 99, 2, 1, 16, 1, 128),
    ),
    "float64": (
        Tile(64, 99, 4, 1, 16, 2, 64),
        Tile(128, 99, 2, 1, 16, 1, 64),
        Tile(256, 99, 1, 1, 8, 1, 64),
    ),
}
BIAS_TILES = {
    "half": (
        BiasTile(64, 99, 8, 64),
        BiasTile(128, 99, 8, 32),
        BiasTile(256, 99, 4, 32),
    ),
    "tf32": (
        BiasTile(64, 99, 8, 32),
        BiasTile(128, 99, 4, 32),
        BiasTile(256, 99, 2, 16),
    ),
    "float32": (
        BiasTile(64, 99, 8, 32),
        BiasTile(128, 99, 4, 32),
        BiasTile(256, 99, 2, 16),
    ),
    "float64": (
        BiasTile(64, 99, 4, 16),
        BiasTile(128, 99, 2, 16),
        BiasTile(256, 99, 1, 8),
    ),
}


class Launch(NamedTuple):
    """A kernel, and what its parameters say of the grid."""

    kernel: Kernel
    row_blocks: int
    heads_in_l2: int
    schedule: Schedule | None = None  # of persistent blocks


@dataclass(frozen=True)
class BiasSizes:
    """Of a bias itself: 1 where it is broadcast."""

    batches: int
    heads: int
    rows: int
    cols: int


@lru_cache(maxsize=4096)
def plan_rows(problem: AttentionProblem, vector: bool) -> Launch:
    """The statistics of all queries. `vector`: grad and y can be read 16 bytes at a time."""
    arguments = {"Op": OPS[problem.op], "kVector": vector}
    row_blocks, units, heads_in_l2 = problem.grid(ROWS)
    kernel = Kernel("attention_backward_rows", arguments, units * row_blocks, 8 * ROWS)
    return Launch(kernel, row_blocks, heads_in_l2)


@lru_cache(maxsize=4096)
def plan_q(problem: AttentionProblem, compute_capability: int) -> Launch:
    """dq. `vector` of the problem: q, k, v and grad can be read 16 bytes at a time."""
    tile = tile_of(Q_TILES, problem, compute_capability)
    if problem.score:  # whose values are in registers, too
        tile = tile._replace(loop=min(16, tile.loop))
    dim, value_dim = whole(problem.head_dim), whole(problem.value_dim)
    columns = min(dim, tile.columns)
    dim = ceil_div(dim, columns) * columns
    rows = 16 * tile.warps * tile.row_tiles
    arguments = {
        "Op": OPS[problem.op],
        "kWarps": tile.warps,
        "kMTiles": tile.row_tiles,
        "kKeys": tile.loop,
        "kDim": dim,
        "kValueDim": value_dim,
        "kColumns": columns,
        "kSlots": tile.slots,
        **_options(problem),
    }
    smem = (rows + tile.slots * tile.loop) * (dim + value_dim) * ITEMSIZE[problem.dtype]
    row_blocks, units, heads_in_l2 = problem.grid(rows)
    grid = units * row_blocks * max(1, ceil_div(problem.head_dim, columns))
    kernel = problem.kernel("attention_backward_q", arguments, grid, tile.warps, smem)
    return Launch(kernel, row_blocks, heads_in_l2)


@lru_cache(maxsize=4096)
def plan_kv(problem: AttentionProblem, compute_capability: int) -> list[Launch]:
    """dk and dv: one kernel or two."""
    tile = tile_of(KV_TILES, problem, compute_capability)
    dim, value_dim = whole(problem.head_dim), whole(problem.value_dim)
    keys = 16 * tile.warps * tile.row_tiles
    key_columns, value_columns = min(dim, tile.columns), min(value_dim, tile.columns)
    if not tile.both:
        dim = ceil_div(dim, key_columns) * key_columns
        value_dim = ceil_div(value_dim, value_columns) * value_columns
    item = ITEMSIZE[problem.dtype]
    stats = 2 * (8 if problem.dtype == "float64" else 4)
    smem = (keys + tile.slots * tile.loop) * (dim + value_dim) * item
    smem += tile.slots * tile.loop * stats
    key_blocks, units, heads_in_l2 = key_grid(problem, keys)
    launches = []
    for own_keys, own_values in ((True, True),) if tile.both else ((True, False), (False, True)):
        columns = key_columns if own_keys else value_columns
        parts = (
            1 if tile.both else ceil_div((problem.value_dim, problem.head_dim)[own_keys], columns)
        )
        arguments = {
            "Op": OPS[problem.op],
            "kWarps": tile.warps,
            "kMTiles": tile.row_tiles,
            "kQueries": tile.loop,
            "kDim": dim,
            "kValueDim": value_dim,
            "kKeyColumns": key_columns if own_keys else 0,
            "kValueColumns": value_columns if own_values else 0,
            "kSlots": tile.slots,
            **_options(problem),
        }
        grid = units * key_blocks * parts
        kernel = problem.kernel("attention_backward_kv", arguments, grid, tile.warps, smem)
        launches.append(Launch(kernel, key_blocks, heads_in_l2))
    return launches


@lru_cache(maxsize=4096)
def plan_bias(problem: AttentionProblem, bias: BiasSizes, compute_capability: int) -> Launch:
    """dbias; `heads_in_l2` stands for its blocks of columns."""
    tile, arguments, smem = score_tile(problem, compute_capability)
    row_blocks, col_blocks = ceil_div(bias.rows, 16 * tile.warps), ceil_div(bias.cols, tile.keys)
    grid = bias.batches * bias.heads * row_blocks * col_blocks
    kernel = problem.kernel("attention_backward_bias", arguments, grid, tile.warps, smem)
    return Launch(kernel, row_blocks, col_blocks)


@lru_cache(maxsize=4096)
def plan_sums(acc: str, results: int) -> Kernel:
    """dsinks and dslopes, of so many elements."""
    arguments = {"Acc": CTYPES[acc], "kWarps": SUM_WARPS}
    return Kernel("attention_backward_sums", arguments, results, 32 * SUM_WARPS)


def stat_rows(problem: AttentionProblem) -> int:
    """Rows of the statistics of a head: backward.cuh, stats_row."""
    return (problem.q_rows + (problem.batch + 2 if problem.ragged else 1)) // 2 * 2


def score_tile(
    problem: AttentionProblem, compute_capability: int
) -> tuple[BiasTile, dict[str, object], int]:
    """Of kernels with a tile of Q, dO, K and V that is not loaded ahead (backward.cuh, ScoreTile):
    its sizes, their template arguments, shared memory."""
    dim, value_dim = whole(problem.head_dim), whole(problem.value_dim)
    tile = tile_of(BIAS_TILES, problem, compute_capability)
    arguments = {
        "Op": OPS[problem.op],
        "kWarps": tile.warps,
        "kKeys": tile.keys,
        "kDim": dim,
        "kValueDim": value_dim,
        "kVector": problem.vector,
        "Bias": "NoBias" if problem.bias is None else CTYPES[problem.bias],
        "kMasked": problem.masked,
    }
    rows, acc = 16 * tile.warps, 8 if problem.dtype == "float64" else 4
    smem = (rows + tile.keys) * (dim + value_dim) * ITEMSIZE[problem.dtype]
    return tile, arguments, max(smem, rows * tile.keys * acc)  # sums in the place of the tile


def tile_of(
    tables: Mapping[str, tuple[AnyTile, ...]], problem: AttentionProblem, compute_capability: int
) -> AnyTile:
    """The first tile that fits; 16-bit types have tables of their own for a rule of scores."""
    kib = 99 if compute_capability in (86, 89, 120, 121) else 163
    rule = problem.modified or problem.masked or not problem.vector
    name = problem.op if problem.op in tables else "half rule" if rule else "half"
    dim = max(whole(problem.head_dim), whole(problem.value_dim))
    table = tables.get(name, tables["half"])
    return next(tile for tile in table if dim <= tile.max_dim and kib >= tile.smem_kib)


def _options(problem: AttentionProblem) -> dict[str, object]:
    """Template arguments of how scores are made."""
    return {
        "kVector": problem.vector,
        "kModified": problem.modified,
        "Bias": "NoBias" if problem.bias is None else CTYPES[problem.bias],
        "kMasked": problem.masked,
    }


def key_grid(problem: AttentionProblem, keys: int) -> tuple[int, int, int]:
    """As `AttentionProblem.grid`, of keys: what stays in L2 are Q and dO of the heads of a unit."""
    key_blocks, units = ceil_div(problem.k_rows, keys), problem.kv_heads
    if problem.ragged:
        key_blocks += problem.batch
    else:
        units *= problem.batch
    sharing = problem.heads // problem.kv_heads
    columns = problem.head_dim + problem.value_dim
    unit_bytes = problem.q_rows * sharing * columns * ITEMSIZE[problem.dtype]
    return key_blocks, units, min(units, max(1, L2_BYTES // max(1, unit_bytes)))
