"""Gradients of softmax and its logarithm, of NumPy arrays."""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import Slices, scratch
from cuattn._softmax.numpy_task import Block


class Gradient(Block):
    """Gradients: y is the result of the forward call."""

    def reduce(self) -> None:
        """The sum that all elements of a row need; beyond float32 it is infinite, as in kernels."""
        total: Any = None
        for part in self.cut:
            total = self.rows.add(total, self.terms(part))
        self.total = self.rows.spread(total.astype(self.acc))

    def terms(self, part: Slices) -> Any:
        """What is summed: grad * y, or grad for logarithms; 0 where an element takes no part."""
        grad, counts = self.load("x", part), self.counts(part)
        logs = self.task.result == "log_grad"
        if logs and counts is None:
            return grad
        t = scratch("t", grad.shape, self.acc)
        if logs:
            np.copyto(t, grad)
        else:
            np.multiply(grad, self.load("y", part), out=t)
        if counts is not None:
            np.copyto(t.reshape(counts.shape), 0, where=~counts)
        return t

    def write(self) -> None:
        """y * (grad - total), or grad - exp(y) * total; times the scale."""
        for part in self.cut:
            grad, y, place = self.load("x", part), self.load("y", part), self.target(part)
            t = scratch("t", grad.shape, self.acc)
            dx = t if place is None else place
            if self.task.result == "grad":
                np.subtract(grad, self.total, out=t)
                np.multiply(t, y, out=dx)
            else:
                np.exp(y, out=t)
                np.multiply(t, self.total, out=t)
                np.subtract(grad, t, out=dx)
            if self.factor is not None:
                np.multiply(dx, self.factor, out=dx)
            self.store(part, dx, dx is place)
