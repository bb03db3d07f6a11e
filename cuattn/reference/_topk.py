"""Selections, and the merge of states; the rules are those of `cuattn.reference`."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from cuattn._arrays.results import (
    LogitsState,
    SampleState,
    SoftmaxState,
    SoftmaxTopK,
    SoftmaxTopKLse,
    SoftmaxTopKState,
    TopK,
)
from cuattn.reference._numerics import Option, quiet, results, scores, shift, wide
from cuattn.reference._softmax import log_softmax, logsumexp, softmax, softmax_state

State = TypeVar("State", SoftmaxState, LogitsState, SoftmaxTopKState, SampleState)


def _tilt(part: LogitsState, m: np.ndarray) -> np.ndarray:
    """``sum(exp(s - m) * (s - m))`` over the elements of a part; 0 where every exponential is."""
    down = wide(part.m) - shift(m)
    e = np.exp(down)
    return np.where(e == 0, 0, wide(part.t) * e + wide(part.l) * e * down)


@quiet
def merge(a: State, b: State, /, *, out: Any = None) -> State:
    """The state of two parts of a row (paper, eq. 4): a commutative monoid up to rounding."""
    m = np.maximum(a.m, b.m)
    l = sum(wide(part.l) * np.exp(wide(part.m) - shift(m)) for part in (a, b))  # noqa: E741
    if isinstance(a, SoftmaxState):
        return SoftmaxState(*results((wide(m), l), out))
    if isinstance(a, LogitsState):
        t = np.where(np.isinf(m), l, sum(_tilt(part, m) for part in (a, b)))
        return LogitsState(*results((wide(m), l, t, np.fmax(a.logit, b.logit)), out))
    *parts, indices = (np.concatenate(pair, -1) for pair in zip(a[2:], b[2:], strict=True))
    values: Any = list(map(wide, parts))  # or these, and logits
    if isinstance(a, SampleState):  # of a row that holds NaN or +inf there are no draws
        lost = ~(m < np.inf)[..., None]
        values, indices = (
            [np.where(lost, -np.inf, one) for one in values],
            np.where(lost, -1, indices),
        )
    order = np.lexsort((indices, -values[0], indices == -1))  # the last key counts most
    best = order[..., : a.indices.shape[-1]]
    found: Any = (np.take_along_axis(one, best, -1) for one in (*values, indices))
    return type(a)(*results((wide(m), l, *found), out))


@quiet
def top_k(
    x: ArrayLike,
    k: int,
    /,
    *,
    axis: int | None = -1,
    mode: str = "largest",
    sorted: bool = True,
    out: Any = None,
) -> TopK:
    """The k best of each row, best first: ties in order of index, NaN after every number."""
    x = np.atleast_1d(np.asarray(x))
    integer = x.dtype.kind in "iu"
    key = x if integer else wide(x)
    if mode == "largest":
        key = ~key if integer else -key  # ~ turns the order round as - does, without overflow
    indices = np.argsort(key, axis, kind="stable").take(np.arange(k), axis)
    return TopK(*results((np.take_along_axis(x, indices, axis), indices), out))


def _logits(x: np.ndarray, scale: Option, where: Option) -> np.ndarray:
    """The scores, rounded to what a kernel computes in: float32, or float64 for float64.

    The range is not float32's: a power of two is taken out of a scale above 1.
    """
    acc = np.dtype(np.float32) if x.itemsize <= 4 else x.dtype
    factor = np.asarray(1 if scale is None else scale, acc)
    unit = np.where(np.isfinite(factor) & (abs(factor) > 1), np.frexp(factor)[1], 0)
    unit = np.minimum(unit, 127 if acc == np.float32 else 0)
    t = np.ldexp(wide(x.astype(acc) * np.ldexp(factor, -unit)), unit)
    return t if where is None else np.where(where, t, -np.inf)


@quiet
def softmax_topk(
    x: ArrayLike,
    k: int,
    /,
    *,
    axis: int | None = -1,
    scale: Option = None,
    where: Option = None,
    renormalize: bool = False,
    output: str = "prob",
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """`softmax` or `log_softmax` at the `top_k` of the logits; `renormalize`: of these k only."""
    x = np.atleast_1d(np.asarray(x))
    part = np.broadcast_to(True if where is None else where, x.shape)
    s, t = scores(x, scale, part), _logits(x, scale, part)
    indices = top_k(t, k, axis=axis).indices
    function = log_softmax if output == "log_prob" else softmax
    full = t if output == "logit" else function(s, axis, where=part)
    values, s_k, part_k = (np.take_along_axis(a, indices, axis) for a in (full, s, part))
    if renormalize and output != "logit":
        values = function(s_k, axis, where=part_k)
    if return_lse:
        return SoftmaxTopKLse(*results((values, indices, logsumexp(s, axis)), out))
    return SoftmaxTopK(*results((values, indices), out))


@quiet
def softmax_topk_state(
    x: ArrayLike,
    k: int,
    /,
    *,
    axis: int | None = -1,
    scale: Option = None,
    index_offset: int = 0,
    out: Any = None,
) -> SoftmaxTopKState:
    """`softmax_state` and `top_k` of the logits of each row, which may be shorter than k."""
    t = _logits(np.atleast_1d(np.asarray(x)), scale, None)
    t = t.reshape(-1) if axis is None else np.moveaxis(t, axis, -1)
    n = t.shape[-1]
    best = top_k(t, min(k, n))
    lack = [(0, 0)] * (t.ndim - 1) + [(0, max(k - n, 0))]
    values = np.pad(best.values, lack, constant_values=-np.inf)
    indices = np.pad(best.indices + index_offset, lack, constant_values=-1)
    return SoftmaxTopKState(*results((*softmax_state(t), values, indices), out))
