"""Which registers of wgmma are touched while it is under way: from the PTX that ptxas gets.

PTX ISA, 9.7.15: whoever accesses an accumulator, or A's registers, before wgmma.wait_group has
waited for the wgmma gets anything. Between an access by others and the next wgmma with the register
belongs a wgmma.fence; wgmma of one shape may share accumulators without one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

REGISTER = re.compile(r"%\w+")
MOST_PENDING = 7  # groups that wait_group can leave; what is older is one group here


class Instruction(NamedTuple):
    """`kind` is mma, commit, wait, fence, label, branch, end or other, which only touches."""

    kind: str
    text: str
    accumulators: frozenset[str] = frozenset()
    touched: frozenset[str] = frozenset()  # of mma: A
    pending: int = 0  # of wait: groups that may be left
    target: str = ""  # of label and branch
    always: bool = True  # no predicate


class State(NamedTuple):
    """What may hold before an instruction, by whatever way led there. Registers that wgmma under
    way accumulate in and read, by group, the oldest first; the last group is still open."""

    groups: tuple[tuple[frozenset[str], frozenset[str]], ...] = ((frozenset(), frozenset()),)
    touched: frozenset[str] = frozenset()  # by others, since the last fence

    def join(self, other: State) -> State:
        longer, shorter = sorted((self.groups, other.groups), key=len, reverse=True)
        alone = len(longer) - len(shorter)
        pairs = zip(longer[alone:], shorter, strict=True)
        both = tuple((a[0] | b[0], a[1] | b[1]) for a, b in pairs)
        return State((*longer[:alone], *both), self.touched | other.touched)


def union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset().union(*sets)


def kernels(ptx: str) -> dict[str, list[Instruction]]:
    """Symbol to the instructions that matter, in their order."""
    text = re.sub(r"//.*", "", ptx)
    _, *parts = re.split(r"\.entry\s+(\w+)", text)
    bodies = (part.partition("\n{")[2] for part in parts[1::2])
    return dict(zip(parts[::2], map(parse, bodies), strict=True))


def parse(body: str) -> list[Instruction]:
    """Of a kernel's body. What touches no register of a wgmma is left out."""
    found = []
    for statement in body.split(";"):
        text = statement.lstrip("{} \n\t")
        while label := re.match(r"([\w$]+):\s*", text):
            found.append(Instruction("label", text, target=label[1]))
            text = text[label.end() :].lstrip("{} \n\t")
        always = not text.startswith("@")
        opcode = re.sub(r"^@\S+\s+", "", text).split(" ")[0].split("\t")[0]
        if opcode.startswith("wgmma.mma_async"):
            d, *a = (frozenset(REGISTER.findall(s)) for s in re.findall(r"\{(.*?)\}", text))
            found.append(Instruction("mma", text, d, *a))
        elif opcode.startswith("wgmma.commit_group"):
            found.append(Instruction("commit", text))
        elif opcode.startswith("wgmma.wait_group"):
            found.append(Instruction("wait", text, pending=int(text.split()[-1])))
        elif opcode.startswith("wgmma.fence"):
            found.append(Instruction("fence", text))
        elif re.fullmatch(r"bra(\.uni)?", opcode):
            found.append(Instruction("branch", text, target=text.split()[-1], always=always))
        elif opcode in ("ret", "exit", "trap"):
            found.append(Instruction("end", text, always=always))
        elif re.match(r"(brx|call)\b", opcode):
            raise ValueError(f"not understood: {text}")
        elif opcode and not opcode.startswith("."):
            found.append(Instruction("other", text, touched=frozenset(REGISTER.findall(text))))
    watched = union(i.accumulators | i.touched for i in found if i.kind == "mma")
    found = [i._replace(touched=i.touched & watched) for i in found]
    return [i for i in found if i.kind != "other" or i.touched]


def step(state: State, now: Instruction) -> tuple[State, str]:
    """The state behind an instruction, and what is wrong with it."""
    (*closed, (accumulators, a)), touched = state
    busy = [union(registers) for registers in zip(*state.groups, strict=True)]
    fault = ""
    if now.kind == "mma":
        if touched & (now.accumulators | now.touched):
            fault = f"no fence after {min(touched & (now.accumulators | now.touched))} was touched"
        elif busy[0] & now.touched or busy[1] & now.accumulators:
            fault = "A is, or becomes, an accumulator of what is under way"
        state = State((*closed, (accumulators | now.accumulators, a | now.touched)), touched)
    elif now.kind == "commit":
        old, new = state.groups[:-MOST_PENDING], state.groups[-MOST_PENDING:]
        merged = (tuple(union(registers) for registers in zip(*old, strict=True)),) if old else ()
        state = State((*merged, *new, *State().groups), touched)
    elif now.kind == "wait":
        state = State((*closed[max(0, len(closed) - now.pending) :], (accumulators, a)), touched)
    elif now.kind == "fence":
        state = State(state.groups)
    elif now.kind == "other":
        if now.touched & (busy[0] | busy[1]):
            fault = f"{min(now.touched & (busy[0] | busy[1]))} is in flight"
        state = State(state.groups, touched | now.touched)
    elif now.kind == "end" and busy[0]:
        fault = "the end, with wgmma under way"
    return state, f"{fault}: {now.text}"[:120] if fault else ""


def faults(instructions: list[Instruction]) -> list[str]:
    """What is wrong on any way through a kernel."""
    labels = {now.target: i for i, now in enumerate(instructions) if now.kind == "label"}
    before, todo, found = {0: State()}, [0], {}
    while todo:
        i = todo.pop()
        state = before[i]
        while True:
            now = instructions[i]
            state, fault = step(state, now)
            if fault:
                found[i] = fault
            ways = [labels[now.target]] if now.kind == "branch" else []
            if now.kind not in ("branch", "end") or not now.always:
                ways.append(i + 1)
            if ways == [i + 1] and instructions[i + 1].kind != "label":
                i += 1
                continue
            for way in ways:
                joined = before[way].join(state) if way in before else state
                if joined != before.get(way):
                    before[way] = joined
                    todo.append(way)
            break
    return [found[i] for i in sorted(found)]
