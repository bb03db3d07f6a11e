"""What no other test would notice if a kernel lost it; found by `mutate.py`."""

from __future__ import annotations

import numpy as np
import pytest
from cases import LAYOUTS, NAN, Guarded, draw
from tolerance import NAIVE, assert_close, dtype_of, exact, naive_logsumexp

import cuattn
from cuattn import _check, reference


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


def test_more_slices_than_threads(backend, rng):
    """Each thread of a block has states of several slices to merge."""
    verify_softmax(backend, draw(rng, (1, 2**21 + 2**17), "float16"))
    verify_softmax(backend, draw(rng, (4700, 32)), 0)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("columns", [None, 3])
def test_offsets_outside(backend, rng, monkeypatch, index, columns):
    """Offsets on a device are not looked at; whatever they hold, a segment stays inside x."""
    if backend.name == "numpy":
        pytest.skip("offsets on the host are checked")
    monkeypatch.setattr(_check, "segments", lambda offsets, *_: offsets.shape[0] - 1)
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


def test_one_exponential_an_element(backend, rng):
    """And one a thread for its factor; where warps or slices merge, a few more."""
    for shape, axis, most in [
        ((4, 1000), 1, 4 * (1000 + 32)),
        ((4, 1025), 1, 4 * (1025 + 7 + 2 * 128)),  # the ends of a row are whole fragments
        ((1100, 8), 0, 1100 * 8 + 11 * 512),
        ((1, 300_001), 1, 2 * 300_001 + 19 * (7 * 256 + 2 * 19) + 64),
    ]:
        x = backend.asarray(draw(rng, shape))
        if backend.runtime:
            backend.runtime.clear()
        cuattn.softmax(x, axis)
        if backend.runtime:
            assert backend.runtime.total().exps <= most


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
    """What a row is padded with is no element of it, however small its elements are."""
    x = -1e4 - abs(draw(rng, (5, 33), dtype))
    state = cuattn.softmax_state(backend.asarray(x.astype(dtype_of(dtype))))
    assert (backend.asnumpy(state.m) == x.max(1)).all()
    verify_logsumexp(backend, x, -1)
