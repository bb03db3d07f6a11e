"""Which kernels compute the gradients of attention, tile by tile, and that all of these compile."""

from __future__ import annotations

import dataclasses

import pytest
from attention_cases import OPS
from configurations import SMS, attention_problem, backward_kernels

from cuattn._attention import plan_backward as general
from cuattn._attention import plan_backward_ds as storing
from cuattn._attention import plan_backward_sm90 as hopper
from cuattn._attention.problem import Score

COLUMNS = ("kColumns", "kKeyColumns", "kValueColumns")
RULE = {"modified": True, "bias": "float32", "masked": True, "vector": False}
SMEM = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.parametrize("capability", SMEM)
@pytest.mark.parametrize("op", OPS)
def test_every_size_has_tiles(op, capability):
    """Blocks have the shared memory that there is, and all columns together those of the heads."""
    for dims in ((d, e) for d in range(0, 257, 8) for e in (0, d, 256)):
        for flags in ({}, RULE, {**RULE, "score": Score("Score_0", "", "")}):
            problem = attention_problem(op, *dims, **flags)
            problem = dataclasses.replace(problem, value_dim=dims[1])
            launches = [general.plan_q(problem, capability), *general.plan_kv(problem, capability)]
            covered = dict.fromkeys(COLUMNS, 0)
            for launch in launches:
                tile, units = (
                    launch.kernel.arguments,
                    4 if "kKeys" in launch.kernel.arguments else 2,
                )
                parts = launch.kernel.grid // (units * launch.row_blocks)
                for name in COLUMNS:
                    covered[name] += parts * tile.get(name, 0)
            assert covered["kColumns"] >= dims[0] <= covered["kKeyColumns"]
            assert covered["kValueColumns"] >= dims[1]
            for plan in (hopper.plan_q_sm90, hopper.plan_kv_sm90):
                if found := plan(problem, capability, SMS):
                    launches.append(found.launch)
            if flags:
                sizes = general.BiasSizes(1, 1, 9, 9)
                launches.append(general.plan_bias(problem, sizes, capability))
            assert all(launch.kernel.smem_bytes <= SMEM[capability] for launch in launches)


def test_calls_of_hopper():
    """16-bit types that TMA moves, whose scores are only scaled and cut off."""
    for problem, own in (
        (attention_problem("float16", 128), (True, True)),
        (attention_problem("bfloat16", 8, 64), (True, True)),
        (attention_problem("bfloat16", 192, 128), (True, False)),
        (attention_problem("float16", 256), (True, False)),
        (attention_problem("bfloat16", 64, 256), (True, False)),
        (attention_problem("float16", 128, tma=False), (False, False)),
        (attention_problem("float16", 128, modified=True), (False, False)),
        (attention_problem("float16", 128, masked=True), (False, False)),
        (attention_problem("tf32", 128), (False, False)),
    ):
        plans = hopper.plan_q_sm90, hopper.plan_kv_sm90
        assert tuple(plan(problem, 90, SMS) is not None for plan in plans) == own
        assert all(plan(problem, other, SMS) is None for plan in plans for other in (80, 100, 120))


@pytest.mark.parametrize("table", [hopper.Q_TILES, hopper.KV_TILES], ids=["q", "kv"])
def test_every_tile_of_hopper_is_compiled(table):
    compiled = {
        (kernel.template, *list(kernel.arguments.values())[1:]) for kernel in backward_kernels(90)
    }
    plan = hopper.plan_q_sm90 if table is hopper.Q_TILES else hopper.plan_kv_sm90
    for tile in table:
        kernel = plan(attention_problem("float16", tile.max_dim), 90, SMS).launch.kernel
        assert (kernel.template, *list(kernel.arguments.values())[1:]) in compiled


def long_problem(batch, heads, rows, dim=128, op="float16", **flags):
    """Of `heads`, query heads and key heads, of as many keys as queries."""
    problem = attention_problem(op, dim, **flags)
    sizes = {"batch": batch, "heads": heads[0], "kv_heads": heads[1], "k_rows": rows[-1]}
    return dataclasses.replace(problem, q_rows=rows[0], **sizes)


@pytest.mark.parametrize(
    ("problem", "rounds"),
    [
        (long_problem(1, (16, 16), (1024,)), 1),
        (long_problem(2, (16, 16), (8192,)), 4),
        (long_problem(2, (16, 16), (8192,), 64, "bfloat16", bounded=True), 4),
        (long_problem(3, (5, 5), (8192,)), 2),  # of 8 heads, and of 7
        (long_problem(1, (16, 16), (16384,)), 8),
        (long_problem(4, (32, 8), (2048,)), 1),
        (long_problem(1, (16, 16), (1023, 4096)), 0),  # few queries
        (long_problem(1, (16, 16), (4096, 1023)), 0),
        (long_problem(1, (8, 8), (3000, 5000), ragged=True), 0),
        (long_problem(1, (16, 16), (32768,)), 0),  # one head is more than fits
        (long_problem(1, (64, 8), (8192,)), 0),  # one head of K is too few blocks
        (long_problem(1, (16, 16), (4096,), 96), 0),
        (long_problem(1, (16, 16), (4096,), 192), 0),
        (long_problem(1, (16, 16), (4096,), modified=True), 0),
        (long_problem(1, (16, 16), (4096,), tma=False), 0),
        (long_problem(1, (16, 16), (4096,), op="tf32"), 0),
    ],
    ids=str,
)
def test_where_gradients_of_scores_are_stored(problem, rounds):
    assert all(storing.plan_ds(problem, other, SMS) is None for other in (80, 100, 120))
    plan = storing.plan_ds(problem, 90, SMS)
    assert len(plan.rounds if plan else ()) == rounds
    if plan is None:
        return
    assert plan.images * storing.IMAGE_BYTES <= storing.WORKSPACE_BYTES == 2**30
    units, sharing = 0, problem.heads // problem.kv_heads
    kv = hopper.plan_kv_sm90(problem, 90, SMS).launch
    for part in plan.rounds:
        assert part.unit == units
        units += part.units
        assert part.kv.schedule.blocks == part.units * kv.row_blocks
        assert part.ds.schedule.blocks == part.units * sharing * part.ds.row_blocks
        for launch in (part.kv, part.ds):
            assert launch.kernel.grid == min(SMS, launch.schedule.blocks)
        assert part.units * sharing * plan.q_tiles * plan.k_tiles <= plan.images
        assert part.kv.kernel.arguments == kv.kernel.arguments | {"kStoreDs": True}
        assert part.kv.kernel.smem_bytes == kv.kernel.smem_bytes
        assert part.ds.kernel.smem_bytes <= SMEM[90]
    assert units == problem.kv_heads * problem.batch
    counts = [part.units for part in plan.rounds]
    assert len(counts) == 1 or min(counts[:-1]) * kv.row_blocks >= storing.LEAST_BLOCKS


@pytest.mark.parametrize("rows", [(2048,), (8192,), (16384, 8192), (16384,), (23000,), (32768,)])
def test_where_gradients_of_scores_are_stored_is_the_same_in_every_batch(rows):
    """dq has other last bits there."""
    stored = {
        storing.plan_ds(long_problem(batch, (4 * heads, heads), rows), 90, SMS) is None
        for batch in (1, 2, 7)
        for heads in (1, 2, 5)
    }
    assert len(stored) == 1


@pytest.mark.parametrize("tile", storing.TILES)
def test_every_tile_of_stored_gradients_is_compiled(tile):
    compiled = {kernel.name for kernel in backward_kernels(90)}
    for op in ("float16", "bfloat16"):
        plan = storing.plan_ds(long_problem(1, (4, 2), (2048,), tile.max_dim, op), 90, SMS)
        (part,) = plan.rounds
        assert {part.kv.kernel.name, part.ds.kernel.name} <= compiled
