"""What the functions share: arguments as dask arrays, and reductions whose chunks are states.

A state is what `cuattn.merge` merges, or another tuple of arrays. dask never looks into one.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dask.array as da
import numpy as np
from dask.array.utils import meta_from_array

import cuattn
from cuattn._arrays import checks, scalars
from cuattn._arrays.interchange import is_cupy

# ---- Arguments: the functions of NumPy say whether they fit, of arrays that stand for others ----


def checked(name: str, value: Any) -> Any:
    """TypeError or ValueError unless it is a dask array of known shape."""
    if not isinstance(value, da.Array):
        raise TypeError(
            f"{name} must be a dask.array.Array, but it is {checks.kind(value)}; "
            f"convert it with dask.array.asarray({name}), or call the function of cuattn itself"
        )
    if any(math.isnan(size) for size in value.shape):
        raise ValueError(
            f"{name} must have chunks of known sizes, but its shape is {value.shape}; "
            f"call {name}.compute_chunk_sizes()"
        )
    return value


def stand_in(value: Any) -> Any:
    """A NumPy array of the shape and dtype of an array, without its memory; values of small ones
    of NumPy are looked at."""
    large = type(value) is np.ndarray and value.ndim > 1
    if not (large or isinstance(value, da.Array) or is_cupy(value)):
        return value
    return np.broadcast_to(np.zeros((), value.dtype), value.shape)


def collection(name: str, value: Any, owner: str, x: Any) -> Any:
    """An array as one of dask, of the library of x."""
    array = checked(name, da.asarray(value))
    if array.ndim and type(array._meta) is not type(x._meta):
        raise checks.no_mix(name, array._meta, owner, x._meta)
    return array


def beside(name: str, value: Any, x: Any) -> Any:
    """A number as it is; an array that broadcasts to x in blocks that lie beside those of x."""
    if not getattr(value, "ndim", 0):
        return value.item() if isinstance(value, (np.ndarray, np.generic)) else value
    array = collection(name, value, "x", x)
    chunks = zip(array.shape, x.chunks[x.ndim - array.ndim :], strict=True)
    return array.rechunk(tuple((1,) if size == 1 else blocks for size, blocks in chunks))


def of_rows(name: str, value: Any, x: Any, rows: Sequence[int]) -> tuple[Any, list[int]]:
    """An array that broadcasts to the axes `rows` of x, in blocks of them, and the axes it has."""
    array = collection(name, value, "x", x)
    axes = [*rows][len(rows) - array.ndim :]
    sizes = zip(array.shape, axes, strict=True)
    return array.rechunk(tuple((1,) if size == 1 else x.chunks[a] for size, a in sizes)), axes


def starts(x: Any, axis: int) -> tuple[Any, list[int]]:
    """Where blocks begin on an axis: a block of one number for each."""
    begins = np.cumsum((0, *x.chunks[axis][:-1]))
    return da.from_array(begins, chunks=1), [axis]


def width(split_every: Any) -> int | None:
    """How many states are merged at a time; None: as many as dask is configured to."""
    if split_every is None:
        return None
    if scalars.integer("split_every", split_every) < 2:
        raise ValueError(f"split_every must be at least 2, but it is {split_every}")
    return operator.index(split_every)


# ---- From blocks to states, and from states to results ----


def blocks(function: Callable[..., Any], x: Any, others: Sequence[Any], **how: Any) -> Any:
    """``function(block, *others)`` of each block of x.

    Others are values, arrays that broadcast to x, or pairs of an array and the axes that it has.
    """
    index = tuple(range(x.ndim))
    arguments: list[Any] = []
    for other in others:
        array, axes = other if isinstance(other, tuple) else (other, None)
        if not isinstance(array, da.Array):
            axes = None
        elif axes is None:
            axes = index[x.ndim - array.ndim :]
        arguments += [array, axes]
    return da.blockwise(function, index, x, index, *arguments, align_arrays=False, **how)


def states_of_rows(
    leaf: Callable[..., Any],
    node: Callable[..., Any],
    x: Any,
    axes: tuple[int, ...],
    others: Sequence[Any],
    split_every: int | None,
    name: str,
) -> Any:
    """``leaf(block, *others)`` of each block of x, merged along the axes by ``node(states)``."""
    ones = dict.fromkeys(axes, 1)
    parts = blocks(leaf, x, others, adjust_chunks=ones, dtype=x.dtype, meta=x._meta)
    node = functools.partial(_node, node)
    how: dict[str, Any] = {"axis": axes, "split_every": split_every, "name": name}
    how |= {"concatenate": False, "dtype": x.dtype}
    meta = meta_from_array(x, x.ndim - len(axes))
    return da.reduction(parts, same, node, combine=node, meta=meta, **how)


def same(state: Any, axis: Any, keepdims: Any) -> Any:
    """The chunk function of a reduction of what has been reduced."""
    return state


def _node(node: Callable[..., Any], states: Any, axis: Any, keepdims: Any) -> Any:
    return node(list(_flat(states)))


def _flat(states: Any) -> Iterator[Any]:
    """What nested lists hold, in order."""
    if isinstance(states, list):
        for state in states:
            yield from _flat(state)
    else:
        yield states


def merged(states: list[Any], merge: Callable[[Any, Any], Any] = cuattn.merge) -> Any:
    """The state of rows from those of their parts, by twos: log2(n) roundings instead of n."""
    while len(states) > 1:
        pairs = itertools.zip_longest(states[::2], states[1::2])
        states = [a if b is None else merge(a, b) for a, b in pairs]
    return states[0]


def of_states(
    function: Callable[..., Any],
    states: Any,
    rows: Sequence[Any],
    index: Sequence[Any],
    dtype: Any,
    name: str,
    sizes: dict[Any, int] | None = None,
    others: Sequence[Any] = (),
) -> Any:
    """``function(state, *others)``, an array of the axes `index`; states have `rows`, `sizes` the
    others. `others` are arrays, each with its axes behind it."""
    meta = meta_from_array(states, len(index), dtype)
    how = {"new_axes": sizes or {}, "dtype": dtype, "meta": meta, "token": name}
    return da.blockwise(function, index, states, rows, *others, **how)


def lse(state: Any, *, dtype: Any) -> Any:
    """The log-sum-exp of a block of rows."""
    return state.lse.astype(dtype, copy=False)


def scores(x: Any, scale: Any, where: Any, acc: Any) -> tuple[Any, Any]:
    """x in the dtype that it is added up in, and the scale that is left to apply.

    Elements that do not take part are -inf behind the scale, which may be negative or 0.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        x = x.astype(acc, copy=False)
        if where is None:
            return x, scale
        if scale is not None:
            x = np.multiply(x, scale, dtype=acc)
    if not np.ndim(where):
        where = np.full_like(x, bool(where), dtype=bool)
    return np.where(where, x, -np.inf), None
