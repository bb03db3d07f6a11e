"""softmax_state and merge: the parts of a row, reduced apart, give the row."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, draw
from tolerance import assert_close, exact, lse_dtype, naive_logsumexp, result_dtype

import cuattn
from cuattn import SoftmaxState, reference


def naive_state(x, axis=-1, scale=None):
    """The state in the dtype that it is kept in."""
    s = x.astype(lse_dtype(result_dtype(x)))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    with np.errstate(all="ignore"):
        m = np.max(s, axis, keepdims=True, initial=-np.inf)
        l = np.sum(np.exp(s - np.where(np.isfinite(m), m, 0)), axis)  # noqa: E741
    return SoftmaxState(m.reshape(l.shape), l)


def compare(backend, got, x, axis=-1, scale=None):
    """`m`, `l` and `lse` of a state against the reference of the whole `x`."""
    assert isinstance(got, SoftmaxState)
    wide = lse_dtype(result_dtype(x))
    for part in got:
        assert isinstance(part, backend.xp.ndarray)
        assert part.dtype == wide
    ref = reference.softmax_state(exact(x), axis, scale=scale)
    naive = naive_state(x, axis, scale)
    assert_close(backend.asnumpy(got.m), ref.m, naive.m)
    assert_close(backend.asnumpy(got.l), ref.l, naive.l)
    naive_lse = naive_logsumexp(x, axis, scale=scale, dtype=wide)
    assert_close(backend.asnumpy(got.lse), ref.lse, naive_lse)


def verify(backend, x, axis=-1, scale=None):
    before = x.tobytes()
    device_x = backend.asarray(x)
    device_scale = backend.asarray(scale) if isinstance(scale, np.ndarray) else scale
    got = cuattn.softmax_state(device_x, axis, scale=device_scale)
    assert backend.ran() or x.size == 0
    compare(backend, got, x, axis, scale)
    assert backend.asnumpy(device_x).tobytes() == before
    return got


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, n):
    verify(backend, draw(rng, (3, n)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32", "uint8"])
def test_dtype(backend, rng, dtype):
    verify(backend, draw(rng, (3, 129), dtype))


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    verify(backend, LAYOUTS[layout](draw(rng, (5, 129))))


@pytest.mark.parametrize("axis", [0, 1, -1, (0, 2), (0, 1, 2), None, ()])
def test_axis(backend, rng, axis):
    verify(backend, draw(rng, (4, 5, 33)), axis)


def test_scale(backend, rng):
    x = draw(rng, (4, 5, 33))
    for scale in (0.5, -1.5, 0):
        verify(backend, x, scale=scale)
    for shape in [(), (5, 1), (4, 5, 1)]:
        verify(backend, x, scale=np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32))


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("n", [3, 129, 1025, 70001])
def test_out(backend, rng, n, layout):
    call = functools.partial(cuattn.softmax_state, backend.asarray(draw(rng, (3, n))), scale=0.7)
    cases.check_outs(backend, rng, call, layout)


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (0, 1, 2), None, ()])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64", "int32"])
def test_out_axis(backend, rng, dtype, axis):
    x = LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (9, 10, 11), dtype))
    device_x, before = backend.asarray(x), x.tobytes()
    cases.check_outs(backend, rng, functools.partial(cuattn.softmax_state, device_x, axis))
    assert backend.asnumpy(device_x).tobytes() == before


def test_out_of_many_axes(backend, rng):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, 0, (1, 5, 11), None):
        call = functools.partial(cuattn.softmax_state, backend.asarray(x), axis)
        against = functools.partial(compare, backend, x=x, axis=axis)
        cases.check_outs(backend, rng, call, compare=against)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (2, 0, 3)])
def test_out_without_elements(backend, rng, shape):
    x = backend.asarray(np.ones(shape, np.float32))
    cases.check_outs(backend, rng, functools.partial(cuattn.softmax_state, x))


def test_in_place(backend, rng):
    """Each element a row of its own: m or l may be x."""
    x = draw(rng, (3, 40))
    for i in (0, 1, 0, 1):
        memory = backend.asarray(x.copy())
        out = [backend.xp.zeros_like(memory), backend.xp.zeros_like(memory)]
        out[i] = memory
        got = cuattn.softmax_state(memory, (), out=tuple(out))
        assert got[i] is memory
        np.testing.assert_array_equal(backend.asnumpy(got.m), x)
        np.testing.assert_array_equal(backend.asnumpy(got.l), np.ones_like(x))


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        verify(backend, np.array(value, np.float32))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, shape):
    x = np.zeros(shape, np.float32)
    for axis in [None, *range(-len(shape), len(shape))]:
        verify(backend, x, axis)


@pytest.mark.parametrize("n", [3, 33, 1025])
def test_special_values(backend, rng, n):
    verify(backend, np.stack([row for _, row in cases.special_rows(rng, n)]))


# Nothing on one side, one element, halves, uneven parts.
@pytest.mark.parametrize("split", [0, 1, 64, 100, 128, 129])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_merge_of_two_parts(backend, rng, dtype, split):
    x = draw(rng, (5, 129), dtype)
    parts = [
        cuattn.softmax_state(backend.asarray(x[:, part])) for part in (np.s_[:split], np.s_[split:])
    ]
    compare(backend, cuattn.merge(*parts), x)
    compare(backend, cuattn.merge(*parts[::-1]), x)


def test_merge_of_many_parts(backend, rng):
    """From the left, from the right, and as a tree."""
    x = draw(rng, (5, 400))
    cuts = [0, *sorted(rng.integers(0, 401, 6)), 400]
    parts = [
        cuattn.softmax_state(backend.asarray(x[:, begin:end]))
        for begin, end in zip(cuts[:-1], cuts[1:], strict=True)
    ]
    left, right, tree = parts[0], parts[-1], list(parts)
    for part in parts[1:]:
        left = cuattn.merge(left, part)
    for part in parts[-2::-1]:
        right = cuattn.merge(part, right)
    while len(tree) > 1:
        tree = [
            cuattn.merge(*tree[i : i + 2]) if i + 1 < len(tree) else tree[i]
            for i in range(0, len(tree), 2)
        ]
    for whole in (left, right, tree[0]):
        compare(backend, whole, x)


def test_merge_special_values(backend, rng):
    """NaN and infinities on one side, on the other, and on both."""
    for n in (3, 33):
        x = np.stack([row for _, row in cases.special_rows(rng, n)])
        for split in (0, 1, n // 2, n - 1, n):
            a = cuattn.softmax_state(backend.asarray(x[:, :split]))
            b = cuattn.softmax_state(backend.asarray(x[:, split:]))
            compare(backend, cuattn.merge(a, b), x)


def test_empty_state_is_the_identity(backend, rng):
    x = draw(rng, (5, 33))
    state = cuattn.softmax_state(backend.asarray(x))
    nothing = cuattn.softmax_state(backend.asarray(x[:, :0]))
    for merged in (cuattn.merge(state, nothing), cuattn.merge(nothing, state)):
        for got, want in zip(merged, state, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    both = cuattn.merge(nothing, nothing)
    assert (backend.asnumpy(both.m) == -INF).all() and (backend.asnumpy(both.l) == 0).all()
    assert (backend.asnumpy(both.lse) == -INF).all()


def test_merge_leaves_its_arguments(backend, rng):
    x = draw(rng, (5, 33))
    a, b = (cuattn.softmax_state(backend.asarray(x * k)) for k in (1, 2))
    before = [backend.asnumpy(part).copy() for part in (*a, *b)]
    cuattn.merge(a, b)
    for part, want in zip((*a, *b), before, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(part), want)


def test_merge_is_commutative_bitwise(backend, rng):
    """Rounding is the same whichever part comes first."""
    a, b = (cuattn.softmax_state(backend.asarray(draw(rng, (50, 33)))) for _ in range(2))
    for one, other in zip(cuattn.merge(a, b), cuattn.merge(b, a), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (3, 40), (2, 3, 5)])
def test_merge_shapes(backend, rng, shape):
    x = draw(rng, (*shape, 10))
    a, b = (cuattn.softmax_state(backend.asarray(x[..., part])) for part in (np.s_[:4], np.s_[4:]))
    compare(backend, cuattn.merge(a, b), x)


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (3, 40)])
def test_merge_out(backend, rng, shape, layout):
    a, b = (cuattn.softmax_state(backend.asarray(draw(rng, (*shape, 9)))) for _ in range(2))
    cases.check_outs(backend, rng, functools.partial(cuattn.merge, a, b), layout)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_merge_in_place(backend, rng, layout):
    """What is added up in one state, or in any two of the arrays."""
    x = draw(rng, (3, 40, 9))
    for places in ((0, 1), (1, 0), (2, 3), (0, 3), (2, 0), (0, 1)):
        a, b = (
            SoftmaxState(*(backend.asarray(LAYOUTS[layout](backend.asnumpy(p))) for p in state))
            for state in (cuattn.softmax_state(backend.asarray(part)) for part in (x, -x))
        )
        want = [backend.asnumpy(part) for part in cuattn.merge(a, b)]
        out = tuple((*a, *b)[i] for i in places)
        got = cuattn.merge(a, b, out=out)
        assert type(got) is SoftmaxState
        for part, given, one in zip(got, out, want, strict=True):
            assert part is given
            np.testing.assert_array_equal(backend.asnumpy(part), one)


def test_merge_of_strided_states(backend, rng):
    x = draw(rng, (2, 14, 33))
    a, b = (cuattn.softmax_state(backend.asarray(part)) for part in x)
    a, b = (SoftmaxState(part.m[::-2], part.l[::-2]) for part in (a, b))
    whole = np.concatenate(list(x[:, ::-2]), axis=-1)
    compare(backend, cuattn.merge(a, b), whole)


@pytest.mark.parametrize("n", [33, 300001])
def test_two_runs_are_bitwise_equal(backend, rng, n):
    x = backend.asarray(draw(rng, (2, n)))
    one, other = (cuattn.softmax_state(x) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert backend.asnumpy(a).tobytes() == backend.asnumpy(b).tobytes()
