"""segment_softmax: the softmax of each segment of axis 0, on every backend."""

from __future__ import annotations

import cases
import numpy as np
import pytest
from cases import INF, LAYOUTS, NAN, Guarded, draw
from tolerance import NAIVE, assert_close, dtype_of, exact, result_dtype

import cuattn
from cuattn import reference


def offsets(lengths, dtype=np.int64):
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)


def naive_segments(x, cu_seqlens, scale=None):
    y = np.zeros(x.shape, result_dtype(x))
    for i in range(len(cu_seqlens) - 1):
        part = slice(cu_seqlens[i], cu_seqlens[i + 1])
        one = (
            None
            if scale is None
            else np.broadcast_to(scale, (len(cu_seqlens) - 1, *x.shape[1:]))[i]
        )
        y[part] = NAIVE["softmax"](x[part], 0, scale=one)
    return y


def compare(got, x, cu_seqlens, **options):
    assert got.dtype == result_dtype(x)
    ref = reference.segment_softmax(exact(x), cu_seqlens, **options)
    assert_close(got, ref, naive_segments(x, cu_seqlens, **options), probabilities=True)


def verify(backend, x, cu_seqlens, **options):
    before = x.tobytes()
    kwargs = {
        key: backend.asarray(value) if isinstance(value, np.ndarray) else value
        for key, value in options.items()
    }
    device_x = backend.asarray(x)
    got = cuattn.segment_softmax(device_x, backend.asarray(cu_seqlens), **kwargs)
    assert backend.ran() or x.size == 0
    assert isinstance(got, backend.xp.ndarray)
    compare(backend.asnumpy(got), x, cu_seqlens, **options)
    assert backend.asnumpy(device_x).tobytes() == before
    return backend.asnumpy(got)


# Empty segments first, last and in a run; one element; a warp and its neighbours; one long.
MIXED = [0, 1, 5, 0, 0, 31, 32, 33, 2, 1, 129, 1025, 7, 0]


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_mixed_lengths(backend, rng, dtype, index):
    verify(backend, draw(rng, sum(MIXED), dtype), offsets(MIXED, index))


@pytest.mark.parametrize(
    "lengths",
    [[1], [7], [33], [1025], [12000], [0, 12000, 3], [1] * 65, [0] * 5 + [3], [3] + [0] * 5],
)
def test_lengths(backend, rng, lengths):
    verify(backend, draw(rng, sum(lengths)), offsets(lengths))


@pytest.mark.parametrize("high", [5, 40])
def test_many_segments(backend, rng, high):
    lengths = rng.integers(0, high, 300)
    verify(backend, draw(rng, int(lengths.sum())), offsets(lengths, np.int32))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing(backend, lengths):
    for shape in [(0,), (0, 3)]:
        verify(backend, np.zeros(shape, np.float32), offsets(lengths))
    verify(backend, np.zeros((0, 0), np.float32), offsets(lengths))


def test_no_columns(backend):
    verify(backend, np.zeros((5, 0), np.float32), offsets([2, 3]))


@pytest.mark.parametrize("columns", [1, 2, 4, 33, 200])
def test_columns(backend, rng, columns):
    """Heads of a graph: each column is softmaxed on its own."""
    lengths = [0, 1, 5, 33, 2, 0, 70]
    x = draw(rng, (sum(lengths), columns))
    verify(backend, x, offsets(lengths))


def test_three_dimensions(backend, rng):
    verify(backend, draw(rng, (40, 3, 5)), offsets([7, 0, 33]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout(backend, rng, layout):
    lengths = [0, 1, 5, 33, 2, 0, 70]
    verify(backend, LAYOUTS[layout](draw(rng, (sum(lengths), 5))), offsets(lengths))
    verify(backend, LAYOUTS[layout](draw(rng, sum(lengths))), offsets(lengths))


def test_offsets_may_be_strided(backend, rng):
    cu_seqlens = np.repeat(offsets([7, 0, 33]), 2)[::2]
    verify(backend, draw(rng, 40), cu_seqlens)
    verify(backend, draw(rng, 40), np.flip(np.flip(offsets([7, 0, 33])).copy()))


def test_scale(backend, rng):
    lengths = [0, 1, 5, 33, 2, 0, 70]
    x = draw(rng, sum(lengths))
    for scale in (0.5, -1, 0.0):
        verify(backend, x, offsets(lengths), scale=scale)
    for shape in [(), (1,), (7,)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify(backend, x, offsets(lengths), scale=scale.astype(np.float32))
    x = draw(rng, (sum(lengths), 3))
    for shape in [(3,), (7, 1), (1, 3), (7, 3)]:
        scale = np.asarray(rng.integers(-8, 9, shape) / 8)
        verify(backend, x, offsets(lengths), scale=scale)


@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "strided"])
@pytest.mark.parametrize("columns", [None, 5])
def test_out(backend, rng, layout, columns):
    x = draw(rng, sum(MIXED) if columns is None else (sum(MIXED), columns))
    guard = Guarded(backend, x.shape, x.dtype, layout)
    cu_seqlens = backend.asarray(offsets(MIXED))
    assert cuattn.segment_softmax(backend.asarray(x), cu_seqlens, out=guard.out) is guard.out
    compare(backend.asnumpy(guard.out), x, offsets(MIXED))
    guard.check_rim()


def test_in_place(backend, rng):
    x = draw(rng, sum(MIXED))
    memory = backend.asarray(x.copy())
    assert cuattn.segment_softmax(memory, backend.asarray(offsets(MIXED)), out=memory) is memory
    compare(backend.asnumpy(memory), x, offsets(MIXED))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_special_values(backend, rng, value):
    """At the first, a middle and the last place of a segment; its neighbours do not see it."""
    lengths = [4, 33, 1, 129, 5]
    cu_seqlens, x = offsets(lengths), draw(rng, sum(lengths))
    plain = verify(backend, x, cu_seqlens)
    for begin, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        for place in {begin, (begin + end) // 2, end - 1}:
            changed = x.copy()
            changed[place] = value
            got = verify(backend, changed, cu_seqlens)
            others = np.ones(len(x), bool)
            others[begin:end] = False
            np.testing.assert_array_equal(got[others], plain[others])
    x[:4] = -INF
    verify(backend, x, cu_seqlens)


def test_equal_segments_are_rows(backend, rng):
    x = draw(rng, (6, 33))
    got = verify(backend, x.reshape(-1), offsets([33] * 6)).reshape(6, 33)
    ref = reference.softmax(exact(x))
    assert_close(got, ref, NAIVE["softmax"](x), probabilities=True)


def test_two_runs_are_bitwise_equal(backend, rng):
    x, cu_seqlens = backend.asarray(draw(rng, sum(MIXED))), backend.asarray(offsets(MIXED))
    runs = [backend.asnumpy(cuattn.segment_softmax(x, cu_seqlens)).tobytes() for _ in range(2)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("case", range(15))
def test_random_call(backend, rng, case):
    lengths = rng.choice([0, 0, 1, 2, 3, 9, 40, 200], int(rng.integers(1, 12)))
    shape = [int(lengths.sum()), *rng.integers(1, 6, int(rng.integers(0, 3)))]
    x = draw(rng, shape, rng.choice(["float32", "float16", "float64"]))
    x = LAYOUTS[rng.choice(list(LAYOUTS))](x) if x.size else x
    scale = None if rng.random() < 0.5 else float(rng.integers(-8, 9) / 8)
    verify(backend, x, offsets(lengths, rng.choice([np.int32, np.int64])), scale=scale)


def test_dtype_names(backend):
    """One value of each dtype, so that a mistaken width cannot hide."""
    for dtype in ("int8", "uint8", "int64", "bfloat16"):
        x = np.arange(5).astype(dtype_of(dtype))
        verify(backend, x, offsets([2, 3]))


@pytest.mark.parametrize("n", [3, 33])
def test_special_rows(backend, rng, n):
    rows = [row for _, row in cases.special_rows(rng, n)]
    verify(backend, np.concatenate(rows), offsets([n] * len(rows)))
