"""The k best elements of each row, alone or with their softmax."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from cuattn._arrays import types
from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKLse, TopK
from cuattn._arrays.types import Host, Mode, Other, Output, Unpack
from cuattn._device.signatures import remembered
from cuattn._topk import request
from cuattn._topk.run import prepare


@overload
def top_k(x: Host, k: SupportsIndex, /, **options: Unpack[types.TopK]) -> TopK: ...
@overload
def top_k(x: Other, k: SupportsIndex, /, **options: Unpack[types.TopK]) -> Any: ...
@remembered()
def top_k(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    mode: Mode = "largest",
    sorted: bool = True,
    out: Any = None,
) -> TopK:
    """The k largest or smallest elements along an axis, best first, and where they are.

    As `numpy.top_k`, with the order of ties and of NaN settled. x is read once for k up to 256,
    twice beyond; nothing of its size is written.

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray
        float16, bfloat16, float32, float64 or integers, of any shape and strides. An array of
        another library is taken without a copy. A 0-dimensional array is a row of one element.
    k : int
        0 to the length of the axis.
    axis : int or None, optional
        None: all elements, in C order.
    mode : {"largest", "smallest"}, optional
    sorted : bool, optional
        False permits results in any order; they are sorted all the same.
    out : tuple of two arrays, optional
        Where to write values and indices: exactly the shapes and dtypes of the results, any
        strides, apart from x.

    Returns
    -------
    values : array
        dtype of x, and its shape but for `axis`, which has length k. NaN comes after every number,
        in both modes.
    indices : array of int64, shape of values
        Along `axis`. Of equal elements (-0.0 and 0.0, two NaN) the one of the lower index is first.

    Raises
    ------
    TypeError
        If x is not an array, its dtype is not supported, or k or axis is not an integer.
    ValueError
        If k is negative or more than there is, `mode` is another word, or `out` does not fit or
        overlaps x.
    numpy.exceptions.AxisError
        If the axis is out of range.

    See Also
    --------
    softmax_topk : The most probable elements of a softmax.

    Notes
    -----
    A warp keeps the k best that it has seen sorted in its registers and looks closer only at tiles
    whose maximum beats the k-th. It takes tiles from all over the row, so that ascending rows cost
    little more than random ones. Runs on the current stream of the device of x; does not
    synchronise.

    Examples
    --------
    >>> cuattn.top_k(numpy.array([3, 1, 3, 2]), 3)
    TopK(values=array([3, 3, 2]), indices=array([0, 2, 3]))
    """
    call = request.top_k(x, k, axis, mode, sorted, out)
    return prepare(call, TopK)


@overload
def softmax_topk(
    x: Host, k: SupportsIndex, /, **options: Unpack[types.SoftmaxTopKAlone]
) -> SoftmaxTopK: ...
@overload
def softmax_topk(
    x: Host, k: SupportsIndex, /, **options: Unpack[types.SoftmaxTopKWithLse]
) -> SoftmaxTopKLse: ...
@overload
def softmax_topk(
    x: Other, k: SupportsIndex, /, **options: Unpack[types.SoftmaxTopKOpen]
) -> Any: ...
@remembered("scale")
def softmax_topk(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    where: Any = None,
    renormalize: bool = False,
    output: Output = "prob",
    out: Any = None,
    return_lse: bool = False,
) -> SoftmaxTopK | SoftmaxTopKLse:
    """The k most probable elements of the softmax along an axis, without the softmax.

    The same as `softmax` followed by `top_k`, in one read of x and one exponential per element for
    k up to 256 (three reads beyond); no probability of another element is ever written.

    Parameters
    ----------
    x : cupy.ndarray or numpy.ndarray
        float16, bfloat16, float32 or float64; else as `top_k`.
    k, axis
        As `top_k`.
    scale, where
        As `softmax`. Elements are ordered by ``scale * x``, rounded to the digits of float32
        (float64 for float64); those that do not take part count as -inf there.
    renormalize : bool, optional
        Probabilities of the k selected elements among themselves instead of in the whole row: what
        routers of experts call normalised top-k.
    output : {"prob", "log_prob", "logit"}, optional
        Probabilities, their natural logarithms, or ``scale * x``.
    out : tuple of arrays, optional
        Where to write values, indices and, with `return_lse`, lse: as in `top_k`, apart from every
        input.
    return_lse : bool, optional
        Also return the natural log-sum-exp of the whole row.

    Returns
    -------
    values : array
        dtype of x, and its shape but for `axis`, which has length k; best first. 0 (-inf) for an
        element that does not take part.
    indices : array of int64, shape of values
        As those of `top_k`.
    lse : array, shape of x without `axis`
        float32, or float64 where x is float64. Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax` and `top_k`.

    See Also
    --------
    top_k : Selection without a softmax.
    softmax_topk_state : The same of a part of a row.

    Notes
    -----
    A row that holds NaN or +inf, or nothing but -inf, has the values of `softmax`. Scores keep
    their order beyond the range of float32, where as logits they are infinite; for k above 256 they
    must be finite. A logarithm, or an lse, near 0 has the digits of a sum near 1.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867,
       algorithm 4.

    Examples
    --------
    >>> cuattn.softmax_topk(numpy.log(numpy.array([1.0, 4.0, 5.0])), 2)
    SoftmaxTopK(values=array([0.5, 0.4]), indices=array([2, 1]))
    """
    call = request.softmax_topk(x, k, axis, scale, where, renormalize, output, out, return_lse)
    return prepare(call, SoftmaxTopKLse if call.options.wants_lse else SoftmaxTopK)
