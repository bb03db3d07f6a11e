"""Softmax, its logarithm, log-sum-exp and state of NumPy arrays, block by block.

A block of rows is passed over for the maximum, for the sum and for the result, each time from the
cache where its rows fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import row_layout
from cuattn._arrays.blocks import BLOCK, Slices, quiet, scratch
from cuattn._arrays.results import SoftmaxState
from cuattn._softmax.numpy_given import Given
from cuattn._softmax.numpy_gradient import Gradient
from cuattn._softmax.numpy_task import Block, Task
from cuattn._softmax.request import Call, Request, expect


class Results(NamedTuple):
    """As those of a device: the transform, and one number per row (lse, or m and l of a state)."""

    out: Any
    stat: Any
    stat_l: Any


def run(call: Call) -> Results:
    """The results of a call on NumPy arrays; new ones where none are given."""
    expected = expect(call.request)
    x, out, m, l = call.operands.x, call.out, *call.operands[-2:]  # noqa: E741
    result, shape = call.request.result, expected.stat_shape
    numbers = result in ("lse", "state")
    if out is None and not numbers:
        out = np.empty_like(x, expected.dtype, subok=False)
    kept = []
    if numbers or call.wants_stat:
        kept = [np.empty(shape, expected.stat_dtype) if call.stat is None else call.stat]
    if result == "state":
        kept.append(np.empty(shape, expected.stat_dtype) if call.stat_l is None else call.stat_l)
    if x.size:
        kind = Gradient if result in ("grad", "log_grad") else Forward if m is None else Given
        given = [] if m is None else [m, l]
        views, given = ([one.reshape(expected.row_shape) for one in some] for some in (kept, given))
        acc = expected.acc
        Task(kind, call.request, call.operands, call.factor, out, views, acc, given).run()
    elif m is None:
        for k, of_nothing in zip(kept, (-np.inf, 0), strict=False):
            k[...] = of_nothing
    if m is not None and kept:
        np.copyto(kept[0], SoftmaxState(m, l).lse)
    return Results(out, *kept, *(None, None)[len(kept) :])


def few(request: Request, given: tuple[str, ...]) -> Callable[[Any], list[Any] | None] | None:
    """What computes a small call without options, as the formula has it: there the machinery of
    this file takes longer. The bits are the same. None, of it too: the machinery is needed."""
    x, result, expected = request.x, request.result, expect(request)
    plain = (
        result in ("prob", "log_prob", "lse")
        and given == ("x",)
        and 0 < math.prod(x.shape) <= 2 * BLOCK
        and x.dtype == expected.dtype == expected.acc
        and x.strides == row_layout.packed(x.shape, None, x.dtype.itemsize)
        and request.axes == (len(x.shape) - 1,)
    )
    if not plain:
        return None

    @quiet
    def formula(x: Any) -> list[Any] | None:
        m = np.maximum.reduce(x, axis=-1, keepdims=True)
        s = np.subtract(x, m)
        e = np.exp(s, s if result != "log_prob" else None)
        l = np.add.reduce(e, axis=-1, keepdims=True)  # noqa: E741
        if result == "prob":
            return [np.divide(e, l, e)]
        if not (l >= 1.5).all():  # NaN, or what log1p is for
            return None
        log_l = np.log(l)
        if result == "log_prob":
            return [np.subtract(s, log_l, s)]
        return [np.add(m, log_l).reshape(expected.stat_shape)]

    return formula


class Forward(Block):
    """Softmax and what is made of the same sums."""

    kept_e: Any  # the last exponentials
    kept_y: tuple[Any, bool]  # the last differences

    def reduce(self) -> Any:
        """m; which rows a scale takes out of range."""
        result, axis = self.task.result, self.rows.axis
        m: Any = None
        low: Any = None
        for part in self.cut:
            s = self.scores(part)
            top = self.rows.max(s)
            m = top if m is None else np.maximum(m, top)
            if self.factor is not None and result == "log_prob":
                least = np.minimum.reduce(s, axis=axis)
                low = least if low is None else np.minimum(low, least)
        self.ready = s if len(self.cut) == 1 else None
        # Of -inf only, or with +inf, a row of probabilities is NaN: inf - inf. Logarithms are not.
        self.m = self.shift = m
        if result != "prob":
            self.shift = np.where(np.isfinite(m), m, m.dtype.type(0))
        self.base = self.rows.spread(self.shift)
        if self.factor is None:
            return None
        return ~np.isfinite(m) if low is None else ~(np.isfinite(m) & np.isfinite(low))

    def write(self) -> None:
        """l, and with it the results."""
        result = self.task.result
        l: Any = None  # noqa: E741
        w: Any = None
        for part in self.cut:
            rest, top = self.terms(part)
            l = self.rows.add(l, rest)  # noqa: E741
            w = None if top is None else self.rows.add(w, top)
        if result == "prob":
            self.divide(l)
        elif result == "state":
            self.keep(self.m, l)
        else:
            log_l = self.log_sum(l, w)
            lse = self.shift + log_l
            if result == "states":
                self.keep(self.m, l, log_l, lse)
            else:
                self.keep(lse)
            if result == "log_prob":
                self.subtract(log_l)
            elif result == "prob_lse":
                self.divide(np.where(self.m == np.inf, np.nan, l))

    def divide(self, l: Any) -> None:  # noqa: E741
        """Probabilities: exp(s - m) / l."""
        ends = self.rows.spread(l.astype(self.acc, copy=False))
        for part in self.cut:
            e, place = self.exponentials(part, again=True), self.target(part)
            y = np.divide(e, ends, out=e if place is None else place)
            self.store(part, y, y is place)

    def subtract(self, log_l: Any) -> None:
        """Their logarithms: s - m - log(l)."""
        ends = self.rows.spread(log_l.astype(self.acc, copy=False))
        for part in self.cut:
            y, placed = self.differences(part, again=True)
            np.subtract(y, ends, out=y)
            self.store(part, y, placed, -np.inf)

    def differences(self, part: Slices, again: bool = False) -> tuple[Any, bool]:
        """s - m, and whether it stands where the result will; ready where rows are one part."""
        if not again or len(self.cut) > 1:
            s, place = self.scores(part), self.target(part)
            y = scratch("y", s.shape, self.acc) if place is None else place
            self.kept_y = np.subtract(s, self.base, out=y), y is place
        return self.kept_y

    def scores(self, part: Slices) -> Any:
        """The scaled scores of a part; an element that does not take part is -inf."""
        if self.ready is not None:
            return self.ready
        s = self.load("x", part)
        if self.factor is not None:
            s = np.multiply(s, self.factor, out=scratch("x", s.shape, self.acc))
        counts = self.counts(part)
        if counts is not None:
            own = scratch("x", s.shape, self.acc)
            np.copyto(own, s)  # s may be a view of x
            s = own
            np.copyto(s.reshape(counts.shape), -np.inf, where=~counts)
        return s

    def exponentials(self, part: Slices, again: bool = False) -> Any:
        """exp(s - m). For probabilities it stands where the result will, if it can: there, or where
        rows are one part, it is ready if it is needed `again`."""
        if again and len(self.cut) == 1:
            return self.kept_e
        if self.task.result == "log_prob" and len(self.cut) == 1:
            y, _ = self.differences(part)
            self.kept_e = np.exp(y, out=scratch("e", y.shape, self.acc))
            return self.kept_e
        e, prob = None, self.task.result in ("prob", "prob_lse")
        if prob and not self.rows.gathered:
            e = self.target(part)
            if again and e is not None:
                return e
        s = self.scores(part)
        if e is None:  # x itself stays as it is
            own = prob and self.is_scratch(s)
            e = s if own else scratch("e", s.shape, self.acc)
        np.subtract(s, self.base, out=e)
        self.kept_e = np.exp(e, out=e)
        return e

    def is_scratch(self, s: Any) -> bool:
        """Whether scores are no view of x."""
        return s.ctypes.data == scratch("x", s.shape, self.acc).ctypes.data

    def terms(self, part: Slices) -> tuple[Any, Any]:
        """What is added up of a part; with weights all but the maximum, and the maximum."""
        e = self.exponentials(part)
        if self.task.weight is None:
            return e, None
        b = scratch("weight", e.shape, self.acc)
        if (given := self.load("weight", part)).ctypes.data != b.ctypes.data:
            np.copyto(b, given)
        np.copyto(b, 0, where=~self.counts(part).reshape(b.shape))
        top = e == 1
        w = np.where(top, b, b.dtype.type(0))
        np.multiply(b, e, out=b)
        np.copyto(b, 0, where=top)
        return b, w

    def log_sum(self, l: Any, w: Any) -> Any:  # noqa: E741
        """log(l). The terms of the maximum stay apart where the others would lose their digits."""
        if w is not None:
            near = np.isfinite(self.m) & (abs(l) < w / 2)
            return np.where(near, np.log(w) + np.log1p(l / w), np.log(w + l))
        near = (l >= 1) & (l < 1.5)  # the maximum has one term, 1
        if not near.any():
            return np.log(l)
        rest: Any = None
        for part in self.cut:
            e = self.exponentials(part, again=True)
            rest = self.rows.add(rest, np.where(e == 1, e.dtype.type(0), e))
        return np.where(near, np.log1p(rest), np.log(l))
