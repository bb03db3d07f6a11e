"""Every bad argument of attention: the class of the error, its words, and nothing done.

The words are ``<argument> must <requirement>, but <what came>[; <remedy>]``. On the emulator no
kernel may have run; everywhere `out` must be as it was.
"""

from __future__ import annotations

import inspect
import re

import ml_dtypes
import numpy as np
import pytest
from conftest import NumpyBackend
from numpy.exceptions import AxisError
from test_check import BAD_DTYPES, NOT_ARRAYS, DeviceArray, Refusing

import cuattn
from cuattn import reference

DENSE, VARLEN, MERGE, STATES = (
    "attention",
    "attention_varlen",
    "merge_attention",
    "merge_attention_states",
)
BOTH = [DENSE, VARLEN]
ALL = [*BOTH, MERGE, STATES]
NAMES = {
    DENSE: ["q", "k", "v"],
    VARLEN: ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
    MERGE: ["out_a", "lse_a", "out_b", "lse_b"],
    STATES: ["outs", "lses"],
}


class Attention(Refusing):
    """Valid arguments of each function, and calls of it with one of them replaced."""

    def __init__(self, backend):
        super().__init__(backend)
        self.rng = np.random.default_rng(0)

    def floats(self, *shape, dtype=np.float32):
        return self.array((np.arange(np.prod(shape)) % 7 / 8).reshape(shape).astype(dtype))

    def ints(self, *values, dtype=np.int64):
        return self.array(np.array(values, dtype))

    def args(self, name):
        """B = 2, H = 4, H_kv = 2, S_q = 3, S_k = 5, D = 8, D_v = 6; ragged: 6 and 10 in all."""
        f = self.floats
        return {
            DENSE: lambda: (f(2, 4, 3, 8), f(2, 2, 5, 8), f(2, 2, 5, 6)),
            VARLEN: lambda: (f(6, 4, 8), f(10, 2, 8), f(10, 2, 6), self.ints(0, 2, 6),
                             self.ints(0, 5, 10)),
            MERGE: lambda: (f(2, 4, 3, 8), f(2, 4, 3), f(2, 4, 3, 8), f(2, 4, 3)),
            STATES: lambda: (f(7, 2, 4, 3, 8), f(7, 2, 4, 3)),
        }[name]()  # fmt: skip

    def clear(self):
        """Forget what a valid call has launched."""
        if self.backend.runtime is not None:
            self.backend.runtime.clear()

    def bad(self, error, argument, name, words="", change=None, **options):
        """A call with positional arguments replaced by `change` (name -> value) is refused."""
        args = list(self.args(name))
        for key, value in (change or {}).items():
            args[NAMES[name].index(key)] = value
        return self.refuses(error, argument, name, *args, words=words, **options)


@pytest.fixture
def at(backend):
    return Attention(backend)


def test_what_is_right_passes(at):
    """Else the tests below would prove nothing."""
    for name in ALL:
        at.call(name, *at.args(name))


# ---- what is not an array -----------------------------------------------------------------------


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", ALL)
def test_not_an_array(at, name, value):
    for argument in NAMES[name]:
        at.bad(TypeError, argument, name, f"{at.xp.__name__}.asarray", {argument: value})


@pytest.mark.parametrize("option", ["mask", "bias", "alibi_slopes", "sinks", "q_lens", "kv_lens"])
@pytest.mark.parametrize("name", BOTH)
def test_option_is_not_an_array(at, name, option):
    for value in NOT_ARRAYS:
        if value is not None:
            at.bad(TypeError, option, name, f"{at.xp.__name__}.asarray", **{option: value})
    at.bad(TypeError, option, name, **{option: True})


@pytest.mark.parametrize("name", ALL)
def test_two_homes(at, name):
    """One array on the host and one on a device: the message names both."""
    gpu = at.backend.on_device
    other = np.ones((2, 4, 3, 8), np.float32) if gpu else DeviceArray((2, 4, 3, 8))
    for argument in NAMES[name]:
        args = list(at.args(name))
        args[NAMES[name].index(argument)] = other
        with pytest.raises(TypeError, match="array of the same library") as caught:
            at.call(name, *args)
        assert re.search(rf"\b{argument}\b", str(caught.value))
    if name in BOTH:
        for option in ("mask", "bias", "alibi_slopes", "sinks", "q_offset", "q_lens", "kv_lens"):
            at.bad(TypeError, option, name, "the same library as q", **{option: other})
    if name != STATES:
        out = (other, other) if name == MERGE else other
        at.bad(TypeError, "out", name, "the same library", out=out)


# ---- dtypes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*BAD_DTYPES, "int8", "int64", "uint16", "longdouble"])
@pytest.mark.parametrize("name", ALL)
def test_dtype(at, name, dtype):
    """Also of a dtype that CuPy does not have, where all arguments are NumPy arrays."""
    args = []
    for a in at.args(name):
        floating = a.dtype.kind == "f" and (name in BOTH or a.ndim == (5 if name == STATES else 4))
        args.append(np.zeros(a.shape, dtype) if floating else a)
    if args[0].dtype.kind in "biuc":
        args = [at.array(a) if isinstance(a, np.ndarray) else a for a in args]
    else:
        args = [at.backend.asnumpy(a) for a in args]
    at.refuses(TypeError, NAMES[name][0], name, *args)


@pytest.mark.parametrize("name", BOTH)
def test_dtypes_agree(at, name):
    for argument in ("k", "v"):
        given = at.args(name)[NAMES[name].index(argument)]
        for dtype in (np.float16, np.float64, np.int32, bool):
            at.bad(TypeError, argument, name, "dtype of q", {argument: given.astype(dtype)})
    at.bad(TypeError, "k", name, "float16", {"q": at.args(name)[0].astype(np.float16)})


@pytest.mark.parametrize("name", [MERGE, STATES])
def test_dtypes_of_parts(at, name):
    args = dict(zip(NAMES[name], at.args(name), strict=True))
    for argument in NAMES[name]:
        if argument.startswith("lse"):
            for dtype in (np.float64, np.float16, np.int32):
                at.bad(
                    TypeError, argument, name, "float32", {argument: args[argument].astype(dtype)}
                )
    half = {n: a.astype(np.float16) for n, a in args.items()}
    lse = "lse_a" if name == MERGE else "lses"
    at.bad(TypeError, lse, name, "float32", half)
    double = {n: a.astype(np.float64) for n, a in args.items() if n.startswith("out")}
    at.bad(TypeError, lse, name, "float64", double)
    if name == MERGE:
        at.bad(TypeError, "out_b", name, "out_a", {"out_b": args["out_b"].astype(np.float16)})


@pytest.mark.parametrize("name", BOTH)
def test_dtypes_of_options(at, name):
    xp = at.xp
    for dtype in (np.float32, np.uint8, np.int64):
        at.bad(TypeError, "mask", name, "bool", mask=xp.ones((3, 5), dtype))
    for dtype in (bool, np.int32, np.complex64):
        at.bad(TypeError, "bias", name, mask=None, bias=xp.ones((3, 5), dtype))
    for option in ("alibi_slopes", "sinks"):
        for dtype in (bool, np.complex64):
            at.bad(TypeError, option, name, **{option: xp.ones(4, dtype)})
    for option in ("q_offset", "q_lens", "kv_lens"):
        for dtype in (bool, np.float32, np.complex64):
            at.bad(TypeError, option, name, "integer", **{option: xp.ones(2, dtype)})
    for argument in ("cu_seqlens_q", "cu_seqlens_k") if name == VARLEN else ():
        for dtype in (np.float32, np.int16, np.uint32, np.uint64, bool):
            change = {argument: at.ints(0, 2, 6).astype(dtype)}
            at.bad(TypeError, argument, name, "int32 or int64", change)


@pytest.mark.host("CuPy has no swapped bytes")
@pytest.mark.parametrize("name", BOTH)
def test_swapped_bytes(at, name):

    def swapped(a):
        return a.astype(a.dtype.newbyteorder())

    at.bad(TypeError, "q", name, "byte order", {"q": swapped(at.args(name)[0])})
    at.bad(TypeError, "bias", name, "byte order", bias=swapped(np.ones((3, 5))))
    at.bad(TypeError, "sinks", name, "byte order", sinks=swapped(np.ones(4)))
    at.bad(TypeError, "q_lens", name, "byte order", q_lens=swapped(np.ones(2, np.int64)))


# ---- shapes -------------------------------------------------------------------------------------


def test_shapes(at):
    f = at.floats
    for shape in [(), (8,), (1, 2, 4, 3, 8)]:
        at.bad(ValueError, "q", DENSE, r"(B, H, S, D)", {"q": f(*shape)})
    at.bad(ValueError, "q", DENSE, "(B, S, H, D)", {"q": f(8)}, layout="BSHD")
    for argument, size in (("k", 8), ("v", 6)):
        for shape in [(2, 5, size), (5, size), (1, 2, 2, 5, size), (size,), ()]:
            words = "as many dimensions as q"
            at.bad(ValueError, argument, DENSE, words, {argument: f(*shape)})
        change = {argument: f(1, 2, 5, size)}
        at.bad(ValueError, argument, DENSE, "batch size of q, 2", change)
        for heads in (3, 8, 0):
            at.bad(ValueError, argument, DENSE, "divides", {argument: f(2, heads, 5, size)})
    at.bad(ValueError, "k", DENSE, "head dimension of q, 8", {"k": f(2, 2, 5, 7)})
    at.bad(ValueError, "v", DENSE, "heads of k, 2", {"v": f(2, 4, 5, 6)})
    at.bad(ValueError, "v", DENSE, "length of k, 5", {"v": f(2, 2, 4, 6)})
    wide = {"q": f(2, 4, 3, 513), "k": f(2, 2, 5, 513)}
    at.bad(ValueError, "k", DENSE, "at most 512", wide)
    at.bad(ValueError, "v", DENSE, "at most 512", {"v": f(2, 2, 5, 513)})
    for argument, size in (("q", 8), ("k", 8)):  # repeated: no memory
        long = at.xp.broadcast_to(f(1), (2, 2, 2**31 - 1, size))
        at.bad(ValueError, argument, DENSE, "axes of at most 2147482624", {argument: long})
    swapped = [a.swapaxes(1, 2) for a in at.args(DENSE)]
    at.refuses(ValueError, "k", DENSE, *swapped)
    at.refuses(ValueError, "k", DENSE, *at.args(DENSE), layout="BSHD")
    at.call(DENSE, *swapped, layout="BSHD")


def test_shapes_of_sequences(at):
    f = at.floats
    for shape in [(6, 8), (1, 6, 4, 8), (8,), ()]:
        at.bad(ValueError, "q", VARLEN, "(S, H, D)", {"q": f(*shape)})
    at.bad(ValueError, "k", VARLEN, "dimensions", {"k": f(1, 10, 2, 8)})
    at.bad(ValueError, "k", VARLEN, "divides", {"k": f(10, 3, 8)})
    at.bad(ValueError, "k", VARLEN, "head dimension of q, 8", {"k": f(10, 2, 9)})
    at.bad(ValueError, "v", VARLEN, "length of k, 10", {"v": f(9, 2, 6)})
    at.bad(ValueError, "v", VARLEN, "heads of k, 2", {"v": f(10, 4, 6)})
    for argument in ("cu_seqlens_q", "cu_seqlens_k"):
        for ends in (at.ints(), at.array(np.array(0)), at.array(np.array([[0, 2, 6]]))):
            at.bad(ValueError, argument, VARLEN, "(sequences + 1,)", {argument: ends})
    at.bad(ValueError, "cu_seqlens_k", VARLEN, "cu_seqlens_q", {"cu_seqlens_k": at.ints(0, 10)})


@pytest.mark.host("device arrays are trusted")
@pytest.mark.parametrize("argument", ["cu_seqlens_q", "cu_seqlens_k"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_values_of_ends(at, argument, dtype):
    """Only where they lie on the host: reading a device array would wait for it."""
    total = 6 if argument == "cu_seqlens_q" else 10
    for bad, words in (
        ((1, 2, total), "begin with 0"),
        ((-1, 2, total), "begin with 0"),
        ((0, 5, 4), "never fall"),
        ((0, -1, total), "never fall"),
        ((0, 2, total + 1), "end with"),
        ((0, 2, total - 1), "end with"),
    ):
        change = {argument: np.array(bad, dtype)}
        at.bad(ValueError, argument, VARLEN, words, change)


@pytest.mark.host("device arrays are trusted")
@pytest.mark.parametrize("name", BOTH)
def test_values_of_lens(at, name):
    for option, sizes in (("q_lens", (3, 3)), ("kv_lens", (5, 5))):
        sizes = sizes if name == DENSE else (2, 4) if option == "q_lens" else (5, 5)
        for bad in ((-1, 0), (0, -5), (sizes[0] + 1, 0), (0, sizes[1] + 1), (2**40, 0)):
            at.bad(ValueError, option, name, "from 0 to", **{option: np.array(bad)})
        at.call(name, *at.args(name), **{option: np.array(sizes)})
        at.clear()


@pytest.mark.parametrize("option", ["mask", "bias"])
def test_shapes_of_masks(at, option):
    dtype = bool if option == "mask" else np.float32

    def ones(*shape):
        return {option: at.xp.ones(shape, dtype)}

    for shape in [(3,), (5, 3), (3, 6), (4, 5), (2, 3, 5), (4, 1, 3, 5), (1, 2, 4, 3, 5), (0,)]:
        at.bad(ValueError, option, DENSE, "the scores (2, 4, 3, 5)", **ones(*shape))
    three = [a[0] for a in at.args(DENSE)]
    for shape in [(2, 4, 3, 5), (1, 4, 3, 5), (2, 3, 5)]:
        at.refuses(ValueError, option, DENSE, *three, **ones(*shape))
    two = [a[0, 0] for a in at.args(DENSE)]
    at.refuses(ValueError, option, DENSE, *two, **ones(1, 3, 5))
    for shape in [(3, 1, 3, 5), (2, 3, 3, 5), (2, 3, 5), (1, 2, 4, 3, 5), (0, 1, 3, 5)]:
        at.bad(ValueError, option, VARLEN, "(2, 4)", **ones(*shape))


@pytest.mark.parametrize("name", BOTH)
def test_shapes_of_options(at, name):
    for shape in [(), (1,), (2,), (3,), (4, 2), (1, 4), (2, 1), (2, 4, 1), (0,)]:
        slopes = at.xp.ones(shape, np.float32)
        at.bad(ValueError, "alibi_slopes", name, "(4,) or (2, 4)", alibi_slopes=slopes)
    for shape in [(), (1,), (2,), (2, 4), (4, 1), (0,)]:
        at.bad(ValueError, "sinks", name, "(4,)", sinks=at.xp.ones(shape, np.float32))
    for option in ("q_offset", "q_lens", "kv_lens"):
        for shape in [(1,), (3,), (2, 1), (1, 2), (0,)]:
            ones = at.xp.ones(shape, np.int64)
            at.bad(ValueError, option, name, "(2,)", **{option: ones})
        if option != "q_offset" or at.backend.on_device:  # on the host it is a number
            at.bad(ValueError, option, name, "(2,)", **{option: at.xp.ones((), np.int64)})


def test_options_without_axes(at):
    """What q lacks may be left out, or be of length 1."""
    ones = at.xp.ones
    for ndim in (2, 3):
        args = [a[(0,) * (4 - ndim)] for a in at.args(DENSE)]
        heads = 1 if ndim == 2 else 4
        for shape in [(), (1,)]:
            for option in ("q_offset", "q_lens", "kv_lens"):
                at.call(DENSE, *args, **{option: ones(shape, np.int64)})
        for shape in [(heads,), (1, heads), *([()] if ndim == 2 else [])]:
            at.call(DENSE, *args, alibi_slopes=ones(shape, np.float32))
        at.call(DENSE, *args, sinks=ones(heads, np.float32))
        at.clear()
        at.refuses(ValueError, "q_lens", DENSE, *args, q_lens=ones(2, np.int64))
        at.refuses(ValueError, "sinks", DENSE, *args, sinks=ones(heads + 1, np.float32))


# ---- numbers and words --------------------------------------------------------------------------


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("option", ["scale", "softcap"])
def test_numbers(at, name, option):
    for value in ("1", b"1", 1j, np.complex64(1), True, np.True_, [1.0], (1.0,), {}, object()):
        at.bad(TypeError, option, name, "real number", **{option: value})
    for value in (at.xp.ones(1, np.float32), at.xp.ones((2, 4, 3, 1), np.float32)):
        at.bad(TypeError, option, name, "real number", **{option: value})
    if at.backend.on_device:  # reading it would wait
        at.bad(TypeError, option, name, "real number", **{option: at.xp.ones((), np.float32)})
    for value in (2, 0.5, np.float16(0.5), np.int8(1), np.array(0.5), ml_dtypes.bfloat16(2)):
        at.call(name, *at.args(name), **{option: value})


@pytest.mark.parametrize("name", BOTH)
def test_softcap(at, name):
    for value in (0, 0.0, -1, -0.5, np.nan, np.inf, -np.inf):
        at.bad(ValueError, "softcap", name, "None", softcap=value)


@pytest.mark.parametrize("name", BOTH)
def test_window(at, name):
    for value in (3, "ab", (1,), (1, 2, 3), {}, {1, 2}, None, np.array([1, 2]), at.ints(1, 2)):
        if value is not None:
            at.bad(TypeError, "window", name, "(left, right)", window=value)
    for value in ((1.0, 2), (1, "2"), (True, 1), (1, np.False_), (None, 1.5)):
        at.bad(TypeError, "window", name, "integer", window=value)
    for value in ((-1, 0), (0, -1), (-1, -1), (None, -3), (-(10**30), 1)):
        at.bad(ValueError, "window", name, "None", window=value)


@pytest.mark.parametrize("name", BOTH)
def test_q_offset(at, name):
    for value in (1.0, "1", True, np.True_, np.float32(1), [1, 2], (1, 2), {}, 1j):
        at.bad(TypeError, "q_offset", name, "integer", q_offset=value)
    for value in (np.array(1.5), np.array(True)):
        at.bad(TypeError, "q_offset", name, "integer", q_offset=value)
    for value in (2**39 + 1, -(2**39) - 1, 10**30):
        at.bad(ValueError, "q_offset", name, "2**39", q_offset=value)


def test_words(at):
    for name in (DENSE, MERGE, STATES):
        for value in ("bhsd", "HSD", "", None, 3, ("BHSD",), "BHDS"):
            at.bad(ValueError, "layout", name, "BHSD, BSHD", layout=value)
    for name in BOTH:
        for value in ("fp32", "TF32", "", 3, True, ("tf32",), "high"):
            at.bad(ValueError, "precision", name, "'ieee' or 'tf32'", precision=value)
        for dtype in (np.float16, np.float64):
            args = [a.astype(dtype) if a.dtype.kind == "f" else a for a in at.args(name)]
            at.refuses(ValueError, "precision", name, *args, precision="tf32")
            at.call(name, *args, precision="ieee")
            at.clear()


@pytest.mark.parametrize("option", ["max_seqlen_q", "max_seqlen_k"])
def test_hints(at, option):
    for value in (1.0, "3", True, [3], at.xp.ones((), np.float32)):
        at.bad(TypeError, option, VARLEN, "integer", **{option: value})
    at.bad(ValueError, option, VARLEN, "at least 0", **{option: -1})


# ---- out ----------------------------------------------------------------------------------------

SHAPES = {
    DENSE: ((2, 4, 3, 6), (2, 4, 3)),
    VARLEN: ((6, 4, 6), (4, 6)),
    MERGE: ((2, 4, 3, 8), (2, 4, 3)),
}


@pytest.mark.parametrize("name", BOTH)
def test_out(at, name):
    shape, xp = SHAPES[name][0], at.xp
    for bad in [shape[1:], (1, *shape), (*shape[:-1], 8), shape[1::-1] + shape[2:], ()]:
        at.bad(ValueError, "out", name, "shape", out=xp.zeros(bad, np.float32))
    for dtype in (np.float16, np.float64, np.int32):
        at.bad(TypeError, "out", name, "dtype", out=xp.zeros(shape, dtype))
    for bad in ([0.0], 0.0, "abc", True):
        at.bad(TypeError, "out", name, out=bad)
    good = xp.zeros(shape, np.float32)
    for bad in ((good,), (good, good), ()):
        at.bad(TypeError, "out", name, "one array", out=bad)


@pytest.mark.parametrize("name", [*BOTH, MERGE])
def test_out_of_two(at, name):
    (shape, lse_shape), xp = SHAPES[name], at.xp
    more = {} if name == MERGE else {"return_lse": True}
    out, lse = xp.zeros(shape, np.float32), xp.zeros(lse_shape, np.float32)
    for bad in (out, (out,), (out, lse, lse), (), [out, lse]):
        at.bad(TypeError, "out", name, "a tuple of 2 arrays", out=bad, **more)
    for bad in ((lse, out), (out, lse[:1]), (out[..., :2], lse)):
        at.bad(ValueError, "out", name, "shape", out=bad, **more)
    for bad in ((out, xp.zeros(lse_shape)), (out.astype(np.float16), lse)):
        at.bad(TypeError, "out", name, "dtype", out=bad, **more)
    at.bad(TypeError, "out", name, out=(out, None), **more)
    memory = xp.zeros(out.size, np.float32)
    overlapping = memory.reshape(shape), memory[: lse.size].reshape(lse_shape)
    at.bad(ValueError, "out", name, "share no memory", out=overlapping, **more)
    half = xp.zeros(shape, np.float16), xp.zeros(lse_shape, np.float16)
    args = [
        a.astype(np.float16) if a.dtype.kind == "f" and (name != MERGE or a.ndim == 4) else a
        for a in at.args(name)
    ]
    at.refuses(TypeError, "out", name, *args, out=half, **more)


@pytest.mark.parametrize("name", [*BOTH, MERGE])
def test_out_is_apart_from_every_input(at, name):
    """Even exactly the same array: other blocks still read what one has written."""
    args = list(at.args(name))
    if name != MERGE:
        sizes = (6, 4, 8) if name == VARLEN else (2, 4, 3, 8)
        args = [at.floats(*sizes)] * 3 + ([at.ints(0, 2, 6)] * 2 if name == VARLEN else [])
    more = {} if name == MERGE else {"return_lse": True}
    fresh = at.xp.zeros(args[0].shape, np.float32), at.xp.zeros(SHAPES[name][1], np.float32)
    at.refuses(ValueError, "out", name, *args, out=(args[0], fresh[1]), words="share", **more)
    memory = at.xp.zeros(2 * args[0].size, np.float32)
    out = memory[3 : 3 + args[0].size].reshape(args[0].shape)
    args[0] = memory[: args[0].size].reshape(args[0].shape)
    at.refuses(ValueError, "out", name, *args, out=(out, fresh[1]), words="share", **more)
    if name == MERGE:
        args = at.args(name)
        at.refuses(ValueError, "out", name, *args, out=(fresh[0], args[3]), words="share")
    else:
        bias = at.xp.zeros((4, 1, 6 if name == VARLEN else 3), np.float32)
        lse = bias[:, 0] if name == VARLEN else at.xp.broadcast_to(bias[:, 0], (2, 4, 3))
        args[0] = args[1]
        at.refuses(ValueError, "out", name, *args, out=(fresh[0], lse), bias=bias, **more)


@pytest.mark.host("CuPy has no read-only arrays")
@pytest.mark.parametrize("name", [*BOTH, MERGE])
def test_out_is_read_only(at, name):
    shape, lse_shape = SHAPES[name]
    out, lse = np.zeros(shape, np.float32), np.zeros(lse_shape, np.float32)
    out.flags.writeable = False
    more = {} if name == MERGE else {"return_lse": True}
    at.bad(ValueError, "out", name, "writeable", out=(out, lse), **more)
    row = np.zeros(shape[-1], np.float32)
    out = np.lib.stride_tricks.as_strided(row, shape, (0,) * (len(shape) - 1) + (4,))
    at.bad(ValueError, "out", name, "overlap itself", out=(out, lse), **more)


def between(at, shape, dtype=np.float32):
    """An array whose elements do not start at multiples of their size."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    if at.backend.on_device:
        memory = at.xp.zeros(size + 1, np.uint8).data + 1
        return at.xp.ndarray(shape, dtype, memory)
    return np.zeros(size + 1, np.uint8)[1:].view(dtype).reshape(shape)


@pytest.mark.parametrize("name", ALL)
def test_address_between_elements(at, name):
    """NumPy reads such an array, a device would fault."""
    if at.backend.name == "numpy":
        at.call(name, *(between(at, a.shape, a.dtype) for a in at.args(name)[:3]),
                *at.args(name)[3:])  # fmt: skip
        return
    for argument, a in zip(NAMES[name], at.args(name), strict=True):
        if not argument.startswith("cu_"):
            at.bad(ValueError, argument, name, "pass a copy", {argument: between(at, a.shape)})
    if name in BOTH:
        for option, shape in (("bias", (1, 4, 1, 1)), ("alibi_slopes", (4,)), ("sinks", (4,))):
            at.bad(ValueError, option, name, "pass a copy", **{option: between(at, shape)})
        for option in ("q_offset", "q_lens", "kv_lens"):
            lens = between(at, (2,), np.int64)
            at.bad(ValueError, option, name, "pass a copy", **{option: lens})
        out = between(at, SHAPES[name][0])
        at.bad(ValueError, "out", name, "pass a copy", out=out)
    if name == VARLEN:
        ends = between(at, (3,), np.int64)
        ends[...] = at.ints(0, 2, 6)
        at.bad(ValueError, "cu_seqlens_q", name, "pass a copy", {"cu_seqlens_q": ends})
    if name != STATES:
        shape, lse_shape = SHAPES[name]
        out = at.xp.zeros(shape, np.float32), between(at, lse_shape)
        more = {} if name == MERGE else {"return_lse": True}
        at.bad(ValueError, "out", name, "pass a copy", out=out, **more)


@pytest.mark.host("CuPy has no records")
def test_out_at_fractions_of_elements(at):
    records = np.zeros((2, 4, 3, 6), [("pad", np.int8, 4), ("x", np.float32), ("end", np.int8, 2)])
    if at.backend.name == "numpy":
        assert at.call(DENSE, *at.args(DENSE), out=records["x"]).any()
    else:
        at.bad(ValueError, "out", DENSE, "multiples of its itemsize", out=records["x"])


# ---- merging ------------------------------------------------------------------------------------


def test_shapes_of_parts(at):
    f = at.floats
    for shape in [(), (8,), (1, 2, 4, 3, 8)]:
        change = {"out_a": f(*shape), "out_b": f(*shape)}
        at.bad(ValueError, "out_a", MERGE, "(B, H, S, D)", change)
    for shape in [(2, 4, 3, 7), (1, 4, 3, 8), (4, 3, 8)]:
        at.bad(ValueError, "out_b", MERGE, "out_a", {"out_b": f(*shape)})
    for lse in ("lse_a", "lse_b"):
        for shape in [(2, 3, 4), (2, 4, 3, 1), (4, 3), (2, 4), (1, 4, 3), ()]:
            at.bad(ValueError, lse, MERGE, "(2, 4, 3)", {lse: f(*shape)})
        at.bad(ValueError, "lse_a", MERGE, "(2, 3, 4)", layout="BSHD")


def test_shapes_of_states(at):
    f = at.floats
    for shape in [(), (8,), (3, 8), (1, 7, 2, 4, 3, 8)]:
        at.bad(ValueError, "outs", STATES, "one axis more", {"outs": f(*shape)})
    for shape in [(7, 2, 4, 4), (7, 2, 3, 4), (6, 2, 4, 3), (2, 4, 3), (7, 2, 4, 3, 1), (7,)]:
        at.bad(ValueError, "lses", STATES, change={"lses": f(*shape)})
    at.bad(ValueError, "lses", STATES, axis=1, change={"lses": f(7, 2, 4, 3)[:, :1]})
    at.bad(ValueError, "lses", STATES, layout="BSHD")


def test_axis_of_states(at):
    for axis in (4, 5, -1, -6, 10**30):
        at.bad(AxisError, None, STATES, "axis must be", axis=axis)
    for axis in (1.0, "0", None, (0,), [0], True, 1j):
        at.bad(TypeError, "axis", STATES, axis=axis)


# ---- how arguments are passed -------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_how_arguments_are_passed(at, name):
    args = at.args(name)
    at.refuses(TypeError, None, name)
    at.refuses(TypeError, None, name, **dict(zip(NAMES[name], args, strict=True)))
    at.refuses(TypeError, None, name, *args, no_such_option=1)
    at.refuses(TypeError, None, name, *args, None)


@pytest.mark.parametrize("name", ALL)
def test_signatures_are_those_of_the_reference(name):
    ours = inspect.signature(getattr(cuattn, name)).parameters.values()
    theirs = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
    assert name in cuattn.__all__


def test_options_are_those_of_attention():
    """attention_varlen has all of them but the layout and block masks, and its two hints."""
    dense, ragged = (
        {p.name: p.default for p in inspect.signature(getattr(cuattn, name)).parameters.values()
         if p.kind is p.KEYWORD_ONLY} for name in BOTH
    )  # fmt: skip
    assert dense.pop("layout") == "BHSD" and dense.pop("block_mask") is None
    assert ragged.pop("max_seqlen_q") is ragged.pop("max_seqlen_k") is None
    assert dense == ragged


@pytest.mark.parametrize("name", BOTH)
def test_devices_without_the_instructions(name):
    """Below sm_80 nothing runs and nothing is written; merging works everywhere."""
    import emulator

    with emulator.activate(arch="sm_75") as runtime:
        case = Attention(NumpyBackend("emulator", "sm_75", runtime))
        out = np.full((2, 4, 3, 6) if name == DENSE else (6, 4, 6), 7, np.float32)
        with pytest.raises(ValueError, match=r"^q must be .* capability 8\.0 .*, but .* 7\.5$"):
            getattr(cuattn, name)(*case.args(name), out=out)
        assert runtime.counters == [] and (out == 7).all()
        cuattn.merge_attention(*case.args(MERGE))
        assert len(runtime.counters) == 1
