"""The parts of a check-up that are Python of ours, each a process.

    python -m bench.checkup.parts NAME OUT [--seconds N]

A part writes the keys of a result (bench/report/schema.json) that it has measured into the file
OUT, and what else is to be said as `detail`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench.timing import environment

ROOT = environment.ROOT
MOST_SAMPLES = 200  # of one benchmark that makes many thousands
IMPORTS = 9  # fresh processes
COMPILATIONS = 3  # of a kernel
SKIPPED = 77  # exit status, as automake's tests have it


class Skipped(Exception):
    """This machine does not have what a part needs."""


def target() -> str:
    """What kernels are compiled for on this machine; sm_90 where there is no GPU."""
    from bench import inside

    if environment.nvrtc() is None:
        raise Skipped("no NVRTC: pip install 'cuattn[cuda13x]' (or cuda12x)")
    gpu = environment.gpu()
    return inside.architecture(gpu["compute_capability"]) if gpu else "sm_90"


def environment_part() -> dict[str, Any]:
    """Machine and peers."""
    from bench import peers

    found, missing = peers.find()
    return {"environment": environment.facts(), "peers": {"found": found, "missing": missing}}


def ceilings_part() -> dict[str, Any]:
    """Ceilings of the device, and its clocks while it is busy."""
    from bench.timing import ceilings
    from bench.timing.device import CudaDevice

    measured = ceilings.measure(CudaDevice())
    facts = environment.facts()
    return {"ceilings": measured, "environment": facts}


def ladder_part() -> dict[str, Any]:
    """The paper's ladder, counted."""
    from bench.counted import ladder

    return {"ladder": [row for shape in ladder.SHAPES for row in ladder.count(*shape)]}


def counters_part() -> dict[str, Any]:
    """Traffic of every regime, counted."""
    from bench.counted import counters

    return {"counters": counters.count() + counters.count_attention()}


def instructions_part(seconds: float) -> dict[str, Any]:
    """Executed instructions of every regime, counted on the software device."""
    from bench.counted import instructions

    try:
        rows, left_out = instructions.count(seconds=seconds)
    except instructions.NoDevice as reason:
        raise Skipped(str(reason)) from None
    return {
        "instructions": rows,
        "detail": f"{left_out} calls left out: out of time" * bool(left_out),
    }


def kernels_part(seconds: float) -> dict[str, Any]:
    """Registers, instructions and predicted bound of every kernel."""
    from bench.compiled import kernel_report

    rows, left_out = kernel_report.report([target()], limit_seconds=seconds)
    return {
        "kernels": rows,
        "detail": f"{len(left_out)} kernels left out: out of time" * bool(left_out),
    }


def host_cost_part() -> dict[str, Any]:
    """Python's time of a warm call, launch stubbed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "host.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["bench/bench_host_cost.py", "--benchmark-only", "--benchmark-max-time=0.2"]
        command += ["--benchmark-columns=median", f"--benchmark-json={report}"]
        subprocess.run(command, cwd=ROOT, check=True)
        benchmarks = json.loads(report.read_text())["benchmarks"]
    found = []
    for benchmark in benchmarks:
        data = benchmark["stats"]["data"]
        step = -(-len(data) // MOST_SAMPLES)
        found.append({"name": benchmark["params"]["name"], "seconds": data[::step]})
    return {"host_cost": found}


def compile_time_part(seconds: float) -> dict[str, Any]:
    """Compilation of one kernel, cold, and what a process pays that finds it in the disk cache.

    One kernel of each source file; each in turn, so that what time allows is of as many as can be.
    """
    from bench import inside

    arch, end = target(), time.monotonic() + seconds
    first: dict[str, Any] = {}  # of each source file
    for kernel in inside.kernels(inside.TARGETS[arch]).values():
        first.setdefault(kernel.header, kernel)
    times: dict[str, dict[str, list[float]]] = {}
    left_out = 0
    for kernel in COMPILATIONS * list(first.values()):
        if times and time.monotonic() > end:
            left_out += 1
            continue
        samples = times.setdefault(kernel.header, {"cold": [], "warm": []})
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CUATTN_CACHE_DIR"] = folder
            for state in ("cold", "warm"):
                began = time.perf_counter()
                arch_of = arch + kernel.suffix
                inside.load_or_compile(kernel.header, kernel.name, arch_of, kernel.text)
                samples[state].append(time.perf_counter() - began)
    found = [
        {"what": state, "kernel": first[header].name, "arch": arch + first[header].suffix,
         "seconds": samples}
        for header, states in times.items()
        for state, samples in states.items()
    ]  # fmt: skip
    detail = f"{left_out} compilations left out: out of time" * bool(left_out)
    return {"compile_time": found, "detail": detail}


def import_time_part() -> dict[str, Any]:
    """`import numpy`, and `import cuattn` after it, in fresh processes."""
    script = (
        "import time; a = time.perf_counter(); import numpy; b = time.perf_counter(); "
        "import cuattn; print(b - a, time.perf_counter() - b)"
    )
    times: dict[str, list[float]] = {"numpy": [], "cuattn": []}
    for _ in range(IMPORTS):
        command = [sys.executable, "-c", script]
        printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        for name, seconds in zip(times, printed.stdout.split(), strict=True):
            times[name].append(float(seconds))
    return {"import_time": times}


PARTS = {
    "environment": environment_part,
    "ceilings": ceilings_part,
    "ladder": ladder_part,
    "counters": counters_part,
    "instructions": instructions_part,
    "kernels": kernels_part,
    "host_cost": host_cost_part,
    "compile_time": compile_time_part,
    "import_time": import_time_part,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.checkup.parts", description=__doc__)
    parser.add_argument("name", choices=PARTS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=240, help="for parts that can stop early")
    arguments = parser.parse_args()
    part: Any = PARTS[arguments.name]
    try:
        timed = part in (compile_time_part, kernels_part, instructions_part)
        fragment = part(arguments.seconds) if timed else part()
    except Skipped as reason:
        print(reason)
        return SKIPPED
    arguments.out.write_text(json.dumps(fragment, allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
