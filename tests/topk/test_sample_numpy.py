"""sample of NumPy arrays: noise of few elements or of all, rows cut into segments, lists that are
too short, memory and company. Draws must be those of `cuattn.reference`, whichever way is taken."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from cases import INF, NAN, draw
from conftest import rows_alone
from sample_cases import clear_rows
from tolerance import FLOATS

import cuattn
from cuattn import reference
from cuattn._arrays import blocks
from cuattn._topk import numpy_draws as draws
from cuattn._topk import numpy_large as large
from cuattn._topk import numpy_ranking as ranking
from cuattn._topk import numpy_sample as sampling

FILTERS = [{}, {"top_k": 40}, {"top_p": 0.8}, {"min_p": 0.05}, {"top_k": 90, "top_p": 0.9}]


def check(x, num, axis=-1, **options):
    got, want = (f.sample(x, num, axis=axis, seed=11, **options) for f in (cuattn, reference))
    np.testing.assert_array_equal(got, want)


def hard_rows(rng, rows, n, dtype, **filters):
    """Rows that are cut clearly, most of their elements hidden, tied, or no numbers."""
    x = clear_rows(rng, (rows, n), dtype, **filters)
    x[1, rng.random(n) < 0.95] = -INF
    x[2], x[2, rng.integers(n)] = 1, 2
    x[3, rng.integers(n)], x[4, rng.integers(n)] = NAN, INF
    x[5], x[5, rng.integers(n)] = -INF, 3
    return x


@pytest.fixture(params=["whole", "segments", "segments of few"])
def block_size(request, monkeypatch):
    """Blocks of 64 elements or 1000, so that rows are cut, and merged a few at a time."""
    if request.param != "whole":
        monkeypatch.setattr(ranking, "MOST", 4 * (64 if request.param == "segments" else 1000))
        monkeypatch.setattr(ranking, "WHOLE", 128)
        monkeypatch.setattr(ranking, "MERGED", 200)


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("num", [1, 5, 63, 300, 1300])
def test_blocks(rng, block_size, dtype, num):
    x = hard_rows(rng, 7, 1200, dtype)
    check(x, num)
    check(np.asfortranarray(x), num)
    check(np.ascontiguousarray(x.T), num, axis=0, scale=0.5)
    check(x, num, where=rng.random(1200) < 0.7)


@pytest.mark.parametrize("filters", FILTERS[1:])
def test_blocks_of_filters(rng, block_size, monkeypatch, filters):
    """Also where a short list lacks mass more than once."""
    monkeypatch.setattr(sampling, "LIST", int(rng.choice([1, 7, 256])))
    monkeypatch.setattr(sampling, "MORE", 3)
    cut = {name: value for name, value in filters.items()}
    x = hard_rows(rng, 7, 1200, "float32", **cut)
    for num in (1, 20, 300):
        check(x, num, **filters)
        check(np.ascontiguousarray(x.T), num, axis=0, **filters)
        check(x.reshape(7, 1, 1200), num, **filters)


@pytest.mark.parametrize("few", [0, 1, 10**9])
def test_noise_of_few_or_all(rng, monkeypatch, few):
    monkeypatch.setattr(draws, "FEW", few)
    for num in (1, 9, 100):
        check(hard_rows(rng, 30, 500, "float32"), num)


@pytest.mark.parametrize(("n", "num"), [(11, 11), (1000, 300), (1000, 1100)])
def test_large_num(rng, monkeypatch, n, num):
    monkeypatch.setattr(large, "LEAST", 10)
    monkeypatch.setattr(large, "MOST", 97)
    x = hard_rows(rng, 7, n, "float32")
    check(x, num)
    check(x, num, top_k=n // 2)
    state = cuattn.sample_state(x, num, seed=1, index_offset=2**33)
    for got, want in zip(
        state, reference.sample_state(x, num, seed=1, index_offset=2**33), strict=True
    ):
        np.testing.assert_allclose(got, want, 1e-5)


# ---- company -----------------------------------------------------------------------------------


@rows_alone
@pytest.mark.parametrize("filters", FILTERS)
def test_threads_do_not_show(rng, monkeypatch, filters):
    """Nor do the blocks that the number of threads decides."""
    for shape, axis, num in [((300, 400), 1, 5), ((400, 300), 0, 5), ((2, 300_000), 1, 70)]:
        x, found = draw(rng, shape), []
        x.reshape(-1)[rng.integers(x.size, size=2)] = NAN
        for threads in (1, 2, 64):
            for module in (blocks, ranking):
                monkeypatch.setattr(module, "thread_limit", lambda threads=threads: threads)
            how = {"axis": axis, "return_log_prob": True, **filters}
            made = cuattn.sample(x, num, seed=3, **how)
            found.append([part.tobytes() for part in made])
        assert found[0] == found[1] == found[2]


# ---- memory ------------------------------------------------------------------------------------

BEYOND = 64 << 20  # bytes, beside the result


@pytest.mark.drawn
@pytest.mark.parametrize(
    "shape, axis, num", [((16_000_000,), 0, 50), ((4000, 1000), 0, 5), ((500_000, 8), 0, 3)]
)
@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"min_p": 0.5}])
def test_memory(rng, shape, axis, num, filters):
    x = np.ones(shape, np.float32)
    tracemalloc.start()
    try:
        made = cuattn.sample(x, num, seed=1, axis=axis, where=True, **filters)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= made.nbytes + BEYOND
