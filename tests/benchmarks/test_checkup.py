"""The check-up: parts that fail, crash and hang cost only themselves, and the report names them."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from bench import grids, inside
from bench.checkup import __main__ as checkup
from bench.checkup import parts, processes
from bench.report import markdown as report
from bench.report import schema
from bench.timing import environment, measure


def python(script):
    return [sys.executable, "-c", script]


@pytest.mark.parametrize(
    ("script", "status", "detail"),
    [
        ("print('one'); print('two'); print()", "ok", "two"),
        ("print('why'); raise SystemExit(3)", "failed", "why"),
        ("print('no NVRTC'); raise SystemExit(77)", "skipped", "no NVRTC"),
        ("import os; print('then', flush=True); os.abort()", "crashed", "signal 6; then"),
        ("import time; print(1, flush=True); time.sleep(60)", "timeout", "stopped after 2 s; 1"),
    ],
)
def test_a_part_ends_with_a_status(tmp_path, script, status, detail):
    began = time.monotonic()
    assert processes.execute(python(script), 2, tmp_path / "log") == (status, detail)
    assert time.monotonic() - began < 20


def test_what_a_hanging_part_started_is_stopped_too(tmp_path):
    file = tmp_path / "pid"
    child = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert processes.execute(python(parent), 3, tmp_path / "log")[0] == "timeout"
    pid = int(file.read_text())
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the child of a part is still there")


CELLS = [
    grids.Cell("softmax", "quack", "float32", (("rows", 1 << i), ("cols", 8)), 1) for i in range(4)
]

# Stands for bench.timing.measure: the second cell has a contestant that hangs, the third one that
# crashes, and so has the fourth, where it is cuattn.
MEASURE = """
import os, sys, time
from pathlib import Path
from bench.timing import measure
from test_checkup import CELLS, record
journal = measure.Journal(Path(sys.argv[1]))
done = {measure.key_of(cell) for cell in journal.cells()}
for cell, trouble in zip(CELLS, (None, ("torch", "hang"), ("jax", "crash"), ("cuattn", "crash"))):
    if cell.key in done:
        continue
    excluded = journal.excluded().get(cell.key, {})
    for name in ("cuattn", "torch", "jax"):
        journal.begin(cell.key, name)
        if trouble and trouble[0] == name and name not in excluded:
            time.sleep(60) if trouble[1] == "hang" else os.abort()
    journal.append(record(cell, excluded))
    journal.end()
"""


def record(cell, excluded):
    """A measured cell."""
    entry = {"plan": None, "max_error": None, "allowed_error": None, "peak_bytes": None}
    contestants = []
    for name in ("cuattn", "torch", "jax"):
        ok = name not in excluded
        cold, warm = ([2e-3, 1e-3, 3e-3], [1e-3, 1e-3, 2e-3]) if ok else ([], [])
        more = {"cold": cold, "warm": warm, "clock": "events" if ok else None}
        status = excluded.get(name, "ok")
        contestants.append({"name": name, "status": status, "detail": "", **entry, **more})
    return {
        "operation": cell.operation,
        "grid": cell.grid,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "priority": cell.priority,
        "work": {"bytes": 1000, "flops": 0, "formula": "read x + write y"},
        "ceiling": "copy",
        "contestants": contestants,
    }


@pytest.fixture
def journal(tmp_path, monkeypatch):
    tests = environment.ROOT / "tests"
    found = map(str, (tests / "benchmarks", tests, environment.ROOT))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    return measure.Journal(tmp_path / "cells.jsonl")


def test_who_hangs_or_crashes_is_left_out_and_the_rest_goes_on(tmp_path, journal):
    command = [*python(MEASURE), str(tmp_path / "cells.jsonl")]
    status, detail = processes.supervise(
        command, journal, 120, tmp_path / "log", contestant_seconds=2, poll=0.05
    )
    assert status == "ok"
    cells = journal.cells()
    assert [measure.key_of(cell) for cell in cells] == [cell.key for cell in CELLS]
    statuses = [[entry["status"] for entry in cell["contestants"]] for cell in cells]
    assert statuses == [
        ["ok", "ok", "ok"],
        ["ok", "hung", "ok"],
        ["ok", "ok", "crashed"],
        ["crashed", "ok", "ok"],
    ]
    for name, cell in zip(("torch", "jax", "cuattn"), CELLS[1:], strict=True):
        assert f"{name} on {cell.key}" in detail
    result = checkup.empty_result()
    result["cells"] = cells
    schema.validate(result)
    assert "hung" in report.markdown(result)


def test_a_benchmark_that_cannot_start_is_a_failure(tmp_path, journal):
    command = [*python("raise SystemExit('no kernel image')"), "x"]
    found = processes.supervise(command, journal, 60, tmp_path / "log", poll=0.05)
    assert found == ("failed", "no kernel image")


def test_a_half_written_cell_is_measured_again(tmp_path, journal):
    journal.append(record(CELLS[0], {}))
    with open(tmp_path / "cells.jsonl", "a") as file:
        file.write('{"operation": "soft')
    assert [measure.key_of(cell) for cell in journal.cells()] == [CELLS[0].key]


def test_a_stored_cell_is_not_measured_again(tmp_path):
    """A cell is known by its name after a result has been written and read, of every grid."""
    operations = {name for grid in grids.GRIDS.values() for name in grid.operations}
    cells = grids.cells(operations)
    result = checkup.empty_result()
    result["cells"] = [record(cell, {}) for cell in cells]
    schema.save(result, tmp_path / "result.json")
    stored = schema.load(tmp_path / "result.json")["cells"]
    assert [measure.key_of(cell) for cell in stored] == [cell.key for cell in cells]


def test_resumed_benchmarks_begin_with_what_is_missing(tmp_path, monkeypatch):
    result = checkup.empty_result()
    result["cells"] = [record(cell, {}) for cell in CELLS[:2]]
    schema.save(result, tmp_path / "result.json")
    todo = []

    def supervise(command, journal, seconds, log):
        done = {measure.key_of(cell) for cell in journal.cells()}
        todo.extend(cell for cell in CELLS if cell.key not in done)
        for cell in todo:
            journal.append(record(cell, {}))
        log.write_text("4 of 4 cells")
        return "ok", "hung or crashed: none"

    monkeypatch.setattr(processes, "supervise", supervise)
    run = checkup.Run(tmp_path, time.monotonic() + 60, schema.load(tmp_path / "result.json"))
    assert checkup.benchmarks(run, 10)[1] == "4 of 4 cells; hung or crashed: none"
    assert todo == CELLS[2:]
    assert {measure.key_of(cell) for cell in run.result["cells"]} == {cell.key for cell in CELLS}
    assert len(run.result["cells"]) == len(CELLS)


def check_up(tmp_path, gpu, *rows, minutes=1.0, share=0.5):
    """The parts of a result after parts (name, needs_gpu, what it returns)."""
    ran = []

    def part(name, needs_gpu, outcome):
        def run(run, seconds):
            ran.append((name, seconds))
            return outcome

        return checkup.Part(name, needs_gpu, share, run)

    result = checkup.empty_result()
    result["environment"]["gpu"] = gpu
    run = checkup.Run(tmp_path, time.monotonic() + 60 * minutes, result)
    checkup.check_up(run, tuple(part(*row) for row in rows), minutes)
    return ran, {row["name"]: (row["status"], row["detail"]) for row in result["parts"]}


def test_without_a_gpu_only_what_needs_none_runs(tmp_path):
    rows = [("tests", True, ("ok", "")), ("ladder", False, ("failed", "why"))]
    ran, found = check_up(tmp_path, None, *rows)
    assert [name for name, _ in ran] == ["ladder"]
    assert found == {"tests": ("skipped", "no GPU"), "ladder": ("failed", "why")}


def test_parts_share_the_time(tmp_path):
    rows = [("tests", True, ("timeout", "slow")), ("ladder", False, ("ok", ""))]
    ran, found = check_up(tmp_path, {"name": "H200"}, *rows)
    assert [seconds for _, seconds in ran] == [pytest.approx(30, abs=1)] * 2
    assert found["tests"] == ("timeout", "slow")
    ran, _ = check_up(tmp_path, {"name": "H200"}, *rows, share=0.2)  # what nobody wants is shared
    assert [seconds for _, seconds in ran] == [pytest.approx(30, abs=1)] * 2
    ran, _ = check_up(tmp_path, {"name": "H200"}, *rows, share=0.6)
    assert [seconds for _, seconds in ran] == [pytest.approx(36, abs=1)] * 2
    ran, found = check_up(tmp_path, {"name": "H200"}, *rows, minutes=0.1)  # less than the reserve
    assert ran == []
    assert found["ladder"] == ("skipped", "no time left")


def test_failed_tests_are_named(tmp_path):
    junit = tmp_path / "tests.xml"
    junit.write_text(
        "<testsuites><testsuite><testcase name='a'/><testcase name='b'><failure/></testcase>"
        "<testcase name='c'><error/></testcase><testcase name='d'><skipped/></testcase>"
        "</testsuite></testsuites>"
    )
    assert checkup.failed_tests(junit) == ["b", "c"]


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """A folder of programs that come before all others."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def run_in(folder):
    return checkup.Run(folder, time.monotonic() + 600, checkup.empty_result())


def test_sanitizer_findings_fail_the_part(tmp_path, programs, monkeypatch):
    monkeypatch.setattr(checkup.shutil, "which", lambda name: None)
    assert checkup.sanitizer(run_in(tmp_path), 60)[0] == "skipped"
    monkeypatch.setattr(checkup.shutil, "which", lambda name: str(programs / name))
    clean = "echo '========= ERROR SUMMARY: 0 errors'"
    executable(programs / "compute-sanitizer", clean)
    assert checkup.sanitizer(run_in(tmp_path), 60)[0] == "ok"
    faulty = f'if [ "$2" = racecheck ]; then echo "ERROR SUMMARY: 2 errors"; exit 86; fi; {clean}'
    executable(programs / "compute-sanitizer", faulty)
    status, detail = checkup.sanitizer(run_in(tmp_path), 60)
    assert status == "failed"
    assert "racecheck: failed, ERROR SUMMARY: 2 errors" in detail
    assert "memcheck: ok" in detail


def test_gpu_clocks_come_from_nvidia_smi(programs):
    executable(programs / "nvidia-smi", "echo '580.1, 1980, 1980, 3201, 700.00, [N/A]'")
    assert environment.clocks() == {
        "driver": "580.1",
        "sm_mhz": 1980,
        "sm_mhz_max": 1980,
        "memory_mhz": 3201,
        "power_limit_w": 700.0,
        "temperature_c": None,
    }
    executable(programs / "nvidia-smi", "exit 9")
    assert set(environment.clocks().values()) == {None, "unknown"}


def test_a_check_up_leaves_a_valid_result_and_a_report(tmp_path, capsys):
    """One real part in a process of its own, through to the files."""
    only = ["--only", "environment", "--only", "import_time"]
    code = checkup.main([*only, "--out", str(tmp_path), "--minutes", "2"])
    path = tmp_path / os.path.basename(capsys.readouterr().out.strip())
    assert code == 0
    result = schema.load(path)
    assert {part["name"]: part["status"] for part in result["parts"]} == {
        "environment": "ok",
        "import_time": "ok",
    }
    assert len(result["import_time"]["cuattn"]) == parts.IMPORTS
    assert "cuattn" in path.with_suffix(".md").read_text()
    assert not list(tmp_path.glob("*.part*"))


def test_compilations_end_with_their_time(monkeypatch, tmp_path):
    """A kernel of each source file, in turn; there is a result in any case."""
    compiled = []
    monkeypatch.setenv("CUATTN_CACHE_DIR", str(tmp_path))  # put back what the part sets
    monkeypatch.setattr(parts, "target", lambda: "sm_90")
    monkeypatch.setattr(inside, "load_or_compile", lambda header, *_: compiled.append(header))
    whole = parts.compile_time_part(1e9)
    files = len(set(compiled))
    assert len(set(compiled[: 2 * files])) == files  # each file once, before any a second time
    assert whole["detail"] == "" and len(whole["compile_time"]) == 2 * files
    assert {len(row["seconds"]) for row in whole["compile_time"]} == {parts.COMPILATIONS}
    late = parts.compile_time_part(-1)
    left_out = parts.COMPILATIONS * files - 1
    assert late["detail"] == f"{left_out} compilations left out: out of time"
    assert [(row["what"], len(row["seconds"])) for row in late["compile_time"]] == [
        ("cold", 1),
        ("warm", 1),
    ]


def test_without_the_software_device_the_report_has_the_reason(tmp_path, capsys, monkeypatch):
    """Its column is empty, which is no failure."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert checkup.main(["--only", "instructions", "--out", str(tmp_path), "--minutes", "2"]) == 0
    path = tmp_path / os.path.basename(capsys.readouterr().out.strip())
    result = schema.load(path)
    (part,) = result["parts"]
    assert part["status"] == "skipped" and part["detail"].startswith("no software device: ")
    assert result["instructions"] == []
    assert part["detail"][:60] in path.with_suffix(".md").read_text()


def test_a_result_can_be_resumed(tmp_path, capsys):
    result = checkup.empty_result()
    result["cells"] = [record(CELLS[0], {})]
    result["import_time"]["numpy"] = [1.0]
    row = {"name": "import_time", "status": "failed", "seconds": 1.0, "detail": "why"}
    result["parts"] = [row]
    schema.save(result, tmp_path / "earlier.json")
    resume = ["--resume", str(tmp_path / "earlier.json"), "--minutes", "2"]
    checkup.main([*resume, "--only", "import_time", "--out", str(tmp_path / "new")])
    (path,) = (tmp_path / "new").glob("*.json")
    resumed = json.loads(path.read_text())
    assert resumed["cells"] == result["cells"]
    assert resumed["import_time"]["numpy"] != [1.0]
    assert [(part["name"], part["status"]) for part in resumed["parts"]] == [("import_time", "ok")]


def test_results_of_two_commits_are_not_mixed(tmp_path, capsys):
    result = checkup.empty_result()
    result["environment"]["commit"] = "0" * 40
    schema.save(result, tmp_path / "earlier.json")
    with pytest.raises(SystemExit):
        checkup.main(["--resume", str(tmp_path / "earlier.json"), "--out", str(tmp_path)])
    assert "of another commit" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "code"), [("failed", 1), ("timeout", 1), ("skipped", 0)])
def test_the_exit_status_and_standard_error_tell(tmp_path, monkeypatch, capsys, status, code):
    part = checkup.Part("tests", False, 1.0, lambda run, seconds: (status, "why it is so"))
    monkeypatch.setattr(checkup, "PARTS", (part,))
    assert checkup.main(["--out", str(tmp_path)]) == code
    assert (f"tests: {status}: why it is so" in capsys.readouterr().err) is bool(code)
