"""C++ of score expressions, of their steps and nothing else."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache

from cuattn._arrays.derivative import differentiate
from cuattn._arrays.expression import Expression, Step
from cuattn._attention.problem import Score
from cuattn._device.kernel import CTYPES

TYPES = {"int": "long long", "float": "Acc", "bool": "bool"}
TEXT = """#include <attention/expression.cuh>
struct {name} {{
  template <class Acc>
  static __device__ __forceinline__ Acc score(Acc s, long long b, long long h, long long q,
                                              long long k, const ScoreArrays& arrays{chain}) {{
{body}
  }}{place}
}};
"""
PLACE = """

  // Where its array is looked into.
  template <class Acc>
  static __device__ __forceinline__ long long place(long long b, long long h, long long q,
                                                    long long k, const ScoreArrays& arrays) {{
{body}
  }}"""


@lru_cache(maxsize=1024)
def plan_score(
    expression: Expression, dtypes: tuple[str, ...], chain: bool = False, by: int | None = None
) -> Score:
    """The struct of an expression whose arrays have these dtypes.

    `chain`: that of kernels of gradients, with the derivative of the score by s; `by`: by the
    element that this step is, of which it knows the place, too.
    """
    steps = differentiate(expression, by).steps if chain else expression.steps
    lines = lines_of(steps, dtypes)
    if chain:
        lines.append(f"    chain = v{len(steps) - 1};")
    lines.append(f"    return v{len(expression.steps) - 1};")
    body = "\n".join(lines)
    place = "" if by is None else PLACE.format(body=_place(expression, dtypes, by))
    name = f"Score_{hashlib.sha256((body + place).encode()).hexdigest()[:16]}"
    chained = ", Acc& chain" if chain else ""
    text = TEXT.format(name=name, body=body, chain=chained, place=place)
    return Score(name, text, expression.text)


def _place(expression: Expression, dtypes: tuple[str, ...], element: int) -> str:
    """Statements for the place of an element, of the steps that its indices are made of."""
    steps, needed = expression.steps, set[int]()
    ahead = [*steps[element].operands]
    while ahead:
        place = ahead.pop()
        if place not in needed:
            needed.add(place)
            ahead += steps[place].operands
    every = lines_of(steps, dtypes)
    lines = [every[place] for place in sorted(needed)]
    arguments = ", ".join(("arrays", *(f"v{place}" for place in steps[element].operands)))
    lines.append(f"    return expression::place<{steps[element].value}>({arguments});")
    return "\n".join(lines)


def lines_of(steps: tuple[Step, ...], dtypes: tuple[str, ...]) -> list[str]:
    """Of each step a variable."""
    return [
        f"    const {TYPES[step.kind]} v{place} = {_value(step, dtypes)};"
        for place, step in enumerate(steps)
    ]


def _value(step: Step, dtypes: tuple[str, ...]) -> str:
    """A step, of variables for its operands."""
    operands = [f"v{place}" for place in step.operands]
    if step.operation == "name":
        return str(step.value)
    if step.operation == "number":
        return _number(step)
    if step.operation == "float":
        return f"static_cast<Acc>({operands[0]})"
    if step.operation == "element":
        dtype = "bool" if step.kind == "bool" else CTYPES[dtypes[step.value]]
        call = f"expression::element<{dtype}, {step.value}>({', '.join(('arrays', *operands))})"
        return f"to_finite<Acc>({call})" if step.kind == "float" else call
    return f"expression::{step.operation}({', '.join(operands)})"


def _number(step: Step) -> str:
    if step.kind != "float":
        return str(step.value).lower() if step.kind == "bool" else f"{step.value}LL"
    if math.isinf(step.value):
        return "Limits<Acc>::infinity()"
    return f"to_finite<Acc>({float.hex(step.value)})"
