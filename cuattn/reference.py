"""The ground truth: every public function on NumPy arrays, in float64, as short as the formula.

Same names and signatures as the package. Integers and narrow floats are widened to float64 (a
wider input keeps its type), and results stay that wide unless `dtype` or `out` says otherwise. No
argument is checked here beyond what NumPy does by itself, and no RuntimeWarning escapes.

Notation of Milakov & Gimelshein, "Online normalizer calculation for softmax" (arXiv:1805.02867):
``m`` is the running maximum and ``l`` the running sum (``d`` in the paper, ℓ in FlashAttention).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from cuattn._reference_attention import attention as attention
from cuattn._reference_attention import attention_varlen as attention_varlen
from cuattn._reference_attention import merge_attention as merge_attention
from cuattn._reference_attention import merge_attention_states as merge_attention_states
from cuattn._reference_rows import Axis, Option, log_sum, result, row_max, scores, shift, wide

_quiet = np.errstate(all="ignore")


class SoftmaxState(NamedTuple):
    """What online softmax knows of a row: its maximum `m` and ``l = sum(exp(x - m))``.

    The empty state is ``(-inf, 0)``. Where `m` is not finite, `l` is the sum without the shift.
    """

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741 - the name in the papers

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row, ``m + log(l)``; -inf for an empty state."""
        with np.errstate(all="ignore"):
            return np.add(self.m, np.log(self.l), out=np.empty_like(self.m))


class TopK(NamedTuple):
    """The k best elements of each row, best first, and their indices."""

    values: NDArray[Any]
    indices: NDArray[np.int64]


class SoftmaxTopK(NamedTuple):
    """Probabilities, their logarithms or the logits of the k best elements, and their indices."""

    values: NDArray[Any]
    indices: NDArray[np.int64]


class SoftmaxTopKLse(NamedTuple):
    """A `SoftmaxTopK` with the natural log-sum-exp of the whole row."""

    values: NDArray[Any]
    indices: NDArray[np.int64]
    lse: NDArray[Any]


class SoftmaxTopKState(NamedTuple):
    """A `SoftmaxState` and, on the last axis, the k best scores; what a row lacks is (-inf, -1)."""

    m: NDArray[Any]
    l: NDArray[Any]  # noqa: E741 - the name in the papers
    values: NDArray[Any]
    indices: NDArray[np.int64]

    @property
    def lse(self) -> NDArray[Any]:
        """Natural log-sum-exp of the row."""
        return SoftmaxState(self.m, self.l).lse


State = TypeVar("State", SoftmaxState, SoftmaxTopKState)


@_quiet
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
) -> Any:
    """``exp(scale * x) / sum(exp(scale * x))`` over the elements that take part; the others are 0.

    With ``return_lse=True`` also the natural log-sum-exp, without the reduced axes.
    """
    s = scores(x, scale, where)
    m = row_max(s, axis)
    p = np.exp(s - m)  # not shift(m): a row of -inf only, or with +inf, is NaN as in SciPy
    y = p / np.sum(p, axis=axis, keepdims=True)
    y = y if where is None else np.where(where, y, 0)
    if not return_lse:
        return result(y, dtype, out)
    out_y, out_lse = (None, None) if out is None else out
    lse = shift(m) + log_sum(s, axis)
    return result(y, dtype, out_y), result(np.squeeze(lse, axis), out=out_lse)


@_quiet
def log_softmax(
    x: ArrayLike,
    /,
    axis: Axis = -1,
    *,
    scale: Option = None,
    where: Option = None,
    dtype: DTypeLike | None = None,
    out: Any = None,
) -> Any:
    """``scale * x - log(sum(exp(scale * x)))``; -inf where an element does not take part."""
    s = scores(x, scale, where)
    y = s - shift(row_max(s, axis)) - log_sum(s, axis)
    return result(y if where is None else np.where(where, y, -np.inf), dtype, out)


@_quiet
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


@_quiet
def softmax_backward(
    grad: ArrayLike, y: ArrayLike, /, axis: Axis = -1, *, scale: Option = None, out: Any = None
) -> Any:
    """Gradient of `softmax` in x: ``scale * y * (grad - sum(grad * y))``, y = softmax(x)."""
    grad, y = wide(grad), wide(y)
    dx = y * (grad - np.sum(grad * y, axis=axis, keepdims=True))
    return result(dx if scale is None else wide(scale) * dx, out=out)


@_quiet
def log_softmax_backward(
    grad: ArrayLike, y: ArrayLike, /, axis: Axis = -1, *, scale: Option = None, out: Any = None
) -> Any:
    """Gradient of `log_softmax` in x: ``scale * (grad - exp(y) * sum(grad))``."""
    grad, y = wide(grad), wide(y)
    dx = grad - np.exp(y) * np.sum(grad, axis=axis, keepdims=True)
    return result(dx if scale is None else wide(scale) * dx, out=out)


@_quiet
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


@_quiet
def softmax_state(x: ArrayLike, /, axis: Axis = -1, *, scale: Option = None) -> SoftmaxState:
    """The state of each row, without the reduced axes (paper, Algorithm 3, lines 1-6)."""
    s = scores(x, scale, None)
    m = row_max(s, axis)
    l = np.sum(np.exp(s - shift(m)), axis=axis, keepdims=True)  # noqa: E741
    return SoftmaxState(result(np.squeeze(m, axis)), result(np.squeeze(l, axis)))


@_quiet
def merge(a: State, b: State, /) -> State:
    """The state of two parts of a row (paper, eq. 4): a commutative monoid up to rounding."""
    m = np.maximum(a.m, b.m)
    l = sum(wide(part.l) * np.exp(wide(part.m) - shift(m)) for part in (a, b))  # noqa: E741
    if isinstance(a, SoftmaxState):
        return SoftmaxState(wide(m), result(l))
    values, indices = (np.concatenate(pair, -1) for pair in zip(a[2:], b[2:], strict=True))
    order = np.lexsort((indices, -wide(values), indices == -1))  # the last key counts most
    best = order[..., : a.indices.shape[-1]]
    values, indices = (np.take_along_axis(both, best, -1) for both in (wide(values), indices))
    return SoftmaxTopKState(wide(m), result(l), values, indices)


@_quiet
def top_k(
    x: ArrayLike, k: int, /, *, axis: int | None = -1, mode: str = "largest", sorted: bool = True
) -> TopK:
    """The k best of each row, best first: ties in order of index, NaN after every number."""
    x = np.atleast_1d(np.asarray(x))
    integer = x.dtype.kind in "iu"
    key = x if integer else wide(x)
    if mode == "largest":
        key = ~key if integer else -key  # ~ turns the order round as - does, without overflow
    indices = np.argsort(key, axis, kind="stable").take(np.arange(k), axis)
    return TopK(np.take_along_axis(x, indices, axis), indices)


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


@_quiet
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
    best = SoftmaxTopK(values, indices)
    return SoftmaxTopKLse(*best, logsumexp(s, axis)) if return_lse else best


@_quiet
def softmax_topk_state(
    x: ArrayLike, k: int, /, *, axis: int | None = -1, scale: Option = None, index_offset: int = 0
) -> SoftmaxTopKState:
    """`softmax_state` and `top_k` of the logits of each row, which may be shorter than k."""
    t = _logits(np.atleast_1d(np.asarray(x)), scale, None)
    t = t.reshape(-1) if axis is None else np.moveaxis(t, axis, -1)
    n = t.shape[-1]
    best = top_k(t, min(k, n))
    lack = [(0, 0)] * (t.ndim - 1) + [(0, max(k - n, 0))]
    values = np.pad(best.values, lack, constant_values=-np.inf)
    indices = np.pad(best.indices + index_offset, lack, constant_values=-1)
    return SoftmaxTopKState(*softmax_state(t), values, indices)
