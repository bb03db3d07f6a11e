"""Attention over keys in parts, from the results over each part."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

from cuattn._arrays.attention_types import Layout, Merge
from cuattn._arrays.types import Host, Other, Pair, Unpack
from cuattn._attention import request_merge
from cuattn._attention.run_merge import prepare_merge
from cuattn._device.signatures import remembered


@overload
def merge_attention(
    out_a: Host, lse_a: Host, out_b: Host, lse_b: Host, /, **options: Unpack[Merge]
) -> Pair: ...
@overload
def merge_attention(
    out_a: Other, lse_a: Other, out_b: Other, lse_b: Other, /, **options: Unpack[Merge]
) -> tuple[Any, Any]: ...
@remembered()
def merge_attention(
    out_a: Any,
    lse_a: Any,
    out_b: Any,
    lse_b: Any,
    /,
    *,
    layout: Layout = "BHSD",
    out: Any = None,
) -> tuple[Any, Any]:
    """Attention over all keys, from that over two parts of them: associative up to rounding.

    Parts weigh as ``exp(lse)``. One with an lse of -inf weighs nothing, whatever its out holds.

    Parameters
    ----------
    out_a, out_b : cupy.ndarray or numpy.ndarray, shape (B, H, S, D), (H, S, D) or (S, D)
        As `attention` returns them; of one shape and dtype.
    lse_a, lse_b : array, shape (B, H, S) (leading axes as out_a has them)
        Natural logarithms; float32, or float64 where out_a is float64.
    layout : {"BHSD", "BSHD"}, optional
        "BSHD": out_a, out_b and the result are (B, S, H, D) or, as of `attention_varlen`,
        (S, H, D).
    out : tuple of two arrays, optional
        Where to write: exactly the shapes and dtypes of the results, any strides, apart from every
        input.

    Returns
    -------
    out : array, shape and dtype of out_a
    lse : array, shape and dtype of lse_a
        Natural logarithm; -inf, with 0 in `out`, where that of both parts is.

    Raises
    ------
    TypeError
        If an argument is not an array, its dtype is not supported, or arrays of two libraries meet.
    ValueError
        If shapes do not fit, arrays are on different devices, or `out` overlaps an input.

    See Also
    --------
    merge_attention_states : Any number of parts.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, "Online normalizer calculation for softmax", arXiv:1805.02867,
       section 3.1.

    Examples
    --------
    >>> q, k, v = numpy.zeros((1, 4)), numpy.zeros((3, 4)), numpy.array([[1.0], [2.0], [6.0]])
    >>> first = cuattn.attention(q, k[:1], v[:1], return_lse=True)
    >>> others = cuattn.attention(q, k[1:], v[1:], return_lse=True)
    >>> cuattn.merge_attention(*first, *others)[0].round(6)
    array([[3.]])
    """
    return prepare_merge(request_merge.pair(out_a, lse_a, out_b, lse_b, layout, out))


@overload
def merge_attention_states(
    outs: Host, lses: Host, /, *, axis: SupportsIndex = 0, **options: Unpack[Merge]
) -> Pair: ...
@overload
def merge_attention_states(
    outs: Other, lses: Other, /, *, axis: SupportsIndex = 0, **options: Unpack[Merge]
) -> tuple[Any, Any]: ...
@remembered()
def merge_attention_states(
    outs: Any,
    lses: Any,
    /,
    *,
    axis: SupportsIndex = 0,
    layout: Layout = "BHSD",
    out: Any = None,
) -> tuple[Any, Any]:
    """Attention over all keys, from that over any number of parts of them.

    Parameters
    ----------
    outs : cupy.ndarray or numpy.ndarray
        What `merge_attention` takes, with one more axis: the parts.
    lses : array
        Likewise, with the parts on the same axis.
    axis : int, optional
        Where the parts lie; negative ones count from the last axis of outs.
    layout : {"BHSD", "BSHD"}, optional
        As `merge_attention`, without the axis of the parts.
    out : tuple of two arrays, optional
        As `merge_attention`.

    Returns
    -------
    out, lse : array
        As `merge_attention`; of no part 0 and -inf.

    Raises
    ------
    TypeError, ValueError
        As `merge_attention`.
    numpy.exceptions.AxisError
        If outs or lses has no such axis.

    See Also
    --------
    merge_attention : Two parts.

    Examples
    --------
    >>> q, k, v = numpy.zeros((1, 4)), numpy.zeros((3, 4)), numpy.array([[1.0], [2.0], [6.0]])
    >>> parts = [cuattn.attention(q, k[[i]], v[[i]], return_lse=True) for i in range(3)]
    >>> outs, lses = (numpy.stack(arrays) for arrays in zip(*parts, strict=True))
    >>> cuattn.merge_attention_states(outs, lses)[0].round(6)
    array([[3.]])
    """
    return prepare_merge(request_merge.stacked(outs, lses, axis, layout, out))
