"""The attention kernel of Hopper: which calls it computes, its tiles, grid and tensor maps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, Kernel, ceil_div
from cuattn._device.tensor_map import ALIGNMENT, Boxes

HALVES = ("float16", "bfloat16")
HALF_BYTES = 2
SM90_SOFTCAP = 2.0**64  # the most: scores that are divided by larger ones underflow
STRIDE_LIMIT = 2**40 // 64  # bytes, of 64 packed heads
REGISTERS = 65536  # of a multiprocessor: warpgroups give each other what others do not need

DIMS = (64, 96, 128, 192, 256)  # of tiles


class Tile(NamedTuple):
    """What a block computes at a time; the first that fits is taken."""

    max_dim: int  # of heads
    max_value_dim: int  # columns of `out`
    modified: bool  # whether scores may be more than scaled
    warpgroups: int  # of 64 rows
    keys: int
    stages: int  # of K and of V
    own_out: bool  # whether `out` has shared memory of its own
    ping_pong: bool  # whether warpgroups take turns: FlashAttention-3, heads_in_l2 3.1
    why: str  # shared memory, of which there are 227 KiB, and what else counts
    scored: bool = True  # whether scores may have an expression


TILES = (
    Tile(64, 64, False, 3, 128, 4, True, True, "176 KiB; three warpgroups share K and V"),
    Tile(64, 64, True, 2, 128, 4, True, True, "160 KiB; 160 registers are too few for a rule"),
    Tile(96, 96, True, 2, 128, 2, True, True, "144 KiB"),
    Tile(128, 128, True, 2, 128, 2, True, True, "192 KiB"),
    Tile(192, 128, False, 2, 128, 2, False, False, "208 KiB"),
    Tile(192, 192, True, 2, 112, 2, False, False, "216 KiB; O leaves no room for more keys", False),
    Tile(192, 192, True, 2, 80, 2, False, False, "168 KiB; registers of expressions"),
    Tile(256, 256, False, 2, 80, 2, False, False, "224 KiB"),
    Tile(256, 256, True, 2, 64, 2, False, False, "192 KiB; registers"),
)

BLOCKED_TILES = (  # tiles of a block mask, of multiples of 128 queries and keys, are made of these
    *TILES[1:5],
    Tile(192, 192, True, 2, 64, 2, False, False, "144 KiB"),
    Tile(256, 256, True, 2, 64, 2, False, False, "192 KiB; no registers for an expression", False),
)


class Schedule(NamedTuple):
    """What the persistent blocks of a kernel share out, in its parameters."""

    blocks: int  # of rows or of keys
    section: int  # of these, among which those with little to do make up for those with much
    rounds: int  # a block of the grid computes one of them in a round
    turns: int  # rounds of a section


@dataclass(frozen=True)
class Sm90Plan:
    """The kernel of a call, what its parameters say of the grid, and its boxes."""

    kernel: Kernel
    row_blocks: int
    heads_in_l2: int
    schedule: Schedule
    pack: int  # query heads whose rows are computed together
    q_panel: int  # columns of a box
    v_panel: int
    keys: int


@lru_cache(maxsize=4096)
def plan_attention_sm90(
    problem: AttentionProblem, compute_capability: int, num_sms: int
) -> Sm90Plan | None:
    """Kernel of one call on a device; None: the general one computes it."""
    sizes = problem.q_rows, problem.k_rows, problem.head_dim, problem.value_dim
    masked = problem.masked and not problem.blocked
    special = problem.bias is not None or masked or not problem.tma
    if compute_capability != 90 or problem.op not in HALVES or special or min(sizes) == 0:
        return None
    if max(problem.head_dim, problem.value_dim) > DIMS[-1]:
        return None
    dim = next(d for d in DIMS if problem.head_dim <= d)
    value_dim = next(d for d in DIMS if problem.value_dim <= d)
    scored = problem.score is not None
    fitting = [
        t
        for t in (BLOCKED_TILES if problem.blocked else TILES)
        if dim <= t.max_dim
        and value_dim <= t.max_value_dim
        and problem.modified <= t.modified
        and scored <= t.scored
    ]
    if not fitting:
        return None
    tile = fitting[0]
    keys, rows = tile.keys, 64 * tile.warpgroups

    sharing = problem.heads // problem.kv_heads
    each = ceil_div(problem.q_rows, problem.batch) if problem.ragged else problem.q_rows
    packs = [p for p in (1, 2, 4, 8, 16, 32, 64) if sharing % p == 0]
    if problem.blocked:
        packs = [1]  # each head has its own list
    pack = min(packs, key=lambda p: ceil_div(each * p, rows) * (problem.heads // p))
    row_blocks, units, heads_in_l2 = problem.grid(rows, pack)
    schedule = schedule_of(problem, row_blocks, units, heads_in_l2, num_sms)

    columns = max(dim, value_dim) if not tile.own_out else dim + value_dim
    smem = (rows * columns + tile.stages * keys * (dim + value_dim)) * HALF_BYTES
    smem += 8 * (2 * tile.warpgroups + 4 * tile.stages + 1)  # barriers
    if problem.blocked:
        smem += 4 * 16 * tile.warpgroups  # AttentionSmem::seen
    arguments = {
        "T": CTYPES[problem.dtype],
        "kWarpgroups": tile.warpgroups,
        "kKeys": keys,
        "kStages": tile.stages,
        "kDim": dim,
        "kValueDim": value_dim,
        "kOwnOut": tile.own_out,
        "kPingPong": tile.ping_pong,
        "kModified": problem.modified,
        "Tiles": problem.tiles,
    }
    block = 128 * (tile.warpgroups + 1)
    grid = min(schedule.blocks, num_sms)
    kernel = problem.kernel("attention_forward_sm90", arguments, grid, block // 32, smem)
    kernel = replace(kernel, suffix="a", registers=REGISTERS // block // 8 * 8)
    q_panel, v_panel = (64 if d % 64 == 0 else 32 for d in (dim, value_dim))
    return Sm90Plan(kernel, row_blocks, heads_in_l2, schedule, pack, q_panel, v_panel, keys)


def schedule_of(
    problem: AttentionProblem, row_blocks: int, units: int, heads_in_l2: int, width: int
) -> Schedule:
    """Of `row_blocks` blocks of each of `units` heads, or packs of heads, for at most `width`."""
    blocks, together = (
        units * row_blocks,
        row_blocks * heads_in_l2,
    )  # from the longest to the shortest
    section = together if problem.bounded and together >= width else blocks
    turns = ceil_div(section, min(blocks, width))
    return Schedule(blocks, section, ceil_div(blocks, section) * turns, turns)


def is_tma(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether TMA can move (batch, heads, rows, columns) of 16-bit elements, strides in bytes."""
    *outer, columns = zip(shape, strides, strict=True)
    return columns[1] == HALF_BYTES and all(
        size <= 1 or (0 < stride < STRIDE_LIMIT and stride % ALIGNMENT == 0)
        for size, stride in outer
    )


def box_of(
    dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, pack: int, columns: int
) -> Boxes:
    """How (batch, heads, rows, columns) move: `rows` rows at a time, of `pack` heads together, and
    as many `columns`. The map's dimensions are column, head within a pack, row, pack, batch.
    """
    batch, heads, length, width = shape
    batch_stride, head_stride, row_stride = (
        stride if size > 1 else ALIGNMENT
        for size, stride in zip(shape[:3], strides[:3], strict=True)
    )
    return Boxes(
        dtype,
        (width, pack, length, heads // pack, batch),
        (head_stride, row_stride, head_stride * pack, batch_stride),
        (columns, pack, rows // pack, 1, 1),
        columns * HALF_BYTES,
    )
