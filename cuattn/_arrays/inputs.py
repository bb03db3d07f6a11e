"""Arguments as arrays: of NumPy or CuPy, of one library and on one device, never copied."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from cuattn._arrays import checks, scalars
from cuattn._arrays.interchange import adopt, is_cupy, on_host

Owner = tuple[str, Any]  # name and array of the argument whose library and device the others share


def as_array(name: str, value: Any, owner: Owner | None = None) -> Any:
    """`value` as a NumPy or CuPy array, of the library and device of `owner`."""
    plain = type(value) is np.ndarray or is_cupy(value)  # as most are
    if plain and owner is None:
        return value
    host = type(value) is np.ndarray if plain else on_host(value)
    if host is None:
        raise checks.not_an_array(name, value, _libraries(owner))
    if owner is not None and host != isinstance(owner[1], np.ndarray):
        raise checks.no_mix(name, value, *owner)
    array = value if plain else _adopted(name, value)
    if owner is not None and not host and array.data.device_id != owner[1].data.device_id:
        raise checks.other_device(name, array.data.device_id, owner[0], owner[1].data.device_id)
    return array


def _libraries(owner: Owner | None) -> tuple[str, ...]:
    """What makes arrays that go with `owner`."""
    if owner is not None:
        return ("cupy",) if is_cupy(owner[1]) else ("numpy",)
    return ("numpy", "cupy") if "cupy" in sys.modules else ("numpy",)


def _adopted(name: str, value: Any) -> Any:
    if isinstance(value, (np.ma.MaskedArray, np.matrix)):
        raise checks.not_plain(name, value)
    try:
        return adopt(value)
    except (BufferError, TypeError, ValueError) as error:
        raise checks.not_handed_out(name, value, error) from error


def as_arrays(given: dict[str, Any]) -> dict[str, Any]:
    """`given` with arrays of one library and on one device as values; the first is their owner."""
    owner = None
    for name, value in given.items():
        if owner is None and not (type(value) is np.ndarray or is_cupy(value)):
            _check_mix(given, name, value)
        given[name] = array = as_array(name, value, owner)
        owner = owner or (name, array)
    return given


def _check_mix(given: dict[str, Any], name: str, value: Any) -> None:
    """Errors of mixed libraries, before an array is taken in, as that touches its device."""
    host = on_host(value)
    for other, array in given.items():
        if host is not None and on_host(array) is (not host):
            raise checks.no_mix(other, array, name, value)


# ---- Options that are a number or an array ----


def as_number_or_array(name: str, value: Any, owner: Owner) -> Any:
    """A number of Python as float, else an array; one without dimensions may be of the host beside
    those of a device."""
    if type(value) is float:
        return value
    host = on_host(value)
    if host is None and not isinstance(value, (list, tuple)):
        return scalars.number(name, value, "a real number or an array of them")
    if host:
        value = _adopted(name, value)
    array = value if host and value.ndim == 0 else as_array(name, value, owner)
    checks.real(name, array.dtype)
    return array


def as_scale(value: Any, owner: Owner) -> tuple[Any, float]:
    """Factors of scores: (array, 1.0) or (None, number)."""
    return (None, 1.0) if value is None else as_factor("scale", value, owner)


def as_factor(name: str, value: Any, owner: Owner) -> tuple[Any, float]:
    """(array, 1.0) or (None, number)."""
    array = as_number_or_array(name, value, owner)
    if isinstance(array, float):
        return None, array
    if array.ndim == 0 and isinstance(array, np.ndarray):
        return None, float(array)
    return array, 1.0


def as_integers(name: str, value: Any, most: int, owner: Owner) -> tuple[Any, int]:
    """Integers of rows: (array, 0) or (None, number), which is from 0 to `most`."""
    host = on_host(value)
    if host is None and not isinstance(value, (list, tuple)):
        return None, scalars.count(name, value, most)
    if host:
        value = _adopted(name, value)
    array = value if host and value.ndim == 0 else as_array(name, value, owner)
    checks.integers(name, array.dtype)
    if array.ndim == 0 and isinstance(array, np.ndarray):
        return None, scalars.count(name, array, most)
    return array, 0


def as_where(where: Any, owner: Owner) -> Any:
    """The elements that take part, as an array; True, as in NumPy's functions, means all. One
    without dimensions may be of the host beside those of a device, until it is `placed` there."""
    if where is None or where is True:
        return None
    if where is False:
        return np.zeros((), np.bool_)
    if on_host(where):
        where = _adopted("where", where)
        if where.ndim == 0:
            return where
    return as_array("where", where, owner)


def placed(array: Any, runtime: Any, x: Any) -> Any:
    """An array without dimensions as one of the device of x, if it is one of the host."""
    if not isinstance(array, np.ndarray) or runtime.xp is np:
        return array
    with runtime.on(runtime.device(x)):
        return runtime.xp.full((), array[()], array.dtype)
