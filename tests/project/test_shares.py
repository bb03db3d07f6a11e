"""What CI runs in its two shares: nothing is lost between them."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import SEED, arch_of, case_of, left_to_others, on_a_device

EMULATOR = ("emulator-sm_80", "emulator-sm_90a")
RUNS = (("emulator", "gpu"), ("device", "device-sm_80"), ("device", "device-sm_90"))
GPUS = [gpu for _, gpu in RUNS]


def function(backends, cases=("",), **markers):
    """Items of a function, as pytest has collected them."""
    return [
        SimpleNamespace(
            nodeid=f"test_file.py::test_it[{case}{backend}]",
            callspec=SimpleNamespace(params={"backend": backend}),
            get_closest_marker=lambda name, backend=backend: (
                SimpleNamespace() if name == "gpu" and backend in GPUS else markers.get(name)
            ),
        )
        for case in cases
        for backend in backends
    ]


def runs(backends, on_gpus, cases=("",), **markers):
    """How often CI runs each case for each architecture."""
    found = Counter()
    for share, gpu in RUNS:
        there = [*backends, gpu] if on_gpus else backends
        items = function(there, cases, **markers)
        dropped = {item.nodeid for item in left_to_others(items, share)}
        found.update(
            (case_of(item), arch_of(item))
            for item in items
            if item.nodeid not in dropped
            and arch_of(item)
            # of a GPU's run `-m gpu` leaves what is on it
            and (share == "device") == on_a_device(item)
        )
    return found


@pytest.fixture
def seeds(monkeypatch):
    """Each is the seed of the run while the loop looks at it."""
    return (monkeypatch.setenv(SEED, str(seed)) for seed in range(40))


CASES = tuple(f"case{i}-" for i in range(9))


@pytest.mark.parametrize("cases", [CASES, CASES[:2]], ids=len)
def test_each_of_several_cases_runs_once_and_both_architectures_run(seeds, cases):
    for _ in seeds:
        found = runs(("numpy", *EMULATOR), True, cases)
        assert {case for case, _ in found} == {f"test_file.py::test_it[{case}]" for case in cases}
        assert len(found) == len(cases) and set(found.values()) == {1}
        assert {arch for _, arch in found} == {"sm_80", "sm_90"}


@pytest.mark.parametrize("backends", [EMULATOR, EMULATOR[1:], ()], ids=len)
def test_one_case_runs_for_both_architectures(seeds, backends):
    for _ in seeds:
        found = runs(backends, True)
        assert {arch for _, arch in found} == {"sm_80", "sm_90"}
        assert set(found.values()) == {1}


def test_what_has_no_case_on_a_gpu_runs_on_the_emulator(seeds):
    for _ in seeds:
        for found in (runs(EMULATOR, False, CASES), runs(EMULATOR, True, CASES, host=True)):
            assert len(found) == len(CASES) and set(found.values()) == {1}


def test_one_of_six_is_drawn(seeds):
    for _ in seeds:
        assert len(runs(EMULATOR, True, CASES, drawn=True)) == 2
        assert len(runs(EMULATOR, True, CASES[:1], drawn=True)) == 2  # both architectures
