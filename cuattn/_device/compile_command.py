"""``python -m cuattn compile``: the kernels of common calls, compiled into the cache.

For an image that runs without a compiler, or without waiting for it. It needs no GPU and no driver.
For calls of other shapes there is `cuattn.compile`.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from cuattn._device import recorder
from cuattn._device.directories import cache_directories
from cuattn._device.kernel import Kernel, Limits
from cuattn._device.presets import PRESETS

DTYPES = "float16", "bfloat16", "float32", "float64"
Task = tuple[Kernel, int]  # compute capability


def main(arguments: list[str]) -> int:
    """Exit code 1 if the cache cannot be written, or a kernel not be compiled."""
    parser = argparse.ArgumentParser(prog="python -m cuattn compile", description=__doc__)
    several = "or several, with commas in between"
    parser.add_argument(
        "--arch", type=words, required=True, help=f"90 or sm_90: a compute capability, {several}"
    )
    parser.add_argument(
        "--preset",
        type=words,
        default=[*PRESETS],
        help=f"{', '.join(PRESETS)}, {several} (default: all)",
    )
    parser.add_argument(
        "--dtype",
        type=words,
        default=[*DTYPES[:3]],
        help=f"{', '.join(DTYPES)}, {several} (default: all but the last)",
    )
    parser.add_argument("--num-sms", type=int, help="multiprocessors (default: of a common GPU)")
    parser.add_argument("--jobs", type=int, default=_cpus(), help="processes (default: CPUs)")
    options = parser.parse_args(arguments)
    for option, choices in (("preset", [*PRESETS]), ("dtype", [*DTYPES])):
        for word in getattr(options, option):
            if word not in choices:
                parser.error(f"--{option} must be of {', '.join(choices)}, but it is {word}")
    try:
        limits = [recorder.limits_of(arch, options.num_sms) for arch in options.arch]
    except ValueError as error:
        parser.error(str(error))
    tasks = list(found(limits, options.preset, options.dtype))
    print(f"{len(tasks)} kernels into {os.pathsep.join(map(str, cache_directories()))}", flush=True)
    began, unkept = time.perf_counter(), 0
    for number, (task, seconds, path) in enumerate(_compiled(tasks, options.jobs), 1):
        unkept += path is None
        kernel, capability = task
        target = f"sm_{capability}{kernel.suffix}"
        print(f"[{number}/{len(tasks)}] {target} {seconds:5.1f} s  {kernel.name}", flush=True)
    print(f"{len(tasks) - unkept} kernels in the cache, {time.perf_counter() - began:.0f} s")
    return 1 if unkept else 0


def words(text: str) -> list[str]:
    """Of a list with commas."""
    return [word.strip() for word in text.split(",")]


def found(limits: Iterable[Limits], presets: list[str], dtypes: list[str]) -> Iterator[Task]:
    """The kernels of presets on some GPUs."""
    cuattn: Any = importlib.import_module("cuattn")
    for one in limits:
        with recorder.recording(one) as recorded:
            for name in dtypes:
                dtype = _dtype(name)
                for preset in presets if dtype is not None else ():
                    PRESETS[preset](cuattn, dtype)
        for kernel in recorded.kernels.values():
            yield kernel, one.compute_capability


def _dtype(name: str) -> Any:
    """None of bfloat16 where nobody can make arrays of it."""
    if name != "bfloat16":
        return np.dtype(name)
    with contextlib.suppress(ImportError):
        return np.dtype(importlib.import_module("ml_dtypes").bfloat16)
    return None


def _cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _compiled(tasks: list[Task], jobs: int) -> Iterator[tuple[Task, float, Any]]:
    """Tasks with their seconds and files, in their order. Threads would wait for each other: NVRTC
    compiles one program at a time.
    """
    if jobs <= 1 or len(tasks) < 2:
        yield from map(_compile, tasks)
        return
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(min(jobs, len(tasks)), get_context("spawn")) as pool:
        yield from pool.map(_compile, tasks)


def _compile(task: Task) -> tuple[Task, float, Any]:
    began = time.perf_counter()
    path, _ = recorder.load(*task)
    return task, time.perf_counter() - began, path
