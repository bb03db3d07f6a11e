"""Rows of any layout, block by block: what ranks their elements, and the k best of each.

A row that is longer than a block is cut into segments, and the k best of each are merged. Beside
the result that takes less than 64 MB for k up to half a million; beyond, see numpy_large.py.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import numpy as np

from cuattn._arrays.blocks import FLOAT32, accumulator, each, pieces, thread_limit, widen
from cuattn._arrays.order import at, in_order, ranks
from cuattn._topk.numpy_selection import chosen, select

MOST = 1 << 18  # elements of a block: with their scratch they stay in L2
IN_FLIGHT = 1 << 19  # elements of the blocks that threads work on; they need up to 80 bytes each
LANES = 8  # threads at most: a block takes 50 us of Python, one thread at a time
WHOLE = 1 << 20  # elements of a row that is a block of one thread where its k is large
BESIDE = 16  # rows gathered together where their elements do not lie side by side: cache lines
FEW = 16  # times k: a segment of that length or more gives its own k best as candidates
MERGED = 1 << 18  # candidates that are merged at a time

Place = tuple[Any, ...]  # an index that picks a block of rows
Store = Callable[[Place, np.ndarray, np.ndarray], None]


class Ranking(Protocol):
    """What ranks the elements of rows, whose axis is the last one of x."""

    @property
    def x(self) -> np.ndarray: ...
    @property
    def cost(self) -> int:
        """An element's, beside that of a comparison."""

    def read(self, place: Place, columns: Any = None) -> tuple[np.ndarray, np.ndarray, bool]:
        """As that of `Ranked`."""

    def best(self, place: Place, k: int, columns: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """As that of `Ranked`."""


class Ranked(NamedTuple):
    """Arrays whose last axis is that of rows, and how their elements rank."""

    x: np.ndarray
    largest: bool = True
    factor: Any = None  # per row, in the accumulator of x
    where: Any = None

    @property
    def cost(self) -> int:
        """An element's, beside that of a comparison."""
        return 1

    def rows(self, place: Place) -> Ranked:
        """Some of the rows."""
        factor, where = (None if part is None else part[place] for part in self[2:])
        return Ranked(self.x[place], self.largest, factor, where)

    def read(self, place: Place, columns: Any = None) -> tuple[np.ndarray, np.ndarray, bool]:
        """Elements as contiguous rows, numbers that rank them, and whether the largest are best.

        `columns`: a slice, or some of each row. Numbers may be NaN.
        """
        x = cut(self.x, place, columns)
        if self.factor is None and self.where is None:
            return x, x, self.largest
        scores = np.empty(x.shape, accumulator(x.dtype, FLOAT32))
        widen(x, scores)
        if self.factor is not None:
            scores *= cut(self.factor, place)
        if self.where is not None:
            np.copyto(scores, -np.inf, where=~cut(self.where, place, columns))
        return x, scores, True

    def best(self, place: Place, k: int, columns: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best elements of rows, or of a slice of their columns, best first; and where in
        that they are."""
        x, numbers, largest = self.read(place, columns)
        found = select(numbers, k, largest)
        return at(x, found), found


def cut(array: np.ndarray, place: Place, columns: Any = None) -> np.ndarray:
    """A block of rows, or some columns of it, as contiguous rows; a copy where it is not so."""
    part = array[place]
    if isinstance(columns, slice):
        part = part[..., columns]
    elif columns is not None:
        part = np.take_along_axis(part, columns.reshape(*part.shape[:-1], -1), -1)
    if part.strides[-1] != part.itemsize:
        part = part.copy(order="K")  # in the order of memory, then turned within the cache
    return np.ascontiguousarray(part).reshape(-1, part.shape[-1])


def select_rows(rows: Ranking, k: int, store: Store) -> None:
    """``store(place, elements, columns)`` of the k best of each block of rows, best first."""
    shape, n = rows.x.shape[:-1], rows.x.shape[-1]
    most = min(MOST, IN_FLIGHT // lanes()) // rows.cost

    def one(place: Place) -> None:
        store(place, *rows.best(place, k))

    if rows.x.size <= most:
        one(())
        return
    few = FEW * k <= most
    beside = 1
    if few and rows.x.strides[-1] != rows.x.itemsize:
        beside = min(BESIDE, math.prod(shape))
    if n * beside <= most:
        spread(one, lambda: pieces(shape, most // n), rows.x.size * rows.cost)
        return
    for place in pieces(shape, beside):
        if few or n > WHOLE:
            store(place, *_of_segments(rows, place, k, most // beside, few))
        else:
            one(place)


def lanes() -> int:
    """Threads of a call."""
    return min(LANES, thread_limit())


def spread(function: Callable[[Any], None], blocks: Callable[[], Iterable[Any]], n: int) -> None:
    """``function(block)`` of each, by lanes: a thread takes every so many-th."""
    stride = lanes()

    def lane(i: int) -> None:
        for block in itertools.islice(blocks(), i, None, stride):
            function(block)

    each(lane, ((i,) for i in range(stride)), n)


def _of_segments(
    rows: Ranking, place: Place, k: int, step: int, few: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Elements and columns of the k best of long rows: candidates of segments, merged.

    With `few` these are the k best of a segment, else all that beat the k best of the row so far.
    """
    n, beside = rows.x.shape[-1], rows.x[place][..., 0].size
    room = max(MERGED // beside, k // 4)  # for candidates
    group = step * max(1, room // (k if few else step))
    best, worst = np.empty((beside, 0), np.int64), None
    for begin in range(0, n, group):
        starts = range(begin, min(begin + group, n), step)
        found: list[Any] = [None] * len(starts)

        def one(
            i: int, starts: range = starts, found: list[Any] = found, worst: Any = worst
        ) -> None:
            start = starts[i]
            piece = slice(start, min(start + step, n))
            size = piece.stop - start
            if worst is not None:
                _, numbers, largest = rows.read(place, piece)
                columns = np.flatnonzero(ranks(numbers, largest) < worst)[None]
            elif few and k < size:
                _, columns = rows.best(place, k, piece)  # equal ones in order of column
            else:
                columns = np.broadcast_to(np.arange(size), (beside, size))
            found[i] = columns + start

        spread(one, functools.partial(range, len(starts)), beside * group * rows.cost)
        best = np.concatenate([best, *found], -1)
        found.clear()
        if best.shape[1] > k:
            _, numbers, largest = rows.read(place, best)
            numbers = ranks(numbers, largest)
            columns, _ = chosen(numbers, k, False)
            best = at(best, columns)
            if not few:
                worst = at(numbers, columns).max()
    x, numbers, largest = rows.read(place, best)
    order = in_order(ranks(numbers, largest), np.broadcast_to(np.arange(k), best.shape), k)
    return at(x, order), at(best, order)
