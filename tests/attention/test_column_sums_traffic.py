"""What attention_column_sums moves and computes, counted on the emulator: exact formulas."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from conftest import SEED
from test_attention_traffic import DTYPES, draw, ranges_of_blocks

import cuattn

pytestmark = pytest.mark.drawn


class Counted:
    """One call: its result, its counters, and the tile of its kernel."""

    def __init__(self, rng, op, q_rows, k_rows, dim, heads=(1, 1), num_sms=1, **options):
        options |= {"precision": "tf32"} if op == "tf32" else {}
        q, k, _ = draw(rng, 1, *heads, q_rows, k_rows, dim, 1, DTYPES[op])
        lse = np.full(q.shape[:3], 9, np.float64 if op == "float64" else np.float32)
        with emulator.activate(arch="sm_80", seed=int(os.environ[SEED])) as runtime:
            runtime.num_sms = num_sms
            self.allocated, empty = [], runtime.empty
            runtime.empty = lambda shape, dtype: self.allocated.append(shape) or empty(shape, dtype)
            self.result = cuattn.attention_column_sums(q, k, lse, **options)
        (kernel,) = runtime.kernels
        self.counters, tile = runtime.total(), kernel.arguments
        self.row_bytes, self.lse_bytes = dim * q.itemsize, lse.itemsize
        self.keys, self.queries = 16 * tile["kWarps"] * tile["kMTiles"], tile["kQueries"]
        self.blocks = kernel.grid


@pytest.mark.parametrize("op", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (100, 0), (70, 90)], ids=str)
def test_every_byte(rng, op, left, right):
    """K once, for all heads that share it; Q and lse once for each block of keys that some query
    sees: others are not read. Nothing but the sums is allocated or written."""
    q_rows, k_rows = int(rng.integers(300, 400)), int(rng.integers(400, 500))
    call = Counted(rng, op, q_rows, k_rows, 64, (2, 1), window=(left, right))
    # Query i sees key j where j sees i, of a window turned round.
    ranges = list(ranges_of_blocks(k_rows, q_rows, call.keys, right, left))
    queries = 2 * sum(end - begin for begin, end in ranges)
    keys = sum(min(call.keys, k_rows - call.keys * i) for i, (begin, end) in enumerate(ranges)
               if end > begin)  # fmt: skip
    read = (queries + keys) * call.row_bytes + queries * call.lse_bytes
    assert call.counters.global_bytes_read == read
    assert call.counters.global_bytes_written == call.result.nbytes
    assert call.allocated == [(1, 2, k_rows)]
    tiles = 2 * sum(-(-end // call.queries) - begin // call.queries for begin, end in ranges
                    if end > begin)  # fmt: skip
    assert call.counters.exps == tiles * call.queries * call.keys
    assert call.counters.barriers == tiles


@pytest.mark.parametrize(("num_sms", "together"), [(1, 4), (6, 2), (100, 1)])
def test_products(rng, num_sms, together):
    """One of each score, and two blocks for each multiprocessor if there are as many heads."""
    call = Counted(rng, "float16", 128, 384, 64, (8, 2), num_sms)
    assert call.counters.mma == 8 * 128 * 384 * 64 // (16 * 8 * 16)
    assert call.counters.exps == 8 * 128 * 384
    assert call.blocks == 8 // together * 3
    rows = 8 // together * 384 + 3 * 8 * 128
    assert call.counters.global_bytes_read == rows * call.row_bytes + 3 * 8 * 128 * call.lse_bytes


@pytest.mark.parametrize("op", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_no_bank_conflicts(rng, op, dim):
    """More queries add wavefronts, and none beyond the ideal."""
    calls = [Counted(rng, op, rows, 64, dim).counters for rows in (64, 192)]
    few, many = ((c.shared_wavefronts, c.shared_wavefronts_ideal) for c in calls)
    assert many[0] - few[0] == many[1] - few[1] > 0
