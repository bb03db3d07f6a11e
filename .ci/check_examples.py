"""Runs the examples, each in an environment of its own with nothing but what it says to install.

    python .ci/check_examples.py WHEEL [EXAMPLE ...]

WHEEL is cuattn's. Two at a time. PyTorch is taken without CUDA, which would be gigabytes: pip's
configuration has to name an index of such wheels.
"""

from __future__ import annotations

import ast
import concurrent.futures
import os
import shlex
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import NamedTuple

TORCH = "torch==2.13.0+cpu"
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "bench" / "examples").glob("*.py"))


class Recipe(NamedTuple):
    """What an example's docstring says: what pip installs, and how to run it."""

    requirements: list[str]
    command: list[str]


def recipe(text: str) -> Recipe:
    """From the two lines of the docstring's first indented block."""
    lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
    block = [shlex.split(line) for line in lines if line.startswith("    ")][:2]
    if len(block) != 2 or block[0][:2] != ["pip", "install"] or "python" not in block[1]:
        raise ValueError("the docstring must say `pip install ...`, and below it how to run it")
    return Recipe(block[0][2:], block[1])


def run(example: Path, wheel: Path) -> str:
    """The last line that it prints; raises if it fails."""
    requirements, command = recipe(example.read_text())
    ours = [name.replace("cuattn", str(wheel), 1) for name in requirements if name[:6] == "cuattn"]
    others = [TORCH if name == "torch" else name for name in requirements if name[:6] != "cuattn"]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True)
        scripts = Path(folder) / "bin"
        pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "-q"]
        environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        subprocess.run([*pip, "--no-compile", *ours, *others], check=True)
        installed = time.monotonic()
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100
        )
    if done.returncode:
        raise RuntimeError(f"{example.name} fails:\n{done.stdout}{done.stderr}")
    times = f"{installed - start:.0f} s to install, {time.monotonic() - installed:.0f} s"
    return f"{example.name}: {times}: {done.stdout.strip().splitlines()[-1]}"


def main(wheel: str, *names: str) -> None:
    examples = [path for path in EXAMPLES if not names or path.name in names]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for line in pool.map(lambda path: run(path, Path(wheel).resolve()), examples):
            print(line, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
