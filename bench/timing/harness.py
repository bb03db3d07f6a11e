"""One cell: every contestant is verified first, then all are timed in turn, cold and warm.

*Cold* is with nothing of the operands in L2, *warm* right after the same call on the same operands.
A sample is device time between two events, divided by the calls between them; the host has a head
start, so that its own time stays out. Calls shorter than `SHORT` are replayed from a CUDA graph,
many to a sample, each on operands of its own where the sample is cold. A library that cannot
enqueue on our stream is timed by the host's clock, its dispatch included, and marked so.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from bench.grids import Cell
from bench.peers import Contestant, Unsupported
from bench.timing.verification import Sample, WrongResult, verify_ours, verify_peer

SHORT = 20e-6  # seconds: below it, launches are replayed from a graph
SAMPLE = 400e-6  # seconds that a sample of short calls takes
MOST_CALLS = 64  # of one sample
ROUNDS = (5, 50)  # at least, at most


class Work(NamedTuple):
    """What a call has to do at least, and how that is counted."""

    bytes: int
    flops: int
    formula: str


@dataclass(frozen=True)
class Operation:
    """What is benchmarked: operands, our call, the truth, the least work."""

    ceiling: str  # of the device, that its rate is a percentage of
    inputs: Callable[[Cell, Any, np.random.Generator], tuple[Any, ...]]
    ours: Callable[..., Any]  # operands, `options`, and out= where it is to be verified
    samples: Callable[[Cell, tuple[Any, ...], Callable[[Any], np.ndarray]], list[Sample]]
    work: Callable[[Cell], Work]
    result: Callable[[Cell], tuple[int, ...]] | None  # shape of `out`, if our call has that
    dtype: Callable[[Cell], str] = field(default=lambda cell: cell.dtype)  # of `out`
    options: Callable[[Cell], dict[str, Any]] = field(default=lambda cell: {})  # such as k
    predicted: Callable[[Cell, list[Any]], float | None] | None = None  # seconds of our kernels
    others: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # on CuPy's arrays


class DeviceLost(RuntimeError):
    """A contestant left the device unusable: this process cannot go on."""


def measure(
    cell: Cell,
    operation: Operation,
    ours: Contestant,
    peers: Sequence[Contestant],
    device: Any,
    *,
    seconds: float,
    plan: Callable[[], contextlib.AbstractContextManager[list[Any]]],
    note: Callable[[str], None] = lambda name: None,
    excluded: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Measure one cell.

    Parameters
    ----------
    cell, operation
        What to measure.
    ours, peers
        The contestants; the ratios of the cell are against `ours`.
    device
        `bench.timing.device.CudaDevice`, or what stands for it in a test.
    seconds
        To be spent on timing; a round that has begun is finished.
    plan
        Context manager that lists the kernels of our call.
    note
        Is told the name of each contestant before it runs: whoever hangs or crashes is known.
    excluded
        Contestants that are not run again, and the status ("hung" or "crashed") that they earned.

    Returns
    -------
    dict
        A cell of a result file, see bench/report/schema.json.
    """
    entries = [_entry(contestant, excluded) for contestant in (ours, *peers)]
    runners: list[tuple[dict[str, Any], Runner]] = []
    with device.current():
        for contestant in (ours, *peers):
            contestant.library.release()
        if entries[0]["status"] == "ok":
            note(ours.name)
            with _failures_into(entries[0], device):
                inputs = operation.inputs(cell, device.xp, np.random.default_rng())
                samples = operation.samples(cell, inputs, ours.library.asnumpy)
        for contestant, entry in zip((ours, *peers), entries, strict=True):
            if entries[0]["status"] != "ok":
                del entries[1:]  # nothing to compare with
                break
            if entry["status"] != "ok":
                continue
            note(contestant.name)
            with _failures_into(entry, device), contestant.library.on_stream(device.stream):
                native = tuple(contestant.library.asarray(array) for array in inputs)
                if contestant is ours:
                    verify_ours(entry, operation, cell, ours, native, samples, device, plan)
                else:
                    verify_peer(entry, contestant, native, samples)
                entry["peak_bytes"] = contestant.library.peak_bytes(
                    lambda call=contestant.call, native=native: call(*native)
                )
                runner = Runner(device, contestant, inputs, note)
                entry["clock"] = runner.clock
                runners.append((entry, runner))
        _time(runners, device, seconds)
    for entry in entries:
        if entry["status"] != "ok":
            entry.update(clock=None, cold=[], warm=[])
    return {
        "operation": cell.operation,
        "grid": cell.grid,
        "shape": cell.shape,
        "dtype": cell.dtype,
        "priority": cell.priority,
        "work": operation.work(cell)._asdict(),
        "ceiling": operation.ceiling,
        "contestants": entries,
    }


def _entry(contestant: Contestant, excluded: Mapping[str, str]) -> dict[str, Any]:
    unknown = dict.fromkeys(("plan", "max_error", "allowed_error", "clock", "peak_bytes"))
    status = excluded.get(contestant.name, "ok")
    return {
        "name": contestant.name,
        "status": status,
        "detail": "",
        "cold": [],
        "warm": [],
    } | unknown


@contextlib.contextmanager
def _failures_into(entry: dict[str, Any], device: Any) -> Iterator[None]:
    """Turn an exception of a contestant into its status: the others go on, if the device does."""
    try:
        yield
    except Unsupported as error:
        entry.update(status="unsupported", detail=str(error))
    except WrongResult as error:
        entry.update(status="wrong", detail=str(error))
    except Exception as error:  # libraries raise what they like
        first_line = str(error).strip().partition("\n")[0][:300]
        entry.update(status="failed", detail=f"{type(error).__name__}: {first_line}")
        try:
            device.synchronize()
        except Exception as lost:
            raise DeviceLost(f"after {entry['name']}: {first_line}") from lost


class Runner:
    """A contestant, ready to be timed."""

    def __init__(self, device: Any, contestant: Contestant, inputs, note) -> None:
        self._device, self._contestant, self._note = device, contestant, note
        library = contestant.library
        self.clock = library.clock
        native = tuple(library.asarray(array) for array in inputs)
        once = [native]
        for _ in range(2):  # compiled and allocated, and then as fast as it gets
            estimate, self._host_seconds = self._enqueue(self._plain(once))
        free, size = device.free_bytes(), sum(array.nbytes for array in inputs)
        self._large = 16 * size > free  # the caches of all contestants may not fit side by side
        calls = 1
        if estimate < SHORT:
            most = min(MOST_CALLS, free // 4 // size)
            calls = max(1, min(math.ceil(SAMPLE / max(estimate, 1e-7)), most))
        self._calls = calls
        copies = [tuple(map(_copied, inputs)) for _ in range(calls - 1)]
        operands = once + [tuple(map(library.asarray, copy)) for copy in copies]
        self._operands = operands  # a graph has no part in their memory
        self._cold, self._warm = self._plain(operands), self._plain(once * calls)
        if calls > 1 and self.clock == "events":
            # A library whose call cannot be captured is launched call by call.
            with contextlib.suppress(Exception):
                graphs = [library.capture(run, device.stream) for run in (self._cold, self._warm)]
                self._cold, self._warm = graphs
                self.clock = "graph"
        device.synchronize()
        _, self._host_seconds = self._enqueue(self._cold)

    def sample(self, cold: bool) -> float:
        """Seconds of device time per call."""
        self._note(self._contestant.name)
        run = self._cold if cold else self._warm
        with self._contestant.library.on_stream(self._device.stream):
            run()  # what it allocates is there, and in a warm cache its operands
            seconds = self._timed(run, cold)
        if self._large and not cold:  # the last of its turn
            self._contestant.library.release()
        return seconds / self._calls

    def _plain(self, operands: list[tuple[Any, ...]]) -> Callable[[], Any]:
        call = self._contestant.call

        def run() -> list[Any]:  # all results live: none is written to memory that is hot
            return [call(*arrays) for arrays in operands]

        return run

    def _enqueue(self, run: Callable[[], Any]) -> tuple[float, float]:
        """Device and host seconds of `run`, with nothing prepared."""
        self._device.synchronize()
        start, began = self._device.mark(), time.perf_counter()
        result = run()
        enqueued = time.perf_counter() - began
        if self.clock == "host":
            self._contestant.library.wait(result)
            return time.perf_counter() - began, enqueued
        return self._device.seconds(start, self._device.mark()), enqueued

    def _timed(self, run: Callable[[], Any], cold: bool) -> float:
        device = self._device
        if self.clock == "host":
            if cold:
                device.flush()
            device.synchronize()
            began = time.perf_counter()
            self._contestant.library.wait(run())
            return time.perf_counter() - began
        device.delay(2 * self._host_seconds + 20e-6)
        if cold:
            device.flush()
        start = device.mark()
        run()
        return device.seconds(start, device.mark())


def _copied(array: Any) -> Any:
    """A copy; CuPy views floats of 8 bits, but makes no arrays of them."""
    if array.dtype.name == "float8_e4m3fn":
        return array.view(np.uint8).copy(order="K").view(array.dtype)
    return array.copy(order="K")


def _time(runners: list[tuple[dict[str, Any], Runner]], device: Any, seconds: float) -> None:
    """Rounds in which every contestant has one cold and one warm sample, each round in turn."""
    least, most = ROUNDS
    end = time.perf_counter() + seconds
    for done in range(most):
        if done >= least and time.perf_counter() > end:
            break
        turn = done % max(1, len(runners))
        for entry, runner in runners[turn:] + runners[:turn]:
            if entry["status"] == "ok":
                with _failures_into(entry, device):
                    for state in ("cold", "warm"):
                        entry[state].append(runner.sample(state == "cold"))
