"""What a warp does for one tile of keys in the compiled kernel of latent attention of Hopper.

Its warps have three roles, in loops of their own: scores, values, and loaders, of which two have a
tile. A warp of the report is the mean of all twelve.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from bench.compiled import attention_sm90_loop, decode_loop, sass
from bench.compiled.attention_loop import tensor_flops

HEADER = "attention/latent_sm90.cuh"
CACHED = False  # nobody else reads these keys
ROLES = {"scores": 4, "values": 4, "loaders": 2}  # warps that have the same tile
WARPS = 12
ITEMSIZE = 2


class Loops(NamedTuple):
    """Innermost loops over tiles of keys, by roles."""

    scores: sass.Loop
    values: sass.Loop
    loaders: sass.Loop


def loops(blocks: list[sass.Block]) -> Loops:
    """The loops of the roles."""
    found = sass.find_loops(blocks)

    def has(loop: sass.Loop, what: str) -> bool:
        return any(i.base == what for b in loop.members for i in blocks[b].instructions)

    products = [loop for loop in found if has(loop, "HGMMA")]
    inner = [a for a in products if not any(b.members < a.members for b in products)]
    if len(inner) != 2:
        raise ValueError(f"{len(inner)} loops multiply")
    first, second = inner
    scores, values = (first, second) if _scores(blocks, first) else (second, first)
    copies = [loop for loop in found if has(loop, "LDGSTS") and has(loop, "SYNCS")]
    return Loops(scores, values, max(copies, key=lambda loop: len(loop.members)))


def _scores(blocks: list[sass.Block], loop: sass.Loop) -> bool:
    """Whether a loop has exponentials."""
    return any(i.opcode == "MUFU.EX2" for b in loop.members for i in blocks[b].instructions)


def products(kernel: Any) -> dict[str, Counter[str]]:
    """How many of which tensor instructions a tile takes, by roles: S = Q K^T, O += P V."""
    keys, dim, columns = (kernel.arguments[n] for n in ("kKeys", "kDim", "kValueDim"))
    values = Counter({f"64x{columns // 2}x16 tnspB": keys // 16})
    return {"scores": values + Counter({f"64x{keys}x16": dim // 16}), "values": values}


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The loop of the scores, and what the mean warp does for a tile."""
    keys, dim = kernel.arguments["kKeys"], kernel.arguments["kDim"]
    of_loaders = 32 * ROLES["loaders"]
    found: Counter[str] = Counter()
    regions = {}
    for role, loop in loops(blocks)._asdict().items():
        if role == "loaders":
            whole = decode_loop.most_work(blocks, loop)
            copies = keys * dim * ITEMSIZE // of_loaders
            path, own = decode_loop.per_tile(blocks, loop, whole, 0, copies)
        else:
            path = whole = sass.path_through(blocks, loop, _most_products)
            own = Counter(sass.mix(path))
        regions[role] = sass.Region("loop", path, whole)
        for key, count in own.items():
            found[key] += ROLES[role] * count
    mean = {key: round(count / WARPS) for key, count in found.items()}
    mean["total"] = round(sum(found[key] for key in sass.CATEGORIES) / WARPS)
    mean["read_bytes"] = keys * dim * ITEMSIZE // (32 * WARPS)
    return regions["scores"], {**mean, "keys": keys, "converting": 0}


def _most_products(instructions: list[sass.Instruction]) -> tuple[int, ...]:
    barriers = sum(i.category == "barrier" for i in instructions)
    return tensor_flops(instructions), barriers, -len(instructions)


def faults(blocks: list[sass.Block], kernel: Any) -> list[str]:
    """What would make the kernel hang, or slow."""
    found = []
    if any(i.category == "local" for block in blocks for i in block.instructions):
        found.append("local memory")
    budgets = [(budget, used) for _, budget, used in attention_sm90_loop.budgets(blocks)]
    found += [f"{used} registers of {budget}" for budget, used in budgets if used > budget]
    if len(budgets) != len(ROLES) or sum(b for b, _ in budgets) > len(ROLES) * kernel.registers:
        found.append(f"setmaxnreg waits for more registers than the block has: {budgets}")
    for role, wanted in products(kernel).items():
        loop = getattr(loops(blocks), role)
        passed = attention_sm90_loop.waits_before(blocks, loop)
        if any(i.access for i, _ in passed):
            found.append(f"global memory in the loop of {role}")
        if attention_sm90_loop.products([i for i, _ in passed]) != wanted:
            found.append(f"other products than planned in {role}")
        behind = [n for i, n in passed if i.category == "tensor" and n != {0}]
        # The last third of the columns of Q waits for the others' sums, and for P V before them.
        if behind != [{2}] * (role == "scores") * (kernel.arguments["kDim"] // 48):
            found.append(f"a product behind a wait in {role}")
    return found
