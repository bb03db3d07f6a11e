"""SASS as `nvdisasm -c` prints it: instructions, basic blocks, loops, the mix of the main region.

What is counted is one pass of one warp through a *region*, along one *path*:

region
    A loop, or the *body*: everything outside of loops. Loops nested in a region are no part of it.
    Of the loops the one with the most tensor FLOPs is meant, then one that writes global memory
    (and not the one that merely merges partial results before it), then the one that moves the most
    bytes; but the body where it computes, reads and writes no less than that loop.
path
    A kernel holds a fast path and its alternatives: elements at the ends of an unaligned row moved
    one by one, rows whose output is aligned unlike their input, slow paths of a division, optional
    results. Summing all blocks would count them all. Of the paths through the region the one is
    taken that has, in this order: the most tensor FLOPs; the most global accesses, each weighing
    the square of its width, those that are narrower than the region's vectors against the path; the
    most floating-point instructions; the fewest instructions. That is a thread in the middle of an
    aligned row, with all the columns that it can hold. It cannot tell an optional result as wide as
    the main ones from them, nor an iteration that the compiler peeled off a loop from the body.

A predicated instruction counts like any other: it takes an issue slot.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

# Opcode without its modifiers -> category; uniform-datapath opcodes are also looked up without
# their leading U.
_TABLE = {
    "global_load": "LDG LD",
    "global_store": "STG ST ATOM ATOMG RED REDG",
    "local": "LDL STL",
    "shared_load": "LDS LDSM",
    "shared_store": "STS STSM STAS ATOMS REDS",
    "mufu": "MUFU",
    "float": "FADD FMUL FFMA FMNMX FMNMX3 FSET FSETP FCHK FSWZADD FADD2 FMUL2 FFMA2 FADD32I "
    "FMUL32I FFMA32I FADD3 HADD2 HMUL2 HFMA2 HMNMX2 HSET2 HSETP2 VHMNMX",
    "float64": "DADD DMUL DFMA DMNMX DSET DSETP",
    "integer": "IADD IADD3 IADD32I IMAD IMUL IMNMX IMNMX3 VIADD VIMNMX VIMNMX3 VIADDMNMX IABS IDP "
    "ISETP ISET LEA LOP LOP3 LOP32I SHF SHL SHR BREV BMSK FLO POPC SGXT PRMT MOV MOV32I SEL FSEL "
    "PLOP3 P2R R2P R2UR ISCADD ICMP XMAD",
    "conversion": "F2F F2FP F2I F2IP I2F I2FP I2I I2IP FRND",
    "shuffle": "SHFL VOTE VOTEU MATCH REDUX CREDUX ELECT",
    "barrier": "BAR SYNCS MEMBAR ERRBAR CGAERRBAR DEPBAR LDGDEPBAR ARRIVES FENCE CCTL CGABAR_ARV "
    "CGABAR_WAIT CGABAR_SET CGABAR_GET WARPGROUP WARPGROUPSET ACQBULK",
    "branch": "BRA BRX BRXU JMP JMX JMXU EXIT RET CALL BSSY BSYNC BREAK BREAKUP BMOV WARPSYNC "
    "ENDCOLLECTIVE YIELD NANOSLEEP KILL BPT RPCMOV",
    "async_copy": "LDGSTS BLKCP BLKPF BLKRED TMALDG TMASTG TMAPF TMAREDG TMACCTL TMACMDFLUSH",
}
CATEGORIES = (*_TABLE, "tensor", "other")
_CATEGORY = {opcode: name for name, opcodes in _TABLE.items() for opcode in opcodes.split()}

_LABEL = re.compile(r"^\s*(\.L[\w.$]*):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"\.L[\w.$]*")
VECTOR = 16  # bytes: no access of an element is as wide
_JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
_ENDS = {"EXIT", "RET", "KILL"}


@dataclass(frozen=True)
class Instruction:
    """One instruction: address in bytes, opcode with modifiers, predicate ("", "P0", "!UP1")."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def base(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def category(self) -> str:
        """The one of CATEGORIES that the instruction belongs to."""
        if self.base.endswith("MMA"):
            return "tensor"
        if self.opcode.startswith("HADD2.F32"):
            return "conversion"  # half to float
        if self.base.startswith("U") and self.base[1:] in _CATEGORY:
            return _CATEGORY[self.base[1:]]
        return _CATEGORY.get(self.base, "other")

    @property
    def access(self) -> str:
        """What it does to global memory: "load", "store" or ""."""
        category = "global_load" if self.base == "LDGSTS" else self.category
        return category.removeprefix("global_") if category.startswith("global_") else ""

    @property
    def width(self) -> int:
        """Bytes a thread moves: a memory instruction."""
        sizes = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        modifiers = self.opcode.split(".")[1:]
        return next((sizes[m] for m in modifiers if m in sizes), 4)

    @property
    def wavefronts(self) -> int:
        """128-byte passes of a warp through shared memory, free of bank conflicts."""
        if self.base in ("LDSM", "STSM"):
            return int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 1
        return max(1, self.width // 4)

    @property
    def flops(self) -> int:
        """FLOPs of a tensor instruction of a warp, or of a warpgroup's four; else 0, or unknown."""
        for modifier in self.opcode.split(".")[1:] if self.category == "tensor" else ():
            shape = re.fullmatch(r"(\d+)x(\d+)x(\d+)|(8|16)(8)(\d+)", modifier)
            if shape:
                m, n, k = (int(size) for size in shape.groups() if size)
                return 2 * m * n * k
        return 0


@dataclass
class Block:
    """Instructions that run one after the other, and the indices of the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


def parse(text: str) -> list[Block]:
    """Basic blocks of a kernel's disassembly, the entry first."""
    blocks, starts, open_block = [], {}, False
    for line in text.splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = len(blocks)
            open_block = False
        elif found := _INSTRUCTION.search(line):
            address, predicate, opcode, operands = found.groups()
            instruction = Instruction(int(address, 16), predicate or "", opcode, operands.strip())
            if not open_block:
                blocks.append(Block())
            blocks[-1].instructions.append(instruction)
            open_block = instruction.base not in _JUMPS | _ENDS
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.base in _JUMPS:
            block.next = [starts[t] for t in _TARGET.findall(last.operands) if t in starts]
        if not _always_leaves(last):
            block.next.append(index + 1)
        block.next = [i for i in dict.fromkeys(block.next) if i < len(blocks)]
    return blocks


def _always_leaves(last: Instruction) -> bool:
    """Whether what follows a block is never reached from it."""
    if last.predicate or last.base not in _JUMPS | _ENDS:
        return False
    # BRA P0, `(.L_x_1) has a second predicate; BRA.U UP0 and BRA.DIV UR4 a first one.
    return last.base not in ("BRA", "JMP") or last.operands.startswith(("`", "."))


@dataclass
class Region:
    """A loop ("loop") or what is outside of all loops ("body"), and the path through it."""

    kind: str
    path: list[Instruction]

    @property
    def work(self) -> tuple[int, int, int]:
        """Tensor FLOPs, and bytes of global memory that a thread reads and writes."""
        found = mix(self.path)
        return found["tensor_flops"], found["read_bytes"], found["written_bytes"]


def main_region(blocks: list[Block]) -> Region:
    """The loop or body that does the most; see the module's docstring."""
    order, back = _walk(blocks)
    loops: dict[int, set[int]] = {}  # header: blocks
    for latch, header in back:
        loops[header] = loops.get(header, {header}) | _reaching(blocks, order, latch, header)
    found = []
    for header, members in loops.items():
        ends = [latch for latch, h in back if h == header]
        nested = set().union(*(m for h, m in loops.items() if h != header and m < members))
        path = _best_path(blocks, order, back, header, members, nested, ends)
        found.append(Region("loop", path))
    ends = [b for b in order if blocks[b].instructions[-1].base in _ENDS] or order
    inside = set().union(*loops.values())
    body = Region("body", _best_path(blocks, order, back, 0, set(order), inside, ends))

    def rank(loop: Region) -> tuple[int, bool, int]:
        flops, read, written = loop.work
        return flops, written > 0, read + written

    loop = max(found, key=rank, default=body)
    return body if all(b >= a for a, b in zip(loop.work, body.work, strict=True)) else loop


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


def _best_path(blocks, order, back, start, members, left_out, ends) -> list[Instruction]:
    """The path from `start` to one of `ends` with the highest score; `left_out` counts nothing."""
    own = members - left_out
    main = _main_widths([i for b in own for i in blocks[b].instructions])

    def weigh(block: int) -> tuple[int, ...]:
        return _score(blocks[block].instructions if block in own else [], main)

    best = {start: weigh(start)}
    came_from: dict[int, int] = {}
    for block in order:
        if block not in best:
            continue
        for other in blocks[block].next:
            if other not in members or (block, other) in back:
                continue
            score = tuple(a + b for a, b in zip(best[block], weigh(other), strict=True))
            if other not in best or score > best[other]:
                best[other], came_from[other] = score, block
    end = max((e for e in ends if e in best), key=lambda e: best[e])
    path = [end]
    while path[-1] != start:
        path.append(came_from[path[-1]])
    return [i for b in reversed(path) if b in own for i in blocks[b].instructions]


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


def mix(path: list[Instruction]) -> dict[str, int]:
    """Warp instructions by category, and what they move and compute.

    Beside CATEGORIES and their `total`: `read_bytes` and `written_bytes` of global memory a thread,
    `wavefronts` of shared memory and `tensor_flops` a warp.
    """
    count = Counter(i.category for i in path)
    shared = [i for i in path if i.category.startswith("shared") or i.base == "LDGSTS"]
    return {
        "total": len(path),
        **{name: count[name] for name in CATEGORIES},
        "read_bytes": sum(i.width for i in path if i.access == "load"),
        "written_bytes": sum(i.width for i in path if i.access == "store"),
        "wavefronts": sum(i.wavefronts for i in shared),
        "tensor_flops": sum(i.flops // (4 if i.base.endswith("GMMA") else 1) for i in path),
    }
