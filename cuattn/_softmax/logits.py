"""Entropy of the probabilities of logits, and what losses and entropies have to know of a row."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from numpy.typing import NDArray

from cuattn._arrays.results import LogitsState
from cuattn._arrays.types import Axis, Entropy, Host, LogitsOptions, Other, Unpack
from cuattn._device.signatures import remembered
from cuattn._softmax import request_logits
from cuattn._softmax.run import prepare


@overload
def entropy(x: Host, /, axis: Axis = -1, **options: Unpack[Entropy]) -> NDArray[Any]: ...
@overload
def entropy(x: Other, /, axis: Axis = -1, **options: Unpack[Entropy]) -> Any: ...
@remembered("scale")
def entropy(
    x: Any,
    /,
    axis: Axis = -1,
    *,
    scale: Any = None,
    where: Any = None,
    keepdims: bool = False,
    out: Any = None,
) -> Any:
    """Entropy of ``p = softmax(scale * x)`` in nats: ``-sum(p * log(p))``, reading x once.

    Parameters
    ----------
    x, axis, scale, where
        As `softmax`.
    keepdims : bool, optional
        Keep reduced axes with length 1.
    out : array, optional
        Where to write: exactly the shape and dtype of the result.

    Returns
    -------
    h : array, shape of x without `axis`
        float32, or float64 for float64 and integers. Small ones have all their digits. NaN for a
        row with NaN or +inf, or of nothing but -inf; 0 where nothing takes part.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.

    See Also
    --------
    logits_state : Of a part of a row.

    Notes
    -----
    Computed as ``log(l) - t / l`` with ``l = sum(exp(s - m))`` and ``t = sum(exp(s - m) * (s -
    m))``, s = scale * x and m its maximum: two sums of terms of one sign.

    Examples
    --------
    >>> cuattn.entropy(numpy.array([[0.0, 0.0], [0.0, -numpy.inf]])) / numpy.log(2.0)
    array([1., 0.])
    """
    return prepare(request_logits.entropy(x, axis, scale, where, keepdims, out))


@overload
def logits_state(x: Host, labels: Host, /, **options: Unpack[LogitsOptions]) -> LogitsState: ...
@overload
def logits_state(x: Other, labels: Other, /, **options: Unpack[LogitsOptions]) -> Any: ...
@remembered("scale")
def logits_state(
    x: Any,
    labels: Any,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    index_offset: SupportsIndex = 0,
    out: Any = None,
) -> LogitsState:
    """What the loss of a label and the entropy have to know of a row, in a form that merges.

    For rows whose parts never meet, as shards of a vocabulary on several GPUs.

    Parameters
    ----------
    x, axis, scale
        As `cross_entropy`.
    labels : array of integers, shape of x without `axis`
        Of the whole rows; any strides. No label is ignored here.
    index_offset : int, optional
        Where in the row this part begins. Not negative.
    out : tuple of four arrays, optional
        Where to write: exactly the shapes and dtypes of the results, any strides.

    Returns
    -------
    state : LogitsState
        ``m = max(scale * x)``, ``l = sum(exp(scale * x - m))``, ``t = sum(exp(scale * x - m) *
        (scale * x - m))`` and ``logit``, the ``scale * x`` of the label or NaN where this part has
        not got it: shape of x without `axis`, float32 (float64 for float64 and integers). Of merged
        parts ``state.cross_entropy``, ``state.log_prob``, ``state.entropy`` and ``state.lse`` are
        those of the whole row; a label that is in no part has a loss of NaN. The state of nothing
        is ``(-inf, 0, 0, nan)``; where m is infinite, t is l. Losses and entropies near 0 have the
        digits of l, which is near 1 then: `cross_entropy` and `entropy` have more.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cross_entropy`, but no label is out of range.

    See Also
    --------
    merge : The state of two parts of a row.
    cross_entropy_backward : With `index_offset` and the lse of merged states, the gradient of a
        part.

    Examples
    --------
    >>> x, labels = numpy.log(numpy.array([[1.0, 3.0, 4.0]])), numpy.array([2])
    >>> first = cuattn.logits_state(x[:, :1], labels)
    >>> second = cuattn.logits_state(x[:, 1:], labels, index_offset=1)
    >>> cuattn.merge(first, second).cross_entropy / numpy.log(2.0)
    array([1.])
    """
    return prepare(request_logits.state(x, labels, axis, scale, index_offset, out), LogitsState)
