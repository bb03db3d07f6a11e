"""Expressions by NumPy, step by step, for a tile of queries and keys."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from cuattn._arrays import blocks
from cuattn._arrays.derivative import differentiate
from cuattn._arrays.expression import Expression, Step

NUMBERS = {"int": np.int64, "bool": np.bool_}
Chains = dict[int | None, np.ndarray]  # derivatives by s (None), or by the element that a step is


class Score(NamedTuple):
    """A score expression of heads and sequences, whose numbers it is handed."""

    expression: Expression
    arrays: tuple[Any, ...]
    b: Any  # (B, 1, 1, 1, 1)
    h: Any  # (1, G, g, 1, 1)
    acc: np.dtype  # of its floats, also where scores come in float64

    def tile(self, b: slice, h: slice) -> Score:
        """Sequences b, heads h of k and v."""
        return self._replace(b=self.b[b], h=self.h[:, h])

    def change(self, s: np.ndarray, place: int, j: slice, chains: Chains | None = None) -> None:
        """Scores (B, G, g, M, N), in place, of queries from `place` on and keys j; into `chains`
        their derivatives."""
        q = np.arange(place, place + s.shape[3], dtype=np.int64)[:, None]
        k = np.arange(j.start, j.stop, dtype=np.int64)
        given = s.astype(self.acc, copy=False)
        names = {"s": given, "b": self.b, "h": self.h, "q": q, "k": k}
        score, changed = len(self.expression.steps) - 1, None
        for by, chain in (chains or {}).items():
            steps = differentiate(self.expression, by).steps
            changed, chain[...] = values_of(
                steps, self.arrays, names, self.acc, score, len(steps) - 1
            )
        if not chains:
            (changed,) = values_of(self.expression.steps, self.arrays, names, self.acc, score)
        s[...] = changed

    def places(self, step: Step, distances: np.ndarray) -> np.ndarray:
        """Where in its array a reference to an element looks, in C order, at distances of query and
        key, on which it depends in no other way."""
        names = {"s": np.zeros(1, self.acc), "b": self.b, "h": self.h}
        names |= {"q": distances, "k": np.zeros(1, np.int64)}
        at = values_of(self.expression.steps, self.arrays, names, self.acc, *step.operands)
        shape = self.arrays[step.value].shape
        if not shape:
            return np.zeros((1,) * 5, np.int64)
        clamped = (np.clip(i, 0, size - 1) for i, size in zip(at, shape, strict=True))
        found = np.ravel_multi_index(tuple(np.broadcast_arrays(*clamped)), shape)
        return found.reshape((1,) * (5 - found.ndim) + found.shape)


def values_of(
    steps: tuple[Step, ...],
    arrays: tuple[Any, ...],
    names: dict[str, Any],
    acc: np.dtype,
    *wanted: int,
) -> list[Any]:
    """The values of some steps. Floats are computed in `acc`."""
    values = list[Any]()
    last = {place: n for n, step in enumerate(steps) for place in step.operands}
    last |= dict.fromkeys(wanted, len(steps))
    for n, step in enumerate(steps):
        values.append(_value(step, [values[place] for place in step.operands], arrays, names, acc))
        for place in step.operands:
            if last[place] == n:
                values[place] = None  # its memory is for the next ones
    return [values[place] for place in wanted]


def _value(
    step: Step,
    operands: list[Any],
    arrays: tuple[Any, ...],
    names: dict[str, Any],
    acc: np.dtype,
) -> Any:
    if step.operation == "name":
        return names[step.value]
    if step.operation == "number":
        if step.kind == "float":
            return to_finite(np.float64(step.value), acc)
        return NUMBERS[step.kind](step.value)
    if step.operation == "float":
        return operands[0].astype(acc)
    if step.operation == "element":
        array = arrays[step.value]
        most = [size - 1 for size in array.shape]
        found = array[tuple(map(np.clip, operands, [0] * len(most), most))]
        return to_finite(found, acc) if step.kind == "float" else found.astype(NUMBERS[step.kind])
    if step.operation == "chained":
        d, x = operands
        return np.where((d == 0) | (x == 0), acc.type(0), d * x)
    return getattr(np, step.operation)(*operands)


def score_of(x: Any, expression: Expression, b: slice | np.ndarray) -> Score:
    """The expression of sequences b of `views.Operands`."""
    acc = blocks.accumulator(x.q.dtype, blocks.FLOAT32)
    return Score(expression, x.score_args, *numbers_of(x, b), acc)


def numbers_of(x: Any, b: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of sequences b, (B, 1, 1, 1, 1), and of heads, (1, G, g, 1, 1)."""
    batch = len(x.q) if x.cu_seqlens_q is None else len(x.cu_seqlens_q) - 1
    sequences = np.arange(batch, dtype=np.int64)[b].reshape(-1, 1, 1, 1, 1)
    return sequences, np.arange(x.q.shape[1], dtype=np.int64).reshape(1, x.k.shape[1], -1, 1, 1)


def to_finite(a: Any, acc: np.dtype) -> Any:
    """An array or a number in `acc`: finite ones stay so, those of float64 in float32, too."""
    if a.dtype.itemsize > acc.itemsize:
        most = np.finfo(acc).max
        a = np.where(np.isfinite(a), np.clip(a, -most, most), a)
    return a.astype(acc)
