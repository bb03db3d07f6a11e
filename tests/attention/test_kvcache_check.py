"""Every bad argument of attention_kvcache and kv_append: the class of the error, its words, and
nothing done. Those that it shares with attention are those of `test_attention_check`, in short.
"""

from __future__ import annotations

import inspect
import re

import emulator
import ml_dtypes
import numpy as np
import pytest
from conftest import NumpyBackend
from test_attention_check import between
from test_check import BAD_DTYPES, NOT_ARRAYS, DeviceArray, Refusing

import cuattn
from cuattn import reference

ATTEND, APPEND = "attention_kvcache", "kv_append"
BOTH = [ATTEND, APPEND]
NAMES = {
    ATTEND: ["q", "k_cache", "v_cache"],
    APPEND: ["k_cache", "v_cache", "k_new", "v_new"],
}
OPTIONS = {
    ATTEND: ["kv_lens", "page_table", "q_lens", "mask", "sinks", "alibi_slopes", "k_new", "v_new"],
    APPEND: ["kv_lens", "page_table", "new_lens"],
}
INTEGERS = ["kv_lens", "page_table", "q_lens", "q_offset", "new_lens"]
E4M3 = ml_dtypes.float8_e4m3fn


class KVCache(Refusing):
    """Valid arguments of each function, and calls of it with some of them replaced."""

    def f(self, *shape, dtype=np.float32):
        return self.array((np.arange(np.prod(shape)) % 7 / 8).reshape(shape).astype(dtype))

    def ints(self, *values, dtype=np.int64):
        return self.array(np.array(values, dtype))

    def valid(self, name, paged=False):
        """B = 2, H = 4, H_kv = 2, S_q = 3, D = 8, D_v = 6; 10 keys, or 7 pages of 5, 2 each."""
        lead = (7, 2, 5) if paged else (2, 2, 10)
        found = {"q": self.f(2, 4, 3, 8)} if name == ATTEND else {}
        found |= {"k_cache": self.f(*lead, 8), "v_cache": self.f(*lead, 6)}
        if name == APPEND:
            found |= {"k_new": self.f(2, 2, 3, 8), "v_new": self.f(2, 2, 3, 6)}
        found["kv_lens"] = self.ints(7, 0)
        if paged:
            found["page_table"] = self.array(np.array([[3, 1], [0, 6]]))
        return found

    def bad(self, error, argument, name, words="", paged=False, **changes):
        """A call with arguments replaced is refused."""
        given = {**self.valid(name, paged), **changes}
        args = [given.pop(n) for n in NAMES[name]]
        return self.refuses(error, argument, name, *args, words=words, **given)

    def good(self, name, paged=False, **changes):
        given = {**self.valid(name, paged), **changes}
        args = [given.pop(n) for n in NAMES[name]]
        result = self.call(name, *args, **given)
        if self.backend.runtime is not None:
            self.backend.runtime.clear()  # `refuses` asks whether anything ran
        return result

    def new(self, dtype=np.float32):
        return {"k_new": self.f(2, 2, 3, 8, dtype=dtype), "v_new": self.f(2, 2, 3, 6, dtype=dtype)}


@pytest.fixture(params=["numpy", "emulator"])
def at(request):
    if request.param == "numpy":
        yield KVCache(NumpyBackend("numpy"))
        return
    with emulator.activate(arch="sm_80") as runtime:
        yield KVCache(NumpyBackend("emulator-sm_80", "sm_80", runtime))


def test_what_is_right_passes(at):
    """Else the tests below would prove nothing."""
    for paged in (False, True):
        for name in BOTH:
            at.good(name, paged)
        at.good(ATTEND, paged, **at.new())
    at.good(ATTEND, v_cache=None, value_dim=5)
    at.good(APPEND, v_cache=None, v_new=None)
    at.good(ATTEND, kv_lens=None)


# ---- what is not an array, and what comes together -----------------------------------------------


@pytest.mark.parametrize("value", NOT_ARRAYS, ids=lambda value: type(value).__name__)
def test_not_an_array(at, value):
    for name in BOTH:
        for argument in NAMES[name]:
            at.bad(TypeError, argument, name, **{argument: value})
        for option in OPTIONS[name] if value is not None else ():
            given = at.new() if option in ("k_new", "v_new") else {}
            at.bad(TypeError, option, name, "numpy.asarray", **{**given, option: value})
    at.bad(TypeError, "kv_lens", APPEND, kv_lens=None)


def test_two_homes(at):
    """One array on the host and one on a device: the message names both."""
    other = DeviceArray((2, 2, 10, 8))
    for name in BOTH:
        for argument in [*NAMES[name], "kv_lens", "page_table", "k_scale"]:
            with pytest.raises(TypeError, match="array of the same library") as caught:
                at.good(name, **{argument: other})
            assert re.search(rf"\b{argument}\b", str(caught.value))


def test_together(at):
    new = at.new()
    at.bad(ValueError, "v_new", ATTEND, "with k_new, but that is None", v_new=new["v_new"])
    at.bad(ValueError, "v_new", ATTEND, "with k_new, but it is None", k_new=new["k_new"])
    at.bad(ValueError, "kv_lens", ATTEND, "with k_new, but it is None", kv_lens=None, **new)
    at.bad(TypeError, "v_cache", ATTEND, "value_dim=n", v_cache=None)
    at.bad(ValueError, "v_cache", ATTEND, "must be None", value_dim=5)
    shared = {"v_cache": None, "value_dim": 5}
    at.bad(ValueError, "v_new", ATTEND, "must be None", **shared, **new)
    at.bad(ValueError, "v_scale", ATTEND, "must be None", **shared, v_scale=2.0)
    at.bad(TypeError, "v_cache", APPEND, v_cache=None)
    at.bad(TypeError, "v_new", APPEND, v_new=None)
    at.bad(ValueError, "v_scale", APPEND, "must be None", v_cache=None, v_new=None, v_scale=1.0)


# ---- dtypes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*BAD_DTYPES, "int64", "uint8", "longdouble", "float8_e5m2"])
def test_dtype(at, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bad = np.zeros((2, 4, 3, 8), dtype)
    at.bad(TypeError, "q", ATTEND, q=bad)
    cache = np.zeros((2, 2, 10, 8), dtype)
    at.bad(TypeError, "k_cache", ATTEND, "float8_e4m3fn or int8", k_cache=cache)
    at.bad(TypeError, "k_cache", APPEND, "float8_e4m3fn or int8", k_cache=cache)
    eight = {"k_cache": np.zeros(cache.shape, np.int8), "v_cache": np.zeros((2, 2, 10, 6), np.int8)}
    for name in ("k_new", "v_new"):
        given = at.new()
        given[name] = np.zeros(given[name].shape, dtype)
        at.bad(TypeError, name, ATTEND, "dtype of q", **given)
        at.bad(TypeError, name, APPEND, "dtype of k_cache", **given)
        at.bad(TypeError, name, APPEND, **given, **eight)


def test_dtypes_agree(at):
    half = at.f(2, 2, 10, 8, dtype=np.float16)
    at.bad(TypeError, "k_cache", ATTEND, "dtype of q (float32)", k_cache=half)
    at.bad(TypeError, "q", ATTEND, q=at.f(2, 4, 3, 8, dtype=np.int8))
    for name in BOTH:
        at.bad(TypeError, "v_cache", name, "k_cache", v_cache=at.f(2, 2, 10, 6, dtype=np.int8))
        for dtype in (np.float16, np.uint32, bool, np.uint8, np.int16):
            for option in INTEGERS:
                if option in inspect.signature(getattr(cuattn, name)).parameters:
                    paged, shape = option == "page_table", (2, 2)[: 1 + (option == "page_table")]
                    zeros = at.array(np.zeros(shape, dtype))
                    at.bad(TypeError, option, name, "int32 or int64", paged, **{option: zeros})
    at.bad(TypeError, "mask", ATTEND, "bool", mask=at.f(3, 4))
    for option in ("alibi_slopes", "sinks"):
        at.bad(TypeError, option, ATTEND, **{option: at.array(np.ones(4, bool))})


def test_swapped_bytes(at):
    for name in BOTH:
        at.bad(TypeError, "kv_lens", name, kv_lens=np.array([7, 0], ">i8"))
        at.bad(TypeError, "page_table", name, paged=True, page_table=np.zeros((2, 2), ">i4"))
        at.bad(TypeError, "k_cache", name, k_cache=at.f(2, 2, 10, 8).astype(">f4"))


# ---- shapes --------------------------------------------------------------------------------------


def test_shapes(at):
    f = at.f
    for shape in [(), (8,), (3, 8), (1, 2, 4, 3, 8)]:
        at.bad(ValueError, "q", ATTEND, "(B, H, S, D)", q=f(*shape))
    at.bad(ValueError, "q", ATTEND, "(B, H, S, D), but", paged=True, q=f(4, 3, 8))
    many = at.xp.broadcast_to(at.f(1), (2, 4, 2**30, 8))  # repeated: no memory
    at.bad(ValueError, "q", ATTEND, "queries of all heads", q=many)
    at.bad(ValueError, "k_cache", APPEND, "(B, H, S, D), but", paged=True, k_cache=f(2, 5, 8))
    for name, size in (("k_cache", 8), ("v_cache", 6)):
        at.bad(ValueError, name, ATTEND, "as many dimensions as q", **{name: f(2, 10, size)})
        at.bad(ValueError, name, ATTEND, "batch size of q, 2", **{name: f(3, 2, 10, size)})
        for heads in (3, 8, 0):
            at.bad(ValueError, name, ATTEND, "divides", **{name: f(2, heads, 10, size)})
    at.bad(ValueError, "k_cache", ATTEND, "head dimension of q, 8", k_cache=f(2, 2, 10, 7))
    for name in BOTH:
        for shape in [(2, 4, 10, 6), (2, 2, 9, 6)]:
            at.bad(ValueError, "v_cache", name, "(2, 2, 10, D_v)", v_cache=f(*shape))
        at.bad(ValueError, "v_cache", name, "(7, 2, 5, D_v)", True, v_cache=f(6, 2, 5, 6))
    wide = {"q": f(2, 4, 3, 257), "k_cache": f(2, 2, 10, 257)}
    at.bad(ValueError, "q", ATTEND, "at most 256", **wide)
    at.bad(ValueError, "v_cache", ATTEND, "at most 256", v_cache=f(2, 2, 10, 257))
    wide = {"q": f(2, 4, 3, 577), "k_cache": f(2, 2, 10, 577), "v_cache": None, "value_dim": 8}
    at.bad(ValueError, "q", ATTEND, "at most 576", **wide)
    three = {"q": f(4, 3, 8), "k_cache": f(2, 10, 8), "v_cache": f(2, 10, 6)}
    at.good(ATTEND, **three, kv_lens=at.ints(3))
    at.bad(ValueError, "kv_lens", ATTEND, "(1,) or ()", **three)


def test_shapes_of_tables(at):
    for name in BOTH:
        for shape in [(), (2,), (2, 2, 1)]:
            table = at.xp.zeros(shape, np.int32)
            at.bad(ValueError, "page_table", name, "pages of a sequence", True, page_table=table)
    for shape in [(3, 2), (1, 2)]:
        table = at.xp.zeros(shape, np.int32)
        at.bad(ValueError, "page_table", ATTEND, "(2, pages", True, page_table=table)
        at.bad(ValueError, "k_new", APPEND, f"({shape[0]}, 2, S_new, 8)", True, page_table=table)
        at.bad(ValueError, "page_table", ATTEND, "at most 2147482624", True,
               page_table=at.xp.broadcast_to(table[:1, :1], (2, 2**29)))  # fmt: skip


@pytest.mark.parametrize("name", BOTH)
def test_shapes_of_new_keys(at, name):
    for shape in [(2, 2, 8), (1, 2, 3, 8), (2, 4, 3, 8), (2, 2, 3, 6)]:
        given = dict(at.new(), k_new=at.f(*shape))
        at.bad(ValueError, "k_new", name, "(2, 2, S_new, 8)", **given)
    for shape in [(2, 2, 2, 6), (2, 2, 3, 8), (2, 3, 2, 6)]:
        given = dict(at.new(), v_new=at.f(*shape))
        at.bad(ValueError, "v_new", name, "(2, 2, 3, 6)", **given)
    long = at.xp.broadcast_to(at.f(1), (2, 2, 2**31 - 1, 8))  # repeated: no memory
    at.bad(ValueError, "k_new", name, "axes of at most", **dict(at.new(), k_new=long))
    given = {n: a.swapaxes(1, 2) for n, a in at.valid(name).items() if a.ndim == 4}
    at.good(name, **given, layout="BSHD")
    given |= at.new()
    at.bad(ValueError, "k_new", name, "(2, S_new, 2, 8)", layout="BSHD", **given)


def test_shapes_of_options(at):
    ones = at.xp.ones
    for shape in [(), (1,), (3,), (2, 1)]:
        for option in ("kv_lens", "q_lens", "q_offset"):
            if shape or option != "q_offset":  # a number
                at.bad(ValueError, option, ATTEND, "(2,)", **{option: ones(shape, np.int64)})
        for option in ("kv_lens", "new_lens"):
            at.bad(ValueError, option, APPEND, "(2,)", **{option: ones(shape, np.int64)})
    for shape in [(), (2, 5), (3, 3, 5), (2, 3, 3, 5), (3, 1, 3, 5), (1, 2, 4, 3, 5), (4, 5)]:
        at.bad(ValueError, "mask", ATTEND, "(2, 4, 3, M)", mask=ones(shape, bool))
    for shape in [(5,), (3, 1), (4, 3, 5), (2, 1, 1, 40), (1, 4, 3, 0)]:
        at.good(ATTEND, mask=ones(shape, bool))
    at.bad(ValueError, "alibi_slopes", ATTEND, "(4,) or (2, 4)", alibi_slopes=ones(3))
    at.bad(ValueError, "sinks", ATTEND, "(4,)", sinks=ones((2, 4)))


# ---- 8 bits --------------------------------------------------------------------------------------


def eight(at, name, dtype):
    given = at.valid(name)
    return {n: given[n].astype(dtype) for n in ("k_cache", "v_cache")}


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [E4M3, np.int8])
def test_scales(at, name, dtype):
    given = eight(at, name, dtype)
    for scale in ("k_scale", "v_scale"):
        lead = given["k_cache"].shape[:-1]
        for shape in [(), (2,), lead]:
            at.good(name, **given, **{scale: at.xp.ones(shape, np.float32)})
        for value in (2, 0.5, np.float64(0.5), np.array(0.5)):
            at.good(name, **given, **{scale: value})
        for value in ("1", True, [1.0], 1j, object()):
            at.bad(TypeError, scale, name, **given, **{scale: value})
        for value in (0, -1.0, np.inf, np.nan, np.float32(0)):
            words = "positive finite"
            at.bad(ValueError, scale, name, words, **given, **{scale: value})
        for wrong in (np.float64, np.float16, np.int32):
            at.bad(TypeError, scale, name, "float32", **given, **{scale: np.ones(2, wrong)})
        for shape in [(1,), (4,), (2, 2), (2, 2, 9), (2, 10, 2), (2, 2, 10, 8)]:
            ones = at.xp.ones(shape, np.float32)
            at.bad(ValueError, scale, name, "(2, 2, 10)", **given, **{scale: ones})
        for value in (0.5, at.xp.ones(2, np.float32)):
            at.bad(ValueError, scale, name, f"must be None for {scale[0]}_cache of float32",
                   **{scale: value})  # fmt: skip


# ---- numbers, words and values -------------------------------------------------------------------


def test_split_size(at):
    for value in (1.0, True, (128,), [128], object(), np.float32(128)):
        at.bad(TypeError, "split_size", ATTEND, split_size=value)
    for value in ("AUTO", "", "128"):
        at.bad(ValueError, "split_size", ATTEND, "'auto', None", split_size=value)
    for value in (0, -128, 64, 112, 129, 136, 10**30 + 1):
        at.bad(ValueError, "split_size", ATTEND, "multiple of 16", split_size=value)


def test_value_dim(at):
    for value in (1.0, True, "5", None and 0, at.f(1)):
        if value is not None:
            at.bad(TypeError, "value_dim", ATTEND, v_cache=None, value_dim=value)
    for value in (-1, 9, 10**30):
        words = "from 0 to 8, the head dimension of k_cache"
        at.bad(ValueError, "value_dim", ATTEND, words, v_cache=None, value_dim=value)


def test_numbers_of_attention(at):
    """One of each, as they are checked where those of attention are."""
    at.bad(ValueError, "layout", ATTEND, layout="bhsd")
    at.bad(ValueError, "layout", APPEND, layout="NHD")
    at.bad(ValueError, "window", ATTEND, window=(-1, 0))
    at.bad(ValueError, "softcap", ATTEND, softcap=0)
    at.bad(TypeError, "scale", ATTEND, scale="1")
    at.bad(ValueError, "precision", ATTEND, precision="fp16")
    at.bad(TypeError, "is_causal", ATTEND, is_causal=1)
    at.bad(TypeError, "return_lse", ATTEND, return_lse=0)
    at.bad(TypeError, "q_offset", ATTEND, q_offset=1.5)
    at.bad(ValueError, "q_offset", ATTEND, "2**39", q_offset=np.array([2**40, 0]))


def test_values_of_lengths(at):
    """Only where they lie on the host: reading a device array would wait for it."""
    for paged in (False, True):
        for bad in ([-1, 0], [11, 0], [0, 2**40]):
            at.bad(ValueError, "kv_lens", ATTEND, "from 0 to 10", paged, kv_lens=at.ints(*bad))
        for name, more in ((ATTEND, at.new()), (APPEND, {})):
            at.good(name, paged, kv_lens=at.ints(7, 0), **more)
            words = "from 0 to 7"
            at.bad(ValueError, "kv_lens", name, words, paged, kv_lens=at.ints(8, 0), **more)
    lens = {"kv_lens": at.ints(9, 8)}
    at.good(ATTEND, q_lens=at.ints(1, 2), **lens, **at.new())
    at.good(APPEND, new_lens=at.ints(1, 2), **lens)
    at.bad(ValueError, "kv_lens", ATTEND, q_lens=at.ints(2, 2), **lens, **at.new())
    at.bad(ValueError, "kv_lens", APPEND, new_lens=at.ints(2, 2), **lens)
    for bad in ([4, 0], [0, -1]):
        at.bad(ValueError, "q_lens", ATTEND, "from 0 to 3", q_lens=at.ints(*bad))
        at.bad(ValueError, "new_lens", APPEND, "from 0 to 3", new_lens=at.ints(*bad))


def test_entries_of_tables_are_no_errors(at):
    """Any number: there is no such page."""
    table = np.array([[2**62, -(2**62)], [7, -1]])
    at.good(ATTEND, True, page_table=table)
    at.good(APPEND, True, page_table=table)


# ---- what is written -----------------------------------------------------------------------------


def test_caches_that_cannot_be_written(at):
    for name, more in ((ATTEND, at.new()), (APPEND, {})):
        for cache in ("k_cache", "v_cache"):
            array = at.valid(name)[cache]
            array.flags.writeable = False
            at.bad(ValueError, cache, name, "writeable", **{**more, cache: array})
            repeated = np.lib.stride_tricks.as_strided(
                array[:1].copy(), array.shape, (0, *array.strides[1:])
            )
            at.bad(ValueError, cache, name, "overlap itself", **{**more, cache: repeated})
    at.good(ATTEND, k_cache=array[..., :0], q=at.f(2, 4, 3, 0))  # which only reads
    for scale in ("k_scale", "v_scale"):
        ones = np.broadcast_to(np.float32(1), (2, 2, 10))
        given = eight(at, APPEND, np.int8)
        at.bad(ValueError, scale, APPEND, "writeable", **given, **{scale: ones})
        at.good(ATTEND, **given, **{scale: ones})


def test_what_is_written_is_read_nowhere_else(at):
    """The halves of a pool interleave, which is fine."""
    pool = at.f(7, 2, 2, 5, 8)
    caches = {"k_cache": pool[:, 0], "v_cache": pool[:, 1]}
    new = {"k_new": at.f(2, 2, 3, 8), "v_new": at.f(2, 2, 3, 8)}
    at.good(ATTEND, True, **caches, **new)
    at.good(APPEND, True, **caches, **new)
    for name in BOTH:
        for inside in ("k_new", "v_new"):
            given = {**new, inside: pool[:2, 0, :, :3]}
            words = "share no memory with k_cache, which is written to"
            at.bad(ValueError, inside, name, words, True, **caches, **given)
    q = pool.reshape(-1)[: 2 * 4 * 3 * 8].reshape(2, 4, 3, 8)
    at.bad(ValueError, "q", ATTEND, "k_cache", True, **caches, **new, q=q)
    at.good(ATTEND, True, **caches, q=q)


def test_out(at):
    good = at.xp.zeros((2, 4, 3, 6), np.float32)
    for bad in (good[0], good[..., :5], good.swapaxes(1, 2)):
        at.bad(ValueError, "out", ATTEND, "(2, 4, 3, 6)", out=bad)
    at.bad(TypeError, "out", ATTEND, "float32", out=good.astype(np.float64))
    at.bad(TypeError, "out", ATTEND, "a tuple of 2", out=good, return_lse=True)
    for paged in (False, True):
        memory = at.xp.zeros(2**12, np.float32)
        valid = at.valid(ATTEND, paged)
        for name in ("k_cache", "v_cache"):
            cache = memory[: valid[name].size].reshape(valid[name].shape)
            out = memory[8 : 8 + good.size].reshape(good.shape)
            at.bad(ValueError, "out", ATTEND, name, paged, **{name: cache, "out": out})


def test_address_between_elements(at):
    """NumPy reads such an array, a device would fault."""
    for name in BOTH:
        for paged in (False, True):
            for argument, a in at.valid(name, paged).items():
                array = between(at, a.shape, a.dtype)
                array[...] = a
                if at.backend.runtime is None:
                    at.good(name, paged, **{argument: array})
                else:
                    at.bad(ValueError, argument, name, "pass a copy", paged, **{argument: array})


def test_fractions_of_elements(at):
    """A field of packed records: a device would need a copy of the cache."""
    record = np.dtype([("pad", np.int8, 4), ("x", np.float32), ("end", np.int8, 2)])
    for name in BOTH:
        for argument, a in at.valid(name).items():
            records = np.zeros(a.shape, record)
            if a.dtype == np.float32:
                records["x"] = a
                if at.backend.runtime is not None:
                    words = "multiples of its itemsize"
                    at.bad(ValueError, argument, name, words, **{argument: records["x"]})
                elif name == ATTEND:
                    got = at.good(name, **{argument: records["x"]})
                    np.testing.assert_allclose(got, at.good(name), rtol=1e-6)


def test_devices_without_the_instructions():
    """Below sm_80 nothing attends; writing works everywhere."""
    with emulator.activate(arch="sm_75") as runtime:
        at = KVCache(NumpyBackend("emulator", "sm_75", runtime))
        at.bad(ValueError, "q", ATTEND, "capability 8.0")
        at.good(APPEND)


# ---- how arguments are passed --------------------------------------------------------------------


def test_how_arguments_are_passed(at):
    for name in BOTH:
        given = at.valid(name)
        args = [given.pop(n) for n in NAMES[name]]
        at.refuses(TypeError, "q" if name == ATTEND else "k_cache", name, **given)
        at.refuses(TypeError, None, name, *args, None, **given)
        at.refuses(TypeError, "no_such_option", name, *args, no_such_option=1, **given)
    at.refuses(TypeError, "kv_lens", APPEND, *args, words="call kv_append(k_cache, v_cache, k_new")
    at.bad(TypeError, "bias", ATTEND, "attention has it", bias=at.f(3, 10))
    at.bad(TypeError, "page_table", ATTEND, "block_table", block_table=at.ints(1))


@pytest.mark.parametrize("name", BOTH)
def test_signatures_are_those_of_the_reference(name):
    ours = inspect.signature(getattr(cuattn, name)).parameters.values()
    theirs = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]
