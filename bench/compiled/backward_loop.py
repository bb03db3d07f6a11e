"""What a warp does for one tile of queries or keys in a compiled kernel of attention_backward.

As in a kernel of the forward pass (attention_loop.py): 16 rows of each of its row tiles, times the
rows of the tile that passes by.
"""

from __future__ import annotations

from typing import Any

from bench.compiled import attention_loop, sass

Q, KV = "attention/backward_q.cuh", "attention/backward_kv.cuh"
CACHED = True  # blocks read the same rows at the same time


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The loop over tiles, and what a warp does in one pass of it."""
    return attention_loop.of_tile(blocks, kernel, tile_flops(kernel))


def tile_flops(kernel: Any) -> int:
    """FLOPs of a warp on one tile: S, dP, and what is added up of dQ, or of dK and dV."""
    tile = kernel.arguments
    columns = tile["kDim"] + tile["kValueDim"]
    if kernel.header == Q:
        return 2 * 16 * tile["kMTiles"] * tile["kKeys"] * (columns + tile["kColumns"])
    if kernel.header != KV:
        raise ValueError(f"not a kernel of {Q} or {KV}: {kernel.name}")
    if not tile["kKeyColumns"]:
        columns = tile["kDim"]  # dV needs no dP
    columns += tile["kKeyColumns"] + tile["kValueColumns"]
    return int(2 * 16 * tile["kMTiles"] * tile["kQueries"] * columns)
