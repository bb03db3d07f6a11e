"""Instructions of SASS as `nvdisasm -c` prints it: what each does, basic blocks, and their mix."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

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

_LABEL = re.compile(r"^\s*((?:\.L|\$)[\w.$]*):")
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_TARGET = re.compile(r"(?:\.L|\$)[\w.$]*")
JUMPS = {"BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU"}
ENDS = {"EXIT", "RET", "KILL"}
LEAVES = JUMPS | ENDS


def of_opcode(rule: Callable[[Instruction], Any]) -> property:
    """A property that the opcode decides alone: of millions of instructions, worked out once for
    each of some hundred opcodes."""
    known: dict[str, Any] = {}

    def get(self: Instruction) -> Any:
        try:
            return known[self.opcode]
        except KeyError:
            return known.setdefault(self.opcode, rule(self))

    return property(get, doc=rule.__doc__)


@dataclass(frozen=True)
class Instruction:
    """One instruction: address in bytes, opcode with modifiers, predicate ("", "P0", "!UP1")."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @of_opcode
    def base(self) -> str:
        """Opcode without modifiers."""
        return self.opcode.partition(".")[0]

    @of_opcode
    def category(self) -> str:
        """The one of CATEGORIES that the instruction belongs to."""
        if self.base.endswith("MMA"):
            return "tensor"
        if self.opcode.startswith("HADD2.F32"):
            return "conversion"  # half to float
        if self.base.startswith("U") and self.base[1:] in _CATEGORY:
            return _CATEGORY[self.base[1:]]
        return _CATEGORY.get(self.base, "other")

    @of_opcode
    def access(self) -> str:
        """What it does to global memory: "load", "store" or ""."""
        category = "global_load" if self.base == "LDGSTS" else self.category
        return category.removeprefix("global_") if category.startswith("global_") else ""

    @of_opcode
    def width(self) -> int:
        """Bytes per thread that a memory instruction moves."""
        sizes = {"256": 32, "128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
        modifiers = self.opcode.split(".")[1:]
        return next((sizes[m] for m in modifiers if m in sizes), 4)

    @of_opcode
    def wavefronts(self) -> int:
        """128-byte passes of a warp through shared memory, free of bank conflicts."""
        if self.base in ("LDSM", "STSM"):
            return int(self.opcode[-1]) if self.opcode[-2:] in (".2", ".4") else 1
        return max(1, self.width // 4)

    @of_opcode
    def flops(self) -> int:
        """FLOPs of a tensor instruction of a warp, or of a warpgroup's four; else 0, or unknown."""
        for modifier in self.opcode.split(".")[1:] if self.category == "tensor" else ():
            shape = re.fullmatch(r"(\d+)x(\d+)x(\d+)|(8|16)(8)(\d+)", modifier)
            if shape:
                m, n, k = (int(size) for size in shape.groups() if size)
                return 2 * m * n * k
        return 0

    @of_opcode
    def warp_flops(self) -> int:
        """`flops` of one warp."""
        return self.flops // (4 if self.base.endswith("GMMA") else 1)


@dataclass
class Block:
    """Instructions that run one after the other; indices of the blocks that may follow, and of
    those where functions start that it calls."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)


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
            open_block = not (instruction.base in LEAVES or _is_far_jump(instruction))
    for index, block in enumerate(blocks):
        last = block.instructions[-1]
        if last.base in JUMPS or _is_far_jump(last):
            block.next = [starts[t] for t in _TARGET.findall(last.operands) if t in starts]
        if not _always_leaves(last):
            block.next.append(index + 1)
        block.next = [i for i in dict.fromkeys(block.next) if i < len(blocks)]
        calls = [i for i in block.instructions if i.base == "CALL" and not _is_far_jump(i)]
        called = "".join(i.operands for i in calls)
        block.calls = [starts[t] for t in _TARGET.findall(called) if t in starts]
    return blocks


def _is_far_jump(instruction: Instruction) -> bool:
    """Whether this leaves a loop: ptxas for sm_80 calls the label behind it, and never returns."""
    return instruction.base == "CALL" and ".L" in instruction.operands


def _always_leaves(last: Instruction) -> bool:
    """Whether what follows a block is never reached from it."""
    if last.predicate or not (last.base in LEAVES or _is_far_jump(last)):
        return False
    # BRA P0, `(.L_x_1) has a second predicate; BRA.U UP0 and BRA.DIV UR4 a first one.
    return last.base not in ("BRA", "JMP") or last.operands.startswith(("`", "."))


def mix(path: list[Instruction]) -> dict[str, int]:
    """Warp instructions by category, and what they move and compute.

    Beside CATEGORIES and their `total`: `read_bytes` and `written_bytes` of global memory per
    thread, `wavefronts` of shared memory and `tensor_flops` per warp; `tf32_flops` and
    `float64_flops` are those of them that are slower than the others.
    """
    count = Counter(i.category for i in path)
    shared = [i for i in path if i.category.startswith("shared") or i.base == "LDGSTS"]
    return {
        "total": len(path),
        **{name: count[name] for name in CATEGORIES},
        "read_bytes": sum(i.width for i in path if i.access == "load"),
        "written_bytes": sum(i.width for i in path if i.access == "store"),
        "wavefronts": sum(i.wavefronts for i in shared),
        "tensor_flops": sum(i.warp_flops for i in path),
        "tf32_flops": sum(i.warp_flops for i in path if ".TF32" in i.opcode),
        "float64_flops": sum(i.warp_flops for i in path if i.base == "DMMA"),
    }
