"""What attention_backward moves and computes, counted on the emulator: exact formulas."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from attention_backward_cases import storing
from conftest import SEED
from test_attention_traffic import DTYPES, draw, ranges_of_blocks

import cuattn

pytestmark = pytest.mark.drawn


class Counted:
    """One call: its counters by the end of the kernels' names, and what is allocated."""

    def __init__(self, rng, op, q_rows, k_rows, dims, heads=(1, 1), arch="sm_80", **options):
        options |= {"precision": "tf32"} if op == "tf32" else {}
        q, k, v = draw(rng, 1, *heads, q_rows, k_rows, *dims, DTYPES[op])
        grad = rng.standard_normal((*q.shape[:3], dims[1])).astype(q.dtype)
        lse = np.full(q.shape[:3], 9, np.float64 if op == "float64" else np.float32)
        with emulator.activate(arch=arch, seed=int(os.environ[SEED])) as runtime:
            self.allocated, empty = [], runtime.empty
            runtime.empty = lambda shape, dtype: self.allocated.append(shape) or empty(shape, dtype)
            self.result = cuattn.attention_backward(grad, q, k, v, grad, lse, **options)
        self.item, self.stats = q.itemsize, 2 * lse.itemsize
        names = [kernel.template.split("_")[2] for kernel in runtime.kernels]
        self.kernels = dict(zip(names, runtime.kernels, strict=True))
        self.counters = dict(zip(names, runtime.counters, strict=True))  # of dk or dv the last

    def block(self, name):
        """Rows of a block of "q" or "kv"."""
        tile = self.kernels[name].arguments
        return 16 * tile["kWarps"] * tile["kMTiles"]


@pytest.mark.parametrize("op", ["float16", "float32"])
@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (100, 0), (70, 90)], ids=str)
def test_every_byte(rng, op, left, right):
    """Each block reads its rows once, and once the others that see them or that they see."""
    q_rows, k_rows = 2 * int(rng.integers(150, 200)), 2 * int(rng.integers(200, 250))
    call = Counted(rng, op, q_rows, k_rows, (64, 64), window=(left, right))
    pair = 2 * 64 * call.item  # of Q and dO, of K and V, of y and dO
    of_rows = q_rows * (pair + 8 * call.stats // 2)  # lse by each of the eight lanes of a row
    ranges = list(ranges_of_blocks(q_rows, k_rows, call.block("q"), left, right))
    of_q = q_rows * (pair + 4 * call.stats) + sum(end - begin for begin, end in ranges) * pair
    # Seen from keys: query i sees key j where j sees i, of a window turned round.
    back = list(ranges_of_blocks(k_rows, q_rows, call.block("kv"), right, left))
    queries = sum(end - begin for begin, end in back)
    rows = call.block("kv")
    keys = sum(min(rows, k_rows - rows * i) for i, (begin, end) in enumerate(back) if end > begin)
    read = {name: counters.global_bytes_read for name, counters in call.counters.items()}
    assert read["rows"] == of_rows and read["q"] == of_q
    # Statistics come in pairs of queries, from the even one.
    least = keys * pair + queries * (pair + call.stats)
    assert least <= read["kv"] <= least + 2 * len(back) * call.stats
    written = {name: counters.global_bytes_written for name, counters in call.counters.items()}
    results = call.result.dq.nbytes, call.result.dk.nbytes + call.result.dv.nbytes
    assert written == {"rows": q_rows * call.stats, "q": results[0], "kv": results[1]}


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_products_and_exponentials(rng, heads):
    """Seven products of each score, one exponential in each of two kernels, and nothing else."""
    call = Counted(rng, "float16", 256, 384, (64, 96), heads)
    scores = heads[0] * 256 * 384
    products = {"rows": 0, "q": 2 * 64 + 96, "kv": 2 * (64 + 96)}
    for name, columns in products.items():
        assert call.counters[name].mma == scores * columns // (16 * 8 * 16)
        assert call.counters[name].exps == (scores if columns else 0)
    blocks = {name: kernel.grid for name, kernel in call.kernels.items()}
    tiles = {name: scores // call.block(name) // blocks[name] for name in ("q", "kv")}
    loops = {"q": "kKeys", "kv": "kQueries"}
    for name, rows in tiles.items():  # one of each tile, and one before the results
        steps = rows // call.kernels[name].arguments[loops[name]]
        assert call.counters[name].barriers == blocks[name] * (steps + 1)


@pytest.mark.parametrize("op", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 256])
def test_no_bank_conflicts(rng, op, dim):
    """More of what is looped over adds wavefronts, and none beyond the ideal."""
    for name, sizes in (("q", ((32, 64), (32, 128))), ("kv", ((64, 32), (128, 32)))):
        calls = [Counted(rng, op, *size, (dim, dim)).counters[name] for size in sizes]
        many, few = ((c.shared_wavefronts, c.shared_wavefronts_ideal) for c in reversed(calls))
        assert many[0] - few[0] == many[1] - few[1] > 0, name


def test_no_matrix_of_scores(rng):
    """Nothing is allocated but the results and two numbers of each query, three with slopes."""
    for slopes, count in ((None, 2), (np.ones(2, np.float32), 3)):
        call = Counted(rng, "float32", 201, 300, (64, 32), (2, 1), alibi_slopes=slopes)
        small = [] if slopes is None else [(2,)]
        results = [(1, 2, 201, 64), (1, 1, 300, 64), (1, 1, 300, 32), *small]
        assert call.allocated == [*results, (count * 2 * 202,)]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_hopper(rng, dim):
    """Seven products, one exponential of a score in each of two kernels, tiles by TMA only."""
    call = Counted(rng, "float16", 384, 768, (dim, dim), (2, 1), "sm_90a")
    scores = 2 * 384 * 768
    for name, products in (("q", 3), ("kv", 4)) if dim <= 128 else (("q", 3),):
        kernel, counters = call.kernels[name], call.counters[name]
        assert kernel.template == f"attention_backward_{name}_sm90"
        tile = kernel.arguments
        rows = tile["kKeys" if name == "q" else "kQueries"]
        tiles = scores // (128 * rows)
        assert counters.exps == scores
        of_k, of_rows = dim // 16, rows // 16  # steps of 16 of the contraction
        steps = 2 * of_k + (products - 2) * of_rows
        assert counters.wgmma == tiles * 2 * 4 * steps
        blocks = kernel.grid
        assert counters.bulk_bytes == 2 * dim * 2 * (128 * blocks + rows * tiles)
    if dim > 128:
        return
    more = []
    for n in (384, 768):
        longer = Counted(rng, "float16", n, 384, (dim, dim), arch="sm_90a").counters["kv"]
        more.append(longer.shared_wavefronts - longer.shared_wavefronts_ideal)
    assert more[1] - more[0] == 0  # of the statistics, the only ones that threads read


@pytest.mark.parametrize(("left", "right"), [(None, None), (None, 0), (100, 0), (70, 90)], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_hopper_with_stored_gradients_of_scores(rng, dim, left, right):
    """Five products: dS is written once, in tiles of queries that see a key of a block, and those
    images of it are read once that hold a score which is seen."""
    q_rows, k_rows = int(rng.integers(260, 380)), int(rng.integers(390, 630))
    with storing():
        args = (rng, "float16", q_rows, k_rows, (dim, dim), (4, 2), "sm_90a")
        call = Counted(*args, window=(left, right))
    assert [*call.kernels] == ["rows", "kv", "ds"]
    kv, ds = (call.counters[name] for name in ("kv", "ds"))
    rows = call.kernels["kv"].arguments["kQueries"]
    back = list(ranges_of_blocks(k_rows, q_rows, 128, right, left))
    tiles = sum(-(-end // rows) - begin // rows for begin, end in back if end > begin)
    heads, seen = 4, sum(end > begin for begin, end in back)
    assert kv.exps == heads * tiles * 128 * rows
    assert kv.wgmma == heads * tiles * 2 * 4 * (2 * dim // 16 + 2 * rows // 16)
    results = call.result.dk.nbytes + call.result.dv.nbytes
    assert kv.global_bytes_written == results + heads * tiles * 128 * rows * 2
    assert kv.bulk_bytes == 2 * dim * 2 * (heads * tiles * rows + 2 * seen * 128)

    ranges = list(ranges_of_blocks(q_rows, k_rows, 64, left, right))
    images = sum(-(-end // 64) - begin // 64 for begin, end in ranges if end > begin)
    blocks = list(ranges_of_blocks(q_rows, k_rows, 256, left, right))
    loads = sum(-(-end // 64) - begin // 64 for begin, end in blocks if end > begin)
    assert ds.exps == ds.mma == 0 and ds.wgmma == heads * images * 4 * 4
    assert ds.bulk_bytes == heads * (images * 64 * 64 * 2 + loads * 64 * dim * 2)
    assert ds.global_bytes_written == call.result.dq.nbytes
    assert ds.shared_wavefronts == ds.shared_wavefronts_ideal > 0  # of the result's way out


def test_workspace_of_gradients_of_scores(rng):
    """Two bytes of each score of the heads of a round, in blocks of 128 x 128, and no more."""
    results = [(1, 6, 200, 64), (1, 3, 300, 64), (1, 3, 300, 64)]
    for heads, most in ((6, None), (4, 4 * 4 * 6 * 8192), (2, 4 * 4 * 6 * 8192 - 1)):
        with storing(most):
            call = Counted(rng, "float16", 200, 300, (64, 64), (6, 3), "sm_90a")
        assert call.allocated == [*results, (2 * 6 * 200,), (heads * 4 * 6 * 64, 64)]
    with storing(2 * 4 * 6 * 8192 - 1):  # not even a head of K
        call = Counted(rng, "float16", 200, 300, (64, 64), (6, 3), "sm_90a")
    assert [*call.kernels] == ["rows", "q", "kv"] and len(call.allocated) == 4


def test_gradients_of_arrays_of_a_score(rng):
    """Two more products and an exponential of each score; the sums of each diagonal of tiles are
    written once, or one sum of all, and then the elements."""
    arrays = {"t": np.ones((4, 40), np.float32), "a": np.ones((), np.float16)}
    call = Counted(
        rng,
        "float16",
        256,
        384,
        (64, 96),
        (4, 2),
        score="s * a + t[h, q - k]",
        score_args=arrays,
        return_dscore=("t",),
        window=(None, 0),
    )
    tile, heads = call.kernels["score"].arguments, 4
    rows, keys = 16 * tile["kWarps"], tile["kKeys"]
    diagonals = (256 + 384 - 2) // rows + 2
    score, elements = call.counters["score"], call.counters["elements"]
    assert call.kernels["score"].grid == heads * diagonals
    assert score.global_bytes_written == heads * diagonals * 2 * rows * 4
    ranges = ranges_of_blocks(256, 384, rows, None, 0)  # tiles of keys begin by the last key
    tiles = sum((end - 384) // keys - (begin - 383) // keys + 1 for begin, end in ranges)
    assert score.mma == heads * tiles * rows * keys * (64 + 96) // (16 * 8 * 16)
    assert elements.global_bytes_written == 4 * 40 * 4
    assert elements.mma == elements.exps == 0
    assert call.allocated[-1] == (heads * diagonals * 2 * rows,)
    call = Counted(
        rng,
        "float16",
        100,
        200,
        (64, 64),
        score="s * a",
        score_args={"a": arrays["a"]},
        return_dscore=True,
    )
    diagonals = (100 + 200 - 2) // rows + 2
    assert call.counters["score"].global_bytes_written == diagonals * 4
    assert call.counters["elements"].global_bytes_written == 2
    assert call.allocated[-1] == (diagonals,)
