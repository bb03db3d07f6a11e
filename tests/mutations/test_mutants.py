"""What no other test would notice if a kernel lost it; found by `mutate.py`."""

from __future__ import annotations

import os

import emulator
import numpy as np
import pytest
from cases import LAYOUTS, NAN, Guarded, draw
from tolerance import NAIVE, assert_close, dtype_of, exact, naive_logsumexp

import cuattn
from cuattn import reference
from cuattn._arrays import checks


def verify_softmax(backend, x, axis=-1, **options):
    device = {k: backend.asarray(v) if np.ndim(v) else v for k, v in options.items()}
    got = backend.asnumpy(cuattn.softmax(backend.asarray(x), axis, **device))
    ref = reference.softmax(exact(x), axis, **options)
    assert_close(got, ref, NAIVE["softmax"](x, axis, **options), probabilities=True)


def verify_logsumexp(backend, x, axis):
    got = backend.asnumpy(cuattn.logsumexp(backend.asarray(x), axis))
    assert_close(got, reference.logsumexp(exact(x), axis), naive_logsumexp(x, axis, dtype=x.dtype))


# A block whose tiles fall by more than exp can hold, contiguous and strided, in one pass and two.
@pytest.mark.parametrize("shape, axis", [((1, 50257), 1), ((1025, 5), 0), ((8200, 2), 0)])
def test_falling_rows(backend, shape, axis):
    """The exponentials of a later tile are relative to the maximum so far, not to their own."""
    x = np.linspace(2000, -2000, np.prod(shape)).astype(np.float32).reshape(shape)
    verify_softmax(backend, x, axis)
    verify_logsumexp(backend, x, axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_every_slice_counts(backend, rng, axis):
    """In data of `draw`, a few outliers hold nearly all of the sum."""
    x = rng.random((2, 300_001) if axis else (9000, 3), np.float32)
    verify_softmax(backend, x, axis)
    verify_logsumexp(backend, x, axis)


# 259 parts for 256 threads; 18 for 16, strided; 40 for a warp. Parts have 8192, 512 and 16384
# columns, and the length of a row that may be misaligned is rounded up.
@pytest.mark.parametrize(
    "name, shape",
    [
        ("softmax", (1, 259 * 8192 - 7)),
        ("softmax", (18 * 512, 32)),
        ("logsumexp", (1, 40 * 16384 - 3)),
    ],
)
def test_more_slices_than_threads(backend, rng, name, shape):
    """Each thread has states of several slices to merge."""
    x = rng.random(shape, np.float32)
    if name == "logsumexp":
        return verify_logsumexp(backend, x, 1)
    if shape[0] == 1:
        return verify_softmax(backend, x.astype(np.float64))
    return verify_softmax(backend, x, 0)


@pytest.mark.parametrize("first", [2000, -2000])
def test_weights_of_more_parts_than_lanes(backend, rng, first):
    """A lane merges a part into one of a far larger maximum, or of a far smaller one."""
    x = np.linspace(first, -first, 40 * 8192 - 3).astype(np.float32)
    b = rng.random(x.shape, np.float32)
    got = cuattn.logsumexp(backend.asarray(x), b=backend.asarray(b))
    want = reference.logsumexp(exact(x), b=exact(b))
    assert_close(backend.asnumpy(got), want, naive_logsumexp(x, None, b=b, dtype=x.dtype))


# One multiprocessor: as many rows as blocks, of several parts each.
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("shape, axis", [((5, 50_257), 1), ((5000, 100), 0)])
def test_whole_rows_of_several_parts(rng, arch, shape, axis):
    """Sums next to 1, wherever the maximum is, and ordinary ones."""
    x = rng.uniform(-25, -17, shape).astype(np.float32)
    rows = x if axis == 1 else x.T
    for row, place in zip(rows[:4], rng.permutation(4), strict=True):
        row[int((place + rng.random()) / 4 * row.size)] = 0
    with emulator.activate(arch, 1, seed=int(os.environ["CUATTN_TEST_SEED"])):
        lse = cuattn.logsumexp(x, axis)
        p, lse_of_p = cuattn.softmax(x, axis, return_lse=True)
        log_p = cuattn.log_softmax(x, axis)
    wide = rows.astype(np.float64)
    peak = wide.max(1)
    rest = np.exp(wide - peak[:, None]).sum(
        1, where=np.arange(wide.shape[1]) != wide.argmax(1)[:, None]
    )
    want = peak + np.log1p(rest)
    for got in (lse, lse_of_p):
        np.testing.assert_allclose(got, want, rtol=1e-4)
    log_want = wide - want[:, None]
    np.testing.assert_allclose(log_p if axis == 1 else log_p.T, log_want, rtol=1e-4)
    np.testing.assert_allclose(p if axis == 1 else p.T, np.exp(log_want), rtol=1e-4)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("columns", [None, 3])
def test_offsets_outside(backend, rng, monkeypatch, index, columns):
    """Offsets on a device are not looked at; whatever they hold, a segment stays inside x."""
    if backend.name == "numpy":
        pytest.skip("offsets on the host are checked")
    monkeypatch.setattr(checks, "ends", lambda *_: None)
    low, high = np.iinfo(index).min, np.iinfo(index).max
    wide = np.full((60,) if columns is None else (60, columns), NAN, np.float32)
    wide[10:50] = draw(rng, wide[10:50].shape)
    x = backend.asarray(wide)[10:50]
    for offsets, segments in [
        ([-7, 5, 99], [(0, 5), (5, 40)]),
        ([99, 120], []),
        ([30, 20], []),
        ([low, 3, 3, high], [(0, 3), (3, 40)]),
        ([high, low], []),
    ]:
        guard = Guarded(backend, x.shape, np.float32, "misaligned")
        kept = backend.asnumpy(guard.out).copy()
        cuattn.segment_softmax(x, backend.asarray(np.array(offsets, index)), out=guard.out)
        got, untouched = backend.asnumpy(guard.out), np.ones(40, bool)
        for begin, end in segments:
            part = wide[10 + begin : 10 + end]
            ref = reference.softmax(exact(part), 0)
            assert_close(got[begin:end], ref, NAIVE["softmax"](part, 0))
            untouched[begin:end] = False
        assert got[untouched].tobytes() == kept[untouched].tobytes()
        guard.check_rim()


# A warp; a block, where the ends of a row are whole fragments; columns; slices, by two passes.
@pytest.mark.parametrize(
    "shape, axis, reads, beside",
    [((4, 1000), 1, 1, 4 * 32), ((4, 1025), 1, 1, 4 * 263), ((1100, 8), 0, 1, 11 * 512)]
    + [((1, 300_001), 1, 2, None)],
)
def test_one_exponential_an_element(backend, rng, shape, axis, reads, beside):
    """And a few a thread, for its factor and where warps or slices merge."""
    x = draw(rng, shape)
    if backend.runtime:
        backend.runtime.clear()
    verify_softmax(backend, x, axis)
    if backend.runtime:
        counters = backend.runtime.total()
        blocks = counters.barriers  # of 256 threads, one in each
        if beside is None:
            beside = 256 * blocks * 13 // 4
        assert counters.exps <= reads * x.size + beside


def test_misaligned_gradients_move_as_vectors(backend, rng):
    """Fragments lie on the boundaries of grad, wherever those of the result are."""
    y = reference.softmax(draw(rng, (5, 1025)), dtype=np.float32)
    grad, y = (backend.asarray(LAYOUTS["misaligned"](a)) for a in (draw(rng, y.shape), y))
    if backend.runtime:
        backend.runtime.clear()
    cuattn.softmax_backward(grad, y)
    if backend.runtime:
        assert backend.runtime.total().loads_by_size[16] * 512 > 0.97 * (grad.nbytes + y.nbytes)


# Four warps, each with a part of every column.
@pytest.mark.parametrize("columns", [2, 3, 8])
def test_few_columns(backend, rng, columns):
    verify_softmax(backend, draw(rng, (200, columns)), 0)
    verify_logsumexp(backend, draw(rng, (200, columns)), 0)


def test_ragged_columns(backend, rng):
    """More threads than rows, by more than a segment has columns."""
    lengths = [4, 1, 0, 7, 9]
    cu_seqlens, x = np.cumsum([0, *lengths]), draw(rng, (sum(lengths), 5))
    got = backend.asnumpy(cuattn.segment_softmax(backend.asarray(x), backend.asarray(cu_seqlens)))
    naive = [NAIVE["softmax"](part, 0) for part in np.split(x, cu_seqlens[1:-1])]
    assert_close(got, reference.segment_softmax(exact(x), cu_seqlens), np.concatenate(naive))


def test_merge_of_many_states(backend, rng):
    """More than one block of them."""
    x = draw(rng, (300, 8))
    parts = [cuattn.softmax_state(backend.asarray(part)) for part in np.split(x, 2, 1)]
    got = backend.asnumpy(cuattn.merge(*parts).lse)
    assert_close(got, reference.logsumexp(exact(x), 1), naive_logsumexp(x, 1, dtype=x.dtype))


def test_scale_of_float64(backend, rng):
    """One that float32 does not hold."""
    x = draw(rng, (5, 33), "float64")
    verify_softmax(backend, x, scale=0.1)
    verify_softmax(backend, x, scale=np.full((5, 1), 0.1))


def test_maximum_of_a_float64_state(backend):
    """To the last bit, not as a float32."""
    x = np.array([[1 + 2.0**-40, 1, 0.5], [-1e300, -1e301, -1e302]])
    state = cuattn.softmax_state(backend.asarray(x))
    assert (backend.asnumpy(state.m) == x.max(1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_maximum_of_a_negative_row(backend, rng, dtype):
    """What a row is padded with is not an element of it, however small its elements are."""
    x = -1e4 - abs(draw(rng, (5, 33), dtype))
    state = cuattn.softmax_state(backend.asarray(x.astype(dtype_of(dtype))))
    assert (backend.asnumpy(state.m) == x.max(1)).all()
    verify_logsumexp(backend, x, -1)
