"""The pipeline of Hopper's attention kernel in any order: what each warp asks for, of every shipped
tile, on the machine of sm90_pipeline.py; and that nothing in the kernel orders in vain.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from sm90_pipeline import Fault, Machine, program
from sm90_trace import rule, tiles, trace

import cuattn
from cuattn._attention.plan_sm90 import BLOCKED_TILES
from cuattn._attention.problem import FEW_ROWS

RUNS = 4  # of each call
MUTANT_RUNS = 400  # at most, until one fails; a few are enough for most


def zeros(tile, heads, rows, keys):
    """q, k and v of rows of this many heads."""
    sizes = (rows, tile.dim), (keys, tile.dim), (keys, tile.value_dim)
    return [np.zeros((*heads, length, dim), np.float16) for length, dim in sizes]


def dense(rng, tile):
    """Rows for a round or two of each of three sequences: one without keys, one with more tiles of
    them than are ever under way."""
    keys = (tile.stages + 4) * tile.keys
    rows = rng.integers(FEW_ROWS + 1, 128 * tile.groups)  # with fewer it is another kernel
    arrays = zeros(tile, (3, 1), int(rows), keys)
    seen = rng.permutation([0, rng.integers(1, keys), keys - rng.integers(tile.keys)])
    options = {"is_causal": bool(rng.integers(2)), "kv_lens": seen, **rule(tile, 1)}
    return program(trace(cuattn.attention, *arrays, **options))


def ragged(rng, tile):
    """Sequences of any lengths, some of them empty: rounds without rows, rows without keys."""
    rows = rng.permutation([0, *rng.integers(1, 100 * tile.groups, 3)])
    keys = rng.permutation([0, tile.keys, *rng.integers(1, 4 * tile.keys, 2)])
    q, k, v = (a.swapaxes(0, 1) for a in zeros(tile, (1,), rows.sum(), keys.sum()))
    starts = (np.concatenate([[0], np.cumsum(lengths)]) for lengths in (rows, keys))
    return program(trace(cuattn.attention_varlen, q, k, v, *starts, **rule(tile, 1)))


def windowed(rng, tile):
    """Keys before a window that no query sees: in the first tile of some rounds, not of others."""
    keys, rows = (tile.stages + 4) * tile.keys, 64 * tile.groups + 1
    arrays = zeros(tile, (2, 1), rows, keys)
    offsets = np.array([2 * tile.keys + rng.integers(1, tile.keys), 2 * tile.keys])
    options = {"window": (tile.keys, tile.keys), "q_offset": offsets, **rule(tile, 1)}
    return program(trace(cuattn.attention, *arrays, **options))


def listed(rng, tile):
    """Tiles of a block mask, some of them partial and one row of them without any."""
    mask = rng.random((3, 6)) < 0.7
    mask[rng.integers(3)] = False
    mask = mask.repeat(128, 0).repeat(128, 1)
    mask[:, rng.integers(768, size=3)] = False
    arrays = zeros(tile, (1, 2), 300, 700)
    options = {"block_mask": cuattn.block_mask(mask[:300, :700]), **rule(tile, 2)}
    return program(trace(cuattn.attention, *arrays, **options))


CALLS = (dense, ragged, windowed)


@pytest.mark.drawn
@pytest.mark.parametrize("tile", tiles(), ids=str)
def test_every_order(rng, tile):
    for call in CALLS:
        made = call(rng, tile)
        for seed in rng.integers(2**32, size=RUNS):
            Machine(made, int(seed)).run()


@pytest.mark.parametrize("row", BLOCKED_TILES, ids=str)
def test_every_order_of_listed_tiles(rng, row):
    (tile, *_) = (t for t in tiles() if (t.dim, t.value_dim, t.modified) == row[:3])
    made = listed(rng, tile)
    for seed in rng.integers(2**32, size=RUNS):
        Machine(made, int(seed)).run()


# ---- What the machine sees ----


@pytest.fixture(scope="module")
def programs():
    """Of each kind of pipeline: warpgroups, stages, place of `out`, ping-pong."""
    kinds = {}
    for tile in tiles():
        flags = (tile.kernel.arguments[name] for name in ("kOwnOut", "kPingPong"))
        kinds.setdefault((tile.groups, tile.stages, *flags), tile)
    rng = np.random.default_rng(0)
    every = [call(rng, tile) for tile in kinds.values() for call in CALLS * 2]
    return every + [listed(rng, tile) for tile in [*kinds.values()][1:]]


def survivors(rng, programs, mutants):
    """Names of mutants that no run of any program notices; a mutant makes a program of one, or
    None where it does not apply."""
    left = []
    for name, mutant in mutants.items():
        changed = [made for made in map(mutant, programs) if made]
        assert changed, name
        try:
            for run in range(MUTANT_RUNS):
                Machine(changed[run % len(changed)], int(rng.integers(2**32))).run()
        except Fault:
            continue
        left.append(name)
    return left


def test_nothing_orders_in_vain(rng, programs):
    """Every wait, arrival, group and fence: without it some run fails."""
    sites = Counter(site for made in programs for site in made.sites())
    assert len(sites) > 25
    mutants = {
        site: lambda made, site=site: made.without(site) if site in made.sites() else None
        for site in sites
    }
    assert survivors(rng, programs, mutants) == []


def test_the_machine_counts(rng, programs):
    """An arrival more or less, other bytes, the wrong phase, another number of threads."""

    def arrivals(whose, more):
        def mutant(made):
            of = {s.on for steps in made.warps.values() for s in steps if s.whose == whose}
            counts = {bar: n + more * (bar in of) for bar, n in made.arrivals.items()}
            return made._replace(arrivals=counts) if min(counts.values()) else None

        return mutant

    def steps(op, whose, change):
        def one(step):
            right = step.op == op and step.whose == whose and (step.count or op == "await")
            return step._replace(count=change(step.count)) if right else step

        return lambda made: made._replace(warps={w: [*map(one, s)] for w, s in made.warps.items()})

    free, there = ([f"{name} is {state}" for name in "qkv"] for state in ("free", "there"))
    mutants = {(w, more): arrivals(w, more) for w in free + there for more in (-1, 1)}
    del mutants["q is there", -1], mutants["k is there", -1], mutants["v is there", -1]
    mutants |= {(w, "phase"): steps("await", w, lambda parity: 1 - parity) for w in free + there}
    mutants |= {(w, "less"): steps("arrive", w, lambda size: size - 16) for w in there}
    mutants |= {(w, "more"): steps("arrive", w, lambda size: size + 16) for w in there}
    mutants["threads"] = steps("barrier sync", "", lambda threads: threads - 32)
    assert survivors(rng, programs, mutants) == []
