"""Docstrings of public functions: examples print what they show, and no section is missing."""

from __future__ import annotations

import contextlib
import doctest

import numpy
import pytest

import cuattn
from cuattn._device import compiler

NAMES = {"cuattn": cuattn, "numpy": numpy}  # that examples use
PUBLIC = {name: getattr(cuattn, name) for name in cuattn.__all__}
with contextlib.suppress(ImportError):
    import dask.array

    import cuattn.dask

    PUBLIC |= {f"dask.{name}": getattr(cuattn.dask, name) for name in cuattn.dask.__all__}
    NAMES["dask"] = dask
with contextlib.suppress(ImportError):
    import jax

    import cuattn.jax

    PUBLIC |= {f"jax.{name}": getattr(cuattn.jax, name) for name in cuattn.jax.__all__}
    NAMES["jax"] = jax
FUNCTIONS = sorted(n for n, f in PUBLIC.items() if callable(f) and not isinstance(f, type))
# Of numpydoc: parameters and results are described, other functions named, examples given, and the
# summary begins with no stray blank.
CHECKS = {"PR01", "PR02", "RT01", "SA01", "EX01", "SS03"}


def failures(docstring, name):
    """What `doctest` prints of examples that fail."""
    found: list[str] = []
    test = doctest.DocTestParser().get_doctest(docstring, dict(NAMES), name, None, None)
    assert test.examples, f"{name} has no example"
    doctest.DocTestRunner(verbose=False).run(test, out=found.append)
    return "".join(found)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_print_what_they_show(name, monkeypatch, tmp_path):
    if name == "compile":
        monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path))
        try:
            compiler.installed()
        except (ImportError, OSError, RuntimeError) as error:
            pytest.skip(f"nothing to compile with: {error}")
    assert failures(PUBLIC[name].__doc__, name) == ""


def test_an_example_that_prints_something_else_is_seen():
    assert "Got" in failures(">>> cuattn.softmax(numpy.zeros(2))\narray([0.5, 0.6])\n", "wrong")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_section_is_missing(name):
    pytest.importorskip("numpydoc")
    from numpydoc.docscrape import get_doc_object
    from numpydoc.validate import validate

    errors = validate(get_doc_object(PUBLIC[name]))["errors"]
    assert [error for error in errors if error[0] in CHECKS] == []
