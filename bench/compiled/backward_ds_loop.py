"""What a warp does for one tile of keys in the compiled kernel of Hopper that makes dq of dS.

The loop and its path are found as in the kernel of the forward pass (attention_sm90_loop.py).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.compiled import attention_sm90_loop, backward_sm90_loop, sass

HEADER = "attention/backward_ds_sm90.cuh"
CACHED = False  # nobody else reads this dS
KEYS = 64  # of a tile, and queries of a warpgroup


def products(kernel: Any) -> Counter[str]:
    """How many of which tensor instructions a tile takes, both factors by columns."""
    return Counter({f"64x{kernel.arguments['kDim']}x16 tnspB": KEYS // 16})


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The main loop, and what a warp does in one pass of it."""
    path = attention_sm90_loop.main_path(blocks)
    # TMA reads dS, of which each warpgroup has its own. K, which all blocks read, stays in L2.
    read = KEYS * KEYS * attention_sm90_loop.ITEMSIZE // 128
    return sass.Region("loop", path, path), sass.mix(path) | {"read_bytes": read}


def faults(blocks: list[sass.Block], kernel: Any) -> list[str]:
    """What would make the kernel hang, or slow."""
    found = backward_sm90_loop.register_faults(blocks, kernel)
    loop = attention_sm90_loop.main_loop(blocks)
    passed = attention_sm90_loop.waits_before(blocks, loop)
    if any(i.access for i, _ in passed):
        found.append("global memory in the main loop")
    started = [(i, n) for i, n in passed if i.category == "tensor"]
    if attention_sm90_loop.products([i for i, _ in started]) != products(kernel):
        found.append("other products than planned")
    if any(n != {0} or ".tnspA" not in i.operands for i, n in started):
        found.append("a product behind a wait, or of rows")
    waits = [i.operands for i, _ in passed if i.opcode.startswith(attention_sm90_loop.WAIT)]
    if waits != ["gsb0, 0x1"]:
        found.append("a tile does not wait for the products of the one before alone")
    return found
