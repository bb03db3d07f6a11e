"""Softmax of ragged rows."""

from __future__ import annotations

from typing import Any, overload

from numpy.typing import NDArray

from cuattn._arrays.types import Host, Other, Scaled, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request
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

    Examples
    --------
    >>> x = numpy.log(numpy.array([5.0, 1.0, 3.0]))
    >>> cuattn.segment_softmax(x, numpy.array([0, 1, 3]))
    array([1.  , 0.25, 0.75])
    """
    return prepare(request.segments(x, cu_seqlens, scale, out))
