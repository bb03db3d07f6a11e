"""What a softmax has to know of a row, in a form that merges."""

from __future__ import annotations

from typing import Any, overload

from cuattn._arrays.results import SoftmaxState
from cuattn._arrays.types import Axis, Host, Other, State, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request
from cuattn._softmax.run import prepare


@overload
def softmax_state(x: Host, /, axis: Axis = -1, **options: Unpack[State]) -> SoftmaxState: ...
@overload
def softmax_state(x: Other, /, axis: Axis = -1, **options: Unpack[State]) -> Any: ...
@remembered("scale")
def softmax_state(
    x: Any, /, axis: Axis = -1, *, scale: Any = None, out: Any = None
) -> SoftmaxState:
    """What a softmax has to know of a row, in a form that merges.

    Parameters
    ----------
    x, axis, scale
        As `softmax`.
    out : tuple of two arrays, optional
        Where to write m and l: exactly the shapes and dtypes of the results, any strides.

    Returns
    -------
    state : SoftmaxState
        ``m = max(scale * x)`` and ``l = sum(exp(scale * x - m))``, shape of x without `axis`,
        float32 (float64 for float64 and integers). ``state.lse`` is ``m + log(l)``. The state of
        nothing is ``(-inf, 0)``; where m is infinite, l is the sum without m. A log-sum-exp near 0
        has the digits of l, which is near 1 then: `logsumexp` has more.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    merge : The state of two parts of a row.
    softmax : With `state`, probabilities of a part among the whole row.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, arXiv:1805.02867, section 3.1.

    Examples
    --------
    >>> cuattn.softmax_state(numpy.array([[0.0, 0.0, -numpy.inf]]))
    SoftmaxState(m=array([0.]), l=array([2.]))
    """
    return prepare(request.state(x, axis, scale, out), SoftmaxState)
