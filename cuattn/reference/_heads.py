"""Attention of one head in float64, and all heads one by one.

A part of `cuattn.reference`, whose rules hold here. Arrays of several heads are canonical: q
(B, H, S_q, D), k and v (B, H_kv, S_k, ·).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from cuattn.reference._dual import Dual, as_dual
from cuattn.reference._numerics import wide


class Head(NamedTuple):
    """One head of one sequence without its padding: M queries, N keys."""

    q: Any  # (M, D)
    k: Any  # (N, D)
    v: Any  # (N, D_v)
    mask: Any  # (M, N), True: attend
    bias: Any  # (M, N)
    offset: int  # place of query 0 among the keys
    slope: Any
    sink: Any  # -inf: none
    scale: float
    softcap: float
    left: int | None
    right: int | None
    score: Any = None  # of scores, and of places of queries and keys


# -- one head ------------------------------------------------------------------------------------


def _distance(head: Head) -> np.ndarray:
    """How far key j stands behind the place of query i, (M, N)."""
    rows, columns = np.arange(len(head.q)), np.arange(len(head.k))
    return columns - (rows[:, None] + head.offset)


def _scores(head: Head, chained: bool = False) -> tuple[Any, Any, Any, Any]:
    """The score of every query and key, (M, N), its derivative by what is capped, that of the score
    expression by what it changes, if `chained`, and what it changes."""
    s, chain, own = head.scale * (wide(head.q) @ wide(head.k).T), 1.0, np.ones(())
    if head.softcap:
        e = np.exp(-2 * abs(s / head.softcap))
        s, chain = head.softcap * np.tanh(s / head.softcap), 4 * e / (1 + e) ** 2
    s = plain = s + wide(head.bias) - wide(head.slope) * abs(_distance(head))
    if head.score:
        rows, columns = np.arange(len(head.q)), np.arange(len(head.k))
        of = Dual(s, 1.0) if chained else s
        found = as_dual(head.score(of, rows[:, None] + head.offset, columns))
        s = np.broadcast_to(found.value, s.shape)
        own = np.where(s == -np.inf, 0, 0 if found.d is None else found.d)
    return s, chain, own, plain


def _sees(head: Head) -> np.ndarray:
    """Which keys each query sees, (M, N)."""
    distance = _distance(head)
    after = True if head.left is None else distance >= -head.left
    before = True if head.right is None else distance <= head.right
    return head.mask & after & before


def seen_scores(head: Head) -> np.ndarray:
    """The score of every query and key, (M, N); -inf where it is hidden."""
    return np.where(_sees(head), _scores(head)[0], -np.inf)


def _weigh(p: np.ndarray, visible: np.ndarray, v: np.ndarray) -> np.ndarray:
    """``p @ v`` in which nobody multiplies with a key that is not seen: 0 * NaN is not 0."""
    finite = np.isfinite(v)
    out = np.where(visible, p, 0) @ np.where(finite, v, 0)
    for j in np.flatnonzero(~finite.all(axis=1)):
        out[visible[:, j]] += p[visible[:, j], j, None] * np.where(finite[j], 0, v[j])
    return out


def shift(m: np.ndarray) -> np.ndarray:
    """What is safe to subtract: ``-inf - (-inf)`` would be NaN."""
    return np.where(m == -np.inf, 0, m)


def dense(head: Head) -> tuple[Any, Any]:
    """out (M, D_v) and lse (M,): the formula."""
    visible = _sees(head)
    s = np.where(visible, _scores(head)[0], -np.inf)
    m = np.max(s, axis=1, keepdims=True, initial=head.sink)
    p = np.exp(s - shift(m))
    l = np.sum(p, axis=1, keepdims=True, where=visible)  # noqa: E741
    l = l + np.exp(head.sink - shift(m))  # noqa: E741
    o = _weigh(p, visible, wide(head.v))
    return np.where(l == 0, 0, o / l), np.where(l == 0, -np.inf, m + np.log(l))[:, 0]


class HeadGradients(NamedTuple):
    """Gradients of one head; k and v have their sums over the heads that share them."""

    dq: Any  # (M, D)
    dk: Any  # (N, D)
    dv: Any  # (N, D_v)
    dbias: Any  # (M, N)
    dslope: Any
    dsink: Any
    dscore: Any  # (M, N), by what the score expression returns
    scores: Any  # (M, N), of which the expression makes that


def dense_backward(head: Head, grad: Any, y: Any, lse: Any, grad_lse: Any) -> HeadGradients:
    """The formula; grad and y (M, D_v), lse and grad_lse (M,)."""
    q, k, v, grad, y = map(wide, (head.q, head.k, head.v, grad, y))
    visible = _sees(head)
    s, chain, own, plain = _scores(head, True)
    nothing = lse == -np.inf
    lse = np.where(nothing, np.inf, wide(lse))
    p = np.where(visible, np.exp(np.minimum(s - lse[:, None], 0)), 0)  # lse has been rounded
    delta = np.where(nothing, 0, np.sum(grad * y, axis=1) - grad_lse)
    dscore = np.where(visible, p * (grad @ v.T - delta[:, None]), 0)
    ds = np.where(visible, own * dscore, 0)
    dx = head.scale * ds * chain
    return HeadGradients(
        dq=_weigh(dx, visible, k),
        dk=_weigh(dx.T, visible.T, q),
        dv=_weigh(p.T, visible.T, grad),
        dbias=ds,
        dslope=-np.sum(ds * abs(_distance(head))),
        dsink=-np.sum(np.exp(np.minimum(head.sink - lse, 0)) * delta),
        dscore=dscore,
        scores=plain,
    )


def dense_column_sums(head: Head, lse: Any) -> np.ndarray:
    """The formula; lse (M,), the result (N,)."""
    lse = np.where(lse == -np.inf, np.inf, wide(lse))
    p = np.exp(np.minimum(_scores(head)[0] - lse[:, None], 0))  # lse has been rounded
    return np.sum(p, axis=0, where=_sees(head))


# -- all of them ---------------------------------------------------------------------------------


def each_head(
    q: Any,
    k: Any,
    v: Any,
    mask: Any,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    q_offset: Any,
    q_lens: Any,
    kv_lens: Any,
    *numbers: Any,
    score: Any = None,
) -> Iterator[tuple[int, int, Head]]:
    """Batch, head and `Head` of canonical arrays; `numbers` are the last four fields of `Head` but
    for the `score`, which is handed b and h, too."""
    (batch, heads, rows, _), (_, heads_kv, columns, _) = q.shape, k.shape
    shape = (batch, heads, rows, columns)
    mask = np.broadcast_to(True if mask is None else mask, shape)
    bias = np.broadcast_to(0 if bias is None else bias, shape)
    slopes = np.broadcast_to(0 if alibi_slopes is None else alibi_slopes, (batch, heads))
    sinks = np.broadcast_to(-np.inf if sinks is None else wide(sinks), heads)
    q_lens = np.clip(np.broadcast_to(rows if q_lens is None else q_lens, batch), 0, rows)
    kv_lens = np.clip(np.broadcast_to(columns if kv_lens is None else kv_lens, batch), 0, columns)
    offsets = np.broadcast_to(kv_lens - q_lens if q_offset is None else q_offset, batch)
    for b, h in np.ndindex(batch, heads):
        m, n, g = int(q_lens[b]), int(kv_lens[b]), h * heads_kv // heads
        arrays = q[b, h, :m], k[b, g, :n], v[b, g, :n], mask[b, h, :m, :n], bias[b, h, :m, :n]
        own = score and partial(_of_head, score, b, h)
        yield (
            b,
            h,
            Head(*arrays, int(offsets[b]), slopes[b, h], sinks[h], *numbers)._replace(score=own),
        )


def _of_head(score: Any, b: int, h: int, s: Any, q: Any, k: Any) -> Any:
    return score(s, b, h, q, k)


def cut(array: Any, b: int, rows: int, columns: int, fill: Any) -> Any:
    """Mask or bias of sequence b, (1, H or 1, rows, columns); `fill` is what it lacks."""
    if array is None:
        return None
    array = np.asarray(array)[(None,) * (4 - np.ndim(array))]
    array = array[b : b + 1] if len(array) > 1 else array
    m, n = (
        most if size == 1 else min(size, most)
        for size, most in zip(array.shape[2:], (rows, columns), strict=True)
    )
    part = np.broadcast_to(array[:, :, :m, :n], (*array.shape[:2], m, n))
    if (m, n) == (rows, columns):
        return part
    return np.pad(part, [(0, 0), (0, 0), (0, rows - m), (0, columns - n)], constant_values=fill)


def of_sequence(array: Any, b: int) -> Any:
    """What an option for each sequence is in sequence b, (1,) or (1, H); a number stays."""
    return array if array is None or np.ndim(array) == 0 else array[b : b + 1]


def segments(*ends: Any) -> Iterator[tuple[slice, ...]]:
    """The slices of each sequence."""
    for b in range(len(ends[0]) - 1):
        yield tuple(slice(int(e[b]), int(e[b + 1])) for e in ends)


def nothing(shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """out and lse of queries that see nothing."""
    return np.zeros(shape, dtype), np.full(shape[:-1], -np.inf, dtype)
