"""Arguments of the public functions as calls: arrays, what is static, and what comes out.

What does not fit is found by the requests of `cuattn`, which get shapes and dtypes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cuattn._arrays.interchange import on_host
from cuattn._softmax import request as softmax_request
from cuattn.jax import _gradients
from cuattn.jax._calls import Arrays, Call, varying


def taken(**given: Any) -> tuple[Arrays, dict[str, Any]]:
    """The arrays among arguments, and all of these for a check, arrays without their contents."""
    arrays, shown = {}, dict(given)
    for name, value in given.items():
        is_option = name not in ("x", "q", "k", "v")
        if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0 and is_option:
            continue  # a number
        if isinstance(value, (np.ma.MaskedArray, np.matrix)):
            continue  # an error
        if isinstance(value, (jax.Array, np.ndarray, np.generic)):
            arrays[name] = jnp.asarray(value)
        elif on_host(value) is not None:
            arrays[name] = jnp.from_dlpack(value)
        if name in arrays:
            array = arrays[name]
            shown[name] = np.broadcast_to(np.zeros((), array.dtype), array.shape)
    return arrays, shown


def _static(value: Any) -> Any:
    """An option as one that can be hashed."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.item()
    return tuple(map(_static, value)) if isinstance(value, (tuple, list)) else value


def results_of(
    function: str, arrays: Arrays, options: dict[str, Any], results: list[Any]
) -> list[Any]:
    how = tuple((name, _static(value)) for name, value in options.items())
    return _gradients.run(Call(function, how, tuple(results)), varying(arrays, arrays))


def rows(function: str, arrays: Arrays, call: Any, **options: Any) -> list[Any]:
    """Results of a call of the softmax family."""
    request, expected = call.request, softmax_request.expect(call.request)
    ndim = len(request.x.shape)
    if request.where is not None and "where" not in arrays:
        arrays["where"] = jnp.zeros((), bool)
    dtype, stat = map(jax.dtypes.canonicalize_dtype, (expected.dtype, expected.stat_dtype))
    options |= {"axis": tuple(axis - ndim for axis in request.axes), "dtype": np.dtype(dtype)}
    if "scale" not in arrays and function != "logsumexp":
        options["scale"] = call.scale
    results = [(request.x.shape, dtype), (expected.stat_shape, stat)]
    if function == "logsumexp":
        results = [(expected.row_shape, dtype)]
    elif not call.wants_stat:
        results = results[:1]
    return results_of(function, _padded(arrays, ndim), options, results)


def _padded(arrays: Arrays, ndim: int) -> Arrays:
    """Arrays of the same number of dimensions."""
    return {
        name: array.reshape((1,) * (ndim - array.ndim) + array.shape)
        for name, array in arrays.items()
    }


def selection(function: str, arrays: Arrays, call: Any, axis: Any, **options: Any) -> list[Any]:
    """Results of a selection; along all elements, rows are made one of all."""
    x, request, expected = arrays["x"], call.request, call.expected
    if request.where is not None and "where" not in arrays:
        arrays["where"] = jnp.zeros((), bool)
    if axis is None or not x.ndim:
        if "where" in arrays and arrays["where"].ndim:
            arrays["where"] = jnp.broadcast_to(arrays["where"], x.shape)
        arrays = {name: array.reshape(-1) for name, array in arrays.items()}
    arrays = _padded(arrays, len(request.x.shape))
    options |= {"axis": request.axis - len(request.x.shape), "k": request.k}
    if function == "softmax_topk" and "scale" not in arrays:
        options["scale"] = call.options.scale
    found = (expected.shape, expected.dtype), (expected.shape, np.dtype(np.int64))
    results = [*found, (expected.stat_shape, expected.acc)][: len(call.fields)]
    return results_of(function, arrays, options, results)
