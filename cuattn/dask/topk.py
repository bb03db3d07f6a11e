"""Selections from dask arrays."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np

import cuattn
from cuattn._arrays.keywords import explained
from cuattn._arrays.results import SoftmaxTopK, SoftmaxTopKLse, SoftmaxTopKState, TopK
from cuattn._topk import request
from cuattn.dask import graph


@explained
def top_k(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    mode: str = "largest",
    sorted: bool = True,
    split_every: int | None = None,
) -> TopK:
    """`cuattn.top_k` of a dask array, along an axis that may be chunked.

    Parameters
    ----------
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.
    k, axis, mode, sorted
        As `cuattn.top_k`.
    split_every : int, optional
        As `softmax`.

    Returns
    -------
    values, indices : dask.array.Array
        Exactly those of `cuattn.top_k`; `axis` is one chunk. x is computed once for both, if they
        are computed in one call of `dask.compute`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.top_k`, before there is a graph.

    See Also
    --------
    cuattn.top_k : The same of one array.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.array([3, 1, 3, 2]), chunks=2)
    >>> dask.compute(*cuattn.dask.top_k(x, 3))
    (array([3, 3, 2]), array([0, 2, 3]))
    """
    call = request.top_k(graph.stand_in(graph.checked("x", x)), k, axis, mode, sorted, None)
    how: dict[str, Any] = {"k": call.request.k, "mode": mode}
    node = functools.partial(_best, **how)
    result = _selection("top_k", _best_of_block, node, x, axis, call.request, [], split_every, how)
    values, indices = (functools.partial(_field, field=field) for field in TopK._fields)
    return TopK(result(values, x.dtype, "values"), result(indices, np.int64, "indices"))


@explained
def softmax_topk(
    x: Any,
    k: SupportsIndex,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    where: Any = None,
    renormalize: bool = False,
    output: str = "prob",
    return_lse: bool = False,
    split_every: int | None = None,
) -> Any:
    """`cuattn.softmax_topk` of a dask array, along an axis that may be chunked.

    Parameters
    ----------
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.
    k, axis, scale, where, renormalize, output, return_lse
        As `cuattn.softmax_topk`. Arrays are of dask, or of the library of the chunks.
    split_every : int, optional
        As `softmax`.

    Returns
    -------
    values, indices : dask.array.Array
        Indices are exactly those of `cuattn.softmax_topk`; `axis` is one chunk. x is computed once
        for all results, if they are computed in one call of `dask.compute`.
    lse : dask.array.Array
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.softmax_topk`, before there is a graph.

    See Also
    --------
    cuattn.softmax_topk : The same of one array.
    cuattn.softmax_topk_state : What is computed of each chunk.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.log(numpy.array([1.0, 4.0, 5.0])), chunks=1)
    >>> dask.compute(*cuattn.dask.softmax_topk(x, 2))
    (array([0.5, 0.4]), array([2, 1]))
    """
    one, factor, part = map(graph.stand_in, (graph.checked("x", x), scale, where))
    options = renormalize, output, None, return_lse
    call = request.softmax_topk(one, k, axis, factor, part, *options)
    acc, kept = call.expected.acc, call.request.k
    others = [graph.beside("scale", scale, x), graph.beside("where", where, x)]
    how = {"k": kept, "acc": acc}
    result = _selection(
        "softmax_topk",
        _state_of_block,
        graph.merged,
        x,
        axis,
        call.request,
        others,
        split_every,
        how,
    )
    masked = where is not None
    values = functools.partial(
        _values, output=output, renormalize=renormalize, masked=masked, dtype=x.dtype
    )
    indices = functools.partial(_indices, masked=masked)
    found = result(values, x.dtype, "values"), result(indices, np.int64, "indices")
    if not return_lse:
        return SoftmaxTopK(*found)
    return SoftmaxTopKLse(
        *found, result(functools.partial(graph.lse, dtype=acc), acc, "lse", has_k=False)
    )


def _selection(
    name: str,
    leaf: Callable[..., Any],
    node: Callable[..., Any],
    x: Any,
    axis: Any,
    call: request.Request,
    others: list[Any],
    split_every: Any,
    how: dict[str, Any],
) -> Callable[..., Any]:
    """What makes a result of the states of all rows: ``result(function(state), dtype, ...)``."""
    width = graph.width(split_every)
    if axis is None or not x.ndim:
        x, axes, axis = (x if x.ndim else x.reshape(1)), tuple(range(max(x.ndim, 1))), None
    else:
        axes = (axis,) = (call.axis,)
    totals = tuple(x.shape[a] for a in axes)
    starts = [graph.starts(x, a) for a in axes]
    leaf = functools.partial(leaf, axis=axis, totals=totals, **how)
    states = graph.states_of_rows(leaf, node, x, axes, [*others, *starts], width, name)
    rows = [a for a in range(x.ndim) if a not in axes]
    place = 0 if axis is None else axis  # of the axis of length k
    index = sorted([*rows, place])

    def result(function: Callable[..., Any], dtype: Any, what: str, has_k: bool = True) -> Any:
        token = f"{name}-{what}"
        if not has_k:
            return graph.of_states(function, states, rows, rows, dtype, token)
        function = functools.partial(_placed, function=function, place=place)
        return graph.of_states(function, states, rows, index, dtype, token, {place: how["k"]})

    return result


# ---- Of one block ----


def _best_of_block(x: Any, *starts: Any, axis: Any, totals: Any, k: int, mode: Any) -> TopK:
    """Its k best, on the last axis; fewer if it has no more."""
    size = x.size if axis is None else x.shape[axis]
    best = cuattn.top_k(x, min(k, size), axis=axis, mode=mode)
    values, indices = (np.moveaxis(part, axis or 0, -1) for part in best)
    return TopK(values, _in_whole(indices, x, axis, starts, totals))


def _state_of_block(
    x: Any, scale: Any, where: Any, *starts: Any, axis: Any, totals: Any, k: int, acc: Any
) -> SoftmaxTopKState:
    """With `where`, the lowest bit of an index says that the element does not take part: the order
    of indices stays, and a state has no other place for it."""
    x, scale = graph.scores(x, scale, where, acc)
    state = cuattn.softmax_topk_state(x, k, axis=axis, scale=scale)
    indices = _in_whole(state.indices, x, axis, starts, totals)
    if where is not None:
        part = np.logical_and(np.ones_like(x, bool), where)
        part = part.reshape(-1) if axis is None else np.moveaxis(part, axis, -1)
        if part.shape[-1]:
            out = ~np.take_along_axis(part, state.indices, -1)
            indices = np.where(indices < 0, -1, 2 * indices + out)
    return state._replace(indices=indices)


def _in_whole(indices: Any, x: Any, axis: Any, starts: Any, totals: Any) -> Any:
    """Indices in a block as those in the whole array, both in C order; -1 stays."""
    sizes = x.shape if axis is None else (x.shape[axis],)
    rest, whole, step = indices, 0, 1
    for size, start, total in reversed([*zip(sizes, starts, totals, strict=True)]):
        whole = whole + (rest % max(size, 1) + int(start[0])) * step
        rest, step = rest // max(size, 1), step * total
    return np.where(indices < 0, -1, whole)


# ---- Of states ----


def _best(states: list[TopK], *, k: int, mode: Any) -> TopK:
    """The k best of several blocks. Of equal values the first is taken, so the lower index is to
    come first: as blocks come, unless they are rows of blocks of a whole array."""
    values, indices = (np.concatenate(parts, -1) for parts in zip(*states, strict=True))
    if values.ndim == 1:
        order = cuattn.top_k(indices, indices.size, mode="smallest").indices
        values, indices = values[order], indices[order]
    best = cuattn.top_k(values, min(k, values.shape[-1]), mode=mode)
    return TopK(best.values, np.take_along_axis(indices, best.indices, -1))


def _field(state: Any, *, field: str) -> Any:
    return getattr(state, field)


def _placed(state: Any, *, function: Callable[..., Any], place: int) -> Any:
    return np.moveaxis(function(state), -1, place)


def _values(
    state: SoftmaxTopKState, *, output: str, renormalize: bool, masked: bool, dtype: Any
) -> Any:
    """What softmax_topk returns of the k best scores of rows."""
    values = state.values
    if output != "logit":
        function = cuattn.softmax if output == "prob" else cuattn.log_softmax
        part = state.indices % 2 == 0 if masked else None
        values = function(values, where=part, state=None if renormalize else state)
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


def _indices(state: SoftmaxTopKState, *, masked: bool) -> Any:
    return state.indices // 2 if masked else state.indices
