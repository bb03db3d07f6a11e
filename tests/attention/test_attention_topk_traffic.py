"""What attention_topk moves and computes, counted on the emulator, and what its plans cover."""

from __future__ import annotations

import itertools
import os

import emulator
import numpy as np
import pytest
from attention_cases import OPS, precision_of
from conftest import SEED
from tolerance import dtype_of

import cuattn
from cuattn import reference
from cuattn._attention.plan_topk import MOST_IN_PASS, plan_topk
from cuattn._attention.problem import AttentionProblem


class Counted:
    """One call: its result, counters, and the tile of its kernel."""

    def __init__(self, q, k, num, op="float16", num_sms=132, profile=False, **options):
        options |= {"precision": "tf32"} if op == "tf32" else {}
        seed = int(os.environ[SEED])
        with emulator.activate("sm_80", num_sms, seed=seed, profile=profile) as runtime:
            self.allocated = []
            empty = runtime.empty
            runtime.empty = lambda shape, dtype: self.allocated.append(shape) or empty(shape, dtype)
            self.result = cuattn.attention_topk(q, k, num, **options)
        self.counters, self.templates = runtime.total(), [k.template for k in runtime.kernels]
        tile = runtime.kernels[0].arguments
        self.warps, self.keys = tile["kWarps"], tile["kKeys"]


def draw(rng, q_rows, k_rows, dim, op="float16"):
    dtype = dtype_of(precision_of(op)[0])
    return [rng.standard_normal((n, dim)).astype(dtype) for n in (q_rows, k_rows)]


@pytest.mark.parametrize("op", ["bfloat16", "float32", "float64"])
def test_every_byte(rng, op):
    """Q once, K once for each block of query rows that sees any of it; only results are written,
    and nothing else is allocated."""
    q_rows, k_rows = int(rng.integers(130, 200)), int(rng.integers(200, 300))
    q, k = draw(rng, q_rows, k_rows, 64, op)
    call = Counted(q, k, 10, op, is_causal=True)
    rows = 16 * call.warps
    lasts = [min(i + rows, q_rows) + k_rows - q_rows for i in range(0, q_rows, rows)]
    assert call.counters.global_bytes_read == (q_rows + sum(lasts)) * 64 * q.itemsize
    assert call.counters.global_bytes_written == sum(one.nbytes for one in call.result)
    assert sorted(call.allocated) == [(q_rows, 10)] * 2


@pytest.mark.parametrize(
    ("op", "dim"), [*((op, 64) for op in OPS), ("float16", 256), ("float64", 256)]
)
def test_a_tile_that_no_row_wants(rng, op, dim):
    """More keys add one vote for each warp and tile, one exponential a score, no bank conflict."""
    found, ideal = [], []
    for k_rows in (64, 320):
        q, k = draw(rng, 40, k_rows, dim, op)
        q[...], k[..., 0] = np.eye(1, dim), -np.arange(k_rows)
        call = Counted(q, k, 8, op)
        tiles, warps, counters = -(-k_rows // call.keys), 3, call.counters
        scores = tiles * call.keys * 16 * warps
        conflicts = counters.shared_wavefronts - counters.shared_wavefronts_ideal
        votes = counters.warp_collectives - tiles * warps
        found.append((conflicts, votes, counters.exps - scores))
        ideal.append(counters.shared_wavefronts_ideal)
    assert found[0] == found[1] and ideal[1] > ideal[0]


def test_reads_by_passes(rng):
    """K is read once for every 64 keys, and what a pass leaves to the next is one key a row."""
    q, k = draw(rng, 20, 300, 32)
    for num, passes in ((64, 1), (65, 2), (130, 3)):
        call = Counted(q, k, num, num_sms=1)
        assert call.templates == ["attention_topk"] * passes
        least = passes * (q.nbytes + k.nbytes * -(-20 // (16 * call.warps)))
        assert 0 <= call.counters.global_bytes_read - least <= (passes - 1) * 4 * 8 * 20


def test_blocks_share_keys(rng):
    """Few queries: K is still read once, and the bits are those of a block that has all keys and
    other queries."""
    q, k = draw(rng, 3, 5000, 4, "float32")
    shared = Counted(q, k, 33, "float32", output="state")
    assert shared.templates == ["attention_topk", "attention_topk_merge"]
    states, lists = 3 * 5 * 8, 3 * 5 * 33 * 8
    assert shared.counters.global_bytes_read == 5 * q.nbytes + k.nbytes + states + lists
    beside = Counted(np.vstack([q] * 22), k, 33, "float32", num_sms=1, output="state")
    assert beside.templates == ["attention_topk"]
    for one, other in zip(shared.result, beside.result, strict=True):
        assert one.tobytes() == other[33:36].tobytes()


def test_cost_of_an_order(rng):
    """Random keys cost little more than keys of which no later one is wanted."""
    q, k = draw(rng, 64, 1500, 32)
    random = Counted(q, k, 10, profile=True).counters.cost
    q[...], k[..., 0] = np.eye(1, 32), -np.arange(1500)
    assert random < 3 * Counted(q, k, 10, profile=True).counters.cost


@pytest.mark.parametrize("num_sms", [1, 16, 132])
def test_every_plan_covers(num_sms):
    """All of `num` in passes, all parts of keys in blocks, and shared memory of every device."""
    sizes = itertools.product((1, 17, 5000), (0, 1, 1000, 10**6), (0, 1, 32, 33, 64, 65, 1000))
    for op, (q_rows, k_rows, num) in itertools.product(OPS, sizes):
        for dim in range(0, 257, 32):
            dtype = precision_of(op)[0]
            problem = AttentionProblem(op, dtype, 1, 2, 1, q_rows, k_rows, dim, dim)
            plan = plan_topk(problem, num, num_sms)
            assert [one.first for one in plan.passes] == [*range(0, max(num, 1), MOST_IN_PASS)]
            assert sum(one.number for one in plan.passes) == num
            assert plan.kernel.smem_bytes <= 99 << 10
            assert plan.parts * plan.part >= k_rows and 1 <= plan.splits <= plan.parts <= 256
            share = -(-plan.parts // plan.splits)
            assert (plan.splits - 1) * share < plan.parts <= plan.splits * share
            assert (plan.merge is not None) == (plan.splits > 1)
            assert plan.kernel.arguments["kPerLane"] * 32 >= min(num, MOST_IN_PASS)


def test_numpy_needs_no_matrix_of_scores(rng):
    import tracemalloc

    q, k = draw(rng, 3000, 3000, 8, "float32")
    for num in (5, 300):
        cuattn.attention_topk(q[:2], k, num)
        tracemalloc.start()
        try:
            got = cuattn.attention_topk(q, k, num)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < sum(one.nbytes for one in got) + (24 << 20) < 8 * 3000 * 3000
        want = reference.attention_topk(q[::500], k, num)
        np.testing.assert_allclose(got.values[::500], want.values, 1e-4)
