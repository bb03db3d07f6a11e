"""All cells in the order of their priority, each appended to a journal as soon as it is measured.

    python -m bench.timing.measure --journal FILE [--seconds N] [--only REGEX]

A cell is a line of JSON. The file FILE.running names the cell and contestant at work, so that
whoever watches this process (bench.checkup) knows whom to blame if it hangs or dies, and can start
it again: cells in the journal are not measured again, and neither is a contestant that
FILE.excluded lists.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import baselines, grids, inside, peers
from bench.peers._cupy import Cupy
from bench.timing import analysis, harness
from bench.timing.device import CudaDevice

CELL_SECONDS = 1.0  # of timing, for all contestants together
PAPER = {  # grid to the paper's own algorithms on it, by their names in bench/counted/ladder.py
    "paper": {
        "safe softmax": baselines.safe_softmax,
        "online softmax": baselines.online_softmax,
    },
    "paper-topk": {
        "safe softmax, then top-{k}": baselines.safe_softmax_topk,
        "online softmax with top-{k}": baselines.online_softmax_topk,
    },
}


class Journal:
    """What has been measured, what is being measured, and who must not run again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._running = path.with_name(f"{path.name}.running")
        self._excluded = path.with_name(f"{path.name}.excluded")

    def cells(self) -> list[dict[str, Any]]:
        """Measured cells; a line that a dying process left half written is dropped."""
        found = []
        for line in self._lines(self._path):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found

    def append(self, cell: dict[str, Any]) -> None:
        """Add a cell; it is on disk when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps(cell, allow_nan=False) + "\n")

    def begin(self, cell: str, contestant: str) -> None:
        """Note who is at work."""
        self._running.write_text(json.dumps([cell, contestant]))

    def end(self) -> None:
        """Note that nobody is at work."""
        self._running.unlink(missing_ok=True)

    def running(self) -> tuple[str, str, float] | None:
        """Cell, contestant and the time (of time.time) at which it began to work."""
        try:
            cell, contestant = json.loads(self._running.read_text())
            return cell, contestant, self._running.stat().st_mtime
        except (OSError, ValueError):
            return None

    def exclude(self, cell: str, contestant: str, status: str) -> None:
        """Never run this contestant on this cell again."""
        with self._excluded.open("a") as file:
            file.write(json.dumps([cell, contestant, status]) + "\n")
        self.end()

    def excluded(self) -> dict[str, dict[str, str]]:
        """Cell to contestant to status."""
        found: dict[str, dict[str, str]] = {}
        for cell, contestant, status in map(json.loads, self._lines(self._excluded)):
            found.setdefault(cell, {})[contestant] = status
        return found

    @staticmethod
    def _lines(path: Path) -> list[str]:
        return path.read_text().splitlines() if path.exists() else []


def key_of(cell: dict[str, Any]) -> str:
    """The name of a measured cell."""
    sizes = tuple(cell["shape"].items())
    found = grids.Cell(cell["operation"], cell["grid"], cell["dtype"], sizes, cell["priority"])
    return found.key


def operations() -> dict[str, harness.Operation]:
    """Operations of all benchmark files."""
    found: dict[str, harness.Operation] = {}
    for path in sorted(Path(__file__).resolve().parents[1].glob("bench_*.py")):
        module = importlib.import_module(f"bench.{path.stem}")
        found.update(getattr(module, "OPERATIONS", {}))
    return found


def others(cell: grids.Cell, operation: harness.Operation) -> list[peers.Contestant]:
    """Everyone else: what is installed, what the operation itself brings and, on the paper's
    shapes, the paper's own kernels."""
    found = []
    if cell.operation in peers.OPERATIONS:
        found += peers.contestants(cell.operation, **operation.options(cell))
    calls = dict(operation.others)
    for name, kernel in PAPER.get(cell.grid, {}).items():
        calls["paper: " + name.format(**cell.shape)] = kernel
    for name, call in calls.items():
        bound = functools.partial(call, **operation.options(cell))
        found.append(peers.Contestant(name, Cupy(), bound))
    return found


def measure_cell(
    cell: grids.Cell,
    operation: harness.Operation,
    device: Any,
    journal: Journal | None = None,
) -> dict[str, Any]:
    """Measure one cell against all peers."""

    def note(contestant: str) -> None:
        if journal is not None:
            journal.begin(cell.key, contestant)

    ours = functools.partial(operation.ours, **operation.options(cell))
    record = harness.measure(
        cell,
        operation,
        peers.Contestant(analysis.OURS, Cupy(), ours),
        others(cell, operation),
        device,
        seconds=CELL_SECONDS,
        plan=inside.launched,
        note=note,
        excluded={} if journal is None else journal.excluded().get(cell.key, {}),
    )
    if journal is not None:
        journal.append(record)
        journal.end()
    return record


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.timing.measure", description=__doc__)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell later")
    parser.add_argument("--only", default="", help="regular expression on the name of a cell")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    journal = Journal(arguments.journal)
    done = {key_of(cell) for cell in journal.cells()}
    table = operations()
    cells = [cell for cell in grids.cells(table) if re.search(arguments.only, cell.key)]
    device = CudaDevice()
    todo = [cell for cell in cells if cell.key not in done]
    with tqdm(todo, unit="cell", file=sys.stderr) as bar:
        for cell in bar:
            if time.monotonic() > end:
                break
            measure_cell(cell, table[cell.operation], device, journal)
    print(f"{len(journal.cells())} of {len(cells)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
