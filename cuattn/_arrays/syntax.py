"""The text of an expression as Python's tree, and errors that point at a column of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

from cuattn._arrays.checks import shown

MAX_LENGTH, MAX_NODES, MAX_DEPTH = 4096, 500, 60


class Role(NamedTuple):
    """What an expression is for."""

    name: str  # of the argument that it is
    args: str  # of the argument that has its arrays
    names: tuple[str, ...]  # that it may have beside theirs
    kind: str  # of its value
    nothing: str  # how to have none


SCORE = Role("score", "score_args", ("s", "b", "h", "q", "k"), "float", "None changes nothing")
MASK = Role("mask", "args", ("b", "h", "q", "k"), "bool", "'True' hides nothing")


class Text:
    """A text, and what is raised about it."""

    def __init__(self, text: str, role: Role) -> None:
        self.text, self.role = text, role

    def refuse(self, must: str, what: str, node: Any, remedy: str = "") -> NoReturn:
        """The error for a node, or for a place in the text."""
        at = node if isinstance(node, int) else self.index(node.lineno, node.col_offset)
        line, column = self.text.count("\n", 0, at), at - self.text.rfind("\n", 0, at)
        of_line = f"line {line + 1}, " if "\n" in self.text else ""
        more = f"; {remedy}" if remedy else ""
        what = what if len(what) <= 200 else f"{what[:200]}..."
        name = self.role.name
        raise ValueError(f"{name} must {must}, but {what} at {of_line}column {column}{more}")

    def index(self, line: int, column: int) -> int:
        """Where a line and a column of the text without leading blanks are."""
        at = len(self.text) - len(self.text.lstrip())
        for _ in range(line - 1):
            at = self.text.index("\n", at) + 1
        return at + column

    def source(self, node: Any) -> str:
        """The text of a node, for people."""
        begin = self.index(node.lineno, node.col_offset)
        return shown(self.text[begin : self.index(node.end_lineno, node.end_col_offset)])

    def tree(self) -> ast.expr:
        """The tree of the text, which is neither large nor deep."""
        name = self.role.name
        if len(self.text) > MAX_LENGTH:
            raise ValueError(
                f"{name} must have at most {MAX_LENGTH} characters, but it has {len(self.text)}"
            )
        strange = re.search(r"[^ -~\n\t]", self.text)
        if strange:
            what = f"{ascii(strange[0])} is none"
            self.refuse("be of printable ASCII characters", what, strange.start())
        if not self.text.strip():
            raise ValueError(f"{name} must be an expression, but it is empty; {self.role.nothing}")
        try:
            tree = ast.parse(self.text.lstrip(), mode="eval").body
        except SyntaxError as error:
            line, column = error.lineno or 1, max(0, (error.offset or 1) - 1)
            lines = self.text.lstrip().count("\n") + 1
            at = min(self.index(min(line, lines), column), len(self.text))
            at = at if error.offset else len(self.text.rstrip())  # it ends too early
            self.refuse("be a Python expression", f"Python says: {error.msg}", at)
        except (MemoryError, RecursionError, ValueError):
            self.refuse(f"be nested at most {MAX_DEPTH} deep", "it is nested deeper", 0)
        for count, (node, depth) in enumerate(_nodes(tree)):
            if count == MAX_NODES:
                self.refuse(f"have at most {MAX_NODES} parts", "there are more", node)
            if depth > MAX_DEPTH:
                self.refuse(f"be nested at most {MAX_DEPTH} deep", "it is nested deeper", node)
        return tree


def _nodes(tree: ast.AST) -> Iterator[tuple[ast.expr, int]]:
    """Expressions of a tree and how deep they lie, without recursion."""
    waiting: list[tuple[ast.AST, int]] = [(tree, 1)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, ast.expr):
            yield node, depth
        waiting += [(child, depth + 1) for child in ast.iter_child_nodes(node)]
