"""README keeps its word: the example prints what it shows, every function and file exists."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import types
from pathlib import Path

import pytest

import cuattn

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(text, language, marker=None):
    """The first code block of a language, or the one right below ``<!-- marker -->``."""
    above = rf"^<!-- {marker} -->\n" if marker else "^"
    return re.search(rf"{above}```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[1]


def printed(source):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, "README.md", "exec"), {})
    return out.getvalue()


def undocumented(text, names):
    """Functions without a row ``| `name` | ...`` in a table."""
    return [name for name in names if f"\n| `{name}` |" not in text]


def missing_paths(text, root):
    """Paths in backticks that are not there; `foo` is the kernel that a reader is going to add."""
    paths = re.findall(r"`((?:\.?[\w-]+/)+[\w.-]+|LICENSE)`", text)
    return sorted({p for p in paths if "foo" not in Path(p).name and not (root / p).exists()})


def test_example_prints_what_readme_shows():
    example = block(README, "python")
    assert len([line for line in example.splitlines() if line]) == 12
    assert printed(example) == block(README, "text", "output")


def test_every_public_function_has_a_row():
    functions = [n for n in cuattn.__all__ if isinstance(getattr(cuattn, n), types.FunctionType)]
    assert "softmax" in functions
    assert undocumented(README, functions) == []


def test_every_path_exists():
    assert missing_paths(README, ROOT) == []


@pytest.mark.parametrize(
    ("marker", "command"),
    [
        ("main job", "pip install . && python -m cuattn\n"),
        ("tests", 'pip install -e ".[test]" && python -m pytest\n'),
    ],
)
def test_ci_runs_the_set_up_commands(marker, command):
    """They are run by .ci/run, which takes them from README with this sed program."""
    assert block(README, "sh", marker) == command
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f'run_readme "{marker}"' in script
    body = re.search(r"^readme_command\(\) \{\n(.*?)^\}", script, re.DOTALL | re.MULTILINE)[0]
    result = subprocess.run(
        ["bash", "-euc", f'{body}\nreadme_command "{marker}"'],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert result.stdout == command


def test_these_checks_can_fail(tmp_path):
    text = (
        "x\n```python\nprint(1)\n```\n<!-- b -->\n```sh\ntwo\n```\n| `f` | a |\n`a/b.py` `foo/x.c`"
    )
    assert printed(block(text, "python")) == "1\n"
    assert block(text, "sh", "b") == "two\n"
    assert undocumented(text, ["f", "g"]) == ["g"]
    assert missing_paths(text, tmp_path) == ["a/b.py", "foo/x.c"]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    assert missing_paths(text, tmp_path) == ["foo/x.c"]
