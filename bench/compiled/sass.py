"""SASS as `nvdisasm -c` prints it: instructions, basic blocks, loops, the mix of the main region.

What is counted is one pass of one warp through a *region*, along one *path*:

region
    A loop, or the *body*: everything outside of loops. Loops nested in a region are not part of it.
    Of the loops the one with the most tensor FLOPs is meant, then one that reads and writes global
    memory (and not the one that merely merges partial results before it), then the one that moves
    the most bytes; but the body where it computes, reads and writes no less than that loop.
path
    A kernel holds a fast path and its alternatives: elements at the ends of an unaligned row moved
    one by one, rows whose output is aligned unlike their input, slow paths of a division, optional
    results. Summing all blocks would count them all. Of the paths through the region the one is
    taken that has, in this order: the most tensor FLOPs; the most global accesses, each weighing
    the square of its width, those that are narrower than the region's vectors against the path; the
    most floating-point instructions; the fewest instructions. That is a thread in the middle of an
    aligned row, with all the columns that it can hold. A detour that a warp makes where any of its
    lanes has to (a vote decides), or where they have diverged, is not a path. It cannot tell an
    optional result as wide as the main ones from them, nor an iteration that the compiler peeled
    off a loop from the body.

A predicated instruction counts like any other: it takes an issue slot.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from bench.compiled.instructions import CATEGORIES, ENDS, Block, Instruction, mix, parse

__all__ = [
    "CATEGORIES",
    "Block",
    "Instruction",
    "Loop",
    "Region",
    "main_region",
    "mix",
    "parse",
    "path_through",
    "reachable",
    "regions",
]

VECTOR = 16  # bytes: no access of an element is as wide


@dataclass
class Loop:
    """Blocks by their indices: the first one, all, and those that jump back to the first."""

    header: int
    members: set[int]
    latches: list[int]


@dataclass
class Region:
    """A loop ("loop") or what is outside of all loops ("body"), and the path through it."""

    kind: str
    path: list[Instruction]
    whole: list[Instruction]  # a path through a loop and, once each, the loops nested in it

    @property
    def work(self) -> tuple[int, int, int]:
        """Tensor FLOPs, and bytes of global memory that a thread reads and writes."""
        found = mix(self.path)
        return found["tensor_flops"], found["read_bytes"], found["written_bytes"]


def main_region(blocks: list[Block]) -> Region:
    """The loop or body that does the most; see the module's docstring."""
    loops, body = regions(blocks)

    def rank(loop: Region) -> tuple[int, bool, int]:
        flops, read, written = loop.work
        return flops, read > 0 < written, read + written

    loop = max(loops, key=rank, default=body)
    return body if all(b >= a for a, b in zip(loop.work, body.work, strict=True)) else loop


def regions(blocks: list[Block]) -> tuple[list[Region], Region]:
    """All loops, and the body."""
    order, back = _walk(blocks)
    loops = find_loops(blocks)
    found = []
    for loop in loops:
        path, whole = (
            _best_path(blocks, order, back, loop, left_out)
            for left_out in (_nested(loop, loops), set())
        )
        found.append(Region("loop", path, whole))
    ends = [b for b in order if blocks[b].instructions[-1].base in ENDS] or order
    inside = set().union(*(loop.members for loop in loops))
    path = _best_path(blocks, order, back, Loop(0, set(order), ends), inside)
    return found, Region("body", path, path)


def find_loops(blocks: list[Block]) -> list[Loop]:
    """All loops, each with what it is in."""
    order, back = _walk(blocks)
    loops: dict[int, Loop] = {}  # by header
    for latch, header in back:
        loop = loops.setdefault(header, Loop(header, {header}, []))
        loop.members |= _reaching(blocks, order, latch, header)
        loop.latches.append(latch)
    return list(loops.values())


def path_through(
    blocks: list[Block],
    loop: Loop,
    score: Callable[[list[Instruction]], tuple[int, ...]],
    nested: bool = False,
) -> list[Instruction]:
    """The path through a loop whose blocks have the highest sum of scores; if `nested` with, once
    each, the loops nested in it."""
    order, back = _walk(blocks)
    left_out = set() if nested else _nested(loop, find_loops(blocks))
    return _best_path(blocks, order, back, loop, left_out, score)


def reachable(blocks: list[Block], start: int) -> set[int]:
    """Blocks that may run after block `start`, functions that are called included."""
    found: set[int] = set()
    todo = [*blocks[start].next, *blocks[start].calls]
    while todo:
        block = todo.pop()
        if block not in found:
            found.add(block)
            todo += [*blocks[block].next, *blocks[block].calls]
    return found


def _nested(loop: Loop, loops: list[Loop]) -> set[int]:
    """Blocks of the loops inside a loop."""
    members = loop.members
    return set().union(*(other.members for other in loops if other.members < members))


def _walk(blocks: list[Block]) -> tuple[list[int], set[tuple[int, int]]]:
    """Blocks that can be reached, each after those before it but for the back edges, which are
    the second result."""
    finished: list[int] = []
    back, seen, active = set(), {0}, {0}
    stack = [(0, iter(blocks[0].next))]
    while stack:
        block, following = stack[-1]
        for other in following:
            if other in active:
                back.add((block, other))
            elif other not in seen:
                seen.add(other)
                active.add(other)
                stack.append((other, iter(blocks[other].next)))
                break
        else:
            stack.pop()
            active.remove(block)
            finished.append(block)
    return finished[::-1], back


def _reaching(blocks: list[Block], order: list[int], latch: int, header: int) -> set[int]:
    """Blocks from which `latch` can be reached without passing `header`."""
    before: dict[int, list[int]] = {}
    for block in order:
        for other in blocks[block].next:
            before.setdefault(other, []).append(block)
    found, todo = {header}, [latch]
    while todo:
        block = todo.pop()
        if block not in found:
            found.add(block)
            todo += before.get(block, [])
    return found


def _best_path(blocks, order, back, loop, left_out, rate=None) -> list[Instruction]:
    """The path from the first block to a last one with the highest score; `left_out` counts
    nothing."""
    start, own = loop.header, loop.members - left_out
    main = _main_widths([i for b in own for i in blocks[b].instructions])

    def weigh(block: int) -> tuple[int, ...]:
        instructions = blocks[block].instructions if block in own else []
        return rate(instructions) if rate else _score(instructions, main)

    best = {start: weigh(start)}
    came_from: dict[int, int] = {}
    for block in order:
        if block not in best:
            continue
        rare = _detour(blocks, order, block)
        for other in blocks[block].next:
            if other not in loop.members or (block, other) in back or other == rare:
                continue
            score = tuple(a + b for a, b in zip(best[block], weigh(other), strict=True))
            if other not in best or score > best[other]:
                best[other], came_from[other] = score, block
    end = max((e for e in loop.latches if e in best), key=lambda e: best[e])
    path = [end]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return [i for b in reversed(path) if b in own for i in blocks[b].instructions]


def _detour(blocks: list[Block], order: list[int], block: int) -> int | None:
    """The block that follows `block` where lanes have diverged, or where a vote finds any lane and
    it only leads to the block that follows where it finds none."""
    *before, last = blocks[block].instructions
    if block > 0:  # where lanes that have diverged come back, between a vote and its branch
        before = blocks[block - 1].instructions + before
    if last.base != "BRA" or len(blocks[block].next) != 2:
        return None
    jump, on = blocks[block].next
    if last.opcode == "BRA.DIV":
        return jump
    votes = [i for i in before if i.base in ("VOTE", "VOTEU") and ".ANY" in i.opcode]
    condition = last.predicate or last.operands.split(",")[0]
    if condition.lstrip("!") not in [i.operands.split(",")[0] for i in votes]:
        return None
    rare, other = (on, jump) if condition.startswith("!") else (jump, on)
    return rare if rare in _reaching(blocks, order, other, block) else None


def _score(instructions: list[Instruction], main: dict[str, set[int]]) -> tuple[int, ...]:
    """Tensor FLOPs, global accesses, floating-point work, and the fewest instructions."""
    flops = accesses = work = 0
    for i in instructions:
        flops += i.flops
        if i.access:
            accesses += i.width**2 if i.width in main[i.access] else -(i.width**2)
        work += i.category in ("mufu", "float", "float64")
    return flops, accesses, work, -len(instructions)


def _main_widths(instructions: list[Instruction]) -> dict[str, set[int]]:
    """Widths in bytes of the global loads and stores that speak for a path.

    Whole vectors, else: all loads, and the stores of the width that weighs the most.
    """
    loads = {i.width for i in instructions if i.access == "load"}
    stores: Counter[int] = Counter()
    for i in (i for i in instructions if i.access == "store"):
        stores[i.width] += i.width**2
    main_store = max(stores, key=lambda w: (w >= VECTOR, stores[w], w), default=0)
    return {"load": {w for w in loads if w >= VECTOR} or loads, "store": {main_store}}
