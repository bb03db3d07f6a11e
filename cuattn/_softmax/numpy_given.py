"""Softmax and its logarithm of parts of rows whose states are known: one pass."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT32, Slices, scratch
from cuattn._softmax.numpy_task import Block, Task


class Given(Block):
    """Elements by themselves: exp(s - m) / l, or s - m - log(l).

    As in the kernels s and m are in units of a power of two, so that a scale may take scores out of
    the range of float32.
    """

    def __init__(self, task: Task, at: Slices, acc: np.dtype) -> None:
        super().__init__(task, at, acc)
        m, l = (self.rows.spread(self.given(i)) for i in (0, 1))  # noqa: E741
        power: Any = 0
        if self.factor is not None and acc == FLOAT32:
            large = np.isfinite(self.factor) & (abs(self.factor) > 1)
            power = np.minimum(np.where(large, np.frexp(self.factor)[1], 0), 127)
            self.factor = np.ldexp(self.factor, -power)
        self.unit = np.ldexp(acc.type(1), power) if np.any(power) else None
        self.m = np.ldexp(m, -power).astype(acc)
        self.log = task.result == "log_prob"
        # With +inf or NaN in it, or nothing but -inf, a row of probabilities is NaN.
        ends = np.log(l) if self.log else np.where(np.isfinite(m), l, m.dtype.type(np.nan))
        self.ends = ends.astype(acc)

    def reduce(self) -> None:
        """Nothing: the states are of whole rows."""

    def write(self) -> None:
        """The results."""
        for part in self.cut:
            s, place = self.load("x", part), self.target(part)
            y = scratch("y", s.shape, self.acc) if place is None else place
            if self.factor is not None:
                s = np.multiply(s, self.factor, out=y)
            np.subtract(s, self.m, out=y)
            if self.unit is not None:
                np.multiply(y, self.unit, out=y)
            if self.log:
                np.subtract(y, self.ends, out=y)
            else:
                np.exp(y, out=y)
                np.divide(y, self.ends, out=y)
            self.store(part, y, y is place, -np.inf if self.log else 0)
