"""Scores of rows with their noise, as what ranks elements, without the noise of most of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT64
from cuattn._arrays.order import at, ranks
from cuattn._topk.numpy_noise import Streams, bounds, gumbel
from cuattn._topk.numpy_ranking import Place, Ranked, cut
from cuattn._topk.numpy_selection import by_row, select

FEW = 8  # times k: below, all elements of a row have their noise computed


class Noisy:
    """Elements of `scores` rank by ``score + noise``, float64, -inf where they may not be drawn.

    Parameters
    ----------
    scores : Ranked
        Its largest are best. Where it is not scaled they may be of 16 bits.
    streams : Streams
        What the noise of rows depends on: numbers, or arrays with a last axis of length 1.
    first : int
        The number of the first column.
    least : array, optional
        Per row, in the accumulator: lower scores may not be drawn.
    """

    cost = 4

    def __init__(self, scores: Ranked, streams: Streams, first: int, least: Any = None) -> None:
        self.scores, self.streams, self.first, self.least = scores, streams, first, least
        self.x = scores.x
        self.lost = np.zeros((*self.x.shape[:-1], 1), bool)  # rows that hold NaN or +inf

    def logits(self, place: Place, columns: Any = None) -> np.ndarray:
        """The scores that may be drawn, float32 or float64; of `lost` rows none."""
        _, s, _ = self.scores.read(place, columns)
        if s.itemsize < 4:
            s = s.astype(np.float32)
        lost = ~(s.max(-1, keepdims=True, initial=-np.inf) < np.inf)
        if lost.any():
            whole = self.lost[place]
            whole[lost.reshape(whole.shape)] = True
            s = np.where(lost, -np.inf, s)
        if self.least is not None:
            s = np.where(s < cut(self.least, place), -np.inf, s)
        return s

    def words(self, place: Place, columns: Any, n: int) -> np.ndarray:
        """Random bits of elements, (rows, n)."""
        streams = Streams(*(cut(one, place) if one.ndim else one for one in self.streams))
        if columns is None or isinstance(columns, slice):
            begin = self.first + (columns.start if columns is not None else 0)
            return streams.between(begin, begin + n)
        return streams.at(self.first + columns.reshape(-1, n))

    def read(self, place: Place, columns: Any = None) -> tuple[np.ndarray, np.ndarray, bool]:
        """As `Ranked.read`."""
        s = self.logits(place, columns)
        z = s.astype(FLOAT64)
        z += gumbel(self.words(place, columns, s.shape[1]))
        return z, z, True

    def best(self, place: Place, k: int, columns: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Ranked.best`. The noise is computed of what may be among the k best: at first of
        those with the highest bounds."""
        s = self.logits(place, columns)
        rows, n = s.shape
        words = np.ascontiguousarray(np.broadcast_to(self.words(place, columns, n), s.shape))
        if n < FEW * k:
            z = s + gumbel(words).astype(FLOAT64)
            found = select(z, k, True)
            return at(z, found), found
        most = s + bounds(words).astype(FLOAT64)
        found = select(most, k, True)
        limit = (at(s, found) + gumbel(at(words, found)).astype(FLOAT64)).min(-1, keepdims=True)
        flat = np.flatnonzero(most >= limit)
        z = s.reshape(-1).take(flat) + gumbel(words.reshape(-1).take(flat)).astype(FLOAT64)
        found = by_row(ranks(z, True), flat, (rows, n), k)
        return at(s, found) + gumbel(at(words, found)).astype(FLOAT64), found
