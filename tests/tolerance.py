"""How close is close enough, in one table, and the plain expressions that a user writes today.

``max |got - ref| <= 2 * max |naive - ref| + one rounding of ref``: `ref` is the reference in the
widest float there is, `naive` the plain NumPy expression in the dtype of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np


class Tolerance(NamedTuple):
    """What one correct rounding may cost a result."""

    relative: float  # half a unit in the last place
    absolute: float  # near zero
    plain: int  # roundings that the plain expression makes, even where a lucky sample hides them


# Exponentials of attention flush float32 subnormals, bfloat16 is stored from a float32 value: up
# to the smallest normal is lost (test_magnitudes.py says what softmax keeps). float16: half of the
# smallest subnormal.
# The plain expression rounds the exponential, the sum and the quotient. A kernel that accumulates
# in float32 rounds a 16-bit result once, so there no more than one is granted.
TABLE = {
    "float16": Tolerance(2.0**-11, 2.0**-25, 1),
    "bfloat16": Tolerance(2.0**-8, 2.0**-126, 1),
    "float32": Tolerance(2.0**-24, 2.0**-126, 3),
    "float64": Tolerance(2.0**-53, 2.0**-1022, 3),
}

# Roundings on the way to an exponent: log2(e), scale * log2(e), the product, the difference.
EXPONENT_ROUNDINGS = 4


def exact(x):
    """`x` in the widest float, so that even a float64 result meets a better reference."""
    return np.asarray(x).astype(np.longdouble)


def result_dtype(x, dtype=None, b=None):
    """What the softmax family returns: with weights what SciPy promotes both to, float64 for
    integers; bfloat16 as float16, and float32 for the two of them."""
    if dtype is not None:
        return np.dtype(dtype)
    dtypes = [a.dtype for a in (x, b) if hasattr(a, "dtype")]  # numbers of Python do not count
    names = {dtype.name for dtype in dtypes}
    result = np.result_type(*(np.float16 if d.name == "bfloat16" else d for d in dtypes))
    if result == np.float16 and "bfloat16" in names:
        return np.dtype(np.float32) if "float16" in names else dtype_of("bfloat16")
    return np.dtype(np.float64) if result.kind in "iu" else result


def lse_dtype(dtype):
    """float64 for float64, float32 for all narrower ones."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


@np.errstate(all="ignore")
def assert_close(got, ref, naive, *, terms=None, probabilities=False):
    """`got` against `ref`; non-finite values exactly, finite ones no worse than `naive` twice.

    `terms`, where they cancel in `ref`, is the size of what has been added up. For `probabilities`
    also every single one against itself, however small beside the largest: its relative error is
    the absolute error of the exponent.
    """
    got, ref = np.asarray(got), exact(ref)
    table = TABLE[got.dtype.name]
    assert got.shape == ref.shape
    rounded = exact(ref.astype(got.dtype))  # where `ref` overflows, so must `got`
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(exact(got)[~finite], rounded[~finite])
    got, ref, naive = exact(got)[finite], ref[finite], exact(naive)[finite]
    assert np.isfinite(got).all()
    if got.size == 0:
        return
    error, naive_error = abs(got - ref), abs(naive - ref)
    is_exact = terms is None and not naive_error.any()  # such as a row of one element
    naive_error = np.where(np.isfinite(naive_error), naive_error, 0)
    rounding = table.relative * abs(ref) + table.absolute
    size = abs(ref) if terms is None else exact(terms)[finite]
    least = table.plain * (table.relative * size + table.absolute).max()
    naive_max = 0 if is_exact else max(naive_error.max(), least)
    _assert_below(error, 2 * naive_max + rounding, ref, got)
    if probabilities:
        sure = abs(ref) > table.absolute / table.relative
        naive_units = np.max(naive_error[sure] / ref[sure], initial=0)
        exponent = abs(np.log(np.where(ref > 0, ref, 1)))
        relative = 2 * naive_units + table.relative * EXPONENT_ROUNDINGS * (1 + exponent)
        _assert_below(error, relative * ref + table.absolute, ref, got)


def sum_error(dtype, n):
    """How far from 1 the exact sum of `n` probabilities may be: the error of each, weighted."""
    table = TABLE[np.dtype(dtype).name]
    return table.relative * EXPONENT_ROUNDINGS * (1 + np.log(n)) + n * table.absolute


def _assert_below(error, allowed, ref, got):
    if not (error <= allowed).all():
        i = np.argmax(error / allowed)
        count = np.count_nonzero(error > allowed)
        raise AssertionError(
            f"{count} of {error.size} values are off, the worst {error[i] / allowed[i]:.3g} times "
            f"what is allowed: got {got[i]!r}, reference {ref[i]!r}, allowed +-{allowed[i]:.3g}"
        )


def _sum(p, axis):
    """The sum as CuPy takes it: narrow floats are added up in float32 and rounded once. In the
    order of memory or in that of the elements, whichever is less lucky."""
    wide = lse_dtype(p.dtype)
    found = np.sum(p, axis=axis, keepdims=True, dtype=wide)
    if not p.flags.c_contiguous:
        other = np.sum(np.ascontiguousarray(p), axis=axis, keepdims=True, dtype=wide)
        true = np.sum(exact(p), axis=axis, keepdims=True)
        found = np.where(abs(other - true) > abs(found - true), other, found)
    return found.astype(p.dtype)


def _max(x, axis):
    """The maximum in the dtype, 0 where it is not finite."""
    m = np.max(exact(x), axis=axis, keepdims=True, initial=-np.inf)
    return np.where(np.isfinite(m), m, 0).astype(x.dtype)


def _scores(x, dtype, scale, where):
    s = x.astype(result_dtype(x, dtype))
    s = s if scale is None else s * np.asarray(scale).astype(s.dtype)
    return s if where is None else np.where(where, s, np.asarray(-np.inf, s.dtype))


@np.errstate(all="ignore")
def naive_softmax(x, axis=-1, *, scale=None, where=None, dtype=None):
    s = _scores(x, dtype, scale, where)
    p = np.exp(s - _max(s, axis))
    return p / _sum(p, axis)


@np.errstate(all="ignore")
def naive_log_softmax(x, axis=-1, *, scale=None, where=None, dtype=None):
    s = _scores(x, dtype, scale, where)
    s = s - _max(s, axis)
    return s - np.log(_sum(np.exp(s), axis))


@np.errstate(all="ignore")
def naive_logsumexp(x, axis=None, *, b=None, where=None, scale=None, keepdims=False, dtype=None):
    if b is not None:
        where = np.logical_and(True if where is None else where, b != 0)
    s = _scores(x, dtype, scale, where)
    p = np.exp(s - _max(s, axis))
    p = p if b is None else np.where(where, b, 0).astype(s.dtype) * p
    lse = _max(s, axis) + np.log(_sum(p, axis))
    return lse if keepdims else np.squeeze(lse, axis)


def _shown(a, where):
    """0 where an element does not take part."""
    return a if where is None else np.where(where, a, np.asarray(0, a.dtype))


@np.errstate(all="ignore")
def naive_softmax_backward(grad, y, axis=-1, *, scale=None, where=None):
    grad, y = _shown(grad, where), _shown(y, where)
    dx = y * (grad - _sum(grad * y, axis))
    return _shown(dx if scale is None else np.asarray(scale).astype(dx.dtype) * dx, where)


@np.errstate(all="ignore")
def naive_log_softmax_backward(grad, y, axis=-1, *, scale=None, where=None):
    grad, y = _shown(grad, where), _shown(y, where)
    dx = grad - np.exp(y) * _sum(grad, axis)
    return _shown(dx if scale is None else np.asarray(scale).astype(dx.dtype) * dx, where)


@np.errstate(all="ignore")
def terms_of_softmax_backward(grad, y, axis=-1, *, scale=None, where=None):
    """Upper bound of what is added and taken off in an element of `softmax_backward`."""
    grad, y = (abs(_shown(exact(a), where)) for a in (grad, y))
    terms = y * (grad + np.sum(grad * y, axis=axis, keepdims=True))
    return _shown(terms if scale is None else abs(exact(scale)) * terms, where)


@np.errstate(all="ignore")
def terms_of_log_softmax_backward(grad, y, axis=-1, *, scale=None, where=None):
    """Upper bound of what is added and taken off in an element of `log_softmax_backward`."""
    grad, y = abs(_shown(exact(grad), where)), _shown(exact(y), where)
    terms = grad + np.exp(y) * np.sum(grad, axis=axis, keepdims=True)
    return _shown(terms if scale is None else abs(exact(scale)) * terms, where)


NAIVE = {
    "softmax": naive_softmax,
    "log_softmax": naive_log_softmax,
    "logsumexp": naive_logsumexp,
    "softmax_backward": naive_softmax_backward,
    "log_softmax_backward": naive_log_softmax_backward,
}

TERMS = {
    "softmax_backward": terms_of_softmax_backward,
    "log_softmax_backward": terms_of_log_softmax_backward,
}

FLOATS = ("float16", "bfloat16", "float32", "float64")


def dtype_of(name):
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
