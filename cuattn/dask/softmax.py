"""Softmax, log-softmax and log-sum-exp of dask arrays."""

from __future__ import annotations

import functools
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array
from dask.graph_manipulation import bind

import cuattn
from cuattn._arrays import scalars
from cuattn._arrays.keywords import explained
from cuattn._softmax import request
from cuattn.dask import graph


@explained
def softmax(
    x: Any,
    /,
    axis: Any = -1,
    *,
    scale: Any = None,
    where: Any = None,
    dtype: Any = None,
    return_lse: bool = False,
    keep: bool = True,
    split_every: int | None = None,
) -> Any:
    """`cuattn.softmax` of a dask array, along axes that may be chunked.

    Parameters
    ----------
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.
    axis, scale, where, dtype, return_lse
        As `cuattn.softmax`. Arrays are of dask, or of the library of the chunks.
    keep : bool, optional
        Where rows lie in several chunks, False computes x a second time once all is known of the
        rows, instead of holding its chunks until then: what to choose for x that is read from
        storage and larger than the memory.
    split_every : int, optional
        How many chunks are merged at a time. Default: as dask is configured, 4.

    Returns
    -------
    y : dask.array.Array
        Shape and chunks of x.
    lse : dask.array.Array
        Shape and chunks of x without `axis`. Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.softmax`, before there is a graph.

    See Also
    --------
    cuattn.softmax : The same of one array.
    cuattn.softmax_state : What is computed of each chunk.

    Notes
    -----
    One task for each chunk that holds whole rows. Otherwise there are two, and a tree over the
    states of the chunks, which are a few bytes for each row; ``scale * x`` must be in the range of
    float32 (float64 for float64) then.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.log(numpy.array([1.0, 2.0, 5.0])), chunks=2)
    >>> cuattn.dask.softmax(x).compute()
    array([0.125, 0.25 , 0.625])
    """
    options = scale, where, dtype, return_lse, keep, split_every
    return _transform(cuattn.softmax, x, axis, *options)


@explained
def log_softmax(
    x: Any,
    /,
    axis: Any = -1,
    *,
    scale: Any = None,
    where: Any = None,
    dtype: Any = None,
    keep: bool = True,
    split_every: int | None = None,
) -> Any:
    """`cuattn.log_softmax` of a dask array, along axes that may be chunked.

    Parameters
    ----------
    x, axis, scale, where, dtype, keep, split_every
        As `softmax`.

    Returns
    -------
    y : dask.array.Array
        Shape and chunks of x. Where rows lie in several chunks, a result near 0 has the digits of
        a sum near 1.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.log_softmax`, before there is a graph.

    See Also
    --------
    cuattn.log_softmax : The same of one array.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.zeros((1, 4)), chunks=(1, 3))
    >>> cuattn.dask.log_softmax(x).compute().round(3)
    array([[-1.386, -1.386, -1.386, -1.386]])
    """
    return _transform(cuattn.log_softmax, x, axis, scale, where, dtype, False, keep, split_every)


def _transform(
    function: Any,
    x: Any,
    axis: Any,
    scale: Any,
    where: Any,
    dtype: Any,
    return_lse: Any,
    keep: Any,
    split_every: Any,
) -> Any:
    one, factor, part = map(graph.stand_in, (graph.checked("x", x), scale, where))
    call = request.transform("prob", one, axis, factor, part, dtype, None, return_lse, None)
    expected, axes = request.expect(call.request), call.request.axes
    keep, width = scalars.flag("keep", keep), graph.width(split_every)
    scale, where = graph.beside("scale", scale, x), graph.beside("where", where, x)
    rows, name = [a for a in range(x.ndim) if a not in axes], function.__name__
    state, split = None, any(x.numblocks[a] > 1 for a in axes)
    if split or return_lse:
        wide = x.dtype.kind in "iu" or x.dtype == np.float64  # whatever the result is rounded to
        leaf = functools.partial(_state, axis=axes, acc=np.float64 if wide else expected.acc)
        options = [scale, where]
        state = graph.states_of_rows(leaf, graph.merged, x, axes, options, width, f"{name}-state")
        if split and not keep:  # under other names, so that it is computed anew
            x, where = bind((x, where), state, seed=state.name)
    whole = functools.partial(_of_whole, function=function, axis=axes, dtype=expected.dtype)
    meta = meta_from_array(x, x.ndim, expected.dtype)
    others = [scale, where, (state, rows)]
    y = graph.blocks(whole, x, others, dtype=expected.dtype, meta=meta, token=name)
    if not return_lse:
        return y
    lse = functools.partial(graph.lse, dtype=expected.acc)
    return y, graph.of_states(lse, state, rows, rows, expected.acc, f"{name}-lse")


def _state(x: Any, scale: Any, where: Any, *, axis: tuple[int, ...], acc: Any) -> Any:
    x, scale = graph.scores(x, scale, where, acc)
    return cuattn.softmax_state(x, axis, scale=scale)


def _of_whole(x: Any, scale: Any, where: Any, state: Any, *, function: Any, **how: Any) -> Any:
    return function(x, scale=scale, where=where, state=state, **how)


@explained
def logsumexp(
    x: Any,
    /,
    axis: Any = None,
    *,
    where: Any = None,
    keepdims: bool = False,
    dtype: Any = None,
    split_every: int | None = None,
) -> Any:
    """`cuattn.logsumexp` of a dask array, along axes that may be chunked.

    Parameters
    ----------
    x, where, dtype, split_every
        As `softmax`.
    axis, keepdims
        As `cuattn.logsumexp`. It has weights, too.

    Returns
    -------
    lse : dask.array.Array
        Natural logarithm, of which a chunk is small: x is computed once, chunk by chunk.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.logsumexp`, before there is a graph.

    See Also
    --------
    cuattn.logsumexp : The same of one array.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.array([[0.0, -40.0], [1.0, 1.0]]), chunks=1)
    >>> cuattn.dask.logsumexp(x, axis=1).compute()
    array([4.24835426e-18, 1.69314718e+00])
    """
    one, part = map(graph.stand_in, (graph.checked("x", x), where))
    call = request.reduction(one, axis, None, part, keepdims, dtype, None)
    expected, axes = request.expect(call.request), call.request.axes
    width, where = graph.width(split_every), graph.beside("where", where, x)
    leaf = functools.partial(_partial, axis=axes, dtype=expected.acc)
    meta = meta_from_array(x, x.ndim, expected.acc)
    ones = dict.fromkeys(axes, 1)
    parts = graph.blocks(leaf, x, [where], adjust_chunks=ones, dtype=expected.acc, meta=meta)
    return da.reduction(
        parts,
        graph.same,
        functools.partial(cuattn.logsumexp, dtype=expected.dtype),
        combine=functools.partial(cuattn.logsumexp, dtype=expected.acc),
        axis=axes,
        keepdims=keepdims,
        name="logsumexp",
        split_every=width,
        dtype=expected.dtype,
        meta=meta_from_array(x, len(expected.stat_shape), expected.dtype),
    )


def _partial(x: Any, where: Any, *, axis: tuple[int, ...], dtype: Any) -> Any:
    return cuattn.logsumexp(x, axis, where=where, keepdims=True, dtype=dtype)
