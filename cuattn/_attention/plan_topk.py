"""Which kernel computes a call of `attention_topk`, and why: tiles, passes, and parts of keys.

Plain integers in, frozen dataclasses out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from cuattn._attention.plan import OPS, whole
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import CTYPES, ITEMSIZE, Kernel, ceil_div, power_of_two

MOST_IN_PASS = 64  # kMostInPass of attention/topk_rows.cuh: two candidates a lane
LEAST_PART, MOST_PARTS = 1024, 256  # keys whose sum of exponentials is one term; terms of a row
MERGE_WARPS = 4
SMEM_KIB = 99  # what a block has on every device
QUEUE = 31  # and a tile of keys: candidates that a row collects

# Keys of a tile by the bytes of a row of K: a lane has two rows of these scores, and a queue of
# each row must hold them all.
KEYS = ((512, 32), (1024, 16), (2048, 8))


class Pass(NamedTuple):
    """Kernels that select the `first` to `first + number` best keys of each query."""

    first: int
    number: int


@dataclass(frozen=True)
class TopKPlan:
    """Kernels of a call, which run in each pass, and what their parameters say."""

    kernel: Kernel
    merge: Kernel | None
    passes: tuple[Pass, ...]
    part: int  # keys
    parts: int
    splits: int  # blocks that share a row
    row_blocks: int
    heads_in_l2: int
    bytes: tuple[int, int, int]  # of the workspace: states, lists, bounds


def parts_of(keys: int) -> tuple[int, int]:
    """Keys of a part, a power of two, and how many parts there are."""
    part = max(LEAST_PART, power_of_two(ceil_div(keys, MOST_PARTS)))
    return part, max(1, ceil_div(keys, part))


@lru_cache(maxsize=4096)
def plan_topk(problem: AttentionProblem, num: int, num_sms: int) -> TopKPlan:
    """Kernels of one call for the `num` best keys of each query."""
    item, dim = ITEMSIZE[problem.dtype], whole(problem.head_dim)
    is_double = problem.dtype == "float64"
    candidate = 16 if is_double else 8
    keys = next(keys for most, keys in KEYS if dim * item <= most)
    per_lane = 1 if num <= 32 else 2
    # Four warps have 64 rows, for which K is read once; few rows take fewer, and so do wide ones.
    most = min(4, power_of_two(max(1, ceil_div(problem.q_rows, 16))))
    warps, slots, smem = next(
        (warps, slots, smem)
        for warps in (4, 2, 1)
        for slots in (3, 2)
        if warps <= most
        and (smem := (16 * warps + slots * keys) * dim * item
             + 16 * warps * (32 * per_lane + QUEUE + keys) * candidate) <= SMEM_KIB * 1024
    )  # fmt: skip
    arguments = {
        "Op": OPS[problem.op],
        "kWarps": warps,
        "kKeys": keys,
        "kDim": dim,
        "kSlots": slots,
        "kPerLane": per_lane,
        "kVector": problem.vector,
        "Bias": "NoBias" if problem.bias is None else CTYPES[problem.bias],
        "kMasked": problem.masked,
    }
    row_blocks, units, heads_in_l2 = problem.grid(16 * warps)
    blocks = units * row_blocks
    # Blocks share rows where too few would fill the device: two a multiprocessor, of one warp four.
    part, parts = parts_of(problem.k_rows)
    splits = max(1, min(parts, (4 if warps == 1 else 2) * num_sms // max(1, blocks)))
    splits = ceil_div(parts, ceil_div(parts, splits)) if num else 1
    kernel = Kernel("attention_topk", arguments, blocks * splits, 32 * warps, smem_bytes=smem)
    rows, merge = units * problem.q_rows, None
    passes = tuple(
        Pass(first, min(MOST_IN_PASS, num - first)) for first in range(0, max(num, 1), MOST_IN_PASS)
    )
    if splits > 1:
        types = {"T": CTYPES[problem.dtype], "Acc": "double" if is_double else "float"}
        arguments = {**types, "kWarps": MERGE_WARPS, "kPerLane": per_lane}
        merge = Kernel("attention_topk_merge", arguments, rows, 32 * MERGE_WARPS)
    sizes = (
        rows * parts * 2 * (8 if is_double else 4) if merge else 0,
        rows * splits * passes[0].number * candidate if merge else 0,
        2 * rows * candidate if len(passes) > 1 else 0,
    )
    return TopKPlan(kernel, merge, passes, part, parts, splits, row_blocks, heads_in_l2, sizes)
