"""The kernels of Hopper for attention_backward: which calls they compute, their tiles and grids."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.plan_backward import Launch, key_grid
from cuattn._attention.plan_sm90 import DIMS, HALF_BYTES, HALVES, REGISTERS, schedule_of
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, Kernel

GROUPS, ROWS = 2, 64  # warpgroups of a block, and rows of each


class Tile(NamedTuple):
    """What passes by at a time; of a table the first that fits is taken."""

    max_dim: int  # of heads
    rows: int
    stages: int
    why: str  # shared memory, of which there are 227 KiB, and what else counts
    v_stages: int = 0  # of V, where they are others
    staging: bool = True  # whether results have shared memory of their own on their way out


Q_TILES = (
    Tile(64, 128, 3, "144 KiB"),
    Tile(96, 128, 2, "160 KiB"),
    Tile(128, 128, 2, "208 KiB"),
    Tile(192, 64, 2, "208 KiB"),
    Tile(
        256, 64, 2, "224 KiB: V, which is free before K, has one stage", v_stages=1, staging=False
    ),
)
KV_TILES = (
    Tile(64, 128, 3, "147 KiB"),
    Tile(96, 96, 3, "174 KiB"),
    Tile(128, 64, 3, "178 KiB; 80 queries would need more registers than there are"),
)
STAGING = ROWS * 64 * HALF_BYTES  # bytes of a warpgroup's


class Sm90Launch(NamedTuple):
    """A kernel, what its parameters say of the grid, and how many rows its boxes have."""

    launch: Launch
    rows: dict[str, int]  # of q, k, v and grad
    panels: dict[str, int]  # columns


def plan_q_sm90(
    problem: AttentionProblem, compute_capability: int, num_sms: int
) -> Sm90Launch | None:
    """dq; None: the general kernel computes it."""
    return _plan(problem, compute_capability, num_sms, of_keys=False)


def plan_kv_sm90(
    problem: AttentionProblem, compute_capability: int, num_sms: int
) -> Sm90Launch | None:
    """dk and dv; None: the general kernel computes them."""
    return _plan(problem, compute_capability, num_sms, of_keys=True)


@lru_cache(maxsize=4096)
def _plan(
    problem: AttentionProblem, compute_capability: int, num_sms: int, of_keys: bool
) -> Sm90Launch | None:
    sizes = problem.q_rows, problem.k_rows, problem.head_dim, problem.value_dim
    special = problem.modified or problem.masked or not problem.tma
    if compute_capability != 90 or problem.op not in HALVES or special or min(sizes) == 0:
        return None
    table = KV_TILES if of_keys else Q_TILES
    if max(sizes[2:]) > table[-1].max_dim:
        return None
    dim, value_dim = (next(d for d in DIMS if size <= d) for size in sizes[2:])
    tile = next(tile for tile in table if max(dim, value_dim) <= tile.max_dim)
    v_stages = tile.v_stages or tile.stages
    smem = GROUPS * ROWS * (dim + value_dim) * HALF_BYTES
    smem += tile.rows * (tile.stages * dim + v_stages * value_dim) * HALF_BYTES
    smem += tile.staging * GROUPS * STAGING
    barriers = 2 * (tile.stages + v_stages) + (2 if of_keys else 3)
    smem += 8 * (barriers + of_keys * tile.stages * tile.rows)  # and statistics
    arguments = {
        "T": CTYPES[problem.dtype],
        "kWarpgroups": GROUPS,
        "kQueries" if of_keys else "kKeys": tile.rows,
        "kStages": tile.stages,
        **({} if of_keys else {"kValueStages": v_stages}),
        "kDim": dim,
        "kValueDim": value_dim,
        **({"kStoreDs": False} if of_keys else {"kStaging": tile.staging}),
    }
    rows = GROUPS * ROWS
    row_blocks, units, heads_in_l2 = key_grid(problem, rows) if of_keys else problem.grid(rows)
    # The lengths of ragged sequences are unknown here: hardware gives a block to who is free.
    wide = problem.ragged or not tile.staging
    grid = units * row_blocks if wide else num_sms
    schedule = schedule_of(problem, row_blocks, units, heads_in_l2, grid)
    block = 128 * (GROUPS + 1)
    kernel = Kernel(
        f"attention_backward_{'kv' if of_keys else 'q'}_sm90",
        arguments,
        min(schedule.blocks, grid),
        block,
        smem_bytes=smem,
        suffix="a",
        registers=REGISTERS // block // 8 * 8,
    )
    of_q, of_k = (tile.rows, ROWS) if of_keys else (ROWS, tile.rows)
    q_panel, v_panel = (64 if d % 64 == 0 else 32 for d in (dim, value_dim))
    return Sm90Launch(
        Launch(kernel, row_blocks, heads_in_l2, schedule),
        {"q": of_q, "k": of_k, "v": of_k, "grad": of_q},
        {"q": q_panel, "k": q_panel, "v": v_panel, "grad": v_panel},
    )
