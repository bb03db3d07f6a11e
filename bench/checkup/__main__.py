"""Test, measure, compare and leave evidence, with one command and within a given time.

    python -m bench.checkup [--minutes N] [--out DIR] [--only PART] [--resume RESULT.json]

Every part is a process of its own with a limit on its time: one that fails, crashes or hangs costs
only itself, and the report names it. With a GPU: environment, all tests marked `gpu`,
compute-sanitizer, ceilings, benchmarks with peers by priority, and then what needs no GPU; without
one, only the last. What is left is one JSON (bench/report/schema.json), a Markdown report of it,
pictures, and the log of each part. `--resume` adds to an earlier result of the same commit:
measured cells are not measured again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import shutil
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.checkup import processes
from bench.report import markdown as report
from bench.report import plot, schema
from bench.timing import environment, measure

ROOT = environment.ROOT
RESERVE = 20.0  # seconds at the end, for JSON, Markdown and pictures
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
SANITIZED = [
    "-m",
    "gpu",
    "tests/softmax/test_softmax.py",
    "-k",
    "special_values or long_rows or layout",
]


@dataclass
class Run:
    """A check-up under way."""

    out: Path
    deadline: float  # of time.monotonic
    result: dict[str, Any]

    def seconds_left(self) -> float:
        """Seconds that parts may still take."""
        return max(0.0, self.deadline - RESERVE - time.monotonic())


@dataclass(frozen=True)
class Part:
    """A step of a check-up."""

    name: str
    needs_gpu: bool
    share: float  # of the whole time, at most
    run: Callable[[Run, float], tuple[str, str]]  # seconds it may take -> status, detail


def python_part(name: str) -> Callable[[Run, float], tuple[str, str]]:
    """A part of bench/checkup/parts.py; what it has measured goes into the result."""

    def run(run: Run, seconds: float) -> tuple[str, str]:
        fragment = run.out / f"{name}.part.json"
        fragment.unlink(missing_ok=True)
        command = [sys.executable, "-m", "bench.checkup.parts", name, str(fragment)]
        command += ["--seconds", str(max(0.6 * seconds, seconds - 60))]  # for what has begun
        status, detail = processes.execute(command, seconds, run.out / f"{name}.log")
        if status == "ok":
            measured = json.loads(fragment.read_text())
            detail = measured.pop("detail", "")
            run.result.update(measured)
        fragment.unlink(missing_ok=True)
        return status, detail

    return run


def gpu_tests(run: Run, seconds: float) -> tuple[str, str]:
    """Every test marked `gpu`; a skip is a failure."""
    junit = run.out / "tests.xml"
    command = [*PYTEST, "-m", "gpu", f"--junitxml={junit}"]
    cores = run.result["environment"]["cores"]
    if importlib.util.find_spec("xdist") is not None and cores > 2:  # compilation takes the time
        command += ["-n", str(min(8, cores // 2))]
    log = run.out / "tests.log"
    status, detail = processes.execute(command, seconds, log, CUATTN_REQUIRE_GPU="1")
    if junit.exists():
        detail = f"{detail}; failed: {', '.join(failed_tests(junit)[:20]) or 'none'}"
        junit.unlink()
    return status, detail


def failed_tests(junit: Path) -> list[str]:
    """Names of the failed tests of a JUnit report."""
    return [
        case.get("name", "")
        for case in ET.parse(junit).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]


def sanitizer(run: Run, seconds: float) -> tuple[str, str]:
    """memcheck, racecheck and synccheck over a small set of tests."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        return "skipped", "compute-sanitizer is not installed"
    statuses, details = [], []
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "86", *PYTEST, *SANITIZED]
        log = run.out / f"{tool}.log"
        status, detail = processes.execute(command, seconds / 3, log, CUATTN_REQUIRE_GPU="1")
        summary = re.findall(r"ERROR SUMMARY: .*", log.read_text(errors="replace"))
        statuses.append(status)
        details.append(f"{tool}: {status}, {summary[-1] if summary else detail}")
    bad = [status for status in statuses if status != "ok"]
    return (bad[0] if bad else "ok"), "; ".join(details)


def benchmarks(run: Run, seconds: float) -> tuple[str, str]:
    """All cells against all peers; who hangs or crashes is left out, and the rest goes on."""
    journal = run.out / "cells.jsonl"
    for suffix in ("", ".running", ".excluded"):
        journal.with_name(journal.name + suffix).unlink(missing_ok=True)
    done = measure.Journal(journal)
    for cell in run.result["cells"]:
        done.append(cell)
    command = [sys.executable, "-m", "bench.timing.measure", "--journal", str(journal)]
    log = run.out / "benchmarks.log"
    status, detail = processes.supervise(command, done, seconds, log)
    run.result["cells"] = done.cells()
    for path in run.out.glob(f"{journal.name}*"):
        path.unlink()
    return status, f"{processes.last_line(log)}; {detail}" if status == "ok" else detail


PARTS = (
    Part("environment", False, 0.1, python_part("environment")),
    Part("tests", True, 0.35, gpu_tests),
    Part("sanitizer", True, 0.15, sanitizer),
    Part("ceilings", True, 0.05, python_part("ceilings")),
    Part("benchmarks", True, 1.0, benchmarks),
    Part("import_time", False, 0.1, python_part("import_time")),
    Part("compile_time", False, 0.15, python_part("compile_time")),
    Part("host_cost", False, 0.15, python_part("host_cost")),
    Part("ladder", False, 0.25, python_part("ladder")),
    Part("counters", False, 0.35, python_part("counters")),
    Part("kernels", False, 0.5, python_part("kernels")),
    Part("instructions", False, 0.35, python_part("instructions")),
)


def empty_result() -> dict[str, Any]:
    """A result in which nothing has been measured yet."""
    lists = ("parts", "cells", "ladder", "counters", "instructions", "kernels", "host_cost")
    lists += ("compile_time",)
    return {
        "schema": 1,
        "environment": environment.facts(),
        "ceilings": {},
        "peers": {"found": {}, "missing": {}},
        "import_time": {"numpy": [], "cuattn": []},
        **{name: [] for name in lists},
    }


def check_up(run: Run, parts: tuple[Part, ...], minutes: float) -> None:
    """Run the parts; the result says what became of each."""
    has_gpu = run.result["environment"]["gpu"] is not None
    more = max(1.0, 1 / sum(part.share for part in parts))  # few parts share the whole time
    bar = tqdm(parts, unit="part", file=sys.stderr)
    for part in bar:
        bar.set_postfix_str(part.name)
        began = time.monotonic()
        seconds = min(60 * minutes * part.share * more, run.seconds_left())
        if part.needs_gpu and not has_gpu:
            status, detail = "skipped", "no GPU"
        elif seconds <= 0:
            status, detail = "skipped", "no time left"
        else:
            status, detail = part.run(run, seconds)
        row = {"name": part.name, "status": status, "detail": detail}
        row["seconds"] = round(time.monotonic() - began, 3)
        earlier = [p for p in run.result["parts"] if p["name"] != part.name]
        run.result["parts"] = [*earlier, row]


def write(run: Run) -> Path:
    """JSON, Markdown and pictures of what has been measured so far."""
    path = run.out / schema.file_name(run.result)
    try:
        schema.save(run.result, path)
    except ValueError:  # whatever is wrong with it, nothing that was measured is lost
        path.with_suffix(".invalid").write_text(json.dumps(run.result))
        raise
    path.with_suffix(".md").write_text(report.markdown(run.result), encoding="utf-8")
    with contextlib.suppress(ImportError):  # no matplotlib
        plot.draw(run.result, run.out)
    return path


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkup", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together")
    parser.add_argument("--out", type=Path, default=Path("checkup"), help="folder, made if missing")
    names = [part.name for part in PARTS]
    parser.add_argument("--only", action="append", choices=names, help="may be given repeatedly")
    parser.add_argument("--resume", type=Path, help="a result to add to")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    result = schema.load(given.resume) if given.resume else empty_result()
    commit = environment.facts()["commit"]
    if result["environment"]["commit"] != commit:
        parser.error(f"{given.resume} is of another commit than this one, {commit}")
    run = Run(given.out.resolve(), time.monotonic() + 60 * given.minutes, result)
    if result["environment"]["gpu"] is None:
        print("No GPU: only what needs none is run.", file=sys.stderr)
    chosen = tuple(part for part in PARTS if not given.only or part.name in given.only)
    check_up(run, chosen, given.minutes)
    path = write(run)
    bad = [p for p in run.result["parts"] if p["status"] not in ("ok", "skipped")]
    for part in bad:
        print(f"{part['name']}: {part['status']}: {part['detail']}", file=sys.stderr)
    print(path)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
