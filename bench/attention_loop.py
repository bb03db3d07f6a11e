"""What a warp does for one tile of keys in a compiled attention kernel.

The products are loops of their own inside the loop over tiles where the compiler does not unroll
them, and SASS does not say how often these run. The arithmetic of a tile does: a warp of the kernel
`attention<Op, warps, row tiles, keys, dim, value_dim, ...>` multiplies 16 rows of each row tile by
the keys, dim and value_dim elements each. What the outer loop does not do of that, is done by the
loops inside it, which count as often as it takes.
"""

from __future__ import annotations

import re

from bench import sass

HEADER = "attention.cuh"
FMA_FLOPS = 64  # of a warp
SUMS_ROWS = ("Tf32Op", "DoubleOp")  # add up each row by a product with eight columns of ones


def mix(blocks: list[sass.Block], name: str) -> tuple[sass.Region, dict[str, int]]:
    """The loop over tiles of keys, and what a warp does in one pass of it."""
    flops = tensor_flops if uses_tensor_cores(name) else fma_flops
    loops, body = sass.regions(blocks)
    loop = max(loops, key=lambda region: flops(region.whole), default=body)
    outer, inner = flops(loop.path), flops(loop.whole) - flops(loop.path)
    times = (tile_flops(name) - outer) / inner if inner > 0 else 0
    once, whole = sass.mix(loop.path), sass.mix(loop.whole)
    found = {key: once[key] + round(times * (whole[key] - once[key])) for key in once}
    found["total"] = sum(found[key] for key in sass.CATEGORIES)
    return loop, found


def tile_flops(name: str) -> int:
    """FLOPs of a warp on one tile of keys, both products."""
    op = re.match(r"attention<(\w+)", name)
    numbers = [int(number) for number in re.findall(r"(?<=, )\d+(?=, )", name)]
    if op is None or len(numbers) < 5:
        raise ValueError(f"not a kernel of {HEADER}: {name}")
    _, row_tiles, keys, dim, value_dim = numbers[:5]
    columns = dim + value_dim + (8 if op[1] in SUMS_ROWS else 0)
    return 2 * 16 * row_tiles * keys * columns


def uses_tensor_cores(name: str) -> bool:
    """Whether products run on tensor cores; float32 has none that are exact."""
    return not name.startswith("attention<FloatOp")


def tensor_flops(path: list[sass.Instruction]) -> int:
    return sass.mix(path)["tensor_flops"]


def fma_flops(path: list[sass.Instruction]) -> int:
    return FMA_FLOPS * sum(instruction.base == "FFMA" for instruction in path)
