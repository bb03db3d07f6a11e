"""Shapes and strides: from arrays of any layout to the rows and columns that kernels walk over."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)

# Operands of SoftmaxParams, in the order of enum SoftmaxOperand (softmax/params.cuh).
OPERANDS = ("x", "y", "where", "weight", "scale", "out", "stat")

# Row and column spaces are padded to one of these ranks, so that few instantiations serve every
# layout; arrays that need more are copied first.
RANKS = (1, 3, 8)


class ArraySpec(NamedTuple):
    """An array without its data: what a plan may know of it; strides in bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


def spec_of(array: Any) -> Any:
    """The ArraySpec of an array; None stays None."""
    if array is None:
        return None
    # In half the time that ArraySpec(...) takes: every call makes one of each of its arrays.
    return tuple.__new__(ArraySpec, (array.shape, array.strides, array.dtype))


@dataclass(frozen=True)
class Layout:
    """Rows and columns after joining dimensions; strides in elements, by operand (OPERANDS)."""

    row_size: tuple[int, ...]
    col_size: tuple[int, ...]
    row_stride: tuple[tuple[int, ...], ...]
    col_stride: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return math.prod(self.row_size)

    @property
    def cols(self) -> int:
        return math.prod(self.col_size)


@lru_cache(maxsize=4096)
def join_dimensions(
    shape: tuple[int, ...],
    axes: tuple[int, ...],
    strides: tuple[tuple[int, ...] | None, ...],
    segments: bool = False,
) -> Layout | None:
    """Rows and columns of an array reduced over `axes`, in as few dimensions as its operands'
    strides allow.

    `strides` has one tuple (elements) an operand, None for one that is absent. Returns None where
    more than RANKS[-1] dimensions remain. The order of a softmax's elements is free, so dimensions
    are sorted by the strides of x; only `segments`, dimension 0 of ragged rows, stays the slowest.
    """
    given = [(0,) * len(shape) if s is None else s for s in strides]
    spaces = []
    for inside in (False, True):
        dims = [
            (size, tuple(s[d] for s in given), segments and d == 0)
            for d, size in enumerate(shape)
            if (d in axes) is inside and size != 1
        ]
        dims.sort(key=lambda dim: (not dim[2], [-abs(stride) for stride in dim[1]]))
        joined: list[tuple[int, tuple[int, ...]]] = []
        for size, stride, _ in dims:
            if joined and all(a == size * b for a, b in zip(joined[-1][1], stride, strict=True)):
                joined[-1] = (joined[-1][0] * size, stride)
            else:
                joined.append((size, stride))
        rank = next((r for r in RANKS if r >= len(joined)), None)
        if rank is None:
            return None
        spaces.append([(1, (0,) * len(given))] * (rank - len(joined)) + joined)
    sizes = [tuple(size for size, _ in space) for space in spaces]
    by_operand = [
        tuple(tuple(stride[i] for _, stride in space) for i in range(len(given)))
        for space in spaces
    ]
    return Layout(sizes[0], sizes[1], by_operand[0], by_operand[1])


def memory_order(x: ArraySpec) -> tuple[int, ...] | None:
    """Axes from the slowest to the fastest, as NumPy's order "K"; None for C order."""
    order = tuple(sorted(range(len(x.shape)), key=lambda d: -abs(x.strides[d])))
    significant = [d for d in order if x.shape[d] != 1]
    return None if significant == sorted(significant) else order


def packed(shape: tuple[int, ...], order: tuple[int, ...] | None, itemsize: int) -> tuple[int, ...]:
    """Strides of a new array (bytes)."""
    strides, step = [0] * len(shape), itemsize
    for d in reversed(range(len(shape)) if order is None else order):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def alike(arrays: Iterable[Any]) -> bool:
    """Whether an element is at the same offset in all of these, in whole elements."""
    strides = {element_strides(spec_of(array), array.shape) for array in arrays}
    return len(strides) <= 1 and False not in strides


def padded(array: ArraySpec, ndim: int) -> ArraySpec:
    missing = ndim - len(array.shape)
    return ArraySpec((1,) * missing + array.shape, (0,) * missing + array.strides, array.dtype)


def expanded(array: ArraySpec, axes: tuple[int, ...]) -> ArraySpec:
    """As numpy.expand_dims."""
    shape, strides = list(array.shape), list(array.strides)
    for axis in axes:
        shape.insert(axis, 1)
        strides.insert(axis, 0)
    return ArraySpec(tuple(shape), tuple(strides), array.dtype)


def element_strides(
    array: ArraySpec | None, shape: tuple[int, ...]
) -> tuple[int, ...] | None | bool:
    """Strides in elements after broadcasting to `shape`; False where they are not whole ones. Of
    an array without elements, any will do: those that join all dimensions."""
    if array is None:
        return None
    if 0 in array.shape:
        return (0,) * len(shape)
    itemsize, missing = array.dtype.itemsize, len(shape) - len(array.shape)
    strides = [
        0 if size == 1 else stride for size, stride in zip(array.shape, array.strides, strict=True)
    ]
    if any(stride % itemsize for stride in strides):
        return False
    return (0,) * missing + tuple(stride // itemsize for stride in strides)
