"""Attention over a KV cache whose parts are hard to put together: the largest score anywhere, parts
without keys between others, and pages that are far apart."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from attention_cases import OPS
from cases import FAR, draw, untouched
from kvcache_cases import Cached

import cuattn
from cuattn import reference

N = 700  # keys: several parts of 128, the last one shorter
SCORES = {
    "rising": np.arange(N) * 0.5,
    "falling": np.arange(N)[::-1] * 0.5,
    "last": np.where(np.arange(N) < N - 1, -40.0, 40.0),
    "first of the last part": np.where(np.arange(N) == 640, 60.0, -60.0),
    "equal": np.full(N, 3.0),
    "far apart": np.where(np.arange(N) % 97 == 5, 1e4, -1e4),
    "low": np.full(N, -1e4),
}


def call(op, scores, v, **options):
    """One query whose scores these are."""
    q = np.zeros((1, 1, 1, 64), op.dtype)
    q[..., 0] = 1
    k = np.zeros((1, 1, len(scores), 64), op.dtype)
    k[0, 0, :, 0] = scores
    how = {"scale": 1.0, "return_lse": True, "precision": op.precision, **options}
    return (q, k, v), how


class Op:
    def __init__(self, name):
        problem = Cached(np.random.default_rng(0), name, lens=[1]).problem
        self.dtype, self.precision = problem.q.dtype, problem.options.get("precision")


@pytest.mark.parametrize("split_size", [None, 128])
@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES.keys())
@pytest.mark.parametrize("op", OPS)
def test_where_the_largest_score_is(backend, op, scores, split_size):
    """Ones stay ones, in kernels of float32 and float64 to the last bit."""
    op = Op(op)
    exact = scores.astype(op.dtype).astype(float)
    v = np.ones((1, 1, N, 64), op.dtype)
    arrays, how = call(op, scores, v, split_size=split_size)
    out, lse = cuattn.attention_kvcache(*map(backend.asarray, arrays), **how)
    out, lse = backend.asnumpy(out).astype(float), float(backend.asnumpy(lse).item())
    exactly = op.dtype.itemsize > 2 and backend.name != "numpy"
    assert abs(out - 1).max() <= (0 if exactly else 4 * ml_dtypes.finfo(op.dtype).eps)
    want = exact.max() + np.log(np.exp(exact - exact.max()).sum())
    assert abs(lse - want) <= 4e-7 * max(1, abs(want))


@pytest.mark.parametrize("page_size", [16, 128])
def test_parts_without_keys(backend, rng, page_size):
    """Pages that are missing at the begin, between others, and at the end."""
    pages = N // page_size + 1
    first, last = 256 // page_size, 384 // page_size
    for missing in (range(first), range(first, last), range(last, pages), range(1, pages)):
        gone = [(0, page) for page in missing]
        how = {"lens": [N, 5], "page_size": page_size, "missing": gone, "heads": (2, 1)}
        cached = Cached(rng, **how)
        for split_size in (None, 128):
            cached.problem.check(*cached.run(backend, split_size=split_size))


@pytest.mark.parametrize("columns", [1, 2], ids=["chunks", "elements"])
def test_pages_that_are_far_apart(backend, rng, columns):
    """More than 2^31 elements, with the keys of a sequence in both."""
    x = draw(rng, (2, 4, 64), "float16", spread=1)
    memory = untouched(backend, FAR + 4 * 64 * columns, np.float16)
    strides = (2 * FAR, 0, 128 * columns, 2 * columns)
    cache = backend.xp.lib.stride_tricks.as_strided(memory, (2, 1, 4, 64), strides)
    cache[:, 0] = backend.asarray(x)
    q = draw(rng, (1, 1, 1, 64), "float16", spread=1)
    table, lens = (backend.asarray(np.array(a)) for a in ([[1, 0]], [7]))
    out = cuattn.attention_kvcache(backend.asarray(q), cache, cache, kv_lens=lens, page_table=table)
    k = x[::-1].reshape(1, 1, 8, 64)[:, :, :7].astype(float)
    want = reference.attention(q.astype(float), k, k)
    assert abs(backend.asnumpy(out).astype(float) - want).max() <= 2.0**-9 * abs(k).max()
