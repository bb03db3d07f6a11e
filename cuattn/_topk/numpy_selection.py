"""The k best elements of rows that lie one after another: ways, when each is taken, and why.

Every way gives the same columns: those of the k best, best first, and of equal elements the first.
A way compares elements as NumPy does. Rows that hold NaN, and those with many ties, are redone by
themselves as integers (`ranks`), as float16 and bfloat16 are on the far side of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays.order import at, first, in_order, is_narrow, order_of, packed, ranks

# ---- Ways ----
# Of rows (r, n): columns (r, k), and which rows it could not do: those with NaN, or too many ties.

Found = tuple[np.ndarray, Any]


def by_argmax(x: np.ndarray, k: int, largest: bool) -> Found:
    """The first of the largest."""
    columns = (x.argmax if largest else x.argmin)(-1)[:, None]
    best = at(x, columns)[:, 0]
    return columns, best != best


def by_argsort(x: np.ndarray, k: int, largest: bool) -> Found:
    """All of a row, in two calls of NumPy."""
    if largest:
        x = -x if x.dtype.kind == "f" else ~x
    return x.argsort(-1, kind="stable")[:, :k], None


def by_sort(x: np.ndarray, k: int, largest: bool) -> Found:
    """All of a row."""
    found = ranks(x, largest)
    if x.itemsize == 8:
        return order_of(found, k), None
    return first(packed(found, np.arange(x.shape[1])), k), None


def by_partition(x: np.ndarray, k: int, largest: bool) -> Found:
    """What is not worse than the k-th best, but for surplus ties; then these k in order."""
    columns, bad = chosen(x, k, largest)
    return in_order(ranks(at(x, columns), largest), columns, k), bad


def chosen(x: np.ndarray, k: int, largest: bool) -> Found:
    """Columns of the k best of each row, ascending."""
    rows, n = x.shape
    kth = n - k if largest else k - 1
    parted = np.partition(x, kth, -1)
    limit = parted[:, kth, None]
    good = (np.greater_equal if largest else np.less_equal)(x, limit)
    bad = None
    if x.dtype.kind == "f":  # NaN is at the end, and may stand beside numbers that are the smallest
        bad = np.isnan(parted[:, kth:] if largest else limit).any(-1)
        if bad.any():
            good[bad] = np.arange(n) < k  # some k
    flat, starts = np.flatnonzero(good), np.arange(0, rows * n, n)
    if flat.size > rows * k:  # of those equal to the k-th best, only the first ones are wanted
        good &= x != limit
        if bad is not None:
            good[bad] = np.arange(n) < k
        flat, tied = np.flatnonzero(good), np.flatnonzero(x == limit)
        lack = k - np.diff(flat.searchsorted(starts), append=flat.size)
        skip = tied.searchsorted(starts) - (np.cumsum(lack) - lack)
        wanted = np.arange(lack.sum()) + np.repeat(skip, lack)
        flat = np.concatenate([flat, tied.take(wanted)])
        flat.sort()
    return flat.reshape(rows, k) - starts[:, None], bad


def by_chunks(x: np.ndarray, k: int, largest: bool) -> Found:
    """The k best lie in chunks whose own best is not worse than the k-th best of these.

    A chunk is every so many-th element: its best is found by vector instructions.
    """
    rows, n = x.shape
    chunks = number_of_chunks(n, k)
    whole, tail = divmod(n, chunks)  # elements of every chunk; the first `tail` have one more
    best, not_worse = (np.maximum, np.greater_equal) if largest else (np.minimum, np.less_equal)
    step = x.itemsize
    body = np.ndarray((rows, whole, chunks), x.dtype, x, 0, (n * step, chunks * step, step))
    tops = best.reduce(body, axis=1)
    if tail:
        best(tops[:, :tail], x[:, whole * chunks :], out=tops[:, :tail])
    kth = chunks - k if largest else k - 1
    limit = np.partition(tops, kth, -1)[:, kth, None]
    hit = not_worse(tops, limit)
    hits = hit.reshape(-1).nonzero()[0]
    bad, top = None, best.reduce(tops, axis=None)
    if top != top or hits.size > (rows + 1) * k + 8:
        bad = hit.sum(-1) > 2 * k + 8
        bad |= (tops != tops).any(-1)
        if bad.all():
            return np.zeros((rows, k), np.int64), bad
        hit[bad] = False
        hits = hit.reshape(-1).nonzero()[0]

    row = hits // chunks
    flat = hits + row * (n - chunks) + np.arange(0, n, chunks)[:, None]
    values = x.reshape(-1).take(flat, mode="clip")
    keep = not_worse(values, limit[:, 0].take(row))
    if tail:
        keep[-1] &= hits - row * chunks < tail
    kept = keep.reshape(-1).nonzero()[0]
    flat = flat.reshape(-1).take(kept)
    if step == 8:
        flat.sort()
        found = ranks(x.reshape(-1).take(flat), largest)
    else:
        found = ranks(values.reshape(-1).take(kept), largest)
    return by_row(found, flat, (rows, n), k), bad


def by_row(found: np.ndarray, flat: np.ndarray, shape: tuple[int, int], k: int) -> np.ndarray:
    """Columns (r, k) of the best of ranks at flat places; a row that has none gets any."""
    rows, n = shape
    if rows == 1:
        return in_order(found[None], flat[None], k)
    row = flat // n
    column = flat - row * n
    if found.itemsize == 8:
        end = np.searchsorted(row, np.arange(rows + 1))
        shape = rows, max(k, int(np.diff(end).max()))
        table, columns = np.full(shape, np.iinfo(np.int64).max), np.zeros(shape, np.int64)
        place = (row, np.arange(row.size) - end[row])
        table[place], columns[place] = found, column
        return in_order(table, columns, k)
    # One sort of integers settles all: a block has less than 2**31 elements.
    keys, low = found.astype(np.int64), (n - 1).bit_length()
    keys += 1 << 31
    keys <<= low
    keys |= column
    keys += row << (32 + low)
    keys.sort()
    start = np.searchsorted(keys, np.arange(rows) << (32 + low))[:, None]
    return keys.take(start + np.arange(k), mode="clip") & ((1 << low) - 1)


# ---- The plan ----


@functools.lru_cache(maxsize=4096)
def number_of_chunks(n: int, k: int) -> int:
    """Chunks of a row: what costs least of the calls that find their maxima, one for each element
    of a chunk, of a partition of these, and of a look at k chunks. If it can be, without a rest."""
    size = max(2, min(int((1.5 * n / (15 + k)) ** 0.5), n // (2 * k)))
    size = next((c for c in range(size, size * 3 // 4, -1) if n % c == 0), size)
    return -(-n // size)


class Way(NamedTuple):
    """A way, and the calls that take it: the first of WAYS that fits."""

    way: Callable[[np.ndarray, int, bool], Found]
    most_k: float
    least_n: int
    least_ratio: float  # n / k
    least_size: int  # bytes of an element
    most: float  # elements
    why: str


ANY = np.inf
WAYS = (
    Way(by_argmax, 1, 1, 1, 1, ANY, "one pass"),
    Way(by_argsort, ANY, 1, 1, 1, 256, "two calls of NumPy, and elements cost less than calls"),
    Way(by_chunks, ANY, 256, 16, 4, ANY, "one pass, and a look at a few chunks"),
    Way(by_chunks, ANY, 256, 64, 1, ANY, "below 32 bits a sort costs half, and ties are many"),
    Way(by_partition, ANY, 256, 4, 4, ANY, "the k best alone are sorted; slow below 32 bits"),
    Way(by_partition, ANY, 64, 4, 8, ANY, "64 bits do not hold a rank and a column"),
    Way(by_sort, ANY, 1, 1, 1, ANY, "of short rows, or nearly all of one"),
)


NARROW = 16  # n / k from which on the k best of floats may well lie on one side of 0


def way_of(rows: int, n: int, k: int, size: int) -> Way:
    """The way for rows of n elements of a size in bytes."""
    return next(
        w
        for w in WAYS
        if k <= w.most_k
        and n >= max(w.least_n, w.least_ratio * k)
        and size >= w.least_size
        and rows * n <= w.most
    )


def select(x: np.ndarray, k: int, largest: bool) -> np.ndarray:
    """Columns (r, k) of the k best of rows (r, n), best first; k from 1 to n."""
    rows, n = x.shape
    if is_narrow(x.dtype):
        return _of_narrow(x, k, largest)
    columns, bad = way_of(rows, n, k, x.itemsize).way(x, k, largest)
    if bad is not None and bad.any():
        x = x[bad]
        if x.dtype.kind == "f" and np.isnan(x).any():
            x, largest = ranks(x, largest), False
        columns[bad] = by_partition(x, k, largest)[0]
    return columns


def _of_narrow(x: np.ndarray, k: int, largest: bool) -> np.ndarray:
    """Of floats of 16 bits: on one side of 0 they order as their bits do, and there few are."""
    rows, n = x.shape
    if n < NARROW * k:
        return select(ranks(x, largest), k, False)
    bits = x.view(np.int16 if largest else np.uint16)  # in which the other side comes after 0
    zero = np.zeros(1, x.dtype) if largest else -np.zeros(1, x.dtype)
    infinity = zero + np.array(np.inf if largest else -np.inf, x.dtype)
    columns = select(bits, k, True)
    worst, best = at(bits, columns[:, -1:]), at(bits, columns[:, :1])
    bad = ((worst <= zero.view(bits.dtype)) | (best > infinity.view(bits.dtype)))[:, 0]
    if bad.any():
        columns[bad] = select(ranks(x[bad], largest), k, False)
    return columns
