"""Which kernel attends over a KV cache, and why: tiles, grid, parts and workspace.

Plain integers in, frozen dataclasses out. Nothing depends on lengths, which only the device knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.plan import OPS
from cuattn._attention.plan_sm90 import REGISTERS
from cuattn._attention.problem import NO_SCORE, Score
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div

MOST_PARTS = 128  # of a row's keys, where split_size is "auto": the last block merges them alone
LEAST_SPLIT = 256  # keys: a part of 16 rows is written and read in 3 % of the time of its keys


class Tile(NamedTuple):
    """What a block computes at a time; of a table the first that fits is taken."""

    rows: int
    max_dim: int  # of heads
    smem_kib: int  # that a block may have
    warps: int
    team: int  # warps that share keys, 16 rows each; of attention_wide those that share rows
    keys: int
    stages: int  # tiles of keys of a team's ring
    dims: tuple[int, int]  # columns of K, and of V at a time: accumulators are registers
    why: str  # shared memory, and what else counts
    template: str = "attention_decode"
    shared: bool = False  # V is columns of K
    capability: int = 0  # the only one that has its instructions; 0: all have

    @property
    def is_wide(self) -> bool:
        """Whether warps share the columns of a row, and the block is one team."""
        return self.template == "attention_wide"

    @property
    def teams(self) -> int:
        """With a ring each."""
        return self.warps // self.team if self.template == "attention_decode" else 1


def _latent(rows: int, smem_kib: int, warps: int, keys: int, stages: int, why: str) -> Tile:
    """Multi-head latent attention, of DeepSeek's 576 and 512 columns."""
    team = 16 * warps // rows
    return Tile(
        rows, 576, smem_kib, warps, team, keys, stages, (576, 512), why, "attention_wide", True
    )


HALF_TILES = (
    Tile(16, 64, 227, 8, 1, 32, 3, (64, 64), "194 KiB: 128 in flight, 4 times what HBM3e needs"),
    Tile(16, 64, 163, 8, 1, 16, 3, (64, 64), "98 KiB"),
    Tile(16, 64, 99, 8, 1, 16, 2, (64, 64), "66 KiB"),
    Tile(16, 128, 227, 4, 1, 32, 3, (128, 128), "196 KiB; 17 instructions per key, of 16 keys 23"),
    Tile(16, 128, 163, 4, 1, 32, 2, (128, 128), "132 KiB"),
    Tile(16, 128, 99, 4, 1, 16, 2, (128, 128), "68 KiB"),
    Tile(16, 256, 163, 4, 1, 16, 2, (256, 256), "136 KiB; more warps would spill"),
    Tile(16, 256, 99, 2, 1, 16, 2, (256, 256), "72 KiB"),
    Tile(64, 64, 99, 8, 4, 64, 2, (64, 64), "72 KiB: a loaded key feeds 64 rows"),
    Tile(64, 128, 163, 8, 4, 64, 2, (128, 128), "144 KiB"),
    Tile(64, 128, 99, 4, 4, 64, 2, (128, 128), "80 KiB"),
)
FLOAT_TILES = (
    Tile(16, 64, 99, 4, 1, 16, 2, (64, 64), "68 KiB"),
    Tile(16, 128, 163, 4, 1, 16, 2, (128, 128), "136 KiB"),
    Tile(16, 128, 99, 2, 1, 16, 2, (128, 128), "72 KiB"),
    Tile(16, 256, 99, 4, 4, 16, 2, (256, 256), "84 KiB", "attention_wide"),
)
DOUBLE_TILES = (
    Tile(16, 64, 163, 4, 1, 16, 2, (64, 64), "136 KiB"),
    Tile(16, 64, 99, 2, 1, 16, 2, (64, 64), "72 KiB"),
    Tile(16, 256, 163, 4, 4, 8, 2, (256, 256), "100 KiB", "attention_wide"),
    Tile(16, 256, 99, 1, 1, 8, 2, (256, 64), "72 KiB"),
)
TABLES = {"tf32": FLOAT_TILES, "float32": FLOAT_TILES, "float64": DOUBLE_TILES}

HALF_LATENT = (
    _latent(16, 227, 4, 32, 5, "206 KiB: 144 in flight"),
    _latent(16, 163, 4, 32, 3, "134 KiB"),
    _latent(16, 99, 4, 16, 3, "76 KiB"),
    _latent(32, 227, 8, 32, 4, "196 KiB: a loaded key feeds 32 rows; more would spill"),
    _latent(32, 163, 8, 16, 4, "116 KiB"),
    _latent(64, 227, 12, 64, 2, "224 KiB: wgmma, as mma takes longer than HBM")._replace(
        template="attention_latent_sm90", capability=90
    ),
)
FLOAT_LATENT = (
    _latent(16, 163, 4, 16, 2, "112 KiB"),
    _latent(16, 99, 4, 8, 2, "74 KiB"),
)
DOUBLE_LATENT = (_latent(16, 163, 8, 8, 2, "152 KiB"),)
LATENT_TABLES = {"tf32": FLOAT_LATENT, "float32": FLOAT_LATENT, "float64": DOUBLE_LATENT}


@dataclass(frozen=True)
class DecodeProblem:
    """What of one call decides on its kernel and on how keys are cut."""

    op: str  # a key of OPS
    dtype: str
    batch: int
    kv_heads: int
    rows: int  # of a key head: its group's heads times queries
    capacity: int  # keys of a sequence at most
    head_dim: int
    value_dim: int
    split_size: int | None = None  # keys of a part; None: equal shares
    values_in_keys: bool = False  # values are the first columns of the keys
    plain: bool = True  # numbers of the cache are q's, and scores are scaled and cut, but no more
    score: Score | None = None  # then not `plain`


@dataclass(frozen=True)
class DecodePlan:
    """The kernel of a call, what its parameters say, and its workspace."""

    kernel: Kernel
    row_tiles: int
    column_tiles: int
    values_in_keys: bool  # and of the tile of the keys in shared memory
    least_tiles: int
    split: int  # tiles; 0: equal shares
    counters: int  # 32 bits each, zero between launches
    part_bytes: int


def auto_split(capacity: int) -> int:
    """Keys of a part where the caller leaves that to us: a function of the capacity alone."""
    size = LEAST_SPLIT
    while size * MOST_PARTS < capacity:
        size *= 2
    return size


def divider(size: int) -> tuple[int, int]:
    """page_magic and page_shift of `DecodeParams`: division by a multiplication.

    H. Warren, Hacker's Delight, 10-9.
    """
    shift = (size - 1).bit_length()
    return ceil_div(2 ** (31 + shift), size), shift


@lru_cache(maxsize=4096)
def plan_decode(problem: DecodeProblem, compute_capability: int, num_sms: int) -> DecodePlan:
    """Kernel of one call on a device of this compute capability (80 for sm_80).

    Raises
    ------
    ValueError
        If blocks of the device have too little shared memory for so many columns.
    """
    kib = (
        99 if compute_capability in (86, 89, 120, 121) else 163 if compute_capability < 90 else 227
    )
    size = max(problem.head_dim, problem.value_dim)
    # Of wide rows 16 keys, which tf32 takes at a time, do not fit everywhere: more exact will do.
    op = "float32" if problem.op == "tf32" and size > 128 else problem.op
    fitting = [t for t in TABLES.get(op, HALF_TILES) if size <= t.max_dim and kib >= t.smem_kib]
    if problem.values_in_keys and not any(t.dims[0] == t.dims[1] for t in fitting):
        # float64 with 99 KiB a block: none fits, and keys are read once per 64 columns of values.
        latent = LATENT_TABLES.get(op, HALF_LATENT)
        own = (0, compute_capability) if problem.plain else (0,)
        fitting = [t for t in latent if kib >= t.smem_kib and t.capability in own] or fitting
    if not fitting:
        raise ValueError(
            f"q must have at most 256 columns of {problem.dtype} on a device of compute capability "
            f"{compute_capability / 10}, whose blocks have too little shared memory for more, but "
            f"it has {problem.head_dim}"
        )
    rows = max(t.rows for t in fitting)
    rows = min((t.rows for t in fitting if t.rows >= problem.rows), default=rows)
    tile = next(t for t in fitting if t.rows == rows)
    dim, value_dim = tile.dims
    row_tiles = ceil_div(problem.rows, rows)
    column_tiles = max(1, ceil_div(problem.value_dim, value_dim))
    item, acc = ITEMSIZE[problem.dtype], 8 if problem.op == "float64" else 4
    score = problem.score or NO_SCORE
    columns = dim if tile.shared else dim + value_dim
    smem = (rows * dim + tile.teams * tile.stages * tile.keys * columns) * item
    if tile.is_wide:
        smem += tile.warps * 16 * tile.keys * acc  # parts of the scores
    elif tile.capability:
        smem += rows * tile.keys * item  # P
    sizes = {"kKeys": tile.keys, "kDim": dim, "kValueDim": value_dim}
    arguments: dict[str, object] = {"T": CTYPES[problem.dtype], **sizes}
    if not tile.capability:
        team = "kColumnWarps" if tile.is_wide else "kTeam"
        arguments = {"Op": OPS[op], "kWarps": tile.warps, team: tile.team, **sizes}
        arguments["kStages"] = tile.stages
    if tile.is_wide:
        arguments["kShared"] = tile.shared
    if not tile.capability:
        arguments["Score"] = score.name
    pairs = problem.batch * problem.kv_heads * row_tiles * column_tiles
    split = 0 if problem.split_size is None else problem.split_size // tile.keys
    # Units of a pair at most: parts, or tiles.
    each = max(1, ceil_div(problem.capacity, tile.keys * (split or 1)))
    grid = max(1, min(num_sms, pairs * each))
    part_rows = min(rows, problem.rows)
    record = (part_rows * value_dim + ceil_div(3 * part_rows, 4) * 4) * acc
    block = 32 * tile.warps
    suffix, registers = ("a", REGISTERS // block // 8 * 8) if tile.capability else ("", 0)
    kernel = Kernel(
        tile.template,
        arguments,
        grid,
        block,
        smem_bytes=smem,
        suffix=suffix,
        registers=registers,
        text=score.text,
        expression=score.expression,
    )
    return DecodePlan(
        kernel,
        row_tiles,
        column_tiles,
        problem.values_in_keys and (tile.shared or dim == value_dim),
        tile.teams,
        split,
        pairs if split else grid,
        (pairs * each if split else 2 * grid) * record,
    )
