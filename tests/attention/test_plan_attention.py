"""Plans of attention stay inside the limits of every device, and cover every row and column.

Pure Python: sizes in, launches out.
"""

from __future__ import annotations

import pytest
from configurations import attention_problems

from cuattn._attention import checks
from cuattn._attention import plan as attention_plan
from cuattn._attention.problem import AttentionProblem
from cuattn._device.kernel import ITEMSIZE

# Shared memory that a block may have, KiB (CUDA programming guide, technical specifications).
SMEM = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}


SIZES = (1, 1), (59, 200), (200, 59), (256, 256), (0, 5), (5, 0), (321, 64), (64, 321), (512, 512)


def problems():
    yield from attention_problems()
    for op in attention_plan.OPS:
        dtype = "float32" if op == "tf32" else op
        for dim, value_dim in SIZES:
            blocked = {"masked": True, "blocked": True}
            for flags in ({}, {"vector": False}, {"modified": True}, {"masked": True}, blocked):
                yield AttentionProblem(op, dtype, 3, 8, 2, 1000, 77, dim, value_dim, **flags)
                yield AttentionProblem(
                    op, dtype, 3, 8, 2, 1000, 77, dim, value_dim, ragged=True, **flags
                )


def tile(kernel):
    sizes = ("kWarps", "kMTiles", "kKeys", "kDim", "kValueDim", "kSlots")
    return [kernel.arguments[name] for name in sizes]


@pytest.mark.parametrize("capability", SMEM)
def test_limits(capability):
    for problem in problems():
        plan = attention_plan.plan_attention(problem, capability)
        warps, row_tiles, keys, dim, value_dim, slots = tile(plan.kernel)
        rows, item = 16 * warps * row_tiles, ITEMSIZE[problem.dtype]
        flags = ("vector", "modified", "masked")
        asked = {f"k{flag.capitalize()}": getattr(problem, flag) for flag in flags}
        assert asked.items() <= plan.kernel.arguments.items()
        part_dim = plan.kernel.arguments["kPartDim"]
        wide = max(part_dim, value_dim)
        assert plan.kernel.block == 32 * warps <= 256  # 255 registers per thread
        assert plan.kernel.smem_bytes <= 1024 * SMEM[capability] - 64  # and what a mask needs
        assert plan.kernel.smem_bytes >= item * (rows * dim + slots * keys * wide)
        assert plan.kernel.smem_bytes >= item * rows * value_dim  # the result takes its place
        assert slots >= 2 and keys % 16 == 0 and keys <= 64
        if problem.blocked:
            assert checks.BLOCK % rows == checks.BLOCK % keys == 0
        assert part_dim % 32 == value_dim % 32 == 0 and dim % part_dim == 0
        assert problem.head_dim <= dim < max(1, problem.head_dim) + part_dim  # no part is empty
        # Accumulators and scores of a thread, in registers.
        words = (value_dim + keys) * row_tiles // 2 * (2 if problem.op == "float64" else 1)
        assert words <= 176
        units = problem.heads if problem.ragged else problem.heads * problem.batch
        blocks = plan.row_blocks * units
        columns = plan.kernel.grid // blocks * value_dim
        assert plan.kernel.grid % blocks == 0
        assert problem.value_dim <= columns <= max(1, problem.value_dim) + value_dim - 1
        spare = problem.batch if problem.ragged else 0
        assert plan.row_blocks == -(-problem.q_rows // rows) + spare
        assert 1 <= plan.heads_in_l2 <= units


def test_every_row_of_the_tables_is_taken_and_has_a_reason():
    tables = ("HALF_TILES", "HALF_RULE_TILES", "TF32_TILES", "FLOAT_TILES", "DOUBLE_TILES")
    tables += ("FLOAT_BLOCKED_TILES",)
    for name in tables:
        table = getattr(attention_plan, name)
        assert all(row[-1] for row in table)
        assert all(before[0] <= row[0] for before, row in zip(table, table[1:], strict=False))
        assert table[-1][:2] == (512, 99)  # every problem finds a row, on every device
    taken = set()
    for capability in (80, 86):
        for problem in problems():
            kernel = attention_plan.plan_attention(problem, capability).kernel
            warps, row_tiles, keys, _, _, slots = tile(kernel)
            taken.add((warps, row_tiles, keys, slots))
    assert taken == {row[2:6] for name in tables for row in getattr(attention_plan, name)}


@pytest.mark.parametrize("columns", [0, 1, 64, 100])
@pytest.mark.parametrize("vector", [False, True])
def test_merge_covers_every_column(columns, vector):
    kernel = attention_plan.plan_attention_merge("float16", "float32", 1001, columns, vector)
    vec = kernel.arguments["kVec"]
    assert vec == (8 if vector else 1)
    assert kernel.grid * kernel.block >= 1001 * max(1, -(-columns // vec))
