"""Which kernels compute the gradients of attention, tile by tile, and that all of these compile."""

from __future__ import annotations

import dataclasses

import pytest
from attention_cases import OPS
from configurations import attention_problem, backward_kernels

from cuattn._attention import plan_backward as general
from cuattn._attention import plan_backward_sm90 as hopper

COLUMNS = ("kColumns", "kKeyColumns", "kValueColumns")
SMEM = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.mark.parametrize("capability", SMEM)
@pytest.mark.parametrize("op", OPS)
def test_every_size_has_tiles(op, capability):
    """Blocks have the shared memory that there is, and all columns together those of the heads."""
    for dims in ((d, e) for d in range(0, 257, 8) for e in (0, d, 256)):
        for flags in ({}, {"modified": True, "bias": "float32", "masked": True, "vector": False}):
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
                if found := plan(problem, capability):
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
        (attention_problem("float16", 256), (False, False)),
        (attention_problem("float16", 128, tma=False), (False, False)),
        (attention_problem("float16", 128, modified=True), (False, False)),
        (attention_problem("float16", 128, masked=True), (False, False)),
        (attention_problem("tf32", 128), (False, False)),
    ):
        plans = hopper.plan_q_sm90, hopper.plan_kv_sm90
        assert tuple(plan(problem, 90) is not None for plan in plans) == own
        assert all(plan(problem, other) is None for plan in plans for other in (80, 100, 120))


@pytest.mark.parametrize("table", [hopper.Q_TILES, hopper.KV_TILES], ids=["q", "kv"])
def test_every_tile_of_hopper_is_compiled(table):
    compiled = {
        (kernel.template, *list(kernel.arguments.values())[1:]) for kernel in backward_kernels(90)
    }
    plan = hopper.plan_q_sm90 if table is hopper.Q_TILES else hopper.plan_kv_sm90
    for tile in table:
        kernel = plan(attention_problem("float16", tile.max_dim), 90).launch.kernel
        assert (kernel.template, *list(kernel.arguments.values())[1:]) in compiled
