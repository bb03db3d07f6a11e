"""Log-sum-exp, and the mergeable state behind it."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn import _call, _check, _jit, _plan, _run, reference
from cuattn.reference import SoftmaxState

Axis = int | tuple[int, ...] | None


def logsumexp(
    x: Any,
    /,
    axis: Axis = None,
    *,
    b: Any = None,
    where: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
    out: Any = None,
) -> Any:
    """Logarithm of a sum of exponentials: ``log(sum(b * exp(x)))``, reading x once.

    Parameters
    ----------
    x, where, dtype
        As `softmax`.
    axis : int, tuple of int or None, optional
        Axes to reduce; None, the default as in `scipy.special.logsumexp`: all.
    b : float or array, optional
        Weights; must broadcast to the shape of x. An element of weight 0 does not take part, even
        if it is inf or NaN.
    keepdims : bool, optional
        Keep reduced axes with length 1.
    out : array, optional
        Where to write: exactly the shape and dtype of the result.

    Returns
    -------
    lse : array
        Natural logarithm, in the dtype of x (float64 for integers; the wider one where b is a wider
        array), or `dtype`. A negative sum gives NaN, an empty one -inf.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `softmax`.
    """
    x = _call.enter("x", x)
    first = ("x", x)
    weight, number = (None, 1.0) if b is None else _call.array_or_number("b", b, first)
    where = _call.mask(where, first)
    request = _call.Request(
        "lse",
        _check.axes(axis, x.ndim),
        _call.meta(x),
        where=_call.meta(where),
        weight=_call.meta(weight),
        dtype=_check.float_dtype(dtype),
        keepdims=bool(keepdims),
    )
    expected = _call.results(request)
    if out is not None:
        inputs = [first, ("where", where), ("b", weight)]
        (out,) = _call.check_out(out, [(expected.stat_shape, expected.stat_dtype)], inputs)
    runtime = _jit.runtime_of(x)
    if runtime is None:
        return reference.logsumexp(
            x,
            request.axes,
            b=b,
            where=where,
            keepdims=request.keepdims,
            dtype=expected.dtype,
            out=out,
        )
    if weight is None and b is not None:
        with runtime.on(runtime.device(x)):
            weight = runtime.xp.full((), number, expected.acc)
        request = request._replace(weight=_call.meta(weight), dtype=expected.dtype)
    return _run.run(request, _run.Operands(x, where=where, weight=weight), stat=out).stat


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
        nothing is ``(-inf, 0)``; where m is infinite, l is the sum without m.

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
    """
    x = _call.enter("x", x)
    scale_array, scale_value = _call.scale(scale, ("x", x))
    request = _call.Request(
        "state",
        _check.axes(axis, x.ndim),
        _call.meta(x),
        scale=_call.meta(scale_array),
    )
    runtime = _jit.runtime_of(x)
    if runtime is None:
        acc = _call.results(request).acc
        state = reference.softmax_state(x, request.axes, scale=scale)
        return SoftmaxState(*(np.asarray(part, acc) for part in state))
    made = _run.run(request, _run.Operands(x, scale=scale_array), scale_value)
    return SoftmaxState(made.stat, made.stat_l)


def merge(a: SoftmaxState, b: SoftmaxState, /) -> SoftmaxState:
    """State of a row from the states of two parts of it: associative up to rounding.

    Parameters
    ----------
    a, b : SoftmaxState
        Of one shape and dtype; ``(-inf, 0)`` is the state of nothing.

    Returns
    -------
    state : SoftmaxState

    Raises
    ------
    TypeError
        If a or b is no state, or their arrays differ in library or dtype.
    ValueError
        If their shapes differ or they are on different devices.

    References
    ----------
    .. [1] M. Milakov, N. Gimelshein, arXiv:1805.02867, section 3.1.
    """
    _check.state("a", a, SoftmaxState)
    _check.state("b", b, SoftmaxState)
    first = ("a.m", _call.enter("a.m", a.m))
    arrays = [first[1]]
    shape, dtype = first[1].shape, first[1].dtype
    _check.state_dtype(dtype)
    for name, value in (("a.l", a.l), ("b.m", b.m), ("b.l", b.l)):
        array = _call.enter(name, value, first)
        if array.shape != shape or array.dtype != dtype:
            _check.same_shape_and_dtype(name, array.shape, array.dtype, "a.m", shape, dtype)
        arrays.append(array)
    runtime = _jit.runtime_of(arrays[0])
    if runtime is None:
        both = reference.merge(a, b)
        return SoftmaxState(*(np.asarray(part, dtype) for part in both))
    for name, array in zip(("a.m", "a.l", "b.m", "b.l"), arrays, strict=True):
        if runtime.address(array) % array.itemsize:
            raise _check.misaligned(name, array)
    with runtime.on(runtime.device(arrays[0])):
        arrays = [
            array if array.flags.c_contiguous else runtime.xp.ascontiguousarray(array)
            for array in arrays
        ]
        m, l = (runtime.empty(shape, dtype) for _ in "ml")  # noqa: E741
        if m.size:
            addresses = (runtime.address(array) for array in (*arrays, m, l))
            params = _plan.STATE_MERGE.pack(*addresses, m.size)
            kernel = _plan.plan_state_merge(dtype.name, m.size)
            runtime.launch(kernel, params, tuple(arrays), (m, l))
    return SoftmaxState(m, l)
