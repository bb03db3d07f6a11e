"""Gradients of attention on Hopper in five products of the scores: the kernel of dk and dv stores
dS, of which dq is one more product, instead of S and dP being computed once more for it.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention import plan_backward_sm90 as sm90
from cuattn._attention.plan_backward import Launch, key_grid
from cuattn._attention.plan_sm90 import DIMS, HALF_BYTES, REGISTERS, schedule_of
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import Kernel, ceil_div

IMAGE = 64  # keys and queries of an image of dS, and rows of a warpgroup
IMAGE_BYTES = IMAGE * IMAGE * HALF_BYTES
GROUPS = 4  # warpgroups of a block, which share K: of L2 they read half as much of it as of dS

# Of all devices, whatever memory is free: the bits of a result must not depend on that.
WORKSPACE_BYTES = 2**30
LEAST_ROWS = 1024  # queries and keys; fewer are no work for two kernels of this size
LEAST_BLOCKS = 256  # of as many heads as fit: two for nearly each of 132 multiprocessors


class Tile(NamedTuple):
    """Of a table the first that fits is taken."""

    max_dim: int  # of heads
    stages: int  # of K and of dS
    why: str  # shared memory, of which there are 227 KiB


TILES = (
    Tile(64, 4, "192 KiB"),
    Tile(128, 4, "224 KiB"),
)


class Round(NamedTuple):
    """Heads of K whose dS is stored at the same time."""

    unit: int  # the first
    units: int
    kv: Launch
    ds: Launch


class DsPlan(NamedTuple):
    """Two kernels, round by round."""

    kv: sm90.Sm90Launch  # its boxes
    rounds: tuple[Round, ...]
    q_tiles: int  # images of a head
    k_tiles: int
    panel: int  # columns of a box of K
    images: int  # of a round


@lru_cache(maxsize=4096)
def plan_ds(problem: AttentionProblem, compute_capability: int, num_sms: int) -> DsPlan | None:
    """dq, dk and dv; None: dq has a kernel of its own, which stores nothing.

    That has other last bits, as its P is not rounded. So the choice depends on nothing but a
    sequence itself, and nothing is stored of those whose lengths only the device knows.
    """
    kv = sm90.plan_kv_sm90(problem, compute_capability, num_sms)
    if kv is None or kv.rows["q"] % IMAGE or problem.ragged:
        return None
    if min(problem.q_rows, problem.k_rows) < LEAST_ROWS:
        return None
    # Blocks of keys and tiles of queries store two images side by side.
    q_pairs, k_pairs = (ceil_div(rows, 2 * IMAGE) for rows in (problem.q_rows, problem.k_rows))
    q_tiles, k_tiles = 2 * q_pairs, 2 * k_pairs
    sharing = problem.heads // problem.kv_heads
    key_blocks, units, units_in_l2 = key_grid(problem, sm90.GROUPS * sm90.ROWS)
    most = WORKSPACE_BYTES // (sharing * q_tiles * k_tiles * IMAGE_BYTES)
    if most * key_blocks < LEAST_BLOCKS:
        return None
    together = min(units, most)

    row_blocks, _, heads_in_l2 = problem.grid(GROUPS * IMAGE)
    arguments = kv.launch.kernel.arguments
    dim = next(d for d in DIMS if problem.head_dim <= d)
    stages = next(tile.stages for tile in TILES if dim <= tile.max_dim)
    storing = replace(kv.launch.kernel, arguments={**arguments, "kStoreDs": True})
    block = 128 * (GROUPS + 1)
    ds = Kernel(
        "attention_backward_ds_sm90",
        {"T": arguments["T"], "kWarpgroups": GROUPS, "kStages": stages, "kDim": dim},
        0,
        block,
        smem_bytes=stages * (IMAGE * dim * HALF_BYTES + GROUPS * IMAGE_BYTES + 16)
        + GROUPS * sm90.STAGING,
        suffix="a",
        registers=REGISTERS // block // 8 * 8,
    )
    rounds = []
    for unit in range(0, units, together):
        count = min(together, units - unit)
        key_heads, heads = min(units_in_l2, count), min(heads_in_l2, count * sharing)
        of_kv = schedule_of(problem, key_blocks, count, key_heads, num_sms)
        of_ds = schedule_of(problem, row_blocks, count * sharing, heads, num_sms)
        storing = replace(storing, grid=min(of_kv.blocks, num_sms))
        ds = replace(ds, grid=min(of_ds.blocks, num_sms))
        rounds.append(
            Round(
                unit,
                count,
                Launch(storing, key_blocks, key_heads, of_kv),
                Launch(ds, row_blocks, heads, of_ds),
            )
        )
    images = together * sharing * q_tiles * k_tiles
    return DsPlan(kv, tuple(rounds), q_tiles, k_tiles, kv.panels["k"], images)
