"""`where` of softmax_backward and log_softmax_backward, on every backend.

What does not take part holds NaN, infinities and numbers in grad and y: none may reach a result.
"""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from test_softmax_backward import BOTH, compare, verify

import cuattn
from cuattn import reference


def spoilt(rng, a, where):
    """`a` with something else wherever `where` is False."""
    hidden = ~np.broadcast_to(where, a.shape)
    a = a.copy()
    a[hidden] = rng.choice([NAN, INF, -INF, 1e4, -0.5], np.count_nonzero(hidden)).astype(a.dtype)
    return a


def masked(rng, name, shape, dtype="float32", axis=-1, where=None):
    """grad, y and `where`: the result of the forward function, spoilt."""
    x = draw(rng, shape, dtype)
    where = rng.random(shape) < 0.6 if where is None else where
    y = getattr(reference, name)(x, axis, where=where, dtype=x.dtype)
    grad = draw(rng, shape, dtype, 1.0)
    return spoilt(rng, grad, where), spoilt(rng, y, where), where


def verify_masked(backend, name, grad, y, where, axis=-1, **options):
    got = verify(backend, name, grad, y, axis, where=where, **options)
    hidden = ~np.broadcast_to(where, got.shape)
    assert not got[hidden].tobytes().strip(b"\0")  # 0.0, not -0.0
    return got


@BOTH
@pytest.mark.parametrize("n", [1, *cases.FEW_LENGTHS])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype(backend, rng, name, dtype, n):
    verify_masked(backend, name, *masked(rng, name, (3, n), dtype))


@BOTH
@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, name, rows, n):
    verify_masked(backend, name, *masked(rng, name, (rows, n)))


@BOTH
@pytest.mark.parametrize("n", [33, 128])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, name, layout, n):
    """All in the layout, then each alone."""
    given = masked(rng, name, (5, n))
    verify_masked(backend, name, *map(LAYOUTS[layout], given))
    for i in range(3):
        mixed = [LAYOUTS[layout](a) if i == j else a for j, a in enumerate(given)]
        verify_masked(backend, name, *mixed)


@BOTH
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), (0, 1, 2), None, ()])
def test_axis(backend, rng, name, axis):
    verify_masked(backend, name, *masked(rng, name, (4, 5, 33), axis=axis), axis)


@BOTH
@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (1025, 5), (33000, 2)])
def test_first_axis(backend, rng, name, shape):
    verify_masked(backend, name, *masked(rng, name, shape, axis=0), 0)


@BOTH
@pytest.mark.parametrize("axis", [-1, 2, (1, 3)])
def test_not_collapsible(backend, rng, name, axis):
    view = np.s_[::2, ::-1, :, 1:8:3, ::-2]
    given = masked(rng, name, (3, 4, 3, 3, 4), axis=axis)
    wide = [np.ones((6, 4, 3, 10, 7), a.dtype) for a in given]
    for into, a in zip(wide, given, strict=True):
        into[view] = a
    verify_masked(backend, name, *(a[view] for a in wide), axis)


@BOTH
def test_broadcast(backend, rng, name):
    for shape in [(33,), (1,), (5, 1), (4, 1, 1), (1, 5, 33), (4, 5, 33)]:
        where = rng.random(shape) < 0.6
        verify_masked(backend, name, *masked(rng, name, (4, 5, 33), where=where))
        verify_masked(backend, name, *masked(rng, name, (4, 5, 33), axis=0, where=where), 0)


@BOTH
def test_one_bool(backend, rng, name):
    for where in (True, False, np.bool_(True), np.bool_(False), np.array(True), np.array(False)):
        verify_masked(backend, name, *masked(rng, name, (5, 33), where=where))


@BOTH
@pytest.mark.parametrize("n", [3, 33, 1025, 4097])
def test_nothing_takes_part(backend, rng, name, n):
    """In some rows, or in any."""
    where = rng.random((5, n)) < 0.6
    where[1::2] = False
    for scale in (None, 2, NAN):
        verify_masked(backend, name, *masked(rng, name, (5, n), where=where), scale=scale)
    where = np.zeros((5, n), bool)
    verify_masked(backend, name, *masked(rng, name, (5, n), where=where))


@BOTH
def test_scale(backend, rng, name):
    given = masked(rng, name, (4, 5, 33))
    for scale in (0.5, -1.5, 0, np.float32(0.25), NAN):
        verify_masked(backend, name, *given, scale=scale)
    for shape in [(), (1,), (5, 1), (4, 1, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify_masked(backend, name, *given, scale=scale)


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "strided", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_out(backend, rng, name, layout, dtype):
    grad, y, where = masked(rng, name, (5, 129), dtype)
    guard = Guarded(backend, y.shape, y.dtype, layout)
    function, inputs = getattr(cuattn, f"{name}_backward"), map(backend.asarray, (grad, y))
    assert function(*inputs, where=backend.asarray(where), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), name, grad, y, where=where)
    guard.check_rim()


@BOTH
@pytest.mark.parametrize("shape, axis", [((2, 33), 1), ((2, 1025), 1), ((2, 32769), 1)])
@pytest.mark.parametrize("target", ["grad", "y"])
def test_in_place(backend, rng, name, target, shape, axis):
    grad, y, where = masked(rng, name, shape, axis=axis)
    device = {"grad": backend.asarray(grad.copy()), "y": backend.asarray(y.copy())}
    function = getattr(cuattn, f"{name}_backward")
    got = function(
        device["grad"], device["y"], axis, where=backend.asarray(where), out=device[target]
    )
    assert got is device[target]
    compare(backend.asnumpy(got), name, grad, y, axis, where=where)


@BOTH
def test_no_elements(backend, name):
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 3)]:
        x, where = np.zeros(shape, np.float32), np.zeros(shape, bool)
        for axis in [None, *range(-len(shape), len(shape))]:
            verify(backend, name, x, x, axis, where=where)
    number = np.array(NAN, np.float32)
    assert verify(backend, name, number, number, where=np.array(False)) == 0


@BOTH
@pytest.mark.parametrize(
    "shape, axis", [((3, 33), 1), ((3, 1025), 1), ((2, 50257), 1), ((300, 5), 0)]
)
def test_what_is_hidden_changes_no_bit(backend, rng, name, shape, axis):
    grad, y, where = masked(rng, name, shape, axis=axis)
    function, device_where = getattr(cuattn, f"{name}_backward"), backend.asarray(where)
    found = set()
    for _ in range(3):
        other = (backend.asarray(spoilt(rng, a, where)) for a in (grad, y))
        found.add(backend.asnumpy(function(*other, axis, where=device_where)).tobytes())
    assert len(found) == 1


@BOTH
@pytest.mark.parametrize("n", [3, 33, 1025])
def test_special_values(backend, rng, name, n):
    """A NaN or an infinity that takes part spoils what takes part in its row, and nothing else."""
    specials = np.stack([row for _, row in cases.special_rows(rng, n)])
    where = rng.random(specials.shape) < 0.6
    x, grad = rng.standard_normal((2, *specials.shape)).astype(np.float32)
    y = getattr(reference, name)(x, where=where, dtype=x.dtype)
    plain = verify_masked(backend, name, grad, y, where)
    grad[::2] = specials[::2]
    got = verify_masked(backend, name, grad, y, where)
    np.testing.assert_array_equal(got[1::2], plain[1::2])


@BOTH
@pytest.mark.parametrize("scale", [None, -1.5])
def test_central_differences(backend, rng, name, scale):
    """Of ``sum(grad * f(x))`` over what takes part, in float64: of x that does not, they are 0."""
    forward, backward = getattr(cuattn, name), getattr(cuattn, f"{name}_backward")
    (x, grad), where = rng.standard_normal((2, 3, 7)), rng.random((3, 7)) < 0.6
    where[1] = False
    step = 1e-5
    moved = x + step * np.stack([np.eye(x.size), -np.eye(x.size)]).reshape(2, -1, *x.shape)
    mask = backend.asarray(where)
    y = backend.asnumpy(forward(backend.asarray(moved), scale=scale, where=mask))
    total = np.sum(np.where(where, grad * np.where(where, y, 0), 0), axis=(-2, -1))
    want = ((total[0] - total[1]) / (2 * step)).reshape(x.shape)
    y = forward(backend.asarray(x), scale=scale, where=mask)
    got = backend.asnumpy(backward(backend.asarray(grad), y, scale=scale, where=mask))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * max(1, abs(got).max()))


@pytest.mark.parametrize("case", range(20))
def test_random_call(backend, rng, case):
    name = rng.choice(["softmax", "log_softmax"])
    x = cases.random_view(rng, rng.choice(["float32", "float16", "bfloat16", "float64"]))
    axis = cases.random_axis(rng, x.ndim)
    shape = [1 if rng.random() < 0.3 else n for n in x.shape][int(rng.integers(x.ndim + 1)) :]
    options, where = {}, np.asarray(rng.random(shape) < 0.6)
    y = getattr(reference, name)(x, axis, where=where, dtype=x.dtype)
    y = np.where(np.isnan(y), np.asarray(0, y.dtype), y)
    if rng.random() < 0.5:
        rows = np.sum(x, axis, keepdims=True).shape
        options["scale"] = np.asarray(rng.integers(-8, 9, rows) / 8).astype(np.float32)
    grad = spoilt(rng, draw(rng, x.shape, x.dtype.name, 1.0), where)
    verify_masked(backend, name, grad, spoilt(rng, np.asarray(y), where), where, axis, **options)
