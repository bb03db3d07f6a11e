"""Log-sum-exp."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.types import Axis, Host, LogSumExp, Other, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request
from cuattn._softmax.run import prepare


@overload
def logsumexp(x: Host, /, axis: Axis = None, **options: Unpack[LogSumExp]) -> NDArray[Any]: ...
@overload
def logsumexp(x: Other, /, axis: Axis = None, **options: Unpack[LogSumExp]) -> Any: ...
@remembered()
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
    return prepare(request.reduction(x, axis, b, where, keepdims, dtype, out))
