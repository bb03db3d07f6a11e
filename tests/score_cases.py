"""Score expressions for tests: some of every use, and random ones."""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple

import numpy as np
from conftest import SEED
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tolerance import dtype_of

from cuattn._arrays.expression import Expression, Indexed, parse

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64")
FLOATS = ("float16", "bfloat16", "float32", "float64")


def indexed(name, array):
    """What an expression knows of an array."""
    kind = {"b": "bool", "i": "int", "u": "int"}.get(array.dtype.kind, "float")
    return Indexed(name, kind, array.ndim)


class Case(NamedTuple):
    """A text, its arrays by name, and its steps."""

    text: str
    arrays: dict[str, Any]

    @property
    def expression(self) -> Expression:
        return parse(self.text, tuple(indexed(*item) for item in sorted(self.arrays.items())))


def beside_garbage(rng, array):
    """The same values with odd strides, amid others that would show."""
    shape = tuple(2 * size + 1 for size in array.shape)
    if array.dtype.kind in "iub":
        memory = rng.integers(0, 2, shape).astype(array.dtype)
    else:
        memory = np.full(shape, np.nan).astype(array.dtype)
    odd, backwards = (slice(1, None, 2),) * array.ndim, (slice(None, None, -1),) * array.ndim
    view = memory[(*odd, ...)][(*backwards, ...)]
    view[...] = array
    return view


def uses(rng, batch, heads, columns):
    """Expressions of every use that we know, for so many sequences, heads of q and keys."""
    table = rng.standard_normal((heads, 33)).astype(np.float32)
    documents = np.sort(rng.integers(0, 4, (batch, columns)), axis=1).astype(np.int32)
    coarse = rng.standard_normal((5, columns // 8 + 1)).astype(dtype_of("bfloat16"))
    tree = np.tril(rng.random((20, 20)) < 0.6) | np.eye(20, dtype=bool)
    yield Case("s + table[h, q - k]", {"table": beside_garbage(rng, table)})
    yield Case("30.0 * tanh(s / 30.0) - 0.05 * abs(q - k)", {})
    yield Case("where((k <= q) | (k < 16), s, -inf)", {})
    yield Case("where(doc[b, q] == doc[b, k], s, -inf)", {"doc": documents})
    yield Case(
        "where((0 <= q - k < reach[h]) | tree[q, k], s * exp(t[b]) + coarse[q % 5, k // 8], -inf)"
        " - min(far[k], 2.0, q / 9) * one",
        {
            "reach": np.broadcast_to(np.int16(7), heads),
            "tree": beside_garbage(rng, tree),
            "t": rng.uniform(-1, 0, batch).astype(np.float16)[::-1],
            "coarse": beside_garbage(rng, coarse),
            "far": rng.standard_normal(columns),
            "one": np.array(1, np.uint8),
        },
    )


# ---- Random ones ----

SIZES = {"f": (7,), "g": (3, 5), "i": (6,), "j": (2, 3, 2, 4), "m": (4, 4), "n": ()}


def some_arrays(rng):
    """Arrays of all kinds, by names of one letter, with odd strides and garbage beside them."""
    arrays = {}
    for name, shape in SIZES.items():
        if name == "m":
            array = rng.random(shape) < 0.5
        elif name in "ij":
            array = rng.integers(0, 100, shape).astype(rng.choice(INTEGERS))
        else:
            array = rng.standard_normal(shape).astype(dtype_of(rng.choice(FLOATS)))
        arrays[name] = beside_garbage(rng, array)
    return arrays


class Grammar:
    """Texts of each kind; `choose` takes one of its arguments, of which the first is the simplest.

    Of operations that round alike wherever they run: no exp, log and tanh. A denominator is no
    zero with a sign, as which one it has minimum and maximum do not say.
    """

    def __init__(self, choose):
        self.choose = choose

    def element(self, name, depth):
        at = ", ".join(self.int(depth - 1) for _ in SIZES[name])
        return f"{name}[{at}]" if at else name

    def int(self, depth):
        if depth <= 0:
            return self.choose("b", "h", "q", "k", "q", "k", "0", "3", "17", str(2**61 + 1))
        one, other = self.int(depth - 1), self.int(depth - 2)
        word = self.choose(
            "+", "-", "*", "//", "%", "&", "|", "-1", "~", "abs", "max", "where", "[]"
        )
        if word == "-1":
            return f"-({one})"
        if word == "~":
            return f"~({one})"
        if word == "abs":
            return f"abs({one})"
        if word == "max":
            return f"{self.choose('min', 'max')}({one}, {other}, {self.int(0)})"
        if word == "where":
            return f"where({self.bool(depth - 1)}, {one}, {other})"
        if word == "[]":
            return self.element(self.choose("i", "j"), depth - 1)
        return f"({one} {word} {other})"

    def float(self, depth):
        if depth <= 0:
            return self.choose("s", "s", "s", "2.5", "inf", "1e300", "f[k]", "n", "g[q, k - q]")
        one, other = self.number(depth - 1), self.float(depth - 1)
        word = self.choose("+", "-", "*", "/", "-1", "abs", "max", "sqrt", "where", "[]")
        if word == "/":
            return f"({one} / {self.choose('s', '0.7', 'f[q]', f'({self.int(depth - 1)})')})"
        if word == "-1":
            return f"-{other}"
        if word in ("abs", "sqrt"):
            return f"{word}({other})"
        if word == "max":
            return f"{self.choose('min', 'max')}({one}, {other})"
        if word == "where":
            return f"where({self.bool(depth - 1)}, {one}, {other})"
        if word == "[]":
            return self.element(self.choose("f", "g"), depth - 1)
        return f"({one} {word} {other})"

    def number(self, depth):
        return getattr(self, self.choose("int", "float"))(depth)

    def bool(self, depth):
        if depth <= 0:
            return self.choose("(k <= q)", "(s > 0)", "True", "m[q, k]", "(i[k] == i[q])")
        word = self.choose("<", "<", "&", "|", "~", "==", "where", "[]")
        if word == "<":
            signs = "<", "<=", ">", ">=", "==", "!="
            ends = [self.number(depth - 1) for _ in range(self.choose(2, 2, 3))]
            chain = "".join(f" {self.choose(*signs)} {end}" for end in ends[1:])
            return f"({ends[0]}{chain})"
        if word == "[]":
            return self.element("m", depth - 1)
        one, other = self.bool(depth - 1), self.bool(depth - 1)
        if word == "~":
            return f"~{one}"
        if word == "where":
            return f"where({one}, {other}, {self.bool(0)})"
        return f"({one} {word} {other})"

    def score(self, depth):
        return f"({self.float(depth)} + 0 * s)" if self.choose(True, False) else self.number(depth)


class Smooth(Grammar):
    """With the functions that have a curvature."""

    def float(self, depth):
        plain = super().float(depth)
        word = self.choose("", "", "exp", "log", "tanh", "sqrt")
        return f"{word}({plain})" if word and depth > 0 else plain


@st.composite
def expressions(draw, arrays, grammar=Grammar, depth=3):
    """A strategy: expressions of some of the arrays, whose every choice hypothesis draws."""
    text = grammar(lambda *options: draw(st.sampled_from(options))).score(depth)
    return case_of(text, arrays)


def case_of(text, arrays):
    """A text, and those of the arrays that are in it."""
    names = {*re.findall(r"[a-z]\w*", text)}
    return Case(text, {name: array for name, array in arrays.items() if name in names})


def examples(count, name, *phases):
    """Decorators of a function for so many examples, which follow from the seed and a name."""
    how = {"max_examples": count, "phases": phases or tuple(Phase), "database": None}
    how |= {"deadline": None, "print_blob": True, "suppress_health_check": list(HealthCheck)}
    return lambda function: seed(f"{os.environ[SEED]} {name}")(settings(**how)(function))


def some(strategy, count, name):
    """So many expressions of a strategy, for what takes many at once, as different as may be."""
    found, lists = [], st.lists(strategy, min_size=count, max_size=count)
    # The first examples are those of the simplest choices.
    examples(12, name, Phase.generate)(given(lists)(lambda cases: found.append(cases)))()
    return max(reversed(found), key=lambda cases: len({case.text for case in cases}))
