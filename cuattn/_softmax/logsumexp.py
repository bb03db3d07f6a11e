"""Log-sum-exp."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn._arrays import scalars as _check_option
from cuattn._arrays.keywords import explained
from cuattn._arrays.types import Axis, Host, LogSumExp, Other, Unpack
from cuattn._device import runtime as _jit
from cuattn._softmax import request as _call
from cuattn._softmax import run as _run


@overload
def logsumexp(x: Host, /, axis: Axis = None, **options: Unpack[LogSumExp]) -> NDArray[Any]: ...
@overload
def logsumexp(x: Other, /, axis: Axis = None, **options: Unpack[LogSumExp]) -> Any: ...
@explained
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
        Natural logarithm, in `dtype`, else in the dtype of x, promoted with that of b unless b is a
        Python number; float64 for integers. A negative sum gives NaN, an empty one -inf.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    softmax_state : The maximum and the sum, of which parts of a row merge.
    log_softmax : The elements relative to it.

    Notes
    -----
    As SciPy from 1.15 on, results near 0 have all their digits: the terms of the maximum are kept
    apart from the sum of the others, of which log1p is taken.

    Examples
    --------
    >>> cuattn.logsumexp(numpy.array([[0.0, -40.0], [1.0, 1.0]]), axis=1)
    array([4.24835426e-18, 1.69314718e+00])
    """
    x = _call.enter("x", x)
    first = ("x", x)
    weight = None if b is None else _call.one_or_array("b", b, first)
    weak = isinstance(weight, float)  # a number of Python leaves the dtype to x
    where = _call.mask(where, first)
    request = _call.Request(
        "lse",
        _check_option.axes(axis, x.ndim),
        _call.meta(x),
        where=_call.meta(where),
        weight=None if weak else _call.meta(weight),
        dtype=_check_option.float_dtype(dtype),
        keepdims=_check_option.flag("keepdims", keepdims),
    )
    expected = _call.results(request)
    if out is not None:
        inputs = [first, ("where", where), ("b", None if weak else weight)]
        (out,) = _call.check_out(out, [(expected.stat_shape, expected.stat_dtype)], inputs)
    runtime = _jit.runtime_of(x)
    if runtime is None:
        return reference.logsumexp(
            x,
            request.axes,
            b=weight,
            where=where,
            keepdims=request.keepdims,
            dtype=expected.dtype,
            out=out,
        )
    if weak:
        weight = np.asarray(weight, expected.acc)
    if weight is not None and not weight.ndim:
        weight = _call.placed(weight, runtime, x)
        request = request._replace(weight=_call.meta(weight), dtype=expected.dtype)
    if where is not None and not where.ndim:
        where = _call.placed(where, runtime, x)
    return _run.run(request, _run.Operands(x, where=where, weight=weight), stat=out).stat
