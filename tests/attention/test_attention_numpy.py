"""attention on NumPy arrays: what only this path can do wrong. The rest is on every backend."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import test_attention_varlen as varlen
from attention_cases import INF, NAN, OPS, Problem, any_options, call, verify

import cuattn
from cuattn import reference
from cuattn._arrays import blocks
from cuattn._attention import numpy_attention as attention

pytestmark = pytest.mark.parametrize("backend", ["numpy"], indirect=True)


def bits(results):
    return [np.ascontiguousarray(one).tobytes() for one in results]


@pytest.fixture(params=[(8, 32), (40, 1000)], ids=["8x4", "40x25"])
def small_tiles(request, monkeypatch):
    """Tiles of some queries and keys, so that small problems have many."""
    rows, scores = request.param
    monkeypatch.setattr(attention, "ROWS", rows)
    monkeypatch.setattr(attention, "SCORES", scores)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("lengths", [(1, 50), (37, 83), (90, 20)], ids=str)
def test_tiles(backend, rng, small_tiles, op, lengths):
    """Borders of tiles, before, on and behind those of what is seen."""
    for heads in ((2, 2), (6, 2)):
        how = {"heads": heads, "lengths": lengths}
        options = any_options(rng, 2, heads[0], lengths)
        verify(backend, rng, op, batch=2, **how, **options)
        verify(backend, rng, op, **how, is_causal=True)
        verify(backend, rng, op, **how, window=(11, 2))


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_not_finite(backend, rng, small_tiles, value):
    """In q, k, v, bias and sinks: in the results that the formula has it in, and in no other."""
    for name in ("q", "k", "v", "bias", "sinks"):
        options = {"bias": np.zeros((2, 19, 44), "f4"), "sinks": np.zeros(2, "f4")}
        how = {"heads": (2, 1), "lengths": (19, 44), "window": (9, 0)}
        problem = Problem(rng, "float32", **how, **options)
        arrays = dict(zip("qkv", problem.clean, strict=True)) | problem.options
        array = arrays[name]
        array[tuple(int(rng.integers(n)) for n in array.shape)] = value
        got = cuattn.attention(*problem.clean, **problem.options, return_lse=True)
        want = reference.attention(*problem.clean, **problem.options, return_lse=True)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", [{}, {"is_causal": True}, {"mask": True}], ids=str)
@pytest.mark.parametrize("op", ["bfloat16", "float32"])
def test_beyond_float32(backend, rng, small_tiles, op, how):
    """Scores, and sums on the way to one, that only float64 holds; others keep their bits."""
    if "mask" in how:
        how = {"mask": rng.random((21, 60)) < 0.8}
    problem = Problem(rng, op, heads=(2, 1), lengths=(21, 60), **how)
    q, k, v = problem.clean
    q[..., :4], q[0, 0, 7], q[0, :, 4] = 0, 0, 0
    k[..., 0] = np.where(np.arange(60) % 3, -1e20, 1e20)
    k[..., 1:3], k[..., 3] = 64, 1e20
    usual = call(backend, problem.clean, problem.options, return_lse=True)
    q[0, 0, 7, 0] = 1e20
    q[0, 0, 4, 3] = -1e20
    q[0, 1, 4, 1:3] = 3e38, -3e38
    got = call(backend, problem.clean, problem.options, return_lse=True)
    want = reference.attention(*problem.clean, **problem.options, return_lse=True)
    for one, ref, before in zip(got, want, usual, strict=True):
        with np.errstate(over="ignore"):  # the lse of such scores is infinite in float32
            ref = ref.astype(one.dtype).astype(float)
        np.testing.assert_allclose(one.astype(float), ref, rtol=1e-2, atol=1e-2)
        keep = np.ones((1, 2, 21), bool)
        keep[0, 0, 7] = keep[0, :, 4] = False
        assert one[keep].tobytes() == before[keep].tobytes()


def test_sums_beyond_float32(backend, rng):
    """-inf on the way to a score of 0, beside others of 0; and means of values whose sum is inf."""
    q, k, v = (rng.standard_normal((9, 40, 64)).astype("f4") for _ in range(3))
    q[:, 5], q[:, 5, :32] = 2e38, -2e38
    k[:, ::2], k[:, 1::2] = 1, 0
    v[..., 7] = 3e38
    got, lse = call(backend, (q, k, v), {}, return_lse=True)
    want, want_lse = reference.attention(q, k, v, return_lse=True)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5)
    parts, weights = np.full((2, 5, 3, 8), 3e38, "f4"), np.zeros((2, 5, 3), "f4")
    merged, _ = cuattn.merge_attention_states(parts, weights)
    np.testing.assert_array_equal(merged, parts[0])


@pytest.mark.parametrize("op", ["float16", "float32", "float64"])
@pytest.mark.parametrize("lengths", [(1, 90), (5, 40), (70, 70), (300, 600)], ids=str)
def test_heads_alone(backend, rng, op, lengths):
    """Bit by bit as among others, with which they share tiles."""
    options = any_options(rng, 3, 6, lengths)
    for name in ("q_offset", "q_lens", "kv_lens"):
        del options[name]
    problem = Problem(rng, op, 3, (6, 3), lengths, **options)
    q, k, v = problem.arrays
    whole = call(backend, (q, k, v), options, return_lse=True)
    for b, g in np.ndindex(3, 3):
        h = slice(2 * g, 2 * g + 2)
        own = options | {
            "sinks": options["sinks"][h],
            "alibi_slopes": options["alibi_slopes"][b, h],
        }
        own |= {"mask": options["mask"][b], "bias": options["bias"][h]}
        alone = call(backend, (q[b, h], k[b, g : g + 1], v[b, g : g + 1]), own, return_lse=True)
        assert bits(alone) == bits([one[b, h] for one in whole])


@pytest.mark.parametrize("op", OPS)
def test_threads(backend, rng, monkeypatch, op):
    """Bit by bit as without."""
    options = any_options(rng, 2, 4, (300, 500))
    arrays = Problem(rng, op, 2, (4, 2), (300, 500), **options).arrays
    alone = call(backend, arrays, options, return_lse=True)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(blocks, "THREADED", 1)
    monkeypatch.setattr(blocks, "thread_limit", lambda: 3)
    monkeypatch.setattr(blocks, "_pool", None)
    assert bits(call(backend, arrays, options, return_lse=True)) == bits(alone)


# ---- short sequences, which are computed together ------------------------------------------------


@pytest.mark.parametrize("how", ["", "beyond float32", "infinite", "huge", "strided"])
@pytest.mark.parametrize("shape", [(8, 64), (3, 5, 16), (2, 3, 9, 8), (1, 1, 700, 4)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_small_calls(backend, rng, shape, dtype, how):
    """The formula alone, which a call with `out` does not take, has the bits of the tiles."""
    q, k, v = (rng.standard_normal(shape).astype(dtype) for _ in range(3))
    k, v = k[..., :9, :], v[..., :9, :]
    if how == "beyond float32":  # a product
        k[..., 0, 0], q[..., 0] = -3e38, 3e38
    elif how == "infinite":
        k[..., 0, 0] = np.inf
    elif how == "huge":  # a sum
        v[...] = 3e38
    if how != "strided":
        k, v = k.copy(), v.copy()
    for options in ({}, {"scale": 3.0}, {"layout": "BSHD"}):
        if "layout" in options and len(shape) > 2:
            q, k, v = (a.swapaxes(-3, -2).copy() for a in (q, k, v))
        out = np.empty(q.shape, dtype)
        lse = np.empty(shape[:-1], dtype)
        cuattn.attention(q, k, v, return_lse=True, out=(out, lse), **options)
        got = cuattn.attention(q, k, v, return_lse=True, **options)
        assert bits(got) == bits((out, lse))
        assert bits([cuattn.attention(q, k, v, **options)]) == bits([out])


def test_small_calls_of_16_bits(backend):
    x = np.ones((1, 4), np.float16)[:, ::2][:, :1]  # strides of float32
    assert cuattn.attention(x, x, x).dtype == np.float16


@pytest.mark.parametrize("op", OPS)
def test_short_sequences(backend, rng, op):
    """Of equal lengths, but not neighbours: ragged, bit by bit each alone, and padded."""
    kinds = [(5, 9), (1, 30), (7, 7), (3, 0)]
    lengths = [kinds[i] for i in rng.integers(0, 4, 40)]
    mask, bias = rng.random((40, 1, 6, 1)) < 0.8, rng.standard_normal((2, 4, 20)).astype("f4")
    slopes, sinks = rng.random((40, 2)), np.array([0.5, -1.0])
    options = {"mask": mask, "bias": bias, "alibi_slopes": slopes, "sinks": sinks, "window": (4, 4)}
    ragged, out, lse = varlen.verify(backend, rng, op, lengths=lengths, **options)
    arrays, (ends_q, ends_k) = ragged.arrays, ragged.ends
    for b, problem in enumerate(ragged.problems):
        i, j = slice(*ends_q[b : b + 2]), slice(*ends_k[b : b + 2])
        parts = arrays[0][None, i], arrays[1][None, j], arrays[2][None, j]
        one = call(backend, parts, problem.options, layout="BSHD", return_lse=True)
        assert bits(one) == bits([out[i], lse[:, i]])
    q_lens, kv_lens = np.transpose(lengths)
    options = {"q_lens": q_lens, "kv_lens": kv_lens, "is_causal": True, "alibi_slopes": slopes}
    verify(backend, rng, op, batch=40, heads=(2, 1), lengths=(8, 31), **options)


# ---- memory --------------------------------------------------------------------------------------

MEMORY = 16 << 20  # bytes beyond the results, of one thread


def peak(function, *args, **options):
    tracemalloc.start()
    try:
        results = function(*args, **options)
        results = results if isinstance(results, tuple) else (results,)
        return tracemalloc.get_traced_memory()[1] - sum(one.nbytes for one in results)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("dtype", "heads", "lengths", "dim"),
    [
        ("float32", (1, 1), (3000, 3000), 8),  # scores of 36 MB
        ("float16", (8, 2), (1, 40000), 128),  # k and v of 80 MB in float32
        ("float64", (4, 4), (1500, 1500), 16),
        ("float32", (4096, 4096), (40, 40), 4),  # scores of 26 MB
    ],
)
def test_memory(backend, monkeypatch, dtype, heads, lengths, dim):
    monkeypatch.setattr(blocks, "THREADED", 1 << 60)
    (heads, heads_kv), (rows, columns) = heads, lengths
    q, k = (np.zeros((1, h, n, dim), dtype) for h, n in ((heads, rows), (heads_kv, columns)))
    assert peak(cuattn.attention, q, k, k, is_causal=True, return_lse=True) < MEMORY
    k[..., columns // 2, 0] = NAN  # all is computed in float64, too
    assert peak(cuattn.attention, q, k, k) < MEMORY


def test_memory_of_options(backend, monkeypatch):
    """Mask, bias, and ragged sequences, of which none is copied."""
    monkeypatch.setattr(blocks, "THREADED", 1 << 60)
    q = np.zeros((2, 3000, 8), np.float32)
    options = {"mask": np.ones((3000, 3000), bool), "bias": np.zeros((2, 3000, 3000), np.float16)}
    assert peak(cuattn.attention, q, q, q, alibi_slopes=np.ones(2), **options) < MEMORY
    q, ends = np.zeros((6000, 1, 8), np.float32), np.array([0, 3000, 6000])
    options = {"mask": np.ones((2500, 2500), bool), "bias": np.zeros((3200, 3200), np.float16)}
    assert peak(cuattn.attention_varlen, q, q, q, ends, ends, **options) < MEMORY


def test_memory_of_many_short_sequences(backend, monkeypatch):
    monkeypatch.setattr(blocks, "THREADED", 1 << 60)
    lengths = np.arange(20000) % 7
    ends = np.concatenate([[0], np.cumsum(lengths)])
    q = np.zeros((ends[-1], 1, 16), np.float32)
    assert peak(cuattn.attention_varlen, q, q, q, ends, ends) < MEMORY


def test_memory_of_merge(backend, monkeypatch):
    monkeypatch.setattr(blocks, "THREADED", 1 << 60)
    outs, lses = np.zeros((2, 64, 32, 64, 32), np.float32), np.zeros((2, 64, 32, 64), np.float32)
    assert peak(cuattn.merge_attention_states, outs, lses) < MEMORY
