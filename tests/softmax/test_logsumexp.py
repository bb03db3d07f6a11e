"""logsumexp: values, layouts, weights, masks and corners, on every backend."""

from __future__ import annotations

import itertools
import warnings

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from tolerance import FLOATS, assert_close, dtype_of, exact, naive_logsumexp, result_dtype

import cuattn
from cuattn import reference


def compare(got, x, axis=None, *, dtype=None, **options):
    dtype = result_dtype(x, dtype, options.get("b"))
    assert got.dtype == dtype
    ref = reference.logsumexp(exact(x), axis, **options)
    assert_close(got, ref, naive_logsumexp(x, axis, dtype=dtype, **options))


def verify(backend, x, axis=None, *, dtype=None, **options):
    before = x.tobytes()
    kwargs = {
        key: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    device_x = backend.asarray(x)
    got = cuattn.logsumexp(device_x, axis, dtype=dtype, **kwargs)
    assert backend.ran() or x.size == 0
    assert isinstance(got, backend.xp.ndarray)
    compare(backend.asnumpy(got), x, axis, dtype=dtype, **options)
    assert backend.asnumpy(device_x).tobytes() == before
    return backend.asnumpy(got)


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, n):
    verify(backend, draw(rng, (3, n)), -1)


@pytest.mark.parametrize("n", cases.FEW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "uint8"])
def test_dtype(backend, rng, dtype, n):
    verify(backend, draw(rng, (3, n), dtype), -1)


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)), -1)


@pytest.mark.parametrize("n", [3, 33, 128, 1025])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout, n):
    x = LAYOUTS[layout](draw(rng, (5, n)))
    verify(backend, x, -1)
    verify(backend, x)


@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), (2, 0), (-1, -2), (0, 1, 2), None, ()])
def test_axis(backend, rng, axis, keepdims):
    verify(backend, draw(rng, (4, 5, 33)), axis, keepdims=keepdims)


@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (1025, 5), (4097, 3), (33000, 2)])
def test_first_axis(backend, rng, shape):
    verify(backend, draw(rng, shape), 0)


@pytest.mark.parametrize("axis", [-1, 0, 2, (1, 3), None])
def test_not_collapsible(backend, rng, axis):
    base = draw(rng, (6, 4, 1, 10, 7))
    x = np.broadcast_to(base, (6, 4, 3, 10, 7))[::2, ::-1, :, 1:8:3, ::-2]
    verify(backend, x, axis, keepdims=True)


@pytest.mark.parametrize("layout", ["contiguous", "strided", "misaligned", "fortran"])
@pytest.mark.parametrize("keepdims", [False, True])
def test_out(backend, rng, layout, keepdims):
    x = draw(rng, (4, 5, 33))
    guard = Guarded(backend, (4, 5, 1) if keepdims else (4, 5), x.dtype, layout)
    got = cuattn.logsumexp(backend.asarray(x), -1, keepdims=keepdims, out=guard.out)
    assert got is guard.out
    compare(backend.asnumpy(got), x, -1, keepdims=keepdims)
    guard.check_rim()


def test_out_zero_dimensions(backend, rng):
    x = draw(rng, (4, 33))
    guard = Guarded(backend, (), x.dtype)
    assert cuattn.logsumexp(backend.asarray(x), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), x)
    guard.check_rim()


@pytest.mark.parametrize(
    "given, wanted",
    [("float16", "float32"), ("float32", "float64"), ("float64", "float32"), ("int32", "float32")],
)
def test_dtype_option(backend, rng, given, wanted):
    verify(backend, draw(rng, (3, 129), given), -1, dtype=dtype_of(wanted))


# ---- weights and masks -------------------------------------------------------------------------


def positive(rng, shape):
    return np.asarray(rng.integers(1, 33, shape) / 8).astype(np.float32)


@pytest.mark.parametrize("n", [3, 33, 128, 1025])
def test_weights(backend, rng, n):
    x = draw(rng, (5, n))
    for shape in [(5, n), (1, n), (n,), (5, 1), (1,), ()]:
        verify(backend, x, -1, b=positive(rng, shape))
    for b in (2, 0.5, np.float32(0.25)):
        verify(backend, x, -1, b=b)
    b = positive(rng, (n, 5))
    verify(backend, x, -1, b=b.T)
    verify(backend, x, -1, b=b.T[::-1, ::-1])


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_weights_axis(backend, rng, axis):
    x = draw(rng, (4, 5, 33))
    for shape in [(4, 5, 33), (33,), (5, 1), (4, 1, 1)]:
        verify(backend, x, axis, b=positive(rng, shape), keepdims=True)


@pytest.mark.parametrize("x_dtype", ["float16", "bfloat16", "float32", "float64", "int8"])
@pytest.mark.parametrize("b_dtype", ["float64", "int64", "float16"])
def test_weights_dtype(backend, rng, x_dtype, b_dtype):
    b = rng.integers(0, 5, (3, 33)).astype(b_dtype)
    verify(backend, draw(rng, (3, 33), x_dtype), -1, b=b)


@pytest.mark.parametrize("x_dtype", ["float16", "float32", "float64", "int8"])
@pytest.mark.parametrize(
    "b", [2, 2.5, np.float16(2), np.float64(2.5), np.int64(2), np.array(2.5), np.array(2, np.int32)]
)
def test_one_weight(backend, rng, x_dtype, b):
    """A number of Python leaves the dtype to x, one of NumPy does not."""
    verify(backend, draw(rng, (3, 33), x_dtype), -1, b=b)


EVERY_DTYPE = [np.dtype(c) for c in "bBhHiIlLefd"]


@pytest.mark.parametrize("shape", [(3,), ()])
def test_dtype_as_scipy(shape):
    from scipy.special import logsumexp

    for x_dtype, b_dtype in itertools.product(EVERY_DTYPE, repeat=2):
        for x, b in (
            (np.ones(3, x_dtype), np.ones(shape, b_dtype)),
            (np.ones(shape, x_dtype), np.ones(3, b_dtype)[: 3 if shape else 1].reshape(shape)),
            (x_dtype.type(1), b_dtype.type(1)),
            (np.ones(3, x_dtype), b_dtype.type(1).item()),
        ):
            want = logsumexp(x, b=b).dtype
            assert cuattn.logsumexp(x, b=b).dtype == want, (x_dtype, b_dtype)


@pytest.mark.parametrize("b_dtype", ["float16", "float32", "float64", "int8", "int16", "int32"])
def test_dtype_of_bfloat16(b_dtype):
    """Which SciPy does not know: as float16, and float32 beside that."""
    x, b = np.ones(3, dtype_of("bfloat16")), np.ones(3, b_dtype)
    other = {"float16": "float32", "int8": "bfloat16", "int16": "float32", "int32": "float64"}
    want = dtype_of(other.get(b_dtype, b_dtype))
    assert cuattn.logsumexp(x, b=b).dtype == cuattn.logsumexp(b, b=x).dtype == want


def test_weight_zero_takes_out(backend, rng):
    """Even an element that is not a number; a row of zero weights is empty."""
    x, b = draw(rng, (6, 33)), positive(rng, (6, 33))
    b[rng.random(b.shape) < 0.3] = 0
    b[2] = 0
    want = verify(backend, x, -1, b=b)
    for bad in (NAN, INF, -INF):
        got = verify(backend, np.where(b == 0, np.float32(bad), x), -1, b=b)
        np.testing.assert_array_equal(got, want)
    assert want[2] == -INF
    verify(backend, x, -1, b=0)
    verify(backend, x, -1, b=np.array(-0.0, np.float32))


def test_negative_weights(backend):
    """Subtraction where the total stays positive, NaN where it is negative, -inf where it is 0."""
    x = np.array([[3, 1, 0], [0, 1, 3], [2, 2, -INF], [5, 5, 5]], np.float32)
    for b in ([2, -1, -1], [-1, -1, 2], [1, -1, 3], [-1, -1, -1], [4, -2, -2]):
        verify(backend, x, -1, b=np.array(b, np.float32))
    verify(backend, x, -1, b=-1)
    verify(backend, x, -1, b=np.array([[1], [-1], [0], [2]], np.float32))


def test_weights_that_are_not_finite(backend):
    x = np.array([[1, 2, 3]], np.float32)
    for bad in (NAN, INF, -INF):
        verify(backend, x, -1, b=np.array([1, bad, 1], np.float32))


@pytest.mark.parametrize("n", [3, 33, 1025])
def test_where(backend, rng, n):
    x = draw(rng, (5, n))
    full = rng.random((5, n)) < 0.6
    full[1], full[2] = False, True
    for where in (full, full[3], full[:, :1], np.array(False), full[:, ::-1]):
        plain = verify(backend, x, -1, where=where)
        for bad in (NAN, INF, -INF):
            got = verify(backend, np.where(where, x, np.float32(bad)), -1, where=where)
            np.testing.assert_array_equal(got, plain)


def test_where_with_weights(backend, rng):
    x, where, b = draw(rng, (5, 33)), rng.random((5, 33)) < 0.6, positive(rng, (5, 33))
    b[~where] = NAN
    verify(backend, x, -1, where=where, b=b)
    verify(backend, x, 0, where=where, b=b[:1] * 0 + 2)


# ---- corners -----------------------------------------------------------------------------------


def test_a_weight_beyond_the_accumulator(backend):
    x = backend.asarray(np.ones((3, 4), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = cuattn.logsumexp(x, 0, b=1e308)
    assert (backend.asnumpy(got) > 700).all()


@pytest.mark.parametrize("axis", [None, -1, 0, ()])
@pytest.mark.parametrize("keepdims", [False, True])
def test_zero_dimensions(backend, axis, keepdims):
    for value in (0.0, 3.5, INF, -INF, NAN):
        got = verify(backend, np.array(value, np.float32), axis, keepdims=keepdims)
        assert got.shape == ()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
@pytest.mark.parametrize("keepdims", [False, True])
def test_empty(backend, shape, keepdims):
    x = np.zeros(shape, np.float32)
    for axis in [None, tuple(range(len(shape))), *range(-len(shape), len(shape))]:
        got = verify(backend, x, axis, keepdims=keepdims)
        assert (got == -INF).all()
        verify(backend, x, axis, keepdims=keepdims, b=x, where=np.zeros(shape, bool))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [3, 33, 1025])
def test_special_values(backend, rng, dtype, n):
    x = np.stack([row for _, row in cases.special_rows(rng, n, dtype)])
    verify(backend, x, -1)
    verify(backend, x.T, 0)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values_in_long_rows(backend, rng, value):
    x = draw(rng, (2, 70001))
    x[0, -1] = value
    verify(backend, x, -1)


def test_nothing_but_tiny_numbers(backend):
    """A million equal small numbers add up to their count."""
    verify(backend, np.full((1, 50257), 1e-40, np.float32), -1)
    verify(backend, np.full((1, 4097), -1e4, np.float32), -1)


def test_shift(backend, rng):
    """A shift by a power of two of multiples of 1/8 is exact, and shifts the result."""
    x = (rng.integers(-64, 65, (3, 129)) / 8).astype(np.float32)
    for offset in (1024, -4096):
        shifted = (x + offset).astype(np.float32)
        got = verify(backend, shifted, -1)
        want = reference.logsumexp(exact(x), -1) + offset
        assert_close(got, want, naive_logsumexp(shifted, -1))


@pytest.mark.parametrize("n", [33, 1025, 300001])
def test_two_runs_are_bitwise_equal(backend, rng, n):
    x = backend.asarray(draw(rng, (2, n)))
    runs = [backend.asnumpy(cuattn.logsumexp(x)).tobytes() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("case", range(25))
def test_random_call(backend, rng, case):
    dtype = rng.choice(["float32", "float16", "bfloat16", "float64", "int32"])
    x = cases.random_view(rng, dtype)
    axis = cases.random_axis(rng, x.ndim)
    options = {"keepdims": bool(rng.random() < 0.5)}
    if rng.random() < 0.3:
        shape = [n if rng.random() < 0.7 else 1 for n in x.shape]
        options["where"] = np.asarray(rng.random(shape) < 0.7)
    if x.ndim and rng.random() < 0.3:
        options["b"] = positive(rng, [n if rng.random() < 0.7 else 1 for n in x.shape])
    verify(backend, x, axis, **options)
