"""Where a score expression looks into an array, and what the place there depends on.

Gradients of an array are added up by sequence, head and distance of query and key; so its indices
may depend on nothing else. That is decided on the steps: each integer is F(b, h, q - k) + slope k.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cuattn._arrays.expression import Expression, Step

DISTANCE = "q - k"
WRAP = 2**64  # integers have 64 bits


class Reference(NamedTuple):
    """A step that is an element of an array."""

    step: int  # its place among the steps
    seen: frozenset[str]  # of "b", "h" and DISTANCE: what its indices may depend on


class _Dependence(NamedTuple):
    slope: int  # by k, at a distance of query and key; modulo WRAP
    names: frozenset[str]  # of "b", "h", DISTANCE, and "s" and "k" by themselves


_NAMES = {
    "s": _Dependence(0, frozenset("s")),
    "b": _Dependence(0, frozenset("b")),
    "h": _Dependence(0, frozenset("h")),
    "q": _Dependence(1, frozenset((DISTANCE,))),  # q = (q - k) + k
    "k": _Dependence(1, frozenset()),
}


@lru_cache(maxsize=1024)
def references(expression: Expression, array: int, name: str) -> tuple[Reference, ...]:
    """Those of an array, in the order of the steps; ValueError if its gradient is not to be had."""
    found: list[_Dependence] = []
    for step in expression.steps:
        found.append(_dependence(step, expression.steps, found))
    own = []
    for place, step in enumerate(expression.steps):
        if step.operation != "element" or step.value != array:
            continue
        for i, operand in enumerate(step.operands):
            slope, names = found[operand]
            what = (
                "s" if "s" in names else "k where q - k does not" if slope or "k" in names else ""
            )
            if what:
                raise ValueError(
                    "return_dscore must name arrays whose indices are made of numbers, b, h and "
                    f"q - k, but index {i} of {name} changes with {what}"
                )
        own.append(Reference(place, found[place].names))
    return tuple(own)


def _dependence(step: Step, steps: tuple[Step, ...], found: list[_Dependence]) -> _Dependence:
    if step.operation == "name":
        return _NAMES[step.value]
    operands = [found[place] for place in step.operands]
    names = frozenset().union(*(one.names for one in operands))
    slopes = [one.slope for one in operands]
    slope = None
    if not any(slopes):
        slope = 0
    elif step.kind == "int" and step.operation in ("add", "subtract", "negative"):
        first, *rest = slopes
        slope = -first if not rest else first + (rest[0] if step.operation == "add" else -rest[0])
    elif step.kind == "int" and step.operation == "multiply":
        for number, other in (step.operands, step.operands[::-1]):
            value = _number(steps, number)
            slope = value * found[other].slope if value is not None else slope
    if slope is None:
        return _Dependence(0, names | {"k"})
    return _Dependence(slope % WRAP, names)


def _number(steps: tuple[Step, ...], place: int) -> int | None:
    """The value of a number of a text, which may have a sign."""
    step = steps[place]
    if step.operation == "negative":
        value = _number(steps, step.operands[0])
        return None if value is None else -value
    return int(step.value) if step.operation == "number" else None
