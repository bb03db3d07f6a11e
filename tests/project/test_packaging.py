"""What ends up in a wheel, read from setup.cfg. That a wheel really works is tried in .ci/run."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest

import cuattn

ROOT = Path(__file__).resolve().parents[2]
DATA = "options.package_data"
USED = ("cuda12x", "cuda13x", "bf16", "test")  # extras whose oldest versions are tried


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(value):
    return [line for line in value.split("\n") if line and not line.startswith("#")]


def not_shipped(folder, globs):
    """Files of a package's folder that are neither Python nor matched by its package data."""
    shipped = {path for glob in globs for path in folder.glob(glob)}
    files = {
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    return sorted(path.name for path in files - shipped if path.suffix != ".py")


@pytest.mark.parametrize(
    ("package", "folder"), [("cuattn", "cuattn"), ("cuattn.cuda_src", "cuda_src")]
)
def test_package_data_covers_every_file(config, package, folder):
    assert f"{package} = {folder}" in lines(config["options"]["package_dir"])
    assert package in lines(config["options"]["packages"])
    globs = lines(config[DATA][package])
    assert not_shipped(ROOT / folder, globs) == []
    assert [glob for glob in globs if not list((ROOT / folder).glob(glob))] == []


def test_a_file_that_is_not_shipped_is_seen(tmp_path):
    (tmp_path / "ptx").mkdir()
    for name in ("a.cuh", "a.h", "module.py", "ptx/b.cuh"):
        (tmp_path / name).touch()
    assert not_shipped(tmp_path, ["*.cuh"]) == ["a.h", "b.cuh"]
    assert not_shipped(tmp_path, ["*.cuh", "*.h", "ptx/*.cuh"]) == []


def test_no_python_package_is_left_out(config):
    """Every folder of the package that holds Python is listed."""
    folders = {path.parent for path in (ROOT / "cuattn").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names <= set(lines(config["options"]["packages"]))


def test_extras(config):
    extras = {name: lines(value) for name, value in config["options.extras_require"].items()}
    names = {"cuda12x", "cuda13x", "bf16", "dask", "jax", "test", "bench", "device", "dev", "docs"}
    assert set(extras) == names
    assert lines(config["options"]["install_requires"]) == ["numpy>=2.0"]
    for major in (12, 13):  # CuPy, the compiler and the headers; nothing else
        assert extras[f"cuda{major}x"] == [
            f"cupy-cuda{major}x>=14.0.1,!=14.1.0,<16",
            f"cuda-toolkit[nvrtc,cudart]=={major}.*",
        ]
    assert not [line for line in extras["test"] if "cu" in line]  # the tests need no GPU
    assert set(extras["dask"]) <= set(extras["test"])  # else its tests are skipped
    assert "cuattn[test]" in extras["bench"]
    assert "cuattn[test,cuda13x]" in extras["device"]
    assert "cuattn[bench,device,jax]" in extras["dev"]


def oldest(requirements):
    """Of requirements that begin at some version: the package, and that version."""
    found = (re.match(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", line) for line in requirements)
    return {match[1]: match[2] for match in found if match}


def test_the_oldest_versions_are_what_ci_tries(config):
    """.ci/oldest.txt has one for every bound of what users and the tests install."""
    pins = lines((ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8"))
    tried = dict(line.split("==") for line in pins)
    extras = config["options.extras_require"]
    used = [config["options"]["install_requires"], *(extras[name] for name in USED)]
    bounds = oldest(line for value in used for line in lines(value))
    assert tried.keys() == bounds.keys() and len(tried) > 8
    assert [n for n, bound in bounds.items() if not f"{tried[n]}.".startswith(f"{bound}.")] == []


def test_bounds_are_read():
    assert oldest(["a-b[e]>=2.0,!=2.1,<3", "c", "d==1.*"]) == {"a-b": "2.0"}


def test_version_is_a_literal_and_agrees(config):
    """A build reads it without importing the package, whose NumPy the build does not have."""
    assert config["metadata"]["version"] == "attr: cuattn.__version__"
    tree = ast.parse((ROOT / "cuattn" / "__init__.py").read_text())
    values = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert values == [cuattn.__version__]


def test_version_of_the_installed_package():
    try:
        version = importlib.metadata.version("cuattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("cuattn is not installed, the tests run on the checkout")
    assert version == cuattn.__version__


def test_sample_data():
    """The arrays that ``python -m cuattn`` reads, and that they belong together."""
    with np.load(Path(cuattn.__file__).parent / "data" / "minilm.npz", allow_pickle=False) as file:
        sample = dict(file)
    assert sample["q"].shape == sample["k"].shape == sample["v"].shape == (12, 115, 32)
    assert sample["logits"].shape == (8, 30522) and sample["logits"].dtype == np.float16
    best = np.argsort(-sample["logits"].astype(float), axis=-1, kind="stable")[:, :5]
    np.testing.assert_array_equal(best, sample["top5_indices"])
    q, k, v = (sample[name].astype(float) for name in "qkv")
    p = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(32))
    total = p.sum(axis=-1)
    np.testing.assert_allclose(np.log(total), sample["lse"], rtol=1e-12)
    np.testing.assert_allclose(p @ v / total[..., None], sample["out"], rtol=1e-9, atol=1e-12)
