"""Cross entropy, its gradient and entropy of blocks of dask arrays, and of states of their rows."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import cuattn
from cuattn._arrays import checks
from cuattn.dask import graph


class Losses(NamedTuple):
    """What of a `LogitsState` is asked for, of a block of whole rows."""

    cross_entropy: Any
    lse: Any


class Entropies(NamedTuple):
    """The same of entropies."""

    entropy: Any


# ---- Of one block ----


def losses(x: Any, scale: Any, labels: Any, *, axes: Any, ignore_index: int) -> Losses:
    how = {"axis": _axis(x, axes), "scale": scale, "ignore_index": ignore_index}
    return Losses(*cuattn.cross_entropy(x, labels, return_lse=True, **how))


def state(x: Any, scale: Any, labels: Any, *starts: Any, axes: Any, totals: Any) -> Any:
    labels = _in_block(labels, x, axes, starts, totals)
    return cuattn.logits_state(x, labels, axis=_axis(x, axes), scale=scale)


def _axis(x: Any, axes: Any) -> Any:
    return None if len(axes) == x.ndim else axes[0]


def _in_block(labels: Any, x: Any, axes: Any, starts: Any, totals: Any) -> Any:
    """Labels in whole rows as those in a block's, both in C order; -1 where they are elsewhere."""
    sizes = (x.shape[a] for a in axes)
    rest, index, inside, step = labels.astype(np.int64), 0, True, 1
    for size, start, total in reversed([*zip(sizes, starts, (0, *totals[1:]), strict=True)]):
        at = (rest % total if total else rest) - int(start[0])
        rest = rest // (total or 1)
        index, inside, step = index + at * step, inside & (at >= 0) & (at < size), step * size
    return np.where(inside, index, -1)


def gradient(
    x: Any, scale: Any, labels: Any, lse: Any, grad: Any, *, axes: Any, ignore_index: int
) -> Any:
    how = {"axis": _axis(x, axes), "scale": scale, "ignore_index": ignore_index}
    return cuattn.cross_entropy_backward(grad, x, labels, lse, **how)


def gradient_of_part(
    x: Any,
    scale: Any,
    labels: Any,
    lse: Any,
    grad: Any,
    *starts: Any,
    axes: Any,
    ignore_index: int,
    totals: Any,
) -> Any:
    """The same where a label may be in another block."""
    _check(labels, math.prod(totals), ignore_index)
    index = np.where(labels == ignore_index, -2, _in_block(labels, x, axes, starts, totals))
    how = {"axis": _axis(x, axes), "scale": scale, "ignore_index": -2, "index_offset": 0}
    return cuattn.cross_entropy_backward(grad, x, index, lse, **how)


def entropies(x: Any, scale: Any, where: Any, *, axes: Any) -> Entropies:
    return Entropies(cuattn.entropy(x, axes, scale=scale, where=where))


def state_of_some(x: Any, scale: Any, where: Any, *, axes: Any, acc: Any) -> Any:
    """A state whose logit, of no label, is 0 where an element takes part, and NaN elsewhere."""

    def in_rows(a: Any) -> Any:
        rest = [d for d in range(a.ndim) if d not in axes]
        a = a.transpose(*rest, *axes)
        return a.reshape(*a.shape[: len(rest)], math.prod(a.shape[len(rest) :]))

    part = None
    if where is not None:
        part = np.logical_and(np.ones_like(x, bool), where)
        x, scale = graph.scores(x, scale, part, acc)
    if np.ndim(scale):
        row = [1 if d in axes else size for d, size in enumerate(x.shape)]
        scale = in_rows(np.broadcast_to(scale, row))
    x = in_rows(x)
    labels = np.zeros_like(x, np.int64, shape=x.shape[:-1])
    state = cuattn.logits_state(x, labels, scale=scale)
    if part is None:
        return state._replace(logit=np.full_like(state.m, 0 if x.shape[-1] else np.nan))
    some = np.any(in_rows(part), axis=-1)
    return state._replace(logit=np.where(some, 0, np.nan).astype(acc))


# ---- Of states ----


def _check(labels: Any, length: int, ignore_index: int) -> None:
    """ValueError for labels of the host that no row has, as `cuattn.cross_entropy`."""
    if isinstance(labels, (np.ndarray, np.generic)):
        checks.labels("labels", np.asarray(labels), length, ignore_index)


def loss(state: Any, labels: Any, *, ignore_index: int, length: int) -> Any:
    _check(labels, length, ignore_index)
    loss = state.cross_entropy
    return np.where(labels == ignore_index, loss.dtype.type(0), loss)


def entropy(state: Any) -> Any:
    return state.entropy


def entropy_of_some(state: Any) -> Any:
    h = state.entropy
    return np.where(np.isnan(state.logit), h.dtype.type(0), h)
