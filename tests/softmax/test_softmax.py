"""softmax and log_softmax: values, layouts, options and corners, on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from conftest import on_a_gpu
from tolerance import (
    FLOATS,
    NAIVE,
    assert_close,
    dtype_of,
    exact,
    lse_dtype,
    result_dtype,
    sum_error,
)

import cuattn
from cuattn import reference

BOTH = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


def put(backend, value):
    return backend.asarray(value) if isinstance(value, np.ndarray) else value


def compare(got, name, x, axis=-1, *, dtype=None, **options):
    """The values and the dtype of `got`, a NumPy array, against the reference."""
    dtype = result_dtype(x, dtype)
    assert got.dtype == dtype
    ref = getattr(reference, name)(exact(x), axis, **options)
    naive = NAIVE[name](x, axis, dtype=dtype, **options)
    assert_close(got, ref, naive, probabilities=name == "softmax")


def compare_lse(got, x, axis=-1, *, dtype=None, **options):
    wide = lse_dtype(result_dtype(x, dtype))
    assert got.dtype == wide
    ref = reference.softmax(exact(x), axis, return_lse=True, **options)[1]
    assert_close(got, ref, NAIVE["logsumexp"](x, axis, dtype=wide, **options))


def verify(backend, x, axis=-1, *, name="softmax", dtype=None, return_lse=False, **options):
    """Run one call and compare; the inputs must stay as they were."""
    before = x.tobytes()
    kwargs = {key: put(backend, value) for key, value in options.items()}
    if return_lse:
        kwargs["return_lse"] = True
    device_x = backend.asarray(x)
    got = getattr(cuattn, name)(device_x, axis, dtype=dtype, **kwargs)
    assert backend.ran() or x.size == 0
    if return_lse:
        got, lse = got
        assert isinstance(lse, backend.xp.ndarray)
        compare_lse(backend.asnumpy(lse), x, axis, dtype=dtype, **options)
    assert isinstance(got, backend.xp.ndarray)
    compare(backend.asnumpy(got), name, x, axis, dtype=dtype, **options)
    assert backend.asnumpy(device_x).tobytes() == before
    return backend.asnumpy(got)


# ---- sizes and dtypes --------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("n", cases.LENGTHS)
def test_length(backend, rng, name, n):
    verify(backend, draw(rng, (3, n)), name=name)


@BOTH
@pytest.mark.parametrize("n", cases.FEW_LENGTHS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtype(backend, rng, name, dtype, n):
    verify(backend, draw(rng, (3, n), dtype), name=name)


@BOTH
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "int64"])
def test_integers(backend, rng, name, dtype):
    verify(backend, draw(rng, (3, 33), dtype), name=name)


# float64 holds half as many elements in shared memory; float16 twice as many.
@pytest.mark.parametrize("rows, n", cases.LONG)
def test_long_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows, n)), return_lse=True)


@pytest.mark.parametrize("dtype, n", [("float16", 50257), ("bfloat16", 140001), ("float64", 35001)])
def test_long_rows_dtype(backend, rng, dtype, n):
    verify(backend, draw(rng, (2, n), dtype))


@pytest.mark.parametrize("n", [32769, 300001])
def test_long_rows_log(backend, rng, n):
    verify(backend, draw(rng, (1, n)), name="log_softmax")


# One row, fewer rows than a block has warps, one more than a multiple of them, many.
@pytest.mark.parametrize("rows", [1, 2, 5, 33, 700])
@pytest.mark.parametrize("n", [3, 33, 1025])
def test_rows(backend, rng, rows, n):
    verify(backend, draw(rng, (rows if n < 1025 else min(rows, 33), n)))


# ---- layouts and axes --------------------------------------------------------------------------


# A short row, one with a tail, one with whole vectors.
@pytest.mark.parametrize("n", [3, 33, 128, 1025])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout, n):
    verify(backend, LAYOUTS[layout](draw(rng, (5, n))), return_lse=n == 33)


@BOTH
@pytest.mark.parametrize("layout", ["misaligned", "padded", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "uint8"])
def test_layout_dtype(backend, rng, name, dtype, layout):
    verify(backend, LAYOUTS[layout](draw(rng, (5, 128), dtype)), name=name)


@pytest.mark.parametrize("shift", range(8))
def test_every_alignment(backend, rng, shift):
    """Vectors of 8 float16 start at 8 places; an odd row length visits them all again."""
    wide = np.full((3, 141), NAN, np.float16)
    wide[:, shift : shift + 133] = draw(rng, (3, 133), "float16")
    verify(backend, wide[:, shift : shift + 133])


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "padded", "fortran", "reversed rows"])
@pytest.mark.parametrize("axis", [0, 1, -1, (0, 1), (0, 2), (2, 0), (-1, -2), (0, 1, 2), None, ()])
def test_axis(backend, rng, name, axis, layout):
    verify(backend, LAYOUTS[layout](draw(rng, (4, 5, 33))), axis, name=name)


# Few and many columns beside a reduced axis that is short, long, and longer than one pass; the last
# is one element shorter than what a thread holds.
@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (1025, 5), (4097, 3), (33000, 2), (7, 60)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_first_axis(backend, rng, shape, dtype):
    verify(backend, draw(rng, shape, dtype), 0, return_lse=dtype == "float32")


@pytest.mark.parametrize("axis", [1, -2, (1, 2), (0, 3)])
def test_middle_axis(backend, rng, axis):
    verify(backend, draw(rng, (2, 17, 3, 9)), axis, return_lse=True)


@pytest.mark.parametrize("axis", [-1, 0, 2, (1, 3), None])
def test_not_collapsible(backend, rng, axis):
    """Five axes of which no two can be walked as one, with negative and zero strides."""
    base = draw(rng, (6, 4, 1, 10, 7))
    x = np.broadcast_to(base, (6, 4, 3, 10, 7))[::2, ::-1, :, 1:8:3, ::-2]
    verify(backend, x, axis, return_lse=True)


@pytest.mark.parametrize("axis", [-1, 0, (1, 5, 11), None])
def test_many_axes(backend, rng, axis):
    """Rank 20: twelve axes of two in random order, and eight of one between them."""
    x = draw(rng, (2,) * 12).transpose(rng.permutation(12))
    x = np.expand_dims(x, tuple(range(1, 17, 2)))
    verify(backend, x, axis)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_broadcast_input(backend, rng, axis):
    for shape in [(1, 33), (5, 1), (1, 1)]:
        verify(backend, np.broadcast_to(draw(rng, shape), (5, 33)), axis)


# ---- out and dtype -----------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided", "fortran"])
@pytest.mark.parametrize("n", [33, 128, 1025])
def test_out(backend, rng, name, layout, n):
    x = draw(rng, (3, n))
    guard = Guarded(backend, x.shape, x.dtype, layout)
    assert getattr(cuattn, name)(backend.asarray(x), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), name, x)
    guard.check_rim()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("layout", ["misaligned", "strided"])
def test_out_dtype(backend, rng, dtype, layout):
    x = draw(rng, (3, 129), dtype)
    guard = Guarded(backend, x.shape, x.dtype, layout)
    assert cuattn.softmax(backend.asarray(x), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), "softmax", x)
    guard.check_rim()


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_out_axis(backend, rng, axis):
    x = draw(rng, (4, 5, 33))
    guard = Guarded(backend, x.shape, x.dtype, "strided")
    assert cuattn.softmax(backend.asarray(x), axis, out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), "softmax", x, axis)
    guard.check_rim()


def test_out_zero_dimensions(backend):
    x = np.array(3.0, np.float32)
    guard = Guarded(backend, (), x.dtype)
    assert cuattn.softmax(backend.asarray(x), out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), "softmax", x)
    guard.check_rim()


@BOTH
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "fortran"])
@pytest.mark.parametrize("n", [3, 128, 1025, 32769])
def test_in_place(backend, rng, name, layout, n):
    x = LAYOUTS[layout](draw(rng, (2, n)))
    memory = backend.asarray(x.copy(order="K"))
    assert getattr(cuattn, name)(memory, out=memory) is memory
    compare(backend.asnumpy(memory), name, x)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_in_place_axis(backend, rng, axis):
    x = draw(rng, (4, 5, 33))
    memory = backend.asarray(x.copy())
    assert cuattn.softmax(memory, axis, out=memory) is memory
    compare(backend.asnumpy(memory), "softmax", x, axis)


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), None])
def test_out_with_lse(backend, rng, axis):
    x = draw(rng, (5, 4, 33))
    guard = Guarded(backend, x.shape, x.dtype, "misaligned")
    lse_shape = reference.logsumexp(x, axis).shape
    lse_guard = Guarded(backend, lse_shape, np.float32, "strided" if lse_shape else "misaligned")
    out = (guard.out, lse_guard.out)
    got = cuattn.softmax(backend.asarray(x), axis, out=out, return_lse=True)
    assert isinstance(got, tuple) and got[0] is out[0] and got[1] is out[1]
    compare(backend.asnumpy(out[0]), "softmax", x, axis)
    compare_lse(backend.asnumpy(out[1]), x, axis)
    guard.check_rim()
    lse_guard.check_rim()


@BOTH
@pytest.mark.parametrize(
    "given, wanted",
    [
        ("float16", "float32"),
        ("float32", "float16"),
        ("bfloat16", "float32"),
        ("float32", "float64"),
        ("float64", "float32"),
        ("int32", "float32"),
        ("int8", "float16"),
        ("float32", "float32"),
    ],
)
def test_dtype_option(backend, rng, name, given, wanted):
    verify(backend, draw(rng, (3, 129), given), name=name, dtype=dtype_of(wanted))


def test_dtype_option_is_a_dtype_of_any_spelling(backend, rng):
    x = draw(rng, (3, 129))
    for dtype in ("float64", np.float64, np.dtype("f8"), float):
        verify(backend, x, dtype=dtype)


def test_dtype_with_out(backend, rng):
    x = draw(rng, (3, 129))
    guard = Guarded(backend, x.shape, np.float64, "misaligned")
    assert cuattn.softmax(backend.asarray(x), dtype=np.float64, out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), "softmax", x, dtype=np.float64)
    guard.check_rim()


# ---- scale and where ---------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("scale", [0.125, 1, 0.7, 0, 0.0, -0.5, np.float32(3), np.float64(-1)])
def test_scale(backend, rng, name, scale):
    verify(backend, draw(rng, (3, 129)), name=name, scale=scale)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int32"])
def test_scale_dtype(backend, rng, dtype):
    verify(backend, draw(rng, (3, 129), dtype), scale=-0.25, return_lse=True)


# One for all, one for each row, columns of rows; in the dtype of x or in another.
@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (4, 1, 1), (1, 5, 1), (4, 5, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scale_array(backend, rng, shape, dtype):
    scale = np.asarray(rng.integers(-8, 9, shape) / 8).astype(dtype)
    verify(backend, draw(rng, (4, 5, 33)), scale=scale, return_lse=True)


@pytest.mark.parametrize("axis, shape", [(0, (1, 5, 33)), (1, (4, 1, 1)), ((0, 2), (5, 1))])
def test_scale_array_axis(backend, rng, axis, shape):
    scale = (rng.integers(-8, 9, shape) / 8).astype(np.float32)
    verify(backend, draw(rng, (4, 5, 33)), axis, scale=scale)


def test_scale_array_strides(backend, rng):
    scale = (rng.integers(-8, 9, (1, 10)) / 8).astype(np.float32)
    for view in (scale.T[::2], scale.T[::-2], np.broadcast_to(scale[:, :1], (5, 1))):
        verify(backend, draw(rng, (5, 33)), scale=view)


def test_scale_meets_infinity(backend):
    """``scale * x`` as IEEE says: 0 * inf is NaN, and a negative scale swaps the infinities."""
    x = np.array([[INF, 0, 1], [-INF, 0, 1], [-INF, -INF, -INF], [NAN, 0, 1]], np.float32)
    for scale in (0.0, -1.0, 2.0):
        for name in ("softmax", "log_softmax"):
            verify(backend, x, name=name, scale=scale)


def masks(rng, shape):
    """Full, one for all rows, one for all columns, for a single row; rows without any element."""
    full = rng.random(shape) < 0.6
    full[1], full[2] = False, True
    full[0] = np.arange(shape[-1]) == shape[-1] - 1
    yield full
    yield full[3:4]
    yield full[3]
    yield rng.random((shape[0], 1)) < 0.5
    yield np.asfortranarray(full)
    yield full[:, ::-1]
    yield np.zeros(shape, bool)
    yield np.array(True)
    yield np.array([False])


@BOTH
@pytest.mark.parametrize("n", [3, 33, 128, 1025])
def test_where(backend, rng, name, n):
    x = draw(rng, (5, n))
    for where in masks(rng, x.shape):
        verify(backend, x, name=name, where=where)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
def test_where_dtype(backend, rng, dtype):
    x = draw(rng, (5, 33), dtype)
    for where in masks(rng, x.shape):
        verify(backend, x, where=where, return_lse=True)


@BOTH
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_where_hides_anything(backend, rng, name, bad):
    """What does not take part changes nothing, also where the row has nothing else."""
    x = draw(rng, (5, 33))
    for where in masks(rng, x.shape):
        hidden = np.where(where, x, np.float32(bad))
        got = verify(backend, hidden, name=name, where=where, scale=-0.5)
        plain = verify(backend, x, name=name, where=where, scale=-0.5)
        np.testing.assert_array_equal(got, plain)


@pytest.mark.parametrize("axis", [0, (0, 2), None])
def test_where_axis(backend, rng, axis):
    x = draw(rng, (4, 5, 33))
    for shape in [(4, 5, 33), (5, 1), (33,), (4, 1, 33)]:
        verify(backend, x, axis, where=rng.random(shape) < 0.5, return_lse=True)


def test_where_of_a_long_row(backend, rng):
    x = draw(rng, (2, 50257))
    where = np.zeros(x.shape, bool)
    where[0, -1] = True
    x[0, :-1] = NAN
    verify(backend, x, where=where, return_lse=True)


@BOTH
def test_where_all_participants_minus_infinity(backend, name):
    x = np.array([[-INF, -INF, 5], [-INF, 2, NAN], [INF, 1, NAN]], np.float32)
    where = np.array([True, True, False])
    verify(backend, x, name=name, where=where)


def test_where_with_scale_array_and_out(backend, rng):
    x, where = draw(rng, (5, 33)), rng.random((5, 33)) < 0.5
    scale = (rng.integers(-8, 9, (5, 1)) / 8).astype(np.float32)
    guard = Guarded(backend, x.shape, x.dtype, "misaligned")
    options = {"where": where, "scale": scale}
    device = {key: backend.asarray(value) for key, value in options.items()}
    assert cuattn.softmax(backend.asarray(x), out=guard.out, **device) is guard.out
    compare(backend.asnumpy(guard.out), "softmax", x, **options)
    guard.check_rim()


# ---- corners -----------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("axis", [-1, 0, None, ()])
def test_zero_dimensions(backend, name, axis):
    for value in (0.0, 3.5, -INF, INF, NAN):
        got = verify(backend, np.array(value, np.float32), axis, name=name)
        assert got.shape == ()


@BOTH
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty(backend, name, shape):
    for dtype in ("float32", "float16", "int32"):
        x = np.zeros(shape, dtype_of(dtype))
        for axis in [None, tuple(range(len(shape))), *range(-len(shape), len(shape))]:
            verify(backend, x, axis, name=name, return_lse=name == "softmax")
            where = np.zeros(shape, bool)
            verify(backend, x, axis, name=name, scale=2.0, where=where)


@BOTH
@pytest.mark.parametrize("n", [3, 33, 128, 1025])
def test_special_values(backend, rng, name, n):
    """Each special row beside ordinary ones, whose results it must not touch."""
    rows = [row for _, row in cases.special_rows(rng, n)]
    x = draw(rng, (2 * len(rows), n))
    plain = verify(backend, x, name=name)
    x[::2] = rows
    got = verify(backend, x, name=name)
    np.testing.assert_array_equal(got[1::2], plain[1::2])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_special_values_dtype(backend, rng, dtype):
    x = np.stack([row for _, row in cases.special_rows(rng, 33, dtype)])
    for name in ("softmax", "log_softmax"):
        verify(backend, x, name=name)
    verify(backend, x, return_lse=True)


def test_special_values_in_columns(backend, rng):
    x = np.stack([row for _, row in cases.special_rows(rng, 129)])
    verify(backend, np.ascontiguousarray(x.T), 0, return_lse=True)


@pytest.mark.parametrize("n", [32769, 70001])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values_in_long_rows(backend, rng, value, n):
    """At the very end, where only the last thread of the last block sees it."""
    x = draw(rng, (2, n))
    x[0, -1] = value
    verify(backend, x, return_lse=True)


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_offset(backend, rng, name, dtype):
    """Nothing overflows before the maximum is taken off."""
    limit = 10000 if dtype == "float16" else 1e30
    for offset in (1000.0, -1000.0, 10000.0):
        x = (rng.integers(-8, 9, (3, 33)) + offset).astype(dtype_of(dtype))
        verify(backend, x, name=name)
    x = np.array([[limit, -limit, 0], [-limit, -limit, -limit]]).astype(dtype_of(dtype))
    verify(backend, x, name=name)


@pytest.mark.parametrize("dtype", FLOATS)
def test_smallest_probabilities(backend, dtype):
    """Down through the subnormals."""
    span = 800 if dtype == "float64" else 110
    x = np.linspace(0, -span, 1025).astype(dtype_of(dtype))
    verify(backend, np.stack([x, x[::-1]]))


# ---- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rows_sum_to_one(backend, rng, dtype):
    x = draw(rng, (4, 4097), dtype)
    y = backend.asnumpy(cuattn.softmax(backend.asarray(x)))
    assert (abs(exact(y).sum(-1) - 1) <= sum_error(y.dtype, y.shape[-1])).all()


@pytest.mark.parametrize("n", [33, 1025])
def test_shift_invariance(backend, rng, n):
    """A power of two as the offset of small multiples of 1/8 is exact: the result is that of x."""
    x = (rng.integers(-64, 65, (3, n)) / 8).astype(np.float32)
    for offset in (0, 1024, -4096):
        got = verify(backend, (x + offset).astype(np.float32))
        assert_close(got, reference.softmax(exact(x)), NAIVE["softmax"](x), probabilities=True)


def test_rows_are_independent(backend, rng):
    """A row's result does not depend on its place: bitwise the same after a permutation."""
    x = draw(rng, (33, 128))
    order = rng.permutation(33)
    got = backend.asnumpy(cuattn.softmax(backend.asarray(x)))
    permuted = backend.asnumpy(cuattn.softmax(backend.asarray(x[order])))
    np.testing.assert_array_equal(permuted, got[order])


@pytest.mark.parametrize("n", [33, 1025, 50257, 300001])
def test_two_runs_are_bitwise_equal(backend, rng, n):
    x = backend.asarray(draw(rng, (2, n)))
    runs = [backend.asnumpy(cuattn.softmax(x)).tobytes() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n", [33, 1025, 70001, 300001])
def test_schedule_does_not_show(rng, arch, n):
    """Blocks and warps in another order: bitwise the same result."""
    emulator = pytest.importorskip("emulator")
    x, results = draw(rng, (2, n)), []
    for seed in (1, 2):
        with emulator.activate(arch=arch, seed=seed):
            results.append(cuattn.softmax(x, return_lse=True))
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("case", range(40))
def test_random_call(backend, rng, case):
    """Random shape, strides, axis, dtype and options."""
    dtype = rng.choice(["float32", "float16", "bfloat16", "float64", "int32"])
    x = cases.random_view(rng, dtype)
    axis = cases.random_axis(rng, x.ndim)
    name = rng.choice(["softmax", "log_softmax"])
    options = {}
    if rng.random() < 0.3:
        shape = [n if rng.random() < 0.7 else 1 for n in x.shape]
        options["where"] = np.asarray(rng.random(shape) < 0.7)
    if rng.random() < 0.3:
        shape = np.sum(x, axis, keepdims=True).shape if rng.random() < 0.5 else ()
        options["scale"] = np.asarray(rng.integers(-8, 9, shape) / 8).astype(np.float32)
    if name == "softmax" and rng.random() < 0.3:
        options["return_lse"] = True
    verify(backend, x, axis, name=name, **options)


@on_a_gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend, rng):
    """Two gigabytes beyond 32-bit indices; the last row is checked."""
    rows, n = 65537, 32769
    last = draw(rng, (1, n), "float16")
    x = backend.xp.zeros((rows, n), np.float16)
    x[-1:] = backend.asarray(last)
    y = cuattn.softmax(x, out=x)
    compare(backend.asnumpy(y[-1:]), "softmax", last)
    compare(backend.asnumpy(y[:2]), "softmax", np.zeros((2, n), np.float16))
