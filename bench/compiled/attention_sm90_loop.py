"""What a warp does for one tile of keys in a compiled attention kernel of Hopper.

The main loop of attention_sm90 is the innermost one with tensor instructions. Its path is the one
that most tiles take: all products, all barriers, and else the fewest instructions, so without
masks, rescale of O, softcap and ALiBi where they can be passed by. Loops inside it, which try a
barrier again, are left out: their first try is before them.

A tensor instruction is of four warps together; a fourth of its FLOPs counts for a warp.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from bench.compiled import sass

HEADER = "attention/forward_sm90.cuh"
CACHED = True  # blocks read the same keys at the same time
ITEMSIZE = 2
WAIT = "WARPGROUP.DEPBAR"
MOST_WAITS = 9  # more are not told apart
COUNTED = ("FFMA", "FADD", "FMNMX", "FMUL", "F2FP", "BAR", "SYNCS")


class Tile(NamedTuple):
    """Sizes of a kernel: warpgroups of 64 rows, keys of a tile, columns of Q and K, and of V."""

    groups: int
    keys: int
    dim: int
    value_dim: int

    @property
    def products(self) -> Counter[str]:
        """How many of which tensor instructions a tile takes: S = Q K^T, O += P V."""
        scores, values = f"64x{self.keys}x16", f"64x{self.value_dim}x16 tnspB"
        return Counter({scores: self.dim // 16, values: self.keys // 16})


def tile_of(kernel: Any) -> Tile:
    """Sizes of a kernel."""
    if kernel.header != HEADER:
        raise ValueError(f"not a kernel of {HEADER}: {kernel.name}")
    return Tile(*(kernel.arguments[name] for name in ("kWarpgroups", "kKeys", "kDim", "kValueDim")))


def main_loop(blocks: list[sass.Block]) -> sass.Loop:
    """The innermost loop with tensor instructions."""
    loops = [
        loop
        for loop in sass.find_loops(blocks)
        if any(i.category == "tensor" for b in loop.members for i in blocks[b].instructions)
    ]
    if not loops:
        raise ValueError("no loop has tensor instructions")
    return min(loops, key=lambda loop: len(loop.members))


def main_path(blocks: list[sass.Block]) -> list[sass.Instruction]:
    """The path through the main loop that most tiles take."""

    def score(instructions: list[sass.Instruction]) -> tuple[int, ...]:
        barriers = sum(i.category == "barrier" for i in instructions)
        return sum(i.flops for i in instructions), barriers, -len(instructions)

    return sass.path_through(blocks, main_loop(blocks), score)


def products(path: list[sass.Instruction]) -> Counter[str]:
    """Tensor instructions by shape, as `Tile.products` has them."""
    found: Counter[str] = Counter()
    for i in path:
        if i.category == "tensor":
            shape = next(m for m in i.opcode.split(".") if re.fullmatch(r"\d+x\d+x\d+", m))
            found[shape + " tnspB" * (".tnspB" in i.operands)] += 1
    return found


def waits_before(
    blocks: list[sass.Block], loop: sass.Loop
) -> list[tuple[sass.Instruction, set[int]]]:
    """The instructions of a loop, and how many waits for products may be behind each in a pass."""
    before: dict[int, set[int]] = {loop.header: {0}}  # of blocks
    todo = [loop.header]
    while todo:
        block = todo.pop()
        waits = sum(i.opcode.startswith(WAIT) for i in blocks[block].instructions)
        for other in loop.members.intersection(blocks[block].next) - {loop.header}:
            known = before.setdefault(other, set())
            found = {count + waits for count in before[block] if count < MOST_WAITS} - known
            if found:
                known |= found
                todo.append(other)
    passed = []
    for block in sorted(before):
        waits = before[block]
        for i in blocks[block].instructions:
            passed.append((i, waits))
            if i.opcode.startswith(WAIT):
                waits = {count + 1 for count in waits}
    return passed


def mix(blocks: list[sass.Block], kernel: Any) -> tuple[sass.Region, dict[str, int]]:
    """The main loop, and what a warp does in one pass of it."""
    path, tile = main_path(blocks), tile_of(kernel)
    counted = {base.lower(): sum(i.base == base for i in path) for base in COUNTED}
    counted["uniform"] = sum(i.base.startswith("U") for i in path)
    # TMA reads a tile for all rows of the block, and no thread does.
    read = tile.keys * (tile.dim + tile.value_dim) * ITEMSIZE // (128 * tile.groups)
    return sass.Region("loop", path, path), sass.mix(path) | counted | {"read_bytes": read}


def roles(blocks: list[sass.Block]) -> dict[str, tuple[int, int]]:
    """Of the producer and the consumers: the registers that a thread takes with setmaxnreg, and how
    many its code names from then on."""
    found = {}
    for instruction, budget, used in budgets(blocks):
        role = "producer" if ".DEALLOC" in instruction.opcode else "consumers"
        if role in found:
            raise ValueError(f"the {role} change their registers twice")
        found[role] = budget, used
    return found


def budgets(blocks: list[sass.Block]) -> Iterator[tuple[sass.Instruction, int, int]]:
    """Of each setmaxnreg: the registers that a thread has from there on, and how many it names."""
    for index, block in enumerate(blocks):
        for place, instruction in enumerate(block.instructions):
            if instruction.base == "USETMAXREG":
                code = block.instructions[place + 1 :]
                code += [i for b in sass.reachable(blocks, index) for i in blocks[b].instructions]
                budget = int(instruction.operands.split(",")[-1], 0)
                yield instruction, budget, max(map(registers, code), default=0)


def registers(instruction: sass.Instruction) -> int:
    """Registers of a thread up to the last one that an instruction names, accumulators included.

    Not those that follow in a vector: these are aligned, and so is every budget.
    """
    named = [int(number) + 1 for number in re.findall(r"\bR(\d+)\b", instruction.operands)]
    if instruction.category == "tensor" and instruction.flops:
        columns = instruction.flops // (2 * 64 * 16)
        named.append(named[0] - 1 + columns // 2)
    return max(named, default=0)
