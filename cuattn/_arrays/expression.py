"""Expressions: the text of one as steps with types, or an error that points at a column.

Nothing but what stands here gets through. Kernels and NumPy go by the steps, never by the text.
"""

from __future__ import annotations

import ast
import math
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from cuattn._arrays.checks import shown
from cuattn._arrays.syntax import MAX_NODES, SCORE, Role, Text

MAX_ARRAYS, MAX_DIMENSIONS = 6, 4
MAX_INT = 2**63 - 1

# Operations, by the names of NumPy's functions, which are those of attention/expression.cuh, too.
ARITHMETIC: dict[type, tuple[str, str]] = {
    ast.Add: ("add", "+"),
    ast.Sub: ("subtract", "-"),
    ast.Mult: ("multiply", "*"),
    ast.Div: ("divide", "/"),
    ast.FloorDiv: ("floor_divide", "//"),
    ast.Mod: ("remainder", "%"),
}
BITWISE: dict[type, tuple[str, str]] = {
    ast.BitAnd: ("bitwise_and", "&"),
    ast.BitOr: ("bitwise_or", "|"),
}
COMPARISONS: dict[type, tuple[str, str]] = {
    ast.Lt: ("less", "<"),
    ast.LtE: ("less_equal", "<="),
    ast.Gt: ("greater", ">"),
    ast.GtE: ("greater_equal", ">="),
    ast.Eq: ("equal", "=="),
    ast.NotEq: ("not_equal", "!="),
}
OF_FLOATS = {"exp": "exp", "log": "log", "tanh": "tanh", "sqrt": "sqrt"}
EXTREMES = {"min": "minimum", "max": "maximum"}
FUNCTIONS = ("abs", *EXTREMES, *OF_FLOATS, "where")
NUMBERS = ("int", "float")
NAMES = {"s": "float", "b": "int", "h": "int", "q": "int", "k": "int"}
LANGUAGE = (
    "it may have numbers, {}, inf, + - * / // %, comparisons, & | ~, "
    f"{', '.join(FUNCTIONS)}, and elements of arrays such as table[h, q - k]"
)
INSTEAD = {
    ast.And: ("and", "write & with both sides in parentheses"),
    ast.Or: ("or", "write | with both sides in parentheses"),
    ast.Not: ("not", "write ~"),
    ast.IfExp: ("if", "write where(condition, a, b)"),
    ast.Pow: ("**", "write x * x"),
}


class Step(NamedTuple):
    """One value of an expression, made of the values of earlier steps."""

    kind: str  # "int" (of 64 bits, wraps), "float" (as the scores are added up) or "bool"
    operation: str  # of NumPy, or "name", "number", "float" (of an int), "element" (of an array)
    operands: tuple[int, ...] = ()  # places of earlier steps
    value: Any = None  # of a name, a number; of an element: the place of its array


class Expression(NamedTuple):
    """Its last step is its value: of a score a float, of a mask a bool."""

    text: str
    steps: tuple[Step, ...]


class Indexed(NamedTuple):
    """What an expression has to know of an array."""

    name: str
    kind: str
    dimensions: int


@lru_cache(maxsize=1024)
def parse(text: str, arrays: tuple[Indexed, ...], role: Role = SCORE) -> Expression:
    """The steps of a text; ValueError if it is no such expression."""
    parser = _Parser(text, arrays, role)
    tree = parser.text.tree()
    if role.kind == "bool":
        parser.of_kinds(tree, ("bool",), "be a bool")
    else:
        parser.floated(parser.number(tree, "be a number"))
    for place, array in enumerate(arrays):
        if place not in parser.used:
            raise ValueError(f"{role.name} must use every array, but {array.name} is not in it")
    return Expression(text, tuple(parser.steps))


class _Parser:
    """Steps of a text, each once."""

    def __init__(self, text: str, arrays: tuple[Indexed, ...], role: Role) -> None:
        self.text, self.role = Text(text, role), role
        self.arrays = {array.name: (place, array) for place, array in enumerate(arrays)}
        self.steps: list[Step] = []
        self.places: dict[Step, int] = {}
        self.used: set[int] = set()

    def step(self, *fields: Any) -> int:
        step = Step(*fields)
        if step not in self.places:
            self.places[step] = len(self.steps)
            self.steps.append(step)
        return self.places[step]

    def kind(self, place: int) -> str:
        return self.steps[place].kind

    def floated(self, place: int) -> int:
        return place if self.kind(place) == "float" else self.step("float", "float", (place,))

    def alike(self, *places: int) -> tuple[str, tuple[int, ...]]:
        """Numbers of one kind: integers, or all of them floats."""
        if {*map(self.kind, places)} == {"int", "float"}:
            return "float", tuple(map(self.floated, places))
        return self.kind(places[0]), places

    def of_kinds(self, node: ast.expr, kinds: tuple[str, ...], must: str) -> int:
        """The place of a node's step, which is of such a kind."""
        place = self.visit(node)
        self.check(node, place, kinds, must)
        return place

    def check(self, node: ast.expr, place: int, kinds: tuple[str, ...], must: str) -> None:
        if self.kind(place) not in kinds:
            what = {"int": "an integer", "float": "a float", "bool": "a bool"}[self.kind(place)]
            remedy = "make a number of a bool by where(condition, 1, 0)" if kinds == NUMBERS else ""
            self.text.refuse(must, f"{self.text.source(node)} is {what}", node, remedy)

    def number(self, node: ast.expr, must: str) -> int:
        return self.of_kinds(node, NUMBERS, must)

    def visit(self, node: ast.expr) -> int:
        visitor = getattr(self, f"visit_{type(node).__name__}", None)
        if visitor is None:
            self.unknown(node, node)
        place: int = visitor(node)
        return place

    def unknown(self, node: ast.expr, what: ast.AST) -> NoReturn:
        names = ", ".join(self.role.names)
        word, remedy = INSTEAD.get(type(what), (None, LANGUAGE.format(names)))
        found = f"it has {word!r}" if word else f"{self.text.source(node)} is something else"
        of = "s, positions" if "s" in self.role.names else "positions"
        self.text.refuse(f"be arithmetic of {of} and arrays", found, node, remedy)

    def visit_Constant(self, node: ast.Constant) -> int:
        value = node.value
        if type(value) is bool:
            return self.step("bool", "number", (), value)
        if type(value) is int:
            if value > MAX_INT:
                self.text.refuse("have integers below 2**63", f"there is {shown(value)}", node)
            return self.step("int", "number", (), value)
        if type(value) is not float:
            self.unknown(node, node)
        if math.isinf(value):
            self.text.refuse(
                "have finite numbers", f"{self.text.source(node)} is none", node, "write inf"
            )
        return self.step("float", "number", (), value)

    def visit_Name(self, node: ast.Name) -> int:
        if node.id in self.role.names:
            return self.step(NAMES[node.id], "name", (), node.id)
        if node.id == "inf":
            return self.step("float", "number", (), math.inf)
        if node.id in self.arrays:
            return self.element(node, node.id, [])
        known = ", ".join((*self.role.names, "inf", *self.arrays))
        remedy = "call functions: where(condition, a, b)"
        if node.id not in FUNCTIONS:
            remedy = f"pass an array of that name in {self.role.args}"
        self.text.refuse(f"have no other names than {known}", f"there is {node.id}", node, remedy)

    def visit_Subscript(self, node: ast.Subscript) -> int:
        name = node.value.id if isinstance(node.value, ast.Name) else ""
        if name not in self.arrays:
            if name:
                self.visit(node.value)
            what = f"{self.text.source(node.value)} is none"
            self.text.refuse(f"index arrays of {self.role.args} only", what, node.value)
        indices = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return self.element(node, name, indices)

    def element(self, node: ast.expr, name: str, indices: list[ast.expr]) -> int:
        place, array = self.arrays[name]
        if len(indices) != array.dimensions:
            must = f"index {name} by {array.dimensions} integers, as it has dimensions"
            self.text.refuse(must, f"there are {len(indices)}", node)
        at = [self.of_kinds(index, ("int",), "index arrays by integers") for index in indices]
        self.used.add(place)
        return self.step(array.kind, "element", tuple(at), place)

    def visit_BoolOp(self, node: ast.BoolOp) -> int:
        self.unknown(node, node.op)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> int:
        if isinstance(node.op, ast.Not):
            self.unknown(node, node.op)
        if isinstance(node.op, ast.Invert):
            place = self.of_kinds(node.operand, ("bool", "int"), "have bools or integers for ~")
            return self.step(self.kind(place), "invert", (place,))
        word = "-" if isinstance(node.op, ast.USub) else "+"
        place = self.number(node.operand, f"have numbers for {word}")
        return self.step(self.kind(place), "negative", (place,)) if word == "-" else place

    def visit_BinOp(self, node: ast.BinOp) -> int:
        if type(node.op) in BITWISE:
            operation, word = BITWISE[type(node.op)]
            return self.pair(node.left, node.right, operation, word, ("bool", "int"))
        if type(node.op) not in ARITHMETIC:
            self.unknown(node, node.op)
        operation, word = ARITHMETIC[type(node.op)]
        if operation in ("floor_divide", "remainder"):
            return self.pair(node.left, node.right, operation, word, ("int",))
        must = f"have numbers for {word}"
        places = [self.number(side, must) for side in (node.left, node.right)]
        if operation == "divide":
            places = [*map(self.floated, places)]
        found, operands = self.alike(*places)
        return self.step(found, operation, operands)

    def pair(
        self, left: ast.expr, right: ast.expr, operation: str, word: str, kinds: tuple[str, ...]
    ) -> int:
        """An operation on two of one kind, which the result has, too."""
        must = f"have {'integers' if kinds == ('int',) else 'bools or integers'} for {word}"
        one = self.of_kinds(left, kinds, must)
        other = self.of_kinds(right, (self.kind(one),), f"have two of one type for {word}")
        return self.step(self.kind(one), operation, (one, other))

    def visit_Compare(self, node: ast.Compare) -> int:
        nodes = [node.left, *node.comparators]
        places = [*map(self.visit, nodes)]
        found: int | None = None
        for i, op in enumerate(node.ops):
            if type(op) not in COMPARISONS:
                self.unknown(node, op)
            operation, word = COMPARISONS[type(op)]
            bools = operation in ("equal", "not_equal") and self.kind(places[i]) == "bool"
            must = f"have two {'bools' if bools else 'numbers'} for {word}"
            for side in (i, i + 1):
                self.check(nodes[side], places[side], ("bool",) if bools else NUMBERS, must)
            _, operands = self.alike(*places[i : i + 2])
            one = self.step("bool", operation, operands)
            found = one if found is None else self.step("bool", "bitwise_and", (found, one))
        assert found is not None
        return found

    def visit_Call(self, node: ast.Call) -> int:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        if name not in FUNCTIONS:
            what = f"{self.text.source(node.func)} is none"
            self.text.refuse(f"call {', '.join(FUNCTIONS)} only", what, node.func)
        if node.keywords:
            what = "there is a keyword"
            self.text.refuse(f"call {name} by position", what, node.keywords[0].value)
        least, most = {"where": (3, 3)}.get(name, (2, MAX_NODES) if name in EXTREMES else (1, 1))
        if not least <= len(node.args) <= most:
            more = " or more" if most > least else ""
            what = f"there are {len(node.args)}"
            self.text.refuse(f"call {name} with {least}{more} arguments", what, node)
        if name == "where":
            return self.where(*node.args)
        must = f"call {name} with numbers"
        places = [self.number(argument, must) for argument in node.args]
        if name in OF_FLOATS:
            return self.step("float", OF_FLOATS[name], (self.floated(places[0]),))
        found, operands = self.alike(*places)
        if name == "abs":
            return self.step(found, "absolute", operands)
        first = operands[0]
        for other in operands[1:]:
            first = self.step(found, EXTREMES[name], (first, other))
        return first

    def where(self, condition: ast.expr, yes: ast.expr, no: ast.expr) -> int:
        asked = self.of_kinds(condition, ("bool",), "have a bool for the first argument of where")
        one = self.visit(yes)
        kinds = ("bool",) if self.kind(one) == "bool" else ("int", "float")
        other = self.of_kinds(no, kinds, "have two bools or two numbers in where")
        found, operands = self.alike(one, other)
        return self.step(found, "where", (asked, *operands))
