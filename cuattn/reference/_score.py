"""Expressions by Python itself, over grids of indices in float64.

A part of `cuattn.reference`, whose rules hold here. The text is trusted: `attention` checks it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import reduce
from typing import Any

import numpy as np

from cuattn.reference._numerics import wide

Score = Callable[..., Any]  # of s, b, h, q, k


class Clamped:
    """An array whose indices are moved to the nearest ones that there are."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, index: Any) -> Any:
        return self.array[self.clamped(index)]

    def clamped(self, index: Any) -> tuple[Any, ...]:
        index = index if isinstance(index, tuple) else (index,)
        sizes = zip(index, self.array.shape, strict=True)
        return tuple(np.clip(i, 0, size - 1) for i, size in sizes)


class _AsNumPy(ast.NodeTransformer):
    """Numbers as those of NumPy, which wrap and divide by 0; chains of comparisons by ``&``."""

    def visit_Constant(self, node: ast.Constant) -> Any:
        kind = {bool: "bool_", int: "int64"}.get(type(node.value), "float64")
        return ast.Call(ast.Name(kind, ast.Load()), [node], [])

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        lefts = [node.left, *node.comparators]
        pairs = zip(lefts, node.ops, node.comparators, strict=False)
        links = [ast.Compare(left, [op], [right]) for left, op, right in pairs]
        return reduce(lambda one, other: ast.BinOp(one, ast.BitAnd(), other), links)  # type: ignore


FUNCTIONS: dict[str, Any] = {
    "bool_": np.bool_,
    "int64": np.int64,
    "float64": np.float64,
    "inf": np.float64(np.inf),
    "abs": np.abs,
    "min": lambda *numbers: reduce(np.minimum, numbers),
    "max": lambda *numbers: reduce(np.maximum, numbers),
    **{name: getattr(np, name) for name in ("exp", "log", "tanh", "sqrt", "where")},
}


def leading_axes(text: str, batch: Any, heads: Any) -> tuple[Any, ...]:
    """Those of a mask expression, by which of b and h it has."""
    nodes = ast.walk(ast.parse(text.strip(), mode="eval"))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    own = (heads,) if "h" in names else ()
    return (batch, *(own or (1,))) if "b" in names else own


def mask_of(text: str, arrays: Mapping[str, Any] | None, shape: tuple[int, ...]) -> np.ndarray:
    """All elements (..., S_q, S_k) of a mask expression."""
    *lead, rows, columns = shape
    predicate, q, k = score_of(text, arrays), np.arange(rows)[:, None], np.arange(columns)
    mask = np.empty((*(1, 1, *lead)[-2:], rows, columns), bool)
    for b, h in np.ndindex(mask.shape[:2]):
        mask[b, h] = predicate(None, b, h, q + columns - rows, k)
    return mask.reshape(shape)


def score_of(
    text: str, arrays: Mapping[str, Any] | None, more: Mapping[str, Any] | None = None
) -> Score:
    """A function of s, b, h, q and k; `more`: what stands in the place of some arrays."""
    tree = ast.fix_missing_locations(_AsNumPy().visit(ast.parse(text.strip(), mode="eval")))
    code, names = compile(tree, "score", "eval"), dict[str, Any](FUNCTIONS)
    for name, array in (arrays or {}).items():
        array = np.asarray(array)
        if array.dtype.kind != "b":
            array = array.astype(np.int64) if array.dtype.kind in "iu" else wide(array)
        names[name] = Clamped(array) if array.ndim else array[()]
    names |= more or {}

    def score(s: Any, b: int, h: int, q: Any, k: Any) -> Any:
        numbers = {"s": s, "b": np.int64(b), "h": np.int64(h), "q": q, "k": k}
        return eval(code, {"__builtins__": {}}, names | numbers)

    return score
