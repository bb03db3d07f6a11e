"""Rows of arrays of any layout, in pieces that fit into a core's cache.

A row is what is reduced: the elements along the axes of a call. Pieces are two-dimensional
scratch: (rows, elements) where a row's elements lie next to each other, (elements, rows) where
rows lie side by side, as columns do, or are short. Which of the two, and where a long row is cut,
follows from how one row lies, so that its sums are added up in the same order in any company.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn._arrays.blocks import BLOCK, Slices, pieces, scratch, widen

SHORT = 32  # elements of a row up to which NumPy's loop over each takes longer than turning them
LONG = 1 << 18  # elements of a row that is worked on as one piece,
CONVERTED = 1 << 20  # and of one that is converted, once then
TALL = 512  # elements of a column that is,
TALL_CONVERTED = 1024  # and of one that is converted, twice then
CHUNK = 256  # of longer columns: what is added up in the accumulator's type
TILE = 1 << 18  # elements of columns that are worked on together
COLUMNS = 4096  # of them, where they are long
STRIP = 16  # columns whose maxima are found together in rows of at most
STRIPS = 128  # elements: NumPy takes 80 ns for each row before its first one
UNBUFFERED = 128  # elements of a row from which on NumPy had better not buffer a number per row


class Rows:
    """The rows of a call: how arrays of its shape are cut into pieces."""

    def __init__(self, x: np.ndarray, axes: tuple[int, ...], acc: np.dtype) -> None:
        def by_stride(dims: Any) -> list[int]:  # slowest first; of equal ones, the first
            return sorted(dims, key=lambda d: -abs(x.strides[d]) if x.strides[d] else -(1 << 62))

        order = by_stride(range(x.ndim))
        self.axes = tuple(by_stride(axes))
        self.rest = tuple(by_stride(d for d in range(x.ndim) if d not in axes))
        self.shape = tuple(x.shape[d] for d in self.rest)
        self.row = tuple(x.shape[d] for d in self.axes)
        self.count = math.prod(self.shape)
        self.length = math.prod(self.row)
        apart = bool(order) and order[-1] not in axes
        self.down = apart or self.length <= SHORT
        self.axis = 0 if self.down else 1
        self.together = max((TILE if apart else BLOCK) // max(self.length, 1), 1)  # rows
        most = LONG if x.dtype == acc else CONVERTED
        self.tall = apart and self.length > (TALL if x.dtype == acc else TALL_CONVERTED)
        if self.tall:
            self.together = min(COLUMNS, self.count)
            most = max(TILE // (CHUNK * self.together), 1) * CHUNK if len(axes) == 1 else CHUNK
        self.cut = list(pieces(self.row, most))  # of each row
        self.unbuffered = not self.down and self.length >= UNBUFFERED
        self.unbuffered |= self.tall and self.together >= 16 * UNBUFFERED
        self.gathered = self.down and not self.tall  # in scratch: a column's elements are far

    def blocks(self) -> Iterator[Slices]:
        """The rows that are worked on at a time."""
        return pieces(self.shape, self.together)

    def seen(self, array: Any, shape: tuple[int, ...]) -> Any:
        """A view of what broadcasts to the shape of x, its axes in our order."""
        if array is None:
            return None
        wide = np.broadcast_to(array, shape) if array.shape != shape else array
        return wide.transpose(self.axes + self.rest if self.down else self.rest + self.axes)

    def per_row(self, array: Any) -> Any:
        """A view of one number per row, with the axes of x, in the order of our rows."""
        return array.transpose(self.rest + self.axes).reshape(self.shape)

    def piece(self, array: Any, rows: Slices, part: Slices) -> Any:
        """A part of these rows, of an array as `seen`."""
        at = (..., *part, *rows) if self.down else (..., *rows, *part)
        return array[at]

    def flat(self, array: Any, rows: Slices, part: Slices) -> Any:
        """The same as a view of two dimensions in which sums take the order that they have in
        scratch; None: there is none."""
        view = self.piece(array, rows, part)
        flat = view if len(self.axes) == len(self.rest) == 1 else None
        if view.flags.c_contiguous:
            flat = view.reshape(self._shape(view))
        return None if flat is None or flat.strides[1] != flat.itemsize else flat

    def load(self, array: Any, rows: Slices, part: Slices, name: str, acc: Any) -> Any:
        """The same in scratch of two dimensions, widened."""
        view = self.piece(array, rows, part)
        s = scratch(name, self._shape(view), acc)
        widen(view, s.reshape(view.shape))
        return s

    def _shape(self, view: np.ndarray) -> tuple[int, int]:
        first = len(self.axes if self.down else self.rest)
        return math.prod(view.shape[:first]), math.prod(view.shape[first:])

    def spread(self, numbers: Any) -> Any:
        """One number for each row of a piece, to be broadcast over it."""
        return numbers if self.down else numbers[:, None]

    def max(self, s: Any) -> Any:
        """Maxima of the rows of a piece."""
        count, n = s.shape
        if self.down or n > STRIPS or count < STRIPS:
            return np.maximum.reduce(s, axis=self.axis)
        m = s[:, -STRIP:].copy()
        for i in range(0, n - STRIP, STRIP):
            np.maximum(m, s[:, i : i + STRIP], out=m)
        return np.maximum.reduce(np.ascontiguousarray(m.T), axis=0)

    def sum(self, s: Any) -> Any:
        """Sums of the rows of a piece, whose order does not depend on how they lie."""
        return sum_columns(s) if self.down else np.add.reduce(s, axis=1)

    def add(self, total: Any, s: Any) -> Any:
        """`total` of the parts of rows so far, or None, and one more. In float64 where rows have
        parts, or columns chunks, one after another however many a part has."""
        if len(self.cut) == 1 and not self.tall:
            return self.sum(s)
        for chunk in [s[i : i + CHUNK] for i in range(0, len(s), CHUNK)] if self.tall else [s]:
            found = self.sum(chunk).astype(np.float64)
            total = found if total is None else total + found
        return total


def sum_columns(s: Any) -> Any:
    """Sums along the first axis, in the order in which NumPy adds up a contiguous row: pairwise,
    and 128 elements or less by every eighth one."""
    n = len(s)
    if n > 128:
        half = n // 16 * 8
        return sum_columns(s[:half]) + sum_columns(s[half:])
    whole = n // 8 * 8
    total, rest = s[0], s[1:]
    if whole:
        t = np.add.reduce(s[:whole].reshape(-1, 8, s.shape[1]), axis=0)
        t = t[::2] + t[1::2]
        t = t[::2] + t[1::2]
        total, rest = t[0] + t[1], s[whole:]
    for one in rest:
        total = total + one
    return total
