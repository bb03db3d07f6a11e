"""Benchmarks of top-k: data, what is verified of ours and of a peer, and who takes part."""

from __future__ import annotations

import contextlib

import emulator
import numpy as np
import pytest
import scipy.special
from test_bench_harness import Arrays, Device

import cuattn
from bench import grids, inside, peers
from bench.counted import counters
from bench.peers._cupy import Cupy
from bench.timing import analysis, harness, measure

OPERATIONS = measure.operations()
NAMES = ["top_k", "softmax_topk"]
SHAPE = (("rows", 3), ("cols", 300), ("k", 9))
every_operation = pytest.mark.parametrize("name", NAMES)


def cell_of(name, dtype="float32", pattern=None, sizes=SHAPE, grid="router"):
    return grids.Cell(name, grid, dtype, sizes + ((pattern, 1),) * (pattern is not None), 1)


def contestant(device, cell, name, spoil=lambda result: result, call=None, library=None):
    """Our call or a peer's, which takes a millisecond; `spoil` changes what it returns."""
    call = call or (lambda x: OPERATIONS[cell.operation].ours(x, **options(cell)))

    def slow(x):
        device.now += 1e-3
        return spoil(call(x))

    return peers.Contestant(name, library or Arrays(), slow)


def options(cell):
    return OPERATIONS[cell.operation].options(cell)


def run(cell, spoil=lambda result: result, others=lambda device: ()):
    """Contestant to its entry, of a cell that is measured without a GPU."""
    device = Device()
    measured = harness.measure(
        cell,
        OPERATIONS[cell.operation],
        contestant(device, cell, analysis.OURS, spoil),
        list(others(device)),
        device,
        seconds=0.0,
        plan=inside.launched,
    )
    return {entry["name"]: entry for entry in measured["contestants"]}


# -- Ours --------------------------------------------------------------------------------------


@every_operation
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("pattern", [None, *grids.PATTERNS])
def test_ours_is_right_on_every_pattern(name, dtype, pattern):
    for device in (contextlib.nullcontext(), emulator.activate("sm_90")):
        with device:
            ours = run(cell_of(name, dtype, pattern))[analysis.OURS]
        assert (ours["status"], len(ours["cold"])) == ("ok", harness.ROUNDS[0]), ours["detail"]


def replaced(result, which, place, value):
    """A result with one number replaced."""
    arrays = [np.array(array) for array in result]
    arrays[which][place] = value
    return type(result)(*arrays)


def tie_turned(result):
    """The first two elements of the last row change places: equal in value where x is tied."""
    values, indices = (np.array(array) for array in result)
    indices[-1, :2] = indices[-1, 1::-1]
    return type(result)(values, indices)


SPOILED = {
    "a value": (lambda r: replaced(r, 0, (0, 4), r[0][0, 4] * 1.02), "error"),
    "another element": (lambda r: replaced(r, 1, (-1, -1), 150), "error"),
    "twice": (lambda r: replaced(r, 1, (1, 3), r[1][1, 2]), "an element is selected twice"),
    "outside": (lambda r: replaced(r, 1, (1, 3), 300), "an index is outside of the row"),
    "negative": (lambda r: replaced(r, 1, (1, 3), -1), "an index is outside of the row"),
    "one less": (lambda r: type(r)(r[0][:, :-1], r[1][:, :-1]), "shape"),
    "a turned tie": (tie_turned, "error"),
}


@every_operation
@pytest.mark.parametrize("how", SPOILED)
def test_a_wrong_result_is_seen(name, how):
    """Of equal elements a peer may choose another one, and cuattn may not."""
    spoil, why = SPOILED[how]
    cell = cell_of(name, pattern="tied" if how == "a turned tie" else "ascending")
    assert run(cell)[analysis.OURS]["status"] == "ok"
    ours = run(cell, spoil)[analysis.OURS]
    assert (ours["status"], ours["cold"]) == ("wrong", []) and why in ours["detail"]
    found = run(cell, others=lambda device: [contestant(device, cell, "peer", spoil)])["peer"]
    if how == "a turned tie":
        assert found["status"] == "ok"
    else:
        assert found["status"] == "wrong" and why in found["detail"]


# -- Peers -------------------------------------------------------------------------------------


def everyone(cell):
    """What is installed and runs without a GPU, with CuPy's expressions on NumPy."""
    k = cell.shape["k"]
    found = list(Cupy(np, scipy.special).contestants(cell.operation, k, False))
    for name, library in peers._libraries()[0].items():
        if name in ("torch", "jax"):
            found += library.contestants(cell.operation, k, False)
    return [one for one in found if not one.name.startswith("torch.compile")]


@every_operation
@pytest.mark.parametrize("pattern", [None, *grids.PATTERNS])
def test_peers_are_right(name, pattern):
    cell = cell_of(name, pattern=pattern)
    names = {one.name: (one.call, one.library) for one in everyone(cell)}

    def others(device):
        for peer, (call, library) in names.items():
            yield contestant(device, cell, peer, call=call, library=library)

    found = run(cell, others=others)
    assert {peer: found[peer]["status"] for peer in names} == dict.fromkeys(names, "ok")
    assert "CuPy expression" in names
    assert ("scipy.special.softmax, argpartition" in names) is (name == "softmax_topk")


@pytest.mark.parametrize(("grid", "names"), [("router", []), ("paper-topk", None)])
def test_the_kernels_of_the_paper_take_part_on_its_shapes(monkeypatch, grid, names):
    monkeypatch.setattr(measure, "Cupy", Arrays)
    monkeypatch.setattr(peers, "contestants", lambda operation, k: [])
    sizes = (("rows", 4), ("cols", 63), ("k", 5))
    cell = cell_of("softmax_topk", sizes=sizes, grid=grid)
    kernels = {one.name: one.call for one in measure.others(cell, OPERATIONS[cell.operation])}
    assert list(kernels) == (
        ["paper: safe softmax, then top-5", "paper: online softmax with top-5"]
        if names is None
        else names
    )

    def others(device):
        for peer, call in kernels.items():
            yield contestant(device, cell, peer, call=call)

    assert {entry["status"] for entry in run(cell, others=others).values()} == {"ok"}


def test_the_grid_of_the_paper():
    cells = [cell for cell in grids.cells(NAMES) if cell.grid == "paper-topk"]
    shapes = [tuple(cell.shape[name] for name in ("rows", "cols", "k")) for cell in cells]
    assert shapes == [(rows, 63 << i, 5) for rows in (4000, 10) for i in range(12)]
    assert {(cell.operation, cell.dtype) for cell in cells} == {("softmax_topk", "float32")}


def test_our_call_is_given_k(monkeypatch):
    """As `measure_cell` does it; the device and the library are stand-ins."""
    device = Device()
    monkeypatch.setattr(measure, "Cupy", Arrays)
    monkeypatch.setattr(measure, "CELL_SECONDS", 0.0)
    monkeypatch.setattr(peers, "contestants", lambda operation, k: [])
    cell = cell_of("top_k")
    table = OPERATIONS["top_k"]
    measured = measure.measure_cell(cell, table, device)
    assert analysis.status(measured) == "ok"
    assert measured["ceiling"] == "read"


# -- Data and work -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_patterns(dtype, rng):
    made = {}
    for pattern in grids.PATTERNS:
        (x,) = OPERATIONS["top_k"].inputs(cell_of("top_k", dtype, pattern), np, rng)
        assert (x.shape, x.dtype) == ((3, 300), inside.dtype_of(dtype))
        made[pattern] = x.astype(np.float64)
    assert (np.diff(made["ascending"]) >= 0).all()
    assert np.unique(made["tied"]).size == 64
    assert (made["border"] == 2).sum(-1).tolist() == [4] * 3
    assert np.unique(made["border"]).tolist() == [1, 2]
    quantised = made["quantised"]
    assert (quantised * 32 == np.rint(quantised * 32)).all() and np.unique(quantised).size > 20


@every_operation
def test_work_is_one_read_and_the_result(name):
    work = OPERATIONS[name].work(cell_of(name, "bfloat16"))
    assert work.bytes == 3 * (300 * 2 + 9 * (2 + 8))
    assert OPERATIONS[name].ceiling == "read"


# -- Counters ----------------------------------------------------------------------------------


def test_counters_of_every_call():
    """One read, the results, and where rows are long little more than one exponential."""
    found = {
        (row["operation"], row["cols"]): row
        for row in counters.count(("sm_80",), ((2, 70), (3, 4096)))
        if ", k = " in row["operation"]
    }
    ks = {f"{name}, k = {k}": k for name in NAMES for k in (5, 64, 256)}
    ks |= {"softmax_topk_state, k = 5": 5}
    assert found.keys() == {(call, n) for call, k in ks.items() for n in (70, 4096) if k <= n}
    for (call, cols), row in found.items():
        results = 3 * ks[call] + 2 * ("state" in call)  # float32 and int64, m and l
        assert (row["reads"], row["writes"]) == pytest.approx((1, results / cols)), call
        assert row["conflicts"] == 0
        if cols == 4096:
            assert ("softmax" in call) <= row["exponentials"] <= 1.35 * ("softmax" in call)


def test_cuattn_is_asked_as_users_do(rng):
    """Values and indices of the public functions, whatever stands between."""
    x = rng.standard_normal((3, 300), np.float32)
    for name in NAMES:
        got = OPERATIONS[name].ours(x, k=9)
        for a, b in zip(got, getattr(cuattn, name)(x, 9), strict=True):
            np.testing.assert_array_equal(a, b)
