"""How pytest-benchmark shows what the harness measured.

The harness times all contestants of a cell in turn, on the device's clock, when the first of them
is asked for. Each benchmark then replays the samples of one contestant in one cache state, so that
statistics, groups, comparison and JSON are pytest-benchmark's own.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bench import grids
from bench.timing import analysis, ceilings, environment, measure
from bench.timing.device import CudaDevice

STATES = ("cold", "warm")


class ReplayClock:
    """A timer that moves on by one recorded sample each time a benchmark runs."""

    __name__ = "device_clock"  # pytest-benchmark shows it

    def __init__(self) -> None:
        self._now, self._samples = 0.0, iter(())

    def __call__(self) -> float:
        return self._now

    def load(self, samples: list[float]) -> None:
        """What the next runs will seem to take, in seconds."""
        self._samples = iter(samples)

    def advance(self) -> None:
        """Let the next sample pass."""
        self._now += next(self._samples)


CLOCK = ReplayClock()


class Measured:
    """One contestant of a cell in one cache state."""

    def __init__(self, cell: dict[str, Any], name: str, state: str, result: dict[str, Any]) -> None:
        self._cell, self._name, self._state, self._result = cell, name, state, result

    def replay(self, benchmark: Any) -> None:
        """Hand the samples to pytest-benchmark; without any, fail if it is cuattn, else skip."""
        entry = analysis.entry(self._cell, self._name)
        if entry is None or entry["status"] != "ok":
            why = f"{entry['status']}: {entry['detail']}" if entry else "not measured"
            (pytest.fail if self._name == analysis.OURS else pytest.skip)(why)
        of = (self._cell, self._name, self._state)
        benchmark.extra_info.update(
            {key: entry[key] for key in ("plan", "max_error", "allowed_error", "clock")},
            formula=self._cell["work"]["formula"],
            rate=analysis.rate(*of),
            rate_predicted_by_model=analysis.predicted_rate(self._cell, self._name),
            unit="FLOP/s" if self._cell["ceiling"] == "matmul" else "B/s",
            percent_of_ceiling=analysis.percent_of_ceiling(self._result, *of),
        )
        CLOCK.load(entry[self._state])
        benchmark.pedantic(CLOCK.advance, rounds=len(entry[self._state]))


@functools.cache
def device() -> Any:
    """The GPU, or None."""
    return CudaDevice() if environment.gpu() else None


@functools.cache
def device_ceilings() -> dict[str, Any]:
    return ceilings.measure(device())


@functools.lru_cache(maxsize=1)  # contestants and states of a cell follow each other
def measured_cell(cell: grids.Cell) -> dict[str, Any]:
    return measure.measure_cell(cell, measure.operations()[cell.operation], device())


def pytest_generate_tests(metafunc: Any) -> None:
    if "measured" not in metafunc.fixturenames:
        return
    if device() is None:
        metafunc.parametrize("measured", [pytest.param(None, marks=pytest.mark.skip("no GPU"))])
        return
    cases = []
    for cell in grids.cells(metafunc.module.OPERATIONS):
        operation = metafunc.module.OPERATIONS[cell.operation]
        names = [peer.name for peer in measure.others(cell, operation)]
        for state in STATES:
            mark = pytest.mark.benchmark(timer=CLOCK, group=f"{cell.key} {state}")
            for name in (analysis.OURS, *names):
                case_id = f"{cell.key}-{state}-{name}"
                cases.append(pytest.param((cell, name, state), marks=mark, id=case_id))
    metafunc.parametrize("measured", cases, indirect=True)


@pytest.fixture
def measured(request: Any) -> Measured:
    cell, name, state = request.param
    result = {"ceilings": device_ceilings()}
    return Measured(measured_cell(cell), name, state, result)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info.update(environment.facts())
