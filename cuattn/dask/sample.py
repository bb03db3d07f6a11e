"""Draws from the softmax of dask arrays."""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple, SupportsIndex

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

import cuattn
from cuattn._arrays.keywords import explained
from cuattn._arrays.results import Sample, SampleState, SoftmaxTopKState
from cuattn._topk import request_sample
from cuattn.dask import graph

MOST = 1 << 62  # an index after all others


@explained
def sample(
    x: Any,
    num: SupportsIndex = 1,
    /,
    *,
    seed: Any,
    offset: Any = 0,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    where: Any = None,
    top_k: SupportsIndex | None = None,
    top_p: Any = None,
    min_p: Any = None,
    return_log_prob: bool = False,
    split_every: int | None = None,
) -> Any:
    """`cuattn.sample` of a dask array, along an axis that may be chunked.

    Parameters
    ----------
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.
    num, seed, offset, axis, scale, where, top_k, top_p, min_p, return_log_prob
        As `cuattn.sample`. Arrays are of dask, or of the library of the chunks. With `axis` None,
        and more than one dimension, x is reshaped to one.
    split_every : int, optional
        As `softmax`.

    Returns
    -------
    indices : dask.array.Array
        Exactly those of `cuattn.sample`, but for an element at the very edge of `top_p` or `min_p`;
        `axis` is one chunk.
    log_prob : dask.array.Array
        Only with `return_log_prob`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.sample`, before there is a graph.

    See Also
    --------
    cuattn.sample : The same of one array.
    cuattn.sample_state : What is computed of each chunk.

    Notes
    -----
    Without filters x is computed once. Each of them is found in a first pass over the chunks: what
    `top_k` and `min_p` leave from states, what `top_p` leaves without a `top_k` from sorted rows,
    for which all chunks of a row are gathered.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.log(numpy.array([0.1, 0.2, 0.3, 0.4])), chunks=2)
    >>> cuattn.dask.sample(x, 3, seed=1).compute()
    array([2, 3, 1])
    """
    one = graph.stand_in(graph.checked("x", x))
    given = [seed, offset, scale, where]
    seeds, offsets, factor, part = map(graph.stand_in, given)
    options = top_k, top_p, min_p, return_log_prob, None
    call = request_sample.sample(one, num, seeds, offsets, axis, factor, part, *options)
    width, asked, acc = graph.width(split_every), call.request, call.expected.acc
    x, place, given = _one_axis(x, axis, given)
    lead = [a for a in range(x.ndim) if a != place]
    cut: Any = None
    if asked.top_k or asked.top_p or asked.min_p:
        cut = _cut_of_rows(x, given, place, call, width)
    seed, offset, scale, where = _beside(x, given)
    starts = [_starts(x, a) for a in (place, *lead)]
    counted = x.shape if asked.counts_rows else None
    leaf = functools.partial(_drawn, axis=place, acc=acc, num=asked.num, counted=counted)
    others = [scale, where, seed, offset, (cut, lead), *starts]
    states = graph.states_of_rows(leaf, graph.merged, x, (place,), others, width, "sample")

    some = where is None and x.shape[place] > 0  # elements, which may all be -inf

    def result(field: str, dtype: Any) -> Any:
        pick = functools.partial(_field, field=field, place=place, some=some)
        return da.blockwise(
            pick,
            sorted([*lead, place]),
            states,
            lead,
            cut,
            None if cut is None else lead,
            new_axes={place: asked.num},
            dtype=dtype,
            meta=meta_from_array(x, x.ndim, dtype),
            token=f"sample-{field}",
        )

    indices = result("indices", np.int64)
    return Sample(indices, result("log_prob", acc)) if return_log_prob else indices


def _one_axis(x: Any, axis: Any, given: list[Any]) -> tuple[Any, int, list[Any]]:
    """x, one axis of it, and the other arrays, of which `where` is the last."""
    if axis is not None and x.ndim:
        return x, operator.index(axis) % x.ndim, given
    *numbers, where = given
    if x.ndim != 1:
        numbers = [one.reshape(1) if getattr(one, "ndim", 0) else one for one in numbers]
        if getattr(where, "ndim", 0):
            where = da.broadcast_to(graph.collection("where", where, "x", x), x.shape).reshape(-1)
    return x.reshape(-1), 0, [*numbers, where]


def _beside(x: Any, given: list[Any]) -> list[Any]:
    """The other arrays in blocks that lie beside those of x."""
    names = ("seed", "offset", "scale", "where")
    return [graph.beside(name, one, x) for name, one in zip(names, given, strict=True)]


def _starts(x: Any, axis: int) -> tuple[Any, list[int]]:
    """Where blocks begin on an axis: a block of one number for each."""
    return da.from_array(np.cumsum((0, *x.chunks[axis][:-1])), chunks=1), [axis]


# ---- What filters leave: scores above a level, and of those at the level the first ones ----


class Cut(NamedTuple):
    """The last element of rows that is kept, and the state of all elements."""

    level: Any
    index: Any
    m: Any
    l: Any  # noqa: E741


def _cut_of_rows(x: Any, given: list[Any], axis: int, call: Any, width: int | None) -> Any:
    """A `Cut` for each block of rows, whatever dask takes it for."""
    asked, acc = call.request, call.expected.acc
    if asked.top_p and not asked.top_k:
        x = x.rechunk({axis: -1})
    *_, scale, where = _beside(x, given)
    count = asked.top_k or (x.shape[axis] if asked.top_p else 0)
    leaf = functools.partial(_best, axis=axis, acc=acc, k=count)
    others = [scale, where, _starts(x, axis)]
    states = graph.states_of_rows(leaf, graph.merged, x, (axis,), others, width, "sample-best")
    lead = [a for a in range(x.ndim) if a != axis]
    filters = {"top_k": asked.top_k is not None, "min_p": call.options.min_p}
    filters["top_p"] = call.options.top_p if asked.top_p else None
    return graph.of_states(
        functools.partial(_cut, **filters), states, lead, lead, acc, "sample-cut"
    )


def _best(x: Any, scale: Any, where: Any, start: Any, *, axis: int, acc: Any, k: int) -> Any:
    s = _scores(x, scale, where, acc)
    return cuattn.softmax_topk_state(s, k, axis=axis, index_offset=int(start[0]))


def _scores(x: Any, scale: Any, where: Any, acc: Any) -> Any:
    """Scores in the dtype that they are compared in; what does not take part is -inf."""
    s, scale = graph.scores(x, scale, where, acc)
    with np.errstate(all="ignore"):
        return s if scale is None else np.multiply(s, scale, dtype=acc)


@np.errstate(all="ignore")
def _cut(state: SoftmaxTopKState, *, top_k: bool, top_p: float | None, min_p: float) -> Cut:
    m, l = state.m[..., None].astype(np.float64), state.l[..., None]  # noqa: E741
    least = m + (math.log(min_p) if min_p else -np.inf)
    t = state.values
    if not t.shape[-1]:
        return Cut(least[..., 0], np.full_like(state.m, MOST, dtype=np.int64), state.m, state.l)
    keep = (t > -np.inf) & (t >= least)
    if top_p is not None:
        e = np.exp(t - m)
        until = np.cumsum(e, -1)
        keep &= until - e < top_p * (until[..., -1:] if top_k else l)
    count = keep.sum(-1, keepdims=True)
    level, index = (np.take_along_axis(a, count - (count > 0), -1) for a in (t, state.indices))
    return Cut(np.where(count > 0, level, np.inf)[..., 0], index[..., 0], state.m, state.l)


# ---- Of one block, and of states ----


def _drawn(
    x: Any,
    scale: Any,
    where: Any,
    seed: Any,
    offset: Any,
    cut: Cut | None,
    start: Any,
    *starts: Any,
    axis: int,
    acc: Any,
    num: int,
    counted: tuple[int, ...] | None,
) -> SampleState:
    """`counted`: the shape of the whole array, if its rows have numbers."""
    s, first, rows = _scores(x, scale, where, acc), int(start[0]), None
    if cut is not None:
        level, last = (np.expand_dims(part, axis) for part in cut[:2])
        index = _along(x, axis, first)
        s = np.where((s > level) | ((s == level) & (index <= last)), s, -np.inf)
    if counted is not None:
        step = 1
        lead = [a for a in range(x.ndim) if a != axis]
        rows = np.zeros_like(s, np.int64, shape=[1] * x.ndim)
        for a, begin in reversed([*zip(lead, starts, strict=True)]):
            rows = rows + step * _along(x, a, int(begin[0]))
            step *= counted[a]
    how = {"seed": seed, "offset": offset, "rows": rows, "index_offset": first}
    return cuattn.sample_state(s, num, axis=axis, **how)


def _along(x: Any, axis: int, start: int) -> Any:
    """Numbers of a block's places along an axis, with the dimensions of x."""
    places = np.arange(start, start + x.shape[axis], like=x)
    return places.reshape([-1 if a == axis else 1 for a in range(x.ndim)])


def _field(state: SampleState, cut: Cut | None, *, field: str, place: int, some: bool) -> Any:
    """Indices or log-probabilities of rows."""
    m, l = (part[..., None] for part in (state[:2] if cut is None else cut[2:]))  # noqa: E741
    with np.errstate(all="ignore"):
        lost = ~(m < np.inf)
        found = np.where(lost, -1, state.indices)
        if field == "log_prob":
            drawn = (state.logits - m) - np.log(l)
            none = lost | ((m == -np.inf) & some)
            found = np.where(none, np.nan, np.where(found < 0, -np.inf, drawn))
    return np.moveaxis(found, -1, place)
