"""Gradients of the arrays of a score expression on a device: two kernels of each reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cuattn._arrays.expression import Expression
from cuattn._arrays.references import DISTANCE, references
from cuattn._arrays.row_layout import ArraySpec
from cuattn._device.kernel import Kernel
from cuattn._device.launches import Made
from cuattn._device.params import ATTENTION_BACKWARD_SCORE, Params

if TYPE_CHECKING:
    from cuattn._attention.problem import AttentionProblem


Launched = tuple[Kernel, tuple[Params, dict[str, Any]]]  # a kernel, and the end of its parameters


def of_arrays(
    expression: Expression,
    arrays: Mapping[str, ArraySpec],
    differentiated: Mapping[str, str],
    problem: AttentionProblem,
    aligned: bool,
    acc: np.dtype,
    compute_capability: int,
) -> tuple[list[Launched], dict[str, Made]]:
    """Launches in their order, and the memory that they share.

    `arrays`: of the expression, in its order. `differentiated`: the names of the fields of some
    arrays, and of those of their gradients. `aligned`: as `plan_backward_score` has it.
    """
    from cuattn._attention.plan_backward_score import Places, plan_reference
    from cuattn._attention.plan_score import plan_score

    dtypes = tuple(spec.dtype.name for spec in arrays.values())
    launches, sums, totals = list[Launched](), 1, 0
    for array, gradient in differentiated.items():
        spec, place = arrays[array], [*arrays].index(array)
        count = int(np.prod(spec.shape))
        found = references(expression, place, array)
        for i, (step, seen) in enumerate(found):
            score = plan_score(expression, dtypes, True, step)
            last = i == len(found) - 1
            places = Places("b" in seen, "h" in seen, DISTANCE in seen)
            plan = plan_reference(
                replace(problem, score=score),
                places,
                aligned,
                (spec.dtype if last else acc).name,
                count,
                compute_capability,
            )
            names = "slots", "log2", "range", "units", "unit_step", "shared", "shared_step"
            fields: dict[str, Any] = {name: getattr(plan, name) for name in names}
            fields |= {"count": count, "elements": gradient if last else "totals"}
            fields |= {"before": "totals" if i else 0, "by_distance": places.of_distance}
            end = ATTENTION_BACKWARD_SCORE, fields
            launches += (plan.sums, end), (plan.elements, end)
            of_slot = 2 << plan.log2 if places.of_distance else 1
            sums = max(sums, plan.sums.grid * of_slot)
            totals = max(totals, 0 if last else count)
    made = {"sums": Made((sums,), acc), "totals": Made((totals,), acc)}
    return launches, {name: one for name, one in made.items() if one.shape[0]}
