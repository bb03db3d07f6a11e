"""What a warp does for one tile of keys in a compiled kernel of attention over a KV cache.

The innermost loop with all products. Its path is the one that most tiles take: all products, all
asynchronous loads of whole chunks, and else the fewest instructions, so without masks, a rescale of
O, new keys, and the step to another segment.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from bench.compiled import sass
from bench.compiled.attention_loop import SUMS_ROWS, tensor_flops, uses_tensor_cores

HEADER = "attention/decode.cuh"
MOST_CONVERSIONS = 64  # of pairs, in a pass of a loop
CACHED = False  # nobody else reads these keys


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]] | None:
    """The loop over tiles of keys, and what a warp does in one pass of it. None without tensor
    cores: nothing tells products from the arithmetic of scores."""
    if not uses_tensor_cores(kernel):
        return None

    def score(instructions: list[sass.Instruction]) -> tuple[int, ...]:
        return tensor_flops(instructions), copied(instructions), -len(instructions)

    wholes = [
        (loop, sass.path_through(blocks, loop, score, nested=True))
        for loop in sass.find_loops(blocks)
    ]
    loop, whole = max(wholes, key=lambda one: (tensor_flops(one[1]), -len(one[0].members)))
    # Loops inside it, of products or of copies: how often they run, the tile says.
    nested = [
        {i for b in one.members for i in blocks[b].instructions}
        for one in sass.find_loops(blocks)
        if one.members < loop.members
    ]
    inside = set().union(*nested)
    copying = set().union(*(one for one in nested if copied([*one])))
    path, copies, products = (
        [i for i in whole if i in some] for some in (set(whole) - inside, copying, inside - copying)
    )
    found = Counter(sass.mix(path))
    for some, times in (
        (products, _times(tile_flops(kernel) - tensor_flops(path), tensor_flops(products))),
        (copies, _times(tile_bytes(kernel) - copied(path), copied(copies))),
    ):
        for key, count in sass.mix(some).items():
            found[key] += round(times * count)
    found["total"] = sum(found[key] for key in sass.CATEGORIES)
    own = {"keys": kernel.arguments["kKeys"], "converting": _converting(blocks, kernel)}
    return sass.Region("loop", path, whole), {**found, **own}


def _converting(blocks: list[sass.Block], kernel: Any) -> int:
    """Instructions that a tile takes more in a cache of e4m3 without scales of tokens: its bytes
    become 16 bits in loops of their own. 0: there is no instruction for it.
    """
    loops = [
        [i for b in loop.members for i in blocks[b].instructions]
        for loop in sass.find_loops(blocks)
    ]
    passes = [(sum(".E4M3" in i.opcode for i in one), len(one)) for one in loops]
    # Of K and of V: the shortest loops that convert several chunks and multiply nothing.
    most = max((count for count, _ in passes if count <= MOST_CONVERSIONS), default=0)
    own = sorted(length for count, length in passes if count == most)
    tile = kernel.arguments
    elements = tile["kKeys"] * (tile["kDim"] + tile["kValueDim"]) // (32 * tile["kTeam"])
    return round(elements / (2 * most) * own[0]) if most else 0


def copied(instructions: list[sass.Instruction]) -> int:
    """Bytes that a thread copies asynchronously."""
    return sum(i.width for i in instructions if i.base == "LDGSTS")


def _times(of_tile: int, of_pass: int) -> float:
    return of_tile / of_pass if of_pass else 0


def tile_bytes(kernel: Any) -> int:
    """Bytes of K and V of one tile of keys, for each thread of a team."""
    tile = kernel.arguments
    item = {"DoubleOp": 8, "Tf32Op": 4}.get(tile["Op"], 2)
    return tile["kKeys"] * (tile["kDim"] + tile["kValueDim"]) * item // (32 * tile["kTeam"])


def tile_flops(kernel: Any) -> int:
    """FLOPs of a warp on one tile of keys, both products."""
    tile = kernel.arguments
    columns = tile["kDim"] + tile["kValueDim"] + (8 if tile["Op"] in SUMS_ROWS else 0)
    return 2 * 16 * tile["kKeys"] * columns
