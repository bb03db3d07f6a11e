"""A machine of mbarriers, named barriers, bulk copies and wgmma, which runs what the warps of
Hopper's attention kernel ask for (sm90_trace.py) in any order in which hardware might.

Warps, and copies under way, go on at random, and each run has its own idea of who is slow. A Fault
names the line of the kernel: shared memory overwritten while somebody reads it, read before all of
it is there, reached by the async proxy without a fence, a barrier with an arrival too many, nobody
who can go on. PTX ISA: mbarrier 9.7.13.15, barrier 9.7.13.1, cp.async.bulk 9.7.9.25, wgmma 9.7.15.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from typing import NamedTuple

GRANULE = 1024  # bytes: what is loaded or stored at once begins and ends at a multiple
SYNC = ("await", "arrive", "barrier sync", "barrier arrive", "commit", "wait")
SYNC += ("commit stores", "wait for stores", "proxy fence", "init fence")


class Fault(AssertionError):
    """What comes first is left to chance, or can never come."""


class Step(NamedTuple):
    """What a warp does next."""

    op: str
    site: str
    on: int = 0  # an mbarrier, a named barrier, or a number of groups
    count: int = 0  # parity, bytes, or threads
    uses: tuple[tuple[int, tuple[str, int]], ...] = ()  # slots of shared memory, and what is there
    whose: str = ""  # the mbarrier


class Program(NamedTuple):
    """One block."""

    warps: dict[int, list[Step]]
    arrivals: dict[int, int]  # that each phase of an mbarrier needs
    parts: Counter  # boxes of a tile, or warps that write one, by slot and content

    def sites(self):
        """Whatever orders anything: its instruction, its line, and whose mbarrier it is for."""
        every = (step for steps in self.warps.values() for step in steps)
        return sorted({(s.op, s.site, s.whose) for s in every if s.op in SYNC})

    def without(self, site):
        """The program with these taken out."""
        return self._replace(
            warps={
                warp: [s for s in steps if (s.op, s.site, s.whose) != site]
                for warp, steps in self.warps.items()
            }
        )


def slots(trace):
    """Granule to slot: what is loaded for one mbarrier, or stored by one warp, is one slot."""
    slot = {}

    def join(smem, size, key):
        for granule in range(smem // GRANULE, (smem + size) // GRANULE):
            if slot.setdefault(granule, key) != key:  # `out` in the place of Q
                old = slot[granule]
                slot.update((g, key) for g, k in slot.items() if k == old)

    for warp, events in trace.warps.items():
        for op, args, _, _ in events:
            if op in ("load", "store"):
                size = 2 * math.prod(trace.maps[args[2]].box)
                join(args[0], size, args[1] if op == "load" else -warp)
    return slot


def program(trace):
    """What the machine runs. Tile n of K and of V, and a warpgroup's Q of round n, is the n-th that
    is loaded; a warp's n-th scores need the n-th K, its n-th values the n-th V. A round ends where
    `out` is written."""
    slot = slots(trace)
    tensors = {trace.address(name): name for name in "qkv"}
    whose, last = {}, 0
    for op, args, _, _ in trace.warps[0]:
        if op == "await":
            last = args[0]
        elif op == "load":
            whose[args[1]] = f"{tensors[args[2]]} is there"
            whose.setdefault(last, f"{tensors[args[2]]} is free")

    warps, arrivals, parts = {}, {}, Counter()
    barriers = max(args[0] for op, args, _, _ in trace.warps[0] if op == "init")
    for warp, events in trace.warps.items():
        found, loaded, tile, round = [], Counter(), Counter(), 0
        for op, args, site, _ in events:
            on, count, uses = *args[:2], ()
            if op == "read" and on < barriers:  # of `out`, by the warp that has written it
                continue
            if found and found[-1].op == "write" and op != "stmatrix":
                round += 1
            if op == "init":
                arrivals[on] = count
            elif op == "load":
                name = tensors[args[2]]
                box = name, args[3], args[1] * (name == "q")  # Q: of each warpgroup by itself
                uses = ((slot[args[0] // GRANULE], (name, loaded[box])),)
                loaded[box] += 1
                parts[uses[0]] += 1
                on, count = args[1], 2 * math.prod(trace.maps[args[2]].box)
            elif op in ("wgmma ss", "wgmma rs"):
                a, b = (slot.get((word & 0x3FFF) * 16 // GRANULE) for word in args[1:3])
                kind = "k" if op == "wgmma ss" else "v"
                uses = ((b, (kind, tile[kind])), *[(a, ("q", round))] * (kind == "k"))
                op = "wgmma"
            elif op == "commit":
                tile[found[-1].uses[0][1][0]] += 1
            elif op in ("read", "write") and on > barriers:  # what a warp's rows see of a tile
                op += " seen"
                uses = (("seen", ("seen", tile["k"])),)
            elif op in ("stmatrix", "write", "store"):
                content = ("v", tile["v"]) if op == "write" else ("out", round - (op == "store"))
                uses = ((slot.get(on // GRANULE, -(warp // 4 * 4)), content),)
                op = {"stmatrix": "write", "write": "clear"}.get(op, op)
            if op in ("wgmma", "write", "clear", "write seen", "read seen"):
                step = Step(op, site, uses=uses)
                if found and found[-1] == step:  # again and again: once is enough
                    continue
                parts[uses[0]] += op.startswith("write")
            else:
                step = Step(op, site, on, count, uses, "" if op == "load" else whose.get(on, ""))
            found.append(step)
        warps[warp] = found
    return Program(warps, arrivals, parts)


class Machine:
    """One run of a program."""

    def __init__(self, program, seed):
        self.program, self.random = program, random.Random(seed)
        self.at = dict.fromkeys(program.warps, 0)
        self.pending, self.bytes, self.phase = {}, Counter(), Counter()  # of mbarriers
        self.hidden = set()  # mbarriers that the async proxy does not see yet
        self.arrived, self.waiting, self.passing = Counter(), {}, set()  # at named barriers
        self.content, self.there = {}, Counter()  # of a slot, and how many parts of it
        self.landing, self.reading = Counter(), Counter()
        self.unfenced = defaultdict(set)  # warps that have written a slot
        self.copies = []  # under way: what becomes of them
        self.products = {warp: [[]] for warp in program.warps}  # slots by group; the last is open
        self.stores = {warp: [[]] for warp in program.warps}  # copies likewise

    def run(self):
        """To the end; a Fault if there is none, or a wrong one."""
        choose = self.random
        active = [warp for warp, steps in self.program.warps.items() if steps]
        speed = {warp: choose.choice((1, 1, 10, 100)) for warp in active}
        burst, landing = choose.choice((1, 4, 1000)), choose.choice((0, 0.02, 0.3, 0.9))
        while active:
            (warp,) = choose.choices(active, [speed[w] for w in active])
            moved = self.go_on(warp, burst)
            if self.copies and choose.random() < landing:
                self.complete_a_copy()
            elif not moved and not any([self.go_on(w, 1) for w in active]):
                if not self.copies:
                    sites = sorted({self.program.warps[w][self.at[w]].site for w in active})
                    raise Fault(f"nobody can go on: {', '.join(sites)}")
                self.complete_a_copy()
            active = [w for w in active if self.at[w] < len(self.program.warps[w])]

    def go_on(self, warp, most):
        """Up to `most` steps of a warp; whether anything has happened."""
        steps, moved = self.program.warps[warp], False
        for _ in range(most):
            if self.at[warp] == len(steps):
                break
            step = steps[self.at[warp]]
            done = getattr(self, "on_" + step.op.replace(" ", "_"))(warp, step)
            moved |= done is not False
            if not done:
                break
            self.at[warp] += 1
            if self.at[warp] == len(steps) and (
                any(self.products[warp]) or any(copy[0] for g in self.stores[warp] for copy in g)
            ):
                raise Fault(
                    f"warp {warp} ends after {step.site}, but its copies or products do not"
                )
        return moved

    def complete_a_copy(self):
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def fault(self, warp, step, what):
        raise Fault(f"warp {warp} at {step.site}: {what}")

    # What each instruction does. True: the warp goes on; False: it waits; None: it begins to wait.

    def on_init(self, warp, step):
        self.pending[step.on] = self.program.arrivals[step.on]
        self.hidden.add(step.on)
        return True

    def on_init_fence(self, warp, step):
        self.hidden.clear()
        return True

    def there_is(self, warp, step):
        if step.on not in self.pending:
            self.fault(warp, step, "an mbarrier that is not there yet")

    def on_await(self, warp, step):
        self.there_is(warp, step)
        return self.phase[step.on] % 2 != step.count  # the phase of this parity is complete

    def on_arrive(self, warp, step):
        self.there_is(warp, step)
        if self.pending[step.on] == 0:
            self.fault(warp, step, "an arrival too many")
        self.pending[step.on] -= 1
        self.bytes[step.on] += step.count
        self.end_phase(step.on)
        return True

    def end_phase(self, mbarrier):
        if self.pending[mbarrier] == self.bytes[mbarrier] == 0:
            self.phase[mbarrier] += 1
            self.pending[mbarrier] = self.program.arrivals[mbarrier]

    def on_barrier_arrive(self, warp, step):
        self.arrived[step.on] += 32
        if self.arrived[step.on] > step.count:
            self.fault(warp, step, "an arrival too many")
        if self.arrived[step.on] == step.count:
            if step.on not in self.waiting.values():
                self.fault(warp, step, "a barrier that nobody waits at")
            self.waiting = {w: on for w, on in self.waiting.items() if on != step.on}
            self.arrived[step.on] = 0
        return True

    def on_barrier_sync(self, warp, step):
        if warp in self.passing:
            if warp in self.waiting:
                return False
            self.passing.remove(warp)
            return True
        self.passing.add(warp)
        self.waiting[warp] = step.on
        self.on_barrier_arrive(warp, step)
        return None

    def needs(self, warp, step, by_proxy=True):
        """All that the step uses is there, and in order for the async proxy."""
        for slot, content in step.uses:
            there = self.there[slot], self.content.get(slot)
            if there != (self.program.parts[slot, content], content):
                self.fault(warp, step, f"needs {content}, but finds {there[0]} parts of {there[1]}")
            if by_proxy and self.unfenced[slot]:
                self.fault(warp, step, f"no fence after writes of warps {self.unfenced[slot]}")

    def takes(self, warp, step):
        """A slot for another content."""
        ((slot, content),) = step.uses
        if self.reading[slot]:
            self.fault(warp, step, f"{self.content[slot]} is overwritten while it is read")
        if self.content.get(slot) != content:
            if self.landing[slot]:
                self.fault(warp, step, f"{self.content[slot]} is overwritten while it lands")
            self.content[slot], self.there[slot] = content, 0
        return slot

    def on_load(self, warp, step):
        slot = self.takes(warp, step)
        if step.on in self.hidden:
            self.fault(warp, step, "no fence after the init of its mbarrier")
        if self.unfenced[slot]:
            self.fault(warp, step, f"no fence after writes of warps {self.unfenced[slot]}")
        self.landing[slot] += 1

        def land():
            self.landing[slot] -= 1
            self.there[slot] += 1
            self.bytes[step.on] -= step.count
            self.end_phase(step.on)

        self.copies.append(land)
        return True

    def on_wgmma(self, warp, step):
        self.needs(warp, step)
        read = [slot for slot, _ in step.uses]
        self.products[warp][-1] += read
        self.reading.update(read)
        return True

    def on_commit(self, warp, step):
        self.products[warp].append([])
        return True

    def on_wait(self, warp, step):
        groups = self.products[warp]
        while len(groups) - 1 > step.on:
            self.reading.subtract(groups.pop(0))
        return True

    def on_fence(self, warp, step):  # of registers: wgmma_registers.py
        return True

    def on_write(self, warp, step):
        slot = self.takes(warp, step)
        self.there[slot] += 1
        self.unfenced[slot].add(warp)
        return True

    def on_write_seen(self, warp, step):
        self.there[self.takes(warp, step)] += 1
        return True

    def on_read_seen(self, warp, step):
        self.needs(warp, step, by_proxy=False)
        return True

    def on_clear(self, warp, step):
        self.needs(warp, step, by_proxy=False)
        self.unfenced[self.takes(warp, step)].add(warp)
        return True

    def on_proxy_fence(self, warp, step):
        for writers in self.unfenced.values():
            writers.discard(warp)
        return True

    def on_store(self, warp, step):
        self.needs(warp, step)
        ((slot, _),) = step.uses
        copy = [True]  # under way
        self.stores[warp][-1].append(copy)
        self.reading[slot] += 1

        def leave():
            copy[0] = False
            self.reading[slot] -= 1

        self.copies.append(leave)
        return True

    def on_commit_stores(self, warp, step):
        self.stores[warp].append([])
        return True

    def on_wait_for_stores(self, warp, step):
        groups = self.stores[warp]
        old = groups[: len(groups) - 1 - step.on]
        return not any(copy[0] for group in old for copy in group)
