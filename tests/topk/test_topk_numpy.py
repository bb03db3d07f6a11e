"""Selections of NumPy arrays: every way of the plan, rows cut into segments, memory, company.

Ranking and values of any way must be those of `cuattn.reference`, bit for bit.
"""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from cases import INF, NAN, draw, nans, ranking_stack
from conftest import rows_alone
from tolerance import FLOATS, dtype_of

import cuattn
from cuattn import reference
from cuattn._arrays import blocks
from cuattn._topk import numpy_large as large
from cuattn._topk import numpy_ranking as ranking
from cuattn._topk import numpy_selection as selection
from cuattn._topk import numpy_topk as topk

DTYPES = ("float16", "bfloat16", "float32", "float64", "int8", "uint16", "int32", "uint64")
MODES = ("largest", "smallest")

# (rows, n, k, bytes) for each way, in the order of the plan.
CALLS = [
    [(3, 700, 1, 2), (1, 1, 1, 8)],
    [(3, 12, 5, 4), (1, 250, 30, 8), (7, 33, 33, 1)],
    [(5, 2000, 3, 4), (3, 5003, 60, 8), (1, 40_001, 8, 4)],
    [(5, 2000, 3, 2), (3, 5003, 60, 1), (1, 40_001, 8, 2)],
    [(5, 300, 40, 4), (9, 1025, 200, 8)],
    [(40, 128, 8, 8)],
    [(30, 12, 5, 4), (4, 300, 299, 8), (4, 1000, 200, 2), (40, 128, 8, 4)],
]


def check(x, k, mode="largest", axis=-1):
    got, want = (f.top_k(x, k, axis=axis, mode=mode) for f in (cuattn, reference))
    np.testing.assert_array_equal(got.indices, want.indices)
    assert got.values.dtype == x.dtype
    assert got.values.tobytes() == want.values.tobytes()


def hard_rows(rng, rows, n, k, dtype):
    """Rows that each way has to look at twice, among ordinary ones."""
    x = draw(rng, (rows, n), dtype)
    x[0, rng.integers(n, size=2 + n // 3)] = x[0].max()  # ties in every chunk
    if rows > 2:
        x[1] = 1  # nothing but ties
        x[2] = np.sort(x[2])
    if dtype_of(dtype).kind not in "iu":
        x[-1, rng.integers(n, size=1 + n // 50)] = nans(rng, 1 + n // 50, dtype)
        if rows > 3:
            x[3] = nans(rng, n, dtype)
            x[3, rng.integers(n, size=k)] = -INF
    return x


def test_the_plan_is_reached():
    for calls, way in zip(CALLS, selection.WAYS, strict=True):
        assert {selection.way_of(*call) for call in calls} == {way}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("calls", CALLS)
def test_every_way(rng, calls, dtype):
    for rows, n, k, _ in calls:
        for mode in MODES:
            check(hard_rows(rng, rows, n, k, dtype), k, mode)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("way", sorted({w.way for w in selection.WAYS[1:]}, key=str))
def test_every_way_of_one_call(rng, monkeypatch, way, dtype):
    """As if any other way were planned: the plan decides nothing but time."""
    planned = selection.WAYS[0]._replace(way=way, most_k=INF)
    monkeypatch.setattr(selection, "WAYS", [planned])
    for n, k in ((700, 20), (513, 1), (129, 31)):
        check(ranking_stack(rng, n, k, dtype), k, rng.choice(MODES))


@pytest.fixture
def short_blocks(monkeypatch):
    """Blocks of 64 elements, so that rows are cut into segments, merged a few at a time."""
    monkeypatch.setattr(ranking, "MOST", 64)
    monkeypatch.setattr(ranking, "WHOLE", 128)
    monkeypatch.setattr(topk, "PIECE", 30)
    monkeypatch.setattr(ranking, "MERGED", 200)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 5, 63, 64, 65, 300, 1000])
def test_segments(rng, short_blocks, dtype, k):
    """Ties and NaN on both sides of a border, k beyond a segment and beyond what is merged."""
    for mode in MODES:
        x = hard_rows(rng, 5, 1000, k, dtype)
        check(x, k, mode)
        check(np.asfortranarray(x), k, mode)
        check(np.ascontiguousarray(x.T), k, mode, axis=0)


@pytest.mark.parametrize("k", [1, 40, 300])
def test_segments_of_scores(rng, short_blocks, k):
    """With everything that an element may bring along, from rows in any place."""
    x = hard_rows(rng, 5, 700, k, "float32")[:, None]
    where, scale = rng.random(x.shape) < 0.8, np.float32([[[2.5]], [[-1]], [[0]], [[1]], [[1e30]]])
    for axis in (2, 0):
        moved = [np.moveaxis(a, 2, axis) for a in (x, where, scale)]
        for array in (moved[0], moved[0].copy()):
            for output, own in itertools.product(("prob", "log_prob", "logit"), (False, True)):
                options = {"axis": axis, "where": moved[1], "scale": moved[2]}
                options |= {"output": output, "renormalize": own}
                got, want = (f.softmax_topk(array, k, **options) for f in (cuattn, reference))
                np.testing.assert_array_equal(got.indices, want.indices)
                with np.errstate(over="ignore"):
                    values = want.values.astype(np.float32)
                np.testing.assert_allclose(got.values, values, rtol=2e-5, atol=1e-37)


@pytest.fixture
def large_from_10(monkeypatch):
    monkeypatch.setattr(large, "LEAST", 10)
    monkeypatch.setattr(large, "MOST", 97)
    monkeypatch.setattr(topk, "PIECE", 50)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(11, 11), (500, 499), (1000, 300), (1000, 1000)])
def test_large_k(rng, large_from_10, dtype, n, k):
    x = hard_rows(rng, 6, n, k, dtype)
    if dtype == "float64":  # long runs that differ in their lower halves alone, and short ones
        x[4] = 1 + rng.integers(0, 50, n) * 2.0**-52
        x[4, ::3] += rng.integers(0, 99, len(x[4, ::3]))
    if dtype == "uint64":
        x[4] = rng.integers(0, 2**33, n)
        x[5] = rng.integers(2**64 - 500, 2**64, n, np.uint64)
    for mode in MODES:
        check(x, k, mode)
    check(np.asfortranarray(x).T[::-1], k, axis=0)


@pytest.mark.parametrize("size", [96, 97, 98, 193, 194, 195])
def test_runs_of_equal_upper_halves(rng, large_from_10, size):
    """One ends with a block of 97, or beside its end; and with the row."""
    run = 1 + rng.permutation(size) * 2.0**-52
    for rest in (-rng.random(300), np.zeros(0)):
        x = np.concatenate([rest, run])
        for mode in MODES:
            check(x, len(x), mode)


@pytest.mark.parametrize("output", ["logit", "prob", "log_prob"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_scores_of_large_k(rng, large_from_10, output, renormalize):
    """Bit by bit as in one piece."""
    x = draw(rng, (3, 700), "float32")
    where = rng.random(x.shape) < 0.9
    options = {"scale": 3.0, "where": where, "output": output, "renormalize": renormalize}
    got = cuattn.softmax_topk(x, 400, **options, return_lse=True)
    large.LEAST = 1 << 19
    want = cuattn.softmax_topk(x, 400, **options, return_lse=True)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_digits_of_a_sum_near_one(rng):
    """Whatever the maximum is, and however few of the row are selected."""
    rest = rng.uniform(-18, -16, (4, 300)).astype(np.float32)
    top = np.float32([[0], [100], [-7], [1000]])
    x = np.concatenate([top + rest, top], -1)
    want = -np.log1p(np.exp(x[:, :-1].astype(np.float64) - top).sum(-1))
    for k in (1, 301):
        for renormalize in (False, k > 1):
            options = {"output": "log_prob", "renormalize": renormalize}
            got = cuattn.softmax_topk(x, k, **options).values[:, 0]
            np.testing.assert_allclose(got, want, rtol=1e-4)


# ---- company -----------------------------------------------------------------------------------


def bits_of(x, axis, k):
    found = []
    for options in ({"output": "prob"}, {"output": "log_prob"}, {"renormalize": True}):
        found += cuattn.softmax_topk(x, k, axis=axis, scale=0.7, return_lse=True, **options)[::2]
    state = cuattn.softmax_topk_state(x, k, axis=axis)
    return [np.moveaxis(a, axis, -1) if a.ndim == 2 else a[:, None] for a in found], state


@rows_alone
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, k", [(8, 2), (128, 8), (3000, 40), (40_000, 900)])
def test_a_row_alone(rng, dtype, n, k):
    """Has the bits that it has among others, along either axis, and among more than a block."""
    x = draw(rng, (max(7, 40_000 // n), n), dtype)
    for axis, array in ((1, x), (0, np.ascontiguousarray(x.T))):
        found, state = bits_of(array, axis, k)
        for i in (0, 3, 6):
            own = array[i : i + 1] if axis == 1 else array[:, i : i + 1]
            alone, alone_state = bits_of(own, axis, k)
            for one, all_ in zip(alone, found, strict=True):
                assert one.tobytes() == all_[i : i + 1].tobytes()
            for one, all_ in zip(alone_state, state, strict=True):
                assert one.tobytes() == all_[i : i + 1].tobytes()


def test_threads_do_not_show(rng, monkeypatch):
    """Nor do the blocks that the number of threads decides."""
    calls = [((3000, 400), 1, 5), ((400, 3000), 0, 5), ((2, 600_000), 1, 70), ((600_000, 2), 0, 7)]
    for shape, axis, k in calls:
        x = np.round(8 * draw(rng, shape)) / 8
        x.reshape(-1)[rng.integers(x.size, size=2)] = NAN
        found = []
        for threads in (1, 2, 64):
            for module in (blocks, ranking):
                monkeypatch.setattr(module, "thread_limit", lambda threads=threads: threads)
            made = (*cuattn.top_k(x, k, axis=axis), *bits_of(x, axis, k)[1])
            found.append([part.tobytes() for part in made])
        assert found[0] == found[1] == found[2]


# ---- memory ------------------------------------------------------------------------------------

BEYOND = 64 << 20  # bytes, beside the result


@pytest.mark.drawn
@pytest.mark.parametrize(
    "shape, axis, k",
    [((16_000_000,), 0, 50), ((2, 8_000_000), 1, 100_000), ((16_000, 1000), 0, 5)]
    + [((125_000, 128), 1, 8), ((2_000_000, 8), 0, 3), ((16_000_000,), 0, 500_000)]
    + [((6_000_000,), 0, 3_000_000)],
)
def test_memory(rng, shape, axis, k):
    """The worst that a block may need, times the threads that there are: ties, NaN, a mask."""
    x = np.ones(shape, np.float32)
    x.reshape(-1)[:: 1 + x.size // 1000] = NAN
    where = np.broadcast_to(True, shape)
    options = {"axis": axis, "where": where, "scale": 2.0, "return_lse": True}
    for call in (
        lambda: cuattn.top_k(x, k, axis=axis),
        lambda: cuattn.softmax_topk(x, k, **options),
    ):
        tracemalloc.start()
        try:
            made = call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= sum(part.nbytes for part in made) + BEYOND
