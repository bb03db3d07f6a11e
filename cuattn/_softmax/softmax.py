"""Softmax and log-softmax."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.types import (
    Axis,
    Host,
    LogSoftmax,
    Other,
    Pair,
    RowState,
    SoftmaxAlone,
    SoftmaxOpen,
    SoftmaxWithLse,
    Unpack,
)
from cuattn._device.signatures import remembered
from cuattn._softmax import request
from cuattn._softmax.run import prepare


@overload
def softmax(x: Host, /, axis: Axis = -1, **options: Unpack[SoftmaxAlone]) -> NDArray[Any]: ...
@overload
def softmax(x: Host, /, axis: Axis = -1, **options: Unpack[SoftmaxWithLse]) -> Pair: ...
@overload
def softmax(x: Other, /, axis: Axis = -1, **options: Unpack[SoftmaxOpen]) -> Any: ...
@remembered("scale")
def softmax(
    x: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    dtype: Any = None,
    out: Any = None,
    return_lse: bool = False,
    state: RowState | None = None,
) -> Any:
    """Softmax along an axis: ``exp(scale * x) / sum(exp(scale * x))``.

    As `scipy.special.softmax`, but the default axis is the last one. Reads x once and writes the
    result once where a row fits into the registers of a thread block (16 to 32 K elements) or, on
    sm_90 and newer, of a cluster of blocks (256 K).

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray
        float16, bfloat16, float32, float64 or integers, of any shape and strides. An array of
        another library is taken without a copy.
    axis : int, tuple of int or None, optional
        Axes that together form a row; None: all.
    scale : float or array, optional
        Multiplies x first (an inverse temperature). An array must broadcast to the shape of x with
        `axis` of length 1.
    where : array of bool or bool, optional
        Elements that take part; must broadcast to the shape of x. The others give 0, whatever they
        hold.
    dtype : dtype, optional
        float16, bfloat16, float32 or float64: what is computed to and returned. Default: dtype of
        x, float64 for integers.
    out : array or tuple of arrays, optional
        Where to write: exactly the shape and dtype of the result, any strides. x itself is allowed.
        With `return_lse` a pair.
    return_lse : bool, optional
        Also return ``log(sum(exp(scale * x)))``.
    state : SoftmaxState, LogitsState or SoftmaxTopKState, optional
        What is known of whole rows, of which x is a part: that of `softmax_state` with the same
        `scale`, merged with those of the other parts. Shape of x without `axis`, float32 or
        float64. Results are then those of the whole rows, from one read of x.

    Returns
    -------
    y : array, shape of x
    lse : array, shape of x without `axis`
        Natural logarithm; float32, or float64 where the result is float64. Only with `return_lse`.

    Raises
    ------
    TypeError
        If an argument is not an array, its dtype is not supported, or arrays of two libraries meet.
    ValueError
        If shapes do not fit, arrays are on different devices, or `out` overlaps an input in part.
    numpy.exceptions.AxisError
        If an axis is out of range.

    See Also
    --------
    log_softmax : The logarithms.
    softmax_backward : The gradient.
    softmax_state : What `state` is made by.
    softmax_topk : Only the largest, in one read.
    segment_softmax : Ragged rows.

    Notes
    -----
    16-bit and float32 results accumulate in float32, float64 ones in float64. A row that holds NaN
    or +inf is NaN, as is a row of nothing but -inf; a row in which nothing takes part is 0 with an
    lse of -inf. ``scale * x`` may pass the range of float32: only differences of scores within a
    row are ever multiplied by all of `scale`. In float64 it may not. Subnormal results are kept.
    The bits of a row do not depend on how many rows there are. Runs on the current stream of the
    device of x and does not synchronise. Arrays with more than 8 separate row dimensions are copied
    first.

    With a `state` the results are ``exp(scale * x - m) / l`` and ``m + log(l)``, or NaN where m is
    not finite: in a part of a row that has +inf or NaN elsewhere, too. m is the maximum of
    ``scale * x``, which here must be in the range of its dtype. Probabilities of the k best of a
    `softmax_topk_state` are ``softmax(state.values, state=state)``: these are scaled already.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867,
       algorithm 3.

    Examples
    --------
    >>> cuattn.softmax(numpy.array([[0.0, 0.0, numpy.log(2.0)]]))
    array([[0.25, 0.25, 0.5 ]])

    A row in two parts, which never meet:

    >>> a, b = numpy.array([0.0, 0.0]), numpy.array([numpy.log(2.0)])
    >>> state = cuattn.merge(cuattn.softmax_state(a), cuattn.softmax_state(b))
    >>> cuattn.softmax(a, state=state), cuattn.softmax(b, state=state)
    (array([0.25, 0.25]), array([0.5]))
    """
    return prepare(request.transform("prob", x, axis, scale, where, dtype, out, return_lse, state))


@overload
def log_softmax(x: Host, /, axis: Axis = -1, **options: Unpack[LogSoftmax]) -> NDArray[Any]: ...
@overload
def log_softmax(x: Other, /, axis: Axis = -1, **options: Unpack[LogSoftmax]) -> Any: ...
@remembered("scale")
def log_softmax(
    x: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    dtype: Any = None,
    out: Any = None,
    state: RowState | None = None,
) -> Any:
    """Logarithm of the softmax along an axis: ``scale * x - log(sum(exp(scale * x)))``.

    Parameters
    ----------
    x, axis, scale, where, dtype, out, state
        As `softmax`; elements that do not take part give -inf.

    Returns
    -------
    y : array, shape of x
        Natural logarithms.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    softmax : The probabilities.
    log_softmax_backward : The gradient.

    Notes
    -----
    As `scipy.special.log_softmax` for rows that are not finite: with +inf, NaN there and -inf
    elsewhere; with NaN, or nothing but -inf, all NaN. Results near 0 have all their digits: the
    term of the maximum is kept apart from the sum of the others (log1p). With a `state` they are
    ``scale * x - m - log(l)``, and have the digits of l.

    Examples
    --------
    >>> cuattn.log_softmax(numpy.array([[0.0, 0.0, numpy.log(2.0)]])).round(3)
    array([[-1.386, -1.386, -0.693]])
    """
    return prepare(request.transform("log_prob", x, axis, scale, where, dtype, out, False, state))
