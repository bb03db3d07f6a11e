"""softmax_topk: the order of the logits exactly, their probabilities as close as softmax."""

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
    NAIVE,
    TABLE,
    assert_close,
    dtype_of,
    exact,
    lse_dtype,
    sum_error,
)

import cuattn
from cuattn import reference

FUNCTION = {"prob": "softmax", "log_prob": "log_softmax"}
OUTPUTS = ("prob", "log_prob", "logit")
OUTPUT = pytest.mark.parametrize("output", OUTPUTS)


def put(backend, value):
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def compare_full(values, indices, x, axis, output, options):
    """The values in their places of the whole row, by the rule of `softmax`."""
    name = FUNCTION[output]
    ref = getattr(reference, name)(exact(x), axis, **options)
    naive = NAIVE[name](x, axis, **options)
    row = np.array(ref, values.dtype, order="C")
    np.put_along_axis(row, indices, values, axis)
    assert_close(row, ref, naive, probabilities=output == "prob")


def compare_renormalized(values, indices, x, axis, output, options):
    """The values as a row of k, by the rule of `softmax`."""
    options = {
        key: np.take_along_axis(np.broadcast_to(value, x.shape), indices, axis)
        for key, value in options.items()
        if value is not None
    }
    x = np.take_along_axis(x, indices, axis)
    ref = getattr(reference, FUNCTION[output])(exact(x), axis, **options)
    naive = NAIVE[FUNCTION[output]](x, axis, **options)
    assert_close(values, ref, naive, probabilities=output == "prob")


def compare_lse(lse, x, axis, options):
    wide = lse_dtype(x.dtype)
    assert lse.dtype == wide
    ref = reference.softmax(exact(x), axis, return_lse=True, **options)[1]
    assert_close(lse, ref, NAIVE["logsumexp"](x, axis, dtype=wide, **options))


@np.errstate(all="ignore")  # NaN may be signalling
def verify(
    backend, x, k, *, axis=-1, output="prob", renormalize=False, return_lse=False, **options
):
    """Run one call and compare; `options` are scale and where. The inputs stay as they were."""
    before = x.tobytes()
    how = {"axis": axis, "output": str(output), "renormalize": renormalize}
    if return_lse:
        how["return_lse"] = True
    device_x = backend.asarray(x)
    device = {key: put(backend, value) for key, value in options.items()}
    got = cuattn.softmax_topk(device_x, k, **how, **device)
    ref = reference.softmax_topk(x, k, **how, **options)
    assert backend.ran() or x.size == 0 or k == 0
    assert type(got) is (cuattn.SoftmaxTopKLse if return_lse else cuattn.SoftmaxTopK)
    assert all(isinstance(part, backend.xp.ndarray) for part in got)
    values, indices = (backend.asnumpy(part) for part in got[:2])
    assert values.dtype == x.dtype and indices.dtype == np.int64
    assert values.shape == indices.shape == ref.values.shape
    np.testing.assert_array_equal(indices, ref.indices)
    rows = np.atleast_1d(x)
    if output == "logit":
        np.testing.assert_array_equal(exact(values), exact(ref.values.astype(x.dtype)))
    elif renormalize:
        compare_renormalized(values, indices, rows, axis, output, options)
    else:
        compare_full(values, indices, rows, axis, output, options)
    if return_lse:
        compare_lse(backend.asnumpy(got.lse), rows, axis, options)
    assert backend.asnumpy(device_x).tobytes() == before
    return values, indices


def any_way(rng):
    """One of the ways in which a result can be asked for."""
    flags = {name: bool(rng.random() < 0.4) for name in ("renormalize", "return_lse")}
    return {"output": rng.choice(OUTPUTS), **flags}


# ---- against Python ----------------------------------------------------------------------------


def test_python(backend, rng):
    """On distinct logits: those of the sorted row, exp over the sum of exp."""
    for n in (1, 8, 33):
        x = rng.permuted(np.broadcast_to(np.arange(n) / 4, (5, n)), axis=1).astype(np.float32)
        for k in sorted({min(n, 5), n}):
            values, indices = verify(backend, x, k)
            for row, got, places in zip(x, values, indices, strict=True):
                order = sorted(range(n), key=lambda i, row=row: -float(row[i]))[:k]
                assert places.tolist() == order
                total = np.sum(np.exp(exact(row)))
                assert got.tolist() == pytest.approx(
                    [float(np.exp(exact(row[i])) / total) for i in order],
                    rel=16 * TABLE["float32"].relative,
                )


# ---- sizes and dtypes --------------------------------------------------------------------------


@pytest.mark.parametrize("n", cases.RANKED_LENGTHS)
def test_length(backend, rng, n):
    k = cases.any_k(rng, n)
    verify(backend, ranking_stack(rng, n, k, special=True), k, **any_way(rng))


def test_every_k(backend, rng):
    for k in cases.KS:
        verify(backend, draw(rng, (9, 1025)), k, **any_way(rng))


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype(backend, rng, dtype, output, renormalize):
    x = ranking_stack(rng, 33, 5, dtype, special=True)
    verify(backend, x, 5, output=output, renormalize=renormalize, return_lse=True)


# Lists of several registers a lane; more than they hold.
@pytest.mark.parametrize("n, k", [(310, 64), (531, 300)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_dtype_many(backend, rng, dtype, n, k):
    x = ranking_stack(rng, n, k, dtype, special=True)
    verify(backend, x, k, **any_way(rng))
    verify(backend, x, k, return_lse=True)


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_rows(backend, rng, rows):
    for n, k in ((3, 2), (33, 5), (1025, 40)):
        verify(backend, draw(rng, (rows, n)), k)


@pytest.mark.parametrize("n", [8, 64, 128, 256])
def test_many_short_rows(backend, rng, n):
    """As a router chooses experts, with probabilities of all or of the chosen ones."""
    for k in rng.permutation([1, 2, 6, 8])[:2]:
        x = draw(rng, (1000, n), "bfloat16" if n == 128 else "float32")
        x[::7] = np.round(x[::7])  # ties
        verify(backend, x, k, renormalize=bool(rng.random() < 0.5))


@pytest.mark.parametrize("k", [1, 8, 1000])
def test_long_rows(backend, rng, k):
    """GPT-2's vocabulary: odd, so that the second row is misaligned. That one has ties."""
    x = draw(rng, (2, 50257))
    x[1] = np.round(x[1])
    verify(backend, x, k, return_lse=True)
    verify(backend, x, k, output="log_prob", renormalize=True, scale=0.7)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_long_rows_dtype(backend, rng, dtype):
    verify(backend, draw(rng, (1, 50257), dtype), 50, **any_way(rng))


@pytest.mark.parametrize(
    "kind, k",
    [("random", 3), ("random", 3000), ("ascending", 129), ("nan", 3)],
)
def test_longer_than_a_cluster(backend, rng, kind, k):
    x = draw(rng, (1, 300001))
    if kind == "ascending":
        x.sort()
    if kind == "nan":
        x[0, rng.integers(0, 300001, 2)] = NAN
    verify(backend, x, k, **any_way(rng))


# ---- layouts and axes --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    for n, k in ((33, 8), (128, 33), (1025, 300), (1025, 5)):
        verify(backend, LAYOUTS[layout](np.round(draw(rng, (5, n)))), k, **any_way(rng))


@pytest.mark.parametrize("layout", ["misaligned", "padded", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layout_dtype(backend, rng, dtype, layout):
    n, k = [(128, 8), (531, 40)][int(rng.integers(2))]
    verify(backend, LAYOUTS[layout](draw(rng, (5, n), dtype)), k, **any_way(rng))


@pytest.mark.parametrize("layout", ["contiguous", "padded", "fortran", "reversed rows"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3, None])
def test_axis(backend, rng, axis, layout):
    x = LAYOUTS[layout](np.round(draw(rng, (4, 5, 33))))
    verify(backend, x, 3, axis=axis, return_lse=True)
    verify(backend, x, 3, axis=axis, renormalize=True)
    verify(backend, x, 0, axis=axis)


@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (4097, 3)])
def test_first_axis(backend, rng, shape):
    for k in (3, 300) if shape[0] == 4097 else (3,):
        verify(backend, draw(rng, shape), k, axis=0, **any_way(rng))


@pytest.mark.parametrize("axis", [-1, 0, 2, 3, None])
def test_not_collapsible(backend, rng, axis):
    """Five axes of which no two can be walked as one, with negative and zero strides."""
    base = np.round(draw(rng, (6, 4, 1, 10, 7)))
    x = np.broadcast_to(base, (6, 4, 3, 10, 7))[::2, ::-1, :, 1:8:3, ::-2]
    verify(backend, x, 3, axis=axis, return_lse=True)
    where = np.asfortranarray(rng.random(x.shape) < 0.6)
    verify(backend, x, 3, axis=axis, where=where, return_lse=True)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_broadcast_input(backend, rng, axis):
    for shape in [(1, 33), (1, 1)]:
        verify(backend, np.broadcast_to(draw(rng, shape), (5, 33)), 3, axis=axis)


# ---- scale -------------------------------------------------------------------------------------


@OUTPUT
@pytest.mark.parametrize("scale", [0.125, 1, 0.7, 0, 0.0, -0.5, np.float32(3), np.float64(-1)])
def test_scale(backend, rng, output, scale):
    x = np.concatenate([draw(rng, (3, 129)), np.round(draw(rng, (3, 129)))])
    verify(backend, x, 20, output=output, scale=scale, return_lse=True)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_scale_dtype(backend, rng, dtype):
    x = draw(rng, (3, 310), dtype)
    verify(backend, x, 64, scale=-0.3, return_lse=True)
    verify(backend, x, 64, scale=0.7, output="logit")


def test_order_is_that_of_the_rounded_logits(backend):
    """Numbers apart that one logit stands for are ties: the first is the best."""
    x = np.float32(1.9375) + np.arange(64, dtype=np.float32) * np.float32(2**-23)
    scale = np.float32(1.0625)  # beyond 2 float32 is half as dense
    assert len(np.unique(x * scale)) < len(np.unique(x)) == 64
    for row in (x, x[::-1].copy()):
        _, indices = verify(backend, row, 40, scale=scale)
        assert indices.tolist() == sorted(range(64), key=lambda i, row=row: -(row[i] * scale))[:40]


# One for all, one for each row, columns of rows; in the dtype of x or in another.
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (4, 1, 1), (1, 5, 1), (4, 5, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_array(backend, rng, shape, dtype):
    scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(dtype)
    verify(backend, draw(rng, (4, 5, 33)), 6, scale=scale, return_lse=True)


@pytest.mark.parametrize("axis, shape", [(0, (1, 5, 33)), (1, (4, 1, 1)), (None, (1, 1, 1))])
def test_scale_array_axis(backend, rng, axis, shape):
    scale = (rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, draw(rng, (4, 5, 33)), 3, axis=axis, scale=scale, **any_way(rng))


def test_scale_array_strides(backend, rng):
    scale = (rng.integers(-8, 9, (1, 10)) / 8).astype(np.float32)
    for view in (scale.T[::2], scale.T[::-2], np.broadcast_to(scale[:, :1], (5, 1))):
        verify(backend, draw(rng, (5, 33)), 4, scale=view)


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
def test_scale_meets_infinity(backend, output, renormalize):
    """``scale * x`` as IEEE says: 0 * inf is NaN, and a negative scale swaps the infinities."""
    x = np.array([[INF, 0, 1], [-INF, 0, 1], [-INF, -INF, -INF], [NAN, 0, 1], [1, 2, -3]])
    x = x.astype(np.float32)
    for scale in (0.0, -1.0, 2.0, INF, -INF, NAN):
        for k in (1, 2, 3):
            verify(backend, x, k, output=output, renormalize=renormalize, scale=scale)


# ---- where -------------------------------------------------------------------------------------


def masks(rng, shape, k):
    """Full, one for all rows, one for all columns; rows with fewer than k elements, and none."""
    full = rng.random(shape) < 0.6
    full[1], full[2] = False, True
    full[0] = np.arange(shape[-1]) == shape[-1] - 1
    full[3] = rng.permutation(shape[-1]) < k - 1
    yield full
    yield full[3:4]
    yield full[4]
    yield rng.random((shape[0], 1)) < 0.5
    yield np.asfortranarray(full)
    yield full[:, ::-1]
    yield np.zeros(shape, bool)
    yield np.array(True)
    yield np.array([False])


@pytest.mark.parametrize("n, k", [(3, 2), (33, 8), (1025, 5), (1025, 300)])
def test_where(backend, rng, n, k):
    x = np.concatenate([draw(rng, (3, n)), np.round(draw(rng, (3, n)))])
    x[4, ::2] = -INF  # as good as what does not take part
    for where in masks(rng, x.shape, k):
        verify(backend, x, k, where=where, **any_way(rng))


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_where_dtype(backend, rng, dtype, output, renormalize):
    x = draw(rng, (5, 33), dtype)
    how = {"output": output, "renormalize": renormalize}
    for where in masks(rng, x.shape, 8):
        verify(backend, x, 8, where=where, return_lse=True, **how)


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
def test_where_hides_anything(backend, rng, output, renormalize):
    """What does not take part changes nothing, whatever it holds."""
    x = draw(rng, (5, 33))
    how = {"output": output, "renormalize": renormalize, "scale": -0.5}
    for where in masks(rng, x.shape, 8):
        plain = verify(backend, x, 8, where=where, **how)
        for bad in (NAN, INF, -INF):
            hidden = np.where(where, x, np.float32(bad))
            got = verify(backend, hidden, 8, where=where, **how)
            np.testing.assert_array_equal(got[0], plain[0])
            np.testing.assert_array_equal(got[1], plain[1])


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
def test_where_beside_special_values(backend, rng, output, renormalize):
    """NaN and infinities on both sides of the mask."""
    for n, k in ((33, 8), (1025, 40)):
        x = ranking_stack(rng, n, k, special=True)
        where = rng.random(x.shape) < 0.5
        verify(backend, x, k, where=where, output=output, renormalize=renormalize, return_lse=True)


@OUTPUT
def test_where_nothing_takes_part(backend, output):
    """Zeros or -inf, at the first k places, for all three outputs; lse is -inf."""
    x = np.array([[1.0, NAN, INF, 4.0]] * 2, np.float32)
    where = np.array([[False] * 4, [True] * 4])
    for renormalize in (False, True):
        how = {"output": output, "renormalize": renormalize, "return_lse": True}
        values, indices = verify(backend, x, 3, where=where, **how)
        assert indices[0].tolist() == [0, 1, 2]
        assert values[0].tolist() == [0.0 if output == "prob" else -INF] * 3


@pytest.mark.parametrize("axis", [0, 1, None])
def test_where_axis(backend, rng, axis):
    x = np.round(draw(rng, (4, 5, 33)))
    for shape in [(4, 5, 33), (5, 1), (33,), (4, 1, 33)]:
        where = rng.random(shape) < 0.5
        verify(backend, x, 3, axis=axis, where=where, **any_way(rng))


def test_where_of_a_long_row(backend, rng):
    x = draw(rng, (2, 50257))
    where = np.zeros(x.shape, bool)
    where[0, -1] = True
    x[0, :-1] = NAN
    verify(backend, x, 20, where=where, return_lse=True)
    where[1] = rng.random(50257) < 0.01
    verify(backend, x, 1000, where=where, output="log_prob")


def test_where_true(backend, rng):
    verify(backend, draw(rng, (3, 33)), 4, where=True)


# ---- corners -----------------------------------------------------------------------------------


@OUTPUT
@pytest.mark.parametrize("axis", [-1, 0, None])
def test_zero_dimensions(backend, output, axis):
    """One number is a row of one; its lse has no dimension."""
    for value in (3.5, 0.0, -INF, INF, NAN):
        for k in (0, 1):
            x = np.array(value, np.float32)
            values, _ = verify(backend, x, k, axis=axis, output=output, return_lse=True)
            assert values.shape == (k,)
            verify(backend, x, k, axis=axis, output=output, where=np.array(False), scale=2)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_empty(backend, rng, shape):
    for dtype in ("float32", "float16", "float64"):
        x = draw(rng, shape, dtype)
        for axis in [None, *range(-len(shape), len(shape))]:
            n = x.size if axis is None else shape[axis]
            for k in {0, n // 2, n}:
                verify(backend, x, k, axis=axis, return_lse=True)
                where = np.zeros(shape, bool)
                verify(backend, x, k, axis=axis, where=where, scale=0.5, renormalize=True)


@pytest.mark.parametrize("dtype, n", [("float32", 33), ("float32", 50257), ("bfloat16", 129)])
def test_k_zero(backend, rng, dtype, n):
    """Nothing is selected, and lse is that of the row."""
    verify(backend, draw(rng, (3, n), dtype), 0, return_lse=True)
    verify(backend, draw(rng, (3, n), dtype), 0, where=rng.random((3, n)) < 0.5, return_lse=True)


@OUTPUT
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("n, k", [(3, 3), (33, 9), (310, 9), (310, 300)])
def test_special_values(backend, rng, output, renormalize, n, k):
    """Each special row beside ordinary ones, whose results it must not touch."""
    rows = [row for _, row in cases.special_rows(rng, n)]
    x = draw(rng, (2 * len(rows), n))
    how = {"output": output, "renormalize": renormalize}
    plain = verify(backend, x, k, **how)
    x[::2] = rows
    got = verify(backend, x, k, **how)
    for one, other in zip(got, plain, strict=True):
        np.testing.assert_array_equal(one[1::2], other[1::2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_special_values_dtype(backend, rng, dtype):
    x = np.stack([row for _, row in cases.special_rows(rng, 33, dtype)])
    for k in (5, 33):
        for output in OUTPUTS:
            verify(backend, x, k, output=output, return_lse=output == "prob")


def test_special_values_in_long_rows(backend, rng):
    """At the very end, where only the last thread of the last block sees it."""
    x = draw(rng, (3, 70001))
    x[:, -1] = NAN, INF, -INF
    verify(backend, x, 5, return_lse=True)


@OUTPUT
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_offset(backend, rng, output, dtype):
    """Nothing overflows before the maximum is taken off."""
    limit = 10000 if dtype == "float16" else 1e30
    for offset in (1000.0, -1000.0, 10000.0):
        x = (rng.integers(-8, 9, (3, 33)) + offset).astype(dtype_of(dtype))
        verify(backend, x, 5, output=output)
    x = np.array([[limit, -limit, 0], [-limit, -limit, -limit]]).astype(dtype_of(dtype))
    verify(backend, x, 2, output=output)


# ---- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, k", [(33, 5), (310, 64), (531, 300)])
def test_renormalized_sum_to_one(backend, rng, dtype, n, k):
    values, _ = verify(backend, draw(rng, (5, n), dtype), k, renormalize=True)
    assert (abs(exact(values).sum(-1) - 1) <= sum_error(values.dtype, k)).all()


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_prob_is_exp_of_log_prob(backend, rng, dtype, renormalize):
    """And neither order nor place depends on what is asked for."""
    x, table = draw(rng, (5, 310), dtype), TABLE[dtype]
    runs = [verify(backend, x, 64, output=o, renormalize=renormalize) for o in OUTPUTS]
    for _, indices in runs[1:]:
        np.testing.assert_array_equal(indices, runs[0][1])
    prob, log_prob = exact(runs[0][0]), exact(runs[1][0])
    relative = 2 * EXPONENT_ROUNDINGS * table.relative * (1 + abs(log_prob))
    assert (abs(np.exp(log_prob) - prob) <= relative * prob + 2 * table.absolute).all()


@pytest.mark.parametrize("n", [33, 1025])
def test_all_of_a_row_is_softmax_in_order(backend, rng, n):
    x = draw(rng, (3, n))
    values, indices = verify(backend, x, n)
    row = np.empty_like(values)
    np.put_along_axis(row, indices, values, -1)
    assert_close(row, reference.softmax(exact(x)), NAIVE["softmax"](x), probabilities=True)


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("n, k", [(33, 5), (310, 40), (1025, 300), (3001, 300)])
def test_out(backend, rng, n, k, return_lse, layout):
    x = ranking_stack(rng, n, k)
    options = any_way(rng) | {"return_lse": return_lse, "where": put(backend, rng.random(n) < 0.9)}
    call = functools.partial(cuattn.softmax_topk, backend.asarray(x), k, **options)
    cases.check_outs(backend, rng, call, layout)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_out_axis(backend, rng, dtype, axis):
    x = LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (9, 10, 11), dtype))
    device_x, before = backend.asarray(x), x.tobytes()
    for k in (0, 4, 9):
        options = any_way(rng) | {"axis": axis, "return_lse": True}
        call = functools.partial(cuattn.softmax_topk, device_x, k, **options)
        cases.check_outs(backend, rng, call)
    assert backend.asnumpy(device_x).tobytes() == before


@pytest.mark.parametrize("shape, k", [((), 1), ((0, 3), 2), ((3, 0), 0), ((2, 0, 3), 1), ((0,), 0)])
def test_out_without_elements(backend, rng, shape, k):
    x = backend.asarray(np.ones(shape, np.float32))
    for options in (any_way(rng), {"return_lse": True}):
        cases.check_outs(backend, rng, functools.partial(cuattn.softmax_topk, x, k, **options))


@pytest.mark.parametrize("n, k", [(33, 5), (1025, 1000), (50257, 8), (70001, 300)])
def test_two_runs_are_bitwise_equal(backend, rng, n, k):
    x = np.round(draw(rng, (2, n)))
    x = backend.asarray(x)
    for how in ({"return_lse": True}, {"renormalize": True}):
        one, other = (cuattn.softmax_topk(x, k, **how) for _ in range(2))
        for a, b in zip(one, other, strict=True):
            assert backend.asnumpy(a).tobytes() == backend.asnumpy(b).tobytes()


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n, k", [(33, 5), (1025, 40), (1025, 1000), (70001, 8)])
def test_schedule_does_not_show(rng, arch, n, k):
    """Blocks and warps in another order: bitwise the same result."""
    emulator = pytest.importorskip("emulator")
    x, results = np.round(draw(rng, (2, n))), []
    for seed in (1, 2):
        with emulator.activate(arch=arch, seed=seed):
            results.append(cuattn.softmax_topk(x, k, return_lse=True))
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("case", range(8))
def test_random_call(backend, rng, case):
    """Random shape, strides, axis, k, dtype and options."""
    x = cases.random_view(rng, rng.choice(["float32", "bfloat16"]))
    axis = None if rng.random() < 0.2 else int(rng.integers(-x.ndim, max(x.ndim, 1)))
    n = x.size if axis is None or x.ndim == 0 else x.shape[axis]
    options = any_way(rng)
    if rng.random() < 0.4:
        shape = [size if rng.random() < 0.7 else 1 for size in x.shape]
        options["where"] = np.asarray(rng.random(shape) < 0.7)
    if rng.random() < 0.4:
        shape = np.sum(x, axis, keepdims=True).shape if rng.random() < 0.5 else ()
        options["scale"] = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, x, int(rng.integers(n + 1)), axis=axis, **options)


# ---- errors ------------------------------------------------------------------------------------

X = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    "error, argument, call",
    [
        (ValueError, "k", lambda f: f(X, -1)),
        (ValueError, "k", lambda f: f(X, 6)),
        (ValueError, "k", lambda f: f(X, 21, axis=None)),
        (TypeError, "k", lambda f: f(X, 2.0)),
        (TypeError, "k", lambda f: f(X, None)),
        (TypeError, "axis", lambda f: f(X, 2, axis=(0, 1))),
        (TypeError, "axis", lambda f: f(X, 2, axis=1.0)),
        (AxisError, "axis", lambda f: f(X, 2, axis=2)),
        (ValueError, "output", lambda f: f(X, 2, output="probs")),
        (ValueError, "output", lambda f: f(X, 2, output=None)),
        (TypeError, "x", lambda f: f([1.0, 2.0], 1)),
        (TypeError, "x", lambda f: f(X.astype(np.int32), 1)),
        (TypeError, "x", lambda f: f(X > 0, 1)),
        (TypeError, "x", lambda f: f(X * 1j, 1)),
        (TypeError, "x", lambda f: f(X.astype(">f4"), 1)),
        (TypeError, "where", lambda f: f(X, 2, where=X)),
        (TypeError, "where", lambda f: f(X, 2, where=[True] * 5)),
        (ValueError, "where", lambda f: f(X, 2, where=np.ones((3, 5), bool))),
        (ValueError, "where", lambda f: f(X, 2, where=np.ones((2, 4, 5), bool))),
        (TypeError, "scale", lambda f: f(X, 2, scale="2")),
        (TypeError, "scale", lambda f: f(X, 2, scale=[1.0])),
        (TypeError, "scale", lambda f: f(X, 2, scale=np.ones(1, complex))),
        (ValueError, "scale", lambda f: f(X, 2, scale=np.ones((4, 5)))),
        (ValueError, "scale", lambda f: f(X, 2, axis=0, scale=np.ones((4, 1)))),
    ],
)
def test_errors(error, argument, call):
    with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
        call(cuattn.softmax_topk)
    assert caught.type is error
