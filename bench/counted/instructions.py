"""How many instructions every regime of the plans executes: of the PTX that NVRTC made.

    SOFTWARE_DEVICE_CC=90 python tests/software_device -m bench.counted.instructions [--json FILE]

The calls of `bench.counted.counters` on CuPy arrays, on the software device, so that no GPU is
needed. An instruction that a warp runs counts as 32, whatever lanes take part: that is what it
costs a multiprocessor. Divided by elements, or by the scores of attention; by kind as in
tests/software_device/counters.py. What spins on an mbarrier counts every turn that it takes there,
which is not those of a GPU. ptxas makes fewer or more of each, in the same loops.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import bench
from bench import inside
from bench.counted import counters
from bench.report import tables as report_tables

ROOT = Path(bench.__file__).resolve().parents[1]
LANES = 32


class NoDevice(Exception):
    """The software device cannot be had on this machine."""


def count(
    archs: tuple[str, ...] = ("sm_80", "sm_90"), seconds: float = float("inf")
) -> tuple[list[dict[str, Any]], int]:
    """The `instructions` of a result, and how many calls are left out: there was no time.

    Each architecture is a process of its own, in which CuPy finds the software device.

    Raises
    ------
    NoDevice
        With the reason.
    """
    found, left_out = [], 0
    end = time.time() + seconds
    for number, arch in enumerate(archs):
        until = time.time() + (end - time.time()) / (len(archs) - number)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rows.json"
            command = [sys.executable, "tests/software_device", "-m", "bench.counted.instructions"]
            command += ["--json", str(file), "--until", str(until)]
            settings = {"CC": arch.removeprefix("sm_"), "SMS": str(counters.NUM_SMS)}
            variables = {f"SOFTWARE_DEVICE_{key}": value for key, value in settings.items()}
            environment = {**os.environ, **variables}
            done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
            message = done.stderr.decode(errors="replace")
            _, is_missing, reason = message.partition("no software device: ")
            if done.returncode and is_missing:
                raise NoDevice(" ".join((is_missing + reason).split()))
            if done.returncode:
                raise RuntimeError(f"counting the instructions of {arch} fails: {message}")
            rows, missing = json.loads(file.read_text())
        found += rows
        left_out += missing
    return found, left_out


def count_cases(
    device: Any, cases: Iterable[counters.Case], until: float = float("inf")
) -> list[dict[str, Any]]:
    """Rows of calls, on the device of this process; none that begins after the time `until`."""
    import cupy

    arch = f"sm_{cupy.cuda.Device().compute_capability}"
    rows = []
    for case in cases:
        if time.time() > until:
            break
        with inside.launched() as kernels, device.counters() as counted:
            case.call(cupy.asarray)
        per_score = LANES / case.scores
        rows.append(
            {
                **case.where(arch),
                "kernels": [kernel.name for kernel in kernels],
                "instructions": counted.warp_instructions * per_score,
                "kinds": {kind: n.warps * per_score for kind, n in sorted(counted.kinds.items())},
            }
        )
    return rows


def main() -> None:
    """Print the table, or write the rows."""
    parser = argparse.ArgumentParser(
        prog="python tests/software_device -m bench.counted.instructions", description=__doc__
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows, print nothing")
    parser.add_argument("--until", type=float, default=float("inf"), help="a time since the epoch")
    arguments = parser.parse_args()
    software_device = sys.modules.get("software_device")
    if software_device is None or software_device.device is None:
        parser.error("run it on the software device: see its usage")
    cases = counters.row_cases() + counters.attention_cases()
    rows = count_cases(software_device.device, cases, arguments.until)
    if arguments.json:
        arguments.json.write_text(json.dumps([rows, len(cases) - len(rows)]))
    else:
        print(report_tables.instructions_table(rows))


if __name__ == "__main__":
    main()
