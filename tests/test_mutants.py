"""What no other test would notice if a kernel lost it; found by `mutate.py`."""

from __future__ import annotations

import numpy as np
import pytest
from cases import LAYOUTS, NAN, Guarded, draw
from tolerance import NAIVE, assert_close, dtype_of, exact, naive_logsumexp

import cuattn
from cuattn import _check, reference


def verify_softmax(backend, x, axis=-1, **options):
    got = backend.asnumpy(cuattn.softmax(backend.asarray(x), axis, **options))
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


def counted(backend, function, *arrays, **options):
    """What the launches of one call cost; None where that is not known."""
    if backend.runtime is None:
        function(*(backend.asarray(a) for a in arrays), **options)
        return None
    backend.runtime.clear()
    function(*(backend.asarray(a) for a in arrays), **options)
    return backend.runtime.total()


# Part of a warp, a warp, a block, ragged ends; a strided row that stays in registers.
@pytest.mark.parametrize(
    "shape, axis", [((3, 33), 1), ((3, 1000), 1), ((5, 1025), 1), ((40, 129), 0), ((3, 700), 0)]
)
def test_every_element_moves_once(backend, rng, shape, axis):
    """Threads without a row or a column move nothing, and nothing is read again."""
    x = draw(rng, shape)
    counters = counted(backend, cuattn.softmax, x, axis=axis)
    if counters:
        assert counters.global_bytes_read == counters.global_bytes_written == x.nbytes
    counters = counted(backend, cuattn.logsumexp, x, axis=axis)
    if counters:
        assert counters.global_bytes_read == x.nbytes


# Rows that start at every alignment; the result is packed otherwise than they are. The long one is
# read twice.
@pytest.mark.parametrize(
    "dtype, shape, reads", [("float16", (5, 2047), 1), ("float32", (2, 300001), 2)]
)
def test_misaligned_rows_move_as_vectors(backend, rng, dtype, shape, reads):
    x = LAYOUTS["misaligned"](draw(rng, shape, dtype))
    counters = counted(backend, cuattn.softmax, x)
    if counters:
        assert counters.loads_by_size[16] * 16 > 0.97 * reads * x.nbytes
        assert counters.stores_by_size[16] * 16 > 0.9 * x.nbytes
    counters = counted(backend, cuattn.logsumexp, x, axis=-1)
    if counters:
        assert counters.loads_by_size[16] * 16 > 0.97 * x.nbytes


def test_one_exponential_an_element(backend, rng):
    """And one a thread for its factor; where warps merge, one more."""
    for n, threads in ((1000, 32), (1025, 2 * 128)):
        counters = counted(backend, cuattn.softmax, draw(rng, (4, n)))
        if counters:
            assert counters.exps <= 4 * (n + 8 + threads)


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
