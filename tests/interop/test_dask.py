"""cuattn.dask: what the functions of cuattn give of the whole arrays, however these are chunked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from cases import draw, ranking_stack, special_rows
from tolerance import FLOATS, NAIVE, TABLE, assert_close, exact

import cuattn
from cuattn import reference

dask = pytest.importorskip("dask")
da = pytest.importorskip("dask.array")

import cuattn.dask as cd  # noqa: E402


@pytest.fixture(autouse=True)
def threads():
    with dask.config.set(scheduler="threads", num_workers=2):
        yield


# ---- Arrays and chunks ----

CHUNKINGS = ["whole rows", "even", "single columns", "single rows", "uneven"]
any_chunking = pytest.mark.parametrize("chunking", CHUNKINGS)


def cut(rng, size, most=4):
    """Random chunks of an axis."""
    ends = rng.choice(np.arange(1, max(size, 2)), min(most, max(size - 1, 0)), replace=False)
    return tuple(np.diff([0, *np.sort(ends), size]).tolist())


def chunked(rng, x, chunking="uneven"):
    """x as a dask array."""
    *rows, columns = x.shape or (0,)
    chunks = {
        "whole rows": (*(max(n // 2, 1) for n in rows), max(columns, 1)),
        "even": tuple(max(-(-n // 4), 1) for n in x.shape),
        "single columns": (*(max(n, 1) for n in rows), 1),
        "single rows": (*(1 for n in rows), max(columns // 2, 1)),
        "uneven": tuple(cut(rng, n) for n in x.shape),
    }[chunking]
    return da.from_array(x, chunks=chunks[: x.ndim])


def rows_to_fail(rng, columns, dtype="float32"):
    """Rows with ties at any border of chunks, and all of `special_rows`."""
    ties = rng.integers(-3, 4, (4, columns)).astype(dtype) / 2
    x = np.stack([*ties, *(row for _, row in special_rows(rng, columns, dtype))])
    return x[rng.permutation(len(x))]


def any_width(rng):
    return [None, 2, 3, 64][rng.integers(4)]


def compute(lazy):
    """The results, of which dask has told shape, dtype and chunks."""
    many = lazy if isinstance(lazy, tuple) else (lazy,)
    blocks = [told.to_delayed().ravel()[-1] for told in many]
    results, last = dask.compute(many, blocks)
    for result, told, block in zip(results, many, last, strict=True):
        assert result.shape == told.shape and result.dtype == told.dtype == told._meta.dtype
        assert told._meta.ndim == told.ndim
        assert block.shape == tuple(sizes[-1] for sizes in told.chunks)
    return results if isinstance(lazy, tuple) else results[0]


def sizes_of(ref):
    """What a log-sum-exp is added up from: at least 1, the weight of the largest term."""
    return np.maximum(abs(np.where(np.isfinite(ref), ref, 0)), 1)


# ---- Softmax ----


@any_chunking
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_rows_in_chunks(rng, name, chunking):
    x = rows_to_fail(rng, 101)
    for axis, keep in [(-1, True), (1, False)]:
        d = chunked(rng, x, chunking)
        y = getattr(cd, name)(d, axis, keep=keep, split_every=any_width(rng))
        assert y.chunks == d.chunks
        ref, naive = getattr(reference, name)(exact(x), axis), NAIVE[name](x, axis)
        assert_close(compute(y), ref, naive, probabilities=name == "softmax")


@any_chunking
def test_any_axes(rng, chunking):
    x = draw(rng, (4, 5, 12))
    for axis in (0, None, (0, 2), (1, -1), ()):
        keep, width = bool(rng.random() < 0.5), any_width(rng)
        d = chunked(rng, x, chunking)
        y, lse = compute(cd.softmax(d, axis, return_lse=True, keep=keep, split_every=width))
        assert_close(y, reference.softmax(exact(x), axis), NAIVE["softmax"](x, axis))
        ref, naive = reference.logsumexp(exact(x), axis), NAIVE["logsumexp"](x, axis)
        for got in (lse, compute(cd.logsumexp(d, axis, split_every=width))):
            assert_close(got, ref, naive, terms=sizes_of(ref))


@any_chunking
def test_log_sum_exp(rng, chunking):
    x = rows_to_fail(rng, 64)
    d, where = chunked(rng, x, chunking), rng.random(x.shape) < 0.7
    for options in ({}, {"where": where}, {"keepdims": True, "dtype": np.float64}):
        lse = compute(cd.logsumexp(d, -1, split_every=any_width(rng), **options))
        ref = reference.logsumexp(exact(x), -1, **options)
        assert_close(lse, ref, NAIVE["logsumexp"](x, -1, **options), terms=sizes_of(ref))


def test_a_log_sum_exp_near_0_keeps_its_digits():
    x = np.array([0.0, -40, -41, -42])
    lse = cd.logsumexp(da.from_array(x, chunks=1)).compute()
    np.testing.assert_allclose(lse, cuattn.logsumexp(x), rtol=1e-14)


@any_chunking
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_scale_and_where(rng, name, chunking):
    """Numbers, arrays of NumPy, and of dask in blocks of their own; scales below 0, and 0."""
    x = rows_to_fail(rng, 50)
    factors = rng.choice([-2.0, 0, 0.3, 1], (len(x), 1)).astype(np.float32)
    mask = rng.random(x.shape) < 0.6
    mask[rng.integers(len(x))] = False
    column = rng.random((len(x), 1)) < 0.5
    for scale, where in [(None, mask), (-0.5, mask[0]), (factors, column), (factors, None),
                         (2.0, False)]:  # fmt: skip
        options = {"scale": scale, "where": where}
        given = {
            key: chunked(rng, value) if isinstance(value, np.ndarray) and rng.random() < 0.5
            else value for key, value in options.items()
        }  # fmt: skip
        given["keep"] = bool(rng.random() < 0.5)
        y = compute(getattr(cd, name)(chunked(rng, x, chunking), **given))
        ref, naive = getattr(reference, name)(exact(x), **options), NAIVE[name](x, **options)
        assert_close(y, ref, naive)
    _, lse = compute(cd.softmax(chunked(rng, x, chunking), return_lse=True, **given))
    assert np.isneginf(lse).all() and not y[np.isfinite(y)].any()


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8", "int64"])
def test_dtypes(rng, dtype):
    x = draw(rng, (6, 40), dtype)
    for asked in (None, "float16", "float32", "float64"):
        for name in ("softmax", "log_softmax", "logsumexp"):
            got = compute(getattr(cd, name)(chunked(rng, x), -1, dtype=asked))
            want = getattr(cuattn, name)(x, -1, dtype=asked)
            assert got.dtype == want.dtype
            ref = getattr(reference, name)(exact(x), -1)
            assert_close(got, ref, NAIVE[name](x, -1, dtype=want.dtype))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (0, 3), (2, 0, 3)])
def test_small_and_empty_arrays(shape):
    x = np.ones(shape, np.float32)
    d = da.from_array(x, chunks=1)
    for axis in (None, *range(len(shape))):
        for name in ("softmax", "log_softmax", "logsumexp"):
            got = compute(getattr(cd, name)(d, axis))
            np.testing.assert_array_equal(got, getattr(cuattn, name)(x, axis))
        lse = compute(cd.softmax(d, axis, return_lse=True))[1]
        np.testing.assert_array_equal(lse, cuattn.logsumexp(x, axis))
        for k in {0, min(x.size if axis is None else x.shape[axis], 1)}:
            for function in (cd.top_k, cd.softmax_topk):
                got = compute(tuple(function(d, k, axis=axis)))
                want = getattr(cuattn, function.__name__)(x, k, axis=axis)
                for one, other in zip(got, want, strict=True):
                    np.testing.assert_array_equal(one, other)


# ---- Selection ----


@any_chunking
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_the_k_best_are_exactly_those(rng, chunking, dtype):
    n = int(rng.integers(20, 60))
    k = int(rng.choice([0, 1, 5, n - 1, n]))
    x = ranking_stack(rng, n, k, dtype, special=np.dtype(dtype).kind == "f")
    for axis, mode in itertools.product((-1, 0, None), ("largest", "smallest")):
        count = min(k, len(x)) if axis == 0 else k
        d, width = chunked(rng, x, chunking), any_width(rng)
        lazy = cd.top_k(d, count, axis=axis, mode=mode, split_every=width)
        assert isinstance(lazy, cuattn.TopK)
        values, indices = compute(tuple(lazy))
        row = x.reshape(-1) if axis is None else x
        want = reference.top_k(row, count, axis=0 if axis is None else axis, mode=mode)
        np.testing.assert_array_equal(indices, want.indices)
        np.testing.assert_array_equal(values, want.values)


@any_chunking
@pytest.mark.parametrize("output", ["prob", "log_prob", "logit"])
def test_softmax_of_the_k_best(rng, chunking, output):
    n = int(rng.integers(20, 50))
    k = int(rng.choice([1, 5, n - 1, n]))
    x = np.concatenate([rows_to_fail(rng, n), ranking_stack(rng, n, k)])
    where = rng.random(x.shape) < 0.7
    where[rng.integers(len(x), size=3)] = False
    for part, scale, renormalize, axis in [
        (None, None, False, -1),
        (None, 0.5, True, None),
        (where, None, False, -1),
        (where, -0.5, True, -1),
        (where[0], 0.0, False, None),
    ]:
        options = {"scale": scale, "where": part, "axis": axis}
        how = {"renormalize": renormalize, "output": output, "return_lse": True}
        d, width = chunked(rng, x, chunking), any_width(rng)
        lazy = cd.softmax_topk(d, k, **options, **how, split_every=width)
        assert isinstance(lazy, cuattn.SoftmaxTopKLse)
        values, indices, lse = compute(tuple(lazy))
        want = cuattn.softmax_topk(x, k, **options, **how)
        np.testing.assert_array_equal(indices, want.indices)
        np.testing.assert_allclose(values, want.values, rtol=5e-6, atol=5e-7)
        np.testing.assert_allclose(lse, want.lse, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtypes_of_the_k_best(rng, dtype):
    x = draw(rng, (4, 30), dtype)
    values, indices = compute(tuple(cd.softmax_topk(chunked(rng, x), 7)))
    want = cuattn.softmax_topk(x, 7)
    np.testing.assert_array_equal(indices, want.indices)
    assert values.dtype == x.dtype
    rounding = 16 * TABLE[dtype].relative
    np.testing.assert_allclose(exact(values), exact(want.values), rtol=rounding, atol=1e-9)
