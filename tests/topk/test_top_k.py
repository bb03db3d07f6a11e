"""top_k: order, ties, NaN, every dtype and layout; values bit for bit, on every backend."""

from __future__ import annotations

import functools

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, draw, ranking_stack
from conftest import on_a_gpu
from numpy.exceptions import AxisError
from tolerance import FLOATS, dtype_of

import cuattn
from cuattn import reference

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
MODES = ("largest", "smallest")
MODE = pytest.mark.parametrize("mode", MODES)


def bits(a):
    """The elements as unsigned integers: tells -0.0 from 0.0, and one NaN from another."""
    a = np.asarray(a, order="C")
    return a.view(f"u{a.itemsize}")


def verify(backend, x, k, *, axis=-1, mode="largest"):
    """Run one call and compare exactly; x must stay as it was."""
    before, mode = x.tobytes(), str(mode)
    device_x = backend.asarray(x)
    got = cuattn.top_k(device_x, k, axis=axis, mode=mode)
    ref = reference.top_k(x, k, axis=axis, mode=mode)
    assert backend.ran() or ref.values.size == 0
    assert isinstance(got, cuattn.TopK)
    assert all(isinstance(part, backend.xp.ndarray) for part in got)
    values, indices = (backend.asnumpy(part) for part in got)
    assert values.dtype == x.dtype and indices.dtype == np.int64
    assert values.shape == indices.shape == ref.values.shape
    np.testing.assert_array_equal(indices, ref.indices)
    np.testing.assert_array_equal(bits(values), bits(ref.values))
    assert backend.asnumpy(device_x).tobytes() == before
    return values, indices


# ---- against Python ----------------------------------------------------------------------------


@np.errstate(invalid="ignore")  # NaN may be signalling
def by_sorted(row, k, mode):
    """Indices of the k best, as Python's own sort has them."""
    numbers = (row if row.dtype.kind in "iu" else row.astype(np.float64)).tolist()
    sign = -1 if mode == "largest" else 1
    keys = [(1, 0, i) if v != v else (0, sign * v, i) for i, v in enumerate(numbers)]
    return [i for *_, i in sorted(keys)[:k]]


@MODE
@pytest.mark.parametrize("dtype", ["float32", "int64"])
def test_python_sorted(backend, rng, mode, dtype):
    for n, k in ((1, 1), (3, 2), (8, 8), (33, 5), (33, 33)):
        x = ranking_stack(rng, n, k, dtype)
        values, indices = verify(backend, x, k, mode=mode)
        for row, got_values, got in zip(x, values, indices, strict=True):
            assert got.tolist() == by_sorted(row, k, mode)
            assert bits(got_values).tolist() == bits(row[got]).tolist()


# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", cases.RANKED_LENGTHS)
def test_length(backend, rng, n):
    k = cases.any_k(rng, n)
    verify(backend, ranking_stack(rng, n, k), k, mode=rng.choice(MODES))


def test_every_k(backend, rng):
    """Rows start at every alignment; 1000 of 1025 is nearly a sort."""
    for k in cases.KS:
        verify(backend, ranking_stack(rng, 1025, k), k, mode=rng.choice(MODES))


# One row, fewer than a block has warps, one more than a multiple of them.
@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_rows(backend, rng, rows):
    for n, k in ((3, 2), (33, 5), (1025, 40)):
        verify(backend, draw(rng, (rows, n)), k)


@pytest.mark.parametrize("n", [8, 64, 128, 256])
def test_many_short_rows(backend, rng, n):
    """As a router chooses experts."""
    for k in rng.permutation([1, 2, 6, 8])[:2]:
        x = draw(rng, (1000, n), "bfloat16" if n == 128 else "float32")
        x[::7] = np.round(x[::7])  # ties
        verify(backend, x, k, mode=rng.choice(MODES))


@pytest.mark.parametrize("k", [1, 8, 64, 1000, 50257])
def test_long_rows(backend, rng, k):
    """GPT-2's vocabulary: odd, so that the second row is misaligned. The last has ties and NaN."""
    x = draw(rng, (1 if k == 50257 else 2, 50257))
    x[-1] = np.round(x[-1])
    x[-1, rng.integers(0, 50257, 3)] = NAN, INF, -INF
    verify(backend, x, k, mode=rng.choice(MODES))


@pytest.mark.parametrize("dtype, k", [("float16", 129), ("float64", 5), ("int64", 300)])
def test_long_rows_dtype(backend, rng, dtype, k):
    verify(backend, draw(rng, (1, 50257), dtype), k, mode=rng.choice(MODES))


@pytest.mark.parametrize(
    "kind, k",
    [("random", 3), ("ascending", 129), ("descending", 40), ("constant", 3000), ("nan", 3)],
)
def test_longer_than_a_cluster(backend, rng, kind, k):
    x = draw(rng, (1, 300001))
    if kind in ("ascending", "descending"):
        x.sort()
    x = x[:, ::-1].copy() if kind == "descending" else x
    if kind in ("constant", "nan"):
        x[...] = 1.0 if kind == "constant" else NAN
        x[0, rng.integers(0, 300001, 2)] = 2.0, 0.0
    verify(backend, x, k, mode=rng.choice(MODES))


def test_two_million(backend, rng):
    if backend.name == "emulator-sm_80":
        pytest.skip("two million elements take a while: one architecture is enough")
    verify(backend, draw(rng, (1, 2_000_003)), 50)


# ---- dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_dtype(backend, rng, dtype):
    """Either of two regimes, at random, and rows that end anywhere in a vector."""
    n, k = [(62, 9), (310, 64)][int(rng.integers(2))]
    for i, more in enumerate(rng.permutation(17)[:4]):
        verify(backend, ranking_stack(rng, n + more, k, dtype), k, mode=MODES[i % 2])


@pytest.mark.parametrize("dtype", ["float64", "uint8"])
def test_dtype_many(backend, rng, dtype):
    """So many that no list in registers holds them, or the whole row."""
    k = int(rng.choice([300, 3001]))
    verify(backend, ranking_stack(rng, 3001, k, dtype), k, mode=rng.choice(MODES))


@MODE
@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_integers_beyond_float64(backend, rng, dtype, mode):
    """Neighbours that one float64 stands for."""
    info = np.iinfo(dtype)
    near = rng.integers(0, 4, (4, 70)).astype(dtype)
    x = np.concatenate([near + dtype_of(dtype).type(info.min), info.max - near])
    x[::2, ::3] = dtype_of(dtype).type(info.max // 2) + near[:, :24]
    verify(backend, x, 33, mode=mode)


@MODE
@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals(backend, rng, dtype, mode):
    """Numbers like all others: in order, no two of them equal, none equal to zero."""
    word = np.dtype(f"u{dtype_of(dtype).itemsize}")
    x = rng.integers(0, 9, (4, 70)).astype(word)
    x |= rng.integers(0, 2, x.shape).astype(word) << (8 * word.itemsize - 1)
    verify(backend, x.view(dtype_of(dtype)), 40, mode=mode)


@pytest.mark.parametrize("dtype, k", [("float16", 65536), ("bfloat16", 100)])
def test_every_bit_pattern(backend, rng, dtype, k):
    """All 65536 of a 16-bit type, in one row."""
    x = rng.permutation(np.arange(65536, dtype=np.uint16)).view(dtype_of(dtype))
    verify(backend, x, k, mode=rng.choice(MODES))


# ---- layouts and axes --------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    for n, k in ((33, 8), (128, 33), (1025, 300), (1025, 5)):
        x = LAYOUTS[layout](ranking_stack(rng, n, k))
        verify(backend, x, k, mode=rng.choice(MODES))


@pytest.mark.parametrize("n", [1025, 4096])
def test_misaligned_rows_below_zero(backend, rng, n):
    """What a vector holds beside the row is not a zero that beats them; whole tiles, shifted, have
    one column more."""
    x = -2 - rng.random((3, n), np.float32)
    x[:, -1] = -1
    verify(backend, LAYOUTS["misaligned"](x), 5)


@pytest.mark.parametrize("layout", ["misaligned", "padded", "fortran"])
@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_layout_dtype(backend, rng, dtype, layout):
    n, k = [(128, 8), (531, 40)][int(rng.integers(2))]
    verify(backend, LAYOUTS[layout](ranking_stack(rng, n, k, dtype)), k)


@pytest.mark.parametrize("shift", range(8))
def test_every_alignment(backend, rng, shift):
    """Vectors of 8 float16 start at 8 places; an odd row length visits them all again."""
    wide = np.full((9, 341), INF, np.float16)
    wide[:, shift : shift + 333] = draw(rng, (9, 333), "float16")
    verify(backend, wide[:, shift : shift + 333], 17)


@pytest.mark.parametrize("layout", ["contiguous", "padded", "fortran", "reversed rows"])
@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2, -3, None])
def test_axis(backend, rng, axis, layout):
    x = LAYOUTS[layout](np.round(draw(rng, (4, 5, 33))))
    verify(backend, x, 3, axis=axis, mode=rng.choice(MODES))


@pytest.mark.parametrize("shape", [(3, 700), (40, 129), (1025, 5), (4097, 3), (33000, 2)])
def test_first_axis(backend, rng, shape):
    for k in (3, 300) if shape[0] == 4097 else (3,):
        verify(backend, draw(rng, shape), k, axis=0)


@pytest.mark.parametrize("axis", [-1, 0, 2, 3, None])
def test_not_collapsible(backend, rng, axis):
    """Five axes of which no two can be walked as one, with negative and zero strides."""
    base = np.round(draw(rng, (6, 4, 1, 10, 7)))
    x = np.broadcast_to(base, (6, 4, 3, 10, 7))[::2, ::-1, :, 1:8:3, ::-2]
    verify(backend, x, 3, axis=axis)


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_many_axes(backend, rng, axis):
    """Rank 20: twelve axes of two in random order, and eight of one between them."""
    x = np.round(draw(rng, (2,) * 12)).transpose(rng.permutation(12))
    verify(backend, np.expand_dims(x, tuple(range(1, 17, 2))), 2, axis=axis)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_broadcast_input(backend, rng, axis):
    for shape in [(1, 33), (5, 1), (1, 1)]:
        verify(backend, np.broadcast_to(draw(rng, shape), (5, 33)), 3, axis=axis)


@pytest.mark.parametrize("case", range(8))
def test_random_call(backend, rng, case):
    """Random shape, strides, axis, k, mode and dtype."""
    x = cases.random_view(rng, rng.choice(["float32", "float16", "int64"]))
    axis = None if rng.random() < 0.2 else int(rng.integers(-x.ndim, max(x.ndim, 1)))
    n = x.size if axis is None or x.ndim == 0 else x.shape[axis]
    verify(backend, x, int(rng.integers(n + 1)), axis=axis, mode=rng.choice(MODES))


# ---- corners -----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", cases.OUTS)
@pytest.mark.parametrize("n, k", [(33, 5), (310, 40), (1025, 300), (3001, 300)])
def test_out(backend, rng, layout, n, k):
    x, mode = ranking_stack(rng, n, k), str(rng.choice(MODES))
    call = functools.partial(cuattn.top_k, backend.asarray(x), k, mode=mode)
    cases.check_outs(backend, rng, call, layout)


@pytest.mark.parametrize("axis", [0, 1, 2, None])
@pytest.mark.parametrize("dtype", ["float16", "float64", "uint8"])
def test_out_axis(backend, rng, dtype, axis):
    x = LAYOUTS[str(rng.choice([*LAYOUTS]))](draw(rng, (9, 10, 11), dtype))
    device_x, before = backend.asarray(x), x.tobytes()
    for k in (0, 4, 9):
        cases.check_outs(backend, rng, functools.partial(cuattn.top_k, device_x, k, axis=axis))
    assert backend.asnumpy(device_x).tobytes() == before


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_out_of_many_axes(backend, rng, axis):
    """More than kernels follow, of x or of the results."""
    x = backend.asarray(draw(rng, (2,) * 12).transpose(rng.permutation(12)))
    call = functools.partial(cuattn.top_k, x, 2, axis=axis)
    cases.check_outs(backend, rng, call)
    if axis is not None:
        order, x = rng.permutation(12), backend.asarray(draw(rng, (2,) * 12))
        out = [backend.xp.zeros(x.shape, d).transpose(order) for d in (x.dtype, np.int64)]
        got = cuattn.top_k(x, 2, axis=axis, out=tuple(out))
        for part, given, want in zip(got, out, cuattn.top_k(x, 2, axis=axis), strict=True):
            assert part is given
            np.testing.assert_array_equal(backend.asnumpy(part), backend.asnumpy(want))


@pytest.mark.parametrize("shape, k", [((), 1), ((0, 3), 2), ((3, 0), 0), ((2, 0, 3), 1), ((0,), 0)])
def test_out_without_elements(backend, rng, shape, k):
    x = backend.asarray(np.ones(shape, np.float32))
    cases.check_outs(backend, rng, functools.partial(cuattn.top_k, x, k))


@pytest.mark.parametrize("axis", [-1, 0, None])
def test_zero_dimensions(backend, axis):
    """One number is a row of one."""
    for value in (3.5, NAN, -0.0):
        for k in (0, 1):
            values, _ = verify(backend, np.array(value, np.float32), k, axis=axis)
            assert values.shape == (k,)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3), (0, 0)])
def test_empty(backend, shape):
    for dtype in ("float32", "float16", "int32"):
        x = np.zeros(shape, dtype_of(dtype))
        for axis in [None, *range(-len(shape), len(shape))]:
            n = x.size if axis is None else shape[axis]
            for k in {0, n // 2, n}:
                verify(backend, x, k, axis=axis)


def test_k_zero(backend, rng):
    x = draw(rng, (4, 5, 33))
    for axis, shape in ((-1, (4, 5, 0)), (1, (4, 0, 33)), (0, (0, 5, 33)), (None, (0,))):
        values, _ = verify(backend, x, 0, axis=axis)
        assert values.shape == shape


@pytest.mark.parametrize("n", [3, 33, 128, 1025])
def test_special_values(backend, rng, n):
    """Each special row beside ordinary ones, whose results it must not touch."""
    rows = [row for _, row in cases.special_rows(rng, n)]
    x = draw(rng, (2 * len(rows), n))
    for mode in MODES:
        plain = verify(backend, x, 3, mode=mode)
        special = x.copy()
        special[::2] = rows
        got = verify(backend, special, 3, mode=mode)
        np.testing.assert_array_equal(got[1][1::2], plain[1][1::2])


def test_k_is_an_index(backend, rng):
    x = backend.asarray(draw(rng, (3, 33)))
    want = cuattn.top_k(x, 2)
    for k in (np.int64(2), np.uint8(2)):
        for one, other in zip(cuattn.top_k(x, k), want, strict=True):
            np.testing.assert_array_equal(backend.asnumpy(one), backend.asnumpy(other))


@MODE
def test_unsorted(backend, rng, mode):
    """The same elements, in any order."""
    x = ranking_stack(rng, 129, 20)
    got = cuattn.top_k(backend.asarray(x), 20, mode=mode, sorted=False)
    values, indices = (backend.asnumpy(part) for part in got)
    want = reference.top_k(x, 20, mode=mode)
    np.testing.assert_array_equal(np.sort(indices), np.sort(want.indices))
    np.testing.assert_array_equal(bits(values), bits(np.take_along_axis(x, indices, -1)))


# ---- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k", [(33, 5), (1025, 40), (4097, 1000)])
def test_permutation(backend, rng, n, k):
    """Without ties the elements do not depend on where they stand."""
    x = rng.permuted(np.broadcast_to(np.arange(n, dtype=np.float32), (3, n)), axis=1)
    order = rng.permutation(n)
    values, indices = verify(backend, x, k)
    permuted, places = verify(backend, x[:, order], k)
    np.testing.assert_array_equal(permuted, values)
    np.testing.assert_array_equal(order[places], indices)


def test_smallest_is_largest_of_negatives(backend, rng):
    x = ranking_stack(rng, 129, 20)
    for k in (20, 129):
        smallest = verify(backend, x, k, mode="smallest")
        largest = verify(backend, -x, k)
        np.testing.assert_array_equal(smallest[1], largest[1])


@pytest.mark.parametrize("n, k", [(33, 5), (1025, 1000), (50257, 8), (70001, 300)])
def test_two_runs_are_bitwise_equal(backend, rng, n, k):
    x = np.round(draw(rng, (2, n)))
    x[1] = NAN
    x = backend.asarray(x)
    runs = [[backend.asnumpy(part).tobytes() for part in cuattn.top_k(x, k)] for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("n, k", [(33, 5), (1025, 40), (1025, 1000), (70001, 8)])
def test_schedule_does_not_show(rng, arch, n, k):
    """Blocks and warps in another order: bitwise the same result."""
    emulator = pytest.importorskip("emulator")
    x, results = np.round(draw(rng, (2, n))), []
    for seed in (1, 2):
        with emulator.activate(arch=arch, seed=seed):
            results.append(cuattn.top_k(x, k))
    for one, other in zip(*results, strict=True):
        assert one.tobytes() == other.tobytes()


@on_a_gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements(backend, rng):
    """Two gigabytes beyond 32-bit indices; the first and the last row are checked."""
    rows, n = 65537, 32769
    last = draw(rng, (1, n), "float16")
    x = backend.xp.zeros((rows, n), np.float16)
    x[-1:] = backend.asarray(last)
    for k in (5, 300):
        values, indices = (backend.asnumpy(part[::65536]) for part in cuattn.top_k(x, k))
        want = reference.top_k(np.concatenate([np.zeros((1, n), np.float16), last]), k)
        np.testing.assert_array_equal(indices, want.indices)
        np.testing.assert_array_equal(bits(values), bits(want.values))


# ---- errors ------------------------------------------------------------------------------------

X = np.zeros((4, 5), np.float32)


@pytest.mark.parametrize(
    "error, argument, call",
    [
        (ValueError, "k", lambda: cuattn.top_k(X, -1)),
        (ValueError, "k", lambda: cuattn.top_k(X, 6)),
        (ValueError, "k", lambda: cuattn.top_k(X, 5, axis=0)),
        (ValueError, "k", lambda: cuattn.top_k(X, 21, axis=None)),
        (ValueError, "k", lambda: cuattn.top_k(X[:, :0], 1)),
        (ValueError, "k", lambda: cuattn.top_k(np.array(1.0), 2)),
        (TypeError, "k", lambda: cuattn.top_k(X, 2.0)),
        (TypeError, "k", lambda: cuattn.top_k(X, "2")),
        (TypeError, "k", lambda: cuattn.top_k(X, None)),
        (TypeError, "axis", lambda: cuattn.top_k(X, 2, axis=(0, 1))),
        (TypeError, "axis", lambda: cuattn.top_k(X, 2, axis=1.0)),
        (AxisError, "axis", lambda: cuattn.top_k(X, 2, axis=2)),
        (AxisError, "axis", lambda: cuattn.top_k(X, 2, axis=-3)),
        (AxisError, "axis", lambda: cuattn.top_k(np.array(1.0), 1, axis=1)),
        (ValueError, "mode", lambda: cuattn.top_k(X, 2, mode="max")),
        (ValueError, "mode", lambda: cuattn.top_k(X, 2, mode=None)),
        (TypeError, "x", lambda: cuattn.top_k([1.0, 2.0], 1)),
        (TypeError, "x", lambda: cuattn.top_k(1.0, 1)),
        (TypeError, "x", lambda: cuattn.top_k(X > 0, 1)),
        (TypeError, "x", lambda: cuattn.top_k(X * 1j, 1)),
        (TypeError, "x", lambda: cuattn.top_k(X.astype(">f4"), 1)),
        (TypeError, "x", lambda: cuattn.top_k(X.astype("m8[s]"), 1)),
    ],
)
def test_errors(error, argument, call):
    with pytest.raises(error, match=rf"\A{argument} must .*, but ") as caught:
        call()
    assert caught.type is error
