"""What a model predicts that the gradients of attention take on a GPU: nothing is measured here.

    time of a block    (rows of its loop + START) FLOPs of a row / (rate / blocks side by side)
    rate               EFFICIENCY * dense rate of the GPU
    time of a kernel   each block, the longest first, where the device is free first
    time of a call     the kernels one after the other

Rows of the loop are the queries or keys of the tiles that a block sees: tiles on the diagonal count
whole, and the products are all that the kernels compute: four and three, or four and one where dS
is stored, of the papers' five.
The statistics of the rows are in START. Nothing is said of other GPUs and other kernels (other
dtypes, masks, biases, unaligned arrays): None.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench.compiled import backward_ds_loop, backward_loop, backward_sm90_loop

ROWS = "attention/backward_rows.cuh"
KV = (backward_loop.KV, backward_sm90_loop.KV)
DS = backward_ds_loop.HEADER
Q = (backward_loop.Q, backward_sm90_loop.Q, DS)
GENERAL = (backward_loop.KV, backward_loop.Q)
THREADS = 256  # of an SM: those of the general kernels have up to 255 of its 65536 registers


class Gpu(NamedTuple):
    """NVIDIA's datasheets: dense FLOP/s of 16-bit types, at this clock."""

    flops: float
    mhz: int


# By compute capability and multiprocessors: others of the same architecture may be slower by more
# than these say (H20).
GPUS = {
    (90, 132): Gpu(989.4e12, 1980),  # H100 SXM, H200
    (90, 114): Gpu(756e12, 1755),  # H100 PCIe
    (80, 108): Gpu(312e12, 1410),  # A100
}

# Of dense FLOPs, what a loop reaches, by the largest dim of heads.
EFFICIENCY = {
    # FlashAttention-3's forward pass, whose loop is that of q, reaches 497 and 648 of 989 TFLOP/s
    # at 64 and 128 (arXiv:2407.08608, figure 5). A tile of kv has one product more, and at 128
    # takes as many cycles of shared memory as of the tensor cores. At 192 and 256: assumed.
    backward_sm90_loop.KV: ((64, 0.50), (128, 0.62)),
    backward_sm90_loop.Q: ((64, 0.50), (128, 0.65), (256, 0.60)),
    # 2 dim FLOPs for 2 bytes of dS: 90 % of the 3.35 TB/s of an H100, and of its 989.4 TFLOP/s.
    DS: ((64, 0.19), (128, 0.38)),
    # Of an A100. At 64 shared memory takes as many cycles as the tensor cores, at 128 one and a
    # half times (kv) and one and a third (q) as many. The loops reach 2/3 of the first bound, 5/6
    # and 7/8 of the second: assumed, as nothing of this kind is published.
    backward_loop.KV: ((64, 0.67), (256, 0.56)),
    backward_loop.Q: ((64, 0.67), (128, 0.66), (256, 0.60)),
}
# A multiprocessor of Hopper has as much shared memory a cycle as one of an A100, but twice its
# tensor FLOPs: there the general kernels reach half of the efficiency.
GENERAL_ON_HOPPER = 0.5

# Rows of the loop that the start and the end of a block take as long as: rates of the backward pass
# by sequence length S fall as S / (S + START), 512 to 16384. FlashAttention-3, arXiv:2407.08608,
# figure 6, on H100; FlashAttention-2, arXiv:2307.08691, figure 4, on A100. Blocks of these are not
# persistent: what Hopper's kernels here save by that is not counted.
START = {90: 320, 80: 160}


class Tile(NamedTuple):
    """What a block computes at a time."""

    own: int  # rows of the block
    loop: int  # rows of the tile that passes by
    flops: int


def attention_backward(
    shape: dict[str, int], kernels: Sequence[Any], gpu: dict[str, Any] | None
) -> float | None:
    """Seconds of a call; None if the model says nothing of it.

    Parameters
    ----------
    shape
        Of a cell.
    kernels
        That the call launches.
    gpu
        As in bench.timing.environment.
    """
    where = (gpu["compute_capability"], gpu["num_sms"]) if gpu else None
    computing = [kernel for kernel in kernels if kernel.header != ROWS]
    if where not in GPUS or not computing or not all(map(_is_known, computing)):
        return None
    flops, mhz = GPUS[where]
    flops *= (gpu["sm_mhz_max"] or mhz) / mhz
    seconds, launched = 0.0, Counter[str]()
    for kernel in computing:
        count = len(tiles(kernel, shape))  # blocks of a head
        if kernel.header in GENERAL:
            heads = kernel.grid // count  # also parts of one
        else:  # blocks are persistent, and launches share the heads
            heads = shape["batch"] * shape["heads" if kernel.header in Q else "kv_heads"]
            of_kind = sum(other.header == kernel.header for other in computing)
            heads = (heads + launched[kernel.header]) // of_kind
        launched[kernel.header] += 1
        seconds += _kernel_seconds(kernel, shape, heads, flops, *where)
    return seconds


def efficiency(kernel: Any, compute_capability: int) -> float:
    """What a kernel reaches of the dense FLOP/s, while its loop runs."""
    dim = max(kernel.arguments["kDim"], kernel.arguments.get("kValueDim", 0))
    found = next(share for most, share in EFFICIENCY[kernel.header] if dim <= most)
    general = compute_capability == 90 and kernel.header in GENERAL
    return found * (GENERAL_ON_HOPPER if general else 1)


def tiles(kernel: Any, shape: dict[str, int]) -> list[int]:
    """How many tiles each block of a head sees, in the order of the rows."""
    tile, (queries, keys) = _tile(kernel), (shape["seqlen_q"], shape["seqlen_k"])
    causal, offset = shape["causal"], keys - queries
    if kernel.header in Q:
        ends = [min(first + tile.own, queries) for first in range(0, queries, tile.own)]
        seen = [min(max(0, end + offset), keys) if causal else keys for end in ends]
        return [-(-count // tile.loop) for count in seen]
    sharing = shape["heads"] // shape["kv_heads"]
    begins = [max(0, first - offset) if causal else 0 for first in range(0, keys, tile.own)]
    # Tiles of queries begin at multiples of their size.
    return [sharing * (-(-queries // tile.loop) - begin // tile.loop) for begin in begins]


def _is_known(kernel: Any) -> bool:
    """Whether EFFICIENCY is of it."""
    if kernel.header not in GENERAL:
        return kernel.header in EFFICIENCY  # one of Hopper's
    half = kernel.arguments["Op"].startswith("HalfOp")
    options = [kernel.arguments[name] for name in ("kVector", "kModified", "Bias", "kMasked")]
    return half and options == [True, False, "NoBias", False]


def _tile(kernel: Any) -> Tile:
    arguments = kernel.arguments
    if kernel.header == DS:
        groups, rows = arguments["kWarpgroups"], backward_ds_loop.KEYS
        return Tile(rows * groups, rows, groups * 2 * rows * rows * arguments["kDim"])
    loop = arguments["kQueries" if kernel.header in KV else "kKeys"]
    if "kWarpgroups" in arguments:
        groups = arguments["kWarpgroups"]
        return Tile(64 * groups, loop, groups * backward_sm90_loop.tile_flops(kernel))
    warps = arguments["kWarps"]
    return Tile(16 * warps * arguments["kMTiles"], loop, warps * backward_loop.tile_flops(kernel))


def _kernel_seconds(
    kernel: Any,
    shape: dict[str, int],
    heads: int,
    flops: float,
    compute_capability: int,
    num_sms: int,
) -> float:
    tile, of_head = _tile(kernel), tiles(kernel, shape)
    places = num_sms * max(1, THREADS // kernel.block)  # blocks side by side
    row = tile.flops / tile.loop / (efficiency(kernel, compute_capability) * flops / places)
    blocks = [(count * tile.loop + START[compute_capability]) * row for count in of_head]
    busy = [0.0] * places
    for seconds in sorted(blocks * heads, reverse=True):
        heapq.heapreplace(busy, busy[0] + seconds)
    return max(busy)
