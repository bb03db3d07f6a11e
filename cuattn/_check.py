"""The only place that raises about arguments.

Messages read `<argument> must <requirement>, but <what came>[; <remedy>]`.
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")


def not_an_array(name: str, value: Any) -> TypeError:
    """The error for `value`, which is neither a NumPy nor a device array."""
    return TypeError(
        f"{name} must be a cupy.ndarray, a numpy.ndarray or a CUDA array of another library, "
        f"but it is {_kind(value)}; convert it with cupy.asarray({name})"
    )


def no_mix(name: str, value: Any, other: str, other_value: Any) -> TypeError:
    """The error for two arrays of different libraries."""
    return TypeError(
        f"{name} must be an array of the same library as {other} ({_kind(other_value)}), "
        f"but it is {_kind(value)}; move one with cupy.asarray or cupy.asnumpy"
    )


def other_device(name: str, device: int, other: str, other_device: int) -> ValueError:
    """The error for two arrays on different GPUs."""
    return ValueError(
        f"{name} must be on device {other_device}, as {other} is, but it is on {device}; "
        "copy one of them"
    )


def floating_or_integer(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is a real number's."""
    _dtype(name, dtype, FLOATS + INTEGERS, f"{', '.join(FLOATS)} or an integer dtype")


def floating(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is one of FLOATS."""
    _dtype(name, dtype, FLOATS, f"one of {', '.join(FLOATS)}")


def real(name: str, dtype: np.dtype) -> None:
    """TypeError unless the dtype is a real number's; what is cast before use."""
    if dtype.name not in FLOATS and dtype.name not in INTEGERS:
        raise TypeError(
            f"{name} must be a real number or an array of them, but its dtype is {dtype}"
        )


def float_dtype(dtype: Any) -> np.dtype | None:
    """`dtype` as one of FLOATS, None if it is not given."""
    if dtype is None:
        return None
    try:
        given = np.dtype(dtype)
    except TypeError:
        given = None
    if given is None or given.name not in FLOATS:
        raise TypeError(f"dtype must be one of {', '.join(FLOATS)}, but it is {dtype!r}")
    return given


def result_dtype(dtype: np.dtype | None, x: np.dtype, weight: np.dtype | None = None) -> np.dtype:
    """`dtype` if given, else that of x (float64 for integers), widened by a floating weight."""
    if dtype is not None:
        return dtype
    result = np.dtype(np.float64) if x.name in INTEGERS else x
    if weight is None or weight.name not in FLOATS or weight == result:
        return result
    if result.itemsize == weight.itemsize:  # float16 and bfloat16
        return np.dtype(np.float32)
    return max(result, weight, key=lambda d: d.itemsize)


def state_dtype(dtype: np.dtype) -> None:
    """TypeError unless the dtype is one that softmax_state gives."""
    if dtype.name not in ("float32", "float64"):
        raise TypeError(f"a.m must be float32 or float64, but its dtype is {dtype}")


def axes(axis: Any, ndim: int) -> tuple[int, ...]:
    """Sorted non-negative axes; None means all."""
    if axis is None:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    numbers = []
    for a in given:
        try:
            number = operator.index(a)
        except TypeError:
            raise TypeError(
                f"axis must be an int, a tuple of ints or None, but it is {axis!r} ({_kind(axis)})"
            ) from None
        if not -max(ndim, 1) <= number < max(ndim, 1):
            raise AxisError(
                f"axis must be in [{-ndim}, {ndim}), as x has {ndim} dimensions, but it is {number}"
            )
        if ndim:
            numbers.append(number % ndim)
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"axis must name each dimension once, but it is {axis!r}")
    return tuple(sorted(numbers))


def one_axis(axis: Any, ndim: int) -> int:
    """One non-negative axis."""
    if isinstance(axis, tuple):
        raise TypeError(f"axis must be an int or None, but it is {axis!r}")
    return (*axes(axis, ndim), 0)[0]


def integer(name: str, value: Any) -> int:
    """An integer of any kind but bool."""
    if isinstance(value, (bool, np.bool_)) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} must be an integer, but it is {_kind(value)}")
    return operator.index(value)


def count(name: str, value: Any, most: int | None = None) -> int:
    """An integer from 0 to `most`."""
    number = integer(name, value)
    if number < 0 or (most is not None and number > most):
        upper = "" if most is None else f" and at most {most}, the length of the axis"
        raise ValueError(f"{name} must be at least 0{upper}, but it is {number}")
    return number


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError unless the option is one of its words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but it is {value!r}")


def misaligned(name: str, array: Any) -> ValueError:
    """The error for an address that a device cannot load an element from."""
    return ValueError(
        f"{name} must start at a multiple of its itemsize ({array.itemsize} bytes), "
        "but it does not; pass a copy"
    )


def broadcastable(name: str, shape: tuple[int, ...], target: tuple[int, ...], what: str) -> None:
    """ValueError unless `shape` broadcasts to exactly `target`."""
    try:
        fits = np.broadcast_shapes(shape, target) == target
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to {what} {target}, but its shape is {shape}")


def where_dtype(dtype: np.dtype) -> None:
    """TypeError unless the mask is bool."""
    if dtype.name != "bool":
        raise TypeError(f"where must be a bool array, but its dtype is {dtype}; compare with 0")


def real_scalar(name: str, value: Any) -> float:
    """A Python or NumPy real number as float."""
    if isinstance(value, (bool, np.bool_, str, bytes, complex, np.complexfloating)):
        raise TypeError(
            f"{name} must be a real number or an array of them, but it is {_kind(value)}"
        )
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a real number or an array of them, but it is {_kind(value)}"
        ) from None


def same_shape_and_dtype(
    name: str, shape: Any, dtype: Any, other: str, other_shape: Any, other_dtype: Any
) -> None:
    """TypeError / ValueError unless two arrays agree."""
    if dtype != other_dtype:
        raise TypeError(
            f"{name} must have the dtype of {other} ({other_dtype}), but its dtype is {dtype}"
        )
    if shape != other_shape:
        raise ValueError(
            f"{name} must have the shape of {other} {other_shape}, but its shape is {shape}"
        )


def out_count(out: Any, count: int) -> tuple[Any, ...]:
    """`out` as a tuple of `count` arrays."""
    if isinstance(out, tuple) != (count > 1) or (count > 1 and len(out) != count):
        raise TypeError(
            f"out must be {'one array' if count == 1 else f'a tuple of {count} arrays'}, but it is "
            + (f"a tuple of {len(out)}" if isinstance(out, tuple) else _kind(out))
        )
    return out if count > 1 else (out,)


def out_array(name: str, array: Any, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """TypeError / ValueError unless the result fits into `array` exactly."""
    if array.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}, but its dtype is {array.dtype}")
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, but its shape is {array.shape}")
    if not getattr(array.flags, "writeable", True):
        raise ValueError(f"{name} must be writeable, but it is read-only")
    strides = array.strides
    if 0 in strides and any(s == 0 and n > 1 for s, n in zip(strides, shape, strict=True)):
        raise ValueError(f"{name} must not overlap itself, but its strides are {strides}")


def same_view(
    name: str,
    array: Any,
    extent: tuple[int, int],
    other: str,
    input_: Any,
    input_extent: tuple[int, int],
) -> None:
    """ValueError unless two arrays that overlap are one view: else writing one spoils the other."""
    same = extent == input_extent and (array.shape, array.strides, array.dtype) == (
        input_.shape,
        input_.strides,
        input_.dtype,
    )
    if not same:
        raise ValueError(
            f"{name} must be {other} itself or share no memory with it, but they overlap; "
            "pass a copy"
        )


def segments(offsets: Any, total: int, checked: bool) -> int:
    """Number of segments of int32 / int64 offsets; with `checked`, their values are looked at."""
    if offsets.dtype.name not in ("int32", "int64"):
        raise TypeError(f"cu_seqlens must be int32 or int64, but its dtype is {offsets.dtype}")
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"cu_seqlens must have shape (segments + 1,), but it has {offsets.shape}")
    if checked:
        if offsets[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, but it begins with {offsets[0]}")
        if np.any(offsets[1:] < offsets[:-1]):
            raise ValueError("cu_seqlens must never fall, but it does")
        if offsets[-1] != total:
            raise ValueError(
                f"cu_seqlens must end with the length of x, {total}, but its end is {offsets[-1]}"
            )
    return offsets.shape[0] - 1


def state(name: str, value: Any, kind: type) -> None:
    """TypeError unless `value` is a state."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be a {kind.__name__}, but it is {_kind(value)}; use softmax_state"
        )


def at_least_1d(name: str, shape: tuple[int, ...]) -> None:
    """ValueError for a 0-dimensional array."""
    if not shape:
        raise ValueError(f"{name} must have at least one dimension, but its shape is ()")


@lru_cache(maxsize=4096)
def span(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """First and one-past-last byte of a view, from the address of its first element."""
    low = high = 0
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return 0, 0
        low += min(0, (size - 1) * stride)
        high += max(0, (size - 1) * stride)
    return low, high + itemsize


def _dtype(name: str, dtype: np.dtype, known: tuple[str, ...], what: str) -> None:
    if dtype.name not in known:
        raise TypeError(
            f"{name} must be {what}, but its dtype is {dtype}; cast it with {name}.astype(...)"
        )
    if not dtype.isnative:
        raise TypeError(f"{name} must be in native byte order, but its dtype is {dtype!r}; cast it")


def _kind(value: Any) -> str:
    return (
        "None"
        if value is None
        else f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    )
