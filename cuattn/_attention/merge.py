"""Attention over keys in parts, from the results over each part."""

from __future__ import annotations

from typing import Any, SupportsIndex, overload

import numpy as np

from cuattn._arrays import scalars as _check_option
from cuattn._arrays.keywords import explained
from cuattn._arrays.types import Host, Layout, Merge, Other, Pair, Unpack
from cuattn._attention import checks as _check_attention
from cuattn._attention import request as _call_attention
from cuattn._attention import run as _run_attention
from cuattn._device import runtime as _jit
from cuattn._softmax import request as _call
from cuattn.reference import _attention as _reference_attention


@overload
def merge_attention(
    out_a: Host, lse_a: Host, out_b: Host, lse_b: Host, /, **options: Unpack[Merge]
) -> Pair: ...
@overload
def merge_attention(
    out_a: Other, lse_a: Other, out_b: Other, lse_b: Other, /, **options: Unpack[Merge]
) -> tuple[Any, Any]: ...
@explained
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
    _check_option.one_of("layout", layout, ("BHSD", "BSHD"))
    given = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    given = _call_attention.enter(given)
    metas = {name: _call.meta(array) for name, array in given.items()}
    expected = _call_attention.merge_results(
        (("out_a", metas["out_a"]), ("out_b", metas["out_b"])),
        (("lse_a", metas["lse_a"]), ("lse_b", metas["lse_b"])),
        layout,
    )
    inputs = list(given.items())
    made = None if out is None else _call_attention.check_out(out, list(expected), inputs)
    outs, lses = [given["out_a"], given["out_b"]], [given["lse_a"], given["lse_b"]]
    return _merge(inputs, outs, lses, expected, layout, made)


@overload
def merge_attention_states(
    outs: Host, lses: Host, /, *, axis: SupportsIndex = 0, layout: Layout = "BHSD"
) -> Pair: ...
@overload
def merge_attention_states(
    outs: Other, lses: Other, /, *, axis: SupportsIndex = 0, layout: Layout = "BHSD"
) -> tuple[Any, Any]: ...
@explained
def merge_attention_states(
    outs: Any, lses: Any, /, *, axis: SupportsIndex = 0, layout: Layout = "BHSD"
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
    _check_option.one_of("layout", layout, ("BHSD", "BSHD"))
    given = _call_attention.enter({"outs": outs, "lses": lses})
    outs, lses = given["outs"], given["lses"]
    _check_attention.states("outs", outs.shape, layout)
    place = _check_attention.state_axis(axis, outs.ndim)
    _check_attention.same_parts(outs.shape, lses.shape, place)
    metas = [
        array._replace(shape=shape[:place] + shape[place + 1 :])
        for array, shape in ((_call.meta(outs), outs.shape), (_call.meta(lses), lses.shape))
    ]
    expected = _call_attention.merge_results((("outs", metas[0]),), (("lses", metas[1]),), layout)
    out_parts, lse_parts = (
        [array[(slice(None),) * place + (i,)] for i in range(outs.shape[place])]
        for array in (outs, lses)
    )
    return _merge(list(given.items()), out_parts, lse_parts, expected, layout, None)


def _merge(
    inputs: list[tuple[str, Any]],
    outs: list[Any],
    lses: list[Any],
    expected: tuple[tuple[Any, np.dtype], ...],
    layout: str,
    made: Any,
) -> tuple[Any, Any]:
    runtime = _jit.runtime_of(inputs[0][1])
    if runtime is None:
        made = tuple(np.empty(*one) for one in expected) if made is None else made
        views = _views(np, outs, lses, made, layout)
        _reference_attention.merge(*views)
        return made
    _call_attention.check_alignment(runtime, inputs, made)
    with runtime.on(runtime.device(inputs[0][1])):
        made = tuple(runtime.empty(*one) for one in expected) if made is None else made
        _run_attention.merge(*_views(runtime.xp, outs, lses, made, layout))
    return made


def _views(xp: Any, outs: list[Any], lses: list[Any], made: Any, layout: str) -> tuple[Any, ...]:
    """Canonical views of the parts and the results."""
    canonical, whole = _call_attention.canonical, _call_attention.whole_elements
    out, lse = made
    lead = (None,) * (3 - lse.ndim)
    return (
        [canonical(whole(xp, part), layout) for part in outs],
        [whole(xp, part)[lead] for part in lses],
        canonical(out, layout),
        lse[lead],
    )
