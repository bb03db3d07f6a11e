"""What only the path of NumPy arrays has: blocks, threads, conversions of float16, and no copy of
its input. Its results are those of every backend in the files beside this one."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from conftest import rows_alone
from tolerance import FLOATS, dtype_of

import cuattn
from cuattn._arrays import blocks


def bits(array):
    return np.ascontiguousarray(array).view(f"u{array.itemsize}")


# ---- Conversions -------------------------------------------------------------------------------

HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_float16_is_widened():
    wide = np.empty(HALVES.shape, np.float32)
    blocks.widen(HALVES, wide)
    np.testing.assert_array_equal(wide, HALVES.astype(np.float32))


@pytest.mark.parametrize("beyond", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x1FFF])
def test_float16_is_rounded_to_nearest_even(beyond):
    """Beside every float16, on both sides of the middle to the next one, and in it."""
    wide = HALVES.astype(np.float32)
    x = (bits(wide) + np.uint32(beyond)).view(np.float32)
    for part in (x, x[np.isfinite(x) & (x >= 0) & (x < 65520)]):  # the shorter way, too
        got = np.empty(part.shape, np.float16)
        blocks.narrow(part, got)
        with np.errstate(all="ignore"):
            want = part.astype(np.float16)
        numbers = ~np.isnan(part)
        np.testing.assert_array_equal(bits(got)[numbers], bits(want)[numbers])
        assert np.isnan(got[~numbers]).all()


def test_float16_below_its_normal_numbers(rng):
    x = (2.0 ** rng.uniform(-27, -13, 100_000)).astype(np.float32)
    got = np.empty(x.shape, np.float16)
    blocks.narrow(x, got)
    np.testing.assert_array_equal(got, x.astype(np.float16))


# ---- Bits --------------------------------------------------------------------------------------


def weighted(x, axis):
    return cuattn.logsumexp(x, axis, b=abs(x.astype(np.float32)), keepdims=True)


def lowest(x, axis):
    """A label for each row, which depends on that row alone."""
    return np.argmin(np.abs(x.astype(np.float32)), axis)


def losses(x, axis):
    return np.stack(cuattn.cross_entropy(x, lowest(x, axis), axis=axis, return_lse=True), axis)


def loss_gradient(x, axis):
    lse = cuattn.logsumexp(x, axis, dtype=np.float64)
    return cuattn.cross_entropy_backward(0.3, x, lowest(x, axis), lse, axis=axis)


def logits(x, axis):
    return np.stack(cuattn.logits_state(x, lowest(x, axis), axis=axis), axis)


OPERATIONS = {
    "softmax": lambda x, axis: cuattn.softmax(x, axis),
    "scaled": lambda x, axis: cuattn.softmax(x, axis, scale=0.7),
    "masked": lambda x, axis: cuattn.softmax(x, axis, where=x != 0),
    "lse": lambda x, axis: np.expand_dims(cuattn.softmax(x, axis, return_lse=True)[1], axis),
    "log_softmax": lambda x, axis: cuattn.log_softmax(x, axis),
    "weighted": weighted,
    "gradient": lambda x, axis: cuattn.softmax_backward(x, abs(x), axis),
    "log gradient": lambda x, axis: cuattn.log_softmax_backward(x, -abs(x), axis),
    "loss": losses,
    "loss gradient": loss_gradient,
    "entropy": lambda x, axis: cuattn.entropy(x, axis, where=x != 0, keepdims=True),
    "logits": logits,
}
# Both sides of where rows are turned, cut, or not worked on together any more.
LENGTHS = (1, 5, 32, 33, 127, 300, 513, 1025, 3000, 40_000, 1 << 18, (1 << 18) + 1)


@rows_alone
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("n", LENGTHS)
def test_bits_of_a_row_in_any_company(rng, operation, n):
    """Alone, and as one of many, for rows and for columns; with special rows beside it."""
    call, dtype = OPERATIONS[operation], dtype_of(str(rng.choice(FLOATS)))
    count = int(rng.integers(2, 600)) if n < 2000 else 5
    x = (3 * rng.standard_normal((count, n))).astype(dtype)
    x[1, 0] = rng.choice([np.nan, np.inf, -np.inf])
    for array, axis in ((x, 1), (np.ascontiguousarray(x.T), 0)):
        whole = call(array, axis)
        for i in (0, count - 1):
            one = slice(i, i + 1)
            row = call(array[one] if axis else array[:, one], axis)
            among = whole[one] if axis else whole[:, one]
            np.testing.assert_array_equal(bits(row), bits(among))


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_bits_of_small_calls(rng, name):
    """The formula alone, which a call with `out` does not take; of one shape and many strides."""
    x = rng.standard_normal((48, 48)).astype(np.float32)
    x[5] = 30 * np.eye(48)[5]  # a sum next to 1
    for view in (x, x.T, np.repeat(x, 2, 1)[:, ::2], x[::-1], x[:, ::-1], x[:0], x[:, :0]):
        call = getattr(cuattn, name)
        got = call(view, axis=-1)
        out = call(view, axis=-1, out=np.empty_like(got))
        np.testing.assert_array_equal(bits(got), bits(out))


@rows_alone
@pytest.mark.parametrize("shape", [(40, 300), (2, (1 << 18) + 1), (3000, 5)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_in_the_place_of_x(rng, shape, axis, dtype):
    """Of rows that are one part, and of those that are read once more after a part is written."""
    x = (3 * rng.standard_normal(shape)).astype(dtype_of(dtype))
    for name in ("softmax", "log_softmax"):
        for options in ({}, {"scale": 2.0}, {"where": rng.random(shape) < 0.9}):
            own = x.copy()
            apart = getattr(cuattn, name)(x, axis, **options)
            getattr(cuattn, name)(own, axis, out=own, **options)
            np.testing.assert_array_equal(bits(own), bits(apart))
    grad = abs(x)
    for name in ("softmax_backward", "log_softmax_backward"):
        apart = getattr(cuattn, name)(grad, x, axis)
        for i in range(2):
            given = [grad.copy(), x.copy()]
            got = getattr(cuattn, name)(*given, axis, out=given[i])
            np.testing.assert_array_equal(bits(got), bits(apart))


@pytest.mark.parametrize("axis", [0, 1])
def test_in_the_place_of_x_beyond_float32(rng, axis):
    """A block is computed twice where only some of its rows have scores that float32 can hold."""
    x = rng.standard_normal((60, 60)).astype(np.float32)
    x[::3] *= 1e20
    apart = cuattn.softmax(x, axis, scale=1e20)
    np.testing.assert_array_equal(cuattn.softmax(x, axis, scale=1e20, out=x), apart)


@pytest.mark.parametrize("shape", [(700, 1000), (3, 300_001), (3000, 40), (4000, 7)])
@pytest.mark.parametrize("axis", [0, 1])
def test_bits_by_any_number_of_threads(rng, monkeypatch, shape, axis):
    x = rng.standard_normal(shape).astype(np.float32)
    ends = np.array([0, shape[0] // 3, shape[0]])
    made = []
    for count in (1, 3):
        monkeypatch.setattr(blocks, "THREADED", 0)
        monkeypatch.setattr(blocks, "_pool", None)
        monkeypatch.setattr(blocks, "thread_limit", lambda count=count: count)
        calls = [call(x, axis) for call in OPERATIONS.values()]
        made.append([*calls, cuattn.segment_softmax(x, ends)])
    for one, several in zip(*made, strict=True):
        np.testing.assert_array_equal(bits(one), bits(several))


def test_a_thread_that_shares_a_call_waits_for_no_other():
    """Long segments are calls of their own: threads that waited for them would wait forever."""
    script = (
        "import numpy as np, cuattn\n"
        "x = np.zeros(9 << 20, 'f')\n"
        "print(cuattn.segment_softmax(x, np.arange(0, x.size + 1, 1 << 20)).sum())"
    )
    given = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
    assert done.stdout == "9.0\n", done.stderr


def test_settings_of_numpy_stay(monkeypatch):
    """The size of its buffers, which long rows change, and errors; here and in threads of ours."""
    x = np.ones((300, 300), np.float32)
    with np.errstate(all="warn"):
        np.setbufsize(4096)
        before = np.getbufsize(), np.geterr()
        for threaded in (blocks.THREADED, 0):
            monkeypatch.setattr(blocks, "THREADED", threaded)
            cuattn.softmax(x, scale=2.0)
            assert (np.getbufsize(), np.geterr()) == before


def test_the_threads_that_a_user_allows(monkeypatch):
    for given, expected in (("1", 1), ("3,2", 3)):
        monkeypatch.setenv("OMP_NUM_THREADS", given)
        blocks.thread_limit.cache_clear()
        assert blocks.thread_limit() == expected
    blocks.thread_limit.cache_clear()


# ---- Memory ------------------------------------------------------------------------------------

MEGABYTE = 1 << 20
SHAPES = [(1 << 23,), (1 << 10, 1 << 13), (1 << 13, 1 << 10), (1 << 20, 8), (2, 1 << 11, 1 << 11)]


@pytest.mark.drawn
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", [0, -1])
def test_memory_beyond_the_result(dtype, shape, axis):
    """Of 2**23 elements, which a copy in float32 would take 32 MiB for."""
    x, mask = np.zeros(shape, dtype), np.ones(shape, bool)
    tracemalloc.start()
    try:
        for call in (
            lambda: cuattn.softmax(x, axis, scale=0.5),
            lambda: cuattn.log_softmax(x, axis, where=mask),
            lambda: cuattn.logsumexp(x, axis, b=x),
            lambda: cuattn.log_softmax_backward(x, x, axis),
        ):
            base = tracemalloc.get_traced_memory()[0]
            tracemalloc.reset_peak()
            result = call()
            peak = tracemalloc.get_traced_memory()[1] - base - result.nbytes
            assert peak < 28 * MEGABYTE
    finally:
        tracemalloc.stop()
