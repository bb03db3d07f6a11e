"""Gradients of softmax and log-softmax."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.types import Axis, Gradient, Host, Other, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request
from cuattn._softmax.run import prepare


@overload
def softmax_backward(
    grad: Host, y: Host, /, axis: Axis = -1, **options: Unpack[Gradient]
) -> NDArray[Any]: ...
@overload
def softmax_backward(
    grad: Other, y: Other, /, axis: Axis = -1, **options: Unpack[Gradient]
) -> Any: ...
@remembered("scale")
def softmax_backward(
    grad: Any,
    y: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    out: Any = None,
) -> Any:
    """Gradient of `softmax` with respect to x: ``scale * y * (grad - sum(grad * y))``.

    Parameters
    ----------
    grad : cupy.ndarray or numpy.ndarray
        Gradient with respect to the result; float16, bfloat16, float32 or float64, any strides.
    y : array, shape and dtype of grad
        The result, ``softmax(x, axis, scale=scale, where=where)``.
    axis, scale, where
        As in the forward call. Elements that do not take part get 0, whatever grad and y hold
        there.
    out : array, optional
        Where to write; grad or y itself is allowed.

    Returns
    -------
    dx : array, shape and dtype of grad

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    softmax : The forward pass.
    log_softmax_backward : The gradient of the logarithms.
    segment_softmax_backward : The gradient of ragged rows.

    Examples
    --------
    >>> y = cuattn.softmax(numpy.array([0.0, 0.0]))
    >>> cuattn.softmax_backward(numpy.array([1.0, 0.0]), y)
    array([ 0.25, -0.25])
    >>> grad, where = numpy.array([1.0, 0.0, numpy.nan]), numpy.array([True, True, False])
    >>> cuattn.softmax_backward(grad, numpy.array([0.5, 0.5, 0.0]), where=where)
    array([ 0.25, -0.25,  0.  ])
    """
    return prepare(request.gradient("grad", grad, y, axis, scale, where, out))


@overload
def log_softmax_backward(
    grad: Host, y: Host, /, axis: Axis = -1, **options: Unpack[Gradient]
) -> NDArray[Any]: ...
@overload
def log_softmax_backward(
    grad: Other, y: Other, /, axis: Axis = -1, **options: Unpack[Gradient]
) -> Any: ...
@remembered("scale")
def log_softmax_backward(
    grad: Any,
    y: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    out: Any = None,
) -> Any:
    """Gradient of `log_softmax` with respect to x: ``scale * (grad - exp(y) * sum(grad))``.

    Parameters
    ----------
    grad, axis, scale, where, out
        As `softmax_backward`.
    y : array, shape and dtype of grad
        The result, ``log_softmax(x, axis, scale=scale, where=where)``.

    Returns
    -------
    dx : array, shape and dtype of grad

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    log_softmax : The forward pass.

    Examples
    --------
    >>> y = cuattn.log_softmax(numpy.array([0.0, 0.0]))
    >>> cuattn.log_softmax_backward(numpy.array([1.0, 0.0]), y)
    array([ 0.5, -0.5])
    """
    return prepare(request.gradient("log_grad", grad, y, axis, scale, where, out))
