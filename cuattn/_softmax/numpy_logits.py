"""Cross entropy, its gradient, entropy and the states of both, of NumPy arrays.

Sums are those of a softmax. Before, the element that its label names is gathered from each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import Slices, scratch
from cuattn._softmax.numpy_softmax import Forward
from cuattn._softmax.numpy_task import Block, Task
from cuattn._softmax.request import Call, expect

# Results of requests, and what they are of rows without elements.
OF_NOTHING = {
    "loss": (0,),
    "loss_lse": (0, -np.inf),
    "entropy": (0,),
    "logits": (-np.inf, 0, 0, np.nan),
}
RESULTS = (*OF_NOTHING, "loss_grad")


def run(call: Call) -> list[Any]:
    """The results of a call on NumPy arrays, in the order of what it returns; new ones where none
    are given. Labels have been checked, but for those of a state."""
    request, (x, _, where, *_), expected = call.request, call.operands, expect(call.request)
    if request.result == "loss_grad":
        return [_gradient(call)]
    given = (call.stat, call.stat_l, call.stat_t, call.stat_logit)
    kept = [
        np.full(expected.stat_shape, number, expected.stat_dtype) if one is None else one
        for one, number in zip(given, OF_NOTHING[request.result], strict=False)
    ]
    if not x.size:
        for one, number in zip(kept, OF_NOTHING[request.result], strict=True):
            one[...] = number
        return kept
    rows = [] if call.operands.labels is None else _labelled(call, expected.acc)
    views, rows = ([one.reshape(expected.row_shape) for one in some] for some in (kept, rows))
    acc = expected.acc
    Task(Logits, request, call.operands, call.factor, None, views, acc, rows).run()
    if where is not None and np.isnan(kept[0]).any():  # of rows in which nothing takes part, too
        part = np.broadcast_to(where, x.shape)
        some = np.any(part, axis=request.axes, keepdims=request.keepdims)
        np.copyto(kept[0], 0, where=~some)
    return kept


def _labelled(call: Call, acc: np.dtype) -> list[Any]:
    """Of each row the element of its label, NaN without one, and whether the label is ignored."""
    x, labels, (axis,) = call.operands.x, call.operands.labels, call.request.axes
    index = labels.astype(np.int64) - call.index_offset
    inside = (index >= 0) & (index < x.shape[axis])
    index = np.where(inside, index, 0).reshape(expect(call.request).row_shape)
    found = np.take_along_axis(x, index, axis).reshape(labels.shape).astype(acc)
    np.copyto(found, np.nan, where=~inside)
    return [found, labels == call.ignore_index]


def _gradient(call: Call) -> Any:
    """The gradient of the losses with respect to x."""
    x, _, _, _, labels, lse, grad, *_ = call.operands
    out, expected = call.out, expect(call.request)
    if out is None:
        out = np.empty_like(x, subok=False)
    if x.size:
        grad = np.broadcast_to(call.grad if grad is None else grad, labels.shape)
        ignored = labels == call.ignore_index
        labels = labels.astype(np.int64) - call.index_offset
        rows = [one.reshape(expected.row_shape) for one in (lse, grad, labels, ignored)]
        acc = expected.acc
        Task(Gradient, call.request, call.operands, call.factor, out, [], acc, rows).run()
    return out


class Logits(Forward):
    """Losses, entropies and states."""

    def reduce(self) -> Any:
        """As of a softmax; the element of the label may be out of range alone."""
        odd = super().reduce()
        if self.task.given:
            logit = self.given(0).astype(self.acc)
            self.logit = logit if self.factor is None else logit * self.factor.reshape(-1)
            odd = None if odd is None else odd | np.isinf(self.logit)
        return odd

    def write(self) -> None:
        """l, for entropies t, and with them the results."""
        result = self.task.result
        l: Any = None  # noqa: E741
        t: Any = None
        for part in self.cut:
            if result in ("loss", "loss_lse"):
                l = self.rows.add(l, self.exponentials(part))  # noqa: E741
                continue
            d, _ = self.differences(part)
            self.kept_e = e = np.exp(d, out=scratch("e", d.shape, self.acc))
            l = self.rows.add(l, e)  # noqa: E741
            np.maximum(d, np.finfo(self.acc).min, out=d)  # 0 * -inf is 0
            t = self.rows.add(t, np.multiply(d, e, out=d))
        if result == "logits":
            infinite = np.isinf(self.m.astype(self.task.acc))
            self.keep(self.m, l, np.where(infinite, l, t), self.logit)
            return
        log_l = self.log_sum(l, None)
        if result == "entropy":
            self.keep(log_l - t / l)
        else:
            loss = log_l - (self.logit - self.shift)
            self.keep(np.where(self.given(1), 0, loss), self.shift + log_l)


class Gradient(Block):
    """Elements by themselves: exp(s - lse), less 1 at the label, times grad and scale."""

    def __init__(self, task: Task, at: Slices, acc: np.dtype) -> None:
        super().__init__(task, at, acc)
        lse, grad, self.labels, self.ignored = map(self.given, range(4))
        self.lse = self.rows.spread(lse.astype(acc))
        self.grad = self.rows.spread(np.where(np.isfinite(lse), grad.astype(acc), acc.type(np.nan)))

    def reduce(self) -> None:
        """Nothing: the lse is of whole rows."""

    def write(self) -> None:
        """The results."""
        for part in self.cut:
            s, place = self.load("x", part), self.target(part)
            y = scratch("y", s.shape, self.acc) if place is None else place
            if self.factor is not None:
                s = np.multiply(s, self.factor, out=y)
            np.subtract(s, self.lse, out=y)
            np.exp(y, out=y)
            rows = y.T if self.rows.down else y
            index = self.labels - (part[0].start or 0)
            (here,) = np.nonzero((index >= 0) & (index < rows.shape[1]))
            rows[here, index[here]] -= 1
            np.multiply(y, self.grad, out=y)
            if self.factor is not None:
                np.multiply(y, self.factor, out=y)
            if self.ignored.any():
                rows[self.ignored] = 0
            self.store(part, y, y is place)
