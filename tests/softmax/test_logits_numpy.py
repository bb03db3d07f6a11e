"""What only the path of NumPy arrays has of losses, entropies and states: rows in parts, blocks
that are computed twice, and no copy of x. Bits by company and threads are in test_numpy_path.py."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from tolerance import FLOATS, dtype_of

import cuattn
from cuattn import reference
from cuattn._softmax import numpy_rows

SHAPES = [(300, 40), (40, 300), (1 << 18, 3), (3, (1 << 18) + 7), (2, (1 << 20) + 1)]


def drawn(rng, shape, axis, dtype):
    """x, and labels in the first, the last and any part of the rows, one in four ignored."""
    x = (3 * rng.standard_normal(shape)).astype(dtype_of(dtype))
    n, rows = shape[axis], np.delete(shape, axis)
    labels = rng.choice([0, n - 1, n // 2, int(rng.integers(n))], rows)
    return x, np.where(rng.random(rows) < 0.25, -100, labels)


@pytest.mark.drawn
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_labels_in_any_part_of_a_row(rng, shape, axis, dtype):
    x, labels = drawn(rng, shape, axis, dtype)
    loss, lse = cuattn.cross_entropy(x, labels, axis=axis, return_lse=True)
    want, want_lse = reference.cross_entropy(x, labels, axis=axis, return_lse=True)
    near = 1e-13 if dtype == "float64" else 1e-5
    np.testing.assert_allclose(loss, want, rtol=near)
    np.testing.assert_allclose(lse, want_lse, rtol=near, atol=near)
    apart = cuattn.cross_entropy_backward(2.0, x, labels, lse, axis=axis)
    ref = reference.cross_entropy_backward(2.0, x, labels, lse, axis=axis)
    near = {"float16": 1e-3, "bfloat16": 1e-2}.get(dtype, near)
    np.testing.assert_allclose(
        apart.astype(np.float64), ref, rtol=near, atol=near * abs(ref).max() / 64
    )
    np.testing.assert_array_equal(
        cuattn.cross_entropy_backward(2.0, x, labels, lse, axis=axis, out=x), apart
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_that_are_computed_twice(rng, monkeypatch, axis):
    """Some rows have scores beyond float32, or but the label has; also of rows in parts."""
    x = rng.standard_normal((60, 60)).astype(np.float32)
    rows = x if axis else x.T
    rows[::3] *= 1e20
    rows[1::3] = -1.15e18
    rows[1::3, 7] = -1.16e18
    labels = rng.integers(60, size=60)
    labels[1::3] = 7
    options = {"axis": axis, "scale": 2.0**68}
    for most in (numpy_rows.LONG, 17):
        monkeypatch.setattr(numpy_rows, "LONG", most)
        monkeypatch.setattr(numpy_rows, "CHUNK", min(most, numpy_rows.CHUNK))
        monkeypatch.setattr(numpy_rows, "TALL", most)
        got = cuattn.cross_entropy(x, labels, **options)
        with np.errstate(over="ignore"):
            want = reference.cross_entropy(x, labels, **options).astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        assert np.isfinite(got[1::3]).all() and np.isinf(got[::3]).any()
        h = cuattn.entropy(x, **options)
        np.testing.assert_allclose(h, reference.entropy(x, **options), rtol=1e-5, atol=1e-6)
        m, l, t, _ = cuattn.logits_state(x, labels, **options)  # noqa: E741
        assert np.isinf(m[::3]).all() and (t[::3] == l[::3]).all()


def test_terms_of_no_weight_in_any_part(rng, monkeypatch):
    """0 * -inf in rows of several parts, and parts of which nothing takes part."""
    monkeypatch.setattr(numpy_rows, "LONG", 50)
    x = rng.standard_normal((8, 200)).astype(np.float32)
    x[:, ::3] = rng.choice([-np.inf, -3e38, -1000], (8, 67))
    x[0, 20:] = -np.inf
    x[1] = -np.inf
    where = rng.random(x.shape) < 0.5
    where[2:4] = False
    where[4, :150] = False
    for part in (None, where):
        got = cuattn.entropy(x, where=part)
        np.testing.assert_allclose(got, reference.entropy(x, where=part), rtol=1e-6)
    state = cuattn.logits_state(x, np.full(8, 60))
    for got, want in zip(state, reference.logits_state(x, np.full(8, 60)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    "shape", [(1 << 23,), (1 << 10, 1 << 13), (1 << 13, 1 << 10), (64, 1 << 17)]
)
@pytest.mark.parametrize("axis", [0, -1])
def test_memory_beyond_the_result(dtype, shape, axis):
    """Of 2**23 elements, which a copy in float32 would take 32 MiB for."""
    x = np.zeros(shape, dtype)
    labels = np.zeros(np.delete(shape, axis), np.uint8)
    lse, mask = np.ones(labels.shape, np.float32), np.ones(shape, bool)
    tracemalloc.start()
    try:
        for call in (
            lambda: [*cuattn.cross_entropy(x, labels, axis=axis, scale=0.5, return_lse=True)],
            lambda: [cuattn.cross_entropy_backward(lse, x, labels, lse, axis=axis)],
            lambda: [cuattn.entropy(x, axis, where=mask)],
            lambda: [*cuattn.logits_state(x, labels, axis=axis)],
        ):
            base = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            size = sum(result.nbytes for result in call())
            assert tracemalloc.get_traced_memory()[1] - base - size < 28 << 20
    finally:
        tracemalloc.stop()
