"""On what a result was measured: GPU and its clocks, driver, packages, commit."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

# Name in a result -> distributions, of which at most one is installed.
PACKAGES = {
    "cuattn": ("cuattn",),
    "numpy": ("numpy",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "ml_dtypes": ("ml_dtypes",),
    "pytest-benchmark": ("pytest-benchmark",),
}

# Field of nvidia-smi -> (key of a result, conversion).
SMI = {
    "driver_version": ("driver", str),
    "clocks.sm": ("sm_mhz", int),
    "clocks.max.sm": ("sm_mhz_max", int),
    "clocks.mem": ("memory_mhz", int),
    "power.limit": ("power_limit_w", float),
    "temperature.gpu": ("temperature_c", int),
}


def facts() -> dict[str, Any]:
    """The `environment` of a result."""
    status = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    now = datetime.datetime.now(datetime.timezone.utc)
    return {
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "commit": (_output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "").strip() or None,
        "dirty": None if status is None else bool(status.strip()),
        "gpu": gpu(),
        "cpu": _cpu(),
        "cores": _cores(),
        "python": platform.python_version(),
        "packages": {name: _version(*names) for name, names in PACKAGES.items()}
        | {"nvrtc": nvrtc()},
    }


def gpu() -> dict[str, Any] | None:
    """The current CUDA device; None where there is none."""
    try:
        import cupy

        runtime = cupy.cuda.runtime
        if runtime.getDeviceCount() == 0:
            return None
        properties = runtime.getDeviceProperties(runtime.getDevice())
    except Exception:  # no CuPy, no driver, no device: each its own class
        return None
    return {
        "name": properties["name"].decode(),
        "compute_capability": 10 * properties["major"] + properties["minor"],
        "num_sms": properties["multiProcessorCount"],
        "memory_bytes": properties["totalGlobalMem"],
        "l2_bytes": properties["l2CacheSize"],
        "cuda": _cuda_version(runtime.runtimeGetVersion()),
        **clocks(),
    }


def clocks() -> dict[str, Any]:
    """What nvidia-smi says of the first GPU now: driver, clocks in MHz, watts, degrees Celsius."""
    query = ("--id=0", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader,nounits")
    printed = _output("nvidia-smi", *query) or ""
    found = next(csv.reader([printed.strip()], skipinitialspace=True), [])
    values: dict[str, Any] = {key: None for key, _ in SMI.values()}
    values["driver"] = "unknown"
    for text, (key, convert) in zip(found, SMI.values(), strict=False):
        try:
            values[key] = convert(text)
        except ValueError:  # "[N/A]"
            continue
    return values


def nvrtc() -> str | None:
    """Version of the run-time compiler."""
    try:
        from cupy.cuda import nvrtc

        return ".".join(map(str, nvrtc.getVersion()))
    except (ImportError, RuntimeError):
        return None


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _version(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
