"""What softmax and top-k have to know of a row, in forms that merge."""

from __future__ import annotations

from typing import Any, SupportsIndex, TypeVar, overload

import numpy as np

from cuattn import reference
from cuattn._arrays import checks as _check
from cuattn._arrays import scalars as _check_option
from cuattn._arrays import types as _types
from cuattn._arrays.keywords import explained
from cuattn._arrays.types import Axis, Factor, Host, Other, Unpack
from cuattn._device import runtime as _jit
from cuattn._device.params import STATE_MERGE, TOPK_STATE_MERGE
from cuattn._softmax import plan as _plan
from cuattn._softmax import request as _call
from cuattn._softmax import run as _run
from cuattn._topk import plan_radix as _plan_radix
from cuattn._topk import run as _run_topk
from cuattn.results import SoftmaxState, SoftmaxTopKState

State = TypeVar("State", SoftmaxState, SoftmaxTopKState)


@overload
def softmax_state(x: Host, /, axis: Axis = -1, *, scale: Factor = None) -> SoftmaxState: ...
@overload
def softmax_state(x: Other, /, axis: Axis = -1, *, scale: Factor = None) -> Any: ...
@explained
def softmax_state(x: Any, /, axis: Axis = -1, *, scale: Any = None) -> SoftmaxState:
    """What a softmax has to know of a row, in a form that merges.

    Parameters
    ----------
    x, axis, scale
        As `softmax`.

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

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, arXiv:1805.02867, section 3.1.

    Examples
    --------
    >>> cuattn.softmax_state(numpy.array([[0.0, 0.0, -numpy.inf]]))
    SoftmaxState(m=array([0.]), l=array([2.]))
    """
    x = _call.enter("x", x)
    scale_array, scale_value = _call.scale(scale, ("x", x))
    request = _call.Request(
        "state",
        _check_option.axes(axis, x.ndim),
        _call.meta(x),
        scale=_call.meta(scale_array),
    )
    runtime = _jit.runtime_of(x)
    if runtime is None:
        acc = _call.results(request).acc
        scale = _call.either(scale_array, scale_value)
        state = reference.softmax_state(x, request.axes, scale=scale)
        return SoftmaxState(*(_call.rounded(part, acc) for part in state))
    made = _run.run(request, _run.Operands(x, scale=scale_array), scale_value)
    return SoftmaxState(made.stat, made.stat_l)


@overload
def softmax_topk_state(
    x: Host, k: SupportsIndex, /, **options: Unpack[_types.SoftmaxTopKState]
) -> SoftmaxTopKState: ...
@overload
def softmax_topk_state(
    x: Other, k: SupportsIndex, /, **options: Unpack[_types.SoftmaxTopKState]
) -> Any: ...
@explained
def softmax_topk_state(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    index_offset: SupportsIndex = 0,
) -> SoftmaxTopKState:
    """What a softmax and its k most probable elements have to know of a row, in a form that merges.

    For rows whose parts never meet: shards of a vocabulary on several GPUs, chunks of a large
    projection. Probabilities are ``exp(state.values - state.lse[..., None])``.

    Parameters
    ----------
    x, axis, scale
        As `softmax_topk`.
    k : int
        Not negative; more than the row has are filled up.
    index_offset : int, optional
        Added to every index: where in the row this part begins. Not negative.

    Returns
    -------
    state : SoftmaxTopKState
        m and l as those of `softmax_state`. ``values``, the k largest of ``scale * x`` in float32
        (float64 for float64), best first, and ``indices``, int64, have the shape of m and one more
        axis of length k, the last one whatever `axis` is. What a row lacks has value -inf and
        index -1.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax_topk`.

    See Also
    --------
    merge : The state of two parts of a row.

    Examples
    --------
    >>> state = cuattn.softmax_topk_state(numpy.array([1.0, 3.0]), 1, index_offset=10)
    >>> state.values, state.indices
    (array([3.]), array([11]))
    """
    x = _call.enter("x", x)
    scale_array, scale_value = _call.scale(scale, ("x", x))
    x, axis, scale_array, _ = _call.rows(x, axis, scale_array)
    k, offset = _call.most_of_state(k, x, axis), _call.index_offset(index_offset, x, axis)
    request = _call.TopKRequest("state", axis, k, _call.meta(x), scale=_call.meta(scale_array))
    expected = _call.topk_results(request)
    if _jit.runtime_of(x) is None:
        scale = _call.either(scale_array, scale_value)
        found = reference.softmax_topk_state(x, k, axis=axis, scale=scale, index_offset=offset)
        m, l, values = (_call.rounded(part, expected.acc) for part in found[:3])  # noqa: E741
        return SoftmaxTopKState(m, l, values, found.indices)
    options = _run_topk.Options(scale_value, index_offset=offset)
    made = _run_topk.run(request, _run_topk.Operands(x, scale=scale_array), options)
    return SoftmaxTopKState(made.stat, made.stat_l, made.values, made.indices)


@explained
def merge(a: State, b: State, /) -> State:
    """State of a row from the states of two parts of it: associative up to rounding.

    Parameters
    ----------
    a, b : SoftmaxState or SoftmaxTopKState
        Both of one kind, shape and dtype. Empty are the states of nothing: ``(-inf, 0)``, and for
        the selection ``(-inf, -1)`` in every place.

    Returns
    -------
    state : SoftmaxState or SoftmaxTopKState
        Of a selection the k best of both, in the order of `softmax_topk_state`; values and indices
        are those of the whole row exactly, however it was split.

    Raises
    ------
    TypeError
        If a or b is no state, or they or their arrays differ in kind, library or dtype.
    ValueError
        If their shapes differ or they are on different devices.

    See Also
    --------
    softmax_state : The state of a row or of a part of it.
    softmax_topk_state : With the k largest elements.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, arXiv:1805.02867, section 3.1.

    Examples
    --------
    >>> x = numpy.array([0.0, 1.0, 2.0, 3.0])
    >>> whole = cuattn.merge(cuattn.softmax_state(x[:1]), cuattn.softmax_state(x[1:]))
    >>> bool(numpy.isclose(whole.lse, cuattn.logsumexp(x)))
    True
    """
    kind = SoftmaxTopKState if isinstance(a, SoftmaxTopKState) else SoftmaxState
    _check.state("a", a, kind)
    _check.state("b", b, kind)
    arrays = _arrays(a, b)
    m, k = arrays[0], arrays[2].shape[-1] if kind is SoftmaxTopKState else 0
    runtime = _jit.runtime_of(m)
    if runtime is None:
        size = len(kind._fields)
        both = reference.merge(kind(*arrays[:size]), kind(*arrays[size:]))
        return kind(
            *(_call.rounded(part, like.dtype) for part, like in zip(both, arrays, strict=False))
        )
    with runtime.on(runtime.device(m)):
        arrays = [
            array if array.flags.c_contiguous else runtime.xp.ascontiguousarray(array)
            for array in arrays
        ]
        size = len(kind._fields)
        merged = [runtime.empty(array.shape, array.dtype) for array in arrays[:size]]
        if m.size:
            fields = size if k else 2  # nothing selected: m and l alone
            parts = arrays[:fields], arrays[size : size + fields], merged[:fields]
            addresses = [runtime.address(array) for part in parts for array in part]
            if k:
                kernel = _plan_radix.plan_topk_state_merge(m.dtype.name, m.size, k)
                params = TOPK_STATE_MERGE.struct.pack(*addresses, m.size, k)
            else:
                kernel = _plan.plan_state_merge(m.dtype.name, m.size)
                params = STATE_MERGE.struct.pack(*addresses, m.size)
            runtime.launch(kernel, params, tuple(arrays), tuple(merged))
    return kind(*merged)


def _arrays(a: Any, b: Any) -> list[Any]:
    """The arrays of two states that fit each other, all of a and then all of b."""
    m: Any = _call.enter("a.m", a.m)
    first, shape, dtype = ("a.m", m), m.shape, m.dtype
    _check.state_dtype(dtype)
    arrays: list[Any] = []
    selected: tuple[int, ...] = ()
    for owner, state in (("a", a), ("b", b)):
        for field, value in zip(state._fields, state, strict=True):
            name = f"{owner}.{field}"
            array = _call.enter(name, value, first)
            like: Any = ("a.m", shape, dtype)
            if name == "a.values":
                selected = (*shape, *array.shape[-1:])
            if field in ("values", "indices"):
                kind = dtype if field == "values" else np.dtype(np.int64)
                like = ("a.m with one more axis", selected, kind)
            if (array.shape, array.dtype) != like[1:]:
                _check.same_shape_and_dtype(name, array.shape, array.dtype, *like)
            runtime = _jit.runtime_of(array)
            if runtime is not None and runtime.address(array) % array.itemsize:
                raise _check.misaligned(name, array)
            arrays.append(array)
    return arrays
