"""The arrays of a score expression among the parameters of a kernel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from cuattn._arrays.expression import MAX_ARRAYS, MAX_DIMENSIONS, Expression
from cuattn._arrays.row_layout import ArraySpec
from cuattn._attention.views import strides_of
from cuattn._device.params import SCORE_ARRAYS, Params

if TYPE_CHECKING:
    from cuattn._attention.problem import Score


def score_of(expression: Expression | None, arrays: Mapping[str, ArraySpec]) -> Score | None:
    """An expression of these arrays as C++."""
    from cuattn._attention.plan_score import plan_score

    if expression is None:
        return None
    return plan_score(expression, tuple(spec.dtype.name for spec in arrays.values()))


def score_arrays_of(arrays: Mapping[str, ArraySpec]) -> tuple[Params, dict[str, Any]]:
    """ScoreArrays of a call: what a score expression indexes, by the names of a launch's fields."""
    lack = MAX_ARRAYS - len(arrays)
    size, stride = [], []
    for spec in arrays.values():
        ones = (1,) * (MAX_DIMENSIONS - len(spec.shape))
        size += [*spec.shape, *ones]
        stride += [*strides_of(spec, 0), *ones]
    rest = (0,) * (MAX_DIMENSIONS * lack)
    fields = {"array": (*arrays, *(0,) * lack), "size": (*size, *rest), "stride": (*stride, *rest)}
    return SCORE_ARRAYS, fields
