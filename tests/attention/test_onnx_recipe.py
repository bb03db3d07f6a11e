"""Attention and TensorScatter of ONNX, as cuattn/reference/README.md writes them with our
functions: against what the operators' text says (opset 24), score by score.
"""

from __future__ import annotations

import types
from pathlib import Path

import numpy as np
import pytest
from test_readme import block

README = Path(__file__).resolve().parents[2] / "cuattn" / "reference" / "README.md"
INF = np.inf


@pytest.fixture
def recipe(backend):
    """The functions of the recipe, on the backend's arrays."""
    found = types.SimpleNamespace()
    exec(block(README.read_text(encoding="utf-8"), "python", "onnx"), vars(found))
    found.np = backend.xp
    return found


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def attend(q, k, v, mask, past_k, past_v, lens, is_causal, scale, softcap):
    """Y in float64; a row without a key is 0."""
    k, v = (b if a is None else np.concatenate([a, b], 2) for a, b in ((past_k, k), (past_v, v)))
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1).astype(float) for a in (k, v))
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = factor * (q.astype(float) @ k.swapaxes(2, 3))
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    for b, h, i, j in np.ndindex(scores.shape):
        first = 0 if past_k is None else past_k.shape[2]  # the key of query 0 that is its own
        if lens is not None:
            first = lens[b] - q.shape[2]
            scores[b, h, i, j] += 0 if j < lens[b] else -INF
        if is_causal and j > i + first:
            scores[b, h, i, j] = -INF
        if mask is not None:
            own = np.broadcast_to(mask, (*scores.shape[:3], mask.shape[-1]))[b, h, i]
            value = own[j] if j < len(own) else (False if mask.dtype == bool else -INF)
            scores[b, h, i, j] += (0 if value else -INF) if mask.dtype == bool else value
    m = scores.max(-1, keepdims=True)
    p = np.exp(scores - np.where(m == -INF, 0, m))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300) @ v, k, v


CASES = {
    "plain": {},
    "past": {"past": 6},
    "causal": {"is_causal": 1},
    "causal, past": {"is_causal": 1, "past": 6},
    "causal, past, more keys than queries": {"is_causal": 1, "past": 2, "keys": 9},
    "lengths": {"lens": [7, 0, 3], "keys": 8},
    "causal, lengths": {"lens": [7, 5, 8], "keys": 8, "is_causal": 1},
    "numbers": {"scale": 0.7, "softcap": 1.5},
    "bool mask": {"mask": lambda rng: rng.random((5, 5)) < 0.7},
    "short bool mask": {"mask": lambda rng: rng.random((3, 1, 5, 4)) < 0.7, "past": 3},
    "float mask": {"mask": lambda rng: normal(rng, 4, 5, 5), "softcap": 2.0},
    "short float mask": {"mask": lambda rng: normal(rng, 3, 4, 5, 6), "past": 6, "is_causal": 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attention(recipe, backend, rng, case):
    case = dict(case)
    past, keys, lens = (case.pop(n, default) for n, default in zip(
        ("past", "keys", "lens"), (0, 5, None), strict=True))  # fmt: skip
    mask = case.pop("mask", lambda rng: None)(rng)
    q, k, v = normal(rng, 3, 4, 5, 8), normal(rng, 3, 2, keys, 8), normal(rng, 3, 2, keys, 6)
    pasts = [normal(rng, 3, 2, past, n) if past else None for n in (8, 6)]
    lens = None if lens is None else np.array(lens)
    numbers = {"is_causal": 0, "scale": None, "softcap": 0.0, **case}
    want, *_ = attend(q, k, v, mask, *pasts, lens, **numbers)
    given = [a if a is None else backend.asarray(a) for a in (q, k, v, mask, *pasts, lens)]
    y, present_key, present_value = map(backend.asnumpy, recipe.attention(*given, **case))
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)
    for present, old, new in ((present_key, pasts[0], k), (present_value, pasts[1], v)):
        np.testing.assert_array_equal(
            present, new if old is None else np.concatenate([old, new], 2)
        )


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(recipe, backend, rng, mode):
    cache, update = normal(rng, 3, 2, 7, 4), normal(rng, 3, 2, 5, 4)
    writes = np.array([0, 2, 1]) if mode == "linear" else np.array([5, 7, 23])
    want = cache.copy()
    for b, i in np.ndindex(3, 5):
        want[b, :, (writes[b] + i) % 7] = update[b, :, i]
    given = map(backend.asarray, (cache, update, writes))
    got = recipe.tensor_scatter(*given, mode=mode)
    np.testing.assert_array_equal(backend.asnumpy(got), want)


def test_both_at_once(recipe, backend, rng):
    """TensorScatter twice and Attention are one call."""
    q, k, v = normal(rng, 3, 4, 2, 8), normal(rng, 3, 2, 2, 8), normal(rng, 3, 2, 2, 6)
    caches, writes = [normal(rng, 3, 2, 9, n) for n in (8, 6)], np.array([0, 4, 7])
    filled = [a.copy() for a in caches]
    for cache, new in zip(filled, (k, v), strict=True):
        for b, at in enumerate(writes):
            cache[b, :, at : at + 2] = new[b]
    want, *_ = attend(q, *filled, None, None, None, writes + 2, 1, None, 0.0)
    caches = [backend.asarray(a) for a in caches]
    given = [*map(backend.asarray, (q, k, v)), *caches, backend.asarray(writes)]
    got = recipe.scatter_and_attend(*given, is_causal=True)
    np.testing.assert_allclose(backend.asnumpy(got), want, rtol=1e-5, atol=1e-5)
    for cache, expected in zip(caches, filled, strict=True):
        np.testing.assert_array_equal(backend.asnumpy(cache), expected)
