"""Settings of Sphinx. `extension.py` has what they need that Sphinx does not have."""

from __future__ import annotations

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parents[1]
sys.path[:0] = [str(ROOT), str(DOCS)]  # cuattn of this tree, whatever is installed

import extension  # noqa: E402

import cuattn  # noqa: E402

project = "cuattn"
author = "the cuattn authors"
version = release = cuattn.__version__
extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "extension",
]
exclude_patterns = ["generated/sources"]

# In backticks is an argument or a name. One of ours has to exist, as has all that "See Also" names;
# other libraries are not looked up, which would need the network.
nitpicky = True
default_role = "py:data"
nitpick_ignore_regex = [
    ("py:data", r"(?!cuattn\.).+"),
    ("py:obj", r"(cupy|cupyx|dask|jax|numpy|scipy)\..+"),
]
autodoc_typehints = "none"  # docstrings say it in words
numpydoc_show_class_members = False

html_theme = "pydata_sphinx_theme"
html_title = f"cuattn {version}"
html_show_sourcelink = False
html_theme_options = {"show_toc_level": 2, "header_links_before_dropdown": 5}

sphinx_gallery_conf = {
    "examples_dirs": "generated/sources",
    "gallery_dirs": "generated/gallery",
    "filename_pattern": extension.executed(),
    "copyfile_regex": "index.rst",
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "write_computation_times": False,
}
