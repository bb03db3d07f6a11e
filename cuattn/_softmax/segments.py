"""Softmax of ragged rows."""

from __future__ import annotations

from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from cuattn import reference
from cuattn._arrays import checks as _check
from cuattn._arrays.keywords import explained
from cuattn._arrays.types import Host, Other, Scaled, Unpack
from cuattn._device import runtime as _jit
from cuattn._softmax import request as _call
from cuattn._softmax import run as _run


@overload
def segment_softmax(x: Host, cu_seqlens: Host, /, **options: Unpack[Scaled]) -> NDArray[Any]: ...
@overload
def segment_softmax(x: Other, cu_seqlens: Other, /, **options: Unpack[Scaled]) -> Any: ...
@explained
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
    x, offsets = _call.enter_pair("x", x, "cu_seqlens", cu_seqlens)
    first = ("x", x)
    _check.at_least_1d("x", x.shape)
    _check.segments(offsets, x.shape[0], isinstance(offsets, np.ndarray))
    scale_array, scale_value = _call.scale(scale, first)
    request = _call.Request(
        "prob",
        (0,),
        _call.meta(x),
        scale=_call.meta(scale_array),
        offsets=_call.meta(offsets),
    )
    expected = _call.results(request)
    if out is not None:
        inputs = [first, ("cu_seqlens", offsets), ("scale", scale_array)]
        (out,) = _call.check_out(out, [(x.shape, expected.dtype)], inputs)
    runtime = _jit.runtime_of(x)
    if runtime is None:
        scale = _call.either(scale_array, scale_value)
        y = reference.segment_softmax(x, offsets, scale=scale, out=out)
        return y if out is not None else _call.rounded(y, expected.dtype)
    operands = _run.Operands(x, scale=scale_array, offsets=offsets)
    return _run.run(request, operands, scale_value, out).out
