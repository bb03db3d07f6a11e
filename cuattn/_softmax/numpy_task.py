"""A call on the rows of NumPy arrays: its operands, blocks of them, and where results go."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT64, Slices, accumulator, each, narrow
from cuattn._softmax.numpy_rows import UNBUFFERED, Rows
from cuattn._softmax.request import Operands, Request


class Task:
    """A call, its arrays in the order of its rows, and the kind of its blocks.

    `out` is the transform, or None. `kept` are results of which a row has one number: m and l of a
    state, with log(l) and lse for a selection, else the lse alone. `given` are such numbers that a
    kind of block needs.
    """

    def __init__(
        self,
        kind: Any,
        request: Request,
        operands: Operands,
        factor: Any,
        out: Any,
        kept: list[Any],
        acc: np.dtype,
        given: Sequence[Any] = (),
    ) -> None:
        x, y, where, weight, *_ = operands
        self.kind = kind
        self.result, self.acc = request.result, accumulator(x.dtype, acc)
        self.rows = rows = Rows(x, request.axes, self.acc)
        weight = None if weight is None else np.asarray(weight)
        self.x, self.y, self.where, self.weight, self.out = (
            rows.seen(array, x.shape) for array in (x, y, where, weight, out)
        )
        self.kept, self.given = ([rows.per_row(one) for one in some] for some in (kept, given))
        self.scale = None
        if np.ndim(factor) or factor != 1:
            row_shape = [1 if d in request.axes else size for d, size in enumerate(x.shape)]
            self.scale = rows.per_row(np.broadcast_to(factor, row_shape))

    def run(self) -> None:
        """All blocks."""
        each(self.block, ((at,) for at in self.rows.blocks()), self.x.size)

    def block(self, at: Slices) -> None:
        """The results of these rows; from float64 where the scores leave the range of float32."""
        if self.rows.unbuffered:
            np.setbufsize(UNBUFFERED)  # until the end of `each`, or of its share
        block = self.kind(self, at, self.acc)
        odd = block.reduce()
        if odd is None or self.acc == FLOAT64 or not odd.any():
            block.write()
        else:
            block.only = ~odd
            block.write()
            block = self.kind(self, at, FLOAT64)
            block.only = odd
            block.reduce()
            block.write()


class Block:
    """Rows of a task that are worked on together, in an accumulator's type.

    A kind of block has `reduce`, which finds what is of whole rows and says which of them float32
    has no range for, and `write`, which writes the results.
    """

    def __init__(self, task: Task, at: Slices, acc: np.dtype) -> None:
        self.task, self.rows, self.at, self.acc = task, task.rows, at, acc
        self.cut = self.rows.cut
        self.only: Any = None  # which of the rows are written; None: all
        self.ready: Any = None  # scores of rows that are one part
        self.factor: Any = None
        if task.scale is not None:
            factor = task.scale[at].reshape(-1).astype(task.acc)  # the same in either type
            self.factor = self.rows.spread(factor.astype(acc))

    def given(self, i: int) -> Any:
        """A number that each row has been given."""
        return self.task.given[i][self.at].reshape(-1)

    def load(self, name: str, part: Slices) -> Any:
        """An operand, as a view where it needs no conversion and is not gathered."""
        array, flat = getattr(self.task, name), None
        if array.dtype == self.acc and not self.rows.gathered:
            flat = self.rows.flat(array, self.at, part)
        return self.rows.load(array, self.at, part, name, self.acc) if flat is None else flat

    def counts(self, part: Slices) -> Any:
        """Which elements take part; None: all. What weighs nothing does not, even inf or NaN."""
        where, weight = self.task.where, self.task.weight
        if where is not None:
            where = self.rows.piece(where, self.at, part)
        if weight is None:
            return where
        weighs = self.rows.piece(weight, self.at, part) != 0
        return weighs if where is None else weighs & where

    def target(self, part: Slices) -> Any:
        """Where the result may stand before it is stored: in its place, else None."""
        out = self.task.out
        if out is None or self.only is not None or out.dtype != self.acc:
            return None
        return self.rows.flat(out, self.at, part)

    def store(self, part: Slices, y: Any, placed: bool, fill: float = 0) -> None:
        """Write a result that may be `placed` already; `fill` where an element takes no part."""
        out = self.rows.piece(self.task.out, self.at, part)
        found = y.reshape(out.shape)
        counts = self.counts(part)
        if counts is not None:
            np.copyto(found, fill, where=~counts)
        if self.only is not None:
            only = np.broadcast_to(self.rows.spread(self.only), y.shape).reshape(out.shape)
            narrowed = np.empty(out.shape, out.dtype)
            narrow(found, narrowed)
            np.copyto(out, narrowed, where=only)
        elif not placed:
            narrow(found, out)

    def keep(self, *numbers: Any) -> None:
        """Write one number per row, or some."""
        at = (..., *self.at)
        for kept, found in zip(self.task.kept, numbers, strict=False):
            place = kept[at]
            only = True if self.only is None else self.only.reshape(place.shape)
            np.copyto(place, found.reshape(place.shape), casting="unsafe", where=only)
