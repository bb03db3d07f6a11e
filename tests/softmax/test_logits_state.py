"""logits_state and its merge: losses and entropies of rows whose parts never meet."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, draw
from test_entropy import naive_entropy, terms_of_entropy, terms_of_tilt
from test_softmax_state import naive_state
from tolerance import (
    FLOATS,
    assert_close,
    exact,
    lse_dtype,
    naive_log_softmax,
    naive_logsumexp,
)
from tolerance import result_dtype as float_dtype

import cuattn
from cuattn import LogitsState, SoftmaxState, reference


@np.errstate(all="ignore")
def naive_tilt(x, axis=-1, scale=None):
    """``sum(exp(d) * d)`` in the dtype of the result."""
    s = x.astype(lse_dtype(float_dtype(x)))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    m = np.max(s, axis, keepdims=True, initial=-np.inf)
    d = s - np.where(np.isfinite(m), m, 0).astype(s.dtype)
    return np.sum(np.where(np.exp(d) == 0, 0, np.exp(d) * d), axis)


def compare(backend, got, x, labels, axis=-1, scale=None, index_offset=0, outside=False, parts=0):
    """A state, and what its properties make of it, against those of the whole `x`. `outside`:
    labels may be of none of the parts. `parts`: merged one by one, each with a rounding."""
    assert type(got) is LogitsState
    wide = lse_dtype(float_dtype(x))
    for part in got:
        assert isinstance(part, backend.xp.ndarray) and part.dtype == wide
    found = LogitsState(*map(backend.asnumpy, got))
    rows, at = (x.reshape(-1), 0) if axis is None or x.ndim == 0 else (x, axis)
    options = {"axis": axis, "scale": scale, "index_offset": index_offset}
    want = reference.logits_state(exact(x), labels, **options)
    naive = naive_state(rows, at, scale)
    assert_close(found.m, want.m, naive.m)
    assert_close(found.l, want.l, naive.l, terms=want.l * (1 + parts / 4))
    terms = terms_of_tilt(exact(rows) * (1 if scale is None else exact(scale)), at) * (
        1 + parts / 4
    )
    assert_close(found.t, want.t, naive_tilt(rows, at, scale), terms=terms)
    factor = 1 if scale is None else np.asarray(scale, wide)
    s = np.moveaxis(rows.astype(wide) * factor, at, -1)
    place = np.asarray(labels).astype(np.int64) - index_offset
    inside = (place >= 0) & (place < s.shape[-1])
    assert inside.all() or outside
    picked = np.full(place.shape, NAN)
    if s.size:
        picked = np.take_along_axis(s, np.where(inside, place, 0)[..., None], -1)[..., 0]
    picked = np.where(inside, picked, NAN)
    np.testing.assert_allclose(found.logit, picked, rtol=np.finfo(wide).eps)

    lse = naive_logsumexp(rows, at, scale=scale, dtype=wide)
    assert_close(backend.asnumpy(got.lse), reference.logsumexp(exact(s), -1), lse)
    entropy = backend.asnumpy(got.entropy)
    if s.shape[-1]:
        naive, want = naive_entropy(rows, at, scale=scale), reference.entropy(exact(s))
        terms = 1 + terms_of_entropy(exact(s))  # 1: of l, whose digits a logarithm near 0 has
        assert_close(entropy, want, naive, terms=terms * (1 + parts / 4))
        assert got.entropy.dtype == wide
        log_p = np.moveaxis(naive_log_softmax(rows, at, scale=scale, dtype=wide), at, -1)
        log_p = np.take_along_axis(log_p, np.where(inside, place, 0)[..., None], -1)[..., 0]
        loss = reference.cross_entropy(exact(s), np.where(inside, place, -1), ignore_index=s.size)
        terms = (1 + abs(loss)) * (1 + parts / 4)
        assert_close(backend.asnumpy(got.cross_entropy), loss, -log_p, terms=terms)
        assert_close(backend.asnumpy(got.log_prob), -loss, log_p, terms=terms)
    else:
        assert np.isnan(entropy).all() and np.isnan(backend.asnumpy(got.cross_entropy)).all()


def draw_labels(rng, x, axis=-1, dtype="int64"):
    x, axis = (x.reshape(-1), 0) if axis is None or x.ndim == 0 else (x, axis)
    return np.asarray(rng.integers(0, x.shape[axis], np.delete(x.shape, axis))).astype(dtype)


def verify(backend, x, labels, **options):
    before = x.tobytes(), labels.tobytes()
    kwargs = {
        name: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for name, value in options.items()
        if name != "outside"
    }
    got = cuattn.logits_state(backend.asarray(x), backend.asarray(labels), **kwargs)
    assert backend.ran() or x.size == 0
    compare(backend, got, x, labels, **options)
    assert (x.tobytes(), labels.tobytes()) == before
    return got


def parts_of(backend, x, labels, cuts, axis=-1, **options):
    """The states of pieces of x along an axis."""
    for begin, end in zip([0, *cuts], [*cuts, x.shape[axis]], strict=True):
        piece = np.moveaxis(np.moveaxis(x, axis, 0)[begin:end], 0, axis)
        yield cuattn.logits_state(
            backend.asarray(piece),
            backend.asarray(labels),
            axis=axis,
            index_offset=begin,
            **options,
        )


@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, n):
    x = draw(rng, (3, n))
    verify(backend, x, draw_labels(rng, x))


@pytest.mark.parametrize("dtype", [*FLOATS, "int32", "uint8"])
def test_dtype(backend, rng, dtype):
    x = draw(rng, (3, 129), dtype)
    for label_dtype in ("int32", "int64", "uint8", "uint64"):
        verify(backend, x, draw_labels(rng, x, dtype=label_dtype))


@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    x = draw(rng, (rows, n))
    verify(backend, x, draw_labels(rng, x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    x = LAYOUTS[layout](draw(rng, (5, 129)))
    verify(backend, x, draw_labels(rng, x))
    verify(backend, x, draw_labels(rng, x, 0), axis=0)


@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_axis(backend, rng, axis):
    for layout in LAYOUTS.values():
        x = layout(draw(rng, (4, 5, 33)))
        verify(backend, x, draw_labels(rng, x, axis), axis=axis)


def test_scale(backend, rng):
    x = draw(rng, (4, 5, 33))
    labels = draw_labels(rng, x)
    for scale in (0.5, -1.5, 3.0, 0):
        verify(backend, x, labels, scale=scale)
    for shape in [(), (5, 1), (4, 5, 1)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
        verify(backend, x, labels, scale=scale)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
@pytest.mark.parametrize("axis", [0, 1])
def test_labels_outside(backend, rng, axis, dtype):
    """Of other parts, wherever the part begins; also where a number would overflow."""
    x = LAYOUTS["padded"](draw(rng, (7, 50)))
    x = x if axis else np.ascontiguousarray(x.T)
    info = np.iinfo(dtype)
    labels = np.array([info.min, info.max, -1, 0, 49, 50, 99], dtype)
    for offset in (0, 1, 50, 2**31 - 50, 2**63 - 51):
        verify(backend, x, labels, axis=axis, index_offset=offset, outside=True)
    verify(backend, x, np.full(7, 2**63 - 2), axis=axis, index_offset=2**63 - 51)


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("n", [3, 129, 70_001])
def test_out(backend, rng, n, layout):
    x = draw(rng, (3, n))
    given = backend.asarray(x), backend.asarray(draw_labels(rng, x))
    call = functools.partial(cuattn.logits_state, *given, scale=0.7)
    cases.check_outs(backend, rng, call, layout)


def test_many_axes(backend, rng):
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    for axis in (-1, 0, 5):
        verify(backend, x, draw_labels(rng, x, axis), axis=axis)


def test_zero_dimensions(backend):
    for value in (3.5, INF, -INF, NAN):
        verify(backend, np.array(value, np.float32), np.array(0))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, shape):
    for axis in range(-len(shape), len(shape)):
        labels = np.zeros(np.delete(shape, axis), np.int64)
        verify(backend, np.zeros(shape, np.float32), labels, axis=axis, outside=True)


@pytest.mark.parametrize("n", [3, 33, 1025])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_special_values(backend, rng, dtype, n):
    x = np.stack([row for _, row in cases.special_rows(rng, n, dtype)])
    for label in (0, n // 3, n // 2, n - 1):
        verify(backend, x, np.full(len(x), label))
    verify(backend, np.ascontiguousarray(x.T), np.full(len(x), n // 3), axis=0)


@pytest.mark.parametrize("size", [1e30, 3e38])
def test_huge_scores(backend, rng, size):
    for n in (2, 300, 5000, 40_000):
        x = rng.choice(np.float32([-1, 0, 1]), (5, n)) * np.float32(size)
        labels = draw_labels(rng, x)
        state = verify(backend, x, labels)
        assert (backend.asnumpy(state.t) == 0).all()
        cut = int(rng.integers(n + 1))
        merged = cuattn.merge(*parts_of(backend, x, labels, [cut]))
        for one, whole in zip(merged, state, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(whole))


def test_softmax_of_state(backend, rng):
    x = draw(rng, (5, 200))
    labels = draw_labels(rng, x)
    state = cuattn.merge(*parts_of(backend, x, labels, [70]))
    for name in ("softmax", "log_softmax"):
        for _ in range(2):
            got = getattr(cuattn, name)(backend.asarray(x[:, 70:]), state=state)
        want = getattr(reference, name)(x)[:, 70:].astype("f4")
        np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-5, atol=1e-6)


# ---- Merges --------------------------------------------------------------------------------------


@pytest.mark.parametrize("splits", [1, 2, 7, 64])
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_any_split_is_the_whole(backend, rng, dtype, splits):
    """From the left, from the right, and as a tree."""
    x = draw(rng, (5, 400), dtype)
    labels = draw_labels(rng, x)
    cuts = sorted(int(c) for c in rng.integers(0, 401, splits - 1))
    parts = [*parts_of(backend, x, labels, cuts, scale=0.7)]
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
    for whole, merges in ((left, splits), (right, splits), (tree[0], 6)):
        compare(backend, whole, x, labels, scale=0.7, parts=merges)


@pytest.mark.parametrize("split", [0, 1, 64, 128, 129])
def test_merge_along_other_axes(backend, rng, split):
    x = draw(rng, (129, 5))
    labels = draw_labels(rng, x, 0)
    parts = [*parts_of(backend, x, labels, [split], axis=0)]
    compare(backend, cuattn.merge(*parts), x, labels, axis=0)
    compare(backend, cuattn.merge(*parts[::-1]), x, labels, axis=0)


def test_merge_special_values(backend, rng):
    """NaN and infinities on one side, on the other, and on both; a NaN shows in m, l and t."""
    for n in (3, 33):
        x = np.stack([row for _, row in cases.special_rows(rng, n)])
        labels = np.full(len(x), n // 3)
        for split in (0, 1, n // 2, n - 1, n):
            state = cuattn.merge(*parts_of(backend, x, labels, [split]))
            compare(backend, state, x, labels)
            rows = np.isnan(x).any(1)
            for part in state[:3]:
                assert (np.isnan(backend.asnumpy(part)) == rows).all()


@pytest.mark.parametrize("n", [33, 1025, 5000])
def test_infinite_beside_huge(backend, rng, n):
    """Nothing of other lanes, warps and tiles makes a NaN of l or t."""
    x = rng.choice(np.float32([1e30, -1e30, 1000, 999, -1000, 1]), (6, n))
    x[np.arange(6), rng.integers(0, n, 6)] = INF
    verify(backend, x, draw_labels(rng, x))
    verify(backend, np.ascontiguousarray(x.T), draw_labels(rng, x), axis=0)


def test_merge_of_infinite_and_huge(backend):
    """Where the whole's maximum is infinite, nothing of the other part makes a NaN of l or t."""
    for value in (1e30, -1e30, 0.0, 3e38, -3e38):
        x = np.array([[value, value, INF, 1], [INF, 1, value, -value]], np.float32)
        labels = np.array([0, 2])
        for split in (1, 2, 3):
            compare(backend, cuattn.merge(*parts_of(backend, x, labels, [split])), x, labels)


def test_empty_state_is_the_identity(backend, rng):
    x = draw(rng, (5, 33))
    labels = draw_labels(rng, x)
    *_, nothing = parts_of(backend, x, labels, [33])
    state = cuattn.logits_state(backend.asarray(x), backend.asarray(labels))
    for merged in (cuattn.merge(state, nothing), cuattn.merge(nothing, state)):
        for got, want in zip(merged, state, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(got), backend.asnumpy(want))
    both = [*map(backend.asnumpy, cuattn.merge(nothing, nothing))]
    for got, want in zip(both, (-INF, 0, 0, NAN), strict=True):
        np.testing.assert_array_equal(got, np.full(5, want))


def test_merge_is_commutative_bitwise(backend, rng):
    x = draw(rng, (50, 66))
    a, b = parts_of(backend, x, draw_labels(rng, x), [33])
    for one, other in zip(cuattn.merge(a, b), cuattn.merge(b, a), strict=True):
        np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 0), (3, 40)])
def test_merge_out(backend, rng, shape, layout):
    x = draw(rng, (*shape, 9))
    a, b = parts_of(backend, x, np.zeros(shape, np.int64), [4])
    cases.check_outs(backend, rng, functools.partial(cuattn.merge, a, b), layout)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_merge_in_place(backend, rng, layout):
    x = draw(rng, (3, 40, 9))
    labels = draw_labels(rng, x)
    for left in (True, False):
        a, b = (
            LogitsState(*(backend.asarray(LAYOUTS[layout](backend.asnumpy(p))) for p in state))
            for state in parts_of(backend, x, labels, [4])
        )
        want = [backend.asnumpy(part) for part in cuattn.merge(a, b)]
        out = a if left else b
        got = cuattn.merge(a, b, out=tuple(out))
        assert type(got) is LogitsState
        for part, given, one in zip(got, out, want, strict=True):
            assert part is given
            np.testing.assert_array_equal(backend.asnumpy(part), one)


def test_kinds_do_not_merge(backend, rng):
    x = draw(rng, (3, 9))
    a, b = parts_of(backend, x, draw_labels(rng, x), [4])
    plain = SoftmaxState(a.m, a.l)
    with pytest.raises(TypeError, match="a must be a LogitsState|b must be a LogitsState"):
        cuattn.merge(a, plain)
    with pytest.raises(TypeError, match="b must be a SoftmaxState"):
        cuattn.merge(plain, b)


@pytest.mark.parametrize("n", [33, 300_001])
def test_two_runs_are_bitwise_equal(backend, rng, n):
    x = draw(rng, (2, n))
    given = backend.asarray(x), backend.asarray(draw_labels(rng, x))
    one, other = (cuattn.logits_state(*given) for _ in range(2))
    for a, b in zip(one, other, strict=True):
        assert backend.asnumpy(a).tobytes() == backend.asnumpy(b).tobytes()
