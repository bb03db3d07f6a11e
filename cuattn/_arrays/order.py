"""The order of selections: ranks as integers, and sorts that settle ties by column."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np


def is_narrow(dtype: np.dtype) -> bool:
    """Floats of 16 bits, of which NumPy has no fast comparison."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"


def ranks(values: np.ndarray, largest: bool) -> np.ndarray:
    """Signed integers of the same width, the better the smaller: NaN last, -0 equal to 0."""
    signed, lowest, highest, infinity = _words(values.dtype)
    if values.dtype.kind == "i":
        return ~values if largest else values
    if values.dtype.kind == "u":
        half = values.view(signed) ^ lowest
        return np.invert(half, out=half) if largest else half
    bits = values.view(signed)
    size = bits & highest
    sign = bits >> (8 * signed.itemsize - 1)  # 0 or -1
    nan = size > infinity
    if largest:
        np.invert(sign, out=sign)
    size ^= sign
    size -= sign
    if nan.any():
        size[nan] = highest
    return size


@functools.cache
def _words(dtype: np.dtype) -> tuple[np.dtype, Any, Any, Any]:
    """Integers of this width, their range, and infinity as one of them."""
    signed = np.dtype(f"i{dtype.itemsize}")
    info = np.iinfo(signed)
    infinity = None if dtype.kind in "iu" else np.array(np.inf, dtype).view(signed)[()]
    return signed, signed.type(info.min), signed.type(info.max), infinity


def at(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Some elements of each of contiguous rows."""
    rows, n = x.shape
    if rows > 1:
        columns = columns + np.arange(0, rows * n, n)[:, None]
    return x.reshape(-1).take(columns)


def in_order(found: np.ndarray, columns: np.ndarray, k: int) -> np.ndarray:
    """The k best of each row of ranks, best first; of equal ones the first, as columns ascend."""
    if found.itemsize < 8:
        return first(packed(found, columns), k)
    return at(columns, order_of(found, k))


def order_of(found: np.ndarray, k: int) -> np.ndarray:
    """The first k of a stable argsort of each row: where there are no ties it is a faster one."""
    order = found.argsort(-1)[:, : k + 1]
    ordered = at(found, order)
    tied = (ordered[:, 1:] == ordered[:, :-1]).any(-1)
    order = order[:, :k]
    if tied.any():
        order[tied] = found[tied].argsort(-1, kind="stable")[:, :k]
    return order


def packed(found: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Ranks of at most 32 bits, and below them columns: one sort of integers settles both."""
    pairs = found.astype(np.int64)
    pairs <<= 32
    pairs |= columns
    return pairs


def first(pairs: np.ndarray, k: int) -> np.ndarray:
    """Columns of the k best of each row of `packed` pairs, which it sorts."""
    if 2 * k < pairs.shape[1]:
        pairs.partition(k - 1, -1)
        pairs = pairs[:, :k]
    pairs.sort(-1)
    return pairs[:, :k] & 0xFFFFFFFF
