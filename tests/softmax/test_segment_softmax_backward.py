"""segment_softmax_backward: the gradient of each segment of axis 0, on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from test_segment_softmax import MIXED, offsets
from tolerance import NAIVE, TERMS, assert_close, exact

import cuattn
from cuattn import reference
from cuattn._arrays import checks


def of_each(function, grad, y, cu_seqlens, scale=None):
    """A function of grad and y along axis 0, of each segment."""
    found = np.zeros_like(function(grad, y, 0))
    scales = None if scale is None else np.broadcast_to(scale, (len(cu_seqlens) - 1, *y.shape[1:]))
    for i in range(len(cu_seqlens) - 1):
        part = slice(cu_seqlens[i], cu_seqlens[i + 1])
        one = None if scales is None else scales[i]
        found[part] = function(grad[part], y[part], 0, scale=one)
    return found


def compare(got, grad, y, cu_seqlens, **options):
    assert got.dtype == y.dtype
    ref = reference.segment_softmax_backward(exact(grad), exact(y), cu_seqlens, **options)
    naive, terms = (
        of_each(table["softmax_backward"], grad, y, cu_seqlens, **options)
        for table in (NAIVE, TERMS)
    )
    assert_close(got, ref, naive, terms=terms)


def verify(backend, grad, y, cu_seqlens, **options):
    before = grad.tobytes(), y.tobytes()
    kwargs = {
        key: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    inputs = backend.asarray(grad), backend.asarray(y)
    got = cuattn.segment_softmax_backward(*inputs, backend.asarray(cu_seqlens), **kwargs)
    assert backend.ran() or y.size == 0
    assert isinstance(got, backend.xp.ndarray)
    compare(backend.asnumpy(got), grad, y, cu_seqlens, **options)
    assert (backend.asnumpy(inputs[0]).tobytes(), backend.asnumpy(inputs[1]).tobytes()) == before
    return backend.asnumpy(got)


def pair(rng, shape, cu_seqlens, dtype="float32"):
    """A gradient, and the result of `segment_softmax` in the dtype."""
    x = draw(rng, shape, dtype)
    y = reference.segment_softmax(x, cu_seqlens).astype(x.dtype)
    return draw(rng, shape, dtype, 1.0), y


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_mixed_lengths(backend, rng, dtype, index):
    cu_seqlens = offsets(MIXED, index)
    verify(backend, *pair(rng, sum(MIXED), cu_seqlens, dtype), cu_seqlens)


@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [33], [1025], [12000], [0, 12000, 3], [1] * 65, [0] * 5 + [3], [3] + [0] * 5],
)
def test_lengths(backend, rng, lengths):
    verify(backend, *pair(rng, sum(lengths), offsets(lengths)), offsets(lengths))


@pytest.mark.parametrize("high", [5, 40])
def test_many_segments(backend, rng, high):
    cu_seqlens = offsets(rng.integers(0, high, 300), np.int32)
    verify(backend, *pair(rng, int(cu_seqlens[-1]), cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing(backend, lengths):
    for shape in [(0,), (0, 3), (0, 0)]:
        x = np.zeros(shape, np.float32)
        verify(backend, x, x, offsets(lengths))


def test_no_columns(backend):
    x = np.zeros((5, 0), np.float32)
    verify(backend, x, x, offsets([2, 3]))


COLUMNS = offsets([0, 1, 5, 33, 2, 0, 70])


@pytest.mark.parametrize("columns", [1, 2, 4, 33, 200])
def test_columns(backend, rng, columns):
    verify(backend, *pair(rng, (COLUMNS[-1], columns), COLUMNS), COLUMNS)


@pytest.mark.parametrize("columns", [3, 40])
def test_long_columns(backend, rng, columns):
    cu_seqlens = offsets([5000, 2, 0, 300])
    verify(backend, *pair(rng, (cu_seqlens[-1], columns), cu_seqlens), cu_seqlens)


def test_three_dimensions(backend, rng):
    cu_seqlens = offsets([7, 0, 33])
    verify(backend, *pair(rng, (40, 3, 5), cu_seqlens), cu_seqlens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("columns", [(), (5,)])
def test_layout(backend, rng, layout, columns):
    """Both in the layout, then each alone."""
    grad, y = pair(rng, (COLUMNS[-1], *columns), COLUMNS)
    verify(backend, LAYOUTS[layout](grad), LAYOUTS[layout](y), COLUMNS)
    verify(backend, LAYOUTS[layout](grad), y, COLUMNS)
    verify(backend, grad, LAYOUTS[layout](y), COLUMNS)


def test_not_collapsible(backend, rng):
    grad, y = pair(rng, (40, 2, 2, 2, 3), cu_seqlens := offsets([7, 0, 33]))
    wide = np.ones((2, 80, 4, 4, 4, 6), np.float32)
    views = [one[::2, ::-2, ::2, 1::2, ::-2] for one in wide]
    for view, a in zip(views, (grad, y), strict=True):
        view[...] = a
    verify(backend, *views, cu_seqlens)


def test_offsets_may_be_strided(backend, rng):
    cu_seqlens = offsets([7, 0, 33])
    grad, y = pair(rng, 40, cu_seqlens)
    verify(backend, grad, y, np.repeat(cu_seqlens, 2)[::2])
    verify(backend, grad, y, np.flip(np.flip(cu_seqlens).copy()))


def test_scale(backend, rng):
    grad, y = pair(rng, COLUMNS[-1], COLUMNS)
    for scale in (0.5, -1, 0.0, np.float32(2)):
        verify(backend, grad, y, COLUMNS, scale=scale)
    for shape in [(), (1,), (7,)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify(backend, grad, y, COLUMNS, scale=scale.astype(np.float32))
    grad, y = pair(rng, (COLUMNS[-1], 3), COLUMNS)
    for shape in [(3,), (7, 1), (1, 3), (7, 3)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify(backend, grad, y, COLUMNS, scale=scale)


def test_scale_of_long_segments(backend, rng):
    cu_seqlens = offsets([5000, 3, 9000])
    grad, y = pair(rng, cu_seqlens[-1], cu_seqlens)
    verify(backend, grad, y, cu_seqlens, scale=np.array([0.5, -2, 1.5], np.float32))


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "strided"])
@pytest.mark.parametrize("columns", [(), (5,)])
def test_out(backend, rng, layout, columns):
    cu_seqlens = offsets(MIXED)
    grad, y = pair(rng, (sum(MIXED), *columns), cu_seqlens)
    guard = Guarded(backend, y.shape, y.dtype, layout)
    arrays = map(backend.asarray, (grad, y, cu_seqlens))
    assert cuattn.segment_softmax_backward(*arrays, out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), grad, y, cu_seqlens)
    guard.check_rim()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("target", ["grad", "y"])
@pytest.mark.parametrize("lengths", [MIXED, [5000, 12000]], ids=["mixed", "long"])
def test_in_place(backend, rng, target, lengths, dtype):
    cu_seqlens = offsets(lengths)
    grad, y = pair(rng, sum(lengths), cu_seqlens, dtype)
    device = {"grad": backend.asarray(grad.copy()), "y": backend.asarray(y.copy())}
    got = cuattn.segment_softmax_backward(
        *device.values(), backend.asarray(cu_seqlens), out=device[target]
    )
    assert got is device[target]
    compare(backend.asnumpy(got), grad, y, cu_seqlens)


def test_one_array_for_both(backend, rng):
    _, y = pair(rng, COLUMNS[-1], COLUMNS)
    verify(backend, y, y, COLUMNS)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values(backend, rng, value):
    """At the first, a middle and the last place of a segment; its neighbours do not see it."""
    cu_seqlens = offsets([4, 33, 1, 129, 5])
    grad = draw(rng, cu_seqlens[-1], spread=1.0)
    x = rng.standard_normal(len(grad)).astype(np.float32)
    y = reference.segment_softmax(x, cu_seqlens).astype(np.float32)
    plain = verify(backend, grad, y, cu_seqlens)
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        others = np.ones(len(x), bool)
        others[begin:end] = False
        for place in {begin, (begin + end) // 2, end - 1}:
            for changed in (0, 1):
                given = [grad.copy(), y.copy()]
                given[changed][place] = value
                got = verify(backend, *given, cu_seqlens)
                np.testing.assert_array_equal(got[others], plain[others])


def test_equal_segments_are_rows(backend, rng):
    cu_seqlens = offsets([33] * 6)
    grad, y = pair(rng, 6 * 33, cu_seqlens)
    got = verify(backend, grad, y, cu_seqlens).reshape(6, 33)
    grad, y = grad.reshape(6, 33), y.reshape(6, 33)
    ref = reference.softmax_backward(exact(grad), exact(y))
    function, terms = NAIVE["softmax_backward"], TERMS["softmax_backward"](grad, y)
    assert_close(got, ref, function(grad, y), terms=terms)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_bits_do_not_depend_on_other_segments(backend, rng, columns):
    """The same segments in another order, and of other neighbours; the mean length the same."""
    lengths = np.array([300, 40, 9, 0, 700, 6000, 5])
    cu_seqlens = offsets(lengths)
    given = pair(rng, (cu_seqlens[-1], *columns), cu_seqlens)
    found = cuattn.segment_softmax_backward(*map(backend.asarray, (*given, cu_seqlens)))
    found = np.split(backend.asnumpy(found), cu_seqlens[1:-1])
    order = rng.permutation(len(lengths))
    moved = (np.concatenate([np.split(a, cu_seqlens[1:-1])[i] for i in order]) for a in given)
    ends = offsets(lengths[order])
    again = cuattn.segment_softmax_backward(*map(backend.asarray, (*moved, ends)))
    again = np.split(backend.asnumpy(again), ends[1:-1])
    for i, part in zip(order, again, strict=True):
        assert part.tobytes() == found[i].tobytes()


@pytest.mark.parametrize("columns", [(), (3,)])
def test_offsets_outside(backend, rng, monkeypatch, columns):
    """Offsets on a device are not looked at; whatever they hold, a segment stays inside."""
    if backend.name == "numpy":
        pytest.skip("offsets on the host are checked")
    monkeypatch.setattr(checks, "ends", lambda *_: None)
    wide = np.full((2, 60, *columns), NAN, np.float32)
    wide[:, 10:50] = rng.standard_normal((2, 40, *columns))
    given = wide[:, 10:50]
    for low, high in [(-7, 99), (np.iinfo(np.int64).min, np.iinfo(np.int64).max)]:
        guard = Guarded(backend, given.shape[1:], np.float32, "misaligned")
        ends = backend.asarray(np.array([low, 5, high]))
        cuattn.segment_softmax_backward(*map(backend.asarray, given), ends, out=guard.out)
        compare(backend.asnumpy(guard.out), *given, np.array([0, 5, 40]))
        guard.check_rim()


@pytest.mark.parametrize("scale", [None, -1.5])
def test_central_differences(backend, rng, scale):
    """Of ``sum(grad * segment_softmax(x))`` in float64; each column is x with one element moved."""
    cu_seqlens, step = offsets([3, 0, 1, 9]), 1e-5
    x, grad = rng.standard_normal((2, 13))
    moved = x[:, None] + step * np.concatenate([np.eye(13), -np.eye(13)], axis=1)
    ends = backend.asarray(cu_seqlens)
    y = backend.asnumpy(cuattn.segment_softmax(backend.asarray(moved), ends, scale=scale))
    there, back = np.split(grad @ y, 2)
    y = cuattn.segment_softmax(backend.asarray(x), ends, scale=scale)
    got = cuattn.segment_softmax_backward(backend.asarray(grad), y, ends, scale=scale)
    got, want = backend.asnumpy(got), (there - back) / (2 * step)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-8 * max(1, abs(got).max()))


@pytest.mark.parametrize("case", range(15))
def test_random_call(backend, rng, case):
    lengths = rng.choice([0, 0, 1, 2, 3, 9, 40, 200], int(rng.integers(1, 12)))
    shape = [int(lengths.sum()), *rng.integers(1, 6, int(rng.integers(0, 3)))]
    cu_seqlens = offsets(lengths, rng.choice([np.int32, np.int64]))
    dtype = rng.choice(["float32", "float16", "bfloat16", "float64"])
    given = pair(rng, shape, cu_seqlens, dtype)
    grad, y = (LAYOUTS[rng.choice(list(LAYOUTS))](a) if a.size else a for a in given)
    scale = None if rng.random() < 0.5 else float(rng.integers(-8, 9) / 8)
    verify(backend, grad, y, cu_seqlens, scale=scale)


@pytest.mark.parametrize("n", [3, 33])
def test_special_rows(backend, rng, n):
    rows = [row for _, row in cases.special_rows(rng, n)]
    cu_seqlens = offsets([n] * len(rows))
    x = rng.standard_normal(cu_seqlens[-1]).astype(np.float32)
    y = reference.segment_softmax(x, cu_seqlens).astype(np.float32)
    verify(backend, np.concatenate(rows), y, cu_seqlens)
