"""Numbers with their derivatives, which NumPy's functions hand on.

A part of `cuattn.reference`, whose rules hold here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin


class Dual(NDArrayOperatorsMixin):
    """An array and its derivative by a number; d None: it does not depend on that."""

    def __init__(self, value: Any, d: Any) -> None:
        self.value, self.d = value, d

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any) -> Any:
        duals = [as_dual(one) for one in inputs]
        values, d = [one.value for one in duals], [one.d for one in duals]
        y = ufunc(*values)
        return Dual(y, RULES[ufunc](y, *values, *d)) if ufunc in RULES else y

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is not np.where:
            return NotImplemented
        condition, *sides = args
        one, other = map(as_dual, sides)
        return Dual(
            np.where(condition, one.value, other.value),
            np.where(condition, *(_some(side.d) for side in (one, other))),
        )


def as_dual(x: Any) -> Dual:
    return x if isinstance(x, Dual) else Dual(x, None)


def _sum(da: Any, db: Any) -> Any:
    return db if da is None else da if db is None else da + db


def _some(d: Any) -> Any:
    return 0 if d is None else d


def _times(d: Any, x: Any) -> Any:
    """0 if one of them is, whatever the other one is."""
    return None if d is None else np.where((d == 0) | (x == 0), 0, d * x)


# Of y = f(a) or f(a, b), by the derivatives of a and b.
RULES: dict[Any, Any] = {
    np.negative: lambda y, a, da: -da,
    np.absolute: lambda y, a, da: np.where(a < 0, -da, da),
    np.exp: lambda y, a, da: _times(da, y),
    np.log: lambda y, a, da: da / a,
    np.sqrt: lambda y, a, da: da / (2 * y),
    np.tanh: lambda y, a, da: _times(da, 1 / np.cosh(a) ** 2),
    np.add: lambda y, a, b, da, db: _sum(da, db),
    np.subtract: lambda y, a, b, da, db: _sum(da, _times(db, -1)),
    np.multiply: lambda y, a, b, da, db: _sum(_times(da, b), _times(db, a)),
    np.divide: lambda y, a, b, da, db: _sum(da, _times(db, -y)) / b,
    np.minimum: lambda y, a, b, da, db: np.where(a <= b, _some(da), _some(db)),
    np.maximum: lambda y, a, b, da, db: np.where(a >= b, _some(da), _some(db)),
}
