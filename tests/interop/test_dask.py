"""cuattn.dask: what the functions of cuattn give of the whole arrays, however these are chunked."""

from __future__ import annotations

import os
import threading

import attention_cases
import numpy as np
import pytest
from attention_cases import Problem, any_options
from cases import draw, ranking_stack, special_rows
from conftest import GPU
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


def cut(rng, size, most):
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
        "uneven": tuple(cut(rng, n, 5 - x.ndim) for n in x.shape),
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
    x = draw(rng, (3, 4, 9))
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


def test_many_states_at_once_keep_their_digits():
    """Terms below a rounding of the first: added to it one by one, none of them would count."""
    x = np.float32([0, *[-24.2 * np.log(2)] * 63])
    y = compute(cd.softmax(da.from_array(x, chunks=1), split_every=64))
    assert_close(y, reference.softmax(exact(x)), NAIVE["softmax"](x), probabilities=True)


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
        h, labels = compute(cd.entropy(d, axis)), labels_of(np.random.default_rng(0), x, axis)[0]
        np.testing.assert_allclose(h, cuattn.entropy(x, axis), rtol=1e-6)
        loss, lse = cd.cross_entropy(d, labels, axis=axis, return_lse=True)
        want = cuattn.cross_entropy(x, labels, axis=axis)
        np.testing.assert_allclose(compute(loss), want, rtol=1e-6)
        dx = cd.cross_entropy_backward(1.0, d, labels, lse, axis=axis)
        assert compute(dx).shape == shape
        lse = compute(cd.softmax(d, axis, return_lse=True))[1]
        np.testing.assert_array_equal(lse, cuattn.logsumexp(x, axis))
        for k in {0, min(x.size if axis is None else x.shape[axis], 1)}:
            for function in (cd.top_k, cd.softmax_topk):
                got = compute(tuple(function(d, k, axis=axis)))
                want = getattr(cuattn, function.__name__)(x, k, axis=axis)
                for one, other in zip(got, want, strict=True):
                    np.testing.assert_array_equal(one, other)


# ---- Losses and entropies ----


def labels_of(rng, x, axis):
    """Of every row one, of dask or not; one of four ignored."""
    shape = () if axis is None else np.delete(x.shape, axis)
    n = x.size if axis is None else x.shape[axis]
    labels = rng.integers(max(n, 1), size=shape) if n else np.full(shape, -100)
    labels = np.where(rng.random(shape) < 0.25, -100, labels)
    return labels, labels if rng.random() < 0.5 else chunked(rng, labels)


@pytest.mark.drawn
@any_chunking
@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "int32"])
def test_losses(rng, chunking, dtype):
    """Also rows that are not finite, and rows that are blocks of a whole array."""
    x = rows_to_fail(rng, 50, dtype) if dtype == "float32" else draw(rng, (4, 5, 9), dtype)
    rounding = 1e-13 if np.dtype(dtype).itemsize == 8 or dtype == "int32" else 2e-6
    narrow = 2e-3 if dtype == "float16" else rounding
    for axis, scale in [(-1, None), (0, 0.5), (None, 2.0), (1, "array")]:
        labels, lazy = labels_of(rng, x, axis)
        if scale == "array":
            scale = rng.uniform(-2, 2, (*x.shape[:1], 1, *x.shape[2:])).astype(np.float32)
        options = {"axis": axis, "scale": scale}
        d, width = chunked(rng, x, chunking), any_width(rng)
        got = cd.cross_entropy(d, lazy, return_lse=True, split_every=width, **options)
        want = cuattn.cross_entropy(x, labels, return_lse=True, **options)
        for ours, theirs in zip(compute(got), want, strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_allclose(ours, theirs, rtol=rounding, atol=rounding)
        if dtype == "int32":
            continue
        grad = rng.standard_normal(labels.shape).astype(np.float32)
        forms = [0.25, grad, chunked(rng, grad), *([grad[..., :1]] if grad.ndim else [])]
        given = forms[rng.integers(len(forms))]
        dx = cd.cross_entropy_backward(given, d, lazy, got[1], **options)
        assert dx.chunks == d.chunks
        given = np.asarray(given)
        ref = cuattn.cross_entropy_backward(given, x, labels, want[1], **options)
        atol = narrow * 0.1 * np.max(abs(given))
        np.testing.assert_allclose(exact(compute(dx)), exact(ref), rtol=narrow, atol=atol)


@any_chunking
def test_entropies(rng, chunking):
    for x, axes in [
        (rows_to_fail(rng, 64), (-1, None)),
        (draw(rng, (3, 4, 9)), (0, (0, 2), (-1, 1), None, ())),
    ]:
        where = rng.random(x.shape) < 0.6
        where[rng.integers(len(x))] = False
        factors = rng.choice([-1.0, 0, 0.3], (len(x), *[1] * (x.ndim - 1))).astype(np.float32)
        d = chunked(rng, x, chunking)
        for axis in axes:
            scale = factors if axis in (-1, (-1, 1)) else 0.5
            keepdims = bool(rng.random() < 0.5)
            for part in (None, [where, where[0], False][rng.integers(3)]):
                options = {"axis": axis, "scale": scale, "where": part, "keepdims": keepdims}
                given = options | {"where": chunked(rng, part)} if part is where else options
                got = compute(cd.entropy(d, split_every=any_width(rng), **given))
                want = cuattn.entropy(x, **options)
                assert got.dtype == want.dtype
                np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint64"])
def test_types_of_labels(rng, dtype):
    """Chunks begin at places that some of these types have no number for."""
    x = rng.standard_normal((5, 400)).astype(np.float32)
    labels = rng.integers(100, size=5).astype(dtype)
    got = compute(cd.cross_entropy(da.from_array(x, chunks=70), chunked(rng, labels)))
    np.testing.assert_allclose(got, cuattn.cross_entropy(x, labels), rtol=2e-6)


@pytest.mark.parametrize("chunks", [3, 6])
def test_labels_that_no_row_has(chunks):
    """Of NumPy when the graph is built, of dask when they are computed."""
    x, wrong = da.zeros((2, 6), chunks=chunks), np.array([-100, 6])
    words = r"labels must be from 0 to 5 or ignore_index \(-100\), but one of them is 6"
    lse = np.ones(2)
    for lazy in (
        lambda labels: cd.cross_entropy(x, labels),
        lambda labels: cd.cross_entropy_backward(1.0, x, labels, lse),
    ):
        with pytest.raises(ValueError, match=words):
            lazy(wrong)
        late = lazy(da.from_array(wrong))
        with pytest.raises(ValueError, match=words):
            late.compute()
    loss = cd.cross_entropy(x, da.from_array(wrong), ignore_index=6)
    with pytest.raises(ValueError, match=r"ignore_index \(6\), but one of them is -100"):
        loss.compute()


# ---- Selection ----


@any_chunking
@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_the_k_best_are_exactly_those(rng, chunking, dtype):
    n = int(rng.integers(20, 60))
    k = int(rng.choice([0, 1, 5, n - 1, n]))
    x = ranking_stack(rng, n, k, dtype, special=np.dtype(dtype).kind == "f")
    for axis in (-1, 0, None):
        mode = str(rng.choice(["largest", "smallest"]))
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
def test_softmax_of_the_k_best(rng, chunking):
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
        how = {"renormalize": renormalize, "return_lse": True}
        how["output"] = str(rng.choice(["prob", "log_prob", "logit"]))
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


# ---- Attention ----

SIZES = {"batch": 2, "heads": (4, 2), "lengths": (23, 31), "dims": (8, 5)}


def chunked_attention(rng, problem, options, layout="BHSD", ndim=4):
    """Results of cuattn.dask, in the layout BHSD: all arrays in chunks of their own."""
    arrays = [attention_cases.arranged(a, layout, ndim) for a in problem.arrays]
    arrays = [chunked(rng, a) for a in arrays]
    options = {
        name: chunked(rng, value) if isinstance(value, np.ndarray) and rng.random() < 0.5
        else value for name, value in options.items()
    }  # fmt: skip
    width = any_width(rng)
    lazy = cd.attention(*arrays, **options, layout=layout, return_lse=True, split_every=width)
    out, lse = compute(tuple(lazy))
    return (out.swapaxes(-3, -2) if layout == "BSHD" and ndim > 2 else out), lse


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("op", [*FLOATS, "tf32"])
def test_attention_with_every_option(rng, op, layout):
    problem = Problem(rng, op, **SIZES, **any_options(rng, 2, 4, SIZES["lengths"]))
    problem.check(*chunked_attention(rng, problem, problem.options, layout))


OPTIONS = {
    "nothing": {},
    "causal": {"is_causal": True},
    "more queries than keys": {"is_causal": True, "q_offset": -9},
    "nothing to see": {"is_causal": True, "q_offset": -100},
    "window": {"window": (3, 2)},
    "open window": {"window": (None, 0), "q_offset": 4},
    "only the lengths": {"q_lens": np.array([0, 13]), "kv_lens": np.array([31, 6])},
    "causal lengths": {"is_causal": True, "kv_lens": np.array([17, 0], np.uint8)},
    "places": {"window": (4, 0), "q_offset": np.array([-2, 25], np.int8)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_where_blocks_are_hidden(rng, name):
    sinks = {"sinks": rng.standard_normal(4).astype(np.float32)}
    for options in (OPTIONS[name], OPTIONS[name] | sinks):
        problem = Problem(rng, "float32", **SIZES, **options)
        problem.check(*chunked_attention(rng, problem, options))


@pytest.mark.parametrize(("ndim", "layout"), [(2, "BHSD"), (3, "BHSD"), (3, "BSHD")])
def test_attention_without_leading_axes(rng, ndim, layout):
    how = SIZES | {"batch": 1} | ({"heads": (1, 1)} if ndim == 2 else {})
    options = {"is_causal": True, "sinks": np.ones(how["heads"][0], np.float32)}
    options |= {"kv_lens": np.array([27]), "alibi_slopes": np.full(how["heads"][0], 0.1)}
    problem = Problem(rng, "float32", **how, **options)
    problem.check(*chunked_attention(rng, problem, options, layout, ndim), ndim=ndim)
    if ndim == 2:
        options |= {"kv_lens": np.array(27), "alibi_slopes": np.array(0.1), "q_offset": np.int8(4)}
        options["sinks"] = np.array(1.0)
        problem.options["q_offset"] = 4
        problem.hide()
        problem.check(*chunked_attention(rng, problem, options, ndim=2), ndim=2)


def test_parts_of_16_bits_are_merged_in_float32(rng):
    """As exact as one call, from many blocks of keys."""
    problem = Problem(rng, "bfloat16", lengths=(4, 300), dims=(16, 16))
    q, k, v = (da.from_array(a, chunks=(1, 1, 3, 16)) for a in problem.arrays)
    wide = cd.attention(q, k, v, dtype="float32")
    narrow = compute(cd.attention(q, k, v))
    assert narrow.dtype == problem.q.dtype and wide.dtype == np.float32
    np.testing.assert_array_equal(narrow, compute(wide).astype(narrow.dtype))
    one = cuattn.attention(*problem.arrays, dtype="float32")
    np.testing.assert_allclose(compute(wide), one, rtol=1e-5, atol=1e-5)
    problem.check(narrow)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
def test_attention_of_nothing(rng, lengths):
    problem = Problem(rng, "float32", lengths=lengths, dims=(8, 8))
    out, lse = chunked_attention(rng, problem, {"is_causal": True})
    assert not out.any() and np.isneginf(lse).all()


def keys_of_parts(lazy):
    """(B, H, S, K) of every task that attends."""
    keys = lazy.__dask_graph__().keys()
    return {key[1:] for key in keys if str(key[0]).startswith("attention-part")}


def blocks_that_see(seen, rows, columns):
    """Blocks of queries and of keys, of which a query sees a key; with the first keys for queries
    that see none."""
    some = np.add.reduceat(np.add.reduceat(seen, rows, 2), columns, 3).any((1,)) > 0
    some[..., 0] |= ~some.any(-1)
    return some


@pytest.mark.parametrize("name", OPTIONS)
def test_hidden_blocks_have_no_task(rng, name):
    options = OPTIONS[name]
    problem = Problem(rng, "float32", **SIZES, **options)
    q, k, v = problem.arrays
    rows, columns = cut(rng, 23, 4), cut(rng, 31, 5)
    q = da.from_array(q, chunks=(1, 2, rows, 8))
    k = da.from_array(k, chunks=(2, 1, columns, 8))
    parts = keys_of_parts(cd.attention(q, k, da.from_array(v), **options))
    starts = [np.cumsum((0, *sizes[:-1])) for sizes in (rows, columns)]
    expected = blocks_that_see(problem.seen.astype(int), *starts)
    want = {(b, h, i, j) for b, i, j in zip(*np.nonzero(expected), strict=True) for h in (0, 1)}
    assert parts == want


def test_lengths_that_are_not_read_hide_nothing():
    q = da.zeros((1, 1, 4, 8), chunks=2)
    lens = da.from_array(np.array([1]))
    assert len(keys_of_parts(cd.attention(q, q, q, is_causal=True))) == 3
    assert len(keys_of_parts(cd.attention(q, q, q, is_causal=True, kv_lens=lens))) == 4
    assert len(keys_of_parts(cd.attention(q, q, q, kv_lens=np.array([1])))) == 2


# ---- Graphs ----


class Loads:
    """An array that notes which parts of it are read."""

    def __init__(self, x):
        self.x, self.shape, self.dtype, self.ndim, self.parts = x, x.shape, x.dtype, x.ndim, []

    def __getitem__(self, part):
        self.parts.append(tuple(one.start for one in part))
        return self.x[part]

    def chunked(self, chunks, inline):
        empty = np.empty((0,) * self.ndim, self.dtype)
        return da.from_array(
            self, chunks, asarray=False, fancy=False, inline_array=inline, meta=empty
        )


@pytest.mark.parametrize("inline", [True, False])
def test_chunks_are_loaded_as_often_as_keep_says(rng, inline):
    """Once, or a second time when all is known of the rows, what `where` comes from, too."""
    x = Loads(rng.standard_normal((4, 12)).astype(np.float32))
    mask = Loads(rng.random((4, 12)) < 0.8)
    blocks = sorted((i, j) for i in (0, 2) for j in (0, 4, 8))
    d, where = x.chunked((2, 4), inline), mask.chunked((2, 4), inline)
    want = cuattn.softmax(x.x, where=mask.x)
    for keep, times in ((True, 1), (False, 2)):
        x.parts, mask.parts = [], []
        with dask.config.set(scheduler="sync"):
            y = cd.softmax(d, where=where, keep=keep).compute()
        np.testing.assert_allclose(y, want, rtol=1e-6)
        for loads in (x.parts, mask.parts):
            assert sorted(loads) == sorted(blocks * times)
            assert sorted(loads[:6]) == blocks  # all before one comes again
    whole = x.chunked((2, 12), inline)
    for once in (
        lambda: [cd.softmax(whole, keep=False)],
        lambda: [cd.logsumexp(d)],
        lambda: [cd.entropy(d)],
        lambda: cd.cross_entropy(d, np.zeros(4, int), return_lse=True),
        lambda: cd.top_k(d, 3),
        lambda: cd.softmax_topk(d, 3, return_lse=True),
    ):
        x.parts = []
        dask.compute(*once())
        assert len(x.parts) == len(set(x.parts)) in (2, 6)


LABELS = np.array([5, 0, -100, 3, 2, 1])


def build(x, where, qkv):
    """One graph of each function, all of rows in several chunks."""
    labels = np.asarray(LABELS[: len(x)], like=x._meta)
    return [
        cd.softmax(x),
        *cd.softmax(x, where=where, keep=False, return_lse=True),
        cd.log_softmax(x, None, scale=2.0),
        cd.logsumexp(x),
        *cd.cross_entropy(x, labels, return_lse=True),
        cd.cross_entropy_backward(0.5, x, labels, labels / 2.0),
        cd.entropy(x, where=where),
        *cd.top_k(x, 3, axis=None),
        *cd.softmax_topk(x, 3, where=where, return_lse=True),
        *cd.sample(x, 2, seed=1, where=where, top_k=3, return_log_prob=True),
        cd.sample(x, axis=0, seed=1),
        *cd.attention(*qkv, is_causal=True, return_lse=True),
    ]


def expected(x, where, qkv):
    """The same of arrays."""
    labels = LABELS[: len(x)]
    return [
        cuattn.softmax(x),
        *cuattn.softmax(x, where=where, return_lse=True),
        cuattn.log_softmax(x, None, scale=2.0),
        cuattn.logsumexp(x),
        *cuattn.cross_entropy(x, labels, return_lse=True),
        cuattn.cross_entropy_backward(0.5, x, labels, labels / 2.0),
        cuattn.entropy(x, where=where),
        *cuattn.top_k(x, 3, axis=None),
        *cuattn.softmax_topk(x, 3, where=where, return_lse=True),
        *cuattn.sample(x, 2, seed=1, where=where, top_k=3, return_log_prob=True),
        cuattn.sample(x, axis=0, seed=1),
        *cuattn.attention(*qkv, is_causal=True, return_lse=True),
    ]


def test_no_function_is_called_before_dask_computes(monkeypatch):
    """Neither ours, also not on an empty array that stands for a chunk, nor what loads chunks."""

    calls = []

    def fail(*args, **options):
        calls.append(args)  # dask may hide what is raised
        raise AssertionError("called")

    for name in cuattn.__all__:
        if callable(getattr(cuattn, name)) and not isinstance(getattr(cuattn, name), type):
            monkeypatch.setattr(cuattn, name, fail)
    x, mask = Loads(np.ones((4, 6))), Loads(np.ones((4, 6), bool))
    qkv = [Loads(np.ones((1, 2, 4, 8))).chunked(2, True) for _ in range(3)]
    lazy = build(x.chunked(2, True), mask.chunked(2, True), qkv)
    assert x.parts == mask.parts == calls == []
    for one in lazy:
        with pytest.raises(AssertionError, match="called"):
            one.compute()


def test_the_same_call_makes_the_same_graph():
    x, qkv = da.ones((4, 6), chunks=2), [da.ones((2, 4, 8), chunks=2)] * 3
    first, second = (build(x, x > 0, qkv) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.__dask_graph__().keys() == other.__dask_graph__().keys()
    names = [one.name for one in first]
    others = [cd.softmax(x, keep=False), cd.softmax(x, 0), cd.attention(*qkv, scale=1)]
    others += [
        cd.attention(*qkv),
        cd.attention(*qkv, q_offset=1),
        cd.attention(*qkv, window=(1, 1)),
    ]
    assert len({*names, *(one.name for one in others)}) == len(names) + len(others)


def test_tasks():
    """One for each chunk of whole rows. Else each comes twice, beside trees and what holds the
    second time back; loads are part of them."""

    def tasks(*lazy):
        return len({key for one in dask.optimize(*lazy) for key in one.__dask_graph__().keys()})

    x = Loads(np.ones((6, 160), np.float32))
    whole, parts = x.chunked((2, 160), True), x.chunked((2, 10), True)
    chunks, tree = 3 * 16, 3 * (4 + 1)
    assert tasks(cd.softmax(whole)) == tasks(cd.softmax(whole, keep=False)) == 3
    assert tasks(cd.softmax(parts)) == 3 * chunks + tree
    assert tasks(cd.softmax(parts, keep=False)) <= 2 * chunks + tree + 5
    assert tasks(cd.logsumexp(parts, -1)) == chunks + tree
    assert tasks(*cd.softmax_topk(parts, 3)) == tasks(*cd.top_k(parts, 3))
    assert tasks(*cd.top_k(parts, 3)) <= chunks + tree + 16 + 2 * 3 + 3
    names = {str(key[0]).partition("-")[0] for key in cd.softmax(parts).__dask_graph__()}
    assert names >= {"softmax"}  # what dask's dashboard shows


@pytest.mark.parametrize("scheduler", ["sync", "processes"])
def test_schedulers(rng, scheduler):
    x = rng.standard_normal((6, 20)).astype(np.float32)
    qkv = rng.standard_normal((3, 2, 9, 8)).astype(np.float32)
    where = rng.random(x.shape) < 0.7
    want = expected(x, where, qkv)
    lazy = build(chunked(rng, x), where, [chunked(rng, a) for a in qkv])
    got = dask.compute(*lazy, scheduler=scheduler, num_workers=2)
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


# ---- Errors ----

X = np.ones((4, 6), np.float32)
Q = np.ones((2, 4, 8), np.float32)
BAD = [
    ("softmax", (X, 2), {}),
    ("softmax", (X, "1"), {}),
    ("softmax", (X,), {"axis": (0, 0)}),
    ("softmax", (X.astype(complex),), {}),
    ("softmax", (X,), {"scale": np.ones((4, 6))}),
    ("softmax", (X,), {"scale": "1"}),
    ("softmax", (X,), {"where": np.ones((5, 6), bool)}),
    ("softmax", (X,), {"where": X}),
    ("softmax", (X,), {"dtype": "int8"}),
    ("softmax", (X,), {"return_lse": 1}),
    ("softmax", (X,), {"dim": 1}),
    ("log_softmax", (X,), {"temperature": 1}),
    ("logsumexp", (X,), {"keepdims": None}),
    ("logsumexp", (X, 3), {}),
    ("cross_entropy", (X, X[:, 0]), {}),
    ("cross_entropy", (X, LABELS), {}),
    ("cross_entropy", (X, LABELS[:4]), {"axis": 2}),
    ("cross_entropy", (X, LABELS[:4]), {"axis": (0, 1)}),
    ("cross_entropy", (X, LABELS[:4]), {"ignore_index": 0.5}),
    ("cross_entropy", (X, LABELS[:4]), {"scale": np.ones(3)}),
    ("cross_entropy", (X, LABELS[:4]), {"target": 1}),
    ("cross_entropy", (X,), {}),
    ("cross_entropy_backward", (1.0, X.astype(int), LABELS[:4], X[:, 0]), {}),
    ("cross_entropy_backward", (1.0, X, LABELS[:4], X), {}),
    ("cross_entropy_backward", (X, X, LABELS[:4], X[:, 0]), {}),
    ("cross_entropy_backward", ("1", X, LABELS[:4], X[:, 0]), {}),
    ("entropy", (X, 2), {}),
    ("entropy", (X,), {"where": X}),
    ("entropy", (X,), {"keepdims": 1}),
    ("top_k", (X, 7), {}),
    ("top_k", (X, -1), {}),
    ("top_k", (X, 25), {"axis": None}),
    ("top_k", (X, 1), {"mode": "best"}),
    ("top_k", (X, 1), {"axis": (0, 1)}),
    ("top_k", (X,), {}),
    ("softmax_topk", (X.astype(int), 1), {}),
    ("softmax_topk", (X, 1), {"output": "probs"}),
    ("attention", (Q, Q[:, :, :4], Q), {}),
    ("attention", (Q, Q, Q.astype(float)), {}),
    ("attention", (Q, Q, Q), {"mask": np.ones((5, 4), bool)}),
    ("attention", (Q, Q, Q), {"kv_lens": np.array([5])}),
    ("attention", (Q, Q, Q), {"window": 3}),
    ("attention", (Q, Q, Q), {"softcap": 0}),
    ("attention", (Q, Q, Q), {"layout": "HSD"}),
    ("attention", (Q, Q, Q), {"dtype": "float16"}),
    ("attention", (Q, Q, Q), {"attn_mask": None}),
    ("attention", (Q, Q), {}),
]


@pytest.mark.parametrize(("name", "args", "options"), BAD)
def test_errors_are_those_of_arrays(name, args, options):
    """In the same words, before there is a graph."""
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(cuattn, name)(*args, **options)
    lazy = [da.from_array(a) if isinstance(a, np.ndarray) else a for a in args]
    with pytest.raises(type(expected.value)) as error:
        getattr(cd, name)(*lazy, **options)
    given, told = (str(one.value).partition("; call ")[0] for one in (error, expected))
    if "must be an option of" in told:  # there are others here
        given, told = (text.partition(" (")[0] for text in (given, told))
    assert given == told


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: cd.softmax(X), TypeError, "x must be a dask.array.Array, but it is numpy.ndarray"),
        (lambda: cd.entropy(X), TypeError, "x must be a dask.array.Array, but it is numpy.ndarray"),
        (lambda: cd.cross_entropy(X, X), TypeError, "x must be a dask.array.Array"),
        (lambda: cd.cross_entropy(da.ones(4), [1]), TypeError, "labels must be"),
        (lambda: cd.cross_entropy(da.ones(4), 1), TypeError, "labels must be"),
        (lambda: cd.cross_entropy(da.ones(4), np.int8(4)), ValueError, "labels must be from 0"),
        (lambda: cd.top_k([1], 1), TypeError, "x must be a dask.array.Array, but it is list"),
        (lambda: cd.attention(da.ones((2, 8)), X, X), TypeError, "k must be a dask.array.Array"),
        (lambda: cd.softmax(da.ones(4)[da.ones(4) > 0]), ValueError, "x must have chunks of known"),
        (lambda: cd.softmax(da.ones(4), keep=1), TypeError, "keep must be True or False"),
        (lambda: cd.softmax(da.ones(4), split_every=1), ValueError, "split_every must be at least"),
        (lambda: cd.logsumexp(da.ones(4), split_every="2"), TypeError, "split_every must be an"),
        (lambda: cd.logsumexp(da.ones(4), b=1), TypeError, "b must be an option of logsumexp"),
        (lambda: cd.softmax(da.ones(4), out=X), TypeError, "out must be an option of softmax"),
        (lambda: cd.softmax(da.ones(3), scale=[1, 2]), TypeError, "scale must be"),
    ],
)  # fmt: skip
def test_errors_of_dask(call, error, words):
    with pytest.raises(error, match=words):
        call()


# ---- Devices, and more than the memory holds ----


@pytest.mark.parametrize("backend", ["numpy", GPU], indirect=True)
def test_chunks_of_every_library(backend, rng):
    """Chunks stay what they are: arrays of CuPy give arrays of CuPy."""
    x = np.stack([row for _, row in special_rows(rng, 40)][:6])
    qkv = rng.standard_normal((3, 2, 9, 16)).astype(np.float32)
    where = rng.random(x.shape) < 0.7
    want = expected(x, where, qkv)

    def lazy(a, chunks):
        return da.from_array(backend.asarray(a), chunks, asarray=False)

    with dask.config.set(scheduler="sync"):
        made = build(lazy(x, (4, 15)), lazy(where, (3, 40)), [lazy(a, (1, 5, 16)) for a in qkv])
        got = dask.compute(*made)
        for one, told, other in zip(got, made, want, strict=True):
            assert type(one) is backend.xp.ndarray and type(told._meta) is type(one)
            np.testing.assert_allclose(backend.asnumpy(one), other, rtol=1e-5, atol=2e-6)
        for part in (True, False):  # not an array of the device
            some = cd.softmax_topk(lazy(x, (4, 15)), 3, where=part).values.compute()
            want = cuattn.softmax_topk(x, 3, where=part).values
            np.testing.assert_allclose(backend.asnumpy(some), want, rtol=1e-5)
    if backend.on_device:
        wrong = lazy(np.array([40, -1, 79, -100, -80, 160]), 4)
        loss = cd.cross_entropy(lazy(np.ones((6, 40), np.float32), (4, 15)), wrong).compute()
        assert (np.isnan(backend.asnumpy(loss)) == [1, 1, 1, 0, 1, 1]).all()
        with pytest.raises(TypeError, match="where must be an array of the same library as x"):
            cd.softmax(lazy(x, (4, 15)), where=where)


@pytest.mark.slow
def test_twice_the_memory_of_all_workers(rng):
    """x is made chunk by chunk and never spilled: what a worker holds stays below its limit."""
    distributed = pytest.importorskip("distributed")
    psutil = pytest.importorskip("psutil")
    limit, rows, width, k = 192 << 20, 64, 1 << 16, 50
    blocks, step = 4 * limit // (4 * rows * width), width // 2  # two workers

    def block(i):
        values = np.random.default_rng([seed, i]).integers(-1000, 1000, (rows, width), np.int16)
        return values.astype(np.float32) / 64  # many ties

    class Made:
        """What reads blocks of a file, but for the file."""

        shape, dtype, ndim = (rows, blocks * width), np.dtype(np.float32), 2

        def __getitem__(self, part):
            return block(part[1].start // width)

    def some(y):
        return np.concatenate([y.sum(axis=1, keepdims=True), y[:, ::step]], axis=1)

    seed = int(rng.integers(1 << 30))
    x = da.from_array(Made(), (rows, width), name=False, asarray=False, fancy=False,
                      inline_array=True, meta=np.empty((0, 0), np.float32))  # fmt: skip
    assert x.nbytes == 2 * (2 * limit)
    memory = dict.fromkeys(("target", "spill", "pause", "terminate"), False)
    settings = {f"distributed.worker.memory.{key}": value for key, value in memory.items()}
    with (
        dask.config.set(settings),
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, memory_limit=limit, dashboard_address=None
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        workers = [psutil.Process(pid) for pid in client.run(os.getpid).values()]
        done, peaks = threading.Event(), []

        def watch():
            while not done.wait(0.1):
                peaks.append(max(worker.memory_full_info().uss for worker in workers))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            y = cd.softmax(x, keep=False)
            found = client.compute(y.map_blocks(some, chunks=(rows, 3)), sync=True)
            values, indices = client.compute([*cd.softmax_topk(x, k)], sync=True)
        finally:
            done.set()
            watcher.join()
    assert max(peaks) < limit, f"a worker held {max(peaks) >> 20} MiB"
    row = int(rng.integers(rows))
    whole = np.concatenate([block(i)[row] for i in range(blocks)])
    ref = reference.softmax(whole)
    np.testing.assert_allclose(found[:, ::3].sum(axis=1, dtype=np.float64), 1, rtol=1e-5)
    for i, place in ((1, 0), (2, step)):
        np.testing.assert_allclose(found[row, i::3], ref[place::width], rtol=1e-5)
    want = cuattn.top_k(whole, k)
    np.testing.assert_array_equal(indices[row], want.indices)
    np.testing.assert_allclose(values[row], ref[want.indices], rtol=1e-5)
