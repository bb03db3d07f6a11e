"""attention_backward on NumPy arrays: what only this path can do wrong, in tiles of any size."""

from __future__ import annotations

import numpy as np
import pytest
from attention_backward_cases import Backward, backward, verify
from attention_cases import INF, NAN, OPS, any_options, put
from test_attention_numpy import MEMORY, bits, peak
from tolerance import dtype_of

import cuattn
from cuattn import reference
from cuattn._arrays import blocks
from cuattn._attention import numpy_attention as attention

pytestmark = pytest.mark.parametrize("backend", ["numpy"], indirect=True)


@pytest.fixture(params=[(8, 32), (40, 1000), (256, 1 << 17)], ids=["8x4", "40x25", "all"])
def tiles(request, monkeypatch):
    """Of some queries and keys, so that small problems have many; or one."""
    monkeypatch.setattr(attention, "ROWS", request.param[0])
    monkeypatch.setattr(attention, "SCORES", request.param[1])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=str)
def test_tiles(backend, rng, tiles, op, heads):
    """Every option, and each place of a border beside what is seen."""
    lengths = tuple(int(n) for n in rng.integers(1, 90, 2))
    how = {"heads": heads, "lengths": lengths, "dims": tuple(rng.integers(1, 40, 2))}
    verify(backend, rng, op, batch=2, **how, **any_options(rng, 2, heads[0], lengths))
    verify(backend, rng, op, grad_lse=False, **how, is_causal=True)
    verify(backend, rng, op, **how, window=(11, 2), scale=-0.2)


@pytest.mark.parametrize("op", ["bfloat16", "float32"])
@pytest.mark.parametrize("bias", ["float16", "float32", "float64"])
def test_shapes_of_bias(backend, rng, tiles, op, bias):
    """What is added up is rounded once, into the dtype of the bias."""
    for shape in [(2, 4, 21, 30), (1, 4, 21, 1), (4, 1, 30), (2, 1, 1, 1), (21, 30), (1,), ()]:
        values = rng.standard_normal(shape).astype(bias)
        options = {"bias": values, "sinks": np.ones(4, "f4")}
        verify(backend, rng, op, batch=2, heads=(4, 2), lengths=(21, 30), **options)
    problem = Backward(rng, op, heads=(4, 2), lengths=(21, 30), bias=np.zeros((21, 1), bias))
    assert backward(backend, problem.forward, {**problem.more, "return_dbias": False})[3] is None


def test_small_arrays(backend, rng):
    """Slopes of heads, of sequences and of one; integers, which have no gradient."""
    for dtype in ("float16", "float64", "int32"):
        for shape in ((4,), (2, 4)):
            options = {"alibi_slopes": np.ones(shape, dtype), "sinks": np.ones(4, dtype)}
            problem = Backward(rng, "float32", batch=2, heads=(4, 2), lengths=(9, 9), **options)
            got = backward(backend, problem.forward, problem.more)
            if dtype == "int32":
                assert got.dalibi_slopes is got.dsinks is None
                got = got._replace(dalibi_slopes=np.zeros(shape), dsinks=np.zeros(4))
            else:
                problem.check_gradients(got)


# ---- layouts in memory ---------------------------------------------------------------------------


def test_strides(backend, rng):
    """Of what comes in, any; of what goes out likewise, and what lies between stays."""
    options = {"bias": rng.standard_normal((4, 9, 14)).astype("f4"), "is_causal": True}
    for op in ("float16", "float32"):
        problem = Backward(rng, op, batch=2, heads=(4, 2), lengths=(9, 14), **options)
        problem.given["grad"] = np.broadcast_to(problem.q.dtype.type(0.5), (2, 4, 9, 64))
        whole = backward(backend, problem.forward, problem.more)
        problem.check_gradients(whole)

        def strided(a):
            return (
                np.repeat(a, 2, axis=-1)[..., ::-2][..., ::-1].swapaxes(1, 2).copy().swapaxes(1, 2)
            )

        arrays = [a if a.strides[-1] == 0 else strided(a) for a in problem.forward[:5]]
        arrays += [np.repeat(problem.forward[5], 3, axis=2)[..., ::3]]
        memory = [np.full((*one.shape[:-1], 2 * one.shape[-1]), 7, one.dtype) for one in whole[:4]]
        outs = tuple(one[..., ::-2] for one in memory)
        got = backward(backend, arrays, {**problem.more, "out": outs})
        problem.check_gradients(got)
        assert all(one is out for one, out in zip(got, outs, strict=False))
        assert all((one[..., ::2] == 7).all() for one in memory)


def test_layouts_and_dimensions(backend, rng):
    problem = Backward(rng, "float32", batch=2, heads=(4, 2), lengths=(9, 14), is_causal=True)
    whole = backward(backend, problem.forward, problem.more)
    *arrays, lse = problem.forward
    grad_lse = problem.more["grad_lse"]
    for lead in [(), (1,), (1, 2)]:
        for layout in ("BHSD", "BSHD"):
            own = [a[lead if a.shape[1] == 4 else (*lead[:1], 1)[: len(lead)]] for a in arrays]
            swap = layout == "BSHD" and len(lead) < 2
            own = [a.swapaxes(-3, -2) if swap else a for a in own]
            more = {"is_causal": True, "grad_lse": grad_lse[lead], "layout": layout}
            got = backward(backend, (*own, lse[lead]), more)
            assert [one.shape for one in got[:3]] == [a.shape for a in own[1:4]]
            if len(lead) < 2:  # else dk and dv are those of one of two heads
                got = [one.swapaxes(-3, -2) if swap else one for one in got[:3]]
                for one, other in zip(got, whole, strict=False):
                    np.testing.assert_allclose(one, other[lead], rtol=1e-5, atol=1e-6)
            else:
                np.testing.assert_allclose(got.dq, whole.dq[lead], rtol=1e-5, atol=1e-6)


def test_elements_at_fractions_of_one(backend, rng):
    problem = Backward(rng, "float32", lengths=(5, 6), is_causal=True)
    arrays = []
    for a in problem.forward:
        records = np.zeros(a.shape, [("pad", np.int8, 3), ("x", a.dtype)])
        records["x"] = a
        arrays.append(records["x"])
    problem.check_gradients(backward(backend, arrays, problem.more))


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["float16", "float64"])
def test_sequences(backend, rng, tiles, op):
    """Neighbours of equal lengths, which are computed together, and others; padding; bias."""
    kinds = [(5, 9), (1, 30), (7, 7), (3, 0), (0, 4)]
    lengths = np.array([kinds[i] for i in rng.integers(0, 5, 12)] + [(12, 12)] * 3)
    ends_q, ends_k = (np.concatenate([[0], np.cumsum(n)]) for n in lengths.T)
    options = {"mask": rng.random((15, 1, 8, 1)) < 0.8, "sinks": np.array([0.5, -1.0])}
    options |= {"bias": rng.standard_normal((2, 4, 20)), "window": (6, 3), "softcap": 4.0}
    options |= {"alibi_slopes": rng.random((15, 2))}
    options |= {"q_lens": np.maximum(lengths[:, 0] - 1, 0), "kv_lens": lengths[:, 1]}
    shapes = (ends_q[-1], 2, 8), (ends_k[-1], 1, 8), (ends_k[-1], 1, 5)
    q, k, v = (rng.standard_normal(shape).astype(op) for shape in shapes)
    y, lse = cuattn.attention_varlen(q, k, v, ends_q, ends_k, return_lse=True, **options)
    padding = np.repeat(options["q_lens"] + ends_q[:-1], lengths[:, 0]) <= np.arange(ends_q[-1])
    grad, grad_lse = rng.standard_normal(y.shape).astype(op), np.ones_like(lse)
    grad[padding] = q[padding] = y[padding] = grad_lse[:, padding] = NAN
    arrays = grad, q, k, v, y, lse, ends_q, ends_k
    more = {"grad_lse": grad_lse, "return_dbias": True, **options}
    got = backward(backend, arrays, more, cuattn.attention_backward_varlen)
    want = reference.attention_backward_varlen(*arrays, **more)
    close = 1e-12 if op == "float64" else 2e-3
    for one, other in zip(got[:6], want[:6], strict=True):
        np.testing.assert_allclose(one, other, atol=close * np.abs(other).max(initial=1))
    assert not got.dq[padding].any()


@pytest.mark.parametrize("op", OPS)
def test_threads(backend, rng, monkeypatch, op):
    """Bit by bit as without, in whatever order they take their blocks."""
    options = any_options(rng, 2, 4, (300, 500))
    options["bias"] = options["bias"][0]  # whose gradient all heads add to
    problem = Backward(rng, op, batch=2, heads=(4, 2), lengths=(300, 500), **options)
    alone = backward(backend, problem.forward, problem.more)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(blocks, "THREADED", 1)
    monkeypatch.setattr(blocks, "thread_limit", lambda: 3)
    monkeypatch.setattr(blocks, "_pool", None)
    each = blocks.each
    monkeypatch.setattr(blocks, "each", lambda f, b, n: each(f, [*b][::-1] if n else b, n))
    got = backward(backend, problem.forward, problem.more)
    assert [bits([a]) for a in got if a is not None] == [bits([a]) for a in alone if a is not None]


# ---- corners -------------------------------------------------------------------------------------


def test_empty(backend):
    """Zeros; without columns of v there is still a gradient of the lse."""
    for batch, h, g, m, n, d, e in [(0, 2, 1, 3, 4, 5, 6), (2, 0, 0, 3, 4, 5, 6),
                                    (2, 0, 2, 3, 4, 5, 6), (2, 2, 1, 0, 4, 5, 6),
                                    (2, 2, 1, 3, 0, 5, 6), (2, 2, 1, 3, 4, 0, 6),
                                    (2, 2, 1, 3, 4, 5, 0)]:  # fmt: skip
        rng = np.random.default_rng(0)
        q, k, v = (rng.standard_normal(s) for s in
                   [(batch, h, m, d), (batch, g, n, d), (batch, g, n, e)])  # fmt: skip
        options = {"bias": np.zeros((h, m, n)), "sinks": np.zeros(h)}
        y, lse = reference.attention(q, k, v, return_lse=True, **options)
        more = {"grad_lse": np.ones(lse.shape), "return_dbias": True, **options}
        got = backward(backend, (y, q, k, v, y, lse), more)
        want = reference.attention_backward(y, q, k, v, y, lse, **more)
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-14) if other is not None else None
        assert got.dq.any() == bool(got.dq.size and n)


def test_no_score(backend, rng):
    """Of queries whose keys all have a bias of -inf; their lse is -inf, its gradient anything."""
    bias = np.where(rng.random((19, 1)) < 0.3, -INF, np.zeros((19, 44), "f4"))
    problem = Backward(rng, "float32", heads=(2, 1), lengths=(19, 44), bias=bias)
    problem.given["grad_lse"][np.isneginf(problem.given["lse"])] = NAN
    got = backward(backend, problem.forward, problem.more)
    for one, want in zip(got[:4], problem.expected_gradients(), strict=False):
        np.testing.assert_allclose(one, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", ["float16", "float32"])
def test_magnitudes(backend, rng, tiles, op):
    """Scores of hundreds, keys hidden by a bias of any size, caps of any size."""
    hides = rng.choice([0, -1e9, -1e30, np.finfo("f4").min, -INF], (19, 44))
    hides[:, 0] = 0
    how = {"heads": (2, 1), "lengths": (19, 44)}
    verify(backend, rng, op, **how, bias=hides.astype("f4"))
    verify(backend, rng, op, **how, spread=60.0)
    for softcap in (1e-30, 0.1, 1e30):
        verify(backend, rng, op, **how, softcap=softcap, spread=5.0)
    verify(backend, rng, op, **how, scale=0.0)
    verify(backend, rng, op, **how, alibi_slopes=np.array([3.0, 0.0]))


@pytest.mark.parametrize("value", [NAN, INF])
def test_not_finite(backend, rng, tiles, value):
    """In each array that comes in: in the results that the formula has it in, and in no other."""
    how = {"heads": (2, 1), "lengths": (19, 44), "window": (9, 0), "softcap": 5.0}
    for name in ("grad", "q", "k", "v", "y", "lse"):
        problem = Backward(rng, "float32", **how, mask=rng.random((19, 44)) < 0.8)
        arrays = dict(zip(("grad", "q", "k", "v", "y", "lse"), problem.forward, strict=True))
        seen = problem.seen.any(axis=(0, 1))
        i, j = rng.choice(np.argwhere(seen))
        arrays[name][0, 0, j if name in "kv" else i] = value
        got = backward(backend, arrays.values(), problem.more)
        want = reference.attention_backward(*arrays.values(), **problem.more)
        for one, other in zip(got[:3], want[:3], strict=True):
            assert (np.isfinite(one) == np.isfinite(other)).all(), name
            finite = np.isfinite(other)
            np.testing.assert_allclose(one[finite], other[finite], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_memory(backend, monkeypatch, dtype):
    """No matrix of scores, of 36 MB; of 16 bits dk and dv of a head in float32."""
    monkeypatch.setattr(blocks, "THREADED", 1 << 60)
    q = np.zeros((2, 3000, 16), dtype_of(dtype))
    lse = np.zeros((2, 3000), np.float32)
    more = {"is_causal": True, "mask": np.ones((3000, 3000), bool), "alibi_slopes": np.ones(2)}
    more |= {"bias": np.zeros((3000, 3000), np.float16)}
    assert peak(lambda: cuattn.attention_backward(q, q, q, q, q, lse, **more)[:3]) < MEMORY


@pytest.mark.parametrize("op", ["bfloat16", "float32"])
def test_weights_are_at_most_one(backend, rng, op):
    """Where an lse has no digits behind the point, too: no gradient exceeds a sum of its terms."""
    problem = Backward(rng, op, lengths=(37, 83), dims=(64, 64), grad_lse=False)
    grad, q, k, v, *_ = (a.astype(np.float64) for a in problem.forward)
    arrays = [a.astype(problem.q.dtype) for a in (q * 1e4, k * 1e5, v)]
    y, lse = cuattn.attention(*(put(backend, a) for a in arrays), return_lse=True)
    y, lse = map(backend.asnumpy, (y, lse))
    assert (abs(lse) > 1e8).all()
    got = backward(backend, (problem.given["grad"], *arrays, y, lse), {})
    assert all(np.isfinite(one).all() for one in got[:3])
    assert (
        abs(got.dv.astype(np.float64)) <= 1.01 * abs(grad).sum(axis=(1, 2))[:, None, None]
    ).all()
