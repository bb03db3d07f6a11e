"""Mask expressions by NumPy: the keys that a tile of queries sees, and their number by tile.

No more of a mask exists at a time than `BAND` queries by `KEYS` keys, or a tile of attention.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import blocks
from cuattn._arrays.expression import Expression
from cuattn._attention.numpy_score import numbers_of, values_of
from cuattn._attention.request_mask import Predicate
from cuattn._device.kernel import ceil_div

BAND, KEYS = 128, 1024  # sizes of tiles are multiples of BAND


class Mask(NamedTuple):
    """A mask expression of heads and sequences, whose numbers it is handed."""

    expression: Expression
    arrays: tuple[Any, ...]
    b: Any  # (B, 1, 1, 1, 1)
    h: Any  # (1, G, g, 1, 1)
    q: Any  # (M, 1): places of the queries

    def tile(self, b: slice, h: slice, i: slice) -> Mask:
        """Sequences b, heads h of k and v, queries i."""
        return self._replace(b=self.b[b], h=self.h[:, h], q=self.q[i])

    def seen(self, j: slice) -> np.ndarray:
        """Which of the keys j each query sees, (B, G, g, M, N); axes of 1 are the same for all."""
        k = np.arange(j.start, j.stop, dtype=np.int64)
        names = {"b": self.b, "h": self.h, "q": self.q, "k": k}
        steps = self.expression.steps
        (value,) = values_of(steps, self.arrays, names, blocks.FLOAT64, len(steps) - 1)
        shape = np.broadcast_shapes(np.shape(value), (1, 1, 1, len(self.q), len(k)))
        return np.broadcast_to(value, shape)


def mask_of(x: Any, predicate: Predicate | None, b: slice | np.ndarray, rows: int) -> Mask | None:
    """The mask of sequences b of `views.Operands`, and of the first queries."""
    if predicate is None:
        return None
    queries, keys = predicate.shape[-2:]
    places = np.arange(keys - queries, keys - queries + rows, dtype=np.int64)[:, None]
    return Mask(predicate.expression, x.mask_args, *numbers_of(x, b), places)


def seen_by_tile(
    predicate: Predicate, arrays: tuple[Any, ...], block: tuple[int, int]
) -> np.ndarray:
    """How many keys the queries of each tile see together, (..., M, N)."""
    *lead, rows, columns = predicate.shape
    units, tiles = (1, 1, *lead)[-2:], (ceil_div(rows, block[0]), ceil_div(columns, block[1]))
    seen = np.zeros((*units, *tiles), np.int64)

    def count(b: int, h: int, row: int) -> None:
        sequence, head = np.array([b, h], np.int64).reshape(2, 1, 1, 1, 1, 1)
        end = min((row + 1) * block[0], rows)
        for i in range(row * block[0], end, BAND):
            places = np.arange(i, min(i + BAND, end), dtype=np.int64)[:, None] + (columns - rows)
            band = Mask(predicate.expression, arrays, sequence, head, places)
            for j in range(0, columns, KEYS):
                keys = band.seen(slice(j, min(j + KEYS, columns)))[0, 0, 0]
                parts = np.arange(0, keys.shape[1], BAND)
                found = np.add.reduceat(np.count_nonzero(keys, axis=0), parts)
                np.add.at(seen[b, h, row], (j + parts) // block[1], found)

    work = math.prod(units) * rows * columns
    blocks.each(count, np.ndindex(*units, tiles[0]), work)
    return seen.reshape(*lead, *tiles)
