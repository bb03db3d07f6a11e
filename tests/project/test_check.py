"""Every bad argument of the softmax family: the class of the error, its words, and nothing done.

The words are ``<argument> must <requirement>, but <what came>[; <remedy>]``. On the emulator no
kernel may have run; everywhere `out` must be as it was.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.exceptions import AxisError

import cuattn
from cuattn import SoftmaxState

FORWARD = ["softmax", "log_softmax", "logsumexp"]
TRANSFORMS = ["softmax", "log_softmax"]
BACKWARD = ["softmax_backward", "log_softmax_backward"]
SEGMENTS = ["segment_softmax", "segment_softmax_backward"]
ALL = [*FORWARD, *BACKWARD, *SEGMENTS, "softmax_state"]


class Refusing:
    """A backend on which calls must be refused, and nothing may have been launched."""

    def __init__(self, backend):
        self.backend, self.xp = backend, backend.xp
        self.x = self.array(np.arange(12, dtype=np.float32).reshape(3, 4) / 8)

    def array(self, a):
        return self.backend.asarray(np.asarray(a))

    def call(self, name, *args, **options):
        return getattr(cuattn, name)(*args, **options)

    def refuses(self, error, argument, name, *args, words="", **options):
        """`name` raises exactly this class of error about `argument`, containing `words`."""
        with pytest.raises(error) as caught:
            self.call(name, *args, **options)
        message = str(caught.value)
        if argument is not None:
            pattern = rf"^{argument}\b.* must .+, but .+"
            assert re.match(pattern, message, re.DOTALL), message
        assert words in message, message
        if self.backend.runtime is not None:
            assert not self.backend.runtime.counters
        return message

    def arguments(self, name, x):
        """Valid positional arguments of `name` around `x`, of its library."""
        arrays = (x, x) if name.endswith("_backward") else (x,)
        if name in SEGMENTS:
            offsets = np.array([0, 1, 3])
            arrays += (offsets if isinstance(x, np.ndarray) else self.array(offsets),)
        return arrays


@pytest.fixture
def refusing(backend):
    return Refusing(backend)


def first(name):
    """The name of the first argument."""
    return "grad" if name.endswith("_backward") else "x"


# ---- what is not an array ----------------------------------------------------------------------


class OtherDevice:
    """A foreign array that is neither on the CPU nor on a CUDA device."""

    def __dlpack__(self, **options):
        raise AssertionError("must not be asked for")

    def __dlpack_device__(self):
        return 8, 0  # kDLMetal


class DeviceArray:
    """A foreign array that says that it is on a device; its memory must not be touched."""

    def __init__(self, shape=(3, 4), typestr="<f4"):
        self.shape, self.typestr = shape, typestr

    @property
    def __cuda_array_interface__(self):
        data = (0x7F0000000000, False)
        return {"shape": self.shape, "typestr": self.typestr, "data": data, "version": 3}


NOT_ARRAYS = [
    [[1.0, 2.0], [3.0, 4.0]],
    (1.0, 2.0),
    3.0,
    3,
    None,
    "abc",
    b"abc",
    {"a": 1},
    memoryview(b"abcd"),
    range(3),
    object(),
]


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ALL)
def test_not_an_array(refusing, name, value):
    args = (value, *refusing.arguments(name, refusing.x)[1:])
    words = f"{refusing.xp.__name__}.asarray({first(name)})"
    refusing.refuses(TypeError, first(name), name, *args, words=words)


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
def test_second_argument_is_not_an_array(refusing, value):
    words = f"convert it with {refusing.xp.__name__}.asarray"  # of no other library
    for name in (*BACKWARD, "segment_softmax_backward"):
        args = (refusing.x, value, *refusing.arguments(name, refusing.x)[2:])
        refusing.refuses(TypeError, "y", name, *args, words=f"{words}(y)")
    for name in SEGMENTS:
        args = (*refusing.arguments(name, refusing.x)[:-1], value)
        refusing.refuses(TypeError, "cu_seqlens", name, *args, words=words)


@pytest.mark.parametrize("name", ALL)
def test_an_array_on_another_device(refusing, name):
    args = (OtherDevice(), *refusing.arguments(name, refusing.x)[1:])
    refusing.refuses(TypeError, first(name), name, *args, words="copy it there")


@pytest.mark.parametrize("name", ALL)
def test_arrays_that_behave_unlike_others(refusing, name):
    """A matrix never loses a dimension, and of a masked array the mask would be lost."""
    for value in (np.ones((3, 4)).view(np.matrix), np.ma.masked_equal([[1.0, 2.0]], 1)):
        args = (value, *refusing.arguments(name, np.zeros((3, 4), np.float32))[1:])
        refusing.refuses(TypeError, first(name), name, *args)


BAD_DTYPES = ["bool", "complex64", "complex128", "O", "U3", "S3", "M8[s]", "m8[s]", "V4", "i4,f4"]


@pytest.mark.parametrize("dtype", BAD_DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_dtype(refusing, name, dtype):
    """Also of a dtype that CuPy does not have, where all arguments are NumPy arrays."""
    bad, good = np.zeros((3, 4), dtype), np.zeros((3, 4), np.float32)
    if bad.dtype.kind in "bc":
        bad, good = refusing.array(bad), refusing.array(good)
    args = (bad, *refusing.arguments(name, good)[1:])
    refusing.refuses(TypeError, first(name), name, *args)


@pytest.mark.host("CuPy has no swapped bytes")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_swapped_bytes_are_refused_or_right(refusing, name):
    swapped = refusing.x.astype(refusing.x.dtype.newbyteorder())
    try:
        got = refusing.call(name, swapped)
    except TypeError as error:
        assert re.match(r"^x must .+, but .+", str(error))
    else:
        np.testing.assert_array_equal(got, refusing.call(name, refusing.x))


# ---- axis --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ALL if name not in SEGMENTS])
def test_axis(refusing, name):
    args = refusing.arguments(name, refusing.x)
    for axis in (2, -3, 10**30, (0, 2), (-3,)):
        refusing.refuses(AxisError, None, name, *args, axis)
    for axis in ((0, 0), (0, -2), (1, -1, 0)):
        refusing.refuses(ValueError, "axis", name, *args, axis)
    for axis in (1.0, np.float64(0), "0", (0, 1.0), (None,), [0], {0}, 1j, np.array([0, 1])):
        refusing.refuses(TypeError, "axis", name, *args, axis)


@pytest.mark.parametrize("name", [name for name in ALL if name not in SEGMENTS])
def test_axis_of_zero_dimensions(refusing, name):
    """0 and -1 are the axis of a number, as in NumPy; there is no other."""
    x = refusing.array(np.array(1.0, np.float32))
    for axis in (1, -2):
        refusing.refuses(AxisError, None, name, *refusing.arguments(name, x), axis)


def test_axis_of_an_empty_array(refusing):
    for name in FORWARD:
        refusing.refuses(AxisError, None, name, refusing.array(np.zeros((0, 3), np.float32)), 2)


# ---- out and dtype -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD, *SEGMENTS])
def test_out(refusing, name):
    args, xp = refusing.arguments(name, refusing.x), refusing.xp
    for shape in [(4, 3), (3,), (3, 4, 1), (1, 3, 4), (3, 5), (), (12,)]:
        refusing.refuses(ValueError, "out", name, *args, out=xp.zeros(shape, np.float32))
    for dtype in (np.float64, np.float16, np.int32, np.bool_, np.complex64):
        refusing.refuses(TypeError, "out", name, *args, out=xp.zeros((3, 4), dtype))
    for out in ([0.0] * 12, 0.0, "abc", DeviceArray, OtherDevice(), np.float32(0)):
        message = refusing.refuses(TypeError, "out", name, *args, out=out)
        assert "asarray" not in message


def test_out_of_logsumexp(refusing):
    x, xp = refusing.x, refusing.xp
    for shape in [(3, 1), (4,), (1, 3), ()]:
        refusing.refuses(ValueError, "out", "logsumexp", x, -1, out=xp.zeros(shape, np.float32))
    out = xp.zeros(3, np.float32)
    refusing.refuses(ValueError, "out", "logsumexp", x, -1, keepdims=True, out=out)
    refusing.refuses(TypeError, "out", "logsumexp", x, -1, out=xp.zeros(3, np.float64))
    refusing.refuses(ValueError, "out", "logsumexp", x, -1, out=x[:, 0])


@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD])
def test_out_tuple_for_one_result(refusing, name):
    out = refusing.xp.zeros((3, 4), np.float32)
    for given in ((out,), (out, out), ()):
        args = refusing.arguments(name, refusing.x)
        refusing.refuses((TypeError, ValueError), "out", name, *args, out=given)


def test_out_for_two_results(refusing):
    x, xp = refusing.x, refusing.xp
    y, lse = xp.zeros((3, 4), np.float32), xp.zeros(3, np.float32)
    for given in (y, (y,), (y, lse, lse), (), (lse, y), (y, None), (None, lse), [y, lse]):
        refusing.refuses((TypeError, ValueError), "out", "softmax", x, out=given, return_lse=True)
    for bad in (lse[:2], lse.reshape(3, 1)):
        refusing.refuses(ValueError, "out", "softmax", x, out=(y, bad), return_lse=True)
    bad = xp.zeros(3, np.float64)
    refusing.refuses(TypeError, "out", "softmax", x, out=(y, bad), return_lse=True)
    half = xp.zeros((3, 4), np.float16)  # the lse of float16 is float32
    out = (half, xp.zeros(3, np.float16))
    refusing.refuses(TypeError, "out", "softmax", x.astype(np.float16), out=out, return_lse=True)


@pytest.mark.host("CuPy has no read-only arrays")
@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD])
def test_out_is_read_only(refusing, name):
    out = np.zeros((3, 4), np.float32)
    out.flags.writeable = False
    refusing.refuses(ValueError, "out", name, *refusing.arguments(name, refusing.x), out=out)
    out = np.broadcast_to(np.zeros(4, np.float32), (3, 4))
    refusing.refuses(ValueError, "out", name, *refusing.arguments(name, refusing.x), out=out)


@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD, *SEGMENTS])
def test_out_overlaps_an_input(refusing, name):
    """Exactly the same array is in place; anything between that and apart is a race."""
    memory = refusing.array(np.arange(20, dtype=np.float32).reshape(4, 5))
    before = refusing.backend.asnumpy(memory).copy()
    for given, out in [
        (memory[:3, :4], memory[:3, 1:]),
        (memory[:3, :4], memory[1:, :4]),
        (memory[:3, :4], memory[2::-1, :4]),
        (memory[:4, :4], memory[:4, :4].T),
    ]:
        args = refusing.arguments(name, given)
        if name in SEGMENTS:
            args = (*args[:-1], refusing.array(np.array([0, 1, given.shape[0]])))
        refusing.refuses(ValueError, "out", name, *args, out=out)
    np.testing.assert_array_equal(refusing.backend.asnumpy(memory), before)


@pytest.mark.parametrize("name", [*BACKWARD, "segment_softmax_backward"])
def test_out_overlaps_the_result(refusing, name):
    memory = refusing.array(np.arange(20, dtype=np.float32).reshape(4, 5))
    _, *args = refusing.arguments(name, memory[:3, :4])
    refusing.refuses(ValueError, "out", name, refusing.x, *args, out=memory[:3, 1:])


def test_the_two_outs_overlap(refusing):
    out = refusing.xp.zeros((3, 4), np.float32)
    given = (out, out[:, 0])
    refusing.refuses(ValueError, "out", "softmax", refusing.x, out=given, return_lse=True)


# Functions with several results: what is called, of an array (3, 4) of float32.
SEVERAL = {
    "softmax": lambda x, **out: cuattn.softmax(x, return_lse=True, **out),
    "top_k": lambda x, **out: cuattn.top_k(x, 2, **out),
    "top_k of all": lambda x, **out: cuattn.top_k(x, 5, axis=None, **out),
    "softmax_topk": lambda x, **out: cuattn.softmax_topk(x, 2, axis=0, **out),
    "softmax_state": lambda x, **out: cuattn.softmax_state(x, **out),
    "softmax_topk_state": lambda x, **out: cuattn.softmax_topk_state(x, 2, **out),
    "sample, log_prob": lambda x, **out: cuattn.sample(x, 2, seed=1, return_log_prob=True, **out),
    "sample_state": lambda x, **out: cuattn.sample_state(x, 2, seed=1, **out),
    "merge": lambda x, **out: cuattn.merge(*[cuattn.SoftmaxState(x[0, :3], x[2, :3])] * 2, **out),
    "softmax_topk, lse": lambda x, **out: cuattn.softmax_topk(x, 2, return_lse=True, **out),
}


@pytest.fixture(params=SEVERAL)
def several(request, refusing):
    """What refuses an `out` for several results, and arrays that fit."""
    function, xp = SEVERAL[request.param], refusing.xp
    outs = [xp.zeros_like(part) for part in function(refusing.x)]
    refusing.backend.runtime and refusing.backend.runtime.clear()
    refusing.call = lambda name, *args, **options: function(refusing.x, **options)

    def refuses(error, argument, *out):
        return refusing.refuses(error, "out", "", words=f"{argument} must ", out=out)

    return refusing, refuses, outs


def check_nothing_is_written(outs, backend):
    assert not any(backend.asnumpy(out).any() for out in outs)


def test_out_of_several_is_no_such_tuple(several):
    refusing, refuses, outs = several
    for given in (outs, outs[0], 0.0, "abc", (), tuple(outs[:-1]), (*outs, outs[-1])):
        refusing.refuses(TypeError, "out", "", out=given)
    for i in range(len(outs)):
        for bad in (None, 0.0, [0.0], np.float32(0), OtherDevice()):
            message = refuses(TypeError, f"out[{i}]", *outs[:i], bad, *outs[i + 1 :])
            assert "asarray" not in message
    check_nothing_is_written(outs, refusing.backend)


def test_shape_and_dtype_of_several(several):
    refusing, refuses, outs = several
    for i, out in enumerate(outs):
        for bad in (out[None], out[:-1], out[..., None], out.reshape(-1, 1, 1)):
            refuses(ValueError, f"out[{i}]", *outs[:i], bad, *outs[i + 1 :])
        for dtype in {np.float16, np.float64, np.int32, np.bool_} - {out.dtype.type}:
            refuses(TypeError, f"out[{i}]", *outs[:i], out.astype(dtype), *outs[i + 1 :])
        bad = refusing.xp.broadcast_to(out[:1], out.shape)
        refuses(ValueError, f"out[{i}]", *outs[:i], bad, *outs[i + 1 :])
    check_nothing_is_written(outs, refusing.backend)


@pytest.mark.host("CuPy has no read-only arrays")
def test_several_are_read_only(several):
    _, refuses, outs = several
    for i in range(len(outs)):
        outs[i].flags.writeable = False
        refuses(ValueError, f"out[{i}]", *outs)
        outs[i].flags.writeable = True


def test_several_overlap(several):
    """Neither an input nor one another, not even as the same view."""
    refusing, refuses, outs = several
    memory = refusing.xp.zeros(512, np.uint8)

    def view(i, begin):
        end = begin + outs[i].nbytes
        return memory[begin:end].view(outs[i].dtype).reshape(outs[i].shape)

    refusing.x = memory[16:64].view(np.float32).reshape(3, 4)
    for i in range(len(outs)):
        for begin in (24, 56):
            refuses(ValueError, f"out[{i}]", *outs[:i], view(i, begin), *outs[i + 1 :])
        for j in range(i):
            given = [*outs]
            given[j] = view(j, 128)
            for begin in (128, 128 + (outs[j].nbytes - 1) // 8 * 8):
                given[i] = view(i, begin)
                refuses(ValueError, f"out[{i}]", *given)
    assert not refusing.backend.asnumpy(memory).any()


def test_several_between_elements(several):
    refusing, refuses, outs = several
    for i, out in enumerate(outs):
        if refusing.backend.on_device:
            memory = refusing.xp.zeros(512, np.uint8).data + 1
            bad = refusing.xp.ndarray(out.shape, out.dtype, memory)
        else:
            bad = np.zeros(512, np.uint8)[1 : 1 + out.nbytes].view(out.dtype).reshape(out.shape)
        given = (*outs[:i], bad, *outs[i + 1 :])
        if refusing.backend.name == "numpy":
            assert refusing.call("", out=given)[i] is bad
        else:
            refuses(ValueError, f"out[{i}]", *given)


@pytest.mark.parametrize("name", FORWARD)
def test_dtype_option(refusing, name):
    for dtype in (np.int32, bool, np.complex64, object, "U3", "M8[s]", "no such dtype", 7):
        refusing.refuses(TypeError, "dtype", name, refusing.x, dtype=dtype)
    out = refusing.xp.zeros((3, 4) if name in TRANSFORMS else (), np.float32)
    refusing.refuses(TypeError, "out", name, refusing.x, dtype=np.float64, out=out)


# ---- where, scale and b ------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_where(refusing, name):
    args, xp = refusing.arguments(name, refusing.x), refusing.xp
    for dtype in (np.int32, np.float32, np.uint8):
        refusing.refuses(TypeError, "where", name, *args, where=xp.ones((3, 4), dtype))
    for where in ([True] * 4, "yes", 1, 1.0):
        refusing.refuses(TypeError, "where", name, *args, where=where)
    for shape in [(3,), (4, 3), (2, 4), (1, 3, 4), (2, 3, 4), (0,)]:
        words = f"the shape of {first(name)} (3, 4)"
        where = xp.ones(shape, bool)
        refusing.refuses(ValueError, "where", name, *args, where=where, words=words)


@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD, "softmax_state"])
def test_scale(refusing, name):
    args, xp = refusing.arguments(name, refusing.x), refusing.xp
    for scale in ("2", 1j, [1.0], (1.0,), {}, object(), np.complex64(1), b"2"):
        refusing.refuses(TypeError, "scale", name, *args, scale=scale)
    for dtype in (bool, np.complex64):
        refusing.refuses(TypeError, "scale", name, *args, scale=xp.ones((3, 1), dtype))
    for shape in [(3,), (4,), (3, 4), (1, 4), (2, 1), (1, 3, 1), (0,), (3, 0)]:
        refusing.refuses(ValueError, "scale", name, *args, scale=xp.ones(shape, np.float32))
    refusing.refuses(ValueError, "scale", name, *args, 0, scale=xp.ones((3, 1), np.float32))


@pytest.mark.parametrize("name", SEGMENTS)
def test_scale_of_segments(refusing, name):
    args, xp = refusing.arguments(name, refusing.x), refusing.xp
    for scale in ("2", 1j, [1.0]):
        refusing.refuses(TypeError, "scale", name, *args, scale=scale)
    refusing.refuses(TypeError, "scale", name, *args, scale=xp.ones(4, bool))
    for shape in [(2,), (3,), (3, 1), (3, 4), (1, 2, 4), (2, 3)]:
        refusing.refuses(ValueError, "scale", name, *args, scale=xp.ones(shape, np.float32))


def test_weights(refusing):
    x, xp = refusing.x, refusing.xp
    for b in ("2", 1j, [1.0] * 4, object()):
        refusing.refuses(TypeError, "b", "logsumexp", x, b=b)
    refusing.refuses(TypeError, "b", "logsumexp", x, b=xp.ones((3, 4), np.complex64))
    for shape in [(3,), (4, 3), (2, 4), (1, 3, 4), (2, 3, 4), (0,)]:
        refusing.refuses(ValueError, "b", "logsumexp", x, b=xp.ones(shape, np.float32))


# ---- two arrays that must agree ----------------------------------------------------------------


@pytest.mark.parametrize("name", [*BACKWARD, "segment_softmax_backward"])
def test_gradient_and_result_agree(refusing, name):
    x, xp = refusing.x, refusing.xp
    _, _, *offsets = refusing.arguments(name, x)
    for shape in [(4, 3), (3,), (1, 4), (3, 1), (3, 4, 1), ()]:
        with pytest.raises(ValueError, match=r"^(grad|y|cu_seqlens) must .+, but .+"):
            refusing.call(name, xp.zeros(shape, np.float32), x, *offsets)
        refusing.refuses(ValueError, "y", name, x, xp.zeros(shape, np.float32), *offsets)
    for dtype in (np.float64, np.float16, np.int32):
        with pytest.raises(TypeError, match=r"^(grad|y) must .+, but .+"):
            refusing.call(name, x.astype(dtype), x, *offsets)
    for dtype in (bool, np.complex64):
        refusing.refuses(TypeError, "y", name, x, x.astype(dtype), *offsets)


@pytest.mark.parametrize("name", SEGMENTS)
def test_offsets(refusing, name):
    *rows, _ = refusing.arguments(name, refusing.x)
    for dtype in (np.float32, np.float64, np.int8, np.int16, np.uint32, np.uint64, bool):
        bad = refusing.array(np.array([0, 1, 3]).astype(dtype))
        refusing.refuses(TypeError, "cu_seqlens", name, *rows, bad)
    for bad in (np.array(0), np.array([[0, 3]]), np.array([], np.int64)):
        refusing.refuses(ValueError, "cu_seqlens", name, *rows, refusing.array(bad))
    numbers = [refusing.array(np.array(1.0, np.float32))] * len(rows)
    ends = refusing.array(np.array([0, 1]))
    refusing.refuses(ValueError, first(name), name, *numbers, ends)


@pytest.mark.host("offsets on the device are trusted")
@pytest.mark.parametrize(
    "bad",
    [[1, 3], [-1, 3], [0, 2], [0, 4], [0, 2, 1, 3], [0, 4, 3], [3], [0], [3, 0], [0, -1, 3]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_values_of_offsets(refusing, dtype, bad):
    """Only where they lie on the host: reading a device array would wait for it."""
    for name in SEGMENTS:
        *rows, _ = refusing.arguments(name, refusing.x)
        refusing.refuses(ValueError, "cu_seqlens", name, *rows, np.array(bad, dtype))


def test_merge(refusing):
    xp = refusing.xp
    m, l = xp.zeros(3, np.float32), xp.ones(3, np.float32)  # noqa: E741
    state = SoftmaxState(m, l)
    for bad in (None, 3.0, m, (m, l), [m, l], "abc"):
        refusing.refuses(TypeError, "a", "merge", bad, state)
        refusing.refuses(TypeError, "b", "merge", state, bad)
    for shape in [(4,), (3, 1), (1,), ()]:
        other = SoftmaxState(xp.zeros(shape, np.float32), xp.ones(shape, np.float32))
        with pytest.raises(ValueError, match=r"^[ab]\b.* must .+, but .+"):
            refusing.call("merge", state, other)
    for bad in (SoftmaxState(m, l[:2]), SoftmaxState([0.0] * 3, l), SoftmaxState(m, None)):
        with pytest.raises((TypeError, ValueError), match=r"^[ab]\b.* must .+, but .+"):
            refusing.call("merge", state, bad)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_state(refusing, name):
    xp, x = refusing.xp, refusing.x
    m, l = xp.zeros(3, np.float32), xp.ones(3, np.float32)  # noqa: E741
    for bad in (3.0, m, (m, l), [m, l], "abc", True, cuattn.TopK(m, l)):
        refusing.refuses(TypeError, "state", name, x, state=bad, words="or a SoftmaxTopKState")
    for bad in ([0.0] * 3, None, 0.0, m.astype(np.float16), m.astype(np.int32), m > 0):
        refusing.refuses(TypeError, "state.m", name, x, state=SoftmaxState(bad, l))
        refusing.refuses(TypeError, "state.l", name, x, state=SoftmaxState(m, bad))
    refusing.refuses(TypeError, "state.l", name, x, state=SoftmaxState(m, l.astype(np.float64)))
    for shape in [(4,), (3, 1), (1,), (), (1, 3), (0,)]:
        other, words = xp.zeros(shape, np.float32), "shape of"
        for state in (SoftmaxState(other, other), SoftmaxState(other, l)):
            refusing.refuses(ValueError, "state.m", name, x, state=state, words=words)
        state = SoftmaxState(m, other)
        refusing.refuses(ValueError, "state.l", name, x, state=state, words=words)
        state = cuattn.SoftmaxTopKState(other, other, m, l)
        refusing.refuses(ValueError, "state.m", name, x, 1, state=state, words=words)
    refusing.refuses(ValueError, "state.m", name, x, 0, state=SoftmaxState(m, l))
    refusing.refuses(ValueError, "state.m", name, x, None, state=SoftmaxState(m, l))
    if refusing.backend.name != "numpy":
        between = refusing.array(np.zeros(17, np.uint8))[1:13].view(np.float32)
        refusing.refuses(ValueError, "state.m", name, x, state=SoftmaxState(between, l))
        refusing.refuses(ValueError, "state.l", name, x, state=SoftmaxState(m, between))


def test_address_between_elements(refusing):
    """NumPy reads such an array, a device would fault."""
    if refusing.backend.on_device:
        memory = refusing.backend.xp.zeros(64, np.uint8).data + 1
        x = refusing.backend.xp.ndarray((3, 4), np.float32, memory)
    else:
        x = np.zeros(64, np.uint8)[1:49].view(np.float32).reshape(3, 4)
    good = refusing.array(np.zeros((3, 4), np.float32))
    if refusing.backend.name == "numpy":
        np.testing.assert_array_equal(refusing.call("softmax", x), 0.25)
        return
    refusing.refuses(ValueError, "x", "softmax", x)
    refusing.refuses(ValueError, "grad", "softmax_backward", x, good)
    refusing.refuses(ValueError, "y", "softmax_backward", good, x)
    refusing.refuses(ValueError, "out", "softmax", good, out=x)
    refusing.refuses(ValueError, "scale", "softmax", good, axis=(), scale=x)
    refusing.refuses(ValueError, "b", "logsumexp", good, b=x)
    refusing.refuses(ValueError, "b.l", "merge", SoftmaxState(good, good), SoftmaxState(good, x))
    refusing.refuses(ValueError, "out", "logsumexp", good, axis=1, out=x[:, 0])
    ends = x.view(np.int32)[0, :2]
    if not refusing.backend.on_device:  # where the values of offsets are not looked at
        ends[1] = 3
    for name in SEGMENTS:
        *rows, _ = refusing.arguments(name, good)
        refusing.refuses(ValueError, "cu_seqlens", name, *rows, ends)
    ends = refusing.arguments("segment_softmax", good)[-1]
    refusing.refuses(ValueError, "grad", "segment_softmax_backward", x, good, ends)
    refusing.refuses(ValueError, "y", "segment_softmax_backward", good, x, ends)


@pytest.mark.parametrize("name", [*TRANSFORMS, *BACKWARD])
def test_two_homes(refusing, name):
    """One array on the host and one on a device: the message names both."""
    if refusing.backend.on_device:
        ones, where = np.ones((3, 1), np.float32), np.ones((3, 4), bool)
        out = np.zeros((3, 4), np.float32)
    else:
        ones, where, out = DeviceArray((3, 1)), DeviceArray((3, 4), "|b1"), DeviceArray()
    args = refusing.arguments(name, refusing.x)
    for key, value in {"scale": ones, "where": where, "out": out}.items():
        with pytest.raises(TypeError) as caught:
            refusing.call(name, *args, **{key: value})
        assert re.search(rf"\b{first(name)}\b", str(caught.value)) and key in str(caught.value)


def test_two_homes_of_required_arguments(refusing):
    gpu = refusing.backend.on_device
    other = np.ones((3, 4), np.float32) if gpu else DeviceArray()
    for name in (*BACKWARD, "segment_softmax_backward"):
        _, _, *offsets = refusing.arguments(name, refusing.x)
        for args in ((refusing.x, other), (other, refusing.x)):
            with pytest.raises(TypeError) as caught:
                refusing.call(name, *args, *offsets)
            assert re.search(r"\bgrad\b.*\by\b|\by\b.*\bgrad\b", str(caught.value))
    if not gpu:
        for name in SEGMENTS:
            *rows, _ = refusing.arguments(name, refusing.x)
            refusing.refuses(TypeError, None, name, *rows, DeviceArray((3,), "<i8"))


# ---- how arguments are passed ------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_how_arguments_are_passed(refusing, name):
    args = refusing.arguments(name, refusing.x)
    names = [first(name), *["y"] * name.endswith("_backward"), *["cu_seqlens"] * (name in SEGMENTS)]
    refusing.refuses(TypeError, None, name)
    refusing.refuses(TypeError, None, name, **dict(zip(names, args, strict=True)))
    refusing.refuses(TypeError, None, name, *args, no_such_option=1)
    extra = (None,) if name in SEGMENTS else (-1, None)
    refusing.refuses(TypeError, None, name, *args, *extra)


def test_how_arguments_are_passed_to_merge(refusing):
    state = SoftmaxState(refusing.xp.zeros(3), refusing.xp.ones(3))
    refusing.refuses(TypeError, None, "merge", a=state, b=state)
    refusing.refuses(TypeError, None, "merge", state)
    refusing.refuses(TypeError, None, "merge", state, state, state)


def test_signatures_are_those_of_the_reference():
    """So that ``cuattn if xp is cupy else cuattn.reference`` works."""
    import inspect

    for name in [*ALL, "merge"]:
        ours = inspect.signature(getattr(cuattn, name)).parameters.values()
        theirs = inspect.signature(getattr(cuattn.reference, name)).parameters.values()
        assert [(p.name, p.kind, p.default) for p in ours] == [
            (p.name, p.kind, p.default) for p in theirs
        ]
