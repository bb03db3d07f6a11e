"""What attention moves and computes, counted on the emulator: exact formulas, not bounds."""

from __future__ import annotations

import os

import emulator
import ml_dtypes
import numpy as np
import pytest
from conftest import SEED

import cuattn
from cuattn._attention import plan
from cuattn._attention.problem import AttentionProblem
from cuattn._device.params import ATTENTION_POINTERS, ATTENTION_TAIL, SCORE_ARRAYS

pytestmark = pytest.mark.drawn

DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "float32": np.float32,
    "float64": np.float64,
}


class Counted:
    """One call: its result, counters, and the tile of its kernel."""

    def __init__(self, q, k, v, op="float16", arch="sm_80", **options):
        options |= {"precision": "tf32"} if op == "tf32" else {}
        with emulator.activate(arch=arch, seed=int(os.environ[SEED])) as runtime:
            self.allocated = []
            empty = runtime.empty
            runtime.empty = lambda shape, dtype: self.allocated.append(shape) or empty(shape, dtype)
            self.result = cuattn.attention(q, k, v, **options)
        (kernel,) = runtime.kernels
        self.counters = runtime.total()
        tile = kernel.arguments
        self.keys, self.slots = tile["kKeys"], tile["kSlots"]
        self.dim, self.value_dim = tile["kDim"], tile["kValueDim"]
        self.rows = 16 * tile["kWarps"] * tile["kMTiles"]


def draw(rng, batch, heads, kv_heads, q_rows, k_rows, dim, value_dim, dtype):
    shapes = (
        (batch, heads, q_rows, dim),
        (batch, kv_heads, k_rows, dim),
        (batch, kv_heads, k_rows, value_dim),
    )
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def ranges_of_blocks(q_rows, k_rows, rows, left=None, right=None):
    """First and last key that some row of each block of query rows sees."""
    offset = k_rows - q_rows
    for first in range(0, q_rows, rows):
        last = min(first + rows, q_rows) - 1
        begin = 0 if left is None else max(0, first + offset - left)
        end = k_rows if right is None else min(k_rows, last + offset + right + 1)
        yield begin, max(begin, end)


@pytest.mark.parametrize("op", DTYPES)
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (100, 0), (70, 90)], ids=str)
def test_every_byte(rng, op, left, right):
    """Q and the result once; K and V once for each block of query rows that sees any of them."""
    q_rows, k_rows = int(rng.integers(300, 400)), int(rng.integers(400, 500))
    q, k, v = draw(rng, 1, 2, 1, q_rows, k_rows, 64, 64, DTYPES[op])
    q *= q.dtype.type(0.1)  # no tile has a score that asks for a rescale
    call = Counted(q, k, v, op, window=(left, right), return_lse=True)
    ranges = list(ranges_of_blocks(q_rows, k_rows, call.rows, left, right))
    rows_read = q_rows + 2 * sum(end - begin for begin, end in ranges)
    assert call.counters.global_bytes_read == 2 * rows_read * 64 * q.itemsize
    lse = call.result[1]
    assert call.counters.global_bytes_written == call.result[0].nbytes + lse.nbytes
    tiles = sum(-(-end // call.keys) - begin // call.keys for begin, end in ranges if end > begin)
    # Each score once. Factors: where rows of a warp begin in different tiles, for some; by each of
    # the four lanes that share a row.
    scores = 2 * tiles * call.rows * call.keys
    most = scores + 2 * tiles * call.rows * 4 * (left is not None)
    assert scores <= call.counters.exps <= most


@pytest.mark.parametrize("op", DTYPES)
def test_bytes_of_wide_heads(rng, op):
    """Blocks of rows and columns of the result read Q and K once, and their own columns of V."""
    q, k, v = draw(rng, 1, 1, 1, 140, 70, 328, 512, DTYPES[op])
    call = Counted(q, k, v, op)
    times = 512 // call.value_dim * np.array([1, -(-140 // call.rows)])
    read = (times * [140, 70]).sum() * 328 + times[1] * 70 * call.value_dim
    assert call.counters.global_bytes_read == read * q.itemsize


@pytest.mark.parametrize("op", DTYPES)
def test_one_exponential_per_score(rng, op):
    """A maximum that grows by little costs no rescale; by more, one for each lane of a row."""
    for growth, rescaled in ((5.0, False), (13.0, True)):  # powers of two in all; per 64 keys
        q, k, v = draw(rng, 1, 1, 1, 128, 320, 64, 64, DTYPES[op])
        q[...], k[..., 0] = np.eye(1, 64), np.arange(320) // 64 * growth * np.log(2) * 8
        k[..., 0] /= k.dtype.type(1 if rescaled else 4)
        call = Counted(q, k, v, op)
        tiles = -(-320 // call.keys)
        factors = 4 * rescaled
        assert call.counters.exps == 128 * (tiles * call.keys + 4 * factors)


@pytest.mark.parametrize("op", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 160, 256, 512])
def test_no_bank_conflicts(rng, op, dim):
    """Longer keys add wavefronts, and none beyond the ideal."""
    more = []
    for k_rows in (64, 320):
        q, k, v = draw(rng, 1, 1, 1, 40, k_rows, dim, dim, DTYPES[op])
        counters = Counted(q, k, v, op).counters
        more.append((counters.shared_wavefronts, counters.shared_wavefronts_ideal))
    (few, few_ideal), (many, many_ideal) = more
    assert many - few == many_ideal - few_ideal > 0


def test_sectors_are_used_whole(rng):
    """K and V rows of 128 bytes: nothing of a sector is fetched in vain."""
    q, k, v = draw(rng, 1, 1, 1, 128, 256, 64, 64, np.float16)
    counters = Counted(q, k, v).counters
    assert 32 * counters.global_sectors_read == counters.global_bytes_read


def test_tensor_cores_do_the_products(rng):
    """m16n8k16: the padded tiles divided by what one instruction does, and nothing else."""
    q, k, v = draw(rng, 1, 1, 1, 128, 256, 64, 96, np.float16)
    call = Counted(q, k, v)
    tiles = -(-256 // call.keys)
    assert call.counters.mma == tiles * call.rows * call.keys * (64 + 96) // (16 * 8 * 16)


@pytest.mark.parametrize("value_dim", [64, 200])
def test_no_matrix_of_scores(rng, value_dim):
    """Nothing is allocated but the results."""
    q, k, v = draw(rng, 1, 2, 2, 200, 300, 64, value_dim, np.float64)
    call = Counted(q, k, v, "float64", return_lse=True)
    assert sorted(call.allocated) == sorted([(1, 2, 200, value_dim), (1, 2, 200)])


def test_a_mask_and_a_bias_are_read_where_they_are(rng):
    """Broadcast: one row of each, whatever the number of heads; read per score, never copied."""
    q, k, v = draw(rng, 2, 2, 2, 70, 90, 64, 64, np.float16)
    options = {"mask": rng.random((90,)) < 0.5, "bias": rng.standard_normal((1, 2, 1, 90))}
    options["bias"] = options["bias"].astype(np.float16)
    call = Counted(q, k, v, **options)
    assert call.allocated == [(2, 2, 70, 64)]
    visible = 2 * 2 * 70 * np.count_nonzero(options["mask"])
    rows_read = 4 * (70 + 2 * 90) * 64 * 2
    masks, biases = 4 * 70 * 90, 2 * visible
    assert call.counters.global_bytes_read == rows_read + masks + biases


def test_heads_that_share_keys_are_neighbours():
    """The grid takes as many heads at a time as L2 holds keys and values for."""
    sizes = {"batch": 1, "heads": 32, "kv_heads": 8, "q_rows": 8192, "head_dim": 128}
    for k_rows, heads_in_l2 in ((1024, 32), (16 * 1024, 16), (512 * 1024, 4)):
        problem = AttentionProblem("float16", "float16", **sizes, k_rows=k_rows, value_dim=128)
        assert plan.plan_attention(problem, 90).heads_in_l2 == heads_in_l2


FOUND = """
#include <attention/backward.cuh>
struct Params { AttentionParams attention; long long* found; };
__global__ void find(const Params params) {
  QueryBlock rows = {};
  KeyBlock keys = {};
  const bool are_rows = find_block(params.attention, 16, 1, blockIdx.x, rows);
  const bool are_keys = find_key_block(params.attention, 16, 1, blockIdx.x, keys);
  if (threadIdx.x > 0) return;
  const long long values[] = {are_rows, rows.batch, rows.first, are_keys, keys.batch, keys.first};
  for (int i = 0; i < 6; ++i) ptx::st_global(params.found + 6 * blockIdx.x + i, values[i]);
}
"""


@pytest.mark.parametrize("descending", [0, 1])
@pytest.mark.parametrize("batch", [1, 7, 32, 33])
def test_order_of_ragged_blocks(rng, batch, descending):
    """Where attention is causal, blocks of rows that see most keys come first, and so do blocks of
    keys that most rows see, if a lane of a warp has each sequence."""
    lengths = rng.integers(0, 200, batch) * (rng.random(batch) < 0.9)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    last = {b: -(-int(lengths[b]) // 16) - 1 for b in range(batch)}
    blocks = [(b, n) for b in range(batch) for n in range(last[b] + 1)]
    rows, keys, spare = blocks, blocks, [None] * batch
    if descending and batch <= 32:
        rows = sorted(blocks, key=lambda block: (-block[1], block[0]))
        keys = sorted(blocks, key=lambda block: (block[1] - last[block[0]], block[0]))
    elif descending:
        rows = [*spare, *reversed(blocks)]
    rows, keys = ((order + spare)[: len(blocks) + batch] for order in (rows, keys))
    sizes = {"batch": batch, "q_rows": starts[-1], "k_rows": starts[-1], "heads": 1, "sharing": 1}
    sizes |= {"row_blocks": len(rows), "heads_in_l2": 1, "descending": descending}
    tail = {name: (0,) * int(code[:-1] or 1) for name, code in ATTENTION_TAIL.codes.items()}
    tail = {name: value if len(value) > 1 else 0 for name, value in tail.items()}
    ends = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), emulator.address(starts))
    found = np.zeros((len(rows), 6), np.int64)
    params = ATTENTION_POINTERS.pack(**dict.fromkeys(ATTENTION_POINTERS.codes, 0) | ends)
    params += ATTENTION_TAIL.pack(**tail | sizes) + bytes(SCORE_ARRAYS.struct.size)
    params += np.int64(emulator.address(found)).tobytes()
    emulator.launch_source(FOUND, "find", len(rows), 32, params, reads=[starts], writes=[found])
    for order, got in ((rows, found[:, :3]), (keys, found[:, 3:])):
        assert [(b, first // 16) if exists else None for exists, b, first in got] == order
