"""merge_attention and merge_attention_states on every backend, against the whole and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from attention_cases import INF, NAN, arranged
from cases import LAYOUTS, Guarded
from tolerance import FLOATS, TABLE, assert_close, dtype_of, exact, lse_dtype

import cuattn
from cuattn import reference


def parts(rng, n, dtype="float32", shape=(2, 3, 17), columns=64, spread=3.0):
    """outs (n, ..., columns) and lses (n, ...), where a part that weighs nothing holds NaN."""
    lses = (rng.standard_normal((n, *shape)) * spread).astype(lse_dtype(dtype_of(dtype)))
    lses[rng.random(lses.shape) < 0.2] = -INF
    outs = rng.standard_normal((n, *shape, columns)).astype(dtype_of(dtype))
    return np.where(np.isneginf(lses)[..., None], dtype_of(dtype).type(NAN), outs), lses


@np.errstate(all="ignore")
def naive(outs, lses):
    """The plain expression in float32 (float64 for float64), its result in the dtype."""
    acc = lses.dtype.type
    m = np.max(lses, axis=0, initial=-INF)
    shift = np.where(np.isfinite(m), m, acc(0))
    weights = np.exp(lses - shift)
    total = np.sum(weights, axis=0, dtype=acc)
    terms = np.where(weights[..., None] == 0, acc(0), weights[..., None] * outs.astype(acc))
    out = np.sum(terms, axis=0, dtype=acc) / np.where(total == 0, acc(1), total)[..., None]
    return out.astype(outs.dtype), shift + np.log(total)


def check(got, outs, lses):
    """Against the formula in the widest float; `outs` and `lses` have the parts in front."""
    out, lse = got
    assert out.dtype == outs.dtype and lse.dtype == lses.dtype
    zeros = np.zeros(outs.shape[1:], np.longdouble), np.full(lses.shape[1:], -INF, np.longdouble)
    ref, ref_lse = (
        reference.merge_attention_states(exact(outs), exact(lses)) if len(outs) else zeros
    )
    plain, plain_lse = naive(outs, lses)
    terms = np.max(np.where(np.isfinite(outs), abs(exact(outs)), 0), axis=0, initial=0)
    size = 1 + np.max(np.where(np.isfinite(lses), abs(lses), 0), axis=0, initial=0)
    wide = out.itemsize > 2
    assert_close(out, ref, plain, terms=terms * size[..., None] if wide else None)
    assert_close(lse, ref_lse, plain_lse, terms=size)


def put(backend, *arrays):
    return [backend.asarray(a) for a in arrays]


def host(backend, pair):
    assert isinstance(pair, tuple) and len(pair) == 2
    assert all(isinstance(one, backend.xp.ndarray) for one in pair)
    return tuple(backend.asnumpy(one) for one in pair)


# ---- two parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 8, 20, 64, 111, 256])
def test_two(backend, rng, dtype, columns):
    outs, lses = parts(rng, 2, dtype, columns=columns)
    args = put(backend, outs[0], lses[0], outs[1], lses[1])
    check(host(backend, cuattn.merge_attention(*args)), outs, lses)
    assert backend.ran()


@pytest.mark.parametrize("dtype", FLOATS)
def test_two_is_commutative(backend, rng, dtype):
    (a, b), (c, d) = parts(rng, 2, dtype)
    one = host(backend, cuattn.merge_attention(*put(backend, a, c, b, d)))
    other = host(backend, cuattn.merge_attention(*put(backend, b, d, a, c)))
    for x, y in zip(one, other, strict=True):
        assert x.tobytes() == y.tobytes()


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_axes(backend, rng, layout, ndim):
    outs, lses = parts(rng, 2, shape=(2, 3, 17)[4 - ndim :])
    lead = (None,) * (4 - ndim)
    given = [arranged(o[lead], layout, ndim) for o in outs]
    args = put(backend, given[0], lses[0], given[1], lses[1])
    out, lse = host(backend, cuattn.merge_attention(*args, layout=layout))
    assert out.shape == given[0].shape and out.flags.c_contiguous
    check((arranged(out[lead], layout, ndim) if ndim == 2 else
           out.swapaxes(-3, -2) if layout == "BSHD" else out, lse), outs, lses)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    outs, lses = parts(rng, 2, "float16", columns=40)
    given = [LAYOUTS[layout](a) for a in (outs[0], lses[0], outs[1], lses[1])]
    before = [a.tobytes() for a in given]
    check(host(backend, cuattn.merge_attention(*put(backend, *given))), outs, lses)
    assert [a.tobytes() for a in given] == before
    mixed = [given[0], lses[0], np.ascontiguousarray(outs[1]), given[3]]
    check(host(backend, cuattn.merge_attention(*put(backend, *mixed))), outs, lses)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "strided", "misaligned", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "float64"])
@pytest.mark.parametrize("count", [2, 3])
def test_out(backend, rng, count, dtype, layout):
    outs, lses = parts(rng, count, dtype)
    out = Guarded(backend, outs.shape[1:], outs.dtype, layout)
    lse = Guarded(backend, lses.shape[1:], lses.dtype, layout)
    pair = outs[0], lses[0], outs[1], lses[1]
    merge = cuattn.merge_attention if count == 2 else cuattn.merge_attention_states
    args = put(backend, *(pair if count == 2 else (outs, lses)))
    got = merge(*args, out=(out.out, lse.out))
    assert got[0] is out.out and got[1] is lse.out
    out.check_rim()
    lse.check_rim()
    check(host(backend, got), outs, lses)


@pytest.mark.parametrize("dtype", FLOATS)
def test_corners(backend, dtype):
    """NaN, infinities and scores far apart, by hand."""
    wide = lse_dtype(dtype_of(dtype))
    rows = [
        # out_a, lse_a, out_b, lse_b -> out, lse
        (NAN, -INF, 5, 3, 5, 3),
        (1, 0, NAN, -INF, 1, 0),
        (INF, -INF, -2, -1e30, -2, -1e30),
        (NAN, -INF, NAN, -INF, 0, -INF),
        (7, -INF, 7, -INF, 0, -INF),
        (1, NAN, 1, 0, NAN, NAN),
        (1, -INF, 1, NAN, NAN, NAN),
        (NAN, 0, 1, 0, NAN, np.log(2)),
        (INF, 0, 1, 0, INF, np.log(2)),
        (2, 1000, 4, 1000, 3, 1000 + np.log(2)),
        (2, 1000, 4, -1000, 2, 1000),
        (2, -3000, 4, -3000, 3, -3000 + np.log(2)),
    ]
    out_a, lse_a, out_b, lse_b, out, lse = (np.array(c, float) for c in zip(*rows, strict=True))
    args = [
        np.repeat(out_a[:, None], 8, 1).astype(dtype_of(dtype)),
        lse_a.astype(wide),
        np.repeat(out_b[:, None], 8, 1).astype(dtype_of(dtype)),
        lse_b.astype(wide),
    ]
    got, got_lse = host(backend, cuattn.merge_attention(*put(backend, *args)))
    rtol = 8 * TABLE[dtype].relative
    want = np.repeat(out[:, None], 8, 1)
    np.testing.assert_allclose(got.astype(np.float64), want, rtol=rtol)
    np.testing.assert_allclose(got_lse, lse, rtol=8 * TABLE[wide.name].relative)


@pytest.mark.parametrize("shape", [(0, 3, 17, 8), (2, 0, 17, 8), (2, 3, 0, 8), (2, 3, 17, 0)])
def test_empty(backend, rng, shape):
    outs, lses = parts(rng, 2, shape=shape[:3], columns=shape[3])
    args = put(backend, outs[0], lses[0], outs[1], lses[1])
    check(host(backend, cuattn.merge_attention(*args)), outs, lses)
    check(host(backend, cuattn.merge_attention_states(*put(backend, outs, lses))), outs, lses)


# ---- any number of parts -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [0, 1, 2, 3, 5, 33])
def test_states(backend, rng, dtype, n):
    outs, lses = parts(rng, n, dtype, shape=(1, 2, 9), columns=20)
    got = host(backend, cuattn.merge_attention_states(*put(backend, outs, lses)))
    check(got, outs, lses)
    if n == 2:
        args = put(backend, outs[0], lses[0], outs[1], lses[1])
        two = host(backend, cuattn.merge_attention(*args))
        assert [one.tobytes() for one in two] == [one.tobytes() for one in got]


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -5, -4, -3, -2, np.int64(1)])
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_axis(backend, rng, axis, layout):
    outs, lses = parts(rng, 3)
    given = outs.swapaxes(2, 3) if layout == "BSHD" else outs
    given = np.ascontiguousarray(np.moveaxis(given, 0, axis))
    given_lses = np.ascontiguousarray(np.moveaxis(lses, 0, axis % 5))
    how = {"axis": axis, "layout": layout}
    out, lse = host(backend, cuattn.merge_attention_states(*put(backend, given, given_lses), **how))
    check((out.swapaxes(1, 2) if layout == "BSHD" else out, lse), outs, lses)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_states(backend, rng, layout):
    outs, lses = parts(rng, 3, columns=40)
    given = put(backend, LAYOUTS[layout](outs), LAYOUTS[layout](lses))
    check(host(backend, cuattn.merge_attention_states(*given)), outs, lses)


@pytest.mark.parametrize("dtype", FLOATS)
def test_one_state_is_what_it_was(backend, rng, dtype):
    outs, lses = parts(rng, 1, dtype)
    out, lse = host(backend, cuattn.merge_attention_states(*put(backend, outs, lses)))
    nothing = np.isneginf(lses[0])
    assert not out[nothing].any()
    np.testing.assert_array_equal(out[~nothing], outs[0][~nothing])
    np.testing.assert_array_equal(lse, lses[0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_associative(backend, rng, dtype):
    """One by one in any order is all at once, up to rounding."""
    outs, lses = parts(rng, 4, dtype)
    for order in (range(4), rng.permutation(4)):
        order = list(order)
        out, lse = put(backend, outs[order[0]], lses[order[0]])
        for i in order[1:]:
            out, lse = cuattn.merge_attention(out, lse, *put(backend, outs[i], lses[i]))
        out, lse = host(backend, (out, lse))
        ref, ref_lse = reference.merge_attention_states(outs, lses)
        tolerance = 64 * TABLE[dtype].relative
        np.testing.assert_allclose(out, ref, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(lse, ref_lse, rtol=tolerance, atol=tolerance)


def test_of_varlen(backend, rng):
    """out (total, H, D) with lse (H, total): layout BSHD with three axes."""
    q, k = rng.standard_normal((2, 30, 2, 32)).astype(np.float32)
    ends = np.array([0, 11, 30])
    halves = np.array([0, 5, 18]), np.array([0, 6, 12])
    seen = [np.r_[0:5, 11:24], np.r_[5:11, 24:30]]
    args = []
    for rows, cu in zip(seen, halves, strict=True):
        given = put(backend, q, k[rows], k[rows], ends, cu)
        args += cuattn.attention_varlen(*given, return_lse=True)
    out, lse = host(backend, cuattn.merge_attention(*args, layout="BSHD"))
    ref, ref_lse = reference.attention_varlen(q, k, k, ends, ends, return_lse=True)
    tolerance = 32 * TABLE["float32"].relative
    np.testing.assert_allclose(out, ref, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(lse, ref_lse, rtol=tolerance, atol=tolerance)
