"""entropy: values, layouts, masks and corners, on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from tolerance import FLOATS, assert_close, exact, lse_dtype
from tolerance import result_dtype as float_dtype

import cuattn
from cuattn import reference


@np.errstate(all="ignore")
def naive_entropy(x, axis=-1, *, scale=None, where=None, keepdims=False):
    """``-sum(p * log(p))`` in the dtype of the result."""
    s = x.astype(lse_dtype(float_dtype(x)))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    s = s if where is None else np.where(where, s, np.asarray(-INF, s.dtype))
    e = np.exp(s - np.max(s, axis, keepdims=True, initial=-np.inf))
    p = e / np.sum(e, axis, keepdims=True)
    return -np.sum(np.where(p == 0, 0, p * np.log(p)), axis, keepdims=keepdims)


@np.errstate(all="ignore")
def terms_of_tilt(s, axis=-1, keepdims=False):
    """Size of ``sum(exp(d) * d)``: that of d is the relative error of its exponential, too."""
    m = np.max(s, axis, keepdims=True, initial=-np.inf)
    d = s - np.where(np.isfinite(m), m, 0)
    e = np.exp(d)
    terms = np.where((e > 0) & np.isfinite(e), e * abs(d) * (1 + abs(d)), 0)
    return np.sum(terms, axis, keepdims=keepdims)


def terms_of_entropy(s, axis=-1, keepdims=False):
    """Size of ``log(l) - sum(exp(d) * d) / l``, l >= 1."""
    entropy = np.nan_to_num(reference.entropy(s, axis, keepdims=keepdims))
    return terms_of_tilt(s, axis, keepdims) + entropy


def verify(backend, x, axis=-1, **options):
    before = x.tobytes()
    kwargs = {
        name: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    given = backend.asarray(x)
    got = cuattn.entropy(given, axis, **kwargs)
    assert backend.ran() or x.size == 0
    assert isinstance(got, backend.xp.ndarray)
    got = backend.asnumpy(got)
    assert got.dtype == lse_dtype(float_dtype(x))
    want = reference.entropy(exact(x), axis, **options)
    scale, where = options.get("scale", 1), options.get("where")
    with np.errstate(invalid="ignore"):
        s = np.where(True if where is None else where, exact(x) * exact(scale), -INF)
    terms = terms_of_entropy(s, axis, options.get("keepdims", False))
    assert_close(got, want, naive_entropy(x, axis, **options), terms=terms)
    assert backend.asnumpy(given).tobytes() == before
    return got


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, n):
    verify(backend, draw(rng, (3, n)))
    verify(backend, draw(rng, (3, n), spread=0.01))  # next to log(n)


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8"])
def test_dtype(backend, rng, dtype, n):
    verify(backend, draw(rng, (3, n), dtype))


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)))


@pytest.mark.parametrize("n", [33, 1025])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout, n):
    x = LAYOUTS[layout](draw(rng, (5, n)))
    for axis in (-1, 0, None):
        verify(backend, x, axis)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (2, 0), (0, 1, 2), None, ()])
def test_axis(backend, rng, axis, keepdims):
    verify(backend, draw(rng, (4, 5, 33)), axis, keepdims=keepdims)


@pytest.mark.parametrize("shape", [(3, 700), (1025, 5), (33_000, 2)])
def test_first_axis(backend, rng, shape):
    verify(backend, draw(rng, shape), 0)


def test_many_axes(backend, rng):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, (1, 5, 11), None):
        verify(backend, x, axis)


def test_scale(backend, rng):
    x = draw(rng, (4, 5, 33))
    for scale in (0.5, -1.5, 3.0, 0):
        verify(backend, x, scale=scale)
    for shape in [(), (5, 1), (4, 5, 1)]:
        verify(backend, x, scale=np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32))


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", FLOATS)
def test_where(backend, rng, dtype, n):
    """What is left out may hold anything; without anything left the entropy is 0."""
    x = draw(rng, (9, n), dtype)
    where = rng.random(x.shape) < 0.5
    where[0], where[1], where[2:5, 0] = False, True, True
    x[~where] = rng.choice(np.array([NAN, INF, -INF, 1e4], x.dtype), np.sum(~where))
    x[2], x[3, where[3]], x[4, 0] = NAN, -INF, INF
    got = verify(backend, x, where=where)
    assert got[0] == 0 and np.isnan(got[2:5]).all()
    assert np.isfinite(got[5:]).all()
    verify(backend, np.ascontiguousarray(x.T), 0, where=where.T)
    verify(backend, x, where=where[5])
    verify(backend, x, where=where[:, :1])
    for all_, none in ((True, False), (np.True_, np.False_)):
        verify(backend, x, where=all_)
        assert (backend.asnumpy(cuattn.entropy(backend.asarray(x), where=none)) == 0).all()


def test_least_numbers_are_not_nothing(backend):
    """A row that nothing takes part in is told from one of -inf, and that from the least number."""
    least = np.finfo(np.float32).min
    x = np.array([[-INF] * 4, [least] * 4, [-INF, least, -INF, least]], np.float32)
    for where in (None, np.ones((3, 4), bool)):
        got = verify(backend, x, where=where)
        np.testing.assert_allclose(got, np.log([np.nan, 4, 2]), rtol=1e-6)
        verify(backend, np.ascontiguousarray(x.T), 0, where=where if where is None else where.T)


@pytest.mark.parametrize("layout", cases.OUTS[:-1])
@pytest.mark.parametrize("keepdims", [False, True])
def test_out(backend, rng, layout, keepdims):
    x = backend.asarray(draw(rng, (4, 5, 33)))
    want = backend.asnumpy(cuattn.entropy(x, keepdims=keepdims))
    for _ in range(2):
        guard = Guarded(backend, want.shape, x.dtype, layout)
        assert cuattn.entropy(x, keepdims=keepdims, out=guard.out) is guard.out
        assert backend.asnumpy(guard.out).tobytes() == want.tobytes()
        guard.check_rim()


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        verify(backend, np.array(value, np.float32))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, shape):
    for axis in [None, *range(-len(shape), len(shape))]:
        for where in (None, True, False):
            got = verify(backend, np.zeros(shape, np.float32), axis, where=where)
            assert (got == 0).all()


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_special_values(backend, rng, dtype, n):
    x = np.stack([row for _, row in cases.special_rows(rng, n, dtype)])
    got = verify(backend, x)
    assert (np.isnan(got) == ~np.isfinite(reference.logsumexp(exact(x), -1))).all()
    verify(backend, np.ascontiguousarray(x.T), 0)


@pytest.mark.parametrize("n", [2, 300, 5000, 40_000])
@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_scores(backend, rng, n, size):
    """Ties of the largest are all that counts, however large it is; far ones are 0, not NaN."""
    x = rng.choice(np.float32([-1, 0, 1]), (5, n)) * np.float32(size)
    x[:, 0], x[4] = size, -np.float32(size)
    want = np.log(np.sum(x == x.max(1, keepdims=True), 1))
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        got = backend.asnumpy(cuattn.entropy(backend.asarray(array), axis))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        scaled = cuattn.entropy(backend.asarray(array), axis, scale=1e5)
        np.testing.assert_allclose(backend.asnumpy(scaled), want, rtol=1e-6)


@pytest.mark.parametrize("n", [2, 33, 1000, 5000, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_entropies_keep_their_digits(backend, rng, dtype, n):
    low, high = (-40, -20) if dtype == "float64" else (-25, -17)
    x = rng.uniform(low, high, (4, n)).astype(dtype)
    x[np.arange(4), rng.integers(0, n, 4)] = 0
    wide = exact(x)
    rest = np.sum(np.where(x == 0, 0, np.exp(wide)), 1)
    want = np.log1p(rest) - np.sum(np.exp(wide) * wide, 1) / (1 + rest)
    rtol = 1e-4 if dtype == "float32" else 1e-11
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        got = backend.asnumpy(cuattn.entropy(backend.asarray(array), axis))
        np.testing.assert_allclose(got, want.astype(dtype), rtol=rtol)


@pytest.mark.parametrize("n", [33, 1025, 300_001])
def test_rows_do_not_depend_on_others(backend, rng, n):
    x = backend.asarray(draw(rng, (3, n)))
    whole = backend.asnumpy(cuattn.entropy(x))
    for row in (slice(0, 1), slice(1, 3)):
        part = backend.asnumpy(cuattn.entropy(x[row]))
        assert part.tobytes() == whole[row].tobytes()
