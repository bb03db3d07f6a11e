"""Warm calls: all that checks and plans would find out again is looked up by the call's signature.

A signature is which arguments there are, of an array its shape, strides, dtype, device and address
modulo 16, of an option its type and value. Calls of one signature differ in nothing but addresses
and the contents of arrays. So one that was fine is fine again, unless what it writes overlaps an
input, and what it launched is what to launch. Each runtime has signatures of its own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from cuattn._arrays.keywords import explained
from cuattn._arrays.outputs import span
from cuattn._device import runtime as device_runtime
from cuattn._device.host import Computed
from cuattn._device.launches import Launches, Prepared

P = ParamSpec("P")
R = TypeVar("R")

# Equal values of one of these types are the same option. That holds of floats except for 0, which
# has two signs, and NaN. A subclass may think otherwise.
OPTIONS = {bool, int, str, type, type(None), np.bool_, np.int32, np.int64}
FLOATS = {float, np.float16, np.float32, np.float64}
NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
NUMBERS = "numbers"  # what no argument is called
FIELD = 1 << 63  # integers from 0 on, and below it, fit into one


class Overlap(NamedTuple):
    """Between which distances of their addresses a result overlaps another array."""

    result: int
    other: int
    low: int
    high: int
    same: bool  # whether it may at distance 0, where they are one view


class Warm(NamedTuple):
    """A call without its arrays."""

    launches: Launches | Computed
    names: list[str]  # of arguments, in the order of `launches.given`
    numbers: tuple[Any, ...]
    kind: Callable[..., Any]
    overlaps: list[Overlap]


def remembered(*numbers_of: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: the function, with its arguments `explained`, is for calls of new signatures.

    It returns what is `Prepared`, or the results of what is not to be remembered. `numbers_of`:
    options that, where they are floats or natural numbers, are but the first of its numbers, and so
    no part of the signature.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        cold, name = explained(function), function.__name__
        places = function.__code__.co_varnames[: function.__code__.co_argcount]

        @functools.wraps(function)
        def call(*args: P.args, **options: P.kwargs) -> Any:
            runtime, key = device_runtime.current(args), None
            if runtime is not None:
                values: dict[str, Any] = {}
                key = _signature(runtime, name, places, args, options, numbers_of, values)
                warm = runtime.recent.get(key)
                if warm is not None:
                    launches, names, numbers, kind, overlaps = warm
                    given = [*map(values.__getitem__, names)]
                    if NUMBERS in values:
                        changed = values[NUMBERS]
                        numbers = tuple([changed.get(i, n) for i, n in enumerate(numbers)])
                    if not overlaps or not _overlap(runtime, given, overlaps):
                        if not launches.allocates or options.get("out") is None:
                            return kind(*launches.run(runtime, given, numbers))
                        with device_runtime.keeping(runtime):
                            return kind(*launches.run(runtime, given, numbers))
            # With `out` nothing that is allocated outlives the call, unless a graph uses it.
            given_out = options.get("out") is not None
            with device_runtime.keeping(runtime) if given_out else NOTHING:
                made: Any = cold(*args, **options)
                if type(made) is not Prepared:
                    return made
                if key is not None:
                    _remember(key, made, values)
                return made.launch()

        return call

    return decorated


def _remember(key: tuple[Any, ...], made: Prepared, values: dict[str, Any]) -> None:
    """Keep the launches under the key of their call, if its arguments are all that they read."""
    launches = made.launches
    names = [made.names.get(field, "") for field in launches.given]
    given = [values.get(name) for name in names]
    read = values.keys() - {NUMBERS, *names, *made.unread}  # on the host, as a number
    if not read and all(
        array is made.arrays[field] for array, field in zip(given, launches.given, strict=True)
    ):
        overlaps = _overlaps(given, launches)
        made.runtime.recent.put(key, Warm(launches, names, made.numbers, made.kind, overlaps))


def _signature(
    runtime: Any,
    function: str,
    places: tuple[str, ...],
    args: tuple[Any, ...],
    options: dict[str, Any],
    numbers_of: tuple[str, ...],
    values: dict[str, Any],
) -> tuple[Any, ...] | None:
    """The key of a call. Put into `values` are its arrays, by the names that errors give them, and
    those of `numbers_of` by their places as NUMBERS, if they are such.

    None for what a key does not hold: arrays of other libraries, which may wait for a stream;
    arrays of the host beside those of a device, which are values; numbers that are arrays or of
    classes of their own.
    """
    key: list[Any] = [function, len(args)]
    ndarray = runtime.xp.ndarray
    arguments = [*zip(places, args)]  # noqa: B905 - "strict" takes its time
    if options:
        arguments += options.items()
    for name, value in arguments:
        kind = type(value)
        if kind is ndarray:
            values[name] = value
            key += name, runtime.signature(value)
        elif name in numbers_of and (kind in FLOATS or (kind is int and 0 <= value < FIELD)):
            values.setdefault(NUMBERS, {})[numbers_of.index(name)] = value
            key += name, kind
        elif (
            kind in OPTIONS
            or (kind in FLOATS and (value > 0 or value < 0))
            or isinstance(value, np.dtype)
        ):
            key += name, kind, value
        elif isinstance(value, tuple):
            key += name, kind, len(value)
            arguments += [(f"{name}[{i}]", one) for i, one in enumerate(value)]
        elif kind is dict and all(type(i) is str for i in value):
            key += name, kind, len(value)
            arguments += [(f"{name}[{i!r}]", one) for i, one in value.items()]
        else:
            return None
    return tuple(key)


def _overlaps(given: list[Any], launches: Launches | Computed) -> list[Overlap]:
    """Of every array that is written and what stands before it, but for those that are read, too,
    among themselves: halves of a pool interleave.
    """
    spans = [span(array.shape, array.strides, array.itemsize) for array in given]
    views = [(array.shape, array.strides, array.dtype) for array in given]
    return [
        Overlap(
            i,
            j,
            spans[j][0] - spans[i][1],
            spans[j][1] - spans[i][0],
            launches.in_place and j < launches.reads and views[i] == views[j],
        )
        for i in range(launches.written, len(given))
        for j in range(i if i >= launches.reads else launches.written)
        if given[i].size and given[j].size
    ]


def _overlap(runtime: Any, given: list[Any], overlaps: list[Overlap]) -> bool:
    at = [*map(runtime.address, given)]
    for result, other, low, high, same in overlaps:
        distance = at[result] - at[other]
        if low < distance < high and (distance or not same):
            return True
    return False
