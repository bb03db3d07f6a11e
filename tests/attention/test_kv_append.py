"""kv_append on every backend: every bit of the caches, and of the scales that it writes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_cases import INF, NAN, put, put_options
from cases import FAR, untouched
from conftest import on_a_gpu
from kvcache_cases import EIGHT_BITS, LARGEST, Cached
from test_kvcache import bits

import cuattn
from cuattn._attention import request_kvcache

FLOATS = ["float16", "bfloat16", "float32", "float64"]


def appended(backend, cached, **more):
    """The caches after `kv_append`."""
    caches = [put(backend, a) for a in cached.caches]
    names = ("kv_lens", "page_table")
    options = {n: cached.options[n] for n in names if n in cached.options}
    options = put_options(backend, {**options, **more})
    new = (put(backend, a) for a in cached.new)
    assert cuattn.kv_append(*caches, *new, layout=cached.layout, **options) is None
    return [backend.asnumpy(a) for a in caches]


@pytest.mark.parametrize("op", FLOATS)
@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
@pytest.mark.parametrize("page_size", [None, 1, 5, 64])
def test_append(backend, rng, op, layout, page_size):
    """Exactly these rows, wherever they lie, and no other byte."""
    for pool in ("apart", "interleaved", "flipped"):
        lens = rng.integers(4, 40, 5)
        cached = Cached(rng, op, lens=lens, page_size=page_size, layout=layout, pool=pool, new=4)
        got = appended(backend, cached)
        assert bits(got) == bits(cached.after)
        cached = Cached(rng, op, lens=lens, page_size=page_size, layout=layout, pool=pool, new=4,
                        rows=4, q_lens=np.array([4, 0, 1, 3, 2]))  # fmt: skip
        got = appended(backend, cached, new_lens=cached.options["q_lens"])
        assert bits(got) == bits(cached.after)


@pytest.mark.parametrize("page_size", [4, 16])
def test_append_without_a_page(backend, rng, page_size):
    """Dropped."""
    missing = [(0, 32 // page_size), (1, 16 // page_size)]
    how = {"lens": [35, 18], "page_size": page_size, "new": 5, "rows": 5, "missing": missing}
    cached = Cached(rng, **how)
    assert bits(appended(backend, cached)) == bits(cached.after)


# ---- 8 bits --------------------------------------------------------------------------------------


def decoded(codes, scale, layout):
    scale = np.asarray(1 if scale is None else scale, np.float64)
    scale = scale[:, None] if scale.ndim == 1 and layout == "BHSD" else scale
    return codes.astype(np.float64) * scale[..., None]


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("scales", [None, 0.03, "head", "token"])
@pytest.mark.parametrize("page_size", [None, 4])
def test_append_of_eight_bits(backend, rng, kind, scales, page_size):
    """Rounded to nearest, past the largest to that; nothing else changes, of scales either."""
    dtype = str(rng.choice(FLOATS))
    largest, layout = LARGEST[kind], ["BHSD", "BSHD"][page_size is None]
    cached = Cached(rng, dtype, lens=[9, 4, 15], page_size=page_size, new=4, layout=layout)
    new = [a.copy() for a in cached.new]
    new[0].reshape(-1)[:5] = [6e4, -6e4, 0, 300, -0.25]
    new[1][0, :, : 1 if layout == "BHSD" else None] = 0  # a token of zeros
    codes = [np.zeros(a.shape, EIGHT_BITS[kind]) for a in cached.caches]
    shape = codes[0].shape[:-1]
    given = {}
    for name in ("k_scale", "v_scale"):
        head = rng.uniform(0.01, 0.02, 2).astype("f4")
        given[name] = {"head": head, "token": np.full(shape, NAN, "f4")}.get(scales, scales)
    names = ("kv_lens", "page_table")
    options = {n: cached.options[n] for n in names if n in cached.options}
    on = [put(backend, a.copy()) for a in codes]
    scale_on = {n: put(backend, a) for n, a in given.items()}
    args = [put(backend, a) for a in new]
    cuattn.kv_append(*on, *args, **put_options(backend, options), **scale_on, layout=layout)
    before = [~np.isnan(a.astype("f4")) for a in cached.caches]
    marked = [~np.isnan(a.astype("f4")) for a in appended(backend, cached)]
    for i, name in enumerate(given):
        got, scale = backend.asnumpy(on[i]), scale_on[name]
        scale = backend.asnumpy(scale) if isinstance(scale, backend.xp.ndarray) else scale
        written = marked[i] & ~before[i]
        assert not got[~written].view(np.uint8).any()
        exact = Cached(rng, dtype, lens=[9, 4, 15], page_size=page_size, new=4, layout=layout)
        exact.caches = [np.zeros_like(a) for a in cached.caches]
        exact.new, exact.options = new, cached.options
        want = appended(backend, exact)[i].astype(np.float64)
        if scales == "token":
            rows = written.all(axis=-1)
            most = abs(want).max(axis=-1)[rows].astype(np.float32)
            np.testing.assert_allclose(scale[rows], most / np.float32(largest), rtol=1e-6)
            assert np.isnan(scale[~rows]).all()
        factor = decoded(np.ones_like(got), scale, layout)
        with np.errstate(all="ignore"):
            units = np.where(factor == 0, 0, want / factor)
            units = np.clip(units, -largest - (kind == "int8"), largest)
        error = abs(got.astype(np.float64) - units)[written]
        # Half a unit in the last place: of e4m3, 3 bits of mantissa and 2**-9 below 2**-6.
        step = np.float64(1) if kind == "int8" else np.exp2(
            np.floor(np.log2(np.maximum(abs(units), 2.0**-6))) - 3
        )  # fmt: skip
        assert (error <= np.broadcast_to(step, units.shape)[written] * (0.5 + 1e-4)).all()


def near_ties(kind, dtype):
    """All numbers of 8 bits, what is between two, what lies beside all these, and what is none."""
    codes = np.arange(256, dtype=np.uint8).view(EIGHT_BITS[kind]).astype(np.float64)
    codes = np.unique(codes[np.isfinite(codes)])
    most = float(ml_dtypes.finfo(dtype).max)
    x = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2, [most, INF, NAN]]).astype(dtype)
    x = np.concatenate([x, -x[-3:]])
    with np.errstate(all="ignore"):
        return np.concatenate([x, *(np.nextafter(x, np.array(to, dtype)) for to in (-INF, INF))])


def rounded(x, scale, kind, acc):
    """x over its scale, computed in `acc`, as a number of 8 bits."""
    with np.errstate(all="ignore"):
        x, scale = x.astype(acc), np.asarray(scale).astype(acc)
        y = np.where(scale == 0, 0, x / scale)
        y = np.clip(y, -LARGEST[kind] - (kind == "int8"), LARGEST[kind])
    if kind == "int8":
        return np.nan_to_num(np.rint(y)).astype(np.int8).view(np.uint8)
    # From 0 to 448 the codes are in order; between two of them is a tie, which the even one wins.
    numbers = np.arange(0x7F, dtype=np.uint8).view(EIGHT_BITS[kind]).astype(np.float64)
    ties = (numbers[1:] + numbers[:-1]) / 2
    codes, at_most = (np.searchsorted(ties, abs(y), side) for side in ("left", "right"))
    codes = np.where(codes % 2 == 0, codes, at_most) | np.signbit(y) << 7
    return np.where(np.isnan(y), 0x7F, codes).astype(np.uint8)


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_eight_bits(backend, kind, dtype):
    """The same on every backend, for every kind of scale."""
    x = near_ties(kind, getattr(ml_dtypes, dtype, dtype))
    x = np.resize(x, (1, 1, -(-x.size // 24), 24))
    own = np.float64 if dtype == "float64" else np.float32
    heads = np.array([1, 0.3, -2, 0, NAN, INF, 1e-42, 3e37], np.float32)
    new = put(backend, np.broadcast_to(x, (1, len(heads), *x.shape[2:])))
    lens = backend.asarray(np.zeros(1, np.int32))
    for scale, acc in ((None, own), (0.3, own), (1e-300, "f8"), (1e300, "f8"), (heads, own)):
        cache = put(backend, np.zeros((1, len(heads), *x.shape[2:]), EIGHT_BITS[kind]))
        cuattn.kv_append(cache, None, new, None, kv_lens=lens, k_scale=put(backend, scale))
        factor = 1 if scale is None else np.reshape(scale, (-1, 1, 1))
        want = np.broadcast_to(rounded(x, factor, kind, acc), cache.shape)
        np.testing.assert_array_equal(backend.asnumpy(cache).view(np.uint8), want)


@pytest.mark.parametrize("kind", EIGHT_BITS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_bits_of_computed_scales(backend, rng, kind, dtype):
    """Also of rows of zeros, of subnormals, of the largest numbers, and of none."""
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    limits = ml_dtypes.finfo(dtype)
    new = rng.standard_normal((1, 2, 12, 24)) * 10.0 ** rng.integers(-9, 9, (1, 2, 12, 1))
    new[:, 0, :4] = [[0], [limits.smallest_subnormal], [limits.max], [-limits.max]]
    new[0, 1, 0, 5], new[0, 1, 1, 20], new[0, 1, 2, 7] = INF, -INF, NAN
    with np.errstate(all="ignore"):
        new = new.astype(dtype)
    cache, scale = np.zeros(new.shape, EIGHT_BITS[kind]), np.full(new.shape[:3], 9, np.float32)
    given = [put(backend, a) for a in (cache, new, scale)]
    lens = backend.asarray(np.zeros(1, np.int64))
    cuattn.kv_append(given[0], None, given[1], None, kv_lens=lens, k_scale=given[2])
    acc = np.float64 if dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        most = abs(new.astype(acc)).max(axis=-1)
        want = (most / acc(LARGEST[kind])).astype(np.float32)
    np.testing.assert_array_equal(backend.asnumpy(given[2]), want)
    want = rounded(new, want[..., None], kind, acc)
    np.testing.assert_array_equal(backend.asnumpy(given[0]).view(np.uint8), want)


def test_scales_of_no_columns(backend):
    """They are 0."""
    cache = backend.asarray(np.zeros((1, 1, 4, 0), np.int8))
    new = backend.asarray(np.zeros((1, 1, 2, 0), np.float32))
    scale, lens = backend.asarray(np.ones((1, 1, 4), "f4")), backend.asarray(np.ones(1, "i4"))
    cuattn.kv_append(cache, None, new, None, kv_lens=lens, k_scale=scale)
    assert backend.asnumpy(scale).tolist() == [[[1, 0, 0, 1]]]


# ---- what arrays hold, and where they lie --------------------------------------------------------


@pytest.mark.parametrize("dims", [(59, 40), (128, 1), (0, 24), (256, 200)], ids=str)
@pytest.mark.parametrize("op", ["float16", "float32", "float64"])
def test_head_dims(backend, rng, op, dims):
    """Rows of whole chunks, and others: of keys and of values apart."""
    cached = Cached(rng, op, lens=[9, 4, 15], dims=dims, new=3)
    assert bits(appended(backend, cached)) == bits(cached.after)


@pytest.mark.parametrize("kind", [None, *EIGHT_BITS])
@pytest.mark.parametrize("dim", [576, 36, 7, 1])
def test_one_cache(backend, rng, kind, dim):
    """Its new rows everywhere: repeated, every other column, backwards, between chunks; and its own
    rows likewise."""
    x = rng.integers(-9, 9, (2, 3, 4, 2 * dim + 8)).astype("f2")
    views = x[..., ::2], x[..., dim::-1], x[..., 1:], x[..., 8:], x[:1], x[:, :1], x[:, :, :1]
    dtype = EIGHT_BITS.get(kind, np.dtype("f2"))
    caches = np.zeros((2, 3, 6, 2 * dim + 8), dtype)
    places = *(caches[..., i:] for i in (0, 1, 2, 8, 8, 0)), caches[..., ::-2]
    for new, place in zip(views, places, strict=True):
        new, cache = np.broadcast_to(new[..., :dim], (2, 3, 4, dim)), place[..., :dim]
        want = cache.copy()
        want[0, :, 1:5], want[1, :, 2:6] = new
        given = put(backend, cache)
        lens = backend.asarray(np.array([1, 2]))
        cuattn.kv_append(given, None, put(backend, new), None, kv_lens=lens)
        got = backend.asnumpy(given.view(np.uint8) if kind else given)
        assert bits([got]) == bits([want])
        cache[...] = 0


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("page_size", [None, 4])
def test_values_that_a_device_is_trusted_with(backend, rng, dtype, page_size, monkeypatch):
    """Whatever they are, nothing is written outside, and nothing in a place that is not named."""
    monkeypatch.setattr("cuattn._attention.request_kvcache.check_values", lambda *_: None)
    most = np.iinfo(dtype).max
    far = 2**32 + 6 if dtype == np.int64 else 13  # 6, were it of 32 bits
    lens = np.array([most, -most, 7, 6, 0, 2, far], dtype)
    counts = np.array([3, most, 2, -5, 1, 3, 1], dtype)
    table = [[0, 1], [2, -most], [most, 3], [4, 4], [far, 5], [-1, most - 15], [6, 13]]
    new = rng.standard_normal((7, 2, 3, 8)).astype("f4")
    cache = np.zeros((13 if page_size else 7, 2, page_size or 8, 8), "f4")
    want, options = cache.copy(), {"kv_lens": lens, "new_lens": counts}
    options |= {"page_table": np.array(table, dtype)} if page_size else {}
    for b, i in np.ndindex(7, 3):
        j = min(max(int(lens[b]), 0), 8) + i
        page = b if page_size is None else table[b][j // 4] if j < 8 else -1
        if i < counts[b] and j < 8 and 0 <= page < len(cache):
            want[page, :, j % cache.shape[2]] = new[b, :, i]
    given = put(backend, cache.copy())
    spread = {name: put(backend, np.repeat(a, 2, axis=-1)[..., ::2]) for name, a in options.items()}
    cuattn.kv_append(given, None, put(backend, new), None, **spread)
    assert want.any() and bits([backend.asnumpy(given)]) == bits([want])


@pytest.mark.parametrize("far", ["cache", "new"])
def test_offsets_of_more_than_32_bits(backend, rng, far):
    """Between two pages, or two sequences."""
    if far == "cache" and backend.name.startswith("emulator"):
        pytest.skip("a record of each byte of what is written would be too long")
    to, of = (FAR, 32) if far == "cache" else (32, FAR)
    x = rng.standard_normal((2, 1, 1, 8)).astype("f2")
    cache, new = (untouched(backend, step + 64, np.float16) for step in (to, of))
    strided = backend.xp.lib.stride_tricks.as_strided
    cache = strided(cache, (2, 1, 2, 8), (2 * to, 32, 16, 2))
    new = strided(new, x.shape, (2 * of, 16, 16, 2))
    new[...] = backend.asarray(x)
    table, lens = (backend.asarray(np.array(a)) for a in ([[1], [0]], [1, 0]))
    cuattn.kv_append(cache, None, new, None, kv_lens=lens, page_table=table)
    assert backend.asnumpy(cache[1, 0, 1]).tobytes() == x[0].tobytes()
    assert backend.asnumpy(cache[0, 0, 0]).tobytes() == x[1].tobytes()


# ---- how it is launched --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, *EIGHT_BITS])
@pytest.mark.parametrize("backend", ["emulator-sm_80", "emulator-sm_90a"], indirect=True)
def test_each_byte_once(backend, rng, kind):
    """One launch; accesses of 16 bytes, of 8 where numbers have 8 bits."""
    cached = Cached(rng, lens=[20, 33], page_size=16, dims=(128, 64), new=2)
    caches = [a.astype(EIGHT_BITS.get(kind, a.dtype)) for a in map(np.nan_to_num, cached.caches)]
    options = {name: cached.options[name] for name in ("kv_lens", "page_table")}
    scales = {n: np.zeros(caches[0].shape[:3], "f4") for n in ("k_scale", "v_scale") if kind}
    cuattn.kv_append(*caches, *cached.new, **options, **scales)
    (counters,) = backend.runtime.counters
    elements, rows = sum(a.size for a in cached.new), 2 * 2 * 2 * 2
    threads = elements // 8
    integers = threads * sum(a.itemsize for a in options.values())
    assert counters.global_bytes_read == 2 * elements + integers
    written = elements + 4 * rows if kind else 2 * elements
    assert counters.global_bytes_written == written
    stores = {size for size, count in counters.stores_by_size.items() if count}
    assert stores == ({4, 8} if kind else {16})
    assert counters.loads_by_size[2] == 0


@on_a_gpu
def test_warm_calls(backend, rng, monkeypatch):
    """Halves of a pool are as warm as caches apart; an overlap is seen."""
    pool = backend.asarray(rng.standard_normal((7, 2, 2, 4, 8)).astype("f4"))
    new = [backend.asarray(rng.standard_normal((2, 2, 3, 8)).astype("f4")) for _ in range(2)]
    options = {"kv_lens": backend.asarray(np.array([1, 3])),
               "page_table": backend.asarray(np.array([[3, 1], [0, 6]]))}  # fmt: skip
    cuattn.kv_append(pool[:, 0], pool[:, 1], *new, **options)
    with monkeypatch.context() as patch:
        patch.setattr(request_kvcache, "kv_append", None)  # no call of it
        cuattn.kv_append(pool[:, 0], pool[:, 1], *new[::-1], **options)
    np.testing.assert_array_equal(backend.asnumpy(pool[3, 0, :, 1:]), backend.asnumpy(new[1][0]))
    inside = pool.reshape(-1)[: new[0].size].reshape(new[0].shape)
    with pytest.raises(ValueError, match="v_new must share no memory with"):
        cuattn.kv_append(pool[:, 0], pool[:, 1], new[0], inside, **options)
