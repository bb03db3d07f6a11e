"""`sample` and `sample_state` of NumPy arrays.

The draws are the best of scores with noise, selected as the best scores are. With top_k or top_p
the best scores are selected first, as many as these take, and the draws are among them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from cuattn._arrays.blocks import FLOAT64, pieces, quiet
from cuattn._arrays.outputs import into
from cuattn._softmax.numpy_states import row_states
from cuattn._topk.numpy_draws import Noisy
from cuattn._topk.numpy_large import best_columns, is_large
from cuattn._topk.numpy_noise import NUMBERS, Streams, gumbel
from cuattn._topk.numpy_ranking import Place, Ranked, Ranking, Store, cut, select_rows
from cuattn._topk.numpy_topk import put, rows_last
from cuattn._topk.request import INT64
from cuattn._topk.request_sample import Call

LIST = 256  # scores of which top_p takes some; rows that lack mass get MORE times as many
MORE = 8


@quiet
def run(call: Call) -> list[Any]:
    """The results of a call on NumPy arrays, by its `fields`; new where none are given."""
    draws = Draws(call)
    draws.run()
    return [draws.results[name] for name in call.fields]


class Draws:
    """A call, its arrays with rows on the last axis, and its results."""

    def __init__(self, call: Call) -> None:
        (x, where, _, *numbers), asked, expected = call.operands, call.request, call.expected
        axis, acc = asked.axis, expected.acc
        self.call, self.n = call, x.shape[axis]
        kept = (*x.shape[:axis], 1, *x.shape[axis + 1 :])

        def of_rows(number: Any) -> Any:
            return rows_last(np.broadcast_to(number, kept), axis)

        factor = None if np.ndim(call.factor) == 0 and call.factor == 1 else call.factor
        if factor is not None:
            factor = of_rows(factor).astype(acc)
        taking = None if where is None else rows_last(np.broadcast_to(where, x.shape), axis)
        self.scores = Ranked(rows_last(x, axis), True, factor, taking)
        seed, offset, row = numbers
        if row is None and asked.counts_rows:
            row = np.arange(math.prod(kept), dtype=NUMBERS).reshape(kept)
        given = (seed, call.options.seed), (offset, call.options.offset), (row, 0)
        self.streams = Streams(
            *(NUMBERS(n) if one is None else of_rows(one).astype(NUMBERS) for one, n in given)
        )
        self.m: Any = None
        sums: Any = None
        if asked.result != "indices" or asked.top_k or asked.top_p or asked.min_p:
            sums = row_states(x, axis, call.factor, where, acc)
            self.m, self.l, self.log_l, _ = (rows_last(part, axis) for part in sums)
        self.results = {name: self._result(name, sums) for name in call.fields}
        at = x.ndim - 1 if asked.result == "state" else axis
        self.outs = {
            name: rows_last(out, at) for name, out in self.results.items() if name not in ("m", "l")
        }

    def _result(self, name: str, sums: Any) -> Any:
        """An array for a result: with m or l of the rows, else with what stands for no draw."""
        expected, given = self.call.expected, self.call.outs.get(name)
        if name in ("m", "l"):
            return into(given, sums["ml".index(name)].reshape(expected.stat_shape))
        dtype = {"values": FLOAT64, "indices": INT64}.get(name, expected.acc)
        out = np.empty(expected.shape, dtype) if given is None else given
        out[...] = -1 if name == "indices" else -np.inf
        return out

    def run(self) -> None:
        """Write the results."""
        asked, x = self.call.request, self.scores.x
        num = min(asked.num, self.n)
        if num and x.size:
            if asked.top_k or asked.top_p:
                self.among_best((), asked.top_k or min(LIST, self.n), num)
            else:
                least = None
                if asked.min_p:  # the least score that reaches it
                    exact = self.m.astype(FLOAT64) + np.log(self.call.options.min_p)
                    least = exact.astype(self.m.dtype)
                    least = np.where(least < exact, np.nextafter(least, np.inf), least)
                first = self.call.options.index_offset
                noisy = Noisy(self.scores, self.streams, first, least)

                def store(place: Place, z: np.ndarray, columns: np.ndarray) -> None:
                    z = np.where(cut(noisy.lost, place), -np.inf, z)
                    self.store((), place, z, columns)

                _select(noisy, num, store)
        if asked.result == "log_prob":
            none = (self.m == -np.inf) & (self.scores.where is None and self.n > 0)
            np.copyto(self.outs["log_prob"], np.nan, where=~(self.m < np.inf) | none)

    def among_best(self, row: Place, count: int, num: int) -> None:
        """Draws among the `count` best scores of all rows, or of one."""
        scores = self.scores.rows(row)
        lacking: list[Place] = []
        m, l = self.m[row], self.l[row]  # noqa: E741
        asked, options = self.call.request, self.call.options

        def store(place: Place, _: Any, columns: np.ndarray) -> None:
            s = scores.read(place, columns)[1].astype(FLOAT64)
            top = cut(m, place)
            keep = (s > -np.inf) & (top < np.inf)
            if asked.top_p:
                e = np.exp(s - top)
                until = np.cumsum(e, -1)
                total = until[:, -1:] if asked.top_k else cut(l, place)
                keep &= until - e < options.top_p * total
                if not asked.top_k and columns.shape[1] < self.n:
                    lacks = (until[:, -1:] < options.top_p * total) & (top < np.inf)
                    lacking.extend(_places(place, lacks.reshape(m[place].shape[:-1])))
            if asked.min_p:
                keep &= s >= top + np.log(options.min_p)
            z = np.where(keep, s + gumbel(self.words(row, place, columns)), -np.inf)
            order = _order(z, columns)[:, :num]
            best = (np.take_along_axis(part, order, -1) for part in (z, columns))
            self.store(row, place, *best)

        _select(scores, count, store)
        for one in lacking:
            self.among_best(row or one, min(MORE * count, self.n), num)

    def words(self, row: Place, place: Place, columns: np.ndarray) -> np.ndarray:
        """Random bits of elements at these columns."""
        own = (cut(one[row], place) if one.ndim else one for one in self.streams)
        return Streams(*own).at(columns)

    def store(self, row: Place, place: Place, z: np.ndarray, columns: np.ndarray) -> None:
        """Write draws of a block of rows: where z is -inf there is none."""
        size, missing = z.shape[1], ~(z > -np.inf)
        scores = self.scores.rows(row)
        for name, out in self.outs.items():
            target = out[row][place][..., :size]
            if name == "indices":
                put(target, np.where(missing, -1, columns + self.call.options.index_offset))
                continue
            found = z
            if name != "values":
                found = scores.read(place, columns)[1].astype(FLOAT64)
            if name == "log_prob":
                found = (found - cut(self.m[row], place)) - cut(self.log_l[row], place)
            put(target, np.where(missing, -np.inf, found))


def _select(rows: Ranking, k: int, store: Store) -> None:
    """`select_rows`; for large k one row after another."""
    if not is_large(rows.x.shape[-1], k):
        select_rows(rows, k, store)
        return
    for place in pieces(rows.x.shape[:-1], 1):
        columns = np.empty(k, INT64)
        best_columns(rows, place, columns)
        store(place, rows.read(place, columns[None])[1], columns[None])


def _order(z: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Places of the largest first; of equal ones, of the lower column."""
    order = np.argsort(-z, -1)
    ordered = np.take_along_axis(z, order, -1)
    tied = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > -np.inf)).any(-1)
    order[tied] = np.lexsort((columns[tied], -z[tied]))  # the last key counts most
    return order


def _places(place: Place, rows: np.ndarray) -> list[Place]:
    """Indices of the rows of a block that are True."""
    starts = [part.start or 0 for part in place] or [0] * rows.ndim
    return [
        tuple(slice(start + i, start + i + 1) for start, i in zip(starts, index, strict=True))
        for index in np.argwhere(rows)
    ]
