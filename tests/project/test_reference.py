"""The references against SciPy, finite differences, Python's sort, and the laws of a monoid."""

from __future__ import annotations

import operator
import sys
import warnings

import numpy as np
import pytest
from tolerance import TABLE

from cuattn import reference
from cuattn._arrays.results import SoftmaxState, SoftmaxTopK, SoftmaxTopKLse, SoftmaxTopKState

NAN, INF = np.nan, np.inf
# Two float64 computations of the same thing: a few roundings of each value apart.
CLOSE = {"rtol": 64 * TABLE["float64"].relative, "atol": 64 * TABLE["float64"].relative}

CORNERS = [
    [0.0],
    [INF],
    [-INF],
    [NAN],
    [-INF, -INF],
    [INF, INF],
    [INF, -INF],
    [INF, 1.0, -2.0],
    [-INF, 1.0, -2.0],
    [NAN, 1.0, -2.0],
    [NAN, INF, 0.0],
    [NAN, -INF, 0.0],
    [1000.0, 1.0],
    [-1000.0, -1001.0],
    [1e300, -1e300],
    [0.0, -50.0],
    [-0.0, 0.0],
]


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def special():
    return pytest.importorskip("scipy.special")


def scipy_quiet(function, *args, **options):
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return function(*args, **options)


def check(got, want):
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want, **CLOSE)
    assert got.shape == np.shape(want)


AXES = [-1, 0, 1, (0, 2), (-1, 1), (0, 1, 2), None, ()]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_scipy(special, rng, name, axis):
    x = rng.standard_normal((4, 5, 6)) * 10
    check(getattr(reference, name)(x, axis), getattr(special, name)(x, axis=axis))


def test_scipy_integers_and_narrow_floats(special, rng):
    for dtype in (np.int8, np.uint8, np.int32, np.int64, np.float16, np.float32):
        x = rng.integers(0, 90, (3, 7)).astype(dtype)
        wide = x.astype(np.float64)
        check(reference.softmax(x), special.softmax(wide, axis=-1))
        check(reference.log_softmax(x), special.log_softmax(wide, axis=-1))
        check(reference.logsumexp(x), special.logsumexp(wide))


@pytest.mark.parametrize("row", CORNERS)
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_scipy_corners(special, name, row):
    x = np.array(row)
    check(getattr(reference, name)(x, -1), scipy_quiet(getattr(special, name), x, axis=-1))


@pytest.mark.parametrize("value", [0.0, 3.5, INF, -INF, NAN])
@pytest.mark.parametrize("axis", [None, -1, 0])
def test_scipy_scalars(special, value, axis):
    for name in ("softmax", "log_softmax"):
        want = scipy_quiet(getattr(special, name), np.array(value), axis=axis)
        check(getattr(reference, name)(np.array(value), axis), want)
    check(reference.logsumexp(np.array(value), axis), np.array(value))


@pytest.mark.parametrize(
    "x, b",
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 0.5]),
        ([1.0, 2.0, 3.0], 2.5),
        ([1.0, 2.0, 3.0], [1.0, -1.0, 1.0]),
        ([1.0, 2.0, 3.0], [-1.0, 1.0, -1.0]),  # a negative total: NaN
        ([1.0, 1.0], [1.0, -1.0]),  # the total is zero: -inf
        ([INF, 2.0, 3.0], [0.0, 2.0, 0.5]),
        ([NAN, 2.0, 3.0], [0.0, 2.0, 0.5]),
        ([-INF, 2.0, 3.0], [0.0, 2.0, 0.5]),
        ([INF, 2.0, 3.0], [-1.0, 2.0, 0.5]),
        ([INF, INF], [1.0, -1.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([1.0, 2.0], [NAN, 1.0]),
        ([1.0, 2.0], [INF, 1.0]),
        ([-INF, -INF], [1.0, -1.0]),
        ([1000.0, 1000.0], [0.25, 0.5]),
    ],
)
def test_scipy_weights(special, x, b):
    if b == [INF, 1.0] and np.lib.NumpyVersion(sys.modules["scipy"].__version__) < "1.16.0":
        pytest.skip("NaN there; inf since SciPy 1.16")
    x, b = np.array(x), np.array(b)
    check(reference.logsumexp(x, b=b), scipy_quiet(special.logsumexp, x, b=b))


def test_scipy_weights_broadcast(special, rng):
    x = rng.standard_normal((3, 4, 5))
    for shape in [(5,), (4, 1), (3, 1, 1), (3, 4, 5), ()]:
        b = rng.random(shape) + 0.5
        for axis in (None, 0, (0, 2)):
            for keepdims in (False, True):
                want = special.logsumexp(x, axis=axis, b=b, keepdims=keepdims)
                check(reference.logsumexp(x, axis, b=b, keepdims=keepdims), want)


def test_zero_weight_takes_out_what_scipy_does_not():
    """With no finite term left SciPy falls back to ``0 * inf``; here the element is simply out."""
    for value in (INF, NAN):
        check(reference.logsumexp(np.array([value, value]), b=np.zeros(2)), -INF)
        check(reference.logsumexp(np.array([value, -INF]), b=np.array([0.0, 1.0])), -INF)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_empty(shape):
    x = np.zeros(shape)
    for axis in [None, *range(-len(shape), len(shape))]:
        for function in (reference.softmax, reference.log_softmax):
            check(function(x, axis), x)
        for function in (reference.softmax_backward, reference.log_softmax_backward):
            check(function(x, x, axis), x)
        want = np.full(np.sum(x, axis).shape, -INF)
        check(reference.logsumexp(x, axis), want)
        state = reference.softmax_state(x, axis)
        check(state.m, want)
        check(state.l, np.zeros(want.shape))
        check(np.asarray(state.lse), want)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_where_is_compression(rng, name):
    """A row with a mask is the row of the elements that take part."""
    function, nothing = getattr(reference, name), 0 if name == "softmax" else -INF
    x, where = rng.standard_normal((6, 9)), rng.random((6, 9)) < 0.5
    x[~where] = rng.choice([NAN, INF, -INF], np.count_nonzero(~where))
    where[2] = False
    want = np.full(x.shape, nothing, float)
    for row in range(6):
        want[row, where[row]] = function(x[row, where[row]])
    check(function(x, where=where), want)


def test_where_lse_and_logsumexp(rng):
    x, where = rng.standard_normal((6, 9)), rng.random((6, 9)) < 0.5
    x[~where] = NAN
    where[2] = False
    want = [reference.logsumexp(row[part]) for row, part in zip(x, where, strict=True)]
    check(reference.logsumexp(x, -1, where=where), want)
    check(reference.softmax(x, where=where, return_lse=True)[1], want)
    assert want[2] == -INF


def test_where_all_participants_minus_inf():
    x, where = np.array([-INF, -INF, 5.0]), np.array([True, True, False])
    check(reference.softmax(x, where=where), [NAN, NAN, 0])
    check(reference.log_softmax(x, where=where), [NAN, NAN, -INF])
    check(reference.logsumexp(x, where=where), -INF)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_scale_multiplies(rng, name):
    function, x = getattr(reference, name), rng.standard_normal((3, 4, 5))
    for shape in [(), (1,), (4, 1), (3, 1, 1), (3, 4, 1)]:
        scale = rng.standard_normal(shape)
        check(function(x, scale=scale), function(x * scale))
    check(function(x, scale=0), function(np.zeros_like(x)))


def test_lse_is_logsumexp(rng):
    x = rng.standard_normal((3, 4, 5)) * 50
    for axis in AXES:
        y, lse = reference.softmax(x, axis, scale=0.5, return_lse=True)
        check(y, reference.softmax(x, axis, scale=0.5))
        check(lse, reference.logsumexp(x * 0.5, axis))
    corners = np.array([[INF, 0.0], [-INF, -INF], [NAN, 0.0], [-INF, 2.0]])
    check(reference.softmax(corners, return_lse=True)[1], [INF, -INF, NAN, 2.0])


def test_dtype_and_out(rng):
    x = rng.standard_normal((3, 4))
    want = reference.softmax(x)
    np.testing.assert_array_equal(reference.softmax(x, dtype=np.float16), want.astype(np.float16))
    out, lse = np.empty((3, 4), np.float32), np.empty(3, np.float32)
    result = reference.softmax(x, out=(out, lse), return_lse=True)
    assert result[0] is out and result[1] is lse
    np.testing.assert_array_equal(out, want.astype(np.float32))
    np.testing.assert_array_equal(lse, reference.logsumexp(x, -1).astype(np.float32))
    for call in (
        lambda **out: reference.top_k(x, 2, **out),
        lambda **out: reference.softmax_topk(x, 2, return_lse=True, **out),
        lambda **out: reference.softmax_state(x, 0, **out),
        lambda **out: reference.softmax_topk_state(x, 5, **out),
        lambda **out: reference.merge(*[reference.softmax_state(x)] * 2, **out),
        lambda **out: reference.merge(*[reference.softmax_topk_state(x, 2)] * 2, **out),
        lambda **out: reference.sample(x, 2, seed=1, return_log_prob=True, **out),
        lambda **out: reference.sample_state(x, 5, seed=1, **out),
        lambda **out: reference.merge(*[reference.sample_state(x, 2, seed=1)] * 2, **out),
    ):
        found, out = call(), [np.empty_like(part) for part in call()]
        given = call(out=tuple(out))
        assert type(given) is type(found) and all(map(operator.is_, given, out))
        for part, want in zip(given, found, strict=True):
            np.testing.assert_array_equal(part, want)
    in_place = x.copy()
    assert reference.log_softmax(in_place, out=in_place) is in_place
    check(in_place, reference.log_softmax(x))


@pytest.mark.parametrize("scale", [None, 0.5, -2.0])
@pytest.mark.parametrize("axis", [-1, 0, (0, 2), None])
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_gradient(rng, name, axis, scale):
    """Central differences of ``sum(grad * f(x))``, in every direction at once."""
    forward, backward = getattr(reference, name), getattr(reference, f"{name}_backward")
    x, grad = rng.standard_normal((2, 2, 3, 4))
    step = TABLE["float64"].relative ** (1 / 3)  # truncation and rounding error in balance
    want = np.empty_like(x)
    for index in np.ndindex(x.shape):
        there, back = x.copy(), x.copy()
        there[index] += step
        back[index] -= step
        difference = forward(there, axis, scale=scale) - forward(back, axis, scale=scale)
        want[index] = np.sum(grad * difference) / (2 * step)
    got = backward(grad, forward(x, axis, scale=scale), axis, scale=scale)
    np.testing.assert_allclose(got, want, rtol=0, atol=64 * step**2 * max(1, abs(got).max()))


def test_segments_are_softmax_of_slices(rng):
    x, cu_seqlens = rng.standard_normal((12, 3)), np.array([0, 0, 1, 5, 5, 12])
    scale = rng.standard_normal((5, 3))
    got = reference.segment_softmax(x, cu_seqlens, scale=scale)
    for i in range(5):
        part = slice(cu_seqlens[i], cu_seqlens[i + 1])
        check(got[part], reference.softmax(x[part] * scale[i], 0))
    column = reference.segment_softmax(x[:, 0], cu_seqlens)
    check(column, reference.segment_softmax(x, cu_seqlens)[:, 0])
    check(reference.segment_softmax(np.zeros((0, 3)), np.array([0])), np.zeros((0, 3)))


ROWS = np.array(
    [[1.0, 2.0, 3.0], [INF, 0, 1], [-INF] * 3, [-INF, 4, -INF], [NAN, 0, 1], [-1e3, 1e3, INF]]
)


@pytest.mark.parametrize("split", range(4))
def test_merge_of_parts_is_the_whole(split):
    parts = [reference.softmax_state(ROWS[:, part]) for part in (np.s_[:split], np.s_[split:])]
    whole = reference.softmax_state(ROWS)
    for merged in (reference.merge(*parts), reference.merge(*reversed(parts))):
        assert isinstance(merged, SoftmaxState)
        check(merged.m, whole.m)
        check(merged.l, whole.l)
        check(merged.lse, reference.logsumexp(ROWS, -1))


def test_merge_is_a_monoid(rng):
    x = rng.standard_normal((3, 5, 7)) * 100
    x[0, 0], x[1, 1], x[2, 2] = -INF, INF, NAN
    a, b, c = (reference.softmax_state(part) for part in x)
    left = reference.merge(reference.merge(a, b), c)
    right = reference.merge(a, reference.merge(b, c))
    check(left.m, right.m)
    check(left.l, right.l)
    for one, other in zip(reference.merge(a, b), reference.merge(b, a), strict=True):
        np.testing.assert_array_equal(one, other)
    nothing = SoftmaxState(np.full(5, -INF), np.zeros(5))
    for merged in (reference.merge(a, nothing), reference.merge(nothing, a)):
        check(merged.m, a.m)
        check(merged.l, a.l)
    check(reference.merge(nothing, nothing).lse, nothing.m)


def test_state_scale(rng):
    x, scale = rng.standard_normal((3, 4)), rng.standard_normal((3, 1))
    state = reference.softmax_state(x, scale=scale)
    check(state.m, (x * scale).max(-1))
    check(state.lse, reference.logsumexp(x * scale, -1))


# ---- top-k -------------------------------------------------------------------------------------


def ranking(row, k, mode="largest"):
    """Places of the k best, by Python's sort of Python's numbers."""
    sign = -1 if mode == "largest" else 1
    keys = [(1, 0, i) if v != v else (0, sign * v, i) for i, v in enumerate(row.tolist())]
    return [i for *_, i in sorted(keys)[:k]]


TIES = [NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, -1.0]


@pytest.mark.parametrize("mode", ["largest", "smallest"])
@pytest.mark.parametrize("dtype", ["float16", "float64", "int8", "uint8", "int64", "uint64"])
def test_top_k_is_a_sort(rng, dtype, mode):
    dtype = np.dtype(dtype)
    pool = TIES
    if dtype.kind != "f":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        pool = [low, low + 1, high - 1, high]
    for n in range(9):
        x = rng.choice(np.array(pool, dtype), (20, n))
        for k in range(n + 1):
            values, indices = reference.top_k(x, k, mode=mode)
            assert values.dtype == dtype and indices.dtype == np.int64
            assert indices.tolist() == [ranking(row, k, mode) for row in x]
            want = np.take_along_axis(x, indices, -1)
            assert values.tobytes() == want.tobytes()  # -0.0 and NaN as they were


def test_top_k_axes(rng):
    x = np.round(rng.standard_normal((4, 5, 6)) * 2)
    for axis in (0, 1, 2, -1, -3):
        last = reference.top_k(np.moveaxis(x, axis, -1), 3)
        for got, want in zip(reference.top_k(x, 3, axis=axis), last, strict=True):
            np.testing.assert_array_equal(got, np.moveaxis(want, -1, axis))
    for one in (x, x.T):
        flat = reference.top_k(one.ravel(), 7)
        for got, want in zip(reference.top_k(one, 7, axis=None), flat, strict=True):
            np.testing.assert_array_equal(got, want)
    for axis in (-1, 0, None):
        assert [part.tolist() for part in reference.top_k(np.array(3), 1, axis=axis)] == [[3], [0]]


def test_softmax_topk_is_softmax_in_order(special, rng):
    x = rng.standard_normal((4, 5, 6)) * 5
    for axis in (-1, 0, 1, None):
        indices = reference.top_k(x, 3, axis=axis).indices
        for output, function in (("prob", special.softmax), ("log_prob", special.log_softmax)):
            got = reference.softmax_topk(x, 3, axis=axis, output=output, return_lse=True)
            assert isinstance(got, SoftmaxTopKLse)
            np.testing.assert_array_equal(got.indices, indices)
            check(got.values, np.take_along_axis(function(x, axis=axis), indices, axis))
            check(got.lse, special.logsumexp(x, axis=axis))
        logits = reference.softmax_topk(x, 3, axis=axis, output="logit")
        assert isinstance(logits, SoftmaxTopK)
        check(logits.values, np.take_along_axis(x, indices, axis))


@pytest.mark.parametrize("output", ["prob", "log_prob"])
def test_softmax_topk_renormalized(rng, output):
    x = rng.standard_normal((4, 9)) * 5
    function = reference.softmax if output == "prob" else reference.log_softmax
    got = reference.softmax_topk(x, 4, renormalize=True, output=output, return_lse=True)
    check(got.values, function(-np.sort(-x)[:, :4]))
    check(got.lse, reference.logsumexp(x, -1))
    flat = reference.softmax_topk(x, 4, axis=None, renormalize=True, output=output)
    check(flat.values, function(-np.sort(-x, None)[:4]))


@pytest.mark.parametrize("output, nothing", [("prob", 0), ("log_prob", -INF), ("logit", -INF)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_softmax_topk_where_is_compression(rng, output, nothing, renormalize):
    """First the elements that take part, as if there were no others; then those in order."""
    x, where = rng.standard_normal((6, 9)), rng.random((6, 9)) < 0.5
    x[~where] = rng.choice([NAN, INF, -INF], np.count_nonzero(~where))
    where[2] = False
    how = {"output": output, "renormalize": renormalize, "return_lse": True}
    got = reference.softmax_topk(x, 4, where=where, scale=0.5, **how)
    for row, part, values, indices, lse in zip(x, where, *got, strict=True):
        inside, outside = np.flatnonzero(part), np.flatnonzero(~part)
        k = min(4, len(inside))
        alone = reference.softmax_topk(row[part], k, scale=0.5, **how)
        assert indices.tolist() == [*inside[alone.indices], *outside[: 4 - k]]
        check(values, [*alone.values, *[nothing] * (4 - k)])
        check(np.asarray(lse), alone.lse)


@pytest.mark.parametrize("row", CORNERS)
@pytest.mark.parametrize("output", ["prob", "log_prob"])
def test_softmax_topk_corners(special, row, output):
    function = special.softmax if output == "prob" else special.log_softmax
    x = np.array(row)
    values, indices = reference.softmax_topk(x, len(row), output=output)
    assert indices.tolist() == ranking(x, len(row))
    check(values, scipy_quiet(function, x, axis=-1)[indices])


def test_softmax_topk_orders_rounded_logits():
    """In float32 two neighbours may have one logit; in float64 they have two."""
    x = np.float32(1.9375) + np.arange(64, dtype=np.float32) * np.float32(2**-23)
    narrow = reference.softmax_topk(x, 64, scale=1.0625, output="logit")
    assert narrow.indices.tolist() == ranking(x * np.float32(1.0625), 64)
    assert narrow.indices.tolist() != ranking(x, 64)
    np.testing.assert_array_equal(narrow.values, (x * np.float32(1.0625))[narrow.indices])
    wide = reference.softmax_topk(x.astype(np.float64), 64, scale=1.0625)
    assert wide.indices.tolist() == ranking(x, 64)


def test_topk_state_of_short_rows(rng):
    """The k best are padded, whatever the axis; offsets do not reach what is missing."""
    x = rng.standard_normal((3, 4))
    for axis, rows in ((-1, x), (0, x.T), (None, x.reshape(1, 12))):
        state = reference.softmax_topk_state(x, 14, axis=axis, scale=-2, index_offset=100)
        n, flat = rows.shape[1], (-1, 14)
        plain = reference.softmax_state(x, axis, scale=-2)
        check(state.m, plain.m)
        check(state.l, plain.l)
        check(np.asarray(state.lse), reference.logsumexp(-2 * x, axis))
        values, indices = reference.top_k(-2 * rows, n)
        np.testing.assert_array_equal(state.values.reshape(flat)[:, :n], values)
        np.testing.assert_array_equal(state.indices.reshape(flat)[:, :n], indices + 100)
        assert (state.values[..., n:] == -INF).all() and (state.indices[..., n:] == -1).all()
        assert state.values.shape == state.indices.shape == (*state.m.shape, 14)


@pytest.mark.parametrize("split", range(10))
@pytest.mark.parametrize("k", [0, 1, 3, 9, 12])
def test_merge_of_topk_states_is_the_whole(rng, k, split):
    x = rng.choice([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, 3.0], (50, 9), p=[0.1] * 3 + [0.14] * 5)
    a = reference.softmax_topk_state(x[:, :split], k)
    b = reference.softmax_topk_state(x[:, split:], k, index_offset=split)
    whole = reference.softmax_topk_state(x, k)
    for merged in (reference.merge(a, b), reference.merge(b, a)):
        assert isinstance(merged, SoftmaxTopKState)
        np.testing.assert_array_equal(merged.indices, whole.indices)
        np.testing.assert_array_equal(merged.values, whole.values)
        np.testing.assert_array_equal(merged.m, whole.m)
        check(merged.l, whole.l)
        check(merged.lse, reference.logsumexp(x, -1))
