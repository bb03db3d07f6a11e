"""The attention kernel of Hopper: which calls it computes, its tiles, grid and tensor maps.

As `_plan_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cuattn._plan import Kernel
from cuattn._plan_attention import L2_BYTES, AttentionProblem
from cuattn._problem import CTYPES, ceil_div
from cuattn._tensor_map import ALIGNMENT, Boxes

HALVES = ("float16", "bfloat16")
ITEMSIZE = 2
SM90_SOFTCAP = (
    1024  # the most; the kernel's tanh errs by 2^-22 softcap, which then exceeds the scores'
)
STRIDE_LIMIT = 2**40 // 64  # bytes, of 64 packed heads
REGISTERS = 65536  # of a multiprocessor: warpgroups give each other what others do not need

DIMS = (64, 96, 128, 192, 256)  # of tiles

# Tiles: (head dimension and columns of `out` at most, whether scores may be more than scaled,
# warpgroups of 64 rows, keys, stages of K and of V, whether `out` has shared memory of its own,
# whether warpgroups take turns, why). The first row that fits is taken. In KiB: shared memory, of
# which there are 227.
TILES = (
    (64, 64, False, 3, 128, 4, True, True, "176 KiB; three warpgroups share K and V"),
    (64, 64, True, 2, 128, 4, True, True, "160 KiB; 160 registers are too few for a rule"),
    (96, 96, True, 2, 128, 2, True, True, "144 KiB"),
    (128, 128, True, 2, 128, 2, True, True, "192 KiB"),
    (192, 128, False, 2, 128, 2, False, False, "208 KiB"),
    (192, 192, True, 2, 112, 2, False, False, "216 KiB; O leaves no room for more keys"),
    (256, 256, False, 2, 80, 2, False, False, "224 KiB"),
    (256, 256, True, 2, 64, 2, False, False, "192 KiB; registers"),
)


@dataclass(frozen=True)
class Sm90Plan:
    """The kernel of a call, what its parameters say of the grid, and its boxes."""

    kernel: Kernel
    row_blocks: int
    section: int
    blocks: int
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
    special = problem.bias is not None or problem.masked or not problem.tma
    if compute_capability != 90 or problem.op not in HALVES or special or min(sizes) == 0:
        return None
    dim = next(d for d in DIMS if problem.head_dim <= d)
    value_dim = next(d for d in DIMS if problem.value_dim <= d)
    groups, keys, stages, own_out, turns = next(
        row[3:8]
        for row in TILES
        if dim <= row[0] and value_dim <= row[1] and problem.modified <= row[2]
    )
    rows = 64 * groups

    group = problem.heads // problem.kv_heads
    each = ceil_div(problem.q_rows, problem.batch) if problem.ragged else problem.q_rows
    packs = [p for p in (1, 2, 4, 8, 16, 32, 64) if group % p == 0]
    pack = min(packs, key=lambda p: ceil_div(each * p, rows) * (problem.heads // p))
    heads = problem.heads // pack
    row_blocks = ceil_div(problem.q_rows, rows // pack)
    units = heads
    if problem.ragged:
        row_blocks += problem.batch  # each sequence may end in a block of its own
    else:
        units *= problem.batch
    kv_bytes = problem.k_rows * (problem.head_dim + problem.value_dim) * ITEMSIZE
    section = min(units, group // pack * max(1, L2_BYTES // kv_bytes))
    blocks = units * row_blocks

    columns = max(dim, value_dim) if not own_out else dim + value_dim
    smem = (rows * columns + stages * keys * (dim + value_dim)) * ITEMSIZE
    smem += 8 * (2 * groups + 4 * stages + 1)  # barriers
    arguments = {
        "T": CTYPES[problem.dtype],
        "kGroups": groups,
        "kKeys": keys,
        "kStages": stages,
        "kDim": dim,
        "kValueDim": value_dim,
        "kOwnOut": own_out,
        "kPingPong": turns,
        "kModified": problem.modified,
    }
    grid, block = min(blocks, num_sms), 128 * (groups + 1)
    kernel = Kernel(
        "attention_forward_sm90",
        arguments,
        grid,
        block,
        smem_bytes=smem,
        suffix="a",
        registers=REGISTERS // block // 8 * 8,
    )
    q_panel, v_panel = (64 if d % 64 == 0 else 32 for d in (dim, value_dim))
    return Sm90Plan(kernel, row_blocks, section, blocks, pack, q_panel, v_panel, keys)


def is_tma(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether TMA can move (batch, heads, rows, columns) of 16-bit elements, strides in bytes."""
    *outer, columns = zip(shape, strides, strict=True)
    return columns[1] == ITEMSIZE and all(
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
        columns * ITEMSIZE,
    )
