"""Results: `out` of the right shape and dtype, which overlaps no input; and what NumPy computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from cuattn._arrays import checks
from cuattn._arrays.inputs import Owner, as_array
from cuattn._arrays.interchange import is_read_only

Extent = tuple[int, int]  # addresses: of the first byte, and past the last


def as_outputs(
    out: Any,
    expected: list[tuple[tuple[int, ...], np.dtype]],
    inputs: list[Owner],
    in_place: bool = True,
    kept: Sequence[Owner] = (),
) -> tuple[Any, ...]:
    """The arrays of `out`, fit for results of the expected shapes and dtypes.

    `in_place`: an array may be an input itself, as the same view, but none that is `kept`.
    """
    given = [(name, array) for name, array in inputs if array is not None]
    read = len(given)
    others = [(name, array, extent(array)) for name, array in (*given, *kept)]
    arrays: list[Any] = []
    for i, (value, (shape, dtype)) in enumerate(
        zip(checks.out_count(out, len(expected)), expected, strict=True)
    ):
        name = "out" if len(expected) == 1 else f"out[{i}]"
        if isinstance(value, np.generic):  # an array only of what is read
            raise checks.not_an_array(name, value, ())
        array = as_array(name, value, inputs[0])
        if array is not value and is_read_only(value):
            raise checks.read_only(name)
        checks.out_array(name, array, shape, dtype)
        own = extent(array)
        for j, (other, input_, (low, high)) in enumerate(others):
            if own[0] < high and low < own[1]:
                checks.same_view(name, array, own, other, input_, (low, high))
                if not in_place or j >= read:
                    raise checks.apart(name, other)
        others.append((name, array, own))
        arrays.append(array)
    return tuple(arrays)


def extent(array: Any) -> Extent:
    """What memory an array spans."""
    host = isinstance(array, np.ndarray)
    address = array.__array_interface__["data"][0] if host else array.data.ptr
    low, high = span(array.shape, array.strides, array.itemsize)
    return (address + low, address + high) if low < high else (0, 0)


@lru_cache(maxsize=4096)
def span(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> Extent:
    """First and one-past-last byte of a view, from the address of its first element."""
    low = high = 0
    for size, stride in zip(shape, strides, strict=True):
        if size == 0:
            return 0, 0
        low += min(0, (size - 1) * stride)
        high += max(0, (size - 1) * stride)
    return low, high + itemsize


def into(target: Any, value: Any) -> Any:
    """`value`, written into `target` if there is one, and it is another."""
    if target is None or target is value:
        return value
    target[...] = value
    return target


def rounded(part: Any, dtype: np.dtype) -> Any:
    """What a reference has computed in float64, in the dtype of the result; overflow is inf."""
    with np.errstate(all="ignore"):
        return np.asarray(part, dtype)
