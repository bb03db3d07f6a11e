"""Cross entropy of logits with labels, and its gradient."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from numpy.typing import NDArray

from cuattn._arrays.types import (
    CrossEntropyAlone,
    CrossEntropyBackward,
    CrossEntropyOpen,
    CrossEntropyWithLse,
    Factor,
    Host,
    Number,
    Other,
    Pair,
    Unpack,
)
from cuattn._device.signatures import remembered
from cuattn._softmax import request_logits
from cuattn._softmax.run import prepare


@overload
def cross_entropy(
    x: Host, labels: Host, /, **options: Unpack[CrossEntropyAlone]
) -> NDArray[Any]: ...
@overload
def cross_entropy(x: Host, labels: Host, /, **options: Unpack[CrossEntropyWithLse]) -> Pair: ...
@overload
def cross_entropy(x: Other, labels: Other, /, **options: Unpack[CrossEntropyOpen]) -> Any: ...
@remembered("scale")
def cross_entropy(
    x: Any,
    labels: Any,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    ignore_index: SupportsIndex = -100,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Cross entropy of each row with its label: ``-log_softmax(scale * x)[label]``, reading x once.

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray
        Logits: dtypes, shapes and strides as `softmax`.
    labels : array of integers, shape of x without `axis`
        Which element of its row is right, from 0; any strides. int32 and int64 are read as they
        are, others are converted.
    axis : int or None, optional
        The axis of a row, the last one by default; None: all of x in C order.
    scale : float or array, optional
        Multiplies x first; an array must broadcast with one value per row.
    ignore_index : int, optional
        The label of rows that do not count: their loss is 0, whatever they hold.
    return_lse : bool, optional
        Also return ``log(sum(exp(scale * x)))`` of every row, which the gradient needs.
    out : array or tuple of arrays, optional
        Where to write: exactly the shape and dtype of the result, any strides. With `return_lse` a
        pair.

    Returns
    -------
    loss : array, shape of x without `axis`
        Of each row, in nats; float32, or float64 for float64 and integers. Small ones have all
        their digits.
    lse : array, shape and dtype of loss
        Only with `return_lse`.

    Raises
    ------
    TypeError
        As `softmax`, or if labels are not integers.
    ValueError
        As `softmax`, or if a label of a NumPy array is no element of its row and not ignored.
        Labels on a device are not looked at before the call: the loss of such a row is NaN, and
        nothing outside of it is read.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    cross_entropy_backward : The gradient.
    logits_state : Of a part of a row, as a shard of a vocabulary.
    log_softmax : Of all elements.

    Notes
    -----
    Special values are those of `log_softmax`: a row with NaN, or of nothing but -inf, has a loss of
    NaN; a label of -inf one of +inf. Means and class weights are one expression more:
    ``loss.sum() / (labels != -100).sum()``, ``(weight[labels] * loss).sum()``. A z-loss is
    ``coefficient * lse**2``. There is no label smoothing.

    Examples
    --------
    >>> x = numpy.log(numpy.array([[1.0, 3.0], [2.0, 2.0], [5.0, 1.0]]))
    >>> cuattn.cross_entropy(x, numpy.array([0, 1, -100])) / numpy.log(2.0)
    array([2., 1., 0.])
    """
    call = request_logits.loss(x, labels, axis, scale, ignore_index, out, return_lse)
    return prepare(call)


@overload
def cross_entropy_backward(
    grad: Host | Number,
    x: Host,
    labels: Host,
    lse: Host,
    /,
    **options: Unpack[CrossEntropyBackward],
) -> NDArray[Any]: ...
@overload
def cross_entropy_backward(
    grad: Factor,
    x: Other,
    labels: Other,
    lse: Other,
    /,
    **options: Unpack[CrossEntropyBackward],
) -> Any: ...
@remembered("scale")
def cross_entropy_backward(
    grad: Any,
    x: Any,
    labels: Any,
    lse: Any,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    ignore_index: SupportsIndex = -100,
    index_offset: SupportsIndex | None = None,
    out: Any = None,
) -> Any:
    """Gradient of `cross_entropy` with respect to x, from one read of x and one write.

    Parameters
    ----------
    grad : float or array
        Gradient with respect to the loss, or what broadcasts to its shape: ``1 / n`` for the mean
        of n losses.
    x : cupy.ndarray or numpy.ndarray
        The logits; float16, bfloat16, float32 or float64.
    labels, axis, scale, ignore_index
        As in the forward call. Where a label is ignored, all of the gradient is 0, whatever the row
        and its lse hold.
    lse : array, shape of x without `axis`, float32 or float64
        The second result, ``cross_entropy(x, labels, ..., return_lse=True)[1]``.
    index_offset : int, optional
        Where in the row this part begins, if x is a part of the rows of labels and lse, as a shard
        of a vocabulary: a label that is not in it is in another one. Not negative.
    out : array, optional
        Where to write: shape and dtype of x, any strides. x itself is allowed.

    Returns
    -------
    dx : array, shape and dtype of x

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cross_entropy`. On a device the gradient of a row that has no such label is NaN.

    See Also
    --------
    cross_entropy : The forward pass.
    logits_state : The lse of rows in parts, merged.

    Notes
    -----
    ``dx = scale * grad * (exp(scale * x - lse) - [label])``, as exact as the lse: one of 20 in
    float32 has an error of 1e-6, and so have the probabilities. Where the lse is not finite, as of
    a row with NaN or +inf, or of nothing but -inf, the gradient is NaN. With ``out=x`` logits and
    gradient take the memory of one. The gradient of a z-loss, which is ``lse**2``, is that of the
    lse: ``2 * lse * softmax(x)``.

    Examples
    --------
    >>> x, labels = numpy.log(numpy.array([[1.0, 3.0], [2.0, 2.0]])), numpy.array([0, 1])
    >>> loss, lse = cuattn.cross_entropy(x, labels, return_lse=True)
    >>> cuattn.cross_entropy_backward(1 / 2, x, labels, lse)  # of loss.mean()
    array([[-0.375,  0.375],
           [ 0.25 , -0.25 ]])
    """
    call, kind = request_logits.loss_gradient(
        grad, x, labels, lse, axis, scale, ignore_index, index_offset, out
    )
    return prepare(call, kind)
