"""What the types say is true, and they say it of every public function, option and result.

mypy itself is a step of .ci/run: it is a tool of development, which the tests do without.
"""

from __future__ import annotations

import ast
import inspect
import types
from pathlib import Path

import typing_user

import cuattn

TREE = ast.parse(Path(typing_user.__file__).read_text(encoding="utf-8"))


def test_completion_offers_public_names_only():
    """No submodule but `reference`, no helper, nothing that __future__ leaves behind."""
    assert sorted(dir(cuattn)) == sorted([*cuattn.__all__, "__version__"])
    modules = [name for name in dir(cuattn) if isinstance(getattr(cuattn, name), types.ModuleType)]
    assert modules == ["reference"]


def used(name):
    """Keywords of all calls of a public function in the program."""
    calls = (node for node in ast.walk(TREE) if isinstance(node, ast.Call))
    return {k.arg for c in calls if ast.unparse(c.func) == f"cuattn.{name}" for k in c.keywords}


def test_the_program_runs():
    typing_user.main()


def test_the_program_uses_every_option():
    unused = []
    for name in cuattn.__all__:
        function = getattr(cuattn, name)
        if isinstance(function, types.FunctionType):
            parameters = inspect.signature(function).parameters.values()
            options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
            unused += [f"{name}({option}=)" for option in sorted(options - used(name))]
            assert f"cuattn.{name}(" in ast.unparse(TREE)
    assert unused == []


def test_the_program_uses_every_field():
    attributes = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
    results = [getattr(cuattn, name) for name in cuattn.__all__]
    fields = {f for r in results if isinstance(r, type) for f in (*r._fields, "lse")}
    assert fields <= attributes
