"""Benchmarks of losses: what is verified of ours and of a peer, who takes part, bytes."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from conftest import on_a_gpu
from test_bench_device import patient  # noqa: F401
from test_bench_harness import Arrays, Device

from bench import bench_cross_entropy, grids, inside, peers
from bench.peers._cupy import Cupy
from bench.timing import analysis, device, harness, measure

OPERATIONS = bench_cross_entropy.OPERATIONS
every_operation = pytest.mark.parametrize("name", OPERATIONS)


def cell_of(name, dtype="float32"):
    return grids.Cell(name, "quack-loss", dtype, (("rows", 5), ("cols", 300)), 1)


def run(cell, ours=None, others=()):
    """Contestant to its entry, of a cell that is measured without a GPU; calls take some time."""
    clock, operation = Device(), OPERATIONS[cell.operation]

    def slow(call):
        def slowly(*arrays, **options):
            clock.now += 1e-3
            return call(*arrays, **options)

        return slowly

    contestants = [peers.Contestant(analysis.OURS, Arrays(), ours or operation.ours), *others]
    first, *rest = [one._replace(call=slow(one.call)) for one in contestants]
    measured = harness.measure(
        cell, operation, first, rest, clock, seconds=0.0, plan=inside.launched
    )
    return {entry["name"]: entry for entry in measured["contestants"]}


@every_operation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_ours_is_right(name, dtype):
    ours = run(cell_of(name, dtype))[analysis.OURS]
    assert ours["status"] == "ok", ours["detail"]
    assert ours["max_error"] <= ours["allowed_error"] < 0.3


@every_operation
def test_a_result_that_is_rounded_is_seen(name):
    """A number of a row has to be as exact as float32 is; a peer may round it to the dtype of x."""
    cell, own = cell_of(name, "bfloat16"), OPERATIONS[name].ours

    def rounded(*arrays, out=None):
        y = own(*arrays, out=out)
        y *= 1 + 2.0**-9
        return y

    def off(*arrays):
        y = own(*arrays)
        y *= 1.2
        return y

    others = [peers.Contestant(f.__name__, Arrays(), f) for f in (rounded, off)]
    found = {entry: result["status"] for entry, result in run(cell, others=others).items()}
    assert found == {analysis.OURS: "ok", "rounded": "ok", "off": "wrong"}
    entries = run(cell, rounded, others)
    assert entries[analysis.OURS]["status"] == ("ok" if name.endswith("backward") else "wrong")


@pytest.mark.parametrize("argument", ["labels", "grad", "lse", "x"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_arguments_are_seen(argument, dtype):
    """The verification of a gradient depends on all that it depends on."""
    names = peers.OPERATIONS["cross_entropy_backward"]
    own = OPERATIONS["cross_entropy_backward"].ours

    def changed(*arrays, out=None):
        given = dict(zip(names, (np.array(a) for a in arrays), strict=True))
        if argument == "labels":
            given["labels"] = (given["labels"] + 1) % given["x"].shape[1]
        else:
            given[argument] += -3 if argument == "lse" else 3
        return own(*given.values(), out=out)

    entry = run(cell_of("cross_entropy_backward", dtype), changed)[analysis.OURS]
    assert entry["status"] == "wrong" and "error" in entry["detail"]


def everyone(cell):
    """What is installed and runs without a GPU, with CuPy's expressions on NumPy."""
    found = list(Cupy(np, scipy.special).contestants(cell.operation, None, False))
    for name, library in peers._libraries()[0].items():
        if name in ("torch", "jax"):
            found += library.contestants(cell.operation, None, False)
    return [one for one in found if one.name != "torch.compile"]


@every_operation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peers_are_right(name, dtype):
    cell = cell_of(name, dtype)
    found = run(cell, others=everyone(cell))
    assert {entry["status"] for entry in found.values()} == {"ok"}, found
    assert "CuPy expression" in found


@on_a_gpu
@every_operation
@pytest.mark.usefixtures("patient")
def test_a_cell_on_a_gpu(backend, name):
    found = measure.measure_cell(cell_of(name, "bfloat16"), OPERATIONS[name], device.CudaDevice())
    ours, *others = found["contestants"]
    assert ours["status"] == "ok", ours["detail"]
    assert [one["name"] for one in others if one["status"] in ("wrong", "failed")] == []


def test_work_is_what_is_read_and_written():
    sizes = {
        name: operation.work(cell_of(name, "bfloat16")).bytes
        for name, operation in OPERATIONS.items()
    }
    assert sizes == {
        "cross_entropy": 5 * (300 * 2 + 8 + 4),
        "entropy": 5 * (300 * 2 + 4),
        "cross_entropy_backward": 5 * (2 * 300 * 2 + 8 + 4 + 4),
    }
    ceilings = [OPERATIONS[name].ceiling for name in ("cross_entropy", "cross_entropy_backward")]
    assert ceilings == ["read", "copy"]


def test_the_grid_of_quack():
    cells = [cell for cell in grids.cells(OPERATIONS) if cell.grid == "quack-loss"]
    shapes = [tuple(c.shape.values()) for c in cells if c.operation == "entropy"]
    pairs = [(32768, 256 << i) for i in range(9)] + [(16384, 131072), (8192, 262144)]
    assert shapes == 2 * pairs
