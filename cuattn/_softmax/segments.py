"""Softmax of ragged rows, and its gradient."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.types import Host, Other, Scaled, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request_segments
from cuattn._softmax.run import prepare


@overload
def segment_softmax(x: Host, cu_seqlens: Host, /, **options: Unpack[Scaled]) -> NDArray[Any]: ...
@overload
def segment_softmax(x: Other, cu_seqlens: Other, /, **options: Unpack[Scaled]) -> Any: ...
@remembered("scale")
def segment_softmax(x: Any, cu_seqlens: Any, /, *, scale: Any = None, out: Any = None) -> Any:
    """Softmax of each segment of ragged rows, laid end to end along axis 0.

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray, shape (total, ...)
        dtypes as `softmax`. Further axes are independent columns.
    cu_seqlens : array, shape (segments + 1,), int32 or int64
        Segment i is ``x[cu_seqlens[i]:cu_seqlens[i + 1]]``. From 0, never falling, ending at
        `total`: checked where it is a NumPy array; a device array is trusted, and never leads
        outside x.
    scale : float or array, optional
        Multiplies x first; an array must broadcast to ``(segments, *x.shape[1:])``.
    out : array, optional
        Where to write: shape of x, dtype of the result. x itself is allowed.

    Returns
    -------
    y : array, shape of x
        dtype of x, float64 for integers.

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    See Also
    --------
    softmax : Rows of one length.
    segment_softmax_backward : The gradient.

    Examples
    --------
    >>> x = numpy.log(numpy.array([5.0, 1.0, 3.0]))
    >>> cuattn.segment_softmax(x, numpy.array([0, 1, 3]))
    array([1.  , 0.25, 0.75])
    """
    return prepare(request_segments.segments({"x": x}, cu_seqlens, scale, out))


@overload
def segment_softmax_backward(
    grad: Host, y: Host, cu_seqlens: Host, /, **options: Unpack[Scaled]
) -> NDArray[Any]: ...
@overload
def segment_softmax_backward(
    grad: Other, y: Other, cu_seqlens: Other, /, **options: Unpack[Scaled]
) -> Any: ...
@remembered("scale")
def segment_softmax_backward(
    grad: Any, y: Any, cu_seqlens: Any, /, *, scale: Any = None, out: Any = None
) -> Any:
    """Gradient of `segment_softmax` with respect to x, that of `softmax` in each segment.

    Parameters
    ----------
    grad : cupy.ndarray or numpy.ndarray, shape (total, ...)
        Gradient with respect to the result; float16, bfloat16, float32 or float64, any strides.
    y : array, shape and dtype of grad
        The result, ``segment_softmax(x, cu_seqlens, scale=scale)``.
    cu_seqlens, scale
        As in the forward call.
    out : array, optional
        Where to write; grad or y itself is allowed.

    Returns
    -------
    dx : array, shape and dtype of grad

    Raises
    ------
    TypeError, ValueError
        As `softmax`.

    See Also
    --------
    segment_softmax : The forward pass.
    softmax_backward : The formula, and the same of rows of one length.

    Examples
    --------
    >>> y, cu_seqlens = numpy.array([1.0, 0.5, 0.5]), numpy.array([0, 1, 3])
    >>> cuattn.segment_softmax_backward(numpy.array([2.0, 1.0, 0.0]), y, cu_seqlens)
    array([ 0.  ,  0.25, -0.25])
    """
    return prepare(request_segments.segments({"grad": grad, "y": y}, cu_seqlens, scale, out))
