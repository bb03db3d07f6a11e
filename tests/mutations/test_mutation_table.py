"""The table of mutations fits the sources and the tests as they are."""

from __future__ import annotations

import ast
from functools import lru_cache

import mutate
import pytest


@lru_cache
def functions(file: str) -> set[str]:
    """Test functions of a file."""
    tree = ast.parse((mutate.ROOT / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_mutation_applies():
    assert len(mutate.MUTATIONS) > 1200
    for m in mutate.MUTATIONS:
        path = mutate.ROOT / "cuda_src" / m.file
        assert mutate.replaced(path, m.old, m.new, m.count) != path.read_text(), m.breaks


def test_every_mutation_has_its_tests():
    for m in mutate.MUTATIONS:
        assert m.tests, m.breaks
        for node in m.tests:
            file, _, case = node.partition("@")[0].partition("::")
            assert case.partition("[")[0] in functions(file), f"{m.breaks}: {node}"


def test_a_mutation_that_does_not_apply_is_invalid(tmp_path):
    source = tmp_path / "x.cuh"
    source.write_text("a b a")
    for old, count in (("c", 1), ("a", 1), ("b", 2)):
        with pytest.raises(mutate.Invalid):
            mutate.replaced(source, old, "x", count)
