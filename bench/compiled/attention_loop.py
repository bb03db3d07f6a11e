"""What a warp does for one tile of keys in a compiled attention kernel.

The products are loops of their own inside the loop over tiles where the compiler does not unroll
them, and SASS does not say how often these run. The arithmetic of a tile does: a warp multiplies 16
rows of each of its kMTiles row tiles by kKeys keys, kDim and kValueDim elements each. What the
outer loop does not do of that, is done by the loops inside it, which count as often as it takes.
"""

from __future__ import annotations

from typing import Any

from bench.compiled import sass

HEADER = "attention/forward.cuh"
CACHED = True  # blocks read the same keys at the same time
FMA_FLOPS = 64  # of a warp
SUMS_ROWS = ("Tf32Op", "DoubleOp")  # add up each row by a product with eight columns of ones


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The loop over tiles of keys, and what a warp does in one pass of it."""
    return of_tile(blocks, kernel, tile_flops(kernel))


def of_tile(blocks: list[sass.Block], kernel: Any, most: int) -> tuple[sass.Region, dict[str, int]]:
    """The loop over tiles, of `most` FLOPs for a warp, and what it does in one pass."""
    flops = tensor_flops if uses_tensor_cores(kernel) else fma_flops
    loops, body = sass.regions(blocks)
    loop = max(loops, key=lambda region: flops(region.whole), default=body)
    outer, inner = flops(loop.path), flops(loop.whole) - flops(loop.path)
    times = (most - outer) / inner if inner > 0 else 0
    once, whole = sass.mix(loop.path), sass.mix(loop.whole)
    found = {key: once[key] + round(times * (whole[key] - once[key])) for key in once}
    found["total"] = sum(found[key] for key in sass.CATEGORIES)
    return loop, found


def tile_flops(kernel: Any) -> int:
    """FLOPs of a warp on one tile of keys, both products."""
    if kernel.header != HEADER:
        raise ValueError(f"not a kernel of {HEADER}: {kernel.name}")
    tile = kernel.arguments
    columns = tile["kDim"] + tile["kValueDim"] + (8 if tile["Op"] in SUMS_ROWS else 0)
    return 2 * 16 * tile["kMTiles"] * tile["kKeys"] * columns


def uses_tensor_cores(kernel: Any) -> bool:
    """Whether products run on tensor cores; float32 has none that are exact."""
    return kernel.arguments["Op"] != "FloatOp"


def tensor_flops(path: list[sass.Instruction]) -> int:
    return sass.mix(path)["tensor_flops"]


def fma_flops(path: list[sass.Instruction]) -> int:
    return FMA_FLOPS * sum(instruction.base == "FFMA" for instruction in path)
