"""cross_entropy and its gradient: values, labels, layouts and corners, on every backend."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from tolerance import FLOATS, assert_close, exact, lse_dtype, naive_log_softmax, naive_logsumexp
from tolerance import result_dtype as float_dtype

import cuattn
from cuattn import reference
from cuattn._arrays import checks

LABELS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
IGNORED = -100


def as_rows(x, axis):
    """x, and which axis its rows lie along."""
    return (x.reshape(-1), 0) if axis is None or x.ndim == 0 else (x, axis)


def draw_labels(rng, x, axis=-1, dtype="int64", ignored=0.2):
    """Labels of every row, some of them ignored where the dtype has a negative number."""
    x, axis = as_rows(x, axis)
    shape = np.delete(x.shape, axis)
    found = rng.integers(0, x.shape[axis], shape)
    if np.dtype(dtype).kind == "i":
        found = np.where(rng.random(shape) < ignored, IGNORED, found)
    return np.asarray(found).astype(dtype)


def naive_loss(x, labels, axis=-1, scale=None, ignore_index=IGNORED):
    """What NumPy computes in the dtype of the result."""
    x, axis = as_rows(x, axis)
    log_p = naive_log_softmax(x, axis, scale=scale, dtype=lse_dtype(float_dtype(x)))
    index = np.where(labels == ignore_index, 0, labels).astype(np.int64)
    picked = np.take_along_axis(log_p, np.expand_dims(index, axis), axis)
    return np.where(labels == ignore_index, 0, -np.squeeze(picked, axis)).astype(log_p.dtype)


def compare(backend, found, x, labels, **options):
    loss, lse = map(backend.asnumpy, found)
    wide = lse_dtype(float_dtype(x))
    assert loss.dtype == lse.dtype == wide
    want = reference.cross_entropy(exact(x), labels, return_lse=True, **options)
    assert_close(loss, want[0], naive_loss(x, labels, **options))
    rows, axis = as_rows(x, options.get("axis", -1))
    scale = options.get("scale")
    assert_close(lse, want[1], naive_logsumexp(rows, axis, scale=scale, dtype=wide))
    ignored = labels == options.get("ignore_index", IGNORED)
    assert (loss[ignored] == 0).all()


def verify(backend, x, labels, **options):
    before = x.tobytes(), labels.tobytes()
    given, given_labels = backend.asarray(x), backend.asarray(labels)
    kwargs = {
        name: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    found = cuattn.cross_entropy(given, given_labels, return_lse=True, **kwargs)
    assert backend.ran() or x.size == 0
    assert all(isinstance(part, backend.xp.ndarray) for part in found)
    compare(backend, found, x, labels, **options)
    alone = cuattn.cross_entropy(given, given_labels, **kwargs)
    assert backend.asnumpy(alone).tobytes() == backend.asnumpy(found[0]).tobytes()
    assert (x.tobytes(), labels.tobytes()) == before
    return [*map(backend.asnumpy, found)]


# ---- The loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, n):
    x = draw(rng, (5, n))
    verify(backend, x, draw_labels(rng, x))


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8"])
def test_dtype(backend, rng, dtype, n):
    x = draw(rng, (5, n), dtype)
    verify(backend, x, draw_labels(rng, x, dtype="int32"))


@pytest.mark.parametrize("dtype", LABELS)
def test_labels(backend, rng, dtype):
    x = draw(rng, (5, 7, 40))
    for axis in (-1, 0):
        verify(backend, x, draw_labels(rng, x, axis, dtype), axis=axis)


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    x = draw(rng, (rows, n))
    verify(backend, x, draw_labels(rng, x, ignored=0))


@pytest.mark.parametrize("n", [33, 1025])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout, n):
    x = LAYOUTS[layout](draw(rng, (5, n)))
    verify(backend, x, draw_labels(rng, x))
    verify(backend, x, draw_labels(rng, x, 0), axis=0)


def test_every_element(backend, rng):
    """Each as the label of a row of its own, wherever rows begin."""
    for n in (5, 33, 130):
        x = np.repeat(draw(rng, (1, n)), n, 0)
        verify(backend, x, np.arange(n))
        verify(backend, np.ascontiguousarray(x.T), np.arange(n), axis=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
def test_axis(backend, rng, axis):
    for layout in LAYOUTS.values():
        x = layout(draw(rng, (4, 5, 33)))
        verify(backend, x, draw_labels(rng, x, axis), axis=axis)


def test_labels_of_any_strides(backend, rng):
    x = draw(rng, (6, 4, 33))
    wide = np.zeros((12, 8), np.int32)
    for labels in (wide[::2, ::2], wide[::-2, :4], wide[:6, 7:3:-1], np.zeros((4, 6), np.int64).T):
        labels[...] = draw_labels(rng, x)
        verify(backend, x, labels)
    verify(backend, x, np.broadcast_to(np.int64(32), (6, 4)))


def test_scale(backend, rng):
    x = draw(rng, (4, 5, 33))
    labels = draw_labels(rng, x)
    for scale in (0.5, -1.5, 3.0, 0):
        verify(backend, x, labels, scale=scale)
    for shape in [(), (5, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
        verify(backend, x, labels, scale=scale)
    for scale in (np.float32(0.25), np.full((1, 1, 1), 0.25, np.float32)):
        labels = backend.asarray(draw_labels(rng, x, None, ignored=0))
        given = scale if scale.ndim == 0 else backend.asarray(scale)
        got = cuattn.cross_entropy(backend.asarray(x), labels, axis=None, scale=given)
        want = cuattn.cross_entropy(backend.asarray(x.reshape(-1)), labels, scale=0.25)
        assert backend.asnumpy(got).tobytes() == backend.asnumpy(want).tobytes()


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("n", [3, 129, 70_001])
def test_out(backend, rng, n, layout):
    x = draw(rng, (3, n))
    given = backend.asarray(x), backend.asarray(draw_labels(rng, x))
    cases.check_outs(
        backend, rng, functools.partial(cuattn.cross_entropy, *given, return_lse=True), layout
    )
    guard = Guarded(backend, (3,), np.float32, "contiguous" if layout == "mixed" else layout)
    assert cuattn.cross_entropy(*given, out=guard.out) is guard.out
    want = cuattn.cross_entropy(*given)
    assert backend.asnumpy(guard.out).tobytes() == backend.asnumpy(want).tobytes()
    guard.check_rim()


def test_many_axes(backend, rng):
    """More dimensions than kernels follow: copies."""
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, 0, 5):
        verify(backend, x, draw_labels(rng, x, axis).T.copy().T, axis=axis)


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        for label in (0, IGNORED):
            for axis in (0, -1, None):
                x = np.array(value, np.float32)
                verify(backend, x, np.array(label), axis=axis)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, shape):
    """A row of nothing has an lse of -inf; only what is ignored can be its label."""
    x = np.zeros(shape, np.float32)
    for axis in [None, *range(-len(shape), len(shape))]:
        rows, at = as_rows(x, axis)
        given = backend.asarray(x), backend.asarray(np.full(np.delete(rows.shape, at), IGNORED))
        loss, lse = cuattn.cross_entropy(*given, axis=axis, return_lse=True)
        assert (backend.asnumpy(loss) == 0).all() and (backend.asnumpy(lse) == -INF).all()
        assert loss.shape == lse.shape == given[1].shape


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_special_values(backend, rng, dtype, n):
    """As log_softmax has them, at the special element and at others."""
    rows = np.stack([row for _, row in cases.special_rows(rng, n, dtype)])
    for label in (0, n // 3, n // 2, n - 1):
        labels = np.full(len(rows), label)
        loss, _ = verify(backend, rows, labels)
        log_p = backend.asnumpy(cuattn.log_softmax(backend.asarray(rows)))[:, label]
        np.testing.assert_array_equal(np.isnan(loss), np.isnan(log_p))
        np.testing.assert_array_equal(loss == INF, log_p == -INF)


@pytest.mark.parametrize("n", [2, 300, 5000])
@pytest.mark.parametrize("scale", [1, 1e30, 1e38])
def test_huge_scores(backend, rng, n, scale):
    """Differences of scores are right wherever these lie: up to 1e30, and of a scale that takes
    them out of range."""
    x = rng.choice([-1.0, -0.5, 1.0], (6, n)).astype(np.float32)
    x[:, 0] = 1
    x *= np.float32(1e30 if scale == 1 else 2.0**-100 if scale == 1e30 else 1e-30)
    labels = np.array([0, 1, 0, n - 1, 0, IGNORED])
    options = {"scale": scale if scale == 1 else float(np.float32(scale))}
    want = reference.cross_entropy(exact(x), labels, **options)
    got = cuattn.cross_entropy(backend.asarray(x), backend.asarray(labels), **options)
    with np.errstate(over="ignore"):
        want = want.astype(np.float32)
    np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-6)


@pytest.mark.parametrize("n", [2, 33, 1000, 5000, 40_000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_losses_keep_their_digits(backend, rng, dtype, n):
    low, high = (-40, -20) if dtype == "float64" else (-25, -17)
    x = rng.uniform(low, high, (4, n)).astype(dtype)
    labels = rng.integers(0, n, 4)
    x[np.arange(4), labels] = 0
    want = reference.cross_entropy(exact(x), labels)
    rtol = 1e-4 if dtype == "float32" else 1e-11
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        given = backend.asarray(array), backend.asarray(labels)
        got = cuattn.cross_entropy(*given, axis=axis)
        np.testing.assert_allclose(backend.asnumpy(got), want.astype(dtype), rtol=rtol)


@pytest.mark.parametrize("n", [3, 1025])
@pytest.mark.parametrize("ignore_index", [IGNORED, 0, 2, -1, 10**12, -(2**63)])
def test_ignored_rows(backend, rng, ignore_index, n):
    """Whatever they hold, and wherever the number lies."""
    x = draw(rng, (6, n))
    x[0], x[1, 1], x[2, 0] = NAN, INF, NAN
    labels = rng.integers(0, n, 6)
    labels[[0, 1, 4]] = ignore_index
    verify(backend, x, labels, ignore_index=ignore_index)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_labels_outside(backend, rng, monkeypatch, dtype):
    """On a device their loss is NaN, and nothing is read at them: neither another row, nor what is
    behind x."""
    if backend.name == "numpy":
        pytest.skip("labels on the host are checked")
    monkeypatch.setattr(checks, "labels", lambda *_: None)
    info = np.iinfo(dtype)
    for n in (40, 3000):
        x = draw(rng, (8, n))
        labels = np.array([n, -1, info.max, info.min, n + 7, 0, n - 1, -99], dtype)
        for axis in (1, 0):
            given = backend.asarray(x if axis else np.ascontiguousarray(x.T))
            loss, lse = cuattn.cross_entropy(
                given, backend.asarray(labels), axis=axis, return_lse=True
            )
            loss, lse = backend.asnumpy(loss), backend.asnumpy(lse)
            assert (np.isnan(loss) == [1, 1, 1, 1, 1, 0, 0, 1]).all()
            assert np.isfinite(lse).all()
            dx = cuattn.cross_entropy_backward(
                1.0, given, backend.asarray(labels), backend.asarray(lse), axis=axis
            )
            rows = np.isnan(backend.asnumpy(dx)).all(axis)
            assert (rows == np.isnan(loss)).all()
    outside = cuattn.cross_entropy(
        backend.asarray(x[:, :0]), backend.asarray(np.full(8, 0, dtype)), return_lse=True
    )
    assert np.isnan(backend.asnumpy(outside[0])).all()
    assert (backend.asnumpy(outside[1]) == -INF).all()


def test_unsigned_labels_beyond_int64(backend, monkeypatch):
    """They are no negative numbers: neither elements nor ignored."""
    monkeypatch.setattr(checks, "labels", lambda *_: None)
    labels = np.array([2**64 + IGNORED, 2**63, 1], np.uint64)
    x = np.zeros((3, 4), np.float32)
    loss = backend.asnumpy(cuattn.cross_entropy(backend.asarray(x), backend.asarray(labels)))
    assert (np.isnan(loss) == [True, True, False]).all()


@pytest.mark.host
def test_labels_of_the_host_are_checked_at_every_call(backend, rng):
    x = draw(rng, (3, 5))
    lse = reference.logsumexp(x, 1).astype(np.float32)
    for _ in range(3):
        cuattn.cross_entropy(x, np.array([0, 4, IGNORED]))
        cuattn.cross_entropy_backward(1.0, x, np.array([0, 4, IGNORED]), lse)
    for wrong in (5, -1, -99, 2**40):
        labels = np.array([0, wrong, 4])
        with pytest.raises(ValueError, match=f"labels must be from 0 to 4 or ignore.*is {wrong}"):
            cuattn.cross_entropy(x, labels)
        with pytest.raises(ValueError, match="labels must"):
            cuattn.cross_entropy_backward(1.0, x, labels, lse)
        cuattn.cross_entropy(x, labels, ignore_index=wrong)
    with pytest.raises(ValueError, match=r"labels must be ignore_index \(-100\), but one"):
        cuattn.cross_entropy(x[:, :0], np.array([0, 1, 2]))


X, ROW = np.ones((3, 5), np.float32), np.zeros(3, np.float32)
ARRAYS = ("grad", "x", "labels", "lse")


@pytest.mark.host
@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (TypeError, "labels must be of an integer dtype", {"labels": ROW}),
        (TypeError, "labels must be of an integer dtype", {"labels": ROW == 0}),
        (TypeError, "labels must be a cupy", {"labels": [0, 1, 2]}),
        (
            ValueError,
            r"labels must have the shape of x without axis \(3,\)",
            {"labels": X.astype(int)},
        ),
        (ValueError, "labels must have the shape", {"axis": 0}),
        (TypeError, "axis must be an int or None", {"axis": (1,)}),
        (ValueError, "scale must broadcast", {"scale": np.ones((3, 5), np.float32)}),
        (TypeError, "ignore_index must be an integer", {"ignore_index": -1.0}),
        (TypeError, "ignore_index must be an integer", {"ignore_index": None}),
        (ValueError, "ignore_index must fit into int64", {"ignore_index": 2**63}),
        (TypeError, "x must be one of float16", {"x": X.astype(int)}),
        (TypeError, "lse must be float32 or float64", {"lse": ROW.astype(np.float16)}),
        (ValueError, "lse must have the shape", {"lse": X}),
        (TypeError, "grad must be", {"grad": None}),
        (TypeError, "grad must be", {"grad": True}),
        (ValueError, r"grad must broadcast to the shape of the loss \(3,\)", {"grad": X}),
        (TypeError, "out must have dtype float32", {"out": X.astype(np.float64)}),
        (ValueError, "out must be x itself or share no memory", {"out": X[::-1]}),
    ],
)
def test_bad_arguments(backend, error, words, changed):
    """Of the gradient, and of the loss what it has of them."""
    given = {"grad": 1.0, "x": X, "labels": np.zeros(3, int), "lse": ROW, **changed}
    options = {name: given.pop(name) for name in [*given] if name not in ARRAYS}
    with pytest.raises(error, match=words):
        cuattn.cross_entropy_backward(*given.values(), **options)
    if not {"grad", "x", "lse", "out"} & changed.keys():
        with pytest.raises(error, match=words):
            cuattn.cross_entropy(given["x"], given["labels"], **options)


@pytest.mark.parametrize("n", [33, 1025, 300_001])
def test_rows_do_not_depend_on_others(backend, rng, n):
    x = draw(rng, (3, n))
    given, labels = backend.asarray(x), backend.asarray(draw_labels(rng, x))
    whole = cuattn.cross_entropy(given, labels, return_lse=True)
    for row in (slice(0, 1), slice(1, 3)):
        part = cuattn.cross_entropy(given[row], labels[row], return_lse=True)
        for one, all_ in zip(part, whole, strict=True):
            assert backend.asnumpy(one).tobytes() == backend.asnumpy(all_[row]).tobytes()


# ---- Its gradient --------------------------------------------------------------------------------


@np.errstate(all="ignore")
def naive_backward(grad, x, labels, lse, axis=-1, scale=None, ignore_index=IGNORED):
    """What NumPy computes in the accumulator's dtype, rounded to that of x; and the size of what it
    adds up."""
    acc = lse_dtype(x.dtype)
    s = x.astype(acc) if scale is None else x.astype(acc) * np.asarray(scale, acc)
    p = np.exp(s - np.expand_dims(lse, axis).astype(acc))
    hit = np.moveaxis(np.arange(x.shape[axis]) == labels[..., None], -1, axis)
    g = np.broadcast_to(np.asarray(grad, acc), labels.shape) * (labels != ignore_index)
    g = np.expand_dims(g, axis) * (1 if scale is None else np.asarray(scale, acc))
    return (g * (p - hit)).astype(x.dtype), abs(g) * (p + hit)


def verify_backward(backend, grad, x, labels, *, lse=None, **options):
    """Against the reference with the same lse, by default the nearest one."""
    axis, ignore_index = options.get("axis", -1), options.get("ignore_index", IGNORED)
    if lse is None:
        lse = reference.cross_entropy(
            exact(x),
            np.where(labels < 0, 0, labels),
            axis=axis,
            scale=options.get("scale"),
            return_lse=True,
        )[1].astype(lse_dtype(x.dtype))
    arrays = [grad, x, labels, lse]
    before = [np.asarray(a).tobytes() for a in arrays]
    given = [backend.asarray(a) if isinstance(a, np.ndarray) else a for a in arrays]
    kwargs = {
        name: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    got = cuattn.cross_entropy_backward(*given, **kwargs)
    assert backend.ran() or x.size == 0
    assert isinstance(got, backend.xp.ndarray)
    got = backend.asnumpy(got)
    assert got.dtype == x.dtype and got.shape == x.shape
    want = reference.cross_entropy_backward(exact(grad), exact(x), labels, exact(lse), **options)
    if axis is not None:
        naive, terms = naive_backward(grad, x, labels, lse, **options)
        assert_close(got, want, naive, terms=np.nan_to_num(terms, posinf=0))
        ignored = np.moveaxis(got, axis, -1)[labels == ignore_index]
        assert (ignored == 0).all()
    assert [np.asarray(a).tobytes() for a in arrays] == before
    return got


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_gradient_length(backend, rng, n):
    x = draw(rng, (5, n))
    verify_backward(backend, draw(rng, 5), x, draw_labels(rng, x))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradient_of_parts(backend, rng, dtype, axis):
    """Each has the gradient of the whole: a label of another part takes nothing off."""
    n = 530
    x, grad = draw(rng, (9, n), dtype), backend.asarray(draw(rng, 9))
    labels = np.array([0, 1, 263, 264, 265, n - 1, IGNORED, *rng.integers(0, n, 2)])
    given = backend.asarray(x.T.copy() if axis == 0 else x)
    labels = backend.asarray(labels)
    _, lse = cuattn.cross_entropy(given, labels, axis=axis, return_lse=True)
    whole = backend.asnumpy(cuattn.cross_entropy_backward(grad, given, labels, lse, axis=axis))
    cuts = [0, 264, 265, 265, n]
    for start, end in zip(cuts, cuts[1:], strict=False):
        part = (slice(start, end),) if axis == 0 else (slice(None), slice(start, end))
        got = cuattn.cross_entropy_backward(
            grad, given[part], labels, lse, axis=axis, index_offset=start
        )
        got, want = backend.asnumpy(got).astype(float), whole[part].astype(float)
        assert not np.isnan(want).any()
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("lse_dtype_", ["float32", "float64"])
def test_gradient_dtype(backend, rng, dtype, lse_dtype_, n):
    x = draw(rng, (5, n), dtype)
    lse = reference.logsumexp(exact(x), -1).astype(lse_dtype_)
    verify_backward(backend, draw(rng, 5, dtype), x, draw_labels(rng, x, dtype="int16"), lse=lse)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_layout(backend, rng, layout):
    for n in (33, 1025):
        x = LAYOUTS[layout](draw(rng, (5, n)))
        verify_backward(backend, draw(rng, 5), x, draw_labels(rng, x))
        verify_backward(backend, draw(rng, n), x, draw_labels(rng, x, 0), axis=0)


@pytest.mark.parametrize("axis", [0, 1, 2, -2])
def test_gradient_axis(backend, rng, axis):
    x = draw(rng, (4, 5, 33))
    labels = draw_labels(rng, x, axis, "uint8")
    verify_backward(backend, draw(rng, labels.shape), x, labels, axis=axis)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_all_elements(backend, rng, layout):
    """In C order, whatever the strides of x; also into an out of any."""
    x = LAYOUTS[layout](draw(rng, (4, 33)))
    labels, lse = np.array(70), reference.logsumexp(exact(x)).astype(np.float32)
    arrays = [np.array(0.5, np.float32), x, labels, lse]
    want = reference.cross_entropy_backward(0.5, exact(x), labels, exact(lse), axis=None)
    assert abs(want[2, 4] + 0.5) < 0.5  # the label
    given = [*map(backend.asarray, arrays)]
    for out_layout in (None, "contiguous", "fortran", "strided"):
        guard = out_layout and Guarded(backend, x.shape, x.dtype, out_layout)
        out = guard and guard.out
        for _ in range(2):
            got = cuattn.cross_entropy_backward(*given, axis=None, out=out)
        assert guard is None or got is out
        np.testing.assert_allclose(backend.asnumpy(got), want.astype("f4"), rtol=1e-5, atol=1e-6)
        if guard:
            guard.check_rim()


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_losses(backend, rng, dtype):
    """A number, one for all, one for some, one for each."""
    x = draw(rng, (4, 5, 33), dtype)
    labels = draw_labels(rng, x)
    for grad in (1 / 20, 3, np.float32(0.125), np.array(2.0), 1e-30):
        verify_backward(backend, grad, x, labels)
    for shape in ((4, 5), (5,), (1, 5), (4, 1), (1, 1), (1,), ()):
        for kind in ("float32", "float64", "float16"):
            verify_backward(backend, draw(rng, shape, kind), x, labels)
    wide = draw(rng, (8, 10))
    verify_backward(backend, wide[::2, ::-2], x, labels)
    verify_backward(backend, np.broadcast_to(wide[:, :1], (8, 5))[::-2], x, labels)


def test_gradient_of_rows_of_any_strides(backend, rng):
    """Labels, lse and gradients, each with its own."""
    x = draw(rng, (4, 6, 33))
    labels, lse = draw_labels(rng, x), reference.logsumexp(x, -1).astype(np.float32)
    kinds = ["contiguous", "strided", "fortran", "reversed columns", "reversed rows"]
    for _ in range(3):
        given = zip(rng.permutation(kinds), (draw(rng, (4, 6)), labels, lse), strict=False)
        grad, of_rows, row = (LAYOUTS[str(kind)](a) for kind, a in given)
        verify_backward(backend, grad, x, of_rows, lse=row)


def test_gradient_scale(backend, rng):
    x = draw(rng, (4, 5, 33))
    labels, grad = draw_labels(rng, x), draw(rng, (4, 5))
    for scale in (0.5, -1.5, 3.0, 0):
        verify_backward(backend, grad, x, labels, scale=scale)
    for shape in [(), (5, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-24, 25, shape) / 8).astype(np.float32)
        verify_backward(backend, grad, x, labels, scale=scale)


@pytest.mark.parametrize("n", [40, 1025])
@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_is_that_of_the_loss(backend, rng, axis, n):
    """Central differences of what cross_entropy returns, in float64."""
    x = draw(rng, (3, n) if axis else (n, 3), "float64")
    labels, grad = draw_labels(rng, x, axis), draw(rng, 3, "float64")
    options = {"axis": axis, "scale": 0.7}

    def loss(a):
        found = cuattn.cross_entropy(
            backend.asarray(a), backend.asarray(labels), return_lse=True, **options
        )
        return [*map(backend.asnumpy, found)]

    dx = cuattn.cross_entropy_backward(
        *map(backend.asarray, (grad, x, labels, loss(x)[1])), **options
    )
    for _ in range(5):
        direction = rng.standard_normal(x.shape)
        direction.flat[rng.integers(x.size)] += 10
        step = 1e-5
        ahead, behind = loss(x + step * direction)[0], loss(x - step * direction)[0]
        want = np.sum(grad * (ahead - behind)) / (2 * step)
        got = np.sum(backend.asnumpy(dx) * direction)
        assert got == pytest.approx(want, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("n", [3, 33, 1025])
def test_gradient_special_values(backend, rng, n):
    """NaN where the lse is not finite, unless the row is ignored."""
    x = np.stack([row for _, row in cases.special_rows(rng, n)])
    for ignored in (False, True):
        labels = np.full(len(x), IGNORED if ignored else n // 3)
        got = verify_backward(backend, np.ones(len(x), np.float32), x, labels)
        lse = reference.logsumexp(exact(x), -1)
        rows = np.isnan(got).all(-1)
        assert (rows == (False if ignored else ~np.isfinite(lse))).all()
        assert not (np.isnan(got).any(-1) & ~rows).any()
    for lse in (NAN, INF, -INF):  # whatever the row holds
        given = np.full(3, lse, np.float32)
        labels = np.array([0, IGNORED, n - 1])
        got = verify_backward(backend, 1.0, draw(rng, (3, n)), labels, lse=given)
        assert (np.isnan(got) == [[True], [False], [True]]).all()


def test_gradient_of_huge_scores(backend):
    x = np.array([[1e30, -1e30, 0.0], [-1e30, -1e30, -1e30], [3e38, -3e38, 3e38]], np.float32)
    labels = np.array([1, 0, 2])
    lse = np.array([1e30, -1e30, 3e38], np.float32)
    got = verify_backward(backend, 1.0, x, labels, lse=lse)
    np.testing.assert_array_equal(got, [[1, -1, 0], [0, 1, 1], [1, 0, 0]])
    # A scale beyond the range of the products of gradient and scale by themselves.
    x, lse = np.array([[2.0**-100, 0, 2.0**-101]], np.float32), np.array([2.0**20], np.float32)
    given = [*map(backend.asarray, (x, np.array([1]), lse))]
    got = cuattn.cross_entropy_backward(2.0**-120, *given, scale=2.0**120)
    np.testing.assert_array_equal(backend.asnumpy(got), [[1, -1, 0]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_in_place(backend, rng, layout, dtype):
    for n in (33, 1025, 5000):
        x = LAYOUTS[layout](draw(rng, (4, n), dtype))
        labels = backend.asarray(draw_labels(rng, x))
        given, lse = backend.asarray(x.copy()), backend.asarray(reference.logsumexp(x, -1))
        want = backend.asnumpy(cuattn.cross_entropy_backward(0.5, given, labels, lse))
        for _ in range(2):
            memory = backend.asarray(LAYOUTS[layout](x.copy()))
            assert cuattn.cross_entropy_backward(0.5, memory, labels, lse, out=memory) is memory
            assert backend.asnumpy(memory).tobytes() == want.tobytes()


@pytest.mark.parametrize("layout", [*cases.OUTS[:-1]])
def test_gradient_out(backend, rng, layout):
    for shape in ((5, 33), (3, 1025), (2, 3, 8)):
        x = draw(rng, shape)
        labels, lse = draw_labels(rng, x), reference.logsumexp(x, -1).astype(np.float32)
        given = [*map(backend.asarray, (draw(rng, labels.shape), x, labels, lse))]
        want = backend.asnumpy(cuattn.cross_entropy_backward(*given))
        for _ in range(2):
            guard = Guarded(backend, shape, x.dtype, layout)
            assert cuattn.cross_entropy_backward(*given, out=guard.out) is guard.out
            assert backend.asnumpy(guard.out).tobytes() == want.tobytes()
            guard.check_rim()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_gradient_empty(backend, shape):
    for axis in range(-len(shape), len(shape)):
        rows = tuple(np.delete(shape, axis))
        labels, lse = np.full(rows, IGNORED), np.full(rows, -INF, np.float32)
        verify_backward(backend, 1.0, np.zeros(shape, np.float32), labels, lse=lse, axis=axis)


def test_gradient_many_axes(backend, rng):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, 0, 5):
        labels = draw_labels(rng, x, axis)
        grad = draw(rng, (2,) * 11).transpose(rng.permutation(11))
        verify_backward(backend, grad, x, labels, axis=axis)
