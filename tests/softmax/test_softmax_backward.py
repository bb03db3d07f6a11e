"""softmax_backward and log_softmax_backward, on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import LAYOUTS, NAN, Guarded, draw
from tolerance import NAIVE, TERMS, assert_close, exact

import cuattn
from cuattn import reference

BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


def compare(got, name, grad, y, axis=-1, **options):
    assert got.dtype == y.dtype
    name = f"{name}_backward"
    ref = getattr(reference, name)(exact(grad), exact(y), axis, **options)
    terms = TERMS[name](grad, y, axis, **options)
    assert_close(got, ref, NAIVE[name](grad, y, axis, **options), terms=terms)


def verify(backend, name, grad, y, axis=-1, **options):
    before = grad.tobytes(), y.tobytes()
    kwargs = {
        key: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    inputs = backend.asarray(grad), backend.asarray(y)
    got = getattr(cuattn, f"{name}_backward")(*inputs, axis, **kwargs)
    assert backend.ran() or y.size == 0
    assert isinstance(got, backend.xp.ndarray)
    compare(backend.asnumpy(got), name, grad, y, axis, **options)
    assert (backend.asnumpy(inputs[0]).tobytes(), backend.asnumpy(inputs[1]).tobytes()) == before
    return backend.asnumpy(got)


def pair(rng, name, shape, dtype="float32", axis=-1):
    """A gradient, and the result of the forward function in the dtype."""
    x = draw(rng, shape, dtype)
    return draw(rng, shape, dtype, 1.0), getattr(reference, name)(x, axis, dtype=x.dtype)


@BOTH
@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, name, n):
    verify(backend, name, *pair(rng, name, (3, n)))


@BOTH
@pytest.mark.parametrize("n", cases.FEW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype(backend, rng, name, dtype, n):
    verify(backend, name, *pair(rng, name, (3, n), dtype))


@BOTH
@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, name, rows, n):
    verify(backend, name, *pair(rng, name, (rows, n)))


@BOTH
@pytest.mark.parametrize("n", [33, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, name, layout, n):
    """Both in the layout, then each alone: the two need not agree."""
    grad, y = pair(rng, name, (5, n))
    verify(backend, name, LAYOUTS[layout](grad), LAYOUTS[layout](y))
    verify(backend, name, LAYOUTS[layout](grad), y)
    verify(backend, name, grad, LAYOUTS[layout](y))


@BOTH
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), (0, 1, 2), None, ()])
def test_axis(backend, rng, name, axis):
    verify(backend, name, *pair(rng, name, (4, 5, 33), axis=axis), axis)


@BOTH
@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (1025, 5), (33000, 2)])
def test_first_axis(backend, rng, name, shape):
    verify(backend, name, *pair(rng, name, shape, axis=0), 0)


@BOTH
@pytest.mark.parametrize("axis", [-1, 2, (1, 3)])
def test_not_collapsible(backend, rng, name, axis):
    grad, y = pair(rng, name, (6, 4, 3, 10, 7), axis=axis)
    view = np.s_[::2, ::-1, :, 1:8:3, ::-2]
    verify(backend, name, grad[view], y[view], axis)


@BOTH
def test_broadcast_gradient(backend, rng, name):
    """The gradient of a sum: one number, seen everywhere; many rows, as few show a sum of equal
    numbers that is less accurate than NumPy's."""
    grad, y = pair(rng, name, (200, 33))
    verify(backend, name, np.broadcast_to(grad[:1, :1], y.shape), y)
    verify(backend, name, np.broadcast_to(grad[:, :1], y.shape), y)


@BOTH
def test_scale(backend, rng, name):
    grad, y = pair(rng, name, (4, 5, 33))
    for scale in (0.5, -1.5, 0, 2, np.float32(0.25)):
        verify(backend, name, grad, y, scale=scale)
    for shape in [(), (1,), (5, 1), (4, 1, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify(backend, name, grad, y, scale=scale.astype(np.float32))
        verify(backend, name, grad, y, scale=scale)
    scale = (rng.integers(-8, 9, (1, 5, 33)) / 8).astype(np.float32)
    verify(backend, name, grad, y, 0, scale=scale)


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "strided", "fortran"])
def test_out(backend, rng, name, layout):
    grad, y = pair(rng, name, (5, 129))
    guard = Guarded(backend, y.shape, y.dtype, layout)
    function = getattr(cuattn, f"{name}_backward")
    assert function(backend.asarray(grad), backend.asarray(y), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), name, grad, y)
    guard.check_rim()


@BOTH
@pytest.mark.parametrize("n", [33, 1025, 32769])
@pytest.mark.parametrize("target", ["grad", "y"])
def test_in_place(backend, rng, name, target, n):
    grad, y = pair(rng, name, (2, n))
    device = {"grad": backend.asarray(grad.copy()), "y": backend.asarray(y.copy())}
    function = getattr(cuattn, f"{name}_backward")
    assert function(device["grad"], device["y"], out=device[target]) is device[target]
    compare(backend.asnumpy(device[target]), name, grad, y)


@BOTH
def test_one_array_for_both(backend, rng, name):
    _, y = pair(rng, name, (3, 33))
    verify(backend, name, y, y)


@BOTH
def test_zero_dimensions(backend, name):
    y = np.array(1.0 if name == "softmax" else 0.0, np.float32)
    for axis in (-1, 0, None):
        assert verify(backend, name, np.array(3.0, np.float32), y, axis).shape == ()


@BOTH
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, name, shape):
    x = np.zeros(shape, np.float32)
    for axis in [None, *range(-len(shape), len(shape))]:
        verify(backend, name, x, x, axis)


@BOTH
@pytest.mark.parametrize("n", [3, 33, 1025])
def test_special_values(backend, rng, name, n):
    """A NaN or an infinity spoils its own row, exactly as the formula says, and no other.

    No probability underflows, or ``inf * 0`` would depend on what the device flushes.
    """
    specials = np.stack([row for _, row in cases.special_rows(rng, n)])
    x, grad = rng.standard_normal((2, *specials.shape)).astype(np.float32)
    y = getattr(reference, name)(x, dtype=x.dtype)
    plain = verify(backend, name, grad, y)
    grad[::2] = specials[::2]
    got = verify(backend, name, grad, y)
    np.testing.assert_array_equal(got[1::2], plain[1::2])
    y[1] = NAN
    verify(backend, name, grad, y)


@BOTH
def test_gradient_of_a_masked_row(backend, rng, name):
    """What did not take part has probability 0 and gets no gradient; log_softmax gives it -inf."""
    x, where = draw(rng, (5, 33)), rng.random((5, 33)) < 0.6
    where[1] = False
    y = getattr(reference, name)(x, where=where, dtype=x.dtype)
    grad = draw(rng, x.shape)
    got = verify(backend, name, grad, y)
    if name == "softmax":
        assert (got[~where] == 0).all()


@BOTH
def test_the_gradient_of_a_constant_direction_is_zero(backend, rng, name):
    """softmax(x + c) = softmax(x), so the gradient sums to zero along the axis."""
    grad, y = pair(rng, name, (5, 1025))
    dx = verify(backend, name, grad, y)
    terms = TERMS[f"{name}_backward"](grad, y).sum(-1)
    naive = exact(NAIVE[f"{name}_backward"](grad, y)).sum(-1)
    assert_close(exact(dx).sum(-1).astype(dx.dtype), np.zeros(5), naive, terms=terms)


@BOTH
@pytest.mark.parametrize("n", [33, 1025, 300001])
def test_two_runs_are_bitwise_equal(backend, rng, name, n):
    grad, y = (backend.asarray(a) for a in pair(rng, name, (2, n)))
    function = getattr(cuattn, f"{name}_backward")
    assert (
        backend.asnumpy(function(grad, y)).tobytes() == backend.asnumpy(function(grad, y)).tobytes()
    )


@pytest.mark.parametrize("case", range(20))
def test_random_call(backend, rng, case):
    name = rng.choice(["softmax", "log_softmax"])
    y = cases.random_view(rng, rng.choice(["float32", "float16", "bfloat16", "float64"]))
    axis = cases.random_axis(rng, y.ndim)
    grad = draw(rng, y.shape, y.dtype.name, 1.0)
    if name == "softmax":
        y = reference.softmax(y, axis, dtype=y.dtype)
    else:
        y = np.asarray(np.minimum(y, np.asarray(0, y.dtype)))
    options = {}
    if rng.random() < 0.5:
        shape = np.sum(y, axis, keepdims=True).shape
        options["scale"] = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, name, grad, y, axis, **options)
