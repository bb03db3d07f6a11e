"""What a warp does for one tile in a compiled kernel of Hopper for attention_backward.

The loop and its path are found as in the kernel of the forward pass (attention_sm90_loop.py).
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from bench.compiled import attention_sm90_loop, sass

Q, KV = "attention/backward_q_sm90.cuh", "attention/backward_kv_sm90.cuh"
CACHED = True  # blocks read the same rows at the same time


def products(kernel: Any) -> tuple[Counter[str], Counter[str]]:
    """How many of which tensor instructions a tile takes: S and dP; then dQ, or dV and dK."""
    rows, dim, value_dim = sizes(kernel)
    sums = Counter({f"64x{dim}x16 tnspB": rows // 16})
    if kernel.header == KV:
        sums += Counter({f"64x{value_dim}x16 tnspB": rows // 16})
    return Counter({f"64x{rows}x16": (dim + value_dim) // 16}), sums


def tile_flops(kernel: Any) -> int:
    """FLOPs of a warpgroup on one tile."""
    counted = sum(products(kernel), Counter())
    shapes = {name: name.partition(" ")[0].split("x") for name in counted}
    return sum(2 * math.prod(map(int, shapes[name])) * n for name, n in counted.items())


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The main loop, and what a warp does in one pass of it."""
    path, (rows, dim, value_dim) = attention_sm90_loop.main_path(blocks), sizes(kernel)
    threads = 128 * kernel.arguments["kWarpgroups"]
    # TMA reads a tile for all rows of the block, and no thread does.
    read = rows * (dim + value_dim) * attention_sm90_loop.ITEMSIZE // threads
    return sass.Region("loop", path, path), sass.mix(path) | {"read_bytes": read}


def register_faults(blocks: list[sass.Block], kernel: Any) -> list[str]:
    """Registers that there are not, and what lies in memory for want of them."""
    found = []
    if any(i.category == "local" for block in blocks for i in block.instructions):
        found.append("local memory")
    roles, groups = attention_sm90_loop.roles(blocks), kernel.arguments["kWarpgroups"]
    found += [f"{role}: {used} registers of {most}" for role, (most, used) in roles.items()
              if used > most]  # fmt: skip
    budgets = [budget for budget, _ in roles.values()]
    if len(budgets) != 2 or min(budgets) + groups * max(budgets) > (groups + 1) * kernel.registers:
        found.append(f"setmaxnreg waits for more registers than the block has: {budgets}")
    return found


def stores(kernel: Any) -> int:
    """How often a thread stores 16 bytes of dS for a tile."""
    tile = kernel.arguments
    return tile["kQueries"] // 16 if tile.get("kStoreDs") else 0


def faults(blocks: list[sass.Block], kernel: Any) -> list[str]:
    """What would make the kernel hang, or slow."""
    found = register_faults(blocks, kernel)
    loop = attention_sm90_loop.main_loop(blocks)
    passed = attention_sm90_loop.waits_before(blocks, loop)
    accesses = [(i.access, i.width, n) for i, n in passed if i.access]
    if accesses != [("store", 16, {2})] * stores(kernel):  # no product has the registers of dS
        found.append("other accesses to global memory in the main loop than planned")
    # S and dP are started together, and the sums when both are there.
    for wanted, waits in zip(products(kernel), ({0}, {2}), strict=True):
        started = [i for i, n in passed if i.category == "tensor" and n == waits]
        if attention_sm90_loop.products(started) != wanted:
            found.append(f"other products than planned behind {min(waits)} waits")
    return found


def sizes(kernel: Any) -> tuple[int, int, int]:
    """Rows of a tile, columns of Q and K, and of V."""
    if kernel.header not in (Q, KV):
        raise ValueError(f"not a kernel of {Q} or {KV}: {kernel.name}")
    tile = kernel.arguments
    rows = tile["kQueries" if kernel.header == KV else "kKeys"]
    return rows, tile["kDim"], tile["kValueDim"]
