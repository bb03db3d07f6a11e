"""Memory accesses and exponentials per element: algorithms of arXiv:1805.02867, and cuattn.

    python -m bench.counted.ladder [--json FILE] [--readme]

Everything runs on the emulator, is checked against float64, and is counted there: no number is
typed. An access is a read or a write of one element's size by a thread; what a top-k returns and
what the merges of threads cost are part of the count.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import bench
import cuattn
from bench import baselines
from bench.report import markdown as report
from bench.report import tables as report_tables

ARCH = "sm_90"
K = 5  # of the paper
SHAPES = ((8, 4096), (2, 65_536))  # rows, columns; README shows the first
README = Path(bench.__file__).resolve().parent / "README.md"


class Step(NamedTuple):
    """A rung of the ladder: what it calls, and the kernel in bench/baselines, None for cuattn."""

    algorithm: str
    group: str  # "softmax", or "softmax+topk": the call takes k, too
    call: Callable[..., Any]
    kernel: str | None
    note: str


def steps() -> list[Step]:
    """All rungs, from the definition to cuattn."""
    softmax, both = "softmax", "softmax+topk"
    return [
        Step("naive softmax", softmax, baselines.naive_softmax, "naive_softmax", "algorithm 1"),
        Step("safe softmax", softmax, baselines.safe_softmax, "safe_softmax", "algorithm 2"),
        Step("online softmax", softmax, baselines.online_softmax, "online_softmax", "algorithm 3"),
        Step("cuattn.softmax", softmax, cuattn.softmax, None, "algorithm 3, the row in registers"),
        Step(
            f"safe softmax, then top-{K}",
            both,
            baselines.safe_softmax_topk,
            "topk",
            "algorithm 2, then a kernel that reads its result",
        ),
        Step(
            f"online softmax with top-{K}",
            both,
            baselines.online_softmax_topk,
            "online_softmax_topk",
            "algorithm 4",
        ),
        Step("cuattn.softmax_topk", both, cuattn.softmax_topk, None, "algorithm 4, tile by tile"),
    ]


def run(step: Step, x: np.ndarray) -> tuple[Any, Any, str]:
    """The result of a rung on the emulator, what it cost, and the file of its last kernel."""
    import emulator

    arguments = (x,) if step.group == "softmax" else (x, K)
    if step.kernel is not None:
        with baselines.emulated(ARCH) as device:
            result = step.call(*arguments)
        counters = sum(device.counters, emulator.Counters())
        return result, counters, f"bench/baselines/{step.kernel}.cuh"
    with emulator.activate(ARCH) as runtime:
        result = step.call(*arguments)
    return result, runtime.total(), f"cuda_src/{runtime.kernels[-1].header}"


def check(step: Step, x: np.ndarray, result: Any) -> None:
    """Raise AssertionError unless a rung's result is right."""
    expected = cuattn.reference.softmax(x)
    if step.group == "softmax":
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-7)
        return
    values, indices = result[:2]
    largest = -np.sort(-expected, axis=-1)[:, : indices.shape[1]]
    np.testing.assert_allclose(values, largest, rtol=1e-5, atol=1e-7)
    chosen = np.take_along_axis(expected, indices.astype(np.int64), axis=-1)
    np.testing.assert_allclose(chosen, largest, rtol=1e-5)


def overflows(step: Step) -> bool:
    """Whether one element beyond the range of float32's exponential spoils the row."""
    x = np.zeros((1, 64), np.float32)
    x[0, 7] = 100
    result, _, _ = run(step, x)
    values = result if step.group == "softmax" else result[0]
    return not np.isfinite(values).all()


def count(rows: int, cols: int, seed: int = 0) -> list[dict[str, Any]]:
    """The rungs on random float32 rows: entries of `ladder` in RESULT.json."""
    x = np.random.default_rng(seed).standard_normal((rows, cols), np.float32)
    ladder = []
    for step in steps():
        result, counters, file = run(step, x)
        check(step, x, result)
        reads = counters.global_bytes_read / x.nbytes
        writes = counters.global_bytes_written / x.nbytes
        ladder.append(
            {
                "algorithm": step.algorithm,
                "file": file,
                "ours": step.kernel is None,
                "group": step.group,
                "rows": rows,
                "cols": cols,
                "reads": reads,
                "writes": writes,
                "accesses": reads + writes,
                "exponentials": counters.exps / x.size,
                "overflows": overflows(step),
                "note": step.note,
            }
        )
    return ladder


def update_readme(text: str) -> str:
    """README with a newly counted table between its markers."""
    counted = count(*SHAPES[0])
    return report.update_readme(text, {"ladder": report_tables.ladder_table(counted)})


def main() -> None:
    """Print the tables, and write them where asked to."""
    parser = argparse.ArgumentParser(prog="python -m bench.counted.ladder", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts, too")
    parser.add_argument(
        "--readme", action="store_true", help="write the table of bench/README.md anew"
    )
    arguments = parser.parse_args()
    ladder = [row for shape in SHAPES for row in count(*shape)]
    print(report_tables.ladder_table(ladder))
    if arguments.json:
        arguments.json.write_text(json.dumps(ladder, indent=1) + "\n", encoding="utf-8")
    if arguments.readme:
        updated = update_readme(README.read_text(encoding="utf-8"))
        README.write_text(updated, encoding="utf-8")


if __name__ == "__main__":
    main()
