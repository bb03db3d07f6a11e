"""Derivatives of a score expression by `s` or by an element of an array, as more steps of the same
language.

Forward: each step that depends on s has a derivative by the rules of calculus, and no other has
any, so that what it is (infinite, NaN) cannot matter. A product of the chain rule is 0 where a
factor is, so that functions which have come to rest, as 1 / (1 + exp(-s)), have no NaN there.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from cuattn._arrays.expression import Expression, Step


@lru_cache(maxsize=1024)
def differentiate(expression: Expression, by: int | None = None) -> Expression:
    """The steps of an expression, then those of its derivative, which is the last one.

    `by`: the place of a step, which is an element of an array; None: s. At a kink of `abs`, `min`
    and `max` it is that of one side. Where the score is -inf it is 0: what is hidden has no
    gradient.
    """
    rules = _Rules(expression.steps)
    found: list[int | None] = []
    for place, step in enumerate(expression.steps):
        rule = getattr(rules, f"d_{step.operation}", None)
        of_operands = [found[operand] for operand in step.operands]
        if place == by or (by is None and step.operation == "name" and step.value == "s"):
            found.append(rules.one)
        elif rule is None or of_operands.count(None) == len(of_operands):
            found.append(None)
        else:
            found.append(rule(place, *step.operands, *of_operands))
    score = len(expression.steps) - 1
    hidden = rules.step("equal", score, rules.number(-math.inf), kind="bool")
    rules.steps.append(
        Step("float", "where", (hidden, rules.number(0.0), rules.or_zero(found[score])))
    )
    return Expression(expression.text, tuple(rules.steps))


class _Rules:
    """Of each operation `at` of operands a, b with derivatives da, db: None is 0."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = [*steps]
        self.places = {step: place for place, step in enumerate(steps)}
        self.one = self.number(1.0)

    def step(self, operation: str, *operands: int, kind: str = "float", value: Any = None) -> int:
        step = Step(kind, operation, operands, value)
        if step not in self.places:
            self.places[step] = len(self.steps)
            self.steps.append(step)
        return self.places[step]

    def number(self, value: float) -> int:
        return self.step("number", value=value)

    def or_zero(self, d: int | None) -> int:
        return self.number(0.0) if d is None else d

    def times(self, d: int | None, x: int) -> int | None:
        """A product of the chain rule: 0 if d or x is, an operation that texts have not."""
        if d is None:
            return None
        return x if d == self.one else self.step("chained", d, x)

    def negated(self, d: int | None) -> int | None:
        return None if d is None else self.step("negative", d)

    def d_add(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int | None:
        if da is None or db is None:
            return db if da is None else da
        return self.step("add", da, db)

    def d_subtract(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int | None:
        if da is None or db is None:
            return self.negated(db) if da is None else da
        return self.step("subtract", da, db)

    def d_multiply(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int | None:
        return self.d_add(at, a, b, self.times(da, b), self.times(db, a))

    def d_divide(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int:
        top = self.d_subtract(at, a, b, da, self.times(db, at))
        return self.step("divide", self.or_zero(top), b)

    def d_negative(self, at: int, a: int, da: int | None) -> int | None:
        return self.negated(da)

    def d_absolute(self, at: int, a: int, da: int) -> int:
        below = self.step("less", a, self.number(0.0), kind="bool")
        return self.step("where", below, self.step("negative", da), da)

    def d_minimum(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int:
        first = self.step("less_equal", a, b, kind="bool")
        return self.step("where", first, self.or_zero(da), self.or_zero(db))

    def d_maximum(self, at: int, a: int, b: int, da: int | None, db: int | None) -> int:
        first = self.step("greater_equal", a, b, kind="bool")
        return self.step("where", first, self.or_zero(da), self.or_zero(db))

    def d_where(self, at: int, asked: int, a: int, b: int, _: None, *d: int | None) -> int:
        return self.step("where", asked, *map(self.or_zero, d))

    def d_exp(self, at: int, a: int, da: int) -> int | None:
        return self.times(da, at)

    def d_log(self, at: int, a: int, da: int) -> int:
        return self.step("divide", da, a)

    def d_sqrt(self, at: int, a: int, da: int) -> int:
        return self.step("divide", da, self.step("add", at, at))

    def d_tanh(self, at: int, a: int, da: int) -> int | None:
        """1 - tanh^2 without its cancellation: 4 e / (1 + e)^2 of e = exp(-2 |a|)."""
        twice = self.step("multiply", self.number(-2.0), self.step("absolute", a))
        e = self.step("exp", twice)
        root = self.step("add", self.number(1.0), e)
        top = self.step("multiply", self.number(4.0), e)
        square = self.step("multiply", root, root)
        return self.times(da, self.step("divide", top, square))
