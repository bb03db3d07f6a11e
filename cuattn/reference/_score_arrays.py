"""Gradients of the arrays of a score expression, by evaluating it once for each reference to one.

A part of `cuattn.reference`, whose rules hold here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from cuattn.reference._dual import Dual, as_dual
from cuattn.reference._numerics import wide
from cuattn.reference._score import Clamped, score_of


class _Watched(Clamped):
    """An array that notes where it is looked into, and whose reference `watched` is a `Dual`."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.places: list[Any] = []
        self.watched = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.places.append(self.clamped(index))
        return Dual(found, 1.0) if len(self.places) - 1 == self.watched else found


class ArraySums:
    """The gradients of some arrays, to which that of every query and key is added."""

    def __init__(self, text: str, arrays: Mapping[str, Any], names: bool | Sequence[str]) -> None:
        known = {name: np.asarray(array) for name, array in arrays.items()}
        if isinstance(names, bool):
            names = [name for name, array in known.items() if array.dtype.kind not in "biu"]
        self.text, self.arrays = text, known
        self.sums = {name: np.zeros(known[name].shape, wide(known[name]).dtype) for name in names}

    def of_sequence(self, b: int) -> Any:
        """As `add`, of sequence b alone."""
        return partial(self._add_to, b)

    def _add_to(self, own: int, ds: Any, s: Any, b: int, h: int, q: Any, k: Any) -> None:
        self.add(ds, s, own, h, q, k)

    def add(self, ds: Any, s: Any, b: int, h: int, q: Any, k: Any) -> None:
        """`ds`: gradients (M, N) of what the expression makes of scores s."""
        for name, total in self.sums.items():
            array = self.arrays[name]
            if not array.ndim:
                value = Dual(wide(array)[()], 1.0)
                total += np.sum(self.product(ds, self._derivative({name: value}, s, b, h, q, k)))
                continue
            watched, known = _Watched(wide(array)), 1
            while watched.watched < known:
                watched.places = []
                d = self._derivative({name: watched}, s, b, h, q, k)
                place, known = watched.places[watched.watched], len(watched.places)
                place = tuple(np.broadcast_to(i, ds.shape) for i in place)
                np.add.at(total, place, self.product(ds, d))
                watched.watched += 1

    def _derivative(self, watched: dict[str, Any], s: Any, *places: Any) -> Any:
        found = as_dual(score_of(self.text, self.arrays, watched)(s, *places))
        d = 0 if found.d is None else found.d
        return np.where(found.value == -np.inf, 0, d)

    @staticmethod
    def product(ds: Any, d: Any) -> Any:
        """0 if one of them is, as that of what is hidden, whatever the other one is."""
        return np.where((ds == 0) | (d == 0), 0, ds * d)
