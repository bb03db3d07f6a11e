"""Benchmarks of sampling: ours has to draw what the reference draws, a peer what it may draw."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
from conftest import on_a_gpu
from test_bench_device import patient  # noqa: F401
from test_bench_harness import Arrays, Device

from bench import bench_sample, grids, inside, peers
from bench.peers._cupy import Cupy
from bench.timing import analysis, device, harness, measure
from cuattn import reference

OPERATION = bench_sample.OPERATIONS["sample"]
FILTERS = {
    "plain": {},
    "top_k": {"top_k": 9},
    "top_p": {"top_p_percent": 60},
    "min_p": {"min_p_percent": 10},
    "top_k, top_p": {"top_k": 9, "top_p_percent": 60},
    "flat": {"top_p_percent": 90, "flat": 1},
}
every_filter = pytest.mark.parametrize("kind", FILTERS)


def cell_of(kind, dtype="float32"):
    sizes = {"rows": 7, "cols": 300, **FILTERS[kind]}
    return grids.Cell("sample", "sampling-filters", dtype, tuple(sizes.items()), 1)


def run(cell, change=lambda drawn, x: drawn, others=()):
    """Contestant to its entry, of a cell that is measured without a GPU; calls take some time.
    `change` is made to what ours draws."""
    clock, options = Device(), OPERATION.options(cell)

    def ours(x, seeds, out=None):
        drawn = OPERATION.ours(x, seeds, out=out, **options)
        drawn[...] = change(drawn, x)
        return drawn

    def slow(call):
        def slowly(*arrays, **how):
            clock.now += 1e-3
            return call(*arrays, **how)

        return slowly

    contestants = [peers.Contestant(analysis.OURS, Arrays(), ours), *others]
    first, *rest = [one._replace(call=slow(one.call)) for one in contestants]
    measured = harness.measure(
        cell, OPERATION, first, rest, clock, seconds=0.0, plan=inside.launched
    )
    return {entry["name"]: entry for entry in measured["contestants"]}


@every_filter
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_ours_is_right(kind, dtype):
    ours = run(cell_of(kind, dtype))[analysis.OURS]
    assert ours["status"] == "ok", ours["detail"]


def best(drawn, x):
    """The most probable element, which every filter leaves."""
    return x.argmax(axis=-1)[:, None]


def least(drawn, x):
    return x.argmin(axis=-1)[:, None]


def constant(index):
    return lambda drawn, x: np.full_like(drawn, index)


@every_filter
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (best, None),
        (least, "exclude"),
        (constant(300), "outside"),
        (constant(-1), "outside"),
    ],
)
def test_a_peer_may_draw_what_the_filters_leave(kind, change, why):
    cell = cell_of(kind)

    def peer(x, seeds):
        return change(seeds, x).astype(np.int32)

    def flat(x, seeds):
        return peer(x, seeds)[:, 0]

    others = [peers.Contestant(call.__name__, Arrays(), call) for call in (peer, flat)]
    entries = run(cell, others=others)
    assert entries[analysis.OURS]["status"] == "ok"
    right = why is None or (kind == "plain" and change is least)
    for other in ("peer", "flat"):
        assert entries[other]["status"] == ("ok" if right else "wrong")
        assert right or why in entries[other]["detail"]


@every_filter
def test_ours_draws_what_the_reference_draws(kind):
    def other(drawn, x):
        drawn[-1] = (drawn[-1] + 1) % 300
        return drawn

    assert run(cell_of(kind), other)[analysis.OURS]["status"] == "wrong"


def test_as_many_draws_as_rows():
    def two(x, seeds):
        return np.zeros((len(x), 2), np.int64)

    entries = run(cell_of("plain"), others=[peers.Contestant("two", Arrays(), two)])
    assert entries["two"]["status"] == "wrong" and "shape" in entries["two"]["detail"]


@every_filter
def test_what_may_be_drawn_is_what_is_drawn(kind, rng):
    """All that the reference draws with these filters, and no more than rounding allows."""
    cell = cell_of(kind)
    x, seeds = bench_sample.inputs(cell, np, rng)
    options = OPERATION.options(cell)
    drawn = reference.sample(x, 300, seed=seeds, **options)
    may = bench_sample.may_draw(x, **options)
    assert all(may[row, drawn[row][drawn[row] >= 0]].all() for row in range(len(x)))
    assert (may.sum(-1) - (drawn >= 0).sum(-1) <= 3).all()


def everyone(cell):
    """What is installed and runs without a GPU, with CuPy's expressions on NumPy."""
    filters = peers.Filters(**OPERATION.options(cell))
    found = list(Cupy(np, scipy.special).samplers(filters))
    for name, library in peers._libraries()[0].items():
        if name in ("torch", "jax"):
            found += library.samplers(filters)
    return [one for one in found if not one.name.startswith("torch.compile")]


@every_filter
def test_peers_are_right(kind):
    cell = cell_of(kind)
    found = run(cell, others=everyone(cell))
    assert {entry["status"] for entry in found.values()} == {"ok"}, found
    assert "CuPy x + Gumbel noise" in found


def test_peers_are_given_the_filters(monkeypatch):
    monkeypatch.setattr(measure, "Cupy", Arrays)
    given = []
    monkeypatch.setattr(
        peers, "contestants", lambda operation, **options: given.append((operation, options)) or []
    )
    measure.others(cell_of("top_k, top_p"), OPERATION)
    assert given == [("sample", {"top_k": 9, "top_p": 0.6})]


@on_a_gpu
@pytest.mark.parametrize("kind", ["plain", "top_k, top_p", "min_p"])
@pytest.mark.usefixtures("patient")
def test_a_cell_on_a_gpu(backend, kind):
    found = measure.measure_cell(cell_of(kind), OPERATION, device.CudaDevice())
    ours, *others = found["contestants"]
    assert ours["status"] == "ok", ours["detail"]
    assert [one["name"] for one in others if one["status"] in ("wrong", "failed")] == []


def test_few_elements_hold_most_of_the_probability_unless_rows_are_flat(rng):
    sizes = (("rows", 8), ("cols", 128_256))
    for flat, low, high in ((0, 0.8, 1), (1, 0, 0.1)):
        cell = grids.Cell("sample", "", "float32", (*sizes, ("flat", flat)), 1)
        x, _ = bench_sample.inputs(cell, np, rng)
        p = np.sort(reference.softmax(x))[:, :-257:-1].sum(axis=-1)
        assert low < np.median(p) < high


def test_work_is_one_read():
    work = OPERATION.work(cell_of("min_p", "bfloat16"))
    assert (work.bytes, OPERATION.ceiling) == (7 * (300 * 2 + 16), "read")


def test_cells_have_every_filter():
    found = {tuple(OPERATION.options(cell)) for cell in grids.cells(["sample"])}
    assert found == {(), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p")}
