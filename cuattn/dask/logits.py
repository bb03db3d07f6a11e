"""Cross entropy, its gradient and entropy of dask arrays."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, SupportsIndex

import numpy as np
from dask.array.utils import meta_from_array

from cuattn._arrays import scalars
from cuattn._arrays.keywords import explained
from cuattn._softmax import request, request_logits
from cuattn.dask import graph, logits_blocks


@explained
def cross_entropy(
    x: Any,
    labels: Any,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    ignore_index: SupportsIndex = -100,
    return_lse: bool = False,
    split_every: int | None = None,
) -> Any:
    """`cuattn.cross_entropy` of a dask array, along an axis that may be chunked.

    Parameters
    ----------
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.
    labels, axis, scale, ignore_index, return_lse
        As `cuattn.cross_entropy`. Arrays are of dask, or of the library of the chunks.
    split_every : int, optional
        As `softmax`.

    Returns
    -------
    loss : dask.array.Array
        Shape and chunks of x without `axis`. x is computed once, chunk by chunk. Where rows lie in
        several chunks, a loss near 0 has the digits of a sum near 1.
    lse : dask.array.Array
        Only with `return_lse`.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.cross_entropy`, before there is a graph; about labels of dask, of chunks of
        NumPy, when they are computed.

    See Also
    --------
    cuattn.cross_entropy : The same of one array.
    cuattn.logits_state : What is computed of each chunk.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.log(numpy.array([[1.0, 3.0, 4.0]])), chunks=1)
    >>> cuattn.dask.cross_entropy(x, numpy.array([2])).compute() / numpy.log(2.0)
    array([1.])
    """
    one, factor = map(graph.stand_in, (graph.checked("x", x), scale))
    ignored = scalars.int64("ignore_index", ignore_index)
    known = _known(labels, ignored)
    call = request_logits.loss(one, known[0], axis, factor, known[1], None, return_lse)
    acc, width = request.expect(call.request).stat_dtype, graph.width(split_every)
    x, axes, rows = _rows(x, axis, call)
    labels, scale = graph.of_rows("labels", labels, x, rows), graph.beside("scale", scale, x)
    others, totals = [scale, labels], tuple(x.shape[a] for a in axes)
    leaf = functools.partial(logits_blocks.losses, axes=axes, ignore_index=ignored)
    if _split(x, axes):
        others += [graph.starts(x, a) for a in axes]
        leaf = functools.partial(logits_blocks.state, axes=axes, totals=totals)
    states = graph.states_of_rows(leaf, graph.merged, x, axes, others, width, "cross_entropy-state")
    final = functools.partial(logits_blocks.loss, length=math.prod(totals), ignore_index=ignored)
    loss = graph.of_states(final, states, rows, rows, acc, "cross_entropy", others=labels)
    if not return_lse:
        return loss
    lse = functools.partial(graph.lse, dtype=acc)
    return loss, graph.of_states(lse, states, rows, rows, acc, "cross_entropy-lse")


@explained
def cross_entropy_backward(
    grad: Any,
    x: Any,
    labels: Any,
    lse: Any,
    /,
    *,
    axis: SupportsIndex | None = -1,
    scale: Any = None,
    ignore_index: SupportsIndex = -100,
) -> Any:
    """`cuattn.cross_entropy_backward` of a dask array, along an axis that may be chunked.

    Parameters
    ----------
    grad, labels, lse, axis, scale, ignore_index
        As `cuattn.cross_entropy_backward`. Arrays are of dask, or of the library of the chunks.
    x : dask.array.Array
        Chunks are arrays of NumPy or CuPy.

    Returns
    -------
    dx : dask.array.Array
        Shape, dtype and chunks of x.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cross_entropy`.

    See Also
    --------
    cuattn.cross_entropy_backward : The same of one array.

    Examples
    --------
    >>> x = dask.array.from_array(numpy.log(numpy.array([[1.0, 3.0]])), chunks=1)
    >>> loss, lse = cuattn.dask.cross_entropy(x, numpy.array([0]), return_lse=True)
    >>> cuattn.dask.cross_entropy_backward(1.0, x, numpy.array([0]), lse).compute()
    array([[-0.75,  0.75]])
    """
    one, gradient, whole, factor = map(graph.stand_in, (graph.checked("x", x), grad, lse, scale))
    ignored = scalars.int64("ignore_index", ignore_index)
    known = _known(labels, ignored)
    options = axis, factor, known[1], None, None
    call, _ = request_logits.loss_gradient(gradient, one, known[0], whole, *options)
    shape = x.shape
    x, axes, rows = _rows(x, axis, call)
    labels, lse = graph.of_rows("labels", labels, x, rows), graph.of_rows("lse", lse, x, rows)
    if getattr(grad, "ndim", 0):
        grad = graph.of_rows("grad", grad, x, rows)
    else:
        grad = graph.beside("grad", grad, x)
    others = [graph.beside("scale", scale, x), labels, lse, grad]
    how: dict[str, Any] = {"axes": axes, "ignore_index": ignored}
    leaf: Callable[..., Any] = logits_blocks.gradient
    if _split(x, axes):
        others += [graph.starts(x, a) for a in axes]
        how |= {"totals": tuple(x.shape[a] for a in axes)}
        leaf = logits_blocks.gradient_of_part
    told = {"dtype": x.dtype, "meta": meta_from_array(x), "token": "cross_entropy_backward"}
    return graph.blocks(functools.partial(leaf, **how), x, others, **told).reshape(shape)


@explained
def entropy(
    x: Any,
    /,
    axis: Any = -1,
    *,
    scale: Any = None,
    where: Any = None,
    keepdims: bool = False,
    split_every: int | None = None,
) -> Any:
    """`cuattn.entropy` of a dask array, along axes that may be chunked.

    Parameters
    ----------
    x, scale, where, split_every
        As `softmax`.
    axis, keepdims
        As `cuattn.entropy`.

    Returns
    -------
    h : dask.array.Array
        x is computed once, chunk by chunk. Where rows lie in several chunks, a result near 0 has
        the digits of a sum near 1.

    Raises
    ------
    TypeError, ValueError, numpy.exceptions.AxisError
        As `cuattn.entropy`, before there is a graph.

    See Also
    --------
    cuattn.entropy : The same of one array.
    cuattn.logits_state : What is computed of each chunk.

    Examples
    --------
    >>> x = dask.array.zeros((1, 4), chunks=(1, 3))
    >>> cuattn.dask.entropy(x).compute() / numpy.log(2.0)
    array([2.])
    """
    one, factor, part = map(graph.stand_in, (graph.checked("x", x), scale, where))
    call = request_logits.entropy(one, axis, factor, part, keepdims, None)
    acc, axes = request.expect(call.request).stat_dtype, call.request.axes
    width, others = graph.width(split_every), [graph.beside("scale", scale, x)]
    others.append(graph.beside("where", where, x))
    rows = [a for a in range(x.ndim) if a not in axes]
    leaf, final = functools.partial(logits_blocks.entropies, axes=axes), logits_blocks.entropy
    if _split(x, axes):
        leaf = functools.partial(logits_blocks.state_of_some, axes=axes, acc=acc)
        final = logits_blocks.entropy_of_some
    states = graph.states_of_rows(leaf, graph.merged, x, axes, others, width, "entropy-state")
    h = graph.of_states(final, states, rows, rows, acc, "entropy")
    return np.expand_dims(h, axes) if keepdims else h


# ---- Arguments ----


def _known(labels: Any, ignore_index: int) -> tuple[Any, int]:
    """Labels whose values are looked at now, or what stands for them, and what to ignore of it."""
    known = isinstance(labels, (np.ndarray, np.generic))
    return (labels, ignore_index) if known else (graph.stand_in(labels), 0)


def _rows(x: Any, axis: Any, call: request.Call) -> tuple[Any, tuple[int, ...], list[int]]:
    """x with at least one axis, those of a row, and the others."""
    x = x if x.ndim else x.reshape(1)
    axes = tuple(range(x.ndim)) if axis is None else call.request.axes
    return x, axes, [a for a in range(x.ndim) if a not in axes]


def _split(x: Any, axes: tuple[int, ...]) -> bool:
    return any(x.numblocks[a] > 1 for a in axes)
