"""`top_k`, `softmax_topk` and `softmax_topk_state` of NumPy arrays.

No softmax is written: rows give their sums, and the k best alone their exponentials.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT32, FLOAT64, pieces, quiet
from cuattn._arrays.outputs import into
from cuattn._softmax.numpy_states import row_states
from cuattn._topk.numpy_large import best_columns, is_large
from cuattn._topk.numpy_ranking import Place, Ranked, cut, select_rows
from cuattn._topk.request import INT64, Call

PIECE = 1 << 15  # of the k best of a row, how many are worked on at a time


@quiet
def run(call: Call) -> list[Any]:
    """The results of a call on NumPy arrays: of a state its fields, else values, indices and lse,
    if it is wanted. They are new where none are given."""
    (x, where, _), asked, expected = call.operands, call.request, call.expected
    values: Any = call.outs.get("out")
    indices: Any = call.outs.get("indices")
    if not call.outs:
        values, indices = np.empty(expected.shape, expected.dtype), np.empty(expected.shape, INT64)
    if asked.result == "top_k":
        ranked = Ranked(rows_last(x, asked.axis), call.options.scale > 0)
        Task(ranked, rows_last(values, asked.axis), rows_last(indices, asked.axis)).run()
        return [values, indices]

    sums: Any = None
    relative = asked.result in ("prob", "log_prob") and not call.options.renormalize
    if asked.result == "state" or relative or call.options.wants_lse:
        logs = asked.result != "prob" or call.options.wants_lse
        sums = row_states(x, asked.axis, call.factor, where, expected.acc, logs)
    outs = [rows_last(out, asked.axis) for out in (values, indices)]
    if asked.result != "state":
        SoftmaxTask(call, outs[0], outs[1], sums).run()
        if not call.options.wants_lse:
            return [values, indices]
        lse = call.outs.get("stat")
        return [values, indices, into(lse, sums[3].reshape(expected.stat_shape))]
    n = x.shape[asked.axis]
    outs = [values[..., :n], indices[..., :n]]
    values[..., n:], indices[..., n:] = -np.inf, -1  # what a row lacks
    SoftmaxTask(call, outs[0], outs[1], sums).run()
    outs[1] += call.options.index_offset
    stats = (part.reshape(expected.stat_shape) for part in sums[:2])
    given = (call.outs.get(name) for name in ("stat", "stat_l"))
    return [*map(into, given, stats), values, indices]


def rows_last(array: np.ndarray, axis: int) -> np.ndarray:
    """The same with rows on the last axis."""
    return array if axis == array.ndim - 1 else np.moveaxis(array, axis, -1)


class Task:
    """What is ranked, and results with the k best on the last axis."""

    def __init__(self, ranked: Ranked, values: np.ndarray, indices: np.ndarray) -> None:
        self.ranked, self.values, self.indices = ranked, values, indices

    def run(self) -> None:
        """Write the results."""
        if not self.values.size:
            return
        k = self.values.shape[-1]
        if not is_large(self.ranked.x.shape[-1], k):
            select_rows(self.ranked, k, self.store)
            return
        for place in pieces(self.values.shape[:-1], 1):
            columns = self.indices[place].reshape(-1)  # of one row, and no copy
            best_columns(self.ranked, place, columns)
            self.finish(place, None, columns[None])

    def store(self, place: Place, x: np.ndarray, columns: np.ndarray) -> None:
        """Those of a block of rows, whose k best elements are x."""
        put(self.indices[place], columns)
        self.finish(place, x, columns)

    def finish(self, place: Place, x: np.ndarray | None, columns: np.ndarray) -> None:
        """The values at these columns: `x`, where it is at hand."""
        for piece in cut_up(columns):
            put(self.values[place][..., piece], elements(self.ranked, place, x, columns, piece))


def elements(
    ranked: Ranked, place: Place, x: np.ndarray | None, columns: np.ndarray, piece: slice
) -> np.ndarray:
    """A piece of the elements at these columns: of `x`, where they are at hand."""
    return ranked.read(place, columns[:, piece])[0] if x is None else x[:, piece]


def cut_up(columns: np.ndarray) -> list[slice]:
    """Pieces of rows of this length."""
    return [slice(i, i + PIECE) for i in range(0, columns.shape[1], PIECE)]


def put(out: np.ndarray, found: np.ndarray) -> None:
    """Write rows into a block of results, rounded to its dtype."""
    out[...] = found.reshape(out.shape)


class SoftmaxTask(Task):
    """Scaled scores are ranked; `sums`: m, l, log(l) and lse of each row."""

    def __init__(self, call: Call, values: np.ndarray, indices: np.ndarray, sums: Any) -> None:
        (x, where, scale), axis, acc = call.operands, call.request.axis, call.expected.acc
        self.result, self.acc = call.request.result, acc
        self.sums: Any = None
        self.renormalize = call.options.renormalize
        if sums is not None:
            self.sums = [None if part is None else rows_last(part, axis) for part in sums]
        if where is not None:
            where = rows_last(np.broadcast_to(where, x.shape), axis)
        self.scale = self.unit = factor = None
        if scale is not None or call.options.scale != 1:
            kept = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
            scale = rows_last(np.broadcast_to(call.factor, kept), axis)
            factor = scale.astype(acc)
            # Logits have no range: a power of two is taken out of a factor above 1.
            large = np.isfinite(factor) & (abs(factor) > 1) & (acc == FLOAT32)
            self.unit = np.where(large, np.minimum(np.frexp(factor)[1], 127), 0)
            self.scale, factor = scale.astype(FLOAT64), np.ldexp(factor, -self.unit)
        super().__init__(Ranked(rows_last(x, axis), True, factor, where), values, indices)

    def finish(self, place: Place, x: np.ndarray | None, columns: np.ndarray) -> None:
        """Values of a block of rows, of what is at these columns."""
        best = Best(self, place, x, columns)
        if self.result in ("prob", "log_prob"):
            best.prepare()
        finish = {"prob": best.prob, "log_prob": best.log_prob}.get(self.result, best.logit)
        for piece in best.pieces:
            found = finish(piece)
            if self.ranked.where is not None:
                found[~best.where(piece)] = 0 if self.result == "prob" else -np.inf
            put(self.values[place][..., piece], found)


class Best:
    """The k best elements of a block of rows, best first."""

    top: Any
    finite: Any
    own: Any = None

    def __init__(
        self, task: SoftmaxTask, place: Place, x: np.ndarray | None, columns: np.ndarray
    ) -> None:
        self.task, self.place, self.x, self.columns = task, place, x, columns
        self.pieces = cut_up(columns)
        self.ready: Any = None  # scores that are one piece

    def prepare(self) -> None:
        """What exponentials are of, and their sum: of the row, or of the k best themselves."""
        s = self.scores(self.pieces[0])
        self.ready = s if len(self.pieces) == 1 else None
        self.top = s[:, :1]
        self.finite = np.isfinite(self.top)
        if not self.task.renormalize:
            return
        rest, m = np.zeros(self.top.shape), self.top
        for piece in self.pieces:
            s = self.scores(piece)
            m = np.maximum(m, s.max(-1, keepdims=True))
            others = np.exp(s - self.top)[:, int(piece.start == 0) :]  # the first is 1
            rest += np.add.reduce(others, -1, keepdims=True)
        self.own = m, 1 + rest, np.log1p(rest), m  # which is their lse where it is not finite

    def elements(self, piece: slice) -> np.ndarray:
        """Some of them."""
        return elements(self.task.ranked, self.place, self.x, self.columns, piece)

    def where(self, piece: slice) -> np.ndarray:
        """Which of them take part."""
        return cut(self.task.ranked.where, self.place, self.columns[:, piece])

    def sums(self, i: int) -> Any:
        """m, l, log(l) or lse of the rows, or of the k best themselves."""
        return self.own[i] if self.own is not None else cut(self.task.sums[i], self.place)

    def logit(self, piece: slice) -> np.ndarray:
        """The scores as they rank."""
        t = self.elements(piece).astype(self.task.acc)
        if self.task.unit is None:
            return t
        t *= cut(self.task.ranked.factor, self.place)
        return np.ldexp(t.astype(FLOAT64), cut(self.task.unit, self.place))

    def scores(self, piece: slice) -> np.ndarray:
        """The scores, of any size; those that do not take part are -inf."""
        if self.ready is not None:
            return self.ready
        s = self.elements(piece).astype(FLOAT64)
        if self.task.scale is not None:
            s *= cut(self.task.scale, self.place)
        if self.task.ranked.where is not None:
            s[~self.where(piece)] = -np.inf
        return s

    def prob(self, piece: slice) -> np.ndarray:
        """exp(s) / sum: NaN in a row that holds +inf, or nothing but -inf."""
        e = self.scores(piece) - self.top
        np.exp(e, out=e)
        e /= np.where(self.finite, self.sums(1), np.nan)
        return e

    def log_prob(self, piece: slice) -> np.ndarray:
        """The difference comes first: the range of float32 may hold neither score nor lse."""
        s = self.scores(piece)
        return np.where(self.finite, s - self.top - self.sums(2), s - self.sums(3))
