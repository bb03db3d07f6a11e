"""Losses of labels, entropies and their states; the rules are those of `cuattn.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cuattn._arrays.results import LogitsState
from cuattn.reference._numerics import (
    Axis,
    Option,
    log_sum,
    quiet,
    result,
    results,
    row_max,
    scores,
    shift,
    wide,
)
from cuattn.reference._softmax import log_softmax, logsumexp


def _rows(x: ArrayLike, axis: int | None, scale: Option) -> np.ndarray:
    """The scores, each row along the last axis."""
    s = scores(x, scale, None)
    return np.moveaxis(s, axis, -1) if s.ndim and axis is not None else s.reshape(-1)


def _at(s: np.ndarray, labels: ArrayLike, first: int = 0) -> np.ndarray:
    """The element of each row that its label names, if the first one has the label `first`; NaN
    where there is none."""
    labels, n = np.asarray(labels), s.shape[-1]
    inside = (labels >= first) & (labels < first + n)
    index = np.where(inside, np.where(inside, labels, first).astype(np.int64) - first, n)
    nothing = np.full((*s.shape[:-1], 1), np.nan)
    return np.take_along_axis(np.concatenate((s, nothing), -1), index[..., None], -1)[..., 0]


def _tilt(s: np.ndarray, m: np.ndarray, axis: Axis) -> np.ndarray:
    """``sum(exp(s - m) * (s - m))``; a term whose exponential is 0 is 0."""
    d = s - shift(m)
    e = np.exp(d)
    return np.sum(np.where(e == 0, 0, e * d), axis=axis, keepdims=True)


@quiet
def cross_entropy(
    x: ArrayLike,
    labels: ArrayLike,
    /,
    *,
    axis: int | None = -1,
    scale: Option = None,
    ignore_index: int = -100,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """``-log_softmax(x)`` at the label of each row: 0 where it is `ignore_index`, NaN where the row
    has no such element. With ``return_lse=True`` also the log-sum-exp of every row.
    """
    s = _rows(x, axis, scale)
    loss = np.where(np.asarray(labels) == ignore_index, 0, -_at(log_softmax(s), labels))
    if return_lse:
        return tuple(results((loss, logsumexp(s, -1)), out))
    return result(loss, out=out)


@quiet
def cross_entropy_backward(
    grad: ArrayLike,
    x: ArrayLike,
    labels: ArrayLike,
    lse: ArrayLike,
    /,
    *,
    axis: int | None = -1,
    scale: Option = None,
    ignore_index: int = -100,
    index_offset: int | None = None,
    out: Any = None,
) -> Any:
    """Gradient of `cross_entropy` in x: ``scale * grad * (exp(scale * x - lse) - [label])``. Zeros
    where the label is ignored, else NaN where the row has no such element or lse is not finite.
    With `index_offset` x is a part of the rows, and a label may be in another one.
    """
    x, labels, lse = wide(x), np.asarray(labels), wide(lse)
    axis = axis if x.ndim and axis is not None else None
    rows = (1,) * x.ndim if axis is None else np.expand_dims(np.empty(lse.shape), axis).shape
    factor = np.broadcast_to(1 if scale is None else scale, rows).reshape(lse.shape)
    s = _rows(x, axis, scale)
    p = np.exp(s - lse[..., None])
    hit = np.arange(s.shape[-1]) + (index_offset or 0) == labels[..., None]
    dx = (factor * grad)[..., None] * (p - hit)
    inside = (labels >= 0) & (labels < s.shape[-1]) | (index_offset is not None)
    known = np.isfinite(lse) & inside
    dx = np.where(known[..., None], dx, np.nan)
    dx = np.where((labels == ignore_index)[..., None], 0, dx)
    return result(dx.reshape(x.shape) if axis is None else np.moveaxis(dx, -1, axis), out=out)


@quiet
def entropy(
    x: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    keepdims: bool = False,
    out: Any = None,
) -> Any:
    """``-sum(p * log(p))``, p = softmax(x), over the elements that take part: 0 without any."""
    s = scores(x, scale, where)
    m = row_max(s, axis)
    l = np.sum(np.exp(s - shift(m)), axis=axis, keepdims=True)  # noqa: E741
    h = log_sum(s, axis) - _tilt(s, m, axis) / l
    part = np.broadcast_to(True if where is None else where, s.shape)
    h = np.where(np.any(part, axis=axis, keepdims=True), h, 0)
    return result(h if keepdims else np.squeeze(h, axis), out=out)


@quiet
def logits_state(
    x: ArrayLike,
    labels: ArrayLike,
    /,
    *,
    axis: int | None = -1,
    scale: Option = None,
    index_offset: int = 0,
    out: Any = None,
) -> LogitsState:
    """`softmax_state` of each row, ``sum(exp(s - m) * (s - m))``, and the score of its label."""
    s = _rows(x, axis, scale)
    m = row_max(s, -1)
    l = np.sum(np.exp(s - shift(m)), axis=-1)  # noqa: E741
    t = np.where(np.isinf(m), l[..., None], _tilt(s, m, -1))
    found = (m[..., 0], l, t[..., 0], _at(s, labels, index_offset))
    return LogitsState(*results(found, out))
