"""Draws without replacement, by Gumbel noise; the rules are those of `cuattn.reference`.

Philox is of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011), the
Gumbel-top-k trick of Kool et al., "Stochastic beams and where to find them" (arXiv:1903.06059).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn._arrays.results import Sample, SampleState
from cuattn.reference._numerics import Option, log_sum, quiet, result, results, row_max, shift, wide

LOW, BITS = np.uint64(0xFFFFFFFF), np.uint64(32)
M0, M1, W0, W1 = map(np.uint64, (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85))
LN2 = np.float32(0.6931472)
# Minimax polynomials, from the constant up: -log(1 - v / 2) / v and log(1 + x) / x.
EXPONENTIAL = "0.49999994 0.12500913 0.04148284 0.017015588 0.0011882656 0.012272065 -0.008449318 "
EXPONENTIAL += "0.0046285773"
LOGARITHM = "1 -0.49999988 0.33334187 -0.25002074 0.19956833 -0.16562402 0.14952284 -0.14366786 "
LOGARITHM += "0.0872224"


def philox(counter: Any, key: Any) -> np.ndarray:
    """Philox4x32-10: four words, on a new last axis, of each counter (four words) and key (two)."""
    c0, c1, c2, c3, k0, k1 = (np.asarray(word, np.uint64) for word in (*counter, *key))
    for _ in range(10):
        p0, p1 = c0 * M0, c2 * M1
        c0, c1, c2, c3 = p1 >> BITS ^ c1 ^ k0, p1 & LOW, p0 >> BITS ^ c3 ^ k1, p0 & LOW
        k0, k1 = k0 + W0 & LOW, k1 + W1 & LOW
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), -1).astype(np.uint32)


def polynomial(coefficients: str, x: np.ndarray) -> np.ndarray:
    """Horner's rule in the type of x, every operation rounded."""
    *rest, y = map(x.dtype.type, coefficients.split())
    for c in reversed(rest):
        y = y * x + c
    return y


def gumbel(word: np.ndarray) -> np.ndarray:
    """``-log(E)``, where ``E = -log(1 - (word + 1/2) / 2**32)``: float32, the same bits everywhere.

    The `ones` that the word begins with are the integer part of E / log(2).
    """
    ones = 32 - np.frexp((~word | 1).astype(np.float64))[1].astype(np.uint32)
    v = ((word << ones << 1) | (1 << ones)).astype(np.float32) * np.float32(2**-32)
    E = polynomial(EXPONENTIAL, v) * v + ones.astype(np.float32) * LN2
    fraction, exponent = np.frexp(E)
    low = fraction < np.float32(0.70710677)
    x = np.where(low, 2 * fraction, fraction) - np.float32(1)
    exponent = (exponent - low).astype(np.float32)
    return -(polynomial(LOGARITHM, x) * x + exponent * LN2)


def noise(index: np.ndarray, seed: Any, offset: Any, row: Any) -> np.ndarray:
    """Gumbel noise of elements, all numbers being uint64."""
    counter = index // 4, row & LOW, offset & LOW, offset >> BITS ^ row >> BITS
    words = philox(counter, (seed & LOW, seed >> BITS))
    place = np.broadcast_to(index % 4, words.shape[:-1]).astype(np.int64)
    return gumbel(np.take_along_axis(words, place[..., None], -1)[..., 0])


def _keys(
    x: Any, axis: Any, scale: Any, where: Any, seed: Any, offset: Any, rows: Any, first: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores, rounded to float32 (float64 for float64), these with noise, both with rows on the
    last axis; and the axis."""
    x = np.asarray(x)
    acc = np.dtype(np.float32) if x.itemsize <= 4 else x.dtype
    s = wide(x.astype(acc) * np.asarray(1 if scale is None else scale, acc))
    s = s if where is None else np.where(where, s, -np.inf)
    if axis is None or not s.ndim:
        s, axis = s.reshape(-1), 0
        seed, offset, rows = (
            one if one is None else np.ravel(one)[0] for one in (seed, offset, rows)
        )
    axis %= s.ndim
    kept = (*s.shape[:axis], 1, *s.shape[axis + 1 :])
    if rows is None:
        rows = np.zeros(kept) if np.ndim(seed) else np.arange(np.prod(kept)).reshape(kept)
    numbers = (
        np.broadcast_to(np.asarray(one).astype(np.uint64), kept) for one in (seed, offset, rows)
    )
    index = np.arange(first, first + s.shape[axis], dtype=np.uint64)
    s = np.moveaxis(s, axis, -1)
    return s, s + noise(index, *(np.moveaxis(one, axis, -1) for one in numbers)), axis


def _kept(s: np.ndarray, top_k: int | None, top_p: float | None, min_p: float | None) -> np.ndarray:
    """Which elements may be drawn."""
    m, order = row_max(s, -1), np.argsort(-s, -1, kind="stable")
    t = np.take_along_axis(s, order, -1)
    keep = (t > -np.inf) & (m < np.inf)
    if top_k is not None:
        keep[..., top_k:] = False
    if top_p is not None and top_p < 1:
        p = np.where(keep, np.exp(t - m), 0)
        keep &= np.cumsum(p, -1) - p < top_p * np.sum(p, -1, keepdims=True)  # of those before
    if min_p is not None:
        keep &= t >= m + np.log(min_p)
    found = np.empty_like(keep)
    np.put_along_axis(found, order, keep, -1)
    return found


def _drawn(s: np.ndarray, z: np.ndarray, keep: np.ndarray, num: int) -> list[np.ndarray]:
    """Keys, scores and indices of the num largest keys; -inf, -inf and -1 where there are fewer."""
    z = np.where(keep, z, -np.inf)
    lack = [(0, 0)] * (s.ndim - 1) + [(0, max(num - s.shape[-1], 0))]
    order = np.argsort(-z, -1, kind="stable")[..., :num]
    values, logits = (np.take_along_axis(part, order, -1) for part in (z, s))
    missing = values == -np.inf
    logits, indices = np.where(missing, -np.inf, logits), np.where(missing, -1, order)
    fills = (values, -np.inf), (logits, -np.inf), (indices, -1)
    return [np.pad(part, lack, constant_values=fill) for part, fill in fills]


@quiet
def sample(
    x: ArrayLike,
    num: int = 1,
    /,
    *,
    seed: ArrayLike,
    offset: ArrayLike = 0,
    axis: int | None = -1,
    scale: Option = None,
    where: Option = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    return_log_prob: bool = False,
    out: Any = None,
) -> Any:
    """Indices of the num largest ``scale * x + g`` of each row, g being Gumbel noise, among the
    elements that pass the filters; and their `log_softmax`."""
    s, z, axis = _keys(x, axis, scale, where, seed, offset, None, 0)
    _, logits, indices = _drawn(s, z, _kept(s, top_k, top_p, min_p), num)
    indices = np.moveaxis(indices, -1, axis)
    if not return_log_prob:
        return result(indices, out=out)
    m = row_max(s, -1)
    bad = ~(m < np.inf) | ((m == -np.inf) & (where is None and s.shape[-1] > 0))
    log_prob = np.where(bad, np.nan, logits - shift(m) - np.where(m > -np.inf, log_sum(s, -1), 0))
    return Sample(*results((indices, np.moveaxis(log_prob, -1, axis)), out))


@quiet
def sample_state(
    x: ArrayLike,
    num: int = 1,
    /,
    *,
    seed: ArrayLike,
    offset: ArrayLike = 0,
    axis: int | None = -1,
    scale: Option = None,
    rows: Option = None,
    index_offset: int = 0,
    out: Any = None,
) -> SampleState:
    """The state of each row, and its num largest ``scale * x + g``."""
    s, z, _ = _keys(x, axis, scale, None, seed, offset, rows, index_offset)
    values, logits, indices = _drawn(s, z, _kept(s, None, None, None), num)
    indices = np.where(indices < 0, -1, indices + index_offset)
    m = row_max(s, -1)
    l = np.sum(np.exp(s - shift(m)), -1)  # noqa: E741
    return SampleState(*results((m[..., 0], l, values, logits, indices), out))
