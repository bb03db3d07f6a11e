"""The README files keep their word: the example prints what it shows, what they name exists."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import types
from pathlib import Path

import pytest
from conftest import GPU, on_a_gpu
from test_layout import functions, read

import cuattn

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PARTS = ("bench", "cuattn", "cuda_src", "tests")
RULES = ROOT / "cuattn" / "reference" / "README.md"
OTHERS = [
    *sorted((ROOT / ".github").glob("*.md")),
    *(file for part in PARTS for file in sorted((ROOT / part).rglob("README.md"))),
]
SCREEN = 100  # lines of README.md


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


def missing_paths(text, *folders):
    """Paths in backticks that are in no folder; `foo` is the kernel that a reader will add."""
    paths = re.findall(r"`((?:\.?[\w-]+/)+[\w.-]+|LICENSE)`", text)
    paths = {p for p in paths if not any((folder / p).exists() for folder in folders)}
    return sorted(p for p in paths if "foo" not in Path(p).name)


def missing_links(text, folder):
    """Files beside `folder` that Markdown links and pictures lead to, and that are not there."""
    targets = re.findall(r"\]\(([^)]+)\)", text)
    return [t for t in targets if not t.startswith("https://") and not (folder / t).exists()]


def test_example_prints_what_readme_shows():
    example = block(README, "python")
    assert len([line for line in example.splitlines() if line]) == 12
    assert printed(example) == block(README, "text", "output")


@pytest.mark.parametrize("backend", ["numpy", GPU], indirect=True)
@pytest.mark.parametrize(
    ("marker", "output"),
    [("penalties", "drawn"), ("keys that matter", "kept"), ("score", "scored")],
)
def test_the_examples_of_the_rules(backend, marker, output):
    text, xp = RULES.read_text(encoding="utf-8"), backend.xp.__name__
    example = block(text, "python", marker).replace("import numpy as", f"import {xp} as")
    assert printed(example) == block(text, "text", output)


@pytest.mark.parametrize("backend", ["numpy", GPU], indirect=True)
def test_the_example_of_neighbours(backend):
    text, xp = RULES.read_text(encoding="utf-8"), backend.xp.__name__
    example = block(text, "python", "neighbours").replace("import numpy as", f"import {xp} as")
    assert printed(example) == block(text, "text", "found")


@on_a_gpu
def test_the_example_of_a_graph(backend):
    text = RULES.read_text(encoding="utf-8")
    assert printed(block(text, "python", "graph")) == block(text, "text", "output")


def test_every_public_function_has_a_row():
    names = [n for n in cuattn.__all__ if isinstance(getattr(cuattn, n), types.FunctionType)]
    assert "softmax" in names
    assert undocumented(README, names) == []


def test_readme_fits_on_a_screen_and_leads_to_the_others():
    """PyPI shows it without the files beside it: it names them, and has no links to them."""
    assert len(README.splitlines()) <= SCREEN
    assert re.findall(r"\]\((?!https://)", README) == []
    assert len(OTHERS) >= 8
    names = [file.relative_to(ROOT).as_posix() for file in OTHERS]
    bench = (ROOT / "bench" / "README.md").read_text(encoding="utf-8")
    assert [name for name in names if f"`{name}`" not in README + bench] == []


@pytest.mark.parametrize(
    "file", [ROOT / "README.md", *OTHERS], ids=lambda file: file.relative_to(ROOT).as_posix()
)
def test_every_path_exists(file):
    text = file.read_text(encoding="utf-8")
    assert missing_paths(text, ROOT, file.parent) == []
    assert missing_links(text, file.parent) == []


# -- the table of the emulator in tests/README.md --------------------------------------------------


def emulator_rows(text):
    """Rows of the table: its cells, each as the words in backticks."""
    table = re.search(r"^\| instruction \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    cells = [line.strip("| ").split(" | ") for line in table.splitlines()]
    return [[re.findall(r"`([^`]+)`", cell) for cell in row] for row in cells]


def wrong_rows(rows, sources, defined):
    """Instructions that nobody defines, and error texts that no file of their row has."""
    wrong = []
    for instructions, _, files, errors in rows:
        text = "".join(re.sub(r'"\s*"', "", sources[file]) for file in files)  # literals joined
        wrong += [name for name in instructions if not re.search(rf"\b{name}\b", defined)]
        wrong += [error for error in errors if error not in text]
    return wrong


def test_emulator_table_is_true_and_whole():
    rows = emulator_rows((ROOT / "tests" / "README.md").read_text(encoding="utf-8"))
    assert {len(row) for row in rows} == {4}
    twins = read("tests/emulator/ptx", "*.cuh")
    defined = "".join([*twins.values(), *read("tests/emulator", "cuda.hpp").values()])
    sources = {file: (ROOT / file).read_text() for row in rows for file in row[2]}
    assert wrong_rows(rows, sources, defined) == []
    wrappers = {name for text in twins.values() for name in functions(text)}
    assert wrappers - {name for row in rows for name in row[0]} == set()
    intrinsics = set(re.findall(r"\b(?:__\w+_sync|atomic[A-Z]\w+|__sync\w+)\b", defined))
    assert intrinsics - {name for row in rows for name in row[0]} == set()


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
    assert missing_links("[a](a/b.py) ![b](c.svg) [c](https://x.org)", tmp_path) == [
        "a/b.py",
        "c.svg",
    ]
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.py").touch()
    assert missing_paths(text, tmp_path) == ["foo/x.c"]
    assert missing_links("[a](a/b.py)", tmp_path) == []
    head = "| instruction | a | b | c |\n|---|---|---|---|\n"
    rows = emulator_rows(f"{head}| `f`, `g` | x | `s.cpp` | `no way`, `far` |\n")
    assert rows == [[["f", "g"], [], ["s.cpp"], ["no way", "far"]]]
    assert wrong_rows(rows, {"s.cpp": 'fault("no "\n  "way")'}, "int f();") == ["g", "far"]
