"""softmax_topk_state and merge: the parts of a row, ranked apart, give the ranking of the row."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, draw, ranking_stack
from numpy.exceptions import AxisError
from tolerance import (
    EXPONENT_ROUNDINGS,
    FLOATS,
    TABLE,
    assert_close,
    dtype_of,
    exact,
    lse_dtype,
    naive_logsumexp,
)

import cuattn
from cuattn import SoftmaxState, SoftmaxTopKState, reference


def naive_sum(x, axis, scale):
    """The sum in the dtype that it is kept in."""
    s = x.astype(lse_dtype(x.dtype))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    with np.errstate(all="ignore"):
        m = np.max(s, axis, keepdims=True, initial=-np.inf)
        return np.sum(np.exp(s - np.where(np.isfinite(m), m, 0)), axis)


@np.errstate(all="ignore")  # NaN may be signalling
def compare(backend, got, x, k, axis=-1, scale=None, index_offset=0):
    """A state against the reference of the whole `x`: the ranking exactly, `l` and lse closely."""
    assert type(got) is SoftmaxTopKState
    wide, x = lse_dtype(x.dtype), np.atleast_1d(x)
    assert all(isinstance(part, backend.xp.ndarray) for part in got)
    assert [part.dtype for part in got] == [wide, wide, wide, np.int64]
    options = {"axis": axis, "scale": scale}
    ref = reference.softmax_topk_state(x, k, **options, index_offset=index_offset)
    m, l, values, indices = (backend.asnumpy(part) for part in got)  # noqa: E741
    np.testing.assert_array_equal(indices, ref.indices)
    np.testing.assert_array_equal(values, ref.values.astype(wide))
    np.testing.assert_array_equal(m, ref.m.astype(wide))  # the best value, where it is a number
    state = reference.softmax_state(exact(x), **options)
    assert_close(l, state.l, naive_sum(x, axis, scale))
    naive = naive_logsumexp(x, axis, scale=scale, dtype=wide)
    assert_close(backend.asnumpy(got.lse), state.lse, naive)


def verify(backend, x, k, *, axis=-1, scale=None, index_offset=0):
    before = x.tobytes()
    device_x = backend.asarray(x)
    device_scale = backend.asarray(scale) if isinstance(scale, np.ndarray) else scale
    options = {"axis": axis, "scale": device_scale, "index_offset": index_offset}
    got = cuattn.softmax_topk_state(device_x, k, **options)
    assert backend.ran() or x.size == 0 or k == 0
    compare(backend, got, x, k, axis, scale, index_offset)
    assert backend.asnumpy(device_x).tobytes() == before
    return got


# ---- the state of a row ------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 33, 129, 1025])
def test_length(backend, rng, n):
    """Also rows that are shorter than k."""
    for k in (cases.any_k(rng, n), n + 1 + int(rng.integers(40))):
        verify(backend, ranking_stack(rng, n, k, special=True), k)


@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype(backend, rng, dtype):
    for n, k in ((33, 5), (33, 40), (310, 64), (531, 300)):
        verify(backend, ranking_stack(rng, n, k, dtype, special=True), k, scale=0.5)


@pytest.mark.parametrize("rows, n", cases.LONG[2:4])
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)), int(rng.choice([5, 200, 400])))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    for n, k in ((33, 40), (129, 9)):
        verify(backend, LAYOUTS[layout](np.round(draw(rng, (5, n)))), k)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, None])
def test_axis(backend, rng, axis):
    """k is the last axis of values and indices, whichever the rows lay along."""
    x = np.round(draw(rng, (4, 5, 33)))
    for k in (0, 3):
        state = verify(backend, x, k, axis=axis)
        assert state.values.shape == (*state.m.shape, k)


@pytest.mark.parametrize("scale", [0.5, -1.5, 0, 0.7, INF])
def test_scale(backend, rng, scale):
    verify(backend, draw(rng, (4, 5, 33)), 6, scale=scale)


@pytest.mark.parametrize("shape", [(), (5, 1), (4, 5, 1)])
def test_scale_array(backend, rng, shape):
    scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, draw(rng, (4, 5, 33)), 6, scale=scale)


@pytest.mark.parametrize("index_offset", [0, 1, 50257, 2**31, 2**40, np.int64(7)])
def test_index_offset(backend, rng, index_offset):
    """Added to what is there, and not to what is missing."""
    for n, k in ((33, 5), (33, 40), (1025, 300)):
        verify(backend, draw(rng, (3, n)), k, index_offset=index_offset)


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        for k in (0, 1, 3):
            state = verify(backend, np.array(value, np.float32), k)
            assert state.m.shape == () and state.values.shape == (k,)


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize(
    "n, k", [(33, 5), (33, 40), (310, 40), (33, 300), (1025, 300), (3001, 300)]
)
def test_out(backend, rng, n, k, layout):
    """Also of rows that are shorter than k."""
    x = backend.asarray(ranking_stack(rng, n, k, special=True))
    options = {"scale": 0.7, "index_offset": 9}
    call = functools.partial(cuattn.softmax_topk_state, x, k, **options)
    cases.check_outs(backend, rng, call, layout)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_out_axis(backend, rng, dtype, axis):
    x = LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (9, 10, 11), dtype))
    device_x, before = backend.asarray(x), x.tobytes()
    for k in (0, 4, 12):
        call = functools.partial(cuattn.softmax_topk_state, device_x, k, axis=axis)
        cases.check_outs(backend, rng, call)
    assert backend.asnumpy(device_x).tobytes() == before


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_out_of_many_axes(backend, rng, axis):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    call = functools.partial(cuattn.softmax_topk_state, backend.asarray(x), 2, axis=axis)
    against = functools.partial(compare, backend, x=x, k=2, axis=axis)
    cases.check_outs(backend, rng, call, compare=against)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_out_without_elements(backend, rng, shape):
    x = backend.asarray(np.ones(shape, np.float32))
    for k in (0, 2):
        cases.check_outs(backend, rng, functools.partial(cuattn.softmax_topk_state, x, k))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, shape):
    x = np.zeros(shape, np.float32)
    for axis in [None, *range(-len(shape), len(shape))]:
        for k in (0, 2):
            verify(backend, x, k, axis=axis)


def test_a_row_of_nothing(backend, rng):
    state = verify(backend, draw(rng, (3, 0)), 2, index_offset=9)
    m, l, values, indices = (backend.asnumpy(part) for part in state)  # noqa: E741
    assert (m == -INF).all() and (l == 0).all()
    assert (values == -INF).all() and (indices == -1).all()


# ---- merge -------------------------------------------------------------------------------------


def split(rng, n, count):
    """`count` slices of a row, some of them perhaps empty or of one element."""
    cuts = [0, *sorted(rng.choice([0, 1, n, *rng.integers(0, n + 1, 6)], count - 1)), n]
    return [slice(int(begin), int(end)) for begin, end in zip(cuts[:-1], cuts[1:], strict=True)]


def state_of(backend, x, k, part, **options):
    """The state of a part of the last axis, at its place."""
    x = backend.asarray(x[..., part])
    return cuattn.softmax_topk_state(x, k, index_offset=part.start, **options)


def merge_in_any_order(rng, states):
    """Two of them at a time, whichever, until one is left."""
    while len(states) > 1:
        a, b, *rest = (states[i] for i in rng.permutation(len(states)))
        states = [*rest, cuattn.merge(a, b)]
    return states[0]


@pytest.mark.parametrize("count", range(1, 8))
def test_merge_of_parts(backend, rng, count):
    for n, k in ((1, 1), (7, 3), (33, 33), (129, 20), (400, 64), (310, 150)):
        x = ranking_stack(rng, n, k, special=True)
        states = [state_of(backend, x, k, part) for part in split(rng, n, count)]
        compare(backend, merge_in_any_order(rng, states), x, k)


@pytest.mark.parametrize("dtype", FLOATS)
def test_merge_dtype(backend, rng, dtype):
    x = ranking_stack(rng, 310, 64, dtype, special=True)
    states = [state_of(backend, x, 64, part, scale=0.7) for part in split(rng, 310, 4)]
    compare(backend, merge_in_any_order(rng, states), x, 64, scale=0.7)


# On both sides of what a warp's registers hold, and k as long as the parts or longer.
@pytest.mark.parametrize("k", [0, 1, 2, 31, 32, 33, 64, 65, 128, 129, 256, 257, 1000, 3000])
def test_merge_k(backend, rng, k):
    x = np.concatenate([draw(rng, (3, 2050)), np.round(draw(rng, (3, 2050)))])
    states = [state_of(backend, x, k, part) for part in split(rng, 2050, 3)]
    compare(backend, merge_in_any_order(rng, states), x, k)


def test_merge_is_that_of_the_whole(backend, rng):
    """Ranking and maximum are those that one call gives, exactly."""
    x = ranking_stack(rng, 1025, 40, special=True)
    parts = split(rng, 1025, 5)
    whole = state_of(backend, x, 40, slice(0, 1025), scale=0.7)
    states = [state_of(backend, x, 40, part, scale=0.7) for part in parts]
    merged = merge_in_any_order(rng, states)
    for name in ("m", "values", "indices"):
        one, other = (backend.asnumpy(getattr(state, name)) for state in (merged, whole))
        np.testing.assert_array_equal(one, other)


def test_merge_of_a_sharded_vocabulary(backend, rng):
    """The probabilities of the k best from states alone are those of softmax_topk."""
    n, k, table = 50257, 8, TABLE["float32"]
    x = draw(rng, (2, n))
    bounds = [0, 16384, 32768, n]
    parts = [slice(*pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
    state = merge_in_any_order(rng, [state_of(backend, x, k, part) for part in parts])
    compare(backend, state, x, k)
    probabilities, indices = cuattn.softmax_topk(backend.asarray(x), k)
    np.testing.assert_array_equal(backend.asnumpy(state.indices), backend.asnumpy(indices))
    values, lse = exact(backend.asnumpy(state.values)), exact(backend.asnumpy(state.lse))[:, None]
    want = exact(backend.asnumpy(probabilities))
    relative = table.relative * EXPONENT_ROUNDINGS * (2 + abs(values) + abs(lse))
    assert (abs(np.exp(values - lse) - want) <= relative * want + table.absolute).all()


def test_ties_are_taken_in_order_of_index(backend, rng):
    """Whichever part comes first; NaN before what is missing."""
    x = np.ones((4, 40), np.float32)
    x[1, ::3] = NAN
    x[2] = NAN
    x[3] = -INF
    for parts in ((slice(0, 5), slice(5, 40)), (slice(0, 38), slice(38, 40))):
        a, b = (state_of(backend, x, 10, part) for part in parts)
        for merged in (cuattn.merge(a, b), cuattn.merge(b, a)):
            compare(backend, merged, x, 10)
        short = cuattn.merge(*(state_of(backend, x, 60, part) for part in reversed(parts)))
        compare(backend, short, x, 60)


def test_merge_of_shards_beyond_32_bits(backend, rng):
    """Indices so large that 32 bits do not hold them, and ties whose order they decide."""
    x = np.round(draw(rng, (5, 300)))
    states = []
    for part in split(rng, 300, 4):
        part_x = backend.asarray(x[:, part])
        states.append(cuattn.softmax_topk_state(part_x, 30, index_offset=2**40 + part.start))
    compare(backend, merge_in_any_order(rng, states), x, 30, index_offset=2**40)
    far = [cuattn.softmax_topk_state(backend.asarray(x), 9, index_offset=i << 32) for i in (3, 1)]
    merged = backend.asnumpy(cuattn.merge(*far).indices)
    at = reference.top_k(np.concatenate([x, x], -1), 9).indices  # of the shards 1 and 3
    np.testing.assert_array_equal(merged, at % 300 + np.where(at < 300, 1 << 32, 3 << 32))


def test_empty_state_is_the_identity(backend, rng):
    x = ranking_stack(rng, 33, 5, special=True)
    state = state_of(backend, x, 5, slice(0, 33))
    nothing = state_of(backend, x, 5, slice(33, 33))
    for merged in (cuattn.merge(state, nothing), cuattn.merge(nothing, state)):
        for got, want in zip(merged, state, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    both = cuattn.merge(nothing, nothing)
    assert (backend.asnumpy(both.indices) == -1).all()
    assert (backend.asnumpy(both.lse) == -INF).all()


def test_merge_is_commutative_bitwise(backend, rng):
    x = ranking_stack(rng, 200, 33, special=True)
    for cut in (7, 100):
        a, b = (state_of(backend, x, 33, part) for part in (slice(0, cut), slice(cut, 200)))
        for one, other in zip(cuattn.merge(a, b), cuattn.merge(b, a), strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


def test_merge_leaves_its_arguments(backend, rng):
    x = draw(rng, (5, 33))
    a, b = (state_of(backend, x, 5, part) for part in (slice(0, 9), slice(9, 33)))
    before = [backend.asnumpy(part).copy() for part in (*a, *b)]
    cuattn.merge(a, b)
    for part, want in zip((*a, *b), before, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(part), want)


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (3, 40), (2, 3, 5)])
def test_merge_shapes(backend, rng, shape):
    x = np.round(draw(rng, (*shape, 10)))
    for k in (0, 3, 12):
        a, b = (state_of(backend, x, k, part) for part in (slice(0, 4), slice(4, 10)))
        compare(backend, cuattn.merge(a, b), x, k)


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("shape, k", [((), 2), ((0,), 2), ((7,), 0), ((3, 0), 1), ((3, 40), 5)])
def test_merge_out(backend, rng, shape, k, layout):
    a, b = (cuattn.softmax_topk_state(backend.asarray(draw(rng, (*shape, 9))), k) for _ in range(2))
    cases.check_outs(backend, rng, functools.partial(cuattn.merge, a, b), layout)


def test_merge_in_place_is_refused(backend, rng):
    """A place of the result may be any one of the lists."""
    a, b = (cuattn.softmax_topk_state(backend.asarray(draw(rng, (3, 9))), 4) for _ in range(2))
    apart = cuattn.merge(a, b)
    for i, name in enumerate(a._fields):
        for state, owner in ((a, "a"), (b, "b")):
            out = (*apart[:i], state[i], *apart[i + 1 :])
            with pytest.raises(ValueError, match=rf"out\[{i}\] must .* with {owner}.{name}, but "):
                cuattn.merge(a, b, out=out)


def test_merge_of_strided_states(backend, rng):
    x = draw(rng, (14, 33))
    a, b = (state_of(backend, x, 5, part) for part in (slice(0, 20), slice(20, 33)))
    a, b = (SoftmaxTopKState(*(part[::-2] for part in state)) for state in (a, b))
    compare(backend, cuattn.merge(a, b), x[::-2], 5)


def test_merge_of_plain_states_is_as_before(backend, rng):
    x = draw(rng, (5, 33))
    a, b = (cuattn.softmax_state(backend.asarray(part)) for part in (x[:, :9], x[:, 9:]))
    assert type(cuattn.merge(a, b)) is SoftmaxState


@pytest.mark.parametrize("n, k", [(33, 5), (1025, 1000), (70001, 300)])
def test_two_runs_are_bitwise_equal(backend, rng, n, k):
    x = backend.asarray(np.round(draw(rng, (2, n))))
    one, other = (cuattn.softmax_topk_state(x, k) for _ in range(2))
    merged = (cuattn.merge(one, state) for state in (other, one))
    for pair in ((one, other), merged):
        for a, b in zip(*pair, strict=True):
            assert backend.asnumpy(a).tobytes() == backend.asnumpy(b).tobytes()


# ---- errors ------------------------------------------------------------------------------------

X = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    "error, argument, call",
    [
        (ValueError, "k", lambda f: f(X, -1)),
        (TypeError, "k", lambda f: f(X, 2.0)),
        (TypeError, "k", lambda f: f(X, None)),
        (TypeError, "axis", lambda f: f(X, 2, axis=(0, 1))),
        (AxisError, "axis", lambda f: f(X, 2, axis=2)),
        (ValueError, "index_offset", lambda f: f(X, 2, index_offset=-1)),
        (TypeError, "index_offset", lambda f: f(X, 2, index_offset=1.0)),
        (TypeError, "index_offset", lambda f: f(X, 2, index_offset=None)),
        (TypeError, "x", lambda f: f([1.0, 2.0], 1)),
        (TypeError, "x", lambda f: f(X.astype(np.int32), 1)),
        (TypeError, "x", lambda f: f(X > 0, 1)),
        (TypeError, "scale", lambda f: f(X, 2, scale="2")),
        (ValueError, "scale", lambda f: f(X, 2, scale=np.ones((4, 5)))),
    ],
)
def test_errors(error, argument, call):
    with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
        call(cuattn.softmax_topk_state)
    assert caught.type is error


@pytest.mark.parametrize(
    "error, other",
    [
        (TypeError, lambda a: cuattn.softmax_state(X)),
        (TypeError, lambda a: tuple(a)),
        (TypeError, lambda a: None),
        (TypeError, lambda a: cuattn.softmax_topk_state(X.astype(np.float64), 2)),
        (TypeError, lambda a: a._replace(indices=a.indices.astype(np.int32))),
        (TypeError, lambda a: a._replace(values=a.values.tolist())),
        (ValueError, lambda a: cuattn.softmax_topk_state(X, 3)),
        (ValueError, lambda a: cuattn.softmax_topk_state(X[:3], 2)),
        (ValueError, lambda a: a._replace(values=a.values[:, :1])),
        (ValueError, lambda a: a._replace(indices=a.indices[:, :1])),
    ],
)
def test_merge_errors(error, other):
    state = cuattn.softmax_topk_state(X, 2)
    for pair in ((state, other(state)), (other(state), state)):
        with pytest.raises(error, match=r"\A[ab](\.\w+)? must .*, but ") as caught:
            cuattn.merge(*pair)
        assert caught.type is error


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int64"])
def test_merge_of_what_no_call_gives(dtype):
    """A state in a dtype of neither float32 nor float64."""
    state = cuattn.softmax_topk_state(X, 2)
    narrow = SoftmaxTopKState(*(part.astype(dtype_of(dtype)) for part in state[:3]), state.indices)
    with pytest.raises(TypeError, match=r"\Aa\.m must .*, but "):
        cuattn.merge(narrow, narrow)
