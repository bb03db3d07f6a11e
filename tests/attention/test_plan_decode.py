"""Which kernel attends over a KV cache, and how its keys are cut."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from configurations import decode_problems, kernels

from cuattn._attention import plan_decode
from cuattn._attention.plan_decode import DecodeProblem, auto_split, divider

CAPABILITIES = (80, 86, 90, 100, 120)
PROBLEM = DecodeProblem("float16", "float16", 3, 2, 4, 4096, 128, 128)


def numbers_of(kernel):
    """What tells the tiles of a table apart."""
    found = kernel.arguments
    dims = found["kKeys"], found["kDim"], found["kValueDim"]
    return kernel.template, kernel.block, *dims, found.get("kStages", 2)


def test_every_tile_is_compiled():
    """Each row of the tables is taken somewhere, and what is taken is among the configurations."""
    taken = set()
    for capability in CAPABILITIES:
        compiled = kernels(capability)
        for problem in decode_problems(capability):
            kernel = plan_decode.plan_decode(problem, capability, 132).kernel
            assert kernel.name in compiled
            taken.add((problem.op, *numbers_of(kernel)))
    half = (("float16", plan_decode.HALF_TILES), ("float16", plan_decode.HALF_LATENT))
    of_op = (*plan_decode.TABLES.items(), *plan_decode.LATENT_TABLES.items())
    for op, table in half + of_op:
        for tile in table:
            assert (op, tile.template, 32 * tile.warps, tile.keys, *tile.dims, tile.stages) in taken


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_problem_has_a_tile_that_fits(capability):
    kib = {80: 163, 90: 227, 100: 227}.get(capability, 99)
    for problem in decode_problems(capability):
        for rows, dim, value_dim in itertools.product((1, 16, 17, 300), (1, 64, 96, 256), (0, 200)):
            one = replace(problem, rows=rows, head_dim=dim, value_dim=value_dim)
            plan = plan_decode.plan_decode(one, capability, 132)
            found = plan.kernel.arguments
            team = found.get("kTeam") or found.get("kWarps", 12) // found.get("kColumnWarps", 3)
            tile_rows = 16 * team
            if one.values_in_keys:  # of each key, its values are read with it
                assert plan.values_in_keys or (problem.op == "float64" and kib < 163)
            assert found["kDim"] >= dim and plan.kernel.smem_bytes <= kib * 1024
            assert plan.row_tiles * tile_rows >= rows > (plan.row_tiles - 1) * tile_rows
            assert plan.column_tiles * found["kValueDim"] >= value_dim
            if problem.op != "float64" or kib > 99:
                assert plan.column_tiles == 1  # else keys are read again


def test_latent_attention_of_many_rows_on_hopper():
    """wgmma is there alone; of few rows, and of 8 bits, it gains nothing."""
    latent = DecodeProblem("float16", "float16", 3, 1, 33, 4096, 576, 512, values_in_keys=True)
    changes = {}, {"rows": 32}, {"plain": False}, {"op": "tf32", "dtype": "float32"}
    for capability, change in itertools.product(CAPABILITIES, changes):
        kernel = plan_decode.plan_decode(replace(latent, **change), capability, 132).kernel
        own = capability == 90 and not change
        assert kernel.template == ("attention_latent_sm90" if own else "attention_wide")
        assert (kernel.suffix, kernel.registers) == (("a", 168) if own else ("", 0))


@pytest.mark.parametrize("split_size", [None, 128, 256])
def test_the_workspace_has_room(split_size):
    """A part of every unit, or two of every block, and a counter of each pair, or block."""
    for batch, capacity, num_sms in itertools.product((1, 40), (0, 100, 5000), (1, 132)):
        one = replace(PROBLEM, batch=batch, capacity=capacity, split_size=split_size)
        plan = plan_decode.plan_decode(one, 90, num_sms)
        pairs = batch * one.kv_heads
        record = one.rows * 131 * 4
        if split_size is None:
            assert plan.split == 0 and plan.counters == plan.kernel.grid <= num_sms
            assert plan.part_bytes >= 2 * plan.kernel.grid * record
        else:
            parts = max(1, -(-capacity // split_size))
            assert plan.split * plan.kernel.arguments["kKeys"] == split_size
            assert plan.counters >= pairs and plan.part_bytes >= pairs * parts * record


def test_the_grid_depends_on_no_length():
    """Only on the room, and on nothing where splits are many."""
    assert plan_decode.plan_decode(replace(PROBLEM, capacity=10**6), 90, 132).kernel.grid == 132
    assert plan_decode.plan_decode(replace(PROBLEM, batch=500), 90, 132).kernel.grid == 132


def test_splits_where_that_is_left_to_us():
    assert [auto_split(n) for n in (0, 1, 32768, 32769, 10**6)] == [256, 256, 256, 512, 8192]


def test_pages_are_found_by_multiplication():
    """As the kernel does it, in 32 bits: at both sides of each multiple, and at the last key."""
    for size in (1, 2, 3, 5, 7, 16, 24, 100, 255, 256, 257, 641, 2**20 - 1, 2**30 + 1, 2**31 - 1):
        magic, shift = divider(size)
        assert 0 <= magic < 2**32 and 0 <= shift < 32
        last = (2**31 - 1) // size
        for page in {0, 1, 2, last // 2, last - 1, last}:
            for key in (page * size - 1, page * size, page * size + size - 1):
                if 0 <= key < 2**31:
                    assert (2 * key * magic >> 32) >> shift == key // size
