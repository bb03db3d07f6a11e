"""What Sphinx does not do by itself: sources of the gallery, links of the README files, and a check
that the reference is whole."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parents[1]
GALLERY, SOURCES = "generated/gallery", DOCS / "generated" / "sources"
FILES = "files"  # pages of files that have no page else
LANGUAGES = {
    ".py": "python",
    ".cuh": "cuda",
    ".cpp": "cpp",
    ".hpp": "cpp",
    ".json": "json",
    ".txt": "text",
    "": "text",
}
STORY = DOCS / "softmax_to_attention.py"
EXAMPLES = sorted((ROOT / "bench" / "examples").glob("*.py"))
REFERENCE = ("cuattn", "cuattn.dask", "cuattn.jax", "cuattn.reference")
NOT_HERE = {"mpi4py"}  # runs under mpiexec

INDEX = """Examples
========

.. include:: ../../../../bench/README.md
   :parser: myst_parser.sphinx_
   :start-after: ## Examples

.. toctree::
   :hidden:

"""


# -- the gallery -----------------------------------------------------------------------------------


def packages(text: str) -> set[str]:
    """What a file imports at its top level, without the standard library."""
    names: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def executed() -> str:
    """A pattern of the files that are executed: those whose packages are installed."""
    stems = [
        path.stem
        for path in (STORY, *EXAMPLES)
        if not (needed := packages(path.read_text(encoding="utf-8"))) & NOT_HERE
        and all(importlib.util.find_spec(name) for name in needed)
    ]
    return rf"/({'|'.join(stems)})\.py$"


def titled(text: str, title: str) -> str:
    """An example with a title, and with the commands of its docstring marked as such."""
    docstring, end, rest = text.removeprefix('"""').partition('"""\n')
    docstring = re.sub(r"\n\n(?=    )", "\n\n.. code-block:: sh\n\n", docstring)
    return f'"""{title}\n{"=" * len(title)}\n\n{docstring}{end}{rest}'


def write_sources(app: Sphinx) -> None:
    """What sphinx-gallery reads: titles are its own, so that examples need none."""
    SOURCES.mkdir(parents=True, exist_ok=True)
    texts = {path.name: titled(path.read_text("utf-8"), path.name) for path in EXAMPLES}
    texts["index.rst"] = INDEX + "".join(f"   {path.stem}\n" for path in EXAMPLES)
    texts[STORY.name] = STORY.read_text("utf-8")
    for path in SOURCES.iterdir():
        if path.name not in texts:
            path.unlink()
    for name, text in texts.items():
        (SOURCES / name).write_text(text, encoding="utf-8")


# -- links -----------------------------------------------------------------------------------------


def pages() -> dict[str, str]:
    """Paths that the README files name, and the pages of the site that show these files."""
    shown = {path.relative_to(ROOT).as_posix(): f"{GALLERY}/{path.stem}" for path in EXAMPLES}
    named = set()
    for page in DOCS.glob("*.md"):
        for path in re.findall(r"^```\{include\} \.\./\.\./(\S+)$", page.read_text("utf-8"), re.M):
            shown[path] = page.stem
            if (ROOT / path).exists():  # else Sphinx says so
                named.update(re.findall(r"`([\w.][\w./-]*)`", (ROOT / path).read_text("utf-8")))
    files = (ROOT / path for path in named if Path(path).suffix in LANGUAGES)
    paths = [file.relative_to(ROOT).as_posix() for file in files if file.is_file()]
    return {path: f"{FILES}/{path}" for path in sorted(paths)} | shown


def link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """A path in backticks leads to its page, the name of a function to its reference."""
    if docname.startswith("generated/reference/"):
        return  # the names there are those of arguments; what else they name is linked by Sphinx
    objects = app.env.domains["py"].data["objects"]
    for node in list(doctree.findall(nodes.literal)):
        name = node.astext()
        target, anchor = app.config.pages_of_paths.get(name), None
        for known in (name, f"cuattn.{name}"):
            if known in objects:
                target, anchor = objects[known].docname, objects[known].node_id
        inside = isinstance(node.parent, nodes.reference)
        if target not in (None, docname) and not inside:
            node.replace_self(make_refnode(app.builder, docname, target, anchor, node.deepcopy()))


def show_files(app: Sphinx) -> Iterator[tuple[str, dict[str, str], str]]:
    """A page for each file that is named and has no page else."""
    for path, page in app.config.pages_of_paths.items():
        if page.startswith(f"{FILES}/"):
            language = LANGUAGES[Path(path).suffix]
            text = (ROOT / path).read_text(encoding="utf-8")
            code = app.builder.highlighter.highlight_block(text, language, location=path)
            yield page, {"title": path, "body": f"<h1>{path}</h1>\n{code}"}, "page.html"


# -- the reference ---------------------------------------------------------------------------------


def check_reference(app: Sphinx, env: Any) -> None:
    """Warn of public names that the reference lacks."""
    for module in REFERENCE:
        for name in importlib.import_module(module).__all__:
            if f"{module}.{name}" not in env.domains["py"].data["objects"]:
                logging.getLogger(__name__).warning("%s.%s is not in the reference", module, name)


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_config_value("pages_of_paths", pages(), "env")
    app.connect("builder-inited", write_sources, priority=100)  # before sphinx-gallery
    app.connect("doctree-resolved", link)
    app.connect("html-collect-pages", show_files)
    app.connect("env-check-consistency", check_reference)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
