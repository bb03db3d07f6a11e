"""Calls in `jax.vmap`: however deep, they stay one call."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from cuattn.jax._calls import Arrays, Call, launch

Batched = dict[str, bool]  # which arrays have one more axis, the first one


def run(call: Call, arrays: Arrays) -> list[Any]:
    """The results of a call."""
    function = custom_vmap(functools.partial(launch, call))

    @function.def_vmap
    def _rule(size: int, is_batched: list[Batched], arrays: Arrays) -> tuple[list[Any], list[bool]]:
        rule = _sequences if "q" in arrays else _rows
        found = rule(call, size, is_batched[0], arrays)
        return found, [True] * len(found)

    return function(arrays)


def _rows(call: Call, size: int, is_batched: Batched, arrays: Arrays) -> list[Any]:
    """More rows: axes of a call count from the end."""
    whole = "x", "grad", "y"
    given = {
        name: array
        if is_batched[name]
        else jnp.broadcast_to(array, (size if name in whole else 1, *array.shape))
        for name, array in arrays.items()
    }
    results = tuple(((size, *shape), dtype) for shape, dtype in call.results)
    return run(call._replace(results=results), given)


def _sequences(call: Call, size: int, is_batched: Batched, arrays: Arrays) -> list[Any]:
    """More sequences: the new axis and that of the batch become one."""
    given = {name: a if is_batched[name] else a[None] for name, a in arrays.items()}
    batch = given["q"].shape[1]
    results, sinks, dtype = call.results, None, call.results[0][1]
    if is_batched.get("sinks"):  # a call has one set of them
        sinks, acc = given.pop("sinks"), results[1][1]
        call, results = call.having(dtype=acc), ((results[0][0], acc), results[1])
    narrow = {"mask", "bias"} - ({"bias"} if dict(call.options).get("return_dbias") else set())
    merged = {}
    for name, array in given.items():
        if name == "sinks" or (name in narrow and array.shape[:2] == (1, 1)):
            merged[name] = array[0]
            continue
        if name == "alibi_slopes" and array.ndim == 2:
            array = array[:, None]
        array = jnp.broadcast_to(array, (size, batch, *array.shape[2:]))
        merged[name] = array.reshape(size * batch, *array.shape[2:])
    large = tuple(
        ((size * batch, *(shape if len(shape) == 1 else shape[1:])), dtype)
        for shape, dtype in results
    )
    found = []
    for array, (shape, _) in zip(run(call._replace(results=large), merged), results, strict=True):
        array = array.reshape(size, batch, *array.shape[1:])
        if array.shape != (size, *shape):  # of what all sequences of a batch share
            array = array.sum(1).reshape(size, *shape)
        found.append(array)
    if sinks is None:
        return found
    (y, lse), layout = found, dict(call.options)["layout"]
    y, lse = _with_sinks(y, lse, sinks, given.get("q_lens"), layout)
    return [y.astype(dtype), lse]


def _with_sinks(y: Any, lse: Any, sinks: Any, q_lens: Any, layout: str) -> tuple[Any, Any]:
    """Results of a call without sinks, (size, batch, ...), as with sinks, (size, heads)."""
    total = jnp.logaddexp(lse, sinks[:, None, :, None].astype(lse.dtype))
    if q_lens is not None:  # padding has none
        padding = jnp.arange(lse.shape[-1]) >= q_lens[..., None, None]
        total = jnp.where(padding, -jnp.inf, total)
    weight = jnp.where(lse == -jnp.inf, 0, jnp.exp(lse - total))
    return y * (weight if layout == "BHSD" else weight.swapaxes(2, 3))[..., None], total
