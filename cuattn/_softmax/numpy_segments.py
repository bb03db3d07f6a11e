"""Softmax of ragged rows of NumPy arrays, and its gradient: short segments many at a time, long
ones alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from cuattn._arrays.blocks import (
    BLOCK,
    FLOAT64,
    Slices,
    accumulator,
    each,
    narrow,
    pieces,
    scratch,
    widen,
)
from cuattn._arrays.row_layout import spec_of
from cuattn._softmax import numpy_softmax
from cuattn._softmax.request import Call, Operands, Request, expect

LONG = 4096  # elements of a segment that is worth a call


def run(call: Call) -> numpy_softmax.Results:
    """The results of a call; a new array where none is given."""
    expected, (x, y, *_, scale, offsets, _, _) = expect(call.request), call.operands
    out = np.empty_like(x, expected.dtype, subok=False) if call.out is None else call.out
    if x.size:
        scales = None
        if scale is not None or call.scale != 1:
            scales = np.broadcast_to(call.factor, (len(offsets) - 1, *x.shape[1:]))
        task = Task(x, y, out, np.asarray(offsets, np.int64), scales, expected.acc)
        each(task.run, task.blocks(), x.size)
    return numpy_softmax.Results(out, None, None)


class Task:
    """A call; x is grad where there is y; `scales` has the shape of the segments, or is None."""

    def __init__(self, x: Any, y: Any, out: Any, ends: Any, scales: Any, acc: np.dtype) -> None:
        self.x, self.y, self.out, self.ends, self.scales = x, y, out, ends, scales
        self.acc = accumulator(x.dtype, acc)

    def blocks(self) -> Iterator[tuple[Any, Slices]]:
        """Segments, none of them empty, and columns that are worked on together."""
        lengths = np.diff(self.ends)
        tail = self.x.shape[1:]
        short = np.flatnonzero((lengths > 0) & (lengths <= LONG))
        groups = np.cumsum(lengths[short]) // LONG  # of one number: up to two times LONG
        apart = self.ends[short[1:]] != self.ends[short[:-1] + 1]  # a long one between them
        cuts = np.flatnonzero(np.diff(groups).astype(bool) | apart) + 1
        for segments in np.split(short, cuts) if len(short) else ():
            for columns in pieces(tail, max(BLOCK // int(lengths[segments].sum()), 1)):
                yield segments, columns
        for i in np.flatnonzero(lengths > LONG):
            yield np.array([i]), (slice(None),) * len(tail)

    def run(self, segments: Any, columns: Slices) -> None:
        """The results of these segments."""
        begins, ends = self.ends[segments], self.ends[segments + 1]
        if ends[0] - begins[0] > LONG:
            self.alone(int(segments[0]))
            return
        at = (slice(int(begins[0]), int(ends[-1])), *columns)  # what lies between them is empty
        x = self.x[at]
        begins = begins - begins[0]
        owner = np.repeat(np.arange(len(begins)), np.diff(np.append(begins, len(x))))
        own = (segments, *columns)
        scale = None if self.scales is None else self.scales[own]
        if self.y is not None:
            y = self.gradient(x, self.y[at], begins, owner, scale)
        else:
            y, m = self.softmax(x, begins, owner, scale, self.acc)
            odd = ~np.isfinite(m)
            if scale is not None and self.acc != FLOAT64 and odd.any():  # beyond float32
                wide, _ = self.softmax(x, begins, owner, scale, FLOAT64)
                np.copyto(y, wide, casting="unsafe", where=odd[owner])
        narrow(y.reshape(x.shape), self.out[at])

    def load(self, name: str, x: Any, acc: np.dtype) -> Any:
        """x in scratch (elements, columns), widened."""
        s = scratch(name, (len(x), x[:1].size), acc)
        widen(x, s.reshape(x.shape))
        return s

    def gradient(self, grad: Any, y: Any, begins: Any, owner: Any, scale: Any) -> Any:
        """y * (grad - sum(grad * y)) times the scale (elements, columns)."""
        grad, y = self.load("x", grad, self.acc), self.load("y", y, self.acc)
        t = np.multiply(grad, y, out=scratch("t", grad.shape, self.acc))
        grad -= np.add.reduceat(t, begins, axis=0)[owner]
        np.multiply(grad, y, out=t)
        if scale is not None:
            t *= scale.reshape(len(begins), -1).astype(self.acc)[owner]
        return t

    def softmax(
        self, x: Any, begins: Any, owner: Any, scale: Any, acc: np.dtype
    ) -> tuple[Any, Any]:
        """Probabilities (elements, columns), and the maximum of each segment."""
        s = self.load(acc.name, x, acc)
        if scale is not None:
            s *= scale.reshape(len(begins), -1).astype(acc)[owner]
        m = np.maximum.reduceat(s, begins, axis=0)
        s -= m[owner]
        np.exp(s, out=s)
        s /= np.add.reduceat(s, begins, axis=0)[owner]
        return s, m

    def alone(self, i: int) -> None:
        """A long segment: a call along axis 0."""
        own = slice(int(self.ends[i]), int(self.ends[i + 1]))
        x, y = self.x[own], None if self.y is None else self.y[own]
        scale = None if self.scales is None else self.scales[i][None]
        request = Request(
            "prob" if y is None else "grad",
            (0,),
            spec_of(x),
            spec_of(y),
            scale=spec_of(scale),
            dtype=self.out.dtype,
        )
        numpy_softmax.run(Call(None, request, Operands(x, y, scale=scale), out=self.out[own]))
