"""Commands with a limit on their time, and benchmarks that outlive whoever hangs or crashes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from bench.checkup.parts import SKIPPED
from bench.timing.environment import ROOT
from bench.timing.measure import Journal

CONTESTANT_SECONDS = 120.0  # a contestant that takes longer hangs; torch.compile takes its time
GRACE = 10.0  # seconds that bench.timing.measure may take for the cell that it has begun


def execute(command: list[str], seconds: float, log: Path, **variables: str) -> tuple[str, str]:
    """Run a command, its output in `log`; status and the last line that it printed."""
    process = start(command, log, **variables)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        return "timeout", f"stopped after {seconds:.0f} s; {last_line(log)}"
    except BaseException:
        kill(process)
        raise
    if code < 0:
        return "crashed", f"signal {-code}; {last_line(log)}"
    return {0: "ok", SKIPPED: "skipped"}.get(code, "failed"), last_line(log)


def start(command: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a command in the checkout, in a process group of its own."""
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process: subprocess.Popen[bytes]) -> None:
    """Stop a command and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "")


def supervise(
    command: list[str],
    journal: Journal,
    seconds: float,
    log: Path,
    contestant_seconds: float = CONTESTANT_SECONDS,
    poll: float = 0.5,
) -> tuple[str, str]:
    """Run bench.timing.measure to its end, and again without whoever hung or crashed it."""
    end, blamed = time.monotonic() + seconds, []
    while (left := end - time.monotonic()) > 0:
        process = start([*command, "--seconds", str(left)], log)
        try:
            status = _watch(process, journal, end, contestant_seconds, poll)
        finally:
            kill(process)
        running = journal.running()
        if status == "ok" or (status == "timeout" and time.monotonic() >= end):
            break
        if running is None:
            return "failed", last_line(log)
        cell, contestant, _ = running
        journal.exclude(cell, contestant, "hung" if status == "timeout" else "crashed")
        blamed.append(f"{contestant} on {cell}")
    return "ok", f"hung or crashed: {', '.join(blamed) or 'none'}"


def _watch(process, journal, end: float, contestant_seconds: float, poll: float) -> str:
    """Wait for a process: "ok", "crashed", or "timeout" if it or a contestant takes too long."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return "ok" if process.wait(timeout=poll) == 0 else "crashed"
        running = journal.running()
        if running is not None and time.time() - running[2] > contestant_seconds:
            return "timeout"
        if time.monotonic() > end + GRACE:  # it begins no cell after `end`
            return "timeout"
