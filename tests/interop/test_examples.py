"""The examples of bench/examples: short, and each runs as its docstring says, if all is installed.

They check their results themselves. `.ci/run` also runs each with nothing but what it names.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = 60  # an example has fewer lines


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


checker = load(ROOT / ".ci" / "check_examples.py")
each_example = pytest.mark.parametrize("path", checker.EXAMPLES, ids=lambda path: path.stem)


def packages(requirements):
    """Names of the packages that these need; of cuattn, those of the extra that is named."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    names = []
    for requirement in requirements:
        name, extras = re.match(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()
        if name != "cuattn":
            names.append(name)
        for extra in extras.split(",") if extras and name == "cuattn" else []:
            lines = config["options.extras_require"][extra].splitlines()
            names += packages(line for line in lines if line)
    return names


def why_not(recipe):
    """Why this cannot run here, or None. Any MPI will do, mpich is one that pip installs."""
    if "mpiexec" in recipe.command and not mpiexec():
        return "there is no mpiexec"
    for name in packages(recipe.requirements):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "mpich":
                return f"{name} is not installed"
    return None


def mpiexec():
    beside = Path(sys.executable).parent
    return shutil.which("mpiexec", path=f"{beside}{os.pathsep}{os.environ['PATH']}")


def run(command, cwd=ROOT):
    """The command of a docstring, with this Python and this checkout."""
    here = {"python": sys.executable, "mpiexec": mpiexec()}
    return subprocess.run(
        [here.get(word) or word for word in command],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def faults(path):
    """What is wrong with an example's form."""
    text = path.read_text(encoding="utf-8")
    found = [] if len(text.splitlines()) < SHORT else ["long"]
    if not re.search(r"^ *assert ", text, re.MULTILINE):
        found.append("it asserts nothing")
    try:
        recipe = checker.recipe(text)
    except ValueError as error:
        return [*found, str(error)]
    if path.relative_to(ROOT).as_posix() not in recipe.command:
        found.append("its command runs another file")
    return found


@each_example
def test_form(path):
    assert faults(path) == []


@each_example
def test_it_runs(path):
    recipe = checker.recipe(path.read_text(encoding="utf-8"))
    if reason := why_not(recipe):
        pytest.skip(reason)
    done = run(recipe.command)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_every_example_has_a_row():
    text = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `bench/examples/(\w+\.py)` \|", text, re.MULTILINE)
    assert rows == [path.name for path in checker.EXAMPLES]


def test_these_checks_can_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    good = '"""Shows\nx.\n\n    pip install "cuattn[bf16]" a-b\n    python x.py\n"""\nassert True\n'
    path = tmp_path / "x.py"
    for text, fault in {
        good: None,
        good + "\n" * SHORT: "long",
        good.replace("assert ", ""): "it asserts nothing",
        good.replace("x.py", "y.py"): "its command runs another file",
        good.replace("pip install", "conda install"): "the docstring must say",
        good.replace("    python x.py\n", ""): "the docstring must say",
    }.items():
        path.write_text(text)
        assert [found[: len(fault or "")] for found in faults(path)] == ([fault] if fault else [])
    path.write_text(good.replace("True", "False"))
    assert "AssertionError" in run(["python", "x.py"], cwd=tmp_path).stderr


def test_packages_of_requirements():
    assert packages(["cuattn", "torch>=2", "cuattn[bf16]"]) == ["torch", "ml_dtypes"]
    missing = checker.Recipe(["no-such-package"], ["python", "x.py"])
    assert why_not(missing) == "no-such-package is not installed"
    assert why_not(checker.Recipe(["cuattn", "pytest"], ["python", "x.py"])) is None
