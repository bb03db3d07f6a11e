"""Attention of a tile of queries over all of its keys, by online softmax.

The scores of one head of k are a matrix: the heads of q that share it lie below each other, so
that one product makes the scores of all. Small matrices of several heads and sequences are worked
on together. What decides how a query is added up are the sizes and options of its sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT32, FLOAT64
from cuattn._attention.numpy_scores import ALL, Heads, key_tiles, seen, to_scores, varies, wide

FEW = 32  # queries of a matrix


def attend(x: Heads, keys: int, acc: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """out (B, G, g * M, E) and lse (B, G, g * M, 1) of a tile, in float32 or float64.

    Every product takes `keys` keys. Queries that float32 does not hold are computed in float64.
    """
    batch, heads, group, rows, dim = x.q.shape
    shape = batch, heads, group * rows
    changed = is_changed(x)  # scores may be -inf
    by_rows = varies(x.mask) or varies(x.bias) or bool(x.score or x.predicate)
    q = (wide(x.q, acc) * acc.type(x.scale)).reshape(*shape, dim)
    m: Any = None
    bad: Any = None  # queries with a product that is not finite
    if x.sinks is not None:
        m = np.empty((*shape, 1), acc)
        m.reshape(x.q.shape[:4])[...] = x.sinks
        l, o = np.exp(m - _shift(m)), np.zeros((*shape, x.v.shape[3]), acc)  # noqa: E741
    for j in key_tiles(x, keys):
        s = products(q, usable(x.k[:, :, j], acc), by_rows)
        if not np.minimum.reduce(s, axis=None) > -np.inf:
            found = (~np.isfinite(s) & seen(x, s, j)).any(axis=3, keepdims=True)
            bad = found if bad is None else bad | found
        hides = to_scores(s, x, j)
        old, m = m, np.maximum.reduce(s, axis=3, keepdims=True)
        if old is not None:
            np.maximum(old, m, out=m)
        shift = _shift(m) if changed or hides or bad is not None else m
        s -= shift
        np.exp(s, out=s)
        if x.slopes is not None or x.score is not None:  # far keys
            flush(s)
        total = np.matmul(s, _ones(s.shape[3], acc))[..., None]
        sees = functools.partial(seen, x, s, j) if hides else None
        weighed = weigh(s, usable(x.v[:, :, j], acc), sees)
        if old is None:
            l, o = total, weighed  # noqa: E741
        else:
            rescale = np.exp(old - shift)
            l = rescale * l + total  # noqa: E741
            o *= rescale
            o += weighed
    if m is None:
        return np.zeros((*shape, x.v.shape[3]), acc), np.full((*shape, 1), -np.inf, acc)
    lse = np.log(l)
    lse += m
    if bad is None and np.isfinite(lse).all() and np.isfinite(o).all():
        o /= l
        return o, lse
    return _mended(x, keys, o, l, lse, np.False_ if bad is None else bad)


def is_changed(x: Heads) -> bool:
    """Whether something is added to scores, or more."""
    return x.bias is not None or x.slopes is not None or x.score is not None


def _shift(m: np.ndarray) -> np.ndarray:
    """What is safe to subtract: ``-inf - (-inf)`` would be NaN."""
    return np.where(m == -np.inf, m.dtype.type(0), m)


def flush(p: np.ndarray) -> None:
    """Subnormal numbers to 0, as kernels have it: products with them take 10 times as long."""
    info = np.finfo(p.dtype)
    unit = p.dtype.type(info.smallest_normal / info.eps)  # its last place is the smallest normal
    p += unit
    p -= unit


# ---- Products ----


@functools.lru_cache(maxsize=64)
def _ones(n: int, acc: np.dtype) -> np.ndarray:
    """What a row is multiplied with to be added up: BLAS is faster at that than NumPy."""
    return np.ones(n, acc)


def usable(a: np.ndarray, acc: np.dtype) -> np.ndarray:
    """k or v as BLAS takes it: as it is, or a copy."""
    return a if is_usable(a, acc) else np.ascontiguousarray(wide(a, acc))


def is_usable(a: np.ndarray, acc: np.dtype) -> bool:
    """Whether BLAS takes it as it is."""
    (rows, row), size = a.strides[-2:], a.itemsize
    whole = row == size and rows % size == 0 and rows >= a.shape[-1] * size
    return whole and a.dtype == acc and a.flags.aligned


def products(q: np.ndarray, k: np.ndarray, by_rows: bool) -> np.ndarray:
    """``q @ k.T`` (B, G, R, N). Queries lie inside, which leaves NumPy no short rows to reduce,
    but where they are few, or where what is added to them lies `by_rows`."""
    (*lead, rows, _), columns = q.shape, k.shape[2]
    if rows <= FEW and 8 * rows <= columns:  # BLAS had rather take k for the left operand
        return np.ascontiguousarray(np.matmul(k, q.swapaxes(2, 3)).swapaxes(2, 3))
    s = None if by_rows else np.empty((*lead, columns, rows), q.dtype).swapaxes(2, 3)
    return np.matmul(q, k.swapaxes(2, 3), out=s)


def weigh(p: np.ndarray, v: np.ndarray, seen: Callable[[], np.ndarray] | None) -> np.ndarray:
    """``p @ v`` in which nobody multiplies with a key that is not seen: 0 * NaN is not 0.

    `seen` tells which keys each row sees; None: all.
    """
    o = np.matmul(p, v)
    if seen is None or np.isfinite(o).all():
        return o
    finite, sees = np.isfinite(v), seen()
    o = np.matmul(p, np.where(finite, v, v.dtype.type(0)))
    for b, h, key in np.argwhere(~finite.all(axis=3) & sees.any(axis=2)):
        rows, rest = sees[b, h, :, key], np.where(finite[b, h, key], 0, v[b, h, key])
        o[b, h, rows] += p[b, h, rows, key, None] * rest
    return o


# ---- What float32 does not hold ----


def _mended(
    x: Heads,
    keys: int,
    o: Any,
    l: Any,  # noqa: E741
    lse: Any,
    bad: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """out and lse: 0 and -inf of queries that see nothing, and what is not finite from float64."""
    acc = o.dtype
    nothing = l == 0
    if acc == FLOAT32 and is_changed(x):
        nothing &= ~_has_scores(x, keys)  # or float32 has made them infinite
    o /= l
    np.copyto(o, 0, where=nothing)
    if acc == FLOAT64:
        return o, lse
    lost = bad | ~(np.isfinite(lse) | nothing)
    for b, h in np.argwhere((lost | ~np.isfinite(o)).any(axis=(2, 3))):
        head = x.tile(slice(b, b + 1), slice(h, h + 1), ALL)
        exact, exact_lse = attend(head, max(1, keys // 4), FLOAT64)
        np.copyto(lse[b, h], exact_lse[0, 0], where=lost[b, h], casting="unsafe")
        infinite = lost[b, h] | ~np.isfinite(o[b, h])
        np.copyto(o[b, h], exact[0, 0], where=infinite, casting="unsafe")
    return o, lse


def _has_scores(x: Heads, keys: int) -> np.ndarray:
    """Which queries see a key whose score is not -inf in float64, (B, G, g * M, 1)."""
    batch, heads, group, rows, _ = x.q.shape
    found = np.zeros((batch, heads, group * rows, 1), bool)
    q = (wide(x.q, FLOAT64) * x.scale).reshape(batch, heads, group * rows, x.q.shape[4])
    for j in key_tiles(x, keys):
        s = np.zeros((batch, heads, group * rows, j.stop - j.start))
        if x.score is not None:  # what it makes of a score is anything
            s = products(q, usable(x.k[:, :, j], FLOAT64), True)
        to_scores(s, x, j)
        found |= (s != -np.inf).any(axis=3, keepdims=True)
    return found
