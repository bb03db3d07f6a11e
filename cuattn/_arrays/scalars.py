"""What is raised about options that are not arrays: axes, numbers, flags and words.

Worded as in `checks`.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
from numpy.exceptions import AxisError

from cuattn._arrays import checks
from cuattn._arrays.checks import kind, shown

MAX_INDEX = 2**63 - 1  # of int64


# -- axes ----------------------------------------------------------------------------------------


def axes(axis: Any, ndim: int, name: str = "x") -> tuple[int, ...]:
    """Sorted non-negative axes; None means all."""
    if axis is None:
        return tuple(range(ndim))
    if type(axis) is int and -ndim <= axis < ndim:
        return (axis % ndim,)  # as most are
    numbers = []
    for given in axis if isinstance(axis, tuple) else (axis,):
        try:
            if isinstance(given, (bool, np.bool_)):
                raise TypeError
            number = operator.index(given)
        except TypeError:
            raise TypeError(
                "axis must be an int, a tuple of ints or None, "
                f"but it is {shown(axis)} ({kind(axis)})"
            ) from None
        if not -max(ndim, 1) <= number < max(ndim, 1):
            raise AxisError(
                f"axis must be in [{-ndim}, {ndim}), as {name} has {ndim} dimensions, "
                f"but it is {shown(number)}"
            )
        numbers.append(number % max(ndim, 1))
    if len(set(numbers)) != len(numbers):
        raise ValueError(f"axis must name each dimension once, but it is {shown(axis)}")
    return tuple(sorted(numbers)) if ndim else ()


def one_axis(axis: Any, ndim: int) -> int:
    """One non-negative axis."""
    if isinstance(axis, tuple):
        raise TypeError(f"axis must be an int or None, but it is {shown(axis)}")
    return (*axes(axis, ndim), 0)[0]


# -- numbers -------------------------------------------------------------------------------------


def number(name: str, value: Any, what: str = "a real number") -> float:
    """A real number of Python or NumPy, which may be an array without dimensions, as float."""
    if isinstance(value, (np.generic, np.ndarray)):
        real = value.ndim == 0 and (value.dtype.kind in "iuf" or value.dtype.name == "bfloat16")
    else:  # but no array of another library, which may have to be waited for
        real = hasattr(type(value), "__float__") and not hasattr(value, "ndim")
        real = real and not isinstance(value, bool)
    if not real:
        raise TypeError(f"{name} must be {what}, but it is {kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into float64, but it is {shown(value)}") from None
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be {what}, but it is {kind(value)}") from None


def integer(name: str, value: Any) -> int:
    """An integer of Python or NumPy, which may be an array without dimensions."""
    if isinstance(value, (np.generic, np.ndarray)):
        whole = value.ndim == 0 and value.dtype.kind in "iu"
    else:  # but no array of another library, which may have to be waited for
        whole = hasattr(type(value), "__index__") and not hasattr(value, "ndim")
        whole = whole and not isinstance(value, bool)
    if not whole:
        raise TypeError(f"{name} must be an integer, but it is {kind(value)}")
    return operator.index(value)


def count(name: str, value: Any, most: int = MAX_INDEX, why: str = "") -> int:
    """An integer from 0 to `most`."""
    found = integer(name, value)
    if not 0 <= found <= most:
        raise ValueError(f"{name} must be from 0 to {most}{why}, but it is {shown(found)}")
    return found


def at_least(name: str, value: Any, least: int) -> int:
    """An integer of any size, but not less than `least`."""
    found = integer(name, value)
    if found < least:
        raise ValueError(f"{name} must be at least {least}, but it is {shown(found)}")
    return found


def probability(name: str, value: Any, zero: bool = True) -> float:
    """A real number from 0, which it may be or not, to 1."""
    found = number(name, value)
    if not (0 <= found <= 1 and (zero or found)):
        interval = "from 0 to 1" if zero else "above 0 and at most 1"
        raise ValueError(f"{name} must be {interval}, but it is {found}")
    return found


def int64(name: str, value: Any) -> int:
    """An integer that an int64 can be."""
    found = integer(name, value)
    if not -MAX_INDEX - 1 <= found <= MAX_INDEX:
        raise ValueError(f"{name} must fit into int64, but it is {shown(found)}")
    return found


# -- flags and words -----------------------------------------------------------------------------


def flag(name: str, value: Any) -> bool:
    """A bool of Python or NumPy."""
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be True or False, but it is {shown(value)} ({kind(value)})")
    return bool(value)


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """ValueError unless the option is one of its words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, but it is {shown(value)}")


def float_dtype(dtype: Any) -> np.dtype:
    """`dtype` as one of FLOATS."""
    try:
        given = np.dtype(dtype)
    except Exception:  # TypeError, or what else the text or tuple of a dtype may lead to
        given = None
    if given is None or given.name not in checks.FLOATS or not given.isnative:
        raise TypeError(
            f"dtype must be one of {', '.join(checks.FLOATS)}, but it is {shown(dtype)}"
        )
    return given
