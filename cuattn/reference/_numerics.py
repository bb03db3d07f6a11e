"""What the functions of `cuattn.reference`, whose rules hold here, are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

Axis = int | tuple[int, ...] | None
Option = ArrayLike | None
quiet = np.errstate(all="ignore")


def wide(x: ArrayLike) -> np.ndarray:
    """`x` in float64, or in its own type where that is wider."""
    x = np.asarray(x)
    return x.astype(np.result_type(x.dtype, np.float64), copy=False)


def scores(x: ArrayLike, scale: Option, where: Option) -> np.ndarray:
    """The scaled scores; an element that does not take part is -inf, whatever it holds."""
    s = wide(x) if scale is None else wide(x) * wide(scale)
    return s if where is None else np.where(where, s, -np.inf)


def row_max(s: np.ndarray, axis: Axis) -> np.ndarray:
    """Row maximum with kept dimensions: NaN is sticky, -inf for an empty row."""
    return np.max(s, axis=axis, keepdims=True, initial=-np.inf)


def of_rows(state: Any, ndim: int, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """m and l of a state with kept dimensions, of arrays of `ndim` ones."""
    axes = axis if ndim and axis is not None else tuple(range(ndim))
    m, l = (np.expand_dims(wide(part), axes) for part in (state.m, state.l))  # noqa: E741
    return m, l


def shift(m: np.ndarray) -> np.ndarray:
    """What is safe to subtract: ``-inf - (-inf)`` and ``inf - inf`` would be NaN."""
    return np.where(np.isfinite(m), m, 0)


def log_sum(s: np.ndarray, axis: Axis, b: ArrayLike = 1) -> np.ndarray:
    """``log(sum(b * exp(s - shift)))``. The terms of the maximum stay apart, or a sum near their
    weight would lose its digits: log1p, as in SciPy from 1.15 on."""
    m = row_max(s, axis)
    top = s == m
    w = np.sum(np.where(top, b, 0), axis=axis, keepdims=True)
    rest = np.where(top, 0, b * np.exp(s - shift(m)))
    r = np.sum(rest, axis=axis, keepdims=True)
    near = np.isfinite(m) & (abs(r) < w / 2)
    return np.where(near, np.log(w) + np.log1p(r / w), np.log(w * np.exp(m - shift(m)) + r))


def result(y: ArrayLike, dtype: DTypeLike | None = None, out: Any = None) -> Any:
    """`y` in `dtype`, or written into `out`."""
    if out is None:
        return np.asarray(y, dtype)
    np.copyto(out, y, casting="unsafe")
    return out


def results(found: tuple[Any, ...], out: Any = None) -> list[Any]:
    """All of `found`, or written into the arrays of `out`."""
    outs = (None,) * len(found) if out is None else out
    return [result(y, out=one) for y, one in zip(found, outs, strict=True)]
