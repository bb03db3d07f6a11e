"""The k best of a long row where k is large: sorted where their columns go.

1. Histograms of 16 bits at a time of the ranks find the rank of the k-th best.
2. Whatever is better, and the first of those that are equal, become integers: the upper 32 bits of
   the rank, and below them the column. Sorted, they are in order but for what the lower 32 bits of
   a rank of 64 bits say.
3. These settle runs of equal upper bits: many short runs at a time, a long one by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from cuattn._arrays.order import order_of, ranks
from cuattn._topk.numpy_ranking import MOST, Place, Ranking

LEAST = 1 << 19  # up to this k the other ways are faster, and take less than 64 MB
MOST_COLUMNS = 1 << 32
LOW = 0xFFFFFFFF

Elements = Callable[[np.ndarray], np.ndarray]  # signed ranks at some columns


def is_large(n: int, k: int) -> bool:
    """Whether k of n elements are selected here."""
    return LEAST < k and n <= MOST_COLUMNS


def best_columns(rows: Ranking, place: Place, columns: np.ndarray) -> None:
    """Write the columns of the k best of one row, best first, into `columns`, (k,) int64."""
    n = rows.x.shape[-1]

    def at(some: np.ndarray) -> np.ndarray:
        _, numbers, largest = rows.read(place, some[None])
        return ranks(numbers, largest)[0]

    def blocks() -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, n, MOST):
            _, numbers, largest = rows.read(place, slice(start, start + MOST))
            yield start, ranks(numbers, largest)[0]

    bits = _fill(blocks, columns)
    columns.sort()
    if bits == 64:
        _settle(at, columns)
    columns &= LOW


def _fill(blocks: Callable[[], Iterator[tuple[int, np.ndarray]]], columns: np.ndarray) -> int:
    """The k best as integers, in any order. Returns the number of bits of a rank."""
    limit, ties, filled = None, columns.size, 0
    for start, found in blocks():
        if limit is None:
            limit, ties = _kth(blocks, columns.size, found.dtype)
        better, equal = (found < limit).nonzero()[0], (found == limit).nonzero()[0][:ties]
        ties -= equal.size
        for some in (better, equal):
            into = columns[filled : filled + some.size]
            into[...] = found[some] >> max(0, 8 * found.itemsize - 32)
            into <<= 32
            into |= some + start
            filled += some.size
    return 8 * found.itemsize


def _kth(
    blocks: Callable[[], Iterator[tuple[int, np.ndarray]]], k: int, dtype: np.dtype
) -> tuple[np.generic, int]:
    """The rank of the k-th best, and how many that are equal to it are among the k."""
    bits = 8 * dtype.itemsize
    width = min(bits, 16)
    known, left = 0, k  # upper bits of the rank, as it counts from 0; how many of those they begin
    for shift in range(bits - width, -1, -width):
        counts = np.zeros(1 << width, np.int64)
        for _, found in blocks():
            digits = (found >> shift).astype(np.int64) & ((1 << width) - 1)
            if shift + width == bits:
                digits ^= 1 << (width - 1)  # the sign
            else:
                upper = found >> shift >> width
                digits = digits[upper == known - (1 << (bits - shift - width - 1))]
            counts += np.bincount(digits, minlength=counts.size)
        ends = counts.cumsum()
        digit = int(ends.searchsorted(left))
        left -= int(ends[digit] - counts[digit])
        known = known << width | digit
    return dtype.type(known - (1 << (bits - 1))), left


def _settle(at: Elements, columns: np.ndarray) -> None:
    """The order of `columns`, below upper halves of ranks that are in order, by the lower ones."""
    begin, k = 0, columns.size
    while begin < k:
        piece = columns[begin : begin + MOST].copy()
        size = piece.size
        if begin + size < k:  # the last run may go on
            size = int(piece.searchsorted(piece[-1] & ~LOW))
        if size:
            some = piece[:size] & LOW
            order = order_of(at(some)[None], size)[0]
            columns[begin : begin + size] = some[order]
        else:
            size = _settle_run(at, columns[begin:], piece[0] | LOW)
        begin += size


def _settle_run(at: Elements, columns: np.ndarray, most: int) -> int:
    """The same of a run of pairs up to `most`. Returns its length."""
    size = 0
    while size < columns.size:
        piece = columns[size : size + MOST]
        count = int(piece.searchsorted(most, "right"))
        if count == 0:
            break
        some = piece[:count] & LOW
        lower = (at(some) & LOW) - (1 << 31)
        columns[size : size + count] = lower << 32 | some
        size += count
    columns[:size].sort()
    return size
