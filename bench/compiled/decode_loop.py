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
WIDE = "attention/wide.cuh"
CACHED = False  # nobody else reads these keys


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]] | None:
    """The loop over tiles of keys, and what a warp does in one pass of it. None without tensor
    cores: nothing tells products from the arithmetic of scores."""
    if not uses_tensor_cores(kernel):
        return None

    wholes = [(loop, most_work(blocks, loop)) for loop in sass.find_loops(blocks)]
    loop, whole = max(wholes, key=lambda one: (tensor_flops(one[1]), -len(one[0].members)))
    path, found = per_tile(blocks, loop, whole, tile_flops(kernel), tile_bytes(kernel))
    for key in ("async_copy", "read_bytes"):  # some warps of a team may load nothing
        found[key] = found[key] * _loaders(kernel) // _team(kernel)
    found["total"] = sum(found[key] for key in sass.CATEGORIES)
    own = {"keys": kernel.arguments["kKeys"], "converting": _converting(blocks, kernel)}
    return sass.Region("loop", path, whole), {**found, **own}


def most_work(blocks: list[sass.Block], loop: sass.Loop) -> list[sass.Instruction]:
    """The path through a loop, and once through those inside it, with the most products, then the
    most copies."""

    def score(instructions: list[sass.Instruction]) -> tuple[int, ...]:
        return tensor_flops(instructions), copied(instructions), -len(instructions)

    return sass.path_through(blocks, loop, score, nested=True)


def per_tile(
    blocks: list[sass.Block],
    loop: sass.Loop,
    whole: list[sass.Instruction],
    flops: int,
    copies: int,
) -> tuple[list[sass.Instruction], Counter[str]]:
    """The part of a path that is outside of the loops in `loop`, and what a warp does in a pass:
    loops of products or of copies run until it has so many FLOPs, and bytes of a thread."""
    # Loops inside it, of products or of copies: how often they run, the tile says.
    nested = [
        {i for b in one.members for i in blocks[b].instructions}
        for one in sass.find_loops(blocks)
        if one.members < loop.members
    ]
    inside = set().union(*nested)
    copying = set().union(*(one for one in nested if copied([*one])))
    path, loads, products = (
        [i for i in whole if i in some] for some in (set(whole) - inside, copying, inside - copying)
    )
    found = Counter(sass.mix(path))
    for some, times in (
        (products, _times(flops - tensor_flops(path), tensor_flops(products))),
        (loads, _times(copies - copied(path), copied(loads))),
    ):
        for key, count in sass.mix(some).items():
            found[key] += round(times * count)
    return path, found


def _converting(blocks: list[sass.Block], kernel: Any) -> int:
    """Instructions that a tile takes more in a cache of e4m3 without scales of tokens: its bytes
    become 16 bits in loops of their own. 0: there is no instruction for it.
    """
    loops = [
        [i for b in loop.members for i in blocks[b].instructions]
        for loop in sass.find_loops(blocks)
    ]
    # Of K and of V: the shortest loops that convert several chunks and multiply nothing.
    passes = [
        (sum(".E4M3" in i.opcode for i in one), len(one)) for one in loops if not tensor_flops(one)
    ]
    most = max((count for count, _ in passes), default=0)
    own = sorted(length for count, length in passes if count == most)
    if not most:
        return 0
    return round(_numbers(kernel) / (32 * _team(kernel)) / (2 * most) * own[0])


def copied(instructions: list[sass.Instruction]) -> int:
    """Bytes that a thread copies asynchronously."""
    return sum(i.width for i in instructions if i.base == "LDGSTS")


def _times(of_tile: int, of_pass: int) -> float:
    return of_tile / of_pass if of_pass else 0


def tile_bytes(kernel: Any) -> int:
    """Bytes of K and V of one tile of keys, for each thread that loads."""
    item = {"DoubleOp": 8, "Tf32Op": 4}.get(kernel.arguments["Op"], 2)
    return _numbers(kernel) * item // (32 * _loaders(kernel))


def _loaders(kernel: Any) -> int:
    """Warps of a team that load: kLoaders of attention/wide.cuh."""
    few = 2 if kernel.arguments["kKeys"] < 16 else 4
    return few if kernel.header == WIDE else _team(kernel)


def _team(kernel: Any) -> int:
    """Warps that share a tile."""
    return int(kernel.arguments["kWarps" if kernel.header == WIDE else "kTeam"])


def _numbers(kernel: Any) -> int:
    """Of K and V in one tile of keys; kShared: V is columns of K."""
    tile = kernel.arguments
    columns = tile["kDim"] + (0 if tile.get("kShared") else tile["kValueDim"])
    return int(tile["kKeys"] * columns)


def tile_flops(kernel: Any) -> int:
    """FLOPs of a warp on one tile of keys, both products."""
    tile = kernel.arguments
    columns = (tile["kDim"] + tile["kValueDim"]) // tile.get("kColumnWarps", 1)
    columns += 8 if tile["Op"] in SUMS_ROWS else 0
    return 2 * 16 * tile["kKeys"] * columns
