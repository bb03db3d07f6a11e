"""The first half of every call: whether its arguments fit, and what comes out of it."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import checks as _check
from cuattn._arrays import scalars as _check_option
from cuattn._arrays.interchange import adopt, is_cupy, on_host
from cuattn._arrays.row_layout import Meta
from cuattn._device import runtime as _jit

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)


class Request(NamedTuple):
    """One call without its data; `axes` are sorted and not negative."""

    result: str  # a key of _plan.RESULTS, "grad" or "log_grad"
    axes: tuple[int, ...]
    x: Meta
    y: Meta | None = None
    where: Meta | None = None
    weight: Meta | None = None
    scale: Meta | None = None
    offsets: Meta | None = None
    dtype: np.dtype | None = None  # of the result, if it was given
    keepdims: bool = False


class Results(NamedTuple):
    """Dtypes and shapes of a call: `stat` is one number a row (lse or state)."""

    dtype: np.dtype
    acc: np.dtype
    stat_dtype: np.dtype
    row_shape: tuple[int, ...]  # with reduced axes of length 1
    stat_shape: tuple[int, ...]


class TopKRequest(NamedTuple):
    """One call of a selection without its data; `axis` is not negative."""

    result: str  # "top_k", or a key of _plan_topk.OUTPUTS: what softmax_topk returns, "state"
    axis: int
    k: int
    x: Meta
    where: Meta | None = None
    scale: Meta | None = None


class TopKResults(NamedTuple):
    """Dtypes and shapes of a selection: values and indices, and one number a row."""

    dtype: np.dtype
    acc: np.dtype
    shape: tuple[int, ...]
    stat_shape: tuple[int, ...]


def meta(array: Any) -> Any:
    """Meta of an array; None stays None."""
    return None if array is None else Meta(array.shape, array.strides, array.dtype)


def enter(name: str, value: Any, first: tuple[str, Any] | None = None) -> Any:
    """`value` as a NumPy or CuPy array, of the library and device of `first` (name and array)."""
    plain = type(value) is np.ndarray or is_cupy(value)  # as most are
    host = type(value) is np.ndarray if plain else on_host(value)
    if host is None:
        raise _check.not_an_array(name, value, _libraries(first))
    if first is not None and host != isinstance(first[1], np.ndarray):
        raise _check.no_mix(name, value, *first)
    array = value if plain else _adopted(name, value)
    if first is not None and not host and array.data.device_id != first[1].data.device_id:
        raise _check.other_device(name, array.data.device_id, first[0], first[1].data.device_id)
    return array


def _libraries(first: tuple[str, Any] | None) -> tuple[str, ...]:
    """What makes arrays that go with `first`."""
    if first is not None:
        return ("cupy",) if is_cupy(first[1]) else ("numpy",)
    return ("numpy", "cupy") if "cupy" in sys.modules else ("numpy",)


def _adopted(name: str, value: Any) -> Any:
    if isinstance(value, (np.ma.MaskedArray, np.matrix)):
        raise _check.not_plain(name, value)
    try:
        return adopt(value)
    except (BufferError, TypeError, ValueError) as error:
        raise _check.not_handed_out(name, value, error) from error


def enter_pair(name: str, value: Any, other: str, other_value: Any) -> tuple[Any, Any]:
    """Two arrays that must be of one library and on one device."""
    # Before either enters: taking in another library's array touches its device.
    host = on_host(value)
    if host is not None and on_host(other_value) is (not host):
        raise _check.no_mix(other, other_value, name, value)
    first = (name, enter(name, value))
    return first[1], enter(other, other_value, first)


def array_or_number(name: str, value: Any, first: tuple[str, Any]) -> tuple[Any, float]:
    """An option that is one number or an array of them: (array, 1.0) or (None, number)."""
    array = one_or_array(name, value, first)
    if isinstance(array, float):
        return None, array
    if array.ndim == 0 and isinstance(array, np.ndarray):
        return None, float(array)
    return array, 1.0


def one_or_array(name: str, value: Any, first: tuple[str, Any]) -> Any:
    """A number of Python as float, else an array; one without dimensions may be of the host beside
    those of a device."""
    if type(value) is float:
        return value
    host = on_host(value)
    if host is None and not isinstance(value, (list, tuple)):
        return _check_option.number(name, value, "a real number or an array of them")
    if host:
        value = _adopted(name, value)
    array = value if host and value.ndim == 0 else enter(name, value, first)
    _check.real(name, array.dtype)
    return array


def scale(value: Any, first: tuple[str, Any]) -> tuple[Any, float]:
    return (None, 1.0) if value is None else array_or_number("scale", value, first)


def mask(where: Any, first: tuple[str, Any]) -> Any:
    """`where` as an array; True, as in NumPy's functions, means no mask. One without dimensions may
    be of the host beside those of a device, until it is `placed` there."""
    if where is None or where is True:
        return None
    if where is False:
        return np.zeros((), np.bool_)
    if on_host(where):
        where = _adopted("where", where)
        if where.ndim == 0:
            return where
    return enter("where", where, first)


def either(array: Any, number: float) -> Any:
    """What `array_or_number` was given, for the references."""
    return number if array is None else array


def rounded(part: Any, dtype: np.dtype) -> Any:
    """What a reference has computed in float64, in the dtype of the result; overflow is inf."""
    with np.errstate(all="ignore"):
        return np.asarray(part, dtype)


def placed(array: Any, runtime: Any, x: Any) -> Any:
    """An array without dimensions as one of the device of x, if it is one of the host."""
    if not isinstance(array, np.ndarray) or runtime.xp is np:
        return array
    with runtime.on(runtime.device(x)):
        return runtime.xp.full((), array[()], array.dtype)


def rows(x: Any, axis: Any, scale: Any = None, where: Any = None) -> tuple[Any, int, Any, Any]:
    """x, one axis of it, scale and where; axis None is that of all elements, in C order."""
    axis = None if axis is None else _check_option.one_axis(axis, x.ndim)
    if axis is not None and x.ndim:
        return x, axis, scale, where
    if where is not None and x.ndim and where.ndim:
        _check.broadcastable("where", where.shape, x.shape, "the shape of x")
        runtime = _jit.runtime_of(x)
        where = (np if runtime is None else runtime.xp).broadcast_to(where, x.shape)
    one = scale is not None and scale.size == 1 and scale.ndim <= x.ndim
    return (
        x.reshape(-1),
        0,
        scale.reshape(1) if one else scale,
        where.reshape(-1) if where is not None and where.ndim else where,
    )


def most(k: Any, x: Any, axis: int) -> int:
    """k of a selection from the whole row."""
    return _check_option.count("k", k, x.shape[axis], ", the length of the axis")


def most_of_state(k: Any, x: Any, axis: int) -> int:
    """k of a selection that fills up what a row lacks."""
    rows = max(x.size // max(x.shape[axis], 1), 1)
    why = ", so that the result can be addressed"
    return _check_option.count("k", k, _check_option.MOST_INDEX // (8 * rows), why)


def index_offset(value: Any, x: Any, axis: int) -> int:
    """What is added to every index of a row."""
    largest = _check_option.MOST_INDEX - x.shape[axis]
    return _check_option.count("index_offset", value, largest, ", so that every index is an int64")


@lru_cache(maxsize=4096)
def results(request: Request) -> Results:
    """Check metas and options, and say what comes out."""
    x = request.x
    if request.y is not None:
        _check.floating("grad", x.dtype)
        _check.same_shape_and_dtype("y", request.y.shape, request.y.dtype, "grad", x.shape, x.dtype)
    else:
        _check.floating_or_integer("x", x.dtype)
    weight = None if request.weight is None else request.weight.dtype
    dtype = _check.result_dtype(request.dtype, x.dtype, weight)
    row_shape = tuple(1 if d in request.axes else size for d, size in enumerate(x.shape))
    if request.offsets is not None:
        row_shape = (request.offsets.shape[0] - 1, *x.shape[1:])
    if request.scale is not None:
        _check.broadcastable("scale", request.scale.shape, row_shape, "one value a row")
    if request.where is not None:
        _check.where_dtype(request.where.dtype)
        _check.broadcastable("where", request.where.shape, x.shape, "the shape of x")
    if request.weight is not None:
        _check.broadcastable("b", request.weight.shape, x.shape, "the shape of x")
    acc = FLOAT64 if dtype == FLOAT64 else FLOAT32
    stat_shape = row_shape
    if not request.keepdims:
        stat_shape = tuple(size for d, size in enumerate(row_shape) if d not in request.axes)
    return Results(dtype, acc, dtype if request.result == "lse" else acc, row_shape, stat_shape)


@lru_cache(maxsize=4096)
def topk_results(request: TopKRequest) -> TopKResults:
    """Check metas and options, and say what comes out."""
    x, axis = request.x, request.axis
    if request.result == "top_k":
        _check.floating_or_integer("x", x.dtype)
    else:
        _check.floating("x", x.dtype)
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    if request.scale is not None:
        target = (*before, 1, *after)
        _check.broadcastable("scale", request.scale.shape, target, "one value a row")
    if request.where is not None:
        _check.where_dtype(request.where.dtype)
        _check.broadcastable("where", request.where.shape, x.shape, "the shape of x")
    acc = FLOAT64 if x.dtype == FLOAT64 else FLOAT32
    if request.result == "state":  # where the selected elements lie on the last axis
        return TopKResults(acc, acc, (*before, *after, request.k), before + after)
    return TopKResults(x.dtype, acc, (*before, request.k, *after), before + after)


def check_out(
    out: Any, expected: list[tuple[tuple[int, ...], np.dtype]], inputs: list[tuple[str, Any]]
) -> tuple[Any, ...]:
    """The arrays of `out`, fit for results of the expected shapes and dtypes."""
    others = [(name, array, _extent(array)) for name, array in inputs if array is not None]
    arrays: list[Any] = []
    for i, (given, (shape, dtype)) in enumerate(
        zip(_check.out_count(out, len(expected)), expected, strict=True)
    ):
        name = "out" if len(expected) == 1 else f"out[{i}]"
        if isinstance(given, np.generic):  # an array only of what is read
            raise _check.not_an_array(name, given, ())
        array = enter(name, given, inputs[0])
        _check.out_array(name, array, shape, dtype)
        extent = _extent(array)
        for other, input_, (low, high) in others:
            if extent[0] < high and low < extent[1]:
                _check.same_view(name, array, extent, other, input_, (low, high))
        others.append((name, array, extent))
        arrays.append(array)
    return tuple(arrays)


def _extent(array: Any) -> tuple[int, int]:
    host = isinstance(array, np.ndarray)
    address = array.__array_interface__["data"][0] if host else array.data.ptr
    low, high = _check.span(array.shape, array.strides, array.itemsize)
    return (address + low, address + high) if low < high else (0, 0)
