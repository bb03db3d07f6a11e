"""Softmax, its logarithm, gradients and state; the rules are those of `cuattn.reference`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from cuattn._arrays.results import SoftmaxState, SoftmaxTopKState
from cuattn.reference._numerics import (
    Axis,
    Option,
    log_sum,
    of_rows,
    quiet,
    result,
    results,
    row_max,
    scores,
    shift,
    wide,
)


@quiet
def softmax(
    x: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
    return_lse: bool = False,
    state: SoftmaxState | SoftmaxTopKState | None = None,
) -> Any:
    """``exp(scale * x) / sum(exp(scale * x))`` over the elements that take part; the others are 0.

    With ``return_lse=True`` also the natural log-sum-exp, without the reduced axes. `state`: that
    of the whole rows of which x is a part.
    """
    s = scores(x, scale, where)
    if state is None:
        m = row_max(s, axis)
        p = np.exp(s - m)  # not shift(m): a row of -inf only, or with +inf, is NaN as in SciPy
        y = p / np.sum(p, axis=axis, keepdims=True)
    else:
        m, l = of_rows(state, s.ndim, axis)  # noqa: E741
        y = np.where(np.isfinite(m), np.exp(s - m) / l, np.nan)
    y = y if where is None else np.where(where, y, 0)
    if not return_lse:
        return result(y, dtype, out)
    out_y, out_lse = (None, None) if out is None else out
    lse = shift(m) + log_sum(s, axis) if state is None else m + np.log(l)
    return result(y, dtype, out_y), result(np.squeeze(lse, axis), out=out_lse)


@quiet
def log_softmax(
    x: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
    state: SoftmaxState | SoftmaxTopKState | None = None,
) -> Any:
    """``scale * x - log(sum(exp(scale * x)))``; -inf where an element does not take part."""
    s = scores(x, scale, where)
    if state is None:
        y = s - shift(row_max(s, axis)) - log_sum(s, axis)
    else:
        m, l = of_rows(state, s.ndim, axis)  # noqa: E741
        y = s - m - np.log(l)
    return result(y if where is None else np.where(where, y, -np.inf), dtype, out)


@quiet
def logsumexp(
    x: ArrayLike,
    /,
    axis: Axis = None,
    *,
    b: Option = None,
    where: Option = None,
    keepdims: bool = False,
    dtype: DTypeLike | None = None,
    out: Any = None,
) -> Any:
    """``log(sum(b * exp(x)))``. An element with ``b == 0`` is out, even if it is inf or NaN."""
    b = wide(1 if b is None else b)
    part = (b != 0) if where is None else np.logical_and(where, b != 0)
    s = scores(x, None, part)
    lse = shift(row_max(s, axis)) + log_sum(s, axis, np.where(part, b, 0))
    return result(lse if keepdims else np.squeeze(lse, axis), dtype, out)


@quiet
def softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    out: Any = None,
) -> Any:
    """Gradient of `softmax` in x: ``scale * y * (grad - sum(grad * y))``, y = softmax(x), over the
    elements that take part; the others are 0.
    """
    grad, y, where = wide(grad), wide(y), where is None or where
    total = np.sum(np.where(where, grad * y, 0), axis=axis, keepdims=True)
    dx = wide(1 if scale is None else scale) * (y * (grad - total))
    return result(np.where(where, dx, 0), out=out)


@quiet
def log_softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    out: Any = None,
) -> Any:
    """Gradient of `log_softmax` in x: ``scale * (grad - exp(y) * sum(grad))``; `where` as in
    `softmax_backward`.
    """
    grad, y, where = wide(grad), wide(y), where is None or where
    total = np.sum(np.where(where, grad, 0), axis=axis, keepdims=True)
    dx = wide(1 if scale is None else scale) * (grad - np.exp(y) * total)
    return result(np.where(where, dx, 0), out=out)


@quiet
def segment_softmax(
    x: ArrayLike, cu_seqlens: ArrayLike, /, *, scale: Option = None, out: Any = None
) -> Any:
    """`softmax` over axis 0 of each segment ``x[cu_seqlens[i]:cu_seqlens[i + 1]]``.

    `scale` broadcasts to ``(num_segments, *x.shape[1:])``.
    """
    x, ends = wide(x), np.asarray(cu_seqlens)
    y = np.zeros_like(x)
    scales = np.broadcast_to(1 if scale is None else scale, (len(ends) - 1, *x.shape[1:]))
    for begin, end, segment_scale in zip(ends[:-1], ends[1:], scales, strict=True):
        y[begin:end] = softmax(x[begin:end], axis=0, scale=segment_scale)
    return result(y, out=out)


@quiet
def segment_softmax_backward(
    grad: ArrayLike,
    y: ArrayLike,
    cu_seqlens: ArrayLike,
    /,
    *,
    scale: Option = None,
    out: Any = None,
) -> Any:
    """Gradient of `segment_softmax` in x: `softmax_backward` over axis 0 of each segment."""
    grad, y, ends = wide(grad), wide(y), np.asarray(cu_seqlens)
    dx = np.zeros_like(grad)
    scales = np.broadcast_to(1 if scale is None else scale, (len(ends) - 1, *grad.shape[1:]))
    for begin, end, factor in zip(ends[:-1], ends[1:], scales, strict=True):
        dx[begin:end] = softmax_backward(grad[begin:end], y[begin:end], 0, scale=factor)
    return result(dx, out=out)


@quiet
def softmax_state(
    x: ArrayLike, /, axis: Axis = -1, *, scale: Option = None, out: Any = None
) -> SoftmaxState:
    """The state of each row, without the reduced axes (paper, Algorithm 3, lines 1-6)."""
    s = scores(x, scale, None)
    m = row_max(s, axis)
    l = np.sum(np.exp(s - shift(m)), axis=axis, keepdims=True)  # noqa: E741
    return SoftmaxState(*results((np.squeeze(m, axis), np.squeeze(l, axis)), out))
