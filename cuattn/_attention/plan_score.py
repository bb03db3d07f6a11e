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
  }}
}};
"""


@lru_cache(maxsize=1024)
def plan_score(expression: Expression, dtypes: tuple[str, ...], chain: bool = False) -> Score:
    """The struct of an expression whose arrays have these dtypes.

    `chain`: that of kernels of gradients, with the derivative of the score by s.
    """
    lines, steps = [], differentiate(expression).steps if chain else expression.steps
    for place, step in enumerate(steps):
        value = _value(step, dtypes)
        lines.append(f"    const {TYPES[step.kind]} v{place} = {value};")
    if chain:
        lines.append(f"    chain = v{len(steps) - 1};")
    lines.append(f"    return v{len(expression.steps) - 1};")
    body = "\n".join(lines)
    name = f"Score_{hashlib.sha256(body.encode()).hexdigest()[:16]}"
    text = TEXT.format(name=name, body=body, chain=", Acc& chain" if chain else "")
    return Score(name, text, expression.text)


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
