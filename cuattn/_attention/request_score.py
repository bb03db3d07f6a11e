"""The score expression of a call and the arrays that it indexes: whether they fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cuattn._arrays.checks import FLOATS, INTEGERS, kind, one_dtype
from cuattn._arrays.expression import (
    MAX_ARRAYS,
    MAX_DIMENSIONS,
    Expression,
    Indexed,
    array_name,
    parse,
)

KNOWN = ("bool", *FLOATS, *(name for name in INTEGERS if name != "uint64"))


def named(score: Any, score_args: Any) -> dict[str, Any]:
    """Arrays by the names that errors give them, in the order of their own."""
    if score is not None and not isinstance(score, str):
        raise TypeError(f"score must be a str, but it is {kind(score)}")
    if score_args is None:
        return {}
    if not isinstance(score_args, Mapping):
        raise TypeError(f"score_args must be a dict of arrays, but it is {kind(score_args)}")
    names = [array_name(name) for name in score_args]
    if names and score is None:
        raise ValueError(f"score_args must come with score, but {names[0]} came without")
    if len(names) > MAX_ARRAYS:
        raise ValueError(
            f"score_args must have at most {MAX_ARRAYS} arrays, but it has {len(names)}"
        )
    return {f"score_args[{name!r}]": score_args[name] for name in sorted(names)}


def expression(score: str | None, arrays: Mapping[str, Any]) -> Expression | None:
    """The steps of an expression that indexes these arrays."""
    if score is None:
        return None
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
    return parse(str(score), tuple(indexed))
