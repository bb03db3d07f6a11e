"""Gradients of the arrays of a score expression: of a tile, by the distance of query and key."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cuattn._arrays.expression import Step
from cuattn._arrays.references import references
from cuattn._attention.numpy_score import Score
from cuattn._attention.numpy_scores import Heads


def looked_up(d: Score | None) -> Iterator[tuple[int, Step]]:
    """References to the arrays that have gradients here, and their places among the steps."""
    if d is None:
        return
    for array, total in enumerate(d.arrays):
        if total is not None:
            for place in references(d.expression, array, ""):
                yield place.step, d.expression.steps[place.step]


def chained(ds: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """Their product: 0 if one of them is, whatever the other one is."""
    return np.where((ds == 0) | (chain == 0), ds.dtype.type(0), ds * chain)


def add_elements(x: Heads, d: Heads, step: Step, j: slice, de: np.ndarray) -> None:
    """Add the gradients (B, G, g, M, N) of the elements that queries and keys j look up.

    Those of one distance share an element.
    """
    rows, keys = de.shape[3:]
    distances = np.arange(x.place - j.stop + 1, x.place + rows - j.start, dtype=np.int64)
    sheared = np.zeros((*de.shape[:3], rows, rows + keys))
    sheared[..., :keys] = de[..., ::-1]
    sheared = sheared.reshape(*de.shape[:3], -1)[..., : rows * (rows + keys - 1)]
    sums = sheared.reshape(*de.shape[:3], rows, -1).sum(axis=3, keepdims=True)
    assert x.score is not None and d.score is not None
    places = x.score.places(step, distances)
    repeated = tuple(axis for axis, size in enumerate(places.shape) if size == 1)
    sums = sums.sum(axis=repeated, keepdims=True)
    np.add.at(d.score.arrays[step.value].reshape(-1), places, sums)
