"""The expression of a call and the arrays that it indexes: whether they fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from cuattn._arrays.checks import FLOATS, INTEGERS, kind, one_dtype, shown
from cuattn._arrays.expression import (
    FUNCTIONS,
    MAX_ARRAYS,
    MAX_DIMENSIONS,
    NAMES,
    Expression,
    Indexed,
    parse,
)
from cuattn._arrays.syntax import SCORE, Role

KNOWN = ("bool", *FLOATS, *(name for name in INTEGERS if name != "uint64"))


def named(text: Any, arrays: Any, role: Role = SCORE) -> dict[str, Any]:
    """Arrays by the names that errors give them, in the order of their own."""
    args = role.args
    if text is not None and not isinstance(text, str):
        raise TypeError(f"{role.name} must be a str, but it is {kind(text)}")
    if arrays is None:
        return {}
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{args} must be a dict of arrays, but it is {kind(arrays)}")
    names = [_array_name(args, name) for name in arrays]
    if names and text is None:
        raise ValueError(f"{args} must come with {role.name}, but {names[0]} came without")
    if len(names) > MAX_ARRAYS:
        raise ValueError(f"{args} must have at most {MAX_ARRAYS} arrays, but it has {len(names)}")
    return {f"{args}[{name!r}]": arrays[name] for name in sorted(names)}


def _array_name(args: str, name: Any) -> str:
    """TypeError or ValueError unless an array of an expression may be called so."""
    if not isinstance(name, str):
        raise TypeError(f"{args} must have names for keys, but one is {kind(name)}")
    if not re.fullmatch("[A-Za-z][A-Za-z0-9_]{0,63}", name) or iskeyword(name):
        raise ValueError(f"{args} must have names for keys, but one is {shown(name)}")
    if name in NAMES or name in FUNCTIONS or name == "inf":
        taken = ", ".join((*NAMES, "inf", *FUNCTIONS))
        raise ValueError(f"{args} must have keys beside {taken}, but one is {shown(name)}")
    return str(name)


def expression(score: str | None, arrays: Mapping[str, Any]) -> Expression | None:
    """The steps of a score expression that indexes these arrays."""
    return None if score is None else steps_of(score, arrays, SCORE)


def steps_of(text: str, arrays: Mapping[str, Any], role: Role) -> Expression:
    """The steps of an expression that indexes these arrays."""
    indexed = []
    for name, array in arrays.items():
        dtype, shape = array.dtype, array.shape
        one_dtype(name, dtype, KNOWN, f"one of {', '.join(KNOWN)}")
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(
                f"{name} must have at most {MAX_DIMENSIONS} dimensions, but its shape is {shape}"
            )
        if 0 in shape:
            raise ValueError(f"{name} must have elements, but its shape is {shape}")
        of = "float" if dtype.name in FLOATS else "bool" if dtype.name == "bool" else "int"
        indexed.append(Indexed(name.split("'")[1], of, len(shape)))
    return parse(str(text), tuple(indexed), role)
