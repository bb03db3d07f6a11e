"""Log-sum-exp."""

from __future__ import annotations

from typing import Any

from cuattn import _call, _check, _jit, _run, reference

Axis = int | tuple[int, ...] | None


def logsumexp(
    x: Any,
    /,
    axis: Axis = None,
    *,
    b: Any = None,
    where: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """Logarithm of a sum of exponentials: ``log(sum(b * exp(x)))``, reading x once.

    Parameters
    ----------
    x, where, dtype
        As `softmax`.
    axis : int, tuple of int or None, optional
        Axes to reduce; None, the default as in `scipy.special.logsumexp`: all.
    b : float or array, optional
        Weights; must broadcast to the shape of x. An element of weight 0 does not take part, even
        if it is inf or NaN.
    keepdims : bool, optional
        Keep reduced axes with length 1.
    out : array, optional
        Where to write: exactly the shape and dtype of the result.

    Returns
    -------
    lse : array
        Natural logarithm, in the dtype of x (float64 for integers; the wider one where b is a wider
        array), or `dtype`. A negative sum gives NaN, an empty one -inf.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.
    """
    x = _call.enter("x", x)
    first = ("x", x)
    weight, number = (None, 1.0) if b is None else _call.array_or_number("b", b, first)
    where = _call.mask(where, first)
    request = _call.Request(
        "lse",
        _check.axes(axis, x.ndim),
        _call.meta(x),
        where=_call.meta(where),
        weight=_call.meta(weight),
        dtype=_check.float_dtype(dtype),
        keepdims=bool(keepdims),
    )
    expected = _call.results(request)
    if out is not None:
        inputs = [first, ("where", where), ("b", weight)]
        (out,) = _call.check_out(out, [(expected.stat_shape, expected.stat_dtype)], inputs)
    runtime = _jit.runtime_of(x)
    if runtime is None:
        return reference.logsumexp(
            x,
            request.axes,
            b=b,
            where=where,
            keepdims=request.keepdims,
            dtype=expected.dtype,
            out=out,
        )
    if weight is None and b is not None:
        with runtime.on(runtime.device(x)):
            weight = runtime.xp.full((), number, expected.acc)
        request = request._replace(weight=_call.meta(weight), dtype=expected.dtype)
    return _run.run(request, _run.Operands(x, where=where, weight=weight), stat=out).stat
