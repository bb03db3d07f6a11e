"""Ends of the range, on every backend, against float64: huge scores and scales, sums next to 1, and
results below the smallest normal number."""

from __future__ import annotations

import numpy as np
import pytest
from tolerance import FLOATS, dtype_of, exact

import cuattn
from cuattn import reference

HUGE = (1e9, 1e30, 3.4e38)


def rows(size, dtype="float32"):
    """Scores of either sign, alone, equal, one unit apart, and as padding beside ordinary ones."""
    below = np.nextafter(np.float32(size), np.float32(0))
    found = [
        [size, 0, 1, 2],
        [-size, 0, 1, 2],
        [size, size, -size, 0],
        [-size, -size, -size, -size],
    ]
    found += [[size, below, 0, -size], [-size, -below, -size, -size], [-size, 3, -size, -size]]
    return np.array(found, dtype)


def close(got, want, *, relative=1e-5, least=0.0):
    got, want = exact(got), exact(want)
    with np.errstate(all="ignore"):
        want = np.where(abs(want) > np.finfo(np.float32).max, np.sign(want) * np.inf, want)
    np.testing.assert_allclose(got, want, rtol=relative, atol=least)


@pytest.mark.parametrize("size", HUGE)
@pytest.mark.parametrize("axis", [0, 1])
def test_huge_scores(backend, size, axis):
    x = rows(size) if axis == 1 else np.ascontiguousarray(rows(size).T)
    given = backend.asarray(x)
    wide = x.astype(np.float64)
    for name in ("softmax", "log_softmax", "logsumexp"):
        got = backend.asnumpy(getattr(cuattn, name)(given, axis))
        close(got, getattr(reference, name)(wide, axis), least=1e-7)
    p, lse = cuattn.softmax(given, axis, return_lse=True)
    close(backend.asnumpy(p), reference.softmax(wide, axis), least=1e-7)
    close(backend.asnumpy(lse), reference.logsumexp(wide, axis))
    state = cuattn.softmax_state(given, axis)
    parts = np.split(x, 2, axis)
    merged = cuattn.merge(*(cuattn.softmax_state(backend.asarray(part), axis) for part in parts))
    for made in (state, merged):
        close(backend.asnumpy(made.m), wide.max(axis))
        close(backend.asnumpy(made.l), reference.softmax_state(wide, axis).l)
    best = cuattn.softmax_topk(given, 3, axis=axis, return_lse=True)
    want = reference.softmax_topk(wide, 3, axis=axis, return_lse=True)
    np.testing.assert_array_equal(backend.asnumpy(best.indices), want.indices)
    close(backend.asnumpy(best.values), want.values, least=1e-7)
    close(backend.asnumpy(best.lse), want.lse)


@pytest.mark.parametrize("size", HUGE)
def test_huge_scores_of_segments_and_gradients(backend, rng, size):
    x = rows(size)
    flat = backend.asarray(x.reshape(-1))
    ends = backend.asarray(np.arange(0, x.size + 1, x.shape[1]))
    got = backend.asnumpy(cuattn.segment_softmax(flat, ends))
    close(got.reshape(x.shape), reference.softmax(x.astype(np.float64)), least=1e-7)
    y = reference.softmax(rng.standard_normal(x.shape)).astype(np.float32)
    grad = x / 8  # sums of four stay finite
    for name, forward in (("softmax_backward", y), ("log_softmax_backward", np.log(y))):
        got = getattr(cuattn, name)(backend.asarray(grad), backend.asarray(forward))
        want = getattr(reference, name)(grad.astype(np.float64), forward.astype(np.float64))
        close(backend.asnumpy(got), want, least=size * 1e-6)


# Tiny elements under a huge scale have ordinary scores; others pass float32's range.
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("x", "scale"),
    [
        ([2e-38, 3e-38, -1e-38, 0], 2.5e38),
        ([1e20, 2e20, 1.5e20, -3e38], 1e20),
        ([3e38, 2e38, -3e38, 1], 3.3),
        ([-3e38, -3.1e38, -3e38, -3.2e38], 1e9),
        ([1.25, 3.5, -2.0, 0.125], 3.0),
    ],
)
def test_scaled_scores_beyond_the_range(backend, x, scale, sign):
    x = np.float32(x)[None]
    options = {"scale": sign * float(np.float32(scale))}
    wide, given = x.astype(np.float64), backend.asarray(x)
    for axis, array in ((1, given), (0, backend.asarray(np.ascontiguousarray(x.T)))):
        want = reference.softmax(wide, **options)
        got = backend.asnumpy(cuattn.softmax(array, axis, **options)).reshape(want.shape)
        close(got, want, least=1e-7)
        got = backend.asnumpy(cuattn.log_softmax(array, axis, **options)).reshape(want.shape)
        close(got, reference.log_softmax(wide, **options), least=1e-6)
        _, lse = cuattn.softmax(array, axis, return_lse=True, **options)
        close(backend.asnumpy(lse), reference.softmax(wide, return_lse=True, **options)[1])
    scales = np.float32([[options["scale"]]])  # of each row
    got = backend.asnumpy(cuattn.softmax(given, scale=backend.asarray(scales)))
    close(got, reference.softmax(wide, **options), least=1e-7)
    ends = backend.asarray(np.array([0, 1, 4]))
    got = cuattn.segment_softmax(backend.asarray(x[0]), ends, scale=options["scale"])
    want = reference.segment_softmax(wide[0], np.array([0, 1, 4]), **options)
    close(backend.asnumpy(got), want, least=1e-7)
    best = cuattn.softmax_topk(given, 4, **options)
    order = np.argsort(-wide[0] * options["scale"], kind="stable")
    np.testing.assert_array_equal(backend.asnumpy(best.indices)[0], order)
    close(backend.asnumpy(best.values), reference.softmax(wide, **options)[:, order], least=1e-7)
    logits = cuattn.softmax_topk(given, 4, output="logit", **options)
    close(backend.asnumpy(logits.values), (wide * options["scale"])[:, order])


def near_one(rng, dtype, n):
    """One element at 0, the others so far below that their sum is lost beside 1."""
    x = rng.uniform(-40, -20, (3, n)) if dtype == "float64" else rng.uniform(-25, -17, (3, n))
    x = x.astype(dtype_of(dtype))
    places = (np.arange(3) + rng.random(3)) / 3 * n  # early, in the middle, late
    x[np.arange(3), places.astype(int)] = 0
    return x


@pytest.mark.parametrize("n", [2, 33, 1000, 3000, 5000, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_next_to_one(backend, rng, dtype, n):
    """As SciPy from 1.15 on: to the digits of the terms, not to those of 1."""
    x = near_one(rng, dtype, n)
    p = np.exp(exact(x))
    want = np.log1p(np.sum(np.where(x == 0, 0, p), axis=1))
    relative = 1e-4 if dtype == "float32" else 1e-11
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        given = backend.asarray(array)
        close(backend.asnumpy(cuattn.logsumexp(given, axis)), want, relative=relative)
        ones = backend.asarray(np.ones_like(array))
        close(backend.asnumpy(cuattn.logsumexp(given, axis, b=ones)), want, relative=relative)
        _, lse = cuattn.softmax(given, axis, return_lse=True)
        close(backend.asnumpy(lse), want, relative=relative)
        got = backend.asnumpy(cuattn.log_softmax(given, axis))
        close(got.max(axis), -want, relative=relative)


@pytest.mark.parametrize("n", [3, 3000])
def test_maxima_that_occur_often(backend, rng, n):
    """All of them but one belong to the rest."""
    x = rng.uniform(-30, -20, (4, n)).astype(np.float32)
    for row, count in zip(x, (1, 2, 3, n), strict=True):
        row[rng.permutation(n)[:count]] = rng.integers(-3, 4)
    want = reference.logsumexp(x.astype(np.float64), 1)
    close(backend.asnumpy(cuattn.logsumexp(backend.asarray(x), 1)), want, least=2e-7)
    got = backend.asnumpy(cuattn.log_softmax(backend.asarray(x), 1))
    close(got, reference.log_softmax(x.astype(np.float64), 1), least=2e-7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2, 300, 5000])
def test_subnormal_probabilities(backend, rng, dtype, n):
    """Each to a unit of the smallest number, also where it stands far from the maximum."""
    lowest = -740 if dtype == "float64" else -101
    x = np.linspace(lowest, 0, n)[rng.permutation(n)][None].astype(dtype_of(dtype))
    if n == 5000:
        x[0, 1024:] = lowest  # warps that see nothing else
        x[0, 0] = 0
    want = reference.softmax(exact(x))
    if dtype == "float16":
        least, relative = 2.0**-24, 2e-3
    else:
        least = {"bfloat16": 2.0**-133, "float32": 2 * 2.0**-149, "float64": 2 * 5e-324}[dtype]
        relative = {"bfloat16": 2.0**-7, "float32": 3e-5, "float64": 1e-11}[dtype]
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        got = backend.asnumpy(cuattn.softmax(backend.asarray(array), axis)).reshape(want.shape)
        np.testing.assert_allclose(exact(got), want, rtol=relative, atol=least)
        assert (np.asarray(got)[want > 1.01 * least] > 0).all()


def test_subnormal_gradients_and_sums(backend):
    x = np.float32([[0, -95, -100]])
    got = backend.asnumpy(cuattn.logsumexp(backend.asarray(x), 1))
    close(got, np.exp(-95.0) + np.exp(-100.0), relative=1e-3)
    grad = np.float32([[1, 0, 0]])
    got = backend.asnumpy(cuattn.log_softmax_backward(backend.asarray(grad), backend.asarray(x)))
    close(got[0, 1:], -np.exp(np.float64([-95, -100])), relative=0.02)
